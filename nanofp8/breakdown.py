"""Breakdown: where a training step's time goes, by part of the model and by matmul, from torch's profiler."""

import bisect
import collections
import contextlib
import functools
import math
import re
import statistics
import threading
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterable, Iterator

import torch
from torch.autograd import DeviceType

from nanofp8 import epilogues, fused, loss, parts
from nanofp8.config import UserError
from nanofp8.plots import pyplot
from nanofp8.reports import header, read_run, table, write_report
from nanofp8.runlog import read_log

# What the functions between the matmuls are called in the table; those of a name are added up
NAMES = {
    (fused, "add_norm"): "residual, norm and quantization, forward", (fused, "add_norm_grad"): "norm, backward",
    (fused, "rope_qk_norm_in_place"): "RoPE and QK norm, forward",
    (fused, "rope_qk_norm_grad"): "RoPE and QK norm with quantization, backward",
    (fused, "relu2"): "relu^2 with quantization, forward",
    (fused, "relu2_grad"): "relu^2 with quantization, backward",
    (fused, "quantize"): "quantization", (fused, "transposed"): "transposes of FP8",
    (fused, "norm_columns"): "inputs of matmuls, quantized again",
    (fused, "columns"): "inputs of matmuls, quantized again",
    (parts, "add_value_embedding"): "value embeddings", (parts, "value_embedding_grad"): "value embeddings",
    (parts, "table_gradient"): "gradients of embeddings",
    (loss, "softcap_cross_entropy"): "cross-entropy", (loss, "softcap_cross_entropy_and_grad"): "cross-entropy",
}
QUACK = {
    (epilogues, "relu2_matmul"): "fc1 with relu^2 (QuACK)", (epilogues, "plain_matmul"): "q, k and v (QuACK)",
    (epilogues, "logits_matmul"): "logits and the sums of their exponentials (QuACK)",
    (epilogues, "relu2_backward_matmul"): "fc2's input gradient with relu^2's (QuACK)",
}
PREFIX = "step: "  # of our labels among the profiler's
AUTOGRAD = "autograd::engine::evaluate_function: "  # before a backward function's name, in the profiler's range of it
ATTENTION = ("FusedAttnFunc", "FlashAttention4", "ScaledDotProduct")  # parts of the names of attention's functions
API_CALL = re.compile("cu(da)?[A-Z]")  # start of CUDA's functions: cudaLaunchKernel, cuLaunchKernelEx, cudaMemcpyAsync
OTHERS, LEAST_SHARE, NAME_LENGTH = 5, 0.003, 60  # rows of kernels without a label: most rows, least share, length
WARM_TOKENS = 7e6  # before the profiled step on a GPU: 30 s of d20 on one H100, which is at its power limit then


def size_of(operand: fused.Operand) -> tuple[torch.Size, str]:
    """Return a matmul operand's shape and the name of its format."""
    names = {torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2", torch.bfloat16: "bf16", torch.float32: "fp32"}
    data = operand.data if isinstance(operand, fused.Fp8) else operand
    return data.shape, names[data.dtype]


class Labels:
    """Label what a step launches: matmuls by shape and format, the rest by NAMES."""

    def __init__(self) -> None:
        self.flops = {}                  # of one call, by label
        self.current = threading.local()  # .label: the outermost that a thread is in; autograd has threads of its own

    @contextlib.contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Label what runs inside, unless it runs inside another label."""
        if getattr(self.current, "label", None):
            yield
            return
        self.current.label = name
        try:
            with torch.profiler.record_function(PREFIX + name):
                yield
        finally:
            self.current.label = None

    def matmul(self, function: Callable, name: str = "") -> Callable:
        """Return `function`, a matmul of two operands, with the label `name`, or else one for each shape and format."""
        @functools.wraps(function)
        def labelled(a: fused.Operand, b: fused.Operand, *args: Any, **options: Any) -> torch.Tensor:
            (shape_a, name_a), (shape_b, name_b) = size_of(a), size_of(b)
            formats = name_a if name_a == name_b else f"{name_a} x {name_b}"
            label = name or f"matmul {shape_a[0]:,} x {shape_b[0]:,}, sums of {shape_a[1]:,}, {formats}"
            label += ", added to fp32" if options.get("out") is not None else ""
            self.flops[label] = 2 * shape_a[0] * shape_b[0] * shape_a[1]
            with self.label(label):
                return function(a, b, *args, **options)
        return labelled

    def named(self, function: Callable, label: str) -> Callable:
        """Return `function` with a label."""
        @functools.wraps(function)
        def labelled(*args: Any, **options: Any) -> Any:
            with self.label(label):
                return function(*args, **options)
        return labelled

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the functions in all modules that use them, for a while."""
        replaced = {id(fused.matmul): self.matmul(fused.matmul)}
        replaced |= {id(getattr(module, name)): self.named(getattr(module, name), label)
                     for (module, name), label in NAMES.items()}
        replaced |= {id(getattr(module, name)): self.matmul(getattr(module, name), label)
                     for (module, name), label in QUACK.items()}
        with contextlib.ExitStack() as stack:
            for module in (fused, loss, parts, epilogues):
                for name, value in list(vars(module).items()):
                    if id(value) in replaced:
                        setattr(module, name, replaced[id(value)])
                        stack.callback(setattr, module, name, value)
            yield


def label_of(name: str) -> str | None:
    """Return the label for which the profiler recorded a range of this name, or None."""
    if name.startswith(PREFIX):
        return name[len(PREFIX):]
    # Attention's backward pass is a function of autograd, which has a label of its own
    if name.startswith(AUTOGRAD) and any(part in name for part in ATTENTION):
        return "attention, backward"
    return None


class Ranges:
    """The labelled ranges of time of one thread. They can be nested, but do not overlap otherwise."""

    def __init__(self, ranges: list[tuple[int, int, str]]) -> None:
        """ranges: (start, end, label)."""
        self.ranges = sorted(ranges, key=lambda r: (r[0], -r[1]))
        self.starts = [start for start, _, _ in self.ranges]
        self.outer = []  # of each: index of the range that contains it, or -1
        for i, start in enumerate(self.starts):
            self.outer.append(self.containing(start, i - 1))

    def containing(self, time: int, last: int) -> int:
        """Return the index of the innermost range that contains `time`, or -1. last: the last that starts by then."""
        while last >= 0 and self.ranges[last][1] <= time:
            last = self.outer[last]
        return last

    def label(self, time: int) -> str | None:
        """Return the label of the innermost range that contains `time`, or None."""
        found = self.containing(time, bisect.bisect_right(self.starts, time) - 1)
        return self.ranges[found][2] if found >= 0 else None


def short_name(kernel: str) -> str:
    """Return a kernel's name without namespaces, numbers and arguments, as words: Markdown would read <> as HTML."""
    name = re.sub(r"\(anonymous namespace\)::|\w+::", "", kernel.removeprefix("void "))
    name = re.split(r"(?<=[\w>])\(", name)[0]  # arguments follow a name or its template
    return " ".join(re.findall(r"\b[A-Za-z_]\w*", name))[:NAME_LENGTH]


def gpu_rows(events: Iterable[Any]) -> list[dict[str, Any]]:
    """Return dict(label, calls, ms) of each label, of the largest kernels without a label, and of everything else.

    A kernel, copy or fill of memory belongs to the label within which its thread launched it. The profiler's own sums
    leave out kernels that are not launched by PyTorch's operators: those of Triton, QuACK and Transformer Engine.
    events: the profiler's raw ones (torch._C._autograd._KinetoEvent).
    """
    kernels, launches, operators, ranges = [], {}, {}, collections.defaultdict(list)
    for event in events:
        name = event.name()
        if event.device_type() == DeviceType.CUDA:
            if not event.is_user_annotation():  # the profiler repeats labels on the GPU
                kernels.append(event)
        elif API_CALL.match(name):
            launches[event.correlation_id()] = event
        else:
            operators[event.correlation_id()] = event  # numbered separately: a launch can have the same number
            if label := label_of(name):
                # Not start_thread_id(): for a launch outside of operators it is that of the profiler's thread
                ranges[event.device_resource_id()].append((event.start_ns(), event.end_ns(), label))
    operators.pop(0, None)  # number of what is no operator; as a link it means none
    threads = {thread: Ranges(found) for thread, found in ranges.items()}
    calls = collections.Counter(label for found in ranges.values() for _, _, label in found)
    ms, others, other_calls = dict.fromkeys(calls, 0.0), collections.Counter(), collections.Counter()
    for kernel in kernels:
        # The profiler does not record all of CUDA's functions: cuLaunchCooperativeKernel is missing
        launch = launches.get(kernel.correlation_id()) or operators.get(kernel.linked_correlation_id())
        thread = threads.get(launch.device_resource_id()) if launch else None
        label = thread.label(launch.start_ns()) if thread else None
        if label:
            ms[label] += kernel.duration_ns() / 1e6
        else:
            name = short_name(kernel.name())
            others[name] += kernel.duration_ns() / 1e6
            other_calls[name] += 1
    rows = [dict(label=label, calls=calls[label], ms=ms[label]) for label in calls]
    least = LEAST_SHARE * (sum(ms.values()) + sum(others.values()))
    named = [name for name, time in others.most_common(OTHERS) if time > least]
    rows += [dict(label=f"other: {name}", calls=other_calls[name], ms=others.pop(name)) for name in named]
    return rows + [dict(label="everything else", calls=None, ms=float(sum(others.values())))]


def gpu_use(events: Iterable[Any]) -> dict[str, float]:
    """Return the ms in which the GPU computes, in which it only communicates, and in which it does nothing, from the
    first kernel to the last. Kernels of several streams may overlap. events: as in gpu_rows()."""
    kernels = sorted((event.start_ns(), event.end_ns(), "nccl" in event.name()) for event in events
                     if event.device_type() == DeviceType.CUDA and not event.is_user_annotation())

    def covered(with_nccl: bool) -> float:
        total = end = 0
        for start, stop, nccl in kernels:
            if with_nccl or not nccl:
                total, end = total + max(0, stop - max(start, end)), max(end, stop)
        return total / 1e6

    span = (max(stop for _, stop, _ in kernels) - kernels[0][0]) / 1e6 if kernels else 0.0
    return dict(computes=covered(False), communicates=covered(True) - covered(False), idle=span - covered(True))


def collect(profile: torch.profiler.profile, cuda: bool, flops: dict[str, int]) -> dict[str, Any]:
    """Return {"total": ms of all kernels, "rows": one dict(label, calls, ms, flops) each, largest first, "use":
    gpu_use(), on a GPU}.

    On a GPU the time of a label is that of the kernels launched within it, on a CPU its own.
    """
    use = {}
    if cuda:
        events = profile.profiler.kineto_results.events()
        rows, use = gpu_rows(events), gpu_use(events)
        total = sum(row["ms"] for row in rows)
    else:
        averages, calls, ms = profile.key_averages(), collections.Counter(), collections.Counter()
        for event in averages:
            if label := label_of(event.key):
                calls[label] += event.count
                ms[label] += event.cpu_time_total / 1000
        # Ranges that optimizers put around their operators have "#" in the name
        operators = [e for e in averages if "#" not in e.key and not e.key.startswith(PREFIX)]
        total = sum(e.self_cpu_time_total for e in operators) / 1000
        rows = [dict(label=label, calls=calls[label], ms=ms[label]) for label in calls]
        rows.append(dict(label="everything else", calls=None, ms=max(0.0, total - sum(ms.values()))))
    rows = [row | dict(flops=flops.get(row["label"], 0)) for row in rows]
    return dict(total=total, rows=sorted(rows, key=lambda row: -row["ms"]), use=use)


def measure(train: ModuleType, cfg: SimpleNamespace, procs: Any, at: int) -> dict[str, Any]:
    """Train by the flags, profile the step number `at` (from 0), and return collect()'s result and the run's folder.

    CUDA graphs are switched off: the profiler cannot tell what a graph's kernels belong to.
    """
    labels, found, count, train_step = Labels(), {}, 0, train.train_step
    cfg.USE_CUDA_GRAPHS, cuda = False, procs.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda

    def profiled_step(run: Any) -> Any:
        nonlocal count
        count += 1
        if count != at + 1:
            return train_step(run)
        step, cores = labels.named(run.optimizers.step, "optimizers"), [b.attn.core for b in run.model.blocks]
        with contextlib.ExitStack() as stack:
            stack.enter_context(labels.applied())
            for owner, name, value in [(run.optimizers, "step", step)] + [
                    (core, "forward", labels.named(core.forward, "attention, forward")) for core in cores]:
                setattr(owner, name, value)
                stack.callback(delattr, owner, name)
            # acc_events: without it torch 2.11 warns of events that later profiles would clear
            with torch.profiler.profile(activities=activities, acc_events=True) as profile:
                result = train_step(run)
                if cuda:
                    torch.cuda.synchronize()
        found.update(collect(profile, cuda, labels.flops))
        return result

    train.train_step = profiled_step
    try:
        folder = train.run(cfg, procs)
    finally:
        train.train_step = train_step
    return found | dict(folder=folder)


def markdown(found: dict[str, Any], step_ms: float, first: str) -> str:
    """Return the report's text. step_ms: median of the steps that were not profiled. first: its header."""
    def rate(flops: float, ms: float) -> str:
        tflops = flops / ms / 1e9
        return f"{tflops:,.0f}" if tflops >= 100 else f"{tflops:.3g}"

    columns = [
        ("what", lambda r: r["label"]), ("calls", lambda r: "" if r["calls"] is None else f"{r['calls']:,}"),
        ("ms", lambda r: f"{r['ms']:.2f}"), ("share", lambda r: f"{100 * r['ms'] / found['total']:.1f}%"),
        ("ms a call", lambda r: f"{r['ms'] / r['calls']:.3f}" if r["calls"] else ""),
        ("TFLOP/s", lambda r: rate(r["flops"] * r["calls"], r["ms"]) if r["flops"] else ""),
    ]
    use = "" if not found["use"] else (
        " From its first kernel to its last the GPU computes for {computes:.1f} ms, only communicates for "
        "{communicates:.1f} ms and does nothing for {idle:.1f} ms.".format(**found["use"]))
    rows = [row for row in found["rows"] if row["ms"]]
    matmuls = [row for row in rows if row["flops"]]
    ms, flops = sum(row["ms"] for row in matmuls), sum(row["flops"] * row["calls"] for row in matmuls)
    return first + "\n".join([
        f"The operations of the profiled step take {found['total']:.1f} ms. Other steps take {step_ms:.1f} ms. No CUDA "
        f"graphs. All matmuls: {ms:.1f} ms, {rate(flops, ms)} TFLOP/s.{use}", "", *table(rows, columns)]) + "\n"


def plot(found: dict[str, Any], path: str) -> None:
    """Draw the rows as bars."""
    plt = pyplot()
    rows = [row for row in found["rows"][::-1] if row["ms"]]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.25 * len(rows)), layout="constrained")
    bars = axes.barh([r["label"] for r in rows], [r["ms"] for r in rows],
                     color=["tab:blue" if r["flops"] else "tab:orange" for r in rows])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set(xlabel="ms of one step (blue: matmuls)")
    axes.margins(x=0.08, y=0.01)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(train: ModuleType, given: list[str], procs: Any, out: str, command: str) -> None:
    """Do what `bench.py profile` says. given: train.py's flags. Raises: UserError."""
    if any(argument.startswith("--batch_ramp=") for argument in given):
        raise UserError("profile sets --batch_ramp itself (one step is profiled); leave it out", 2)

    def flags(max_iters: int) -> SimpleNamespace:
        defaults = dict(max_iters=max_iters, batch_ramp="", log_interval=1, eval_interval=0, eval_tokens=1,
                        keep_checkpoints=0, run_name="profile")
        return train.read_flags([f"--{name}={value}" for name, value in defaults.items()] + given)

    steps = 6
    if procs.device.type == "cuda":
        steps = max(8, math.ceil(WARM_TOKENS / flags(steps).total_batch_size))
    cfg = flags(steps)
    if cfg.max_iters < 5:
        raise UserError("profile needs at least 5 steps; use --max_iters=5 or more", 2)
    at = cfg.max_iters - 3
    found = measure(train, cfg, procs, at)
    if not procs.broadcast(procs.is_main and any(r["kind"] == "done" for r in read_log(found["folder"]))):
        raise UserError("stopped by a signal; no report was written")
    if procs.is_main:
        data = read_run(found["folder"])
        step_ms = statistics.median(r["step_ms"] for r in data.train[at // 2:] if r["step"] not in (at, at + 1))
        text = markdown(found, step_ms, "\n".join(header(data.config, command)) + "\n")
        write_report(out, command, dict(config=data.config, step_ms=step_ms, **found), text,
                     lambda path: plot(found, path))
