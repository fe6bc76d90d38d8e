"""Tokenize Shakespeare, or any plain text file, into data/shakespeare/shakespeare_{train_000001,val_000000}.bin.

The two shards made from the default source come with the project, so this is needed only to make them again or to
train on a text of your own:

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py mytext.txt --out=data/mytext
    python data/shakespeare/prepare.py https://example.org/mytext.txt --out=data/mytext

GPT-2 tokens. The last 10% of the text, from a paragraph's start on, are val.

Token 50256 stands once before each of the two parts and nowhere else. It means "what comes next has nothing to do
with what came before", and that is true only there: the file runs from play to play without a mark, and its blank
lines part speeches, each of which answers the one before it. 50256 before each speech would teach the model to
forget whom it answers, and to stop after one speech when it writes.
"""

import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # data/common.py, from any working directory
from common import OneLineParser, UserError, error_line, gpt2_encoding, root_cause, run_script  # noqa: E402

from nanofp8.shards import EOT, write_shard  # noqa: E402

SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VAL_FRACTION = 0.1


def read_text(source):
    """The text at `source`, a path or an http(s) address, with \\n line ends; ValueError, one line, if it fails."""
    try:
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=30) as response:
                data = response.read()
        else:
            data = Path(source).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or root_cause(error)
        remedy = "check the network" if "://" in source else "check the path"
        raise ValueError(f"cannot read {source} ({reason}); {remedy}, or give another file or address") from None
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
    if len(text.strip()) < 100:
        raise ValueError(f"{source} holds {len(text.strip())} characters of text; give one of at least 100")
    return text


def split_text(text):
    """(train, val), which joined give `text`: val is the last 10%, from the next paragraph's start on."""
    cut = int(len(text) * (1 - VAL_FRACTION))
    for boundary in ("\n\n", "\n", " "):  # a text without paragraphs is cut at a line or a word
        at = text.find(boundary, cut)
        if at >= 0 and text[at:].strip():
            cut = at + len(boundary)
            break
    return text[:cut], text[cut:]


def main():
    parser = OneLineParser(description=__doc__)
    parser.add_argument("source", nargs="?", default=SOURCE, help="path or http(s) address (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=HERE, metavar="DIR", help="where the shards go (default %(default)s)"
    )
    parser.add_argument("--name", default="shakespeare", help="how their file names begin (default %(default)s)")
    args = parser.parse_args()
    try:
        train, val = split_text(read_text(args.source))
        encoding = gpt2_encoding()
        args.out.mkdir(parents=True, exist_ok=True)
        for part, text in (("val_000000", val), ("train_000001", train)):
            tokens = [EOT, *encoding.encode_ordinary(text)]
            path = args.out / f"{args.name}_{part}.bin"
            write_shard(path, tokens)
            print(f"{path}: {len(tokens):,} tokens")
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"cannot write to {args.out} ({error_line(error)}); choose another folder with --out"
        ) from None


if __name__ == "__main__":
    run_script(main)
