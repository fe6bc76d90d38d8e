"""Download FineWeb10B as GPT-2 tokens into data/fineweb10B/: the val shard and the first N of 103 train shards.

Source: the Hugging Face data set kjj0/fineweb10B-gpt2. A shard has 100M tokens and takes 200 MB; all 104 take about
20 GB.

    python data/cachedfineweb10b.py 9         # 900M tokens: the first 9 train shards
    python data/cachedfineweb10b.py           # all train shards
    HF_ENDPOINT=https://hf-mirror.com python data/cachedfineweb10b.py 9

The command can be repeated at any time: it keeps complete shards and downloads missing and broken ones. After a broken
connection the download continues where it stopped. After an interruption the current shard is downloaded again.
"""

import argparse
import errno
import os
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for nanofp8 and common, from any working directory
from common import OneLineParser, UserError, error_line, root_cause, run_script  # noqa: E402

from nanofp8.shards import ShardError, read_token_count  # noqa: E402

REPO = "kjj0/fineweb10B-gpt2"
N_SHARDS = 103
SHARD_BYTES = 200_001_024  # 100M tokens
ATTEMPTS = 3  # per shard
TRY_AGAIN = "check the network or set HF_ENDPOINT to a mirror, then run the same command again"


def shard_count(text: str) -> int:
    """Convert an argument to a number of train shards, 1 to N_SHARDS, for argparse."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= N_SHARDS:
        raise argparse.ArgumentTypeError(
            f"N, the number of train shards, must be 1 to {N_SHARDS}, got {text!r}; "
            "try: python data/cachedfineweb10b.py 9"
        )
    return int(text)


def find_fault(path: str | os.PathLike) -> str | None:
    """Return what is wrong with a shard, or None if it is complete."""
    try:
        read_token_count(path)
    except ShardError as error:
        return error.fault  # without the remedy, a new download, which follows here
    return None


def remedy_for(error: BaseException, out: Path) -> str:
    """Return what to do about an exception of the download into the folder `out`."""
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
        return f"the server does not have the data set {REPO}: unset HF_ENDPOINT or set it to a full mirror"
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"free some space in {out} or correct its permissions, then run the same command again"
    return TRY_AGAIN


def download(names: list[str], out: Path) -> None:
    """Download the shards `names` into the folder `out` and check each.

    Raises: UserError that names the shard that cannot be downloaded.
    """
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    except ImportError as error:
        raise UserError(
            f"the download needs huggingface_hub ({error_line(error)}); run: pip install -U huggingface_hub"
        ) from None
    name = names[0]
    try:
        # Ask once, without the client's half minute of retries, to report a missing network at once.
        get_hf_file_metadata(hf_hub_url(REPO, name, repo_type="dataset"))
        for i, name in enumerate(names, 1):
            print(f"{i}/{len(names)} {name}", flush=True)
            download_shard(name, out)
    except Exception as error:  # depends on version and cause: errors of the client, of httpx or requests, or OSError
        raise UserError(
            f"cannot download {name} from {constants.ENDPOINT} ({root_cause(error)}); "
            f"{remedy_for(error, out)}; complete shards are kept"
        ) from None


def download_shard(name: str, out: Path) -> None:
    """Download one shard into the folder `out` and check it. Raises what the last attempt raised."""
    from huggingface_hub import hf_hub_download

    (out / name).unlink(missing_ok=True)  # the client would not replace a broken file
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            hf_hub_download(REPO, name, repo_type="dataset", local_dir=out)
            if fault := find_fault(out / name):
                raise OSError(f"the server's file is broken: {fault}")
            return
        except Exception as error:
            (out / name).unlink(missing_ok=True)
            if attempts_left == 0 or remedy_for(error, out) != TRY_AGAIN:
                raise
            # Some versions of the client give up when a connection breaks. A second call continues the download.
            print(f"{root_cause(error)}; trying again", flush=True)
            time.sleep(1)


def main() -> None:
    """Download the shards that the command line asks for, except those that are complete."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("n", metavar="N", nargs="?", type=shard_count, default=N_SHARDS,
                        help="number of train shards, 1 to %(default)s (default: all %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "fineweb10B", metavar="DIR",
                        help="output folder (default %(default)s)")
    args = parser.parse_args()

    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, args.n + 1)]
    missing = []
    for name in names:
        if fault := find_fault(args.out / name):
            missing.append(name)
            if (args.out / name).exists():
                print(f"{fault}; downloading it again")
    if missing:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(args.out).free
        except OSError as error:
            raise UserError(f"cannot write to {args.out} ({error.strerror}); "
                            "choose another folder with --out") from None
        if free < len(missing) * SHARD_BYTES:
            raise UserError(
                f"{len(missing)} shards take {len(missing) * SHARD_BYTES / 1e9:.1f} GB, but {args.out} has "
                f"{free / 1e9:.1f} GB free; choose a smaller N or another folder with --out"
            )
        download(missing, args.out)
    tokens = sum(read_token_count(args.out / name) for name in names[1:])
    kept = len(names) - len(missing)
    print(f"{args.out}: val and {args.n} train shards, {tokens:,} train tokens "
          f"({kept} kept, {len(missing)} downloaded)")


if __name__ == "__main__":
    run_script(main)
