"""Download FineWeb10B as GPT-2 tokens into data/fineweb10B/: the val shard and the first N of 103 train shards.

Source: the Hugging Face data set kjj0/fineweb10B-gpt2. A shard has 100M tokens and takes 200 MB; all 104 take about
20 GB.

    python data/cachedfineweb10b.py 9         # 900M tokens: the first 9 train shards
    python data/cachedfineweb10b.py           # all train shards
    HF_ENDPOINT=https://hf-mirror.com python data/cachedfineweb10b.py 9

The command can be repeated at any time: it keeps complete shards and downloads missing and broken ones. After a broken
connection the download continues where it stopped. After an interruption the current shard is downloaded again.

download.json in the same folder records N, so that run.sh completes the download, and the data set's revision, so that
later shards are of the same one. Each file is checked against the SHA-256 that the server states for it.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for nanofp8 and common, from any working directory
from nanofp8.config import explain_early_errors  # noqa: E402

if __name__ == "__main__":
    explain_early_errors(__file__)  # of a Python without numpy

import hub  # noqa: E402
from common import STOP, OneLineParser, UserError, error_line, output_folder, root_cause, run_script  # noqa: E402

from nanofp8.files import FOLDER_FAULTS, console, replace_file  # noqa: E402
from nanofp8.shards import ShardError, read_token_count  # noqa: E402

REPO = "kjj0/fineweb10B-gpt2"
N_SHARDS = 103
SHARD_BYTES = 200_001_024  # 100M tokens
ATTEMPTS = 3  # per shard
RECORD_NAME = "download.json"


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


def read_record(out: Path) -> dict[str, Any]:
    """Return the record of a folder's download; a new one if there is none.

    A record is {"train_shards": number that was asked for last, "revision": of the data set, or None before the first
    download, "sha256": {file name: as the server states it}}. run.sh reads "train_shards".

    Raises: UserError if the file cannot be read, or if `out` is not a folder.
    """
    path = out / RECORD_NAME
    try:
        record = json.loads(path.read_text())
        return {"train_shards": int(record["train_shards"]), "revision": record["revision"],
                "sha256": dict(record["sha256"])}
    except FileNotFoundError:
        return {"train_shards": 0, "revision": None, "sha256": {}}
    except NotADirectoryError:
        raise UserError(f"{out} is not a folder; choose another --out") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({root_cause(error)}); delete it, then run the same command again, or "
                        "choose another --out") from None


def save_record(record: dict[str, Any], out: Path) -> None:
    """Write the record of a folder's download. Raises OSError."""
    text = json.dumps(record, indent=1)
    replace_file(out / RECORD_NAME, lambda path: Path(path).write_text(text), sync=True)


def remedy_for(error: BaseException, out: Path) -> str:
    """Return what to do about an exception of the download into the folder `out`."""
    if isinstance(error, OSError) and (error.filename or error.errno in FOLDER_FAULTS):
        return f"free some space in {out} or correct its permissions, then run the same command again"
    return hub.remedy(error, REPO)


def download(names: list[str], out: Path, record: dict[str, Any]) -> None:
    """Download the shards `names` into the folder `out`, check each, and record revision and checksums.

    Raises: UserError that names the shard that cannot be downloaded.
    """
    try:
        from huggingface_hub import constants
    except Exception as error:
        raise UserError(f"the download needs huggingface_hub ({error_line(error)}); "
                        f"{hub.wrong_setting() or 'run: pip install -U huggingface_hub'}") from None
    name = names[0]
    try:
        for i, name in enumerate(names, 1):
            console(f"{i}/{len(names)} {name}")
            download_shard(name, out, record)
            save_record(record, out)
    except STOP:
        raise
    except BaseException as error:  # depends on version and cause: errors of the client or its libraries, or OSError
        raise UserError(
            f"cannot download {name} from {constants.ENDPOINT} ({root_cause(error)}); "
            f"{remedy_for(error, out)}; complete shards are kept"
        ) from None


def download_shard(name: str, out: Path, record: dict[str, Any]) -> None:
    """Download one shard of the recorded revision into the folder `out` and check it. Complete the record.

    Raises: what the last attempt raised.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            # Ask once, without the client's half minute of retries, to report a missing network at once.
            metadata = get_hf_file_metadata(hf_hub_url(REPO, name, repo_type="dataset", revision=record["revision"]))
            record["revision"] = metadata.commit_hash
            (out / name).unlink(missing_ok=True)  # the client would not replace a broken file
            hf_hub_download(REPO, name, repo_type="dataset", revision=record["revision"], local_dir=out)
            if fault := find_fault(out / name):
                raise OSError(f"the server's file is broken: {fault}")
            stated = hub.stated_sha256(metadata)
            hub.check_sha256(out / name, stated)
            record["sha256"][name] = stated
            return
        except STOP:
            raise
        except BaseException as error:
            (out / name).unlink(missing_ok=True)
            if attempts_left == 0 or remedy_for(error, out) not in (hub.TRY_AGAIN, hub.SERVER_FAULT):
                raise
            # Some versions of the client give up when a connection breaks. A second call continues the download.
            console(f"{root_cause(error)}; trying again")
            time.sleep(1)


def cannot_write(out: Path, error: OSError) -> UserError:
    """Return the error for a folder that cannot be written."""
    return UserError(f"cannot write to {out} ({error.strerror}); choose another folder with --out")


def main() -> None:
    """Download the shards that the command line asks for, except those that are complete."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("n", metavar="N", nargs="?", type=shard_count, default=N_SHARDS,
                        help="number of train shards, 1 to %(default)s (default: all %(default)s)")
    parser.add_argument("--out", type=output_folder, default=HERE / "fineweb10B", metavar="DIR",
                        help="output folder (default %(default)s)")
    args = parser.parse_args()

    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, args.n + 1)]
    missing = []
    for name in names:
        if fault := find_fault(args.out / name):
            missing.append(name)
            if os.path.exists(args.out / name):
                console(f"{fault}; downloading it again")
    record = read_record(args.out)
    asked_before, record["train_shards"] = record["train_shards"], args.n
    if missing:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(args.out).free
        except OSError as error:
            raise cannot_write(args.out, error) from None
        if free < len(missing) * SHARD_BYTES:
            raise UserError(
                f"{len(missing)} shards take {len(missing) * SHARD_BYTES / 1e9:.1f} GB, but {args.out} has "
                f"{free / 1e9:.1f} GB free; choose a smaller N or another folder with --out"
            )
        try:
            save_record(record, args.out)
        except OSError as error:
            raise cannot_write(args.out, error) from None
        download(missing, args.out, record)
    elif record["train_shards"] != asked_before:
        with contextlib.suppress(OSError):  # a folder that cannot be written has all that was asked for
            save_record(record, args.out)
    try:
        tokens = sum(read_token_count(args.out / name) for name in names[1:])
    except ShardError as error:  # another download into the same folder has just replaced it
        raise UserError(f"{error.fault}; wait until no other download writes there, then run the same command again"
                        ) from None
    kept = len(names) - len(missing)
    console(f"{args.out}: val and {args.n} train shards, {tokens:,} train tokens "
            f"({kept} kept, {len(missing)} downloaded)")


if __name__ == "__main__":
    run_script(main)
