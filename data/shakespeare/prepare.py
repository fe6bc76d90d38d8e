"""Tokenize Shakespeare, or any plain text, into data/shakespeare/shakespeare_{train_000001,val_000000}.bin.

The project contains the two shards of the default source. Run this script to build them again, or to build shards of
another text:

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py mytext.txt --out=data/mytext
    python data/shakespeare/prepare.py https://example.org/mytext.txt --out=data/mytext

Output: GPT-2 tokens. Val is the last 10% of the text (--val_fraction), from the start of a paragraph.

A text may separate its documents by "<|endoftext|>", as TinyStories does: each becomes token 50256, and val begins with
a document if one is near.

In Shakespeare token 50256 stands once before each of the two parts and nowhere else. It tells the model that what
follows has nothing to do with what precedes it. That is true only there: nothing in the file marks where a play ends,
and its blank lines separate speeches, each of which answers the one before it. With 50256 before each speech, the model
would learn to ignore the previous speech, and to stop after one speech when it generates text.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import Iterator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]  # for nanofp8 and common, from any working directory
from nanofp8.config import explain_early_errors  # noqa: E402

if __name__ == "__main__":
    explain_early_errors(__file__)  # of a Python without numpy

import numpy as np  # noqa: E402
from common import (  # noqa: E402
    STOP,
    OneLineParser,
    UserError,
    add_split_arguments,
    command_line,
    data_set_name,
    encode_text,
    gpt2_encoding,
    local_path,
    not_blank,
    output_folder,
    refuse_other_data_sets,
    root_cause,
    run_script,
    too_few_val_tokens,
    writing,
)

from nanofp8.files import console  # noqa: E402
from nanofp8.shards import EOT, UNFINISHED, ShardError, open_shard, unfinished, write_shard  # noqa: E402

SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SOURCE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of the text in the shipped shards
VAL_FRACTION = 0.1  # of the text's characters
MIN_CHARACTERS = 100
PIECE = 1_000_000  # characters that are tokenized at once: Python's integers take 36 bytes a token
SEPARATOR = "<|endoftext|>"  # between documents; GPT-2's name of the token EOT


def read_text(source: str) -> str:
    """Read UTF-8 text from a path or an http(s) address; line ends become \\n.

    Raises: ValueError, one line with the remedy, if it cannot be read, has fewer than MIN_CHARACTERS characters, or is
        another text than SOURCE has always been.
    """
    try:
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=30) as response:
                data = response.read()
        else:
            data = local_path(source).read_bytes()
    except STOP:
        raise
    except BaseException as error:  # of the network also http.client.HTTPException
        reason = getattr(error, "strerror", None) or root_cause(error)
        remedy = "check the network" if "://" in source else "check the path"
        raise ValueError(f"cannot read {source} ({reason}); {remedy}, or give another file or address") from None
    if source == SOURCE and (actual := hashlib.sha256(data).hexdigest()) != SOURCE_SHA256:
        raise ValueError(f"the text at {source} is not the one in the project's shards (its SHA-256 is {actual}, not "
                         f"{SOURCE_SHA256}); try again later, or give a file")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
    length = len(text.strip())
    if length < MIN_CHARACTERS:
        raise ValueError(f"{source} has {length} characters of text; give a text of at least {MIN_CHARACTERS}")
    return text


def split_text(text: str, val_fraction: float = VAL_FRACTION) -> tuple[str, str]:
    """Return (train, val). Val is the last val_fraction, from the start of the next document (after a SEPARATOR; if val
    keeps half of its text), else paragraph, else line, else word."""
    end = cut = int(len(text) * (1 - val_fraction))
    for boundary in (SEPARATOR, "\n\n", "\n", " "):
        at = text.find(boundary, cut)
        near = boundary != SEPARATOR or at < (cut + len(text)) / 2
        if at >= 0 and near and text[at + len(boundary):].strip():
            cut = at + len(boundary)
            end = at if boundary == SEPARATOR else cut  # val begins with a token of its own
            break
    return text[:end], text[cut:]


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of PIECE characters or more, whose tokens together are those of the text: before a line
    break after a visible character, where GPT-2's pattern never matches across."""
    line_break, start = re.compile(r"(?<=\S)\n"), 0
    while start < len(text):
        found = line_break.search(text, start + PIECE)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def tokenize(text: str, val_fraction: float, min_val_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of train and of val, uint16, each with EOT before them, and EOT for each SEPARATOR.

    Raises: ValueError that names a val_fraction that gives enough val tokens, if one does.
    """
    encoding = gpt2_encoding()

    def encode(part: str) -> np.ndarray:
        parts = [np.array([] if part.startswith(SEPARATOR) else [EOT], dtype=np.uint16)]
        for piece in pieces(part):
            parts.append(np.array(encode_text(encoding, piece, special=True), dtype=np.uint16))
        return np.concatenate(parts)

    train, val = split_text(text, val_fraction)
    tokens = encode(val)
    if len(tokens) < min_val_tokens:
        larger = (f / 100 for f in range(math.ceil(100 * val_fraction), 51, 5))
        better = next((f for f in larger if len(encode(split_text(text, f)[1])) >= min_val_tokens), None)
        raise too_few_val_tokens(len(tokens), min_val_tokens, better)
    return encode(train), tokens


def refuse_to_replace(shards: dict[Path, np.ndarray]) -> None:
    """Raise ValueError if whole shards of these names hold other tokens: runs that were trained on them need them."""
    for path, tokens in shards.items():
        if os.path.exists(path) and not os.path.exists(path.parent / UNFINISHED):
            with contextlib.suppress(ShardError):  # a damaged one is written again
                if not np.array_equal(open_shard(path), tokens):
                    raise ValueError(f"{path} was made from another text or with other settings; delete the shards in "
                                     f"{path.parent} or choose another --out")


def main() -> None:
    """Build the shards that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("source", nargs="?", type=not_blank, default=SOURCE,
                        help="path or http(s) address (default %(default)s)")
    parser.add_argument("--out", type=output_folder, default=HERE, metavar="DIR",
                        help="output folder (default %(default)s)")
    parser.add_argument("--name", type=data_set_name, default="shakespeare",
                        help="first part of the file names (default %(default)s)")
    add_split_arguments(parser, VAL_FRACTION, "the text's characters")
    args = parser.parse_args()
    if args.source != SOURCE and args.out == HERE:
        parser.error("another text needs a folder of its own, or it would replace Shakespeare: give --out=data/NAME")
    try:
        refuse_other_data_sets(args.out, args.name)
        text = read_text(args.source)
        if separators := text.count(SEPARATOR):
            console(f"{args.source}: {SEPARATOR} stands {separators:,} times and becomes token {EOT}")
        train, val = tokenize(text, args.val_fraction, args.min_val_tokens)
        shards = {args.out / f"{args.name}_{part}.bin": tokens
                  for part, tokens in (("val_000000", val), ("train_000001", train))}
        refuse_to_replace(shards)
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
            with unfinished(args.out, command_line()):  # a new val shard beside an old train shard must not count
                for path, tokens in shards.items():
                    write_shard(path, tokens)
        for path, tokens in shards.items():
            console(f"{path}: {len(tokens):,} tokens")
    except ValueError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_script(main)
