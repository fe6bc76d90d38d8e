"""Download FineWeb10B as GPT-2 tokens into data/fineweb10B/: the val shard and the first N of 103 train shards.

Source: the Hugging Face dataset kjj0/fineweb10B-gpt2. A shard is 100M tokens, 200 MB; all 104 are about 20 GB.

    python data/cachedfineweb10b.py 9         # 900M tokens: the first 9 train shards
    python data/cachedfineweb10b.py           # all of it
    HF_ENDPOINT=https://hf-mirror.com python data/cachedfineweb10b.py 9

Run it again at any time: shards that are whole are kept, missing and broken ones are downloaded. A connection that
breaks is picked up where it broke; a run that was stopped starts the shard it was at again.
"""

import argparse
import errno
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from common import OneLineParser, UserError, error_line, root_cause, run_script  # noqa: E402

from nanofp8.shards import ShardError, read_token_count  # noqa: E402

REPO = "kjj0/fineweb10B-gpt2"
N_SHARDS = 103
SHARD_BYTES = 200_001_024  # 100M tokens
TRIES = 3  # for each shard
TRY_AGAIN = "check the network or set HF_ENDPOINT to a mirror, then run the same command again"


def shard_count(text):
    """argparse type: how many train shards."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= N_SHARDS:
        raise argparse.ArgumentTypeError(
            f"N is the number of train shards, 1 to {N_SHARDS}, got {text!r}; try: python data/cachedfineweb10b.py 9"
        )
    return int(text)


def fault(path):
    """What is wrong with the shard `path`, None if it is whole."""
    try:
        read_token_count(path)
    except ShardError as error:
        return error.fault  # without its remedy: it is done here


def remedy_for(error, out):
    """What to do about an exception that the download into the folder `out` raised."""
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
        return f"the dataset {REPO} is not there: unset HF_ENDPOINT or set it to a full mirror"
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"make room in {out} or correct its permissions, then run the same command again"
    return TRY_AGAIN


def download(names, out):
    """Bring the shards `names` into the folder `out` and check each; exits with one line where that fails."""
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError as error:
        raise UserError(
            f"the download needs huggingface_hub ({error_line(error)}); run: pip install -U huggingface_hub"
        ) from None
    try:
        # Ask once, without the client's half minute of retries: a machine without a network should hear it at once.
        name = names[0]
        get_hf_file_metadata(hf_hub_url(REPO, name, repo_type="dataset"))
        for i, name in enumerate(names, 1):
            print(f"{i}/{len(names)} {name}", flush=True)
            (out / name).unlink(missing_ok=True)  # the client would take a broken file for a finished one
            for tries_left in reversed(range(TRIES)):
                try:
                    hf_hub_download(REPO, name, repo_type="dataset", local_dir=out)
                    if wrong := fault(out / name):
                        raise OSError(f"the server's file is broken: {wrong}")
                    break
                except Exception as error:
                    (out / name).unlink(missing_ok=True)
                    if tries_left == 0 or remedy_for(error, out) != TRY_AGAIN:
                        raise
                    # Some versions of the client give up when a connection breaks; called again, they go on from there.
                    print(f"{root_cause(error)}; trying again", flush=True)
                    time.sleep(1)
    except Exception as error:  # by version and kind: the client's own errors, OSError, httpx's or requests'
        raise UserError(
            f"cannot download {name} from {constants.ENDPOINT} ({root_cause(error)}); "
            f"{remedy_for(error, out)}; whole shards are kept"
        ) from None


def main():
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "n",
        metavar="N",
        nargs="?",
        type=shard_count,
        default=N_SHARDS,
        help="how many train shards, 1 to %(default)s (default: all %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "fineweb10B", metavar="DIR", help="where they go (default %(default)s)"
    )
    args = parser.parse_args()

    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, args.n + 1)]
    missing = []
    for name in names:
        if wrong := fault(args.out / name):
            missing.append(name)
            if (args.out / name).exists():
                print(f"{wrong}; downloading it again")
    if missing:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(args.out).free
        except OSError as error:
            raise UserError(f"{args.out}: {error.strerror}; choose another folder with --out") from None
        if free < len(missing) * SHARD_BYTES:
            raise UserError(
                f"{len(missing)} shards take {len(missing) * SHARD_BYTES / 1e9:.1f} GB and {args.out} has "
                f"{free / 1e9:.1f} GB free; ask for fewer with N or choose another folder with --out"
            )
        download(missing, args.out)
    tokens = sum(read_token_count(args.out / name) for name in names[1:])
    kept = len(names) - len(missing)
    print(
        f"{args.out}: val and {args.n} train shards, {tokens:,} train tokens ({kept} kept, {len(missing)} downloaded)"
    )


if __name__ == "__main__":
    run_script(main)
