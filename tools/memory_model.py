"""
Compare the predictions of nanofp8/memory.py with measured peaks on a GPU; or write the table of docs/performance.md.

    python tools/memory_model.py                                     # the whole card, then 32, 24, 16 and 12 GB of it
    python tools/memory_model.py '--cases=d20;d20 bf16' --limits=0   # some cases; 0 is the whole card
    torchrun --standalone --nproc_per_node=4 tools/memory_model.py '--cases=d20'   # the largest figure of all ranks
    python tools/memory_model.py --table                             # predictions alone: needs no GPU
    python tools/memory_model.py --table --write                     # replace the table in docs/performance.md

Each case trains a few steps of 131,072 tokens on random tokens by train.py's own run(), in this process: calibration,
eager steps, CUDA graphs and an evaluation. Under a limit, torch.cuda.set_per_process_memory_fraction() lets torch have
that many GB (10^9 bytes), and batch_size="auto" chooses; on the whole card the case's own batch_size runs, if it has
one. A case that runs out of memory is a row too.

The last lines are what memory.py's constants WORKSPACE, FRAGMENTATION and CONTEXT would have to be at least, so that no
prediction is too low.

    --cases="NAME;NAME"   of CASES
    --limits=0,32,24      GB that torch may have
    --steps=6             optimizer steps of each run; CUDA graphs are captured in the fourth
    --out=PATH            write PATH.md and PATH.json, by default results/<card>/memory
"""

import contextlib
import datetime
import io
import json
import os
import pathlib
import shlex
import sys
import tempfile
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

import train  # before torch: it sets the allocator's environment variable

# isort: split
import numpy as np
import torch
import torch.distributed as dist

from nanofp8 import memory
from nanofp8.config import OneLineParser, UserError, exit_with
from nanofp8.machine import card_name, describe_machine
from nanofp8.memory import GB, Kind, predict
from nanofp8.procs import Processes, start_processes
from nanofp8.reports import header, table
from nanofp8.shards import GPT2_VOCAB, write_shard

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- written by tools/memory_model.py -->\n", "<!-- end -->\n"
TOKENS = 131072  # of a step


class Case(NamedTuple):
    """Flags of a run, and the micro-batch that it takes on the whole card; 0: auto."""

    flags: dict[str, Any]
    batch_size: int = 0


BF16, AC = dict(USE_FP8=False), dict(USE_AC_BLOCKS=True)
CASES = {
    "d20": Case(dict(preset="d20"), 16),
    "d20, 8": Case(dict(preset="d20"), 8),
    "d20, 4": Case(dict(preset="d20"), 4),
    "d20, 1": Case(dict(preset="d20"), 1),
    "d20 current": Case(dict(preset="d20", FP8_RECIPE="current"), 16),
    "d20 block": Case(dict(preset="d20", FP8_RECIPE="block"), 16),
    "d20 bf16": Case(dict(preset="d20") | BF16, 16),
    "d20 no graphs": Case(dict(preset="d20", USE_CUDA_GRAPHS=False), 16),
    "d20 recomputed": Case(dict(preset="d20") | AC, 16),
    "d20 recomputed, 2": Case(dict(preset="d20") | AC, 2),
    "d20 attention recomputed": Case(dict(preset="d20", USE_AC_ATTENTION=True), 16),
    "d20 bf16 recomputed": Case(dict(preset="d20") | BF16 | AC, 16),
    "speedrun": Case(dict(preset="speedrun"), 16),
    "speedrun current": Case(dict(preset="speedrun", FP8_RECIPE="current"), 8),
    "speedrun bf16": Case(dict(preset="speedrun") | BF16, 16),
    "d12": Case(dict(preset="d12"), 32),
    "d12 bf16": Case(dict(preset="d12") | BF16, 32),
    "d20 FSDP2": Case(dict(preset="d20", USE_FSDP2=True), 16),
    "d20 DDP": Case(dict(preset="d20", USE_DDP=True), 16),
}
UNDER_LIMITS = ("d20", "d20 current", "d20 bf16", "d20 recomputed", "speedrun", "d12")  # all if --cases is given

# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def random_data(folder: str) -> None:
    """Write a data set "random" into a folder: a train and a val shard of random tokens."""
    generator = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "random"), exist_ok=True)
    for split, tokens in (("train", 4 * TOKENS), ("val", TOKENS)):
        write_shard(os.path.join(folder, "random", f"r_{split}_000000.bin"),
                    generator.integers(0, GPT2_VOCAB - 1, tokens, dtype=np.uint16))


def outside(device: torch.device) -> float:
    """Return the bytes of a GPU that are in use outside of torch's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def measure(name: str, limit: float, steps: int, folder: str, procs: Processes) -> dict[str, Any]:
    """Train a case with `limit` GB for torch (0: the whole card); return predicted and measured bytes, and the outcome.

    folder: of random_data(); the run folder goes there too.
    """
    case, device = CASES[name], procs.device
    total = torch.cuda.get_device_properties(device).total_memory
    memory.free_memory()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GB / total) if limit else 1.0, device)
    flags = case.flags | dict(dataset="random", data_dir=folder, out_dir=os.path.join(folder, "out"), max_iters=steps,
                              total_batch_size=TOKENS, eval_interval=0, eval_tokens=TOKENS // 2, keep_checkpoints=0)
    if not limit and case.batch_size:
        flags["batch_size"] = case.batch_size
    cfg = train.read_flags([f"--{flag}={value}" for flag, value in flags.items()])
    before, printed, outcome = outside(device), io.StringIO(), "trained"
    try:
        with contextlib.redirect_stdout(printed):
            run_folder = train.run(cfg, procs)
        with open(os.path.join(run_folder, "config.json"), encoding="utf-8") as f:
            wrapper = json.load(f)["wrapper"]
    except UserError as error:
        outcome = str(error)
    except torch.OutOfMemoryError:
        if procs.world_size > 1:
            raise
        outcome = "out of memory during training"
    row = dict(case=name, limit=limit, batch_size=cfg.batch_size, outcome=outcome)
    tried = [line for line in printed.getvalue().splitlines() if line.startswith("micro-batch: ")]
    chosen = next((line for line in printed.getvalue().splitlines() if line.startswith("micro-batch ")), "")
    row |= dict(chosen=chosen.removeprefix("micro-batch").strip(), tried=tried)
    if outcome == "trained":
        kind = memory.kind_of(cfg, train.select_precision(cfg, device), wrapper, procs)
        prediction = predict(cfg, kind, cfg.batch_size)
        measured = procs.gather((torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device),
                                 outside(device) - before))
        allocated, reserved, context = (max(values) for values in zip(*measured, strict=True))
        row |= dict(format=kind.format, blocks=kind.blocks, prediction=prediction._asdict(), peak=prediction.peak,
                    need=prediction.need, allocated=allocated, reserved=reserved, context=context)
    if te := sys.modules.get("transformer_engine.pytorch.quantization"):
        te.FP8GlobalStateManager.reset()
    memory.free_memory()
    return row


def calibration(rows: list[dict]) -> list[str]:
    """Return what memory.py's constants must be at least for the runs that trained, as lines of Markdown."""
    trained = [row for row in rows if row["outcome"] == "trained"]
    if not trained:
        return []
    workspace = max(row["allocated"] - row["peak"] + row["prediction"]["workspace"] for row in trained)
    fragmentation = max(row["reserved"] / (row["need"] / (1 + memory.FRAGMENTATION)) - 1 for row in trained)
    context = max(row["context"] for row in trained)
    return ["", f"At least: WORKSPACE {workspace / GB:.2f} GB (now {memory.WORKSPACE / GB:.2f}), FRAGMENTATION "
                f"{fragmentation:.3f} (now {memory.FRAGMENTATION}), CONTEXT {context / GB:.2f} GB (now "
                f"{memory.CONTEXT / GB:.2f}, and {memory.COMMUNICATION / GB:.2f} with several ranks)."]


def report(rows: list[dict], config: dict, command: str) -> str:
    """Return the rows as Markdown."""
    def figure(key: str):
        return lambda row: f"{row[key] / GB:.2f}" if key in row else ""

    def difference(row: dict) -> str:
        return f"{100 * (row['peak'] / row['allocated'] - 1):+.1f}%" if "peak" in row else ""

    lines = table(rows, [
        ("case", lambda r: r["case"]), ("GB for torch", lambda r: f"{r['limit']:g}" if r["limit"] else "all"),
        ("micro-batch", lambda r: str(r["batch_size"])), ("blocks", lambda r: r.get("blocks", "")),
        ("predicted peak", figure("peak")), ("measured peak", figure("allocated")), ("difference", difference),
        ("predicted need", figure("need")), ("reserved", figure("reserved")), ("outside torch", figure("context")),
        ("outcome", lambda r: "; ".join([r["outcome"], *r["tried"]]))])
    note = ("GB of 10^9 bytes. Peak: torch.cuda.max_memory_allocated(). Need: what torch must be able to get, by the "
            "prediction. Reserved: torch.cuda.max_memory_reserved(). Outside torch: what CUDA took since the start.")
    return "\n".join([*header(config, command), *lines, *calibration(rows), "", note]) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# The table of predictions

MEMORIES = (80, 48, 32, 24, 16, 12)  # GB that torch can get
COLUMNS = {  # flags, format, blocks
    "d20 delayed": (dict(preset="d20"), "fp8-delayed", "fused"),
    "d20 current": (dict(preset="d20", FP8_RECIPE="current"), "fp8-current", "modules"),
    "d20 block": (dict(preset="d20", FP8_RECIPE="block"), "fp8-block", "modules"),
    "d20 bf16": (dict(preset="d20") | BF16, "bf16", "fused"),
    "d20 NVFP4": (dict(preset="d20", USE_NVFP4=True), "nvfp4", "modules"),
    "d20 delayed, blocks recomputed": (dict(preset="d20") | AC, "fp8-delayed", "modules"),
    "speedrun delayed": (dict(preset="speedrun"), "fp8-delayed", "fused"),
    "speedrun bf16": (dict(preset="speedrun") | BF16, "bf16", "fused"),
    "d12 delayed": (dict(preset="d12"), "fp8-delayed", "fused"),
    "d12 bf16": (dict(preset="d12") | BF16, "bf16", "fused"),
}


def predicted_table() -> list[str]:
    """Return which micro-batch each preset and format is predicted to take in how much memory, as lines of Markdown."""
    def cell(name: str, gigabytes: float) -> str:
        flags, format, blocks = COLUMNS[name]
        cfg = train.read_flags([f"--{flag}={value}" for flag, value in flags.items()], has_gpu=True)
        train.check_flags(cfg, 1)
        kind = Kind(format, blocks, format.startswith("fp8"))
        for size in memory.batch_sizes(cfg, 1):
            if (need := predict(cfg, kind, size).need) <= gigabytes * GB:
                return f"{size} ({need / GB:.1f})"
        return "none"

    return ["| preset and format | " + " | ".join(f"{gigabytes} GB" for gigabytes in MEMORIES) + " |",
            "|---|" + "---|" * len(MEMORIES),
            *(f"| {name} | " + " | ".join(cell(name, gigabytes) for gigabytes in MEMORIES) + " |" for name in COLUMNS)]


def write_table(text: str) -> None:
    """Replace the table in docs/performance.md. Raises UserError."""
    page = PAGE.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise UserError(f"{PAGE} must have one line {BEGIN.strip()} and one line {END.strip()}; put them back")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--cases", default="")
    parser.add_argument("--limits", default="0,32,24,16,12")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.table:
        text = "\n".join(predicted_table()) + "\n"
        write_table(text) if options.write else print(text, end="")
        return
    names = [name.strip() for name in options.cases.split(";") if name.strip()]
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--cases: there are {'; '.join(CASES)}, not '{unknown[0]}'", 2)
    try:
        limits = [float(text) for text in options.limits.split(",")]
    except ValueError:
        raise UserError(f"--limits must be numbers of GB with commas between, got '{options.limits}'", 2) from None
    if not torch.cuda.is_available():
        raise UserError("measuring needs a GPU; --table needs none", 2)
    procs, rows = start_processes(), []
    config = describe_machine(procs.device)
    with tempfile.TemporaryDirectory() as folder:
        folder = procs.broadcast(folder)
        if procs.is_main:
            random_data(folder)
        procs.gather(None)  # the shards are there
        for limit in limits:
            for name in names or (UNDER_LIMITS if limit else CASES):
                row = measure(name, limit, options.steps, folder, procs)
                rows.append(row)
                procs.print("  ".join(f"{key} {value / GB:.2f}" if isinstance(value, (int, float)) and value > 1e6 else
                                      f"{key} {value}" for key, value in row.items() if key != "prediction"))
        procs.gather(None)  # before the folder is deleted
    if procs.is_main:
        out = pathlib.Path(options.out or ROOT / "results" / card_name() / "memory")
        out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python tools/memory_model.py {shlex.join(sys.argv[1:])}".rstrip()
        text = report(rows, config, command)
        data = dict(date=str(datetime.date.today()), command=command, device=config["device"], rows=rows)
        out.with_suffix(".json").write_text(json.dumps(data, indent=1), encoding="utf-8")
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        print("\n" + text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error, "memory_model.py")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
