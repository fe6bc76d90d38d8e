"""Alternate: time variants in turn on one machine, so that a warm card or a noisy host favours none of them."""

import itertools
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Mapping, Sequence

import torch

from nanofp8.config import NonNegativeFloat, PositiveFloat, UserError, convert, expand_home
from nanofp8.faults import StopSignal
from nanofp8.files import console
from nanofp8.machine import describe_machine
from nanofp8.plots import pyplot
from nanofp8.race import Child, failure, parse_count, parse_variants, slug, spawn, stop_children, visible_gpus
from nanofp8.reports import header, table, write_report
from nanofp8.runlog import read_log

OPTIONS = ("out", "variants", "rounds", "warm", "measure")
DEFAULT_VARIANTS = {True: "fp8: --preset=classic; bf16: --preset=classic --USE_FP8=False",  # with and without a GPU
                    False: "fp8: --preset=tiny; bf16: --preset=tiny --USE_FP8=False"}
# Of every run. It ends by a signal when it has been measured, so it must not end by itself
FLAGS = dict(max_iters=10**7, log_interval=1, eval_interval=0, keep_checkpoints=0, ckpt_interval=0)
LENGTH = "use --warm and --measure; for the batch of a shorter run, give --total_batch_size"
OWN = {"max_iters": LENGTH, "train_tokens": LENGTH, "run_name": "use names of variants", "out_dir": "use --out",
       "resume": "every run starts anew", "batch_ramp": "one speed, not that of each stage",
       "log_interval": "it needs every step's record"}
POLL_SECONDS = 0.2


@dataclass
class Variant:
    """One side of the comparison."""

    name: str
    flags: list[str]
    tree: str                            # folder with the train.py to run
    ranks: int = 1                       # processes of one run, one GPU each
    each: bool = False                   # one run on every GPU at the same time; the slowest counts
    medians: list[float] = field(default_factory=list)  # tokens/s of each round
    steps: list[float] = field(default_factory=list)    # tokens/s of all measured steps
    peak_gb: float = 0.0
    start_seconds: float = 0.0           # from the start of the process to the end of the first step, shortest
    failed: str = ""                     # why a run of it failed; it is not started again


def read_variants(text: str, gpus: int, tree: str) -> list[Variant]:
    """Return the variants of "name: [tree=PATH] [ranks=N | each] --flag=value ...; ...".

    gpus: number of GPUs that can be used, 0 without any. tree: where train.py is if `tree` is not given.
    Raises: UserError.
    """
    variants = []
    for name, words in parse_variants(text).items():
        variant = Variant(name, [w for w in words if w.startswith("--")], tree)
        for word in (w for w in words if not w.startswith("--")):
            key, _, value = word.partition("=")
            if key == "tree" and os.path.isfile(os.path.join(expand_home(value), "train.py")):
                variant.tree = os.path.abspath(expand_home(value))
            elif key == "ranks":
                variant.ranks = parse_count(f"variants: {name}: ranks", value)
            elif word == "each":
                variant.each = True
            else:
                raise UserError(f"--variants: {name}: cannot use '{word}'; write tree=FOLDER (with a train.py), "
                                f"ranks=N, each, or flags as --name=value", 2)
        if gpus and variant.ranks > gpus:
            raise UserError(f"--variants: {name}: ranks={variant.ranks}, but only {gpus} GPUs can be seen; lower it", 2)
        if variant.each and variant.ranks > 1:
            raise UserError(f"--variants: {name}: each starts runs of one GPU; leave out ranks", 2)
        variants.append(variant)
    return variants


def start(variant: Variant, gpu: str | None, folder: str, given: Sequence[str]) -> Child:
    """Start one run. Its run folder and its output go below `folder`. gpu: the only one it sees; None: all.

    Raises: UserError if it cannot be started.
    """
    log = os.path.join(folder, "output.log")
    flags = FLAGS | dict(out_dir=os.path.abspath(folder), run_name="run")
    launcher = [] if variant.ranks == 1 else [
        "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={variant.ranks}"]
    arguments = [f"--{name}={value}" for name, value in flags.items()] + [*given, *variant.flags]
    script = os.path.join(variant.tree, "train.py")
    with open(script, encoding="utf-8-sig") as f:
        if "\nbatch_ramp: " in f.read():  # older trees refuse the flag
            arguments.insert(0, "--batch_ramp=")
    process = spawn([*launcher, script, *arguments], log, variant.name, gpu, variant.tree)
    return Child(SimpleNamespace(label=variant.name, folder=os.path.join(folder, "run")), process, log)


def measured(folder: str, warm: float, measure: float) -> list[dict] | None:
    """Return a run's records between `warm` and `warm + measure` seconds of training; None while it is not so far."""
    records, seconds, inside = [r for r in read_log(folder) if r["kind"] == "train"], 0.0, []
    for before, record in itertools.pairwise(records):
        duration = (record["tokens"] - before["tokens"]) / record["tok_per_sec"]
        seconds += duration
        if seconds > warm:
            inside.append(record)
        if seconds >= warm + measure:
            return inside
    return None


def time_once(variant: Variant, gpus: Sequence[str | None], folder: str, given: Sequence[str], warm: float,
              measure: float, stop: StopSignal) -> None:
    """Run a variant once and add what was measured to it. Raises: UserError if a run fails, or after a signal."""
    places = list(gpus) if variant.each else [None] if variant.ranks > 1 else list(gpus[:1])
    begin, first_step, found = time.perf_counter(), None, {}
    children = []
    try:
        for i, gpu in enumerate(places):
            children.append(start(variant, gpu, os.path.join(folder, str(i)), given))
        while len(found) < len(children):
            time.sleep(POLL_SECONDS)
            if stop.requested:
                raise UserError(f"stopped by a signal; no report was written, and what the runs wrote stays in "
                                f"{os.path.dirname(folder)}")
            for i, child in enumerate(children):
                ended = child.process.poll() is not None
                if i not in found and (records := measured(child.job.folder, warm, measure)):
                    found[i] = records
                elif i not in found and ended:
                    raise UserError(failure(child))
            if first_step is None and all(read_log(child.job.folder) for child in children):
                first_step = time.perf_counter() - begin
    finally:
        stop_children(children)
    speeds = [[record["tok_per_sec"] for record in records] for records in found.values()]
    slowest = min(speeds, key=statistics.median)
    variant.medians.append(statistics.median(slowest))
    variant.steps += slowest
    variant.peak_gb = max(variant.peak_gb, *(r["peak_mem_gb"] for records in found.values() for r in records))
    variant.start_seconds = min(variant.start_seconds or first_step, first_step)


def markdown(variants: Sequence[Variant], failed: Sequence[Variant], first: str, warm: float, measure: float) -> str:
    """Return the report's text. first: its header."""
    base = variants[0]

    def ratio(variant: Variant) -> float:
        return statistics.mean(a / b for a, b in zip(variant.medians, base.medians, strict=True))

    def gpus(variant: Variant) -> str:
        return f"{variant.ranks}" if not variant.each else "each alone; the slowest"

    columns = [
        ("variant", lambda v: v.name), ("GPUs", gpus),
        ("tokens/s (median)", lambda v: f"{statistics.median(v.steps):,.0f}"),
        ("slowest to fastest step", lambda v: f"{min(v.steps):,.0f} to {max(v.steps):,.0f}"),
        ("each round", lambda v: ", ".join(f"{m:,.0f}" for m in v.medians) if len(v.medians) > 1 else ""),
        (f"ratio to {base.name}", lambda v: "" if v is base else f"{ratio(v):.4f}"),
        ("each round's ratio", lambda v: "" if v is base or len(v.medians) == 1 else ", ".join(
            f"{a / b:.4f}" for a, b in zip(v.medians, base.medians, strict=True))),
        ("peak GB", lambda v: f"{v.peak_gb:.1f}"), ("start to first step, s", lambda v: f"{v.start_seconds:.0f}"),
    ]
    return first + "\n".join([*table(list(variants), columns), "", (
        f"The variants ran in turn. Each run was measured for {measure:g} s after {warm:g} s of training. Start to "
        f"first step is the shortest of the rounds, so caches may be warm."), *(
        f"\nLeft out: {variant.failed}" for variant in failed)]) + "\n"


def plot(variants: Sequence[Variant], path: str) -> None:
    """Draw the speed of each round."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant in variants:
        rounds = range(1, len(variant.medians) + 1)
        axes.plot(rounds, [m / 1000 for m in variant.medians], "o-", label=variant.name)
    axes.set(xlabel="round", ylabel="thousand tokens/s", xticks=list(rounds))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(options: Mapping[str, str], given: Sequence[str], tree: str, out: str, command: str) -> None:
    """Do what `bench.py alternate` says. options: of OPTIONS. given: train.py's flags for all. Raises: UserError."""
    def seconds(name: str, default: float, kind: type) -> float:
        try:
            return convert(kind, options.get(name, str(default)))
        except ValueError as error:
            raise UserError(f"--{name} {error}, got '{options[name]}'", 2) from None

    warm, measure = seconds("warm", 40, NonNegativeFloat), seconds("measure", 40, PositiveFloat)
    rounds = parse_count("rounds", options.get("rounds", "2"))
    has_gpu = torch.cuda.is_available()
    gpus = visible_gpus(None)
    variants = read_variants(options.get("variants", DEFAULT_VARIANTS[has_gpu]), len(gpus) if has_gpu else 0, tree)
    for argument in (*given, *(flag for variant in variants for flag in variant.flags)):
        if (name := argument[2:].split("=")[0]) in OWN:
            raise UserError(f"alternate sets --{name} itself ({OWN[name]}); leave it out", 2)
    if len(variants) < 2:
        raise UserError("alternate compares 2 variants or more, but --variants names 1; add another", 2)
    machine = describe_machine(torch.device("cuda", 0) if has_gpu else torch.device("cpu"))
    with StopSignal() as stop:
        for i in range(rounds):
            for variant in variants:
                if variant.failed:
                    continue
                folder = f"{out}-runs/{slug(variant.name)}-round-{i + 1}-{int(time.time())}"
                try:
                    time_once(variant, gpus, folder, given, warm, measure, stop)
                except UserError as error:
                    if stop.requested:
                        raise
                    variant.failed = str(error)
                    console(f"round {i + 1} of {rounds}, {variant.failed}")
                    continue
                console(f"round {i + 1} of {rounds}, {variant.name}: {variant.medians[-1]:,.0f} tokens/s, "
                        f"{variant.peak_gb:.1f} GB")
    complete, failed = [v for v in variants if not v.failed], [v for v in variants if v.failed]
    if not complete:
        raise UserError(failed[0].failed)
    data = dict(warm=warm, measure=measure, device=machine["device"], versions=machine["versions"],
                variants=[vars(variant) for variant in variants])
    text = markdown(complete, failed, "\n".join(header(machine, command)) + "\n", warm, measure)
    write_report(out, command, json.loads(json.dumps(data)), text, lambda path: plot(complete, path))
    if failed:
        raise UserError("; ".join(variant.failed for variant in failed))
