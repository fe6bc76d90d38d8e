"""The token shard format: the only place that reads or writes it.

A shard is a file <name>_{train,val}_NNNNNN.bin:

    bytes 0..1023   256 little-endian int32: 20240520, 1, number of tokens, zeros
    bytes 1024..    the tokens, little-endian uint16

Token 50256 (<|endoftext|>) stands before each document. llm.c's data scripts write the same format.
A folder holds the shards of one data set: all have the same <name>.
"""

from __future__ import annotations  # some name numpy's types

import contextlib
import errno
import functools
import os
import re
import resource
import shlex
import stat
import struct
import weakref
import zlib
from typing import Iterator

from nanofp8.config import PROJECT
from nanofp8.files import replace_file

try:
    import numpy as np
except Exception:  # missing or broken; finding and measuring shards works without it
    np = None

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
EOT = 50256         # GPT-2's <|endoftext|>, put before each document
GPT2_VOCAB = 50257  # token ids of GPT-2's BPE; higher ids only round a vocabulary up
MAX_TOKENS = 2**31 - 1  # of a shard: the header holds their number as an int32
FILE_NAME = re.compile(r"(.+)_(train|val)_([0-9]{6})\.bin", re.DOTALL)  # of a shard
NAME_PATTERN = "<name>_{train,val}_NNNNNN.bin"  # the same in words
UNFINISHED = "unfinished.txt"  # in a folder whose shards are being written: the command that writes them


class ShardError(ValueError):
    """A file is not a whole shard, or a folder of shards cannot be used.

    `fault` says what is wrong; the message adds the remedy.
    """

    def __init__(self, fault: str, remedy: str = "delete it and fetch or build it again (data/README.md)"):
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault


def unreadable(path: str | os.PathLike, error: OSError) -> ShardError:
    """Return the error for a shard that cannot be read. One that is there is not to be deleted for that."""
    remedy = "check the disk and the file's permissions"
    if error.errno == errno.EMFILE:
        remedy = "raise the limit of open files (ulimit -n), or make fewer and larger shards"
    elif error.errno == errno.ELOOP:
        remedy = "correct the link"
    return ShardError(f"{path} cannot be read ({error.strerror})",
                      *(() if isinstance(error, FileNotFoundError) else (remedy,)))


def find_shards(folder: str, split: str) -> tuple[list[str], list[str]]:
    """Find the shards of a split, "train" or "val", in a folder.

    Returns: their paths, by number; the names of .bin files that are not shards by their names, and are not read.
    Raises: ShardError if there are none, if the folder cannot be read, if its shards are unfinished, or if it holds
        shards of several data sets.
    """
    try:
        # Hidden files do not count: macOS writes ._x.bin beside x.bin on foreign file systems
        names = sorted(name for name in os.listdir(folder) if name.endswith(".bin") and not name.startswith("."))
        command = None
        with contextlib.suppress(FileNotFoundError):  # no other error: a folder that only lists its files is an error
            with open(os.path.join(folder, UNFINISHED), encoding="utf-8", errors="replace") as f:
                command = " ".join(f.read(1000).split())
    except (FileNotFoundError, NotADirectoryError):
        names, command = [], None
    except OSError as error:
        remedy = "check the disk and the folder's permissions"
        if error.errno == errno.ELOOP:
            remedy = "correct the link, or choose another --dataset or --data_dir"
        elif error.errno == errno.ENAMETOOLONG:
            remedy = "choose another --dataset or --data_dir"
        elif isinstance(error, PermissionError):
            remedy = "correct its permissions"
        raise ShardError(f"{folder} cannot be read ({error.strerror})", remedy) from None
    if command is not None:
        raise ShardError(f"the shards in {folder} are unfinished, because their preparation runs or was broken off",
                         f"wait for it, or run it again: `{command}`")
    matches = {name: FILE_NAME.fullmatch(name) for name in names}
    data_sets = sorted({match[1] for match in matches.values() if match})
    if len(data_sets) > 1:
        raise ShardError(f"{folder} holds shards of several data sets ({', '.join(data_sets)})",
                         "move each into a folder of its own")
    others = [name for name in names if not matches[name]]
    found = [os.path.join(folder, name) for name in names if matches[name] and matches[name][2] == split]
    if not found:
        what = f"no {split} shards ({os.path.join(folder, f'*_{split}_NNNNNN.bin')})"
        if others:
            raise ShardError(f"{what}; {others[0]!r} is not named {NAME_PATTERN}", "rename it if it is a shard")
        raise ShardError(what, f"{how_to_get(folder)}, or choose another --dataset or --data_dir")
    return found, others


@contextlib.contextmanager
def unfinished(folder: str | os.PathLike, command: str) -> Iterator[None]:
    """Let no shard of a folder count until the block has ended without an error: find_shards() refuses the folder.

    command: what a user runs to finish the shards. Raises: OSError.
    """
    path = os.path.join(folder, UNFINISHED)

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", errors="replace") as f:
            f.write(command + "\n")

    replace_file(path, write, sync=True)
    yield
    with contextlib.suppress(FileNotFoundError):  # the same command was started twice, and the other one has ended
        os.remove(path)


def how_to_get(folder: str) -> str:
    """Return what to do to get the shards of a data folder: the command that makes them, if the project has one."""
    folder = os.path.abspath(folder)
    dataset = os.path.basename(folder)
    script, argument = f"data/{dataset}/prepare.py", ""
    if dataset == "fineweb10B":
        script, argument = "data/cachedfineweb10b.py", " 9"
    if not os.path.isfile(os.path.join(PROJECT, script)):
        return "data/README.md says how to make them"
    default = os.path.join(PROJECT, "data", dataset)  # where the script writes unless it is told otherwise
    out = "" if os.path.realpath(folder) == os.path.realpath(default) else f" --out={shlex.quote(folder)}"
    return f"get them with `python {script}{argument}{out}`"


def read_token_count(path: str | os.PathLike) -> int:
    """Return the number of tokens of a shard, after checking its header and size.

    Raises: ShardError if the file cannot be read, is empty, truncated or too long, or is of another format.
    """
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.stat(path).st_mode):  # to open it could take for ever
            raise ShardError(f"{path} is not a file, but a pipe")
    try:
        with open(path, "rb") as f:
            header = f.read(HEADER_BYTES)
            size = os.fstat(f.fileno()).st_size
    except OSError as error:
        raise unreadable(path, error) from None
    if len(header) < HEADER_BYTES:
        raise ShardError(f"{path} has {size} bytes, fewer than the {HEADER_BYTES} of a shard's header")
    magic, version, tokens = struct.unpack("<3i", header[:12])
    if magic != SHARD_MAGIC:
        raise ShardError(f"{path} is not a token shard (magic number is {magic}, expected {SHARD_MAGIC})",
                         "if it should be one, delete it and fetch or build it again (data/README.md)")
    if version != SHARD_VERSION:
        raise ShardError(f"{path} has shard version {version}, expected {SHARD_VERSION}")
    if tokens < 1:
        raise ShardError(f"{path} holds no tokens (its header says {tokens})")
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        what = "is truncated" if size < expected else "is too long"
        raise ShardError(f"{path} {what}: {size} bytes, but {tokens} tokens take {expected}")
    return tokens


def open_shard(path: str | os.PathLike) -> np.memmap:
    """Memory-map the tokens of a shard: uint16, shape (tokens,), read-only. Raises ShardError."""
    tokens = read_token_count(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


class Shard:
    """The tokens of a shard, read piece by piece from a file that stays open. len() is their number.

    Training reads so, not through open_shard(): where a disk fails, or another program shortens the file, a memory map
    ends the process with SIGBUS. A file that is replaced does not change what is read.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises: ShardError, as read_token_count()."""
        self.path, self.tokens = path, read_token_count(path)
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, error) from None
        weakref.finalize(self, os.close, self.file)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if self.file > soft // 2:  # often 1,024 files are allowed, and more if a process asks
            resource.setrlimit(resource.RLIMIT_NOFILE,
                               (4 * soft if hard == resource.RLIM_INFINITY else min(4 * soft, hard), hard))

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Return the tokens from `start` on, `count` or as many as there are: uint16, 1-D.

        Raises: ShardError if the file cannot be read or has become shorter.
        """
        size = 2 * min(count, self.tokens - start)
        try:
            data = os.pread(self.file, size, HEADER_BYTES + 2 * start)
        except OSError as error:
            raise unreadable(self.path, error) from None
        if len(data) < size:
            raise ShardError(f"{self.path} has become shorter since the run started")
        return np.frombuffer(data, dtype="<u2")


WHOLE_BYTES, ENDS_BYTES, SAMPLES, SAMPLE_BYTES = 64 * 2**20, 2**20, 1024, 4096


def fingerprint(path: str | os.PathLike) -> dict:
    """Return what tells a shard from another one: its name, its bytes, and a CRC-32 of what is read of it.

    A file of up to 64 MB is read whole. Of a larger one, only the first and the last megabyte and 1,024 samples of 4 kB
    are read, spread evenly. So in a file of 200 MB, a change of one token is seen in one of 30 places; a change of
    100,000 tokens in a row is always seen.
    Raises: ShardError if the file cannot be read.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size <= WHOLE_BYTES:
                pieces = [(start, ENDS_BYTES) for start in range(0, size, ENDS_BYTES)]
            else:
                last = size - SAMPLE_BYTES
                pieces = [(0, ENDS_BYTES), (size - ENDS_BYTES, ENDS_BYTES),
                          *((i * last // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES))]
            crc = 0
            for start, count in pieces:
                crc = zlib.crc32(os.pread(f.fileno(), count, start), crc)
    except OSError as error:
        raise unreadable(path, error) from None
    return dict(name=os.path.basename(path), bytes=size, crc32=crc)


@functools.lru_cache(maxsize=2)
def epoch_order(epoch: int, count: int) -> np.ndarray:
    """Return the order, shape (count,), of the sequences in an epoch, counted from 0."""
    return np.random.RandomState(epoch).permutation(count)  # RandomState: the same numbers in every version of numpy


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write tokens (1-D integers, 0 to 65535) as a shard. The file `path` never holds half a shard.

    Raises: ValueError if the tokens are none, too many, of another shape or type, or out of range; OSError.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path}: a shard takes a non-empty 1-D array of integers, "
                         f"got {tokens.dtype} of shape {tokens.shape}")
    if tokens.size > MAX_TOKENS:
        raise ValueError(f"{path}: a shard holds at most {MAX_TOKENS:,} tokens, got {tokens.size:,}; make several")
    if tokens.dtype != np.uint16 and (tokens.min() < 0 or tokens.max() > 65535):
        raise ValueError(f"{path}: token ids must fit in uint16, got {tokens.min()} to {tokens.max()}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size

    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(header.tobytes())
            f.write(np.ascontiguousarray(tokens, dtype="<u2").data)

    replace_file(path, write, sync=True)
