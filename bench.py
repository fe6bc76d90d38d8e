"""
Compare runs side by side: loss curves, noise, speed and memory, as a table and a plot in results/<card>/.

    python bench.py speed                                   # formats, wrappers, vocabularies, batches; train_orig.py
    python bench.py precision                               # bf16 and each format, two seeds each: gaps and noise
    python bench.py ablation                                # NVFP4 without one of its four ingredients at a time
    python bench.py emulation                               # speed of the emulated formats against bf16
    torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node=2 bench.py wrappers --max_iters=77  # FSDP2, then DDP
    python bench.py race --tokens=60e6,100e6 '--variants=base; muon: --muon_variant=muon'   # whole schedules
    python bench.py profile                                 # where the time of a step goes; TFLOP/s of each matmul
    python bench.py card                                    # check a card that we never had
    python bench.py alternate '--variants=old: tree=../old; new; no graphs: --USE_CUDA_GRAPHS=False'   # speed, in turn
    python bench.py report --out=results/mine out/a out/b   # table and plot of run folders that exist

The first five modes train by train.py's own run() (train_orig.py by its own), one run after another in one process
group. Any flag of train.py can be given as --name=value.

    --out=PATH           write PATH.json, PATH.md and PATH.png; into a folder, if PATH ends in /
    --rows="bf16; FP8 delayed"       pick rows of speed, emulation and wrappers
    --formats="bf16,FP8 block"       pick rows of precision and ablation
    --seeds=3, --seeds=2,1           seeds of every row; of bf16, and of each format

All of these but `speed` take 65,536 tokens a step, so that a few million tokens are enough steps to compare (on a CPU
`precision` and `ablation` take preset tiny's). `speed` takes 24 steps of preset classic (on a CPU: tiny); the
first 4 do not count. A GPU is warmed up for 30 s before the first row.

`precision` and `ablation` are studies: for each seed all rows start from the same weights and read the same tokens.
They first print what they will cost. A run that was finished with the same flags, code and device is not trained again,
so a study that was stopped continues. With several GPUs, each can train some of the --formats; a last start with all of
them makes the table. Ctrl-C and SIGTERM end everything; finished runs stay.

`race` compares the val losses at the end of whole schedules. It starts one train.py per GPU at a time. Its output
goes to out_dir/race-*.log. Finished runs are found again, as in studies. If a run fails, the others continue.

    --variants="base; muon: --muon_variant=muon; small batch: --total_batch_size=32768"
                         names and their flags; other flags are for all. Differences are to the first variant
    --tokens=60e6,100e6  lengths of the runs; each is a whole schedule. With two, a difference is also given in tokens
    --minutes=3          instead: the same training time for all, by the speed of a short run of each variant
    --seeds=2            number of seeds: 1337, 1338, ...
    --gpus=1             number of GPUs to use, of those visible
    --target=3.5885      also report in how many tokens and minutes each variant reaches this val loss

`card` is for owners of a card that this code has not run on: the doctor's report, 60 steps of preset d20 in each format
that the card should have in hardware, FP8 with delayed scaling twice, NVFP4 without each ingredient, and the tests of
the kernels. Losses and gradient norms are compared with bf16's, formats with nanofp8/cards.py. It writes one file,
results/<card>/card.md, to be sent. A row that fails is in it, and the others continue. --rows="FP8 delayed; NVFP4"
picks rows.

`alternate` compares speeds to a percent: the variants run in turn, each in a process of its own, and only steps count
that a warm card makes. A variant's first words may be tree=FOLDER (another checkout), ranks=N (GPUs of one run), or
`each` (a run on every GPU at the same time, of which the slowest counts). "one: each; four: ranks=4" compares four GPUs
with the slowest single one.

    --rounds=2           how often each variant runs
    --warm=40            seconds of training before steps count
    --measure=40         seconds of training that count
"""

import functools
import os
import re
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Sequence

from nanofp8.config import (
    UserError,
    exit_with,
    expand_home,
    print_answer,
    raise_on_ctrl_c,
    script_flags,
    start_script,
)

if __name__ == "__main__":
    start_script(__file__)  # importing torch takes seconds

import train  # before torch: it sets the allocator's environment variable
import train_orig

# isort: split
import torch
import torch.distributed as dist

from nanofp8 import alternate, breakdown, card, memory, race
from nanofp8.machine import Clock, card_name, describe_machine
from nanofp8.plots import pyplot, smooth
from nanofp8.procs import Processes, start_processes
from nanofp8.reports import RunData, check_out, finished_run, header, read_run, table, write_report
from nanofp8.runlog import read_log

# ----------------------------------------------------------------------------------------------------------------------
# Modes


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: how its run differs from the mode's common flags."""

    flags: dict[str, Any] = field(default_factory=dict)
    divide: dict[str, int] = field(default_factory=dict)  # flags whose resolved value is divided by this
    last_blocks_in_bf16: bool = False                     # 15% of the blocks, as NVFP4 is usually trained
    script: ModuleType = train


@dataclass(frozen=True)
class Mode:
    """A comparison. A study trains each row with several seeds, and takes gaps to the bf16 run of the same seed."""

    flags: dict[str, Any]
    variants: dict[str, Variant]
    study: bool = False
    gpu_preset: str = ""  # preset on a GPU; "": the default


EVERY_RUN = dict(log_interval=1, eval_interval=0, keep_checkpoints=0)  # tables need every step's record
COMPARISON = dict(total_batch_size=65536) | EVERY_RUN
SPEED = dict(warmup_iters=4, batch_ramp="", eval_tokens=1) | EVERY_RUN
STUDY_ON_A_CPU = dict(preset="tiny") | EVERY_RUN
FP8 = dict(USE_FP8=True)  # given, so that a GPU without FP8 emulates it and does not train in bf16
BF16, NVFP4, VOCAB = dict(USE_FP8=False), dict(USE_NVFP4=True), dict(vocab_size=50304)
QUARTER = dict(total_batch_size=4)
WITHOUT = {"no Hadamard": dict(NVFP4_HADAMARD=False), "no stochastic rounding": dict(NVFP4_STOCHASTIC_ROUNDING=False),
           "no 2-D weights": dict(NVFP4_2D_WEIGHTS=False)}
STUDY_BF16 = Variant(BF16 | dict(FP8_STATS_INTERVAL=0))
MODES = {
    "speed": Mode(dict(max_iters=24) | SPEED, {
        "FP8 delayed": Variant(FP8),
        "FP8 current": Variant(dict(FP8_RECIPE="current")),
        "FP8 block": Variant(dict(FP8_RECIPE="block")),
        "bf16": Variant(BF16),
        "FP8 delayed, vocab 50,304": Variant(FP8 | VOCAB),
        "FP8 delayed, vocab 50,304, a quarter of the batch": Variant(FP8 | VOCAB, QUARTER),
        "bf16, vocab 50,304, a quarter of the batch": Variant(BF16 | VOCAB, QUARTER),
        "FP8 delayed, half the micro-batch": Variant(FP8, divide=dict(batch_size=2)),
        "FP8 delayed, head in bf16": Variant(FP8 | dict(USE_FP8_HEAD=False)),
        "FP8 delayed, no CUDA graphs": Variant(FP8 | dict(USE_CUDA_GRAPHS=False)),
        "FP8 delayed, TE's modules, head in bf16": Variant(FP8 | dict(USE_TRITON=False, USE_FP8_HEAD=False)),
        "FP8 delayed, FSDP2": Variant(FP8 | dict(USE_FSDP2=True)),
        "FP8 delayed, DDP": Variant(FP8 | dict(USE_DDP=True)),
        "train_orig.py": Variant(script=train_orig),
    }, gpu_preset="classic"),
    "precision": Mode(COMPARISON | dict(preset="d12", max_iters=381), {
        "bf16": STUDY_BF16,
        "FP8 delayed": Variant(dict(FP8_RECIPE="delayed")),
        "FP8 current": Variant(dict(FP8_RECIPE="current")),
        "FP8 block": Variant(dict(FP8_RECIPE="block")),
        "MXFP8": Variant(dict(FP8_RECIPE="mxfp8")),
        "NVFP4": Variant(NVFP4, last_blocks_in_bf16=True),
    }, study=True),
    "ablation": Mode(COMPARISON | VOCAB | dict(n_layer=8, n_embd=256, n_head=2, max_iters=77), {
        "bf16": STUDY_BF16,
        "NVFP4": Variant(NVFP4, last_blocks_in_bf16=True),
        **{name: Variant(NVFP4 | flags, last_blocks_in_bf16=True) for name, flags in WITHOUT.items()},
        "no blocks in bf16": Variant(NVFP4),
        "none of the four": Variant({k: v for flags in (NVFP4, *WITHOUT.values()) for k, v in flags.items()}),
    }, study=True),
    "emulation": Mode(dict(total_batch_size=65536, max_iters=12) | SPEED, {
        "bf16": Variant(BF16),
        **{name: Variant(dict(USE_EMULATION=True, FP8_RECIPE=recipe)) for name, recipe in (
            ("FP8 delayed", "delayed"), ("FP8 current", "current"), ("FP8 block", "block"), ("MXFP8", "mxfp8"))},
        "NVFP4": Variant(NVFP4 | dict(USE_EMULATION=True)),
    }, gpu_preset="classic"),
    "wrappers": Mode(COMPARISON, {
        "FSDP2": Variant(dict(USE_FSDP2=True, seed=1)),
        "DDP": Variant(dict(USE_DDP=True, seed=1)),
    }),
}

# ----------------------------------------------------------------------------------------------------------------------
# Training


def resolve(mode: Mode, variant: Variant, given: Sequence[str], run_name: str, **own: Any) -> SimpleNamespace:
    """Return the flags of one run: the mode's, then those given on the command line, then the variant's own.

    train_orig.py has fewer flags: it takes those it has, and its own micro-batch. Raises: UserError.
    """
    common = mode.flags if torch.cuda.is_available() or not mode.study else STUDY_ON_A_CPU
    if mode.gpu_preset and torch.cuda.is_available() and variant.script is train:
        common = dict(preset=mode.gpu_preset) | common
    arguments = [f"--{name}={value}" for name, value in common.items()] + list(given)
    if variant.script is not train:
        known = set(script_flags(variant.script.__file__)) - {"batch_size"}
        every = script_flags(train.__file__)
        arguments = [a for a in arguments if a[2:].split("=")[0] in known or a[2:].split("=")[0] not in every]
    arguments += [f"--{name}={value}" for name, value in (variant.flags | own | dict(run_name=run_name)).items()]
    cfg = variant.script.read_flags(arguments)
    for name, divisor in variant.divide.items():
        setattr(cfg, name, max(1, getattr(cfg, name) // divisor))
    if variant.last_blocks_in_bf16 and "HIGH_PRECISION_LAYERS" not in cfg.explicit:
        # NVIDIA kept 10 of 62 blocks, most of them the last (arXiv 2509.25149)
        last = max(1, round(0.15 * cfg.n_layer))
        cfg.HIGH_PRECISION_LAYERS = ",".join(f"blocks.{i}" for i in range(cfg.n_layer - last, cfg.n_layer))
    return cfg


def free_memory() -> None:
    """Free what a finished run leaves behind in this process: TE's amax buffers and torch's memory pool."""
    if te := sys.modules.get("transformer_engine.pytorch.quantization"):
        te.FP8GlobalStateManager.reset()
    memory.free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def train_one(script: ModuleType, cfg: SimpleNamespace, procs: Processes, label: str) -> str | None:
    """Train one run; return its run folder, or None if it cannot run here (which is printed; the others continue).

    Raises: UserError if a signal stopped it, which train.py treats as a good end.
    """
    folder = None
    try:
        folder = script.run(cfg, procs)
    except UserError as error:  # a batch that this number of ranks does not divide, a loss that is not finite
        if error.one_rank:
            raise
        procs.print(f"{label} left out: {error}")
    except torch.OutOfMemoryError:
        if procs.world_size > 1:  # the other ranks may have had enough
            raise
        procs.print(f"{label} left out: too little GPU memory")
    free_memory()
    if folder and not procs.broadcast(procs.is_main and any(r["kind"] == "done" for r in read_log(folder))):
        raise UserError(f"stopped by a signal in {label}; finished runs are in {cfg.out_dir}")
    return folder


def warm_up(device: torch.device) -> None:
    """Multiply matrices for half a minute: a GPU slows down when it has reached its power limit."""
    if device.type == "cuda":
        a, end = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), time.monotonic() + 30
        while time.monotonic() < end:
            for _ in range(50):
                torch.mm(a, a)
            torch.cuda.synchronize(device)


def train_variants(mode: Mode, given: Sequence[str], labels: Sequence[str], procs: Processes) -> dict[tuple, str]:
    """Train these rows of a mode; return {(label, seed): run folder}."""
    folders = {}
    if mode is MODES["speed"]:
        warm_up(procs.device)
    for label in labels:
        variant = mode.variants[label]
        cfg = resolve(mode, variant, given, "-".join(re.sub(r"[^\w .-]", "", label).split()).lower())
        procs.print(f"\n===== {label} =====")
        if folder := train_one(variant.script, cfg, procs, label):
            folders[label, cfg.seed] = folder
    return folders


def plan_study(name: str, given: Sequence[str], seeds: tuple[int, int],
               labels: Sequence[str]) -> dict[tuple, SimpleNamespace]:
    """Return {(label, seed): flags} of all runs of a study. seeds: number for bf16, and for each other row."""
    plan = {}
    for label in labels:
        for seed in range(1, seeds[label != "bf16"] + 1):
            run_name = "-".join([name, *label.lower().split(), f"seed{seed}"])
            plan[label, seed] = resolve(MODES[name], MODES[name].variants[label], given, run_name, seed=seed)
    return plan


def drop_repeats(plan: dict[tuple, SimpleNamespace], procs: Processes) -> dict[tuple, SimpleNamespace]:
    """Return a plan without the rows that would repeat another one here, and print which these are.

    Where Transformer Engine lacks an ingredient of NVFP4, the row without it is the full recipe's run.
    """
    first, kept = {}, {}
    for (label, seed), cfg in plan.items():
        precision = train.select_precision(cfg, procs.device)
        run = seed, precision.name, str(precision.recipe and vars(precision.recipe)), cfg.HIGH_PRECISION_LAYERS
        if first.setdefault(run, label) == label:
            kept[label, seed] = cfg
        elif seed == 1:
            procs.print(f"{label} left out: it would repeat {first[run]}, which here is {precision.name} "
                        f"{precision.details}")
    return kept


def matmul_rate(device: torch.device) -> float:
    """Return the FLOP/s of square matmuls as training makes them (bf16 on a GPU, fp32 on a CPU): the best of six."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, clock, best = torch.randn(n, n, device=device, dtype=dtype), Clock(device), 0.0
    for _ in range(6):
        begin = clock.mark()
        torch.mm(a, a)
        best = max(best, 2 * n ** 3 / clock.ms(begin, clock.mark()) * 1000)
    return best


def train_study(name: str, plan: dict[tuple, SimpleNamespace], procs: Processes) -> dict[tuple, str]:
    """Train what is missing of a study, after printing what it costs; return {(label, seed): run folder}."""
    machine = describe_machine(procs.device)
    for cfg in plan.values():  # what is wrong should be known before the first run
        train.check_flags(cfg, procs.world_size)
        train.open_data(cfg, procs)
    plan = drop_repeats(plan, procs)
    found = {key: finished_run(cfg, machine) for key, cfg in plan.items()} if procs.is_main else None
    folders = procs.broadcast(found)
    missing = {key: cfg for key, cfg in plan.items() if not folders[key]}
    flops = {}
    for key, cfg in missing.items():
        precision = train.select_precision(cfg, procs.device)
        slow = precision.emulated and precision.recipe is not None and procs.device.type == "cuda"
        flops[key] = train.flops_per_token(cfg) * train.BatchPlan(cfg).total * (3 if slow else 1)
    if missing:
        cfg, rate = next(iter(missing.values())), matmul_rate(procs.device)
        minutes = sum(flops.values()) / (rate * procs.world_size / 3) / 60
        procs.print(
            f"{name}: {len(missing)} runs to train ({len(plan) - len(missing)} are there) of "
            f"{train.BatchPlan(cfg).total / 1e6:.2f}M tokens, {train.flops_per_token(cfg) / 1e9:.2f} GFLOP a "
            f"token: about {minutes:.0f} minutes at a third of the {rate / 1e12:.2g} TFLOP/s measured here, without "
            f"compilation (emulated runs on a GPU counted three times)")
    start, trained = time.perf_counter(), 0.0
    for key, cfg in missing.items():
        label = f"{key[0]}, seed {key[1]}"
        procs.print(f"\n===== {label} =====")
        folders[key] = train_one(train, cfg, procs, label)
        trained += flops[key]
        elapsed = time.perf_counter() - start
        left = elapsed * (sum(flops.values()) / trained - 1)
        procs.print(f"{elapsed / 60:.1f} minutes so far, about {left / 60:.1f} left")
    return {key: folder for key, folder in folders.items() if folder}


# ----------------------------------------------------------------------------------------------------------------------
# Report


def largest_gap(a: RunData, b: RunData) -> float | None:
    """Return the largest |difference| of two runs' smoothed train losses after the warm-up; None without any."""
    pairs = list(zip(smooth(a.losses), smooth(b.losses), strict=False))[a.warmup:]
    return max((abs(x - y) for x, y in pairs), default=None)


def alike(a: RunData, b: RunData) -> bool:
    """Whether a gap between two runs says something: the same model on the same tokens."""
    ramps = {run.config.get("batch_ramp", "") for run in (a, b)}
    return all(a.config[key] == b.config[key] for key in ("parameters", "total_batch_size")) and len(ramps) == 1


def summarize(runs: dict[tuple, RunData], study: bool) -> tuple[list[dict], float | None, float | None]:
    """Return one row per label, the noise, and the noise of val losses.

    Gaps are to the run of the base row with the same seed: bf16's in a study, else the first row's. Noise is the
    largest gap between two bf16 runs with different seeds on the same tokens: of smoothed train loss, and of val loss.

    runs: {(label, seed): run}.
    """
    by_label = {}
    for (label, seed), run in runs.items():
        by_label.setdefault(label, {})[seed] = run
    base_label = "bf16" if study else next(iter(by_label))
    base, first = by_label.get(base_label, {}), next(iter(runs.values()))
    bf16 = [(seed, r) for (_, seed), r in runs.items() if r.config.get("precision") == "bf16" and alike(first, r)]
    pairs = [(a, b) for s, a in bf16 for t, b in bf16 if s < t]
    noise = max((largest_gap(a, b) or 0.0 for a, b in pairs), default=None)
    val_pairs = [abs(a.val_loss - b.val_loss) for a, b in pairs if a.val_loss is not None and b.val_loss is not None]
    rows = []
    for label, own in by_label.items():
        same_seed = [(run, base[seed]) for seed, run in own.items() if seed in base and label != base_label]
        paired = [(run, other) for run, other in same_seed if alike(run, other)]
        rows.append(summarize_row(label, own, paired))
    return rows, noise, max(val_pairs, default=None)


def summarize_row(label: str, own: dict[int, RunData], paired: list[tuple[RunData, RunData]]) -> dict:
    """Return one row of a report as plain numbers. own: its runs by seed. paired: with those that gaps are taken to."""
    runs = list(own.values())
    config, precision = runs[0].config, runs[0].config.get("precision", "bf16")
    mfus = [r["mfu"] for run in runs for r in run.timed if r["mfu"] is not None]
    val_losses = {seed: run.val_loss for seed, run in own.items()}
    known = [loss for loss in val_losses.values() if loss is not None]
    in_format = {s: ((run.done or {}).get("val_losses") or {}).get(precision) for s, run in own.items()}
    gaps = [a.val_loss - b.val_loss for a, b in paired if a.val_loss is not None and b.val_loss is not None]
    largest = [gap for a, b in paired if (gap := largest_gap(a, b)) is not None]
    compiles = [(run.done or {}).get("compile_seconds") for run in runs]
    return dict(
        label=label, precision=precision, emulated=bool(config.get("emulated")) and precision != "bf16",
        wrapper=config.get("wrapper"), gpus=config["world_size"], seeds=list(own), parameters=config["parameters"],
        in_bf16=config.get("HIGH_PRECISION_LAYERS", ""), vocab_size=config["vocab_size"],
        total_batch_size=config["total_batch_size"], batch_size=config["batch_size"], warmup=runs[0].warmup,
        tokens=runs[0].train[-1]["tokens"], at=[r["tokens"] for r in runs[0].train],
        train_loss=statistics.mean(smooth(run.losses)[-1] for run in runs),
        val_losses=val_losses, val_loss=statistics.mean(known) if known else None, gaps=gaps,
        val_in_format={} if precision == "bf16" else in_format, largest_gap=max(largest, default=None),
        tok_per_sec=statistics.median_high(r["tok_per_sec"] for run in runs for r in run.timed),
        tok_per_sec_range=[f(r["tok_per_sec"] for run in runs for r in run.timed) for f in (min, max)],
        mfu=statistics.median_high(mfus) if mfus else None,
        peak_mem_gb=max(r["peak_mem_gb"] for run in runs for r in run.train), compile_seconds=compiles[0],
        losses={s: [None if x is None else round(x, 5) for x in run.losses] for s, run in own.items()},
        config=config)


def columns(rows: list[dict], noise: float | None) -> list[tuple[str, Callable[[dict], str]]]:
    """Return (title, row -> cell) of the table's columns. Those without any content are left out later."""
    base = rows[0]
    base_val = next((r["val_loss"] for r in rows if not r["gaps"] and r["val_loss"] is not None), None)

    def mean_gap(r: dict) -> float | None:
        return statistics.mean(r["gaps"]) if r["gaps"] else None

    def in_format(r: dict) -> str:
        known = [loss - r["val_losses"][seed] for seed, loss in r["val_in_format"].items()
                 if loss is not None and r["val_losses"][seed] is not None]
        return f"{statistics.mean(known):+.4f}" if known else ""

    def by(r: dict) -> str:
        return "" if r["precision"] == "bf16" else "emulated" if r["emulated"] else "hardware"

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        ("run", lambda r: r["label"]), ("by", by),
        ("seeds", lambda r: str(len(r["seeds"])) if any(len(row["seeds"]) > 1 for row in rows) else ""),
        ("GPUs", lambda r: str(r["gpus"])), ("wrapper", lambda r: r["wrapper"] or ""),
        ("tokens", lambda r: f"{r['tokens'] / 1e6:.2f}M"), ("train loss", lambda r: f"{r['train_loss']:.4f}"),
        ("val loss", lambda r: number(r["val_loss"], ".4f")), ("gap", lambda r: number(mean_gap(r), "+.4f")),
        ("gap in %", lambda r: f"{100 * mean_gap(r) / base_val:+.2f}%" if r["gaps"] and base_val else ""),
        ("each seed's gap", lambda r: ", ".join(f"{g:+.4f}" for g in r["gaps"]) if len(r["gaps"]) > 1 else ""),
        ("largest gap in training", lambda r: number(r["largest_gap"], ".4f")),
        ("against noise", lambda r: f"{r['largest_gap'] / noise:.1f}x" if noise and r["largest_gap"] else ""),
        ("evaluated in the format", in_format), ("tokens/s", lambda r: f"{r['tok_per_sec']:,.0f}"),
        ("slowest to fastest step", lambda r: "{:,.0f} to {:,.0f}".format(*r["tok_per_sec_range"])),
        ("ratio", lambda r: f"{r['tok_per_sec'] / base['tok_per_sec']:.2f}"),
        ("MFU", lambda r: number(r["mfu"] and 100 * r["mfu"], ".1f") + ("%" if r["mfu"] else "")),
        ("peak GB", lambda r: f"{r['peak_mem_gb']:.1f}"), ("start-up s", lambda r: number(r["compile_seconds"], ".0f")),
    ]


def batch_text(config: dict) -> str:
    """Return how many tokens a step of a run reads."""
    return train.BatchPlan(SimpleNamespace(**config)).describe() or f"{config['total_batch_size']:,} tokens a step"


def markdown(rows: list[dict], noise: float | None, val_noise: float | None, command: str) -> str:
    """Return the table, with date, device, command and model above it, and how to read it below."""
    config = rows[0]["config"]
    gaps_to = rows[0]["label"] if not any(len(r["seeds"]) > 1 for r in rows) else "the bf16 run of the same seed"
    text = [
        *header(config, command),
        f"{config['parameters'] / 1e6:.1f}M parameters ({config['n_layer']} layers, width {config['n_embd']}, "
        f"vocabulary {config['vocab_size']:,}), {config['dataset']}, {batch_text(config)}, "
        f"unless a row says otherwise.", "", *table(rows, columns(rows, noise)), "",
        f"Gaps are to {gaps_to}, on the same tokens. Train loss is smoothed (exponential average, 0.9). Val loss is "
        f"evaluated in bf16; \"evaluated in the format\" is how much it rises if the evaluation runs in the format "
        f"too. The largest gap in training is that of the smoothed train loss after {rows[0]['warmup']} warm-up steps. "
        f"Speed is the median over the steps after the warm-up, optimizer included. Start-up is compiling, calibration "
        f"and pinned memory; a process's first run compiles for those after it."]
    if noise is not None:
        in_val = "" if val_noise is None else f", {val_noise:.4f} in val loss"
        text.append(f"Noise, the largest gap between bf16 runs with different seeds: {noise:.4f} in training{in_val}.")
    kept = {r["label"]: r["in_bf16"] for r in rows if r["in_bf16"]}
    if kept:
        text.append(f"Kept in bf16 ({', '.join(kept)}): {'; '.join(dict.fromkeys(kept.values()))}.")
    return "\n".join(text) + "\n"


def plot(rows: list[dict], noise: float | None, val_noise: float | None, path: str) -> None:
    """Draw loss curves; beside them, where there is something to compare, the gaps in training and in val loss."""
    plt = pyplot()
    base = next((r for r in rows if r["largest_gap"] is None), rows[0])
    compared = [r for r in rows if r["largest_gap"] is not None]
    with_val = [r for r in compared if r["gaps"]]
    panels = 1 + bool(compared) + bool(with_val)
    fig, axes = plt.subplots(1, panels, figsize=((7, 12, 16)[panels - 1], 5), layout="constrained", squeeze=False)
    unit, label = (1e6, "million tokens") if rows[0]["tokens"] >= 2e6 else (1e3, "thousand tokens")
    smoothed = {r["label"]: {s: smooth(losses) for s, losses in r["losses"].items()} for r in rows}
    colors = {r["label"]: "black" if r is base else f"C{i % 10}" for i, r in enumerate(rows)}

    def draw(ax: Any, curves: list[list[float]], row: dict) -> None:
        """The mean over seeds, and their spread as a band."""
        steps = range(row["warmup"], min(map(len, curves)))
        at = [row["at"][i] / unit for i in steps]
        across = [[curve[i] for curve in curves] for i in steps]
        color = colors[row["label"]]
        ax.plot(at, [statistics.mean(x) for x in across], color=color, linewidth=1.5, label=row["label"])
        ax.fill_between(at, [min(x) for x in across], [max(x) for x in across], color=color, alpha=0.15, linewidth=0)

    for row in rows:
        draw(axes[0, 0], list(smoothed[row["label"]].values()), row)
    axes[0, 0].set(xlabel=label, ylabel="train loss, smoothed", title="Train loss after warm-up")
    if compared:
        for row in compared:
            curves = [[a - b for a, b in zip(curve, smoothed[base["label"]][s], strict=False)]
                      for s, curve in smoothed[row["label"]].items() if s in smoothed[base["label"]]]
            if curves:
                draw(axes[0, 1], curves, row)
        if noise is not None:
            axes[0, 1].axhspan(-noise, noise, color="gray", alpha=0.15, label="noise: bf16, other seeds")
        axes[0, 1].axhline(0, color="black", linewidth=1)
        axes[0, 1].set(xlabel=label, ylabel=f"train loss minus {base['label']}'s, smoothed", title="Gap in training")
    if with_val:
        ax = axes[0, 2]
        for i, row in enumerate(with_val):
            ax.plot(row["gaps"], [i] * len(row["gaps"]), "o", color=colors[row["label"]], alpha=0.7)
        if val_noise is not None:
            ax.axvspan(-val_noise, val_noise, color="gray", alpha=0.15, label="noise: bf16, other seeds")
        ax.axvline(0, color="black", linewidth=1)
        ax.set(xlabel=f"val loss minus {base['label']}'s", title="Gap in val loss at the end, each seed",
               ylim=(len(with_val) - 0.5, -0.5))
        ax.locator_params(axis="x", nbins=6)
        ax.set_yticks(range(len(with_val)), [row["label"] for row in with_val])
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(runs: dict[tuple, str], out: str, command: str, study: bool = False) -> None:
    """Write out.json, out.md and out.png from run folders, {(label, seed): folder}, and print the table."""
    rows, noise, val_noise = summarize({key: read_run(folder) for key, folder in runs.items()}, study)
    write_report(out, command, dict(noise=noise, val_noise=val_noise, rows=rows),
                 markdown(rows, noise, val_noise, command), functools.partial(plot, rows, noise, val_noise))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


OPTIONS = {"alternate": alternate.OPTIONS, "card": card.OPTIONS, "race": race.OPTIONS, "profile": ("out",),
           "report": ("out",)}  # of modes that are not in MODES


def take_options(arguments: Sequence[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Split arguments into those --name=value with these names, {name: value}, and the others."""
    own = [a for a in arguments if a.startswith("--") and "=" in a and a[2:].split("=")[0] in names]
    return dict(a[2:].split("=", 1) for a in own), [a for a in arguments if a not in own]


def pick(name: str, option: str, labels: Sequence[str] | None) -> list[str]:
    """Return these labels of a mode in the mode's order; all of them for None. Raises UserError."""
    known = MODES[name].variants
    labels = list(known) if labels is None else [label.strip() for label in labels]
    for label in labels:
        if label not in known:
            raise UserError(f"--{option}: {name} has {'; '.join(known)}, not '{label}'", 2)
    return [label for label in known if label in labels]


def read_seeds(text: str) -> tuple[int, int]:
    """Return the number of seeds of bf16 and of each other row. Raises UserError."""
    seeds = text.split(",")
    if not (len(seeds) <= 2 and all(n.isascii() and n.isdigit() and int(n) > 0 for n in seeds)):
        raise UserError(f"--seeds must be a number of runs, or two (bf16, each format), got '{text}'", 2)
    return int(seeds[0]), int(seeds[-1])


def check_given(name: str, given: Sequence[str]) -> None:
    """Refuse flags of train.py that a mode sets itself. Raises UserError."""
    if any(a.startswith("--log_interval=") and a != "--log_interval=1" for a in given):
        raise UserError("comparisons need every step's record; leave --log_interval at 1", 2)
    if any(a.startswith("--train_tokens=") for a in given) and (name not in MODES or "max_iters" in MODES[name].flags):
        raise UserError(f"{name} counts steps; give --max_iters in place of --train_tokens", 2)


def report_folders(given: Sequence[str], out: str, command: str) -> None:
    """Do what `bench.py report` says. given: FOLDER or LABEL=FOLDER each. Raises UserError."""
    if not given or any(a.startswith("-") for a in given):
        raise UserError("report takes run folders, each as FOLDER or LABEL=FOLDER, and --out", 2)
    pairs = [a.split("=", 1) if "=" in a and not os.path.isdir(a) else (os.path.basename(a.rstrip("/")), a)
             for a in given]
    named = {label: expand_home(folder) for label, folder in pairs}
    if len(named) < len(pairs):
        raise UserError("two run folders have the same name; give each a label of its own, as LABEL=FOLDER", 2)
    folders = {}
    for label, folder in named.items():
        config = read_run(folder).config
        if (interval := config.get("log_interval", 1)) != 1:
            raise UserError(f"{folder} has a record of every {interval} steps only (log_interval={interval}), and "
                            f"comparisons need every step's; leave it out", 2)
        folders[label, config["seed"]] = folder
    report(folders, out, command)


def main(argv: Sequence[str]) -> None:
    """Do what the arguments say. Raises UserError."""
    name, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if not name or {"--help", "-h"} & set(argv):
        print_answer(__doc__)
        return
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    command = f"{f'torchrun --nproc_per_node={ranks}' if ranks else 'python'} bench.py {shlex.join(argv)}"
    options, given = take_options(arguments, *OPTIONS.get(name, ("out", "rows", "formats", "seeds")))
    out = options.get("out") or os.path.join("results", card_name(), "")
    is_folder = os.path.basename(out) in ("", ".", "..", "~")  # results/mine/ would make hidden files such as .json
    out = os.path.expanduser(os.path.join(out, name) if is_folder else out)
    check_out(out)
    if name in OPTIONS:
        if name == "alternate":
            alternate.run(options, given, os.path.dirname(os.path.abspath(__file__)), out, command)
        elif name == "report":
            report_folders(given, out, command)
        elif name == "profile":
            check_given(name, given)
            breakdown.run(train, given, start_processes(), out, command)
        elif name == "card":
            check_given(name, given)
            card.run(options, given, train, out, command)
        else:
            race.run(options, given, train, out, command)
        return
    if name not in MODES:
        raise UserError(f"unknown mode '{name}'; bench.py has {', '.join((*MODES, *sorted(OPTIONS)))}", 2)
    check_given(name, given)
    study, option = MODES[name].study, "formats" if MODES[name].study else "rows"
    wrong = {"rows" if study else "formats", *(() if study else ("seeds",))} & set(options)
    if wrong:
        raise UserError(f"{name} has no --{wrong.pop()} (see --help)", 2)
    labels = pick(name, option, re.split("[,;]" if study else ";", options[option]) if option in options else None)
    if study:
        plan = plan_study(name, given, read_seeds(options.get("seeds", "2")), labels)
    procs = start_processes()
    folders = train_study(name, plan, procs) if study else train_variants(MODES[name], given, labels, procs)
    if not folders:
        raise UserError("none of the runs could be trained with these flags (each says why above)")
    if procs.is_main:
        report(folders, out, command, study)


if __name__ == "__main__":
    try:
        raise_on_ctrl_c()
        main(sys.argv[1:])
    except UserError as bench_error:
        exit_with(bench_error, "bench.py")
    except KeyboardInterrupt:
        print("bench.py: stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
