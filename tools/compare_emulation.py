"""How close is te_emulation.py to Transformer Engine, as train.py uses them? Needs a GPU with FP8 and TE.

    python tests/gpu/compare_emulation.py                            # writes results/emulation_vs_te.{json,md}
    python tests/gpu/compare_emulation.py --out=/tmp/comparison      # writes /tmp/comparison.{json,md}
    python tests/gpu/compare_emulation.py --dry_run --steps=2        # no GPU: the emulation in TE's place, small batches

A GPT of 4 layers, width 256, 2 heads of 128 and vocabulary 50,304 is trained for 20 steps of 16 x 256 tokens in
bf16 with TE, so that the gradients of all layers are there (output projections and head start at zero). From those
weights, with fresh optimizers and on the same batches, bf16 and the three FP8 recipes that Hopper has are trained
for 10 more steps each, three times: with TE on the GPU, with the emulation on the GPU, with the emulation on the
CPU. Optimizers (muon_impl=torch), loss and the rest are train.py's own, none of it compiled, and RoPE + QK norm in plain torch everywhere. The four runs on the
CPU are four processes, beside those on the GPU: with 16 cores all of it takes about a minute.

How to read the table:

- grad diff: ||g - g'|| / ||g|| of the first step's gradient of each parameter, its median and its largest over the
  parameters; cosine: the smallest over the parameters.
- The bf16 rows are the ruler: no quantization there, so they show what other kernels (attention, norms, order of
  sums; on a CPU also fp32 logits, which a GPU rounds to bf16) make of it. FP8 rows cannot be below them: where two
  inputs of a quantizer differ in their last bit, some elements round to different neighbours, 6% to 25% apart.
- The "fp8 vs bf16" rows are the effect that the emulation is there to reproduce. "error cosine" is the direct
  question: the cosine between TE's gradient error (FP8 minus bf16) and the emulation's, median over the parameters.
  An emulation of another rounding, with errors of the right size, would have 0.
- Losses: the first step's tells of the forward pass; later ones also drift, since both optimizers divide by the
  size of their gradients, small noisy ones included.

Delayed scaling has a history, filled on each side by that side's own calibration passes, as in a run of a user; but
all three before the first step: train.py makes one before each of its first three, since there the gradients of the
layers come up one step after the other. (From scale 1 it takes a pass to see the gradient of a block's output, and
a second one to see what that leaves for fc1 and qkv.) Weights and batches are the same on both sides, so that the
amaxes, and so the scales, agree but for the noise of the bf16 rows, a part in some hundred; a scale that differs by
that much moves as many elements across a rounding boundary as inputs that differ by that much do. So carrying TE's
scales over to the emulation can only take away part of a difference that is small; whether it does is shown rather
than claimed, by one more run on the GPU that takes over TE's scales and amax histories before its first step ("TE's
scales"). The plain runs are the ones that count.
"""

import argparse
import concurrent.futures
import datetime
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (before torch: it sets the allocator's options)
from nanofp8.config import UserError  # noqa: E402
from nanofp8.machine import describe_machine  # noqa: E402
from nanofp8.precision import fp8_state  # noqa: E402
from nanofp8.procs import Processes  # noqa: E402
import torch  # noqa: E402

FLAGS = ("--preset=tiny --n_layer=4 --n_embd=256 --n_head=2 --vocab_size=50304 --block_size=256 --batch_size=16 "
         "--total_batch_size=4096 --warmup_iters=10 --max_iters=10000 --muon_impl=torch --grad_clip=0 --USE_TRITON=False --USE_FP8_HEAD=False").split()
DRY_RUN = ["--batch_size=2", "--total_batch_size=512"]
CONFIGS = {
    "bf16": ["--USE_FP8=False"],
    "delayed": ["--USE_FP8=True", "--FP8_RECIPE=delayed"],
    "current": ["--USE_FP8=True", "--FP8_RECIPE=current"],
    "block": ["--USE_FP8=True", "--FP8_RECIPE=block"],
}


@dataclass
class Side:
    """Whose layers, and where."""

    name: str
    device: torch.device
    emulated: bool


@dataclass
class Result:
    """What one run leaves behind."""

    losses: list     # of each step
    norms: list      # total gradient norm of each step
    gradients: dict  # {parameter: fp32 CPU tensor}, of the first step
    scales: dict     # delayed scaling's state when the first step begins, CPU tensors
    seconds: float


class RecordingOptimizers(train.Optimizers):
    """train.py's optimizers; they keep a copy of the first gradients they are stepped with."""

    gradients = None

    def step(self):
        if self.gradients is None:
            self.gradients = {n: p.grad.detach().float().cpu().clone() for n, p in self.model.named_parameters()}
        super().step()


def train_run(side, config, flags, first_step, steps, weights=None, scales=None):
    """Train `steps` steps from step `first_step` of the data, the way train.run() does; (Result, final weights).

    Args:
        weights: {parameter: tensor} to begin with (None: train.py's initialisation).
        scales: delayed scaling's state to take over after the calibration (Result.scales).
    """
    start = time.perf_counter()
    cfg = train.read_flags(flags + CONFIGS[config] + (["--USE_EMULATION=True"] if side.emulated else []))
    # Logits of a whole step fit a GPU; a CPU takes them in pieces. Sums over the pieces are fp32 in both.
    cfg.loss_chunk_size = 4096 if side.device.type == "cuda" else 512
    ring = train.TokenRing(str(ROOT / "data"), cfg.dataset, "train", cfg.vocab_size, (first_step + steps) * cfg.total_batch_size + 1)
    procs = Processes(0, 0, 1, side.device, None)
    precision = train.select_precision(cfg, side.device)
    if precision.emulated != side.emulated:
        raise UserError(f"{side.name}: {precision.name} {precision.reason}")
    torch.manual_seed(cfg.seed)
    model = train.GPT(cfg, precision.te, lambda f: f, side.device)
    if weights is not None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
    parallel = train.Parallel(model, "none", cfg, procs)
    optimizers = RecordingOptimizers(model, cfg, procs, sharded=False)
    optimizers.model = model
    loader = train.DataLoader(ring, cfg, procs)
    loader.load_state_dict({"step": first_step, "micro_batch": 0})
    calibrations = cfg.FP8_CALIBRATION_STEPS if precision.name == "fp8-delayed" else 0
    losses, norms, state = [], [], {}
    for step in range(steps):
        optimizers.set_schedule(step)
        if step == 0:
            for _ in range(calibrations):
                train.calibrate(parallel, loader, optimizers, procs, precision)
            live = fp8_state(model)
            if scales is not None:
                for name, tensor in live.items():
                    tensor.copy_(scales[name])
            state = {name: tensor.cpu().clone() for name, tensor in live.items()}
        loss, norm, *_ = train.train_step(parallel, loader, optimizers, cfg, procs, precision)
        losses.append(float(loss))
        norms.append(float(norm))
    loader.close()
    final = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters()}
    result = Result(losses, norms, optimizers.gradients, state, time.perf_counter() - start)
    print(f"{config:<8} {side.name:<28} {result.seconds:5.1f} s  loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
    del model, parallel, optimizers, loader
    gc.collect()  # the emulation joins the states of all delayed-scaling models that are alive
    return result, final


def train_run_in_process(side, config, flags, first_step, steps, folder):
    """train_run() in a process of its own: weights are read from a folder, the Result is written to it."""
    torch.set_num_threads(max(1, min(16, os.cpu_count()) // len(CONFIGS)))
    torch.set_float32_matmul_precision("high")
    result, _ = train_run(side, config, flags, first_step, steps, torch.load(f"{folder}/weights.pt"))
    torch.save(vars(result), f"{folder}/{config}.pt")


def cosine(a, b):
    """Cosine of the angle between two float64 tensors; 1 where both are zero."""
    product = (a.norm() * b.norm()).item()
    return (a * b).sum().item() / product if product else float(a.norm() == b.norm())


def median(values):
    return sorted(values)[len(values) // 2]


def compare(device, config, pair, a, b, a_bf16=None, b_bf16=None):
    """One row of the table: run `b` against run `a`. With their bf16 runs also the cosine of their errors."""
    tensors = {}
    for name in a.gradients:
        g, h = (r.gradients[name].to(device).double() for r in (a, b))
        tensors[name] = dict(relative=((g - h).norm() / g.norm().clamp(min=1e-30)).item(), cosine=cosine(g, h))
        if a_bf16 is not None:
            e, f = (r.gradients[name].to(device).double() for r in (a_bf16, b_bf16))
            tensors[name]["error_cosine"] = cosine(g - e, h - f)
    worst = max(tensors, key=lambda n: tensors[n]["relative"])
    gaps = [y - x for x, y in zip(a.losses, b.losses)]
    return dict(
        config=config, pair=pair, loss_diff=gaps, loss_diff_first=gaps[0], loss_diff_mean_abs=sum(map(abs, gaps)) / len(gaps),
        loss_diff_max_abs=max(map(abs, gaps)), norm_relative_diff=[y / x - 1 for x, y in zip(a.norms, b.norms)],
        grad_relative_median=median([t["relative"] for t in tensors.values()]), grad_relative_max=tensors[worst]["relative"],
        grad_relative_worst=worst, grad_cosine_min=min(t["cosine"] for t in tensors.values()),
        error_cosine_median=median([t["error_cosine"] for t in tensors.values()]) if a_bf16 is not None else None,
        tensors=tensors,
    )


def compare_all(device, results, te, emulations):
    """All rows, from {(config, side name): Result}; computed on `device`."""
    rows = []
    for config in CONFIGS:
        fp8 = config != "bf16"
        for side in emulations:
            names = [(config, te), (config, side)] + ([("bf16", te), ("bf16", side.removesuffix(", TE's scales"))] if fp8 else [])
            if all(n in results for n in names):
                rows.append(compare(device, config, f"{side} vs {te}", *(results[n] for n in names)))
        for side in (te, *emulations):
            if fp8 and (config, side) in results and ("bf16", side) in results:
                rows.append(compare(device, config, f"{side}: fp8 vs bf16", results["bf16", side], results[config, side]))
    return rows


def table(head, rows):
    """A Markdown table with aligned columns."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def summary_table(rows):
    head = ["recipe", "runs", "loss, step 1", "norm, step 1", "grad diff median", "max", "worst parameter", "cosine min",
            "error cosine", "mean abs loss gap", "max"]
    return table(head, [[
        r["config"], r["pair"], f"{r['loss_diff_first']:+.5f}", f"{100 * r['norm_relative_diff'][0]:+.2f}%",
        f"{r['grad_relative_median']:.4f}", f"{r['grad_relative_max']:.4f}", r["grad_relative_worst"],
        f"{r['grad_cosine_min']:.5f}", "" if r["error_cosine_median"] is None else f"{r['error_cosine_median']:.3f}",
        f"{r['loss_diff_mean_abs']:.5f}", f"{r['loss_diff_max_abs']:.5f}"] for r in rows])


def loss_table(results, steps):
    names = list(results)
    return table(["step"] + [f"{config}, {side}" for config, side in names],
                 [[step + 1] + [f"{results[n].losses[step]:.4f}" if step < len(results[n].losses) else "" for n in names]
                  for step in range(steps)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "results" / "emulation_vs_te"), help="path of the two files, without .json or .md")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run")
    parser.add_argument("--cpu_steps", type=int, help="steps of the runs on the CPU (default: as --steps)")
    parser.add_argument("--bf16_steps", type=int, default=20, help="steps in bf16 before them")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU alone, with the emulation in TE's place")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as train.run() does

    cpu = torch.device("cpu")
    if args.dry_run:
        te, emulations = Side("TE (stand-in)", cpu, True), [Side("emulation CPU", cpu, True)]
        scaled = Side("emulation CPU, TE's scales", cpu, True)
    else:
        if not torch.cuda.is_available():
            raise UserError("compare_emulation.py needs a GPU (or --dry_run)")
        gpu = torch.device("cuda", 0)
        te, emulations = Side("TE", gpu, False), [Side("emulation GPU", gpu, True), Side("emulation CPU", cpu, True)]
        scaled = Side("emulation GPU, TE's scales", gpu, True)
    dataset = next(d for d in ("fineweb10B", "shakespeare") if list((ROOT / "data" / d).glob("*_train_*.bin")))
    flags = FLAGS + [f"--dataset={dataset}"] + (DRY_RUN if args.dry_run else [])
    what = (flags, args.bf16_steps, args.steps)
    what_on_cpu = (flags, args.bf16_steps, args.cpu_steps or args.steps)

    results, on_cpu = {}, emulations[-1]
    _, weights = train_run(te, "bf16", flags, 0, args.bf16_steps)
    with tempfile.TemporaryDirectory() as folder, \
            concurrent.futures.ProcessPoolExecutor(len(CONFIGS), multiprocessing.get_context("spawn")) as pool:
        torch.save(weights, f"{folder}/weights.pt")
        tasks = {config: pool.submit(train_run_in_process, on_cpu, config, *what_on_cpu, folder) for config in CONFIGS}
        for config in CONFIGS:
            for side in (te, *emulations[:-1]):
                results[config, side.name], _ = train_run(side, config, *what, weights)
        results["delayed", scaled.name], _ = train_run(scaled, "delayed", *what, weights, results["delayed", te.name].scales)
        for config, task in tasks.items():
            task.result()
            results[config, on_cpu.name] = Result(**torch.load(f"{folder}/{config}.pt"))
    results = {n: results[n] for n in sorted(results, key=lambda n: list(CONFIGS).index(n[0]))}

    rows = compare_all(te.device, results, te.name, [s.name for s in emulations] + [scaled.name])
    plain = {n: r for n, r in results.items() if n[1] != scaled.name}
    machine = describe_machine(te.device)
    seconds = time.perf_counter() - started
    about = {
        "command": "python tests/gpu/compare_emulation.py" + "".join(f" {a}" for a in (sys.argv[1:] if argv is None else argv)),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": machine["device"], "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "versions": machine["versions"], "git_commit": machine["git_commit"], "dataset": dataset, "flags": flags,
        "seconds": seconds,
    }
    summary, losses = summary_table(rows), loss_table(plain, args.steps)
    print(f"\n{summary}\n\n{losses}\n\n{seconds:.0f} s")

    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = [dict(config=c, side=s, losses=r.losses, norms=r.norms, seconds=r.seconds) for (c, s), r in results.items()]
    pathlib.Path(f"{out}.json").write_text(json.dumps(dict(about=about, runs=runs, comparisons=rows), indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    legend = __doc__.split("How to read the table:")[1].strip()
    pathlib.Path(f"{out}.md").write_text(
        f"# Transformer Engine and its emulation\n"
        f"`{about['command']}`, {about['date']}, {about['device']}, {versions}, commit {about['git_commit']}, "
        f"{about['cores']} CPU cores, {dataset}, {seconds:.0f} s.\n\n"
        f"{args.bf16_steps} bf16 steps with TE, then {args.steps} steps of each run from those weights on the same batches "
        f"(4 layers, width 256, {512 if args.dry_run else 4096} tokens a step).\n\n{summary}\n\n{legend}\n\n## Losses\n{losses}\n")
    print(f"wrote {out}.json and {out}.md")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"compare_emulation.py: error: {error}") from None
