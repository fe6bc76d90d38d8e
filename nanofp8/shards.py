"""The shard format: 256 int32 of header, then uint16 tokens."""

import os

import numpy as np

from nanofp8.config import UserError


EOT = 50256  # GPT-2's <|endoftext|>, put before each document


SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256


def open_shard(path):
    """Memory-map the tokens of one shard (256 int32 of header, then uint16 tokens).

    Returns: np.memmap of uint16, shape (tokens,).
    Raises: UserError naming the file and the remedy if it is empty, truncated or of another format.
    """
    remedy = "delete it and fetch or build it again (data/README.md)"
    try:
        with open(path, "rb"):
            size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}")
    if size < 4 * HEADER_INTS:
        raise UserError(f"{path} holds {size} bytes, less than a shard's header of {4 * HEADER_INTS}: {remedy}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header[0] != SHARD_MAGIC:
        raise UserError(f"{path} is no token shard (magic number {header[0]}, not {SHARD_MAGIC}): {remedy}")
    if header[1] != SHARD_VERSION:
        raise UserError(f"{path} is a shard of version {header[1]}, this script reads version {SHARD_VERSION}: {remedy}")
    tokens, expected = int(header[2]), 4 * HEADER_INTS + 2 * int(header[2])
    if size != expected:
        raise UserError(f"{path} holds {size} bytes where its header's {tokens} tokens take {expected}: {remedy}")
    if tokens == 0:
        raise UserError(f"{path} holds no tokens: {remedy}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(tokens,))
