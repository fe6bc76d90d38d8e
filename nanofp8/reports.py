"""Reports of runs: read run folders, find a finished run again, write a table with its data and picture."""

import contextlib
import datetime
import json
import os
import pathlib
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Callable

from nanofp8.config import UserError, flag_values, may_choose
from nanofp8.files import console, replace_file
from nanofp8.runlog import read_log
from nanofp8.schedule import steps_of_fraction

NEEDED = {"seed", "dataset", "device", "versions", "world_size", "parameters", "n_layer", "n_embd", "vocab_size",
          "block_size", "batch_size", "total_batch_size", "max_iters", "warmup_iters", "eval_tokens"}  # in config.json


@dataclass
class RunData:
    """What a report needs of a finished or unfinished run."""

    config: dict
    train: list[dict]   # records of kind "train"
    val: list[dict]
    done: dict | None

    @property
    def losses(self) -> list[float | None]:
        """Train loss of each step; None for one that was not finite."""
        return [record["loss"] for record in self.train]

    @property
    def warmup(self) -> int:
        """Steps of the warm-up of the learning rates."""
        return steps_of_fraction(SimpleNamespace(**self.config), self.config.get("warmup_ratio", 0.0),
                                 self.config["warmup_iters"])

    @property
    def timed(self) -> list[dict]:
        """The train records after the warm-up, over which speed is measured."""
        return self.train[self.warmup:] or self.train

    @property
    def val_loss(self) -> float | None:
        """Last val loss in bf16; None without one, or over one sequence a rank, which is what `speed` evaluates."""
        if not self.val or self.config["eval_tokens"] <= self.config["world_size"] * self.config["block_size"]:
            return None
        return ((self.done or {}).get("val_losses") or {}).get("bf16", self.val[-1]["val_loss"])


def read_run(folder: str) -> RunData:
    """Read a run folder's config.json and log.jsonl. Raises UserError if it is not one, or has no training step."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        if lacking := NEEDED - {*config}:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a run folder of train.py (config.json: {error}); leave it out", 2) from None
    records = read_log(folder)
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "val", "done")}
    if not kinds["train"]:
        raise UserError(f"{folder}/log.jsonl holds no training step yet", 2)
    return RunData(config, kinds["train"], kinds["val"], (kinds["done"] or [None])[-1])


def finished_run(cfg: SimpleNamespace, machine: dict) -> str | None:
    """Return the folder of a run that was finished with these very flags, by this code and on this device, or None."""
    ignored = {"run_name", "out_dir"} | ({"batch_size"} if may_choose(cfg, "batch_size") else set())
    wanted = {k: v for k, v in flag_values(cfg).items() if k not in ignored}
    wanted |= {k: machine[k] for k in ("device", "code")}
    for n in range(1, 100):
        folder = os.path.join(cfg.out_dir, cfg.run_name if n == 1 else f"{cfg.run_name}-{n}")
        if not os.path.isdir(folder):
            return None
        try:
            run = read_run(folder)
        except UserError:  # a run that was broken off
            continue
        if run.done and all(run.config.get(k) == v for k, v in wanted.items()):
            return folder
    return None


def header(config: dict, command: str) -> list[str]:
    """Return the first lines of a report: date, device and versions of this run's config.json; the command."""
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items() if version)
    return [f"{datetime.date.today()}, {config['device']}, {versions}", "", f"    {command}", ""]


def table(rows: list[dict], columns: list[tuple[str, Callable[[dict], str]]]) -> list[str]:
    """Return the lines of a Markdown table from (title, row -> cell) of each column, without columns that are empty."""
    texts = [[title, *map(cell, rows)] for title, cell in columns]
    texts = [column for column in texts if any(column[1:])]
    lines = ["| " + " | ".join(cells) + " |" for cells in zip(*texts, strict=True)]
    return [lines[0], "|" + "---|" * len(texts), *lines[1:]]


def check_out(out: str) -> None:
    """Check that a report can be written: before hours of training, not after them. Raises UserError."""
    folder = os.path.dirname(os.path.abspath(out))
    try:
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        tempfile.TemporaryFile(dir=folder).close()
        for path in (out + ending for ending in (".json", ".md", ".png")):
            with contextlib.suppress(FileNotFoundError):
                os.stat(path)  # a name may be too long
                open(path, "ab").close()
    except OSError as error:
        raise UserError(f"no report can be written to {out} ({error.strerror or error}); choose another --out",
                        2) from None


def write_report(out: str, command: str, data: dict[str, Any], text: str, plot: Callable[[str], None]) -> None:
    """Print the text; write out.json (date, command and `data`), out.md (`text`) and out.png (by `plot`).

    Raises: UserError if they cannot be written; the text has been printed then.
    """
    console("\n" + text)
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        data = dict(date=str(datetime.date.today()), command=command, **data)
        for ending, content in ((".json", json.dumps(data, indent=1)), (".md", text)):
            content = content.encode(errors="backslashreplace")  # a folder's name need not be UTF-8
            replace_file(out + ending, lambda path, content=content: pathlib.Path(path).write_bytes(content))
        plot(out + ".png")
    except ImportError:
        console("no plot: matplotlib is not installed")
    except OSError as error:
        raise UserError(f"the table above cannot be written to {out} ({error.strerror or error}); choose another "
                        f"--out") from None
