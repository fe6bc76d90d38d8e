"""Check a card: train a few steps in each format, in child processes, and compare with bf16 and with cards.py."""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Mapping, Sequence

import torch

from nanofp8 import cards
from nanofp8.config import UserError
from nanofp8.doctor import version_of
from nanofp8.faults import StopSignal
from nanofp8.files import console
from nanofp8.host import ends_with_parent
from nanofp8.machine import describe_machine
from nanofp8.precision import FORMATS, NVFP4_INGREDIENTS
from nanofp8.race import Child, Job, failure, slug, start_child, stop_children, visible_gpus
from nanofp8.reports import RunData, finished_run, header, read_run, table

OPTIONS = ("out", "rows")
# Of all rows. Shakespeare is included, so all owners train on the same tokens
FLAGS = {
    True: dict(preset="d20", dataset="shakespeare", total_batch_size=32768, max_iters=60, warmup_ratio=0.1,
               eval_tokens=32768, lr_scaling="sqrt", log_interval=1, eval_interval=0, keep_checkpoints=0,
               skip_grad_zscore=0),
    False: dict(preset="tiny", n_layer=1, block_size=64, batch_size=2, total_batch_size=128, max_iters=12,
                eval_tokens=64, lr_scaling="sqrt", log_interval=1, eval_interval=0, keep_checkpoints=0),
}
SMALL_PRESET, SMALL_MEMORY = "d12", 14e9  # for cards with less memory than this, which d20 hardly fits
LAST = 10           # steps over which the loss is compared
# On Hopper the mean train loss of steps 51 to 60 differs from bf16's by 0.23% at most, and no step's gradient norm is
# more than 1.85 times bf16's (results/h100/25M.json, results/h200/25M.json and precision.json, of 65,536 and 131,072
# tokens a step). The batch here is smaller, so more is allowed. What the check is for, lost scales and zero or huge
# gradients, costs far more
TOLERANCE = 0.02
SPIKE = 5.0
ROW_SECONDS, TEST_SECONDS = 900, 600  # a row or the tests that take longer count as failed
TESTS = os.path.join("tests", "gpu", "test_kernels_gpu.py")
TELLING = ("warning", "error", "FP4 cvt")  # words of lines in a run's output that the report quotes

# ----------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Row:
    """One run of the check, and what came of it."""

    label: str
    flags: dict[str, Any]
    format: str = "bf16"     # name in FORMATS that the run must have
    run: RunData | None = None
    failed: str = ""         # why there is no run
    notes: list[str] = field(default_factory=list)  # telling lines of its output

    @property
    def losses(self) -> list[float]:
        """Train loss of each step; a loss that was not finite counts as inf."""
        return [float("inf") if loss is None else loss for loss in self.run.losses]

    @property
    def norms(self) -> list[float]:
        """Gradient norm of each step before clipping."""
        return [float("inf") if r["grad_norm"] is None else r["grad_norm"] for r in self.run.train]

    @property
    def loss(self) -> float:
        """Mean train loss of the last steps."""
        return statistics.mean(self.losses[-LAST:])


def plan(capability: tuple[int, int] | None, version: str) -> list[Row]:
    """Return the rows for a card: bf16, and each format that cards.py expects in hardware; on a CPU (None): all.

    version: of Transformer Engine.
    """
    def runs(name: str) -> bool:
        return capability is None or cards.verdict(FORMATS[name].question, capability, asked=True) == "native"

    rows = [Row("bf16", dict(USE_FP8=False))]
    for name in FORMATS:
        if name.startswith("fp8-") and runs(name):
            recipe = name.removeprefix("fp8-")
            rows.append(Row(f"FP8 {recipe}", dict(FP8_RECIPE=recipe), name))
            if recipe == "delayed":
                rows.append(Row("FP8 delayed again", dict(FP8_RECIPE=recipe), name))
                if capability and capability[0] == 12:  # the case of TransformerEngine pull request 3215
                    rows.append(Row("FP8 delayed recomputed", dict(FP8_RECIPE=recipe, USE_AC_BLOCKS=True), name))
    if runs("nvfp4"):
        lacking = cards.nvfp4_lacks(capability, version) if capability else ()
        rows.append(Row("NVFP4", dict(USE_NVFP4=True), "nvfp4"))
        rows += [Row(f"NVFP4 without {what}", {"USE_NVFP4": True, flag: False}, "nvfp4")
                 for flag, (_, what) in NVFP4_INGREDIENTS.items() if flag not in lacking]
    return rows


def faults(row: Row, base: Row) -> list[str]:
    """Return what is wrong with a row; nothing if it is as expected. base: the bf16 run of the same seed and tokens."""
    if row.run is None:
        return [row.failed]
    config, found = row.run.config, []
    emulated = config.get("emulated") and row.format != "bf16"
    if config["precision"] != row.format or emulated and "CPU" not in config["device"]:
        found.append(f"ran {config['precision']}{' EMULATED' if emulated else ''}, expected {row.format} in hardware")
    if skipped := sum("skipped" in r for r in row.run.train):
        found.append(f"{skipped} step(s) skipped")
    if not all(0 < norm < float("inf") for norm in row.norms):
        found.append("a gradient norm is zero or not finite")
    if row is base or base.run is None:
        return found
    if not abs(gap := row.loss / base.loss - 1) <= TOLERANCE:
        found.append(f"loss {100 * gap:+.2f}% from bf16's, more than {100 * TOLERANCE:g}%")
    ratios = [a / b if b else float("inf") for a, b in zip(row.norms, base.norms, strict=False)]
    if spikes := [step for step, ratio in enumerate(ratios, 1) if ratio > SPIKE]:
        found.append(f"gradient norm up to {max(ratios):.3g} times bf16's in step {', '.join(map(str, spikes[:5]))}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Running


class Runner:
    """Runs rows, the doctor and the tests as child processes on one GPU."""

    def __init__(self, given: Sequence[str], script: ModuleType, stop: StopSignal):
        """given: flags of all rows, as arguments. script: train.py as a module."""
        self.script, self.path, self.stop = script, os.path.abspath(script.__file__), stop
        (self.gpu,) = visible_gpus(1)
        has_gpu = torch.cuda.is_available()
        flags = dict(FLAGS[has_gpu])
        if has_gpu and torch.cuda.get_device_properties(0).total_memory < SMALL_MEMORY:
            flags["preset"] = SMALL_PRESET
        self.arguments = [f"--{name}={value}" for name, value in flags.items()] + list(given)
        self.machine = describe_machine(torch.device("cuda", 0) if has_gpu else torch.device("cpu"))

    def job(self, row: Row) -> Job:
        """Return a row's run. Raises UserError."""
        own = row.flags | dict(run_name=f"card-{slug(row.label)}")
        arguments = self.arguments + [f"--{name}={value}" for name, value in own.items()]
        cfg = self.script.read_flags(arguments)
        self.script.check_flags(cfg, 1)
        return Job((row.label,), row.label, arguments, cfg)

    def train(self, row: Row) -> None:
        """Train a row, or find its finished run again. Raises UserError after a signal."""
        try:
            job = self.job(row)
            folder = finished_run(job.cfg, self.machine)
            row.failed = "" if folder else self.train_once(row, job)
            folder = folder or finished_run(job.cfg, self.machine)
        except UserError as error:
            if self.stop.requested:
                raise
            row.failed = str(error)
            return
        if folder:
            row.run = read_run(folder)
        elif not row.failed:
            row.failed = f"{row.label}: no finished run is found; was the code edited meanwhile?"

    def train_once(self, row: Row, job: Job) -> str:
        """Train a row's run in a child process; return why it failed, or "". Raises UserError after a signal."""
        child = start_child(job, self.gpu, self.path)
        try:
            if not self.wait(child.process, ROW_SECONDS):
                return f"{row.label} failed: it took more than {ROW_SECONDS} seconds (its output: {child.log})"
        finally:
            stop_children([child])
        row.notes = telling_lines(child)
        return failure(child) if child.process.returncode else ""

    def wait(self, process: subprocess.Popen, seconds: float) -> bool:
        """Wait for a process; return whether it has ended in time. Raises UserError after a signal."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            if self.stop.requested:
                raise UserError("stopped by a signal; the same command continues after the finished runs")
        return process.poll() is not None

    def output_of(self, command: Sequence[str], seconds: float) -> str:
        """Return what a command prints, or why it could not be run. Raises UserError after a signal."""
        env = os.environ | ({} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu})
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace", env=env, cwd=os.path.dirname(self.path),
                                   start_new_session=True, preexec_fn=ends_with_parent(signal.SIGKILL))
        deadline = time.monotonic() + seconds
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.communicate(timeout=0.2)[0].strip()
                if self.stop.requested:
                    raise UserError("stopped by a signal; the same command continues after the finished runs")
                if time.monotonic() > deadline:
                    return f"it took more than {seconds} seconds"
        finally:
            process.kill()
            process.wait()

    def doctor(self) -> str:
        """Return the doctor's report for the default row."""
        return self.output_of([sys.executable, self.path, "--doctor", *self.arguments], TEST_SECONDS)

    def kernel_tests(self) -> str:
        """Return the end of what the tests of the kernels print, or why they were not run."""
        if not os.path.exists(os.path.join(os.path.dirname(self.path), TESTS)):
            return f"not run: {TESTS} is not here"
        if not version_of("pytest"):
            return "not run: pytest is not installed (pip install pytest)"
        lines = self.output_of([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS], TEST_SECONDS)
        return "\n".join(lines.splitlines()[-20:])


def failed_tests(tests: str) -> bool:
    """Whether the end of pytest's output names failures, or it did not end in time."""
    return bool(re.search(r"\d+ (failed|error)|it took more than", tests))


def telling_lines(child: Child) -> list[str]:
    """Return the first lines of a child's output that hold a word of TELLING, each once."""
    with open(child.log, encoding="utf-8", errors="replace") as f:
        lines = [line.strip()[:300] for line in f if any(word.lower() in line.lower() for word in TELLING)]
    return list(dict.fromkeys(lines))[:3]


# ----------------------------------------------------------------------------------------------------------------------
# Report


def markdown(rows: list[Row], machine: dict, doctor: str, tests: str, command: str) -> str:
    """Return the report. rows: bf16 first."""
    base, found = rows[0], {row.label: faults(row, rows[0]) for row in rows}
    done = [row for row in rows if row.run]
    config = done[0].run.config if done else {}

    def timed(row: Row) -> list[dict]:
        return row.run.train[len(row.run.train) // 2:]

    def mfu(row: Row) -> str:
        known = [r["mfu"] for r in timed(row) if r["mfu"] is not None]
        return f"{100 * statistics.median_high(known):.1f}%" if known else ""

    def speed(row: Row) -> float:
        return statistics.median_high(r["tok_per_sec"] for r in timed(row))

    def largest_ratio(row: Row) -> str:
        return f"{max(a / b for a, b in zip(row.norms, base.norms, strict=False) if b):.2f}" if base.run else ""

    columns = [
        ("run", lambda r: r.label), ("as expected", lambda r: "; ".join(found[r.label]) or "yes"),
        ("loss", lambda r: f"{r.loss:.4f}" if r.run else ""),
        ("to bf16", lambda r: f"{100 * (r.loss / base.loss - 1):+.2f}%" if r.run and base.run else ""),
        ("largest norm / bf16's", lambda r: largest_ratio(r) if r.run else ""),
        ("micro-batch", lambda r: str(r.run.config["batch_size"]) if r.run else ""),
        ("tokens/s", lambda r: f"{speed(r):,.0f}" if r.run else ""),
        ("ratio", lambda r: f"{speed(r) / speed(base):.2f}" if r.run and base.run else ""),
        ("MFU", lambda r: mfu(r) if r.run else ""),
        ("peak GB", lambda r: f"{max(x['peak_mem_gb'] for x in r.run.train):.1f}" if r.run else ""),
    ]
    right = f"{sum(not wrong for wrong in found.values())} of {len(rows)} runs are as expected"
    right += ", but tests of the kernels failed" if failed_tests(tests) else ""
    text = [
        *header(machine, command), f"Commit {machine['git_commit'] or 'unknown'}, code {machine['code']}.", "",
        f"**{right}.** Please send this file either way.", "", *table(rows, columns), ""]
    if config:
        text.append(
            f"{config['parameters'] / 1e6:.1f}M parameters, {config['max_iters']} steps of "
            f"{config['total_batch_size']:,} tokens of {config['dataset']}, seed {config['seed']}. Loss is the mean "
            f"train loss of the last {LAST} steps, speed the median of the second half. As expected: the format that "
            f"nanofp8/cards.py names, in hardware; the loss within {100 * TOLERANCE:g}% of bf16's (on Hopper 0.23% at "
            f"most, with larger batches); no gradient norm zero, not finite or above {SPIKE:g} times bf16's in the "
            f"same step (on Hopper 1.85 at most).")
    if notes := [f"- {row.label}: {line}" for row in rows for line in row.notes]:
        text += ["", "Lines of their output that may tell something:", "", *notes]
    curves = {row.label: dict(losses=[round(x, 4) for x in row.losses], norms=[float(f"{x:.4g}") for x in row.norms])
              for row in done}
    return "\n".join([
        *text, "", "## Doctor", "```", doctor, "```", "", "## Tests of the kernels", "```", tests, "```", "",
        "## Every step", "```json", json.dumps(curves), "```"]) + "\n"


def run(options: Mapping[str, str], given: Sequence[str], script: ModuleType, out: str, command: str) -> None:
    """Check this card and write out.md, the only file of the report.

    Args:
        options: those of OPTIONS that were given.
        given: flags of all rows, as arguments.
        script: train.py as a module.
        out: path of the report, without its ending.
        command: as the report quotes it.
    Raises: UserError; also after the report, if something was not as expected.
    """
    if "RANK" in os.environ:
        raise UserError("card checks one GPU; start it with python, without torchrun", 2)
    capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
    rows = plan(capability, version_of("transformer-engine"))
    if "rows" in options:
        wanted = [label.strip() for label in options["rows"].split(";")]
        known = [row.label for row in rows]
        if wrong := [label for label in wanted if label not in known]:
            raise UserError(f"--rows: card has {'; '.join(known)} here, not '{wrong[0]}'", 2)
        rows = [row for row in rows if row.label in wanted or row.label == "bf16"]
    with StopSignal() as stop:
        runner = Runner(given, script, stop)
        runner.job(rows[0])  # a mistake in the flags is known before the first run
        console("asking the doctor")
        doctor = runner.doctor()
        for i, row in enumerate(rows, 1):
            console(f"run {i} of {len(rows)}: {row.label}")
            runner.train(row)
            if row.failed:
                console(f"{row.failed}; the others continue")
        console("running the tests of the kernels")
        tests = runner.kernel_tests()
    text = markdown(rows, runner.machine, doctor, tests, command)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(out + ".md", "w", encoding="utf-8") as f:
        f.write(text)
    print("\n" + text.split("## Doctor")[0], flush=True)
    console(f"all of it: {out}.md")
    wrong = [row.label for row in rows if faults(row, rows[0])]
    if wrong := wrong + ["tests of the kernels"] * failed_tests(tests):
        raise UserError(f"not as expected: {'; '.join(wrong)}; please report it with {out}.md")
