"""Measure how close te_emulation.py is to Transformer Engine, as train.py uses them. Needs a GPU with FP8 and both.

    python tools/compare_emulation.py                            # writes results/<card>/emulation_vs_te.json and .md
    python tools/compare_emulation.py --out=/tmp/comparison      # writes /tmp/comparison.json and .md
    python tools/compare_emulation.py --dry_run --steps=2        # without a GPU: the emulation in TE's place

A GPT of 4 layers, width 256, 2 heads of 128 and vocabulary 50,304 is trained for 20 steps of 16 x 256 tokens in bf16
with TE, so that all layers have gradients (output projections and head start at zero). From those weights, with fresh
optimizers and on the same batches, bf16 and the three FP8 recipes that Hopper has are trained for 10 more steps each,
three times: with TE on the GPU, with the emulation on the GPU, and with the emulation on the CPU. One more run with
delayed scaling on the GPU takes over TE's scales and amax histories before its first step ("TE's scales").

Optimizers (muon_impl=torch), loss and everything else are train.py's own. Nothing of it is compiled, and RoPE and QK
norm run in plain torch everywhere. The four runs on the CPU are four processes beside those on the GPU: with 16 cores
all of it takes about a minute. LEGEND says how to read the table.
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

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

import train  # before torch: it sets the allocator's environment variable

# isort: split
import torch

from nanofp8.config import UserError
from nanofp8.machine import card_name, describe_machine
from nanofp8.precision import fp8_state
from nanofp8.procs import Processes

FLAGS = ("--preset=tiny --n_layer=4 --n_embd=256 --n_head=2 --vocab_size=50304 --block_size=256 --batch_size=16 "
         "--total_batch_size=4096 --warmup_iters=10 --max_iters=10000 --muon_impl=torch --grad_clip=0 "
         "--USE_TRITON=False --USE_FP8_HEAD=False --USE_COMPILE=False").split()
DRY_RUN = ["--batch_size=2", "--total_batch_size=512"]
CONFIGS = {
    "bf16": ["--USE_FP8=False"],
    "delayed": ["--USE_FP8=True", "--FP8_RECIPE=delayed"],
    "current": ["--USE_FP8=True", "--FP8_RECIPE=current"],
    "block": ["--USE_FP8=True", "--FP8_RECIPE=block"],
}

LEGEND = """**How to read the table**
- **grad diff**: ||g - g'|| / ||g|| of each parameter's gradient in the first step; its median and its largest value over the parameters.
- **cosine min**: the smallest cosine between g and g' over the parameters.
- **bf16 rows**: the baseline. They have no quantization, so they show only the effect of other kernels: attention, norms, the order of
  sums, and on a CPU also fp32 logits, which a GPU rounds to bf16. FP8 rows cannot be better than these rows. If two
  inputs of a quantizer differ in their last bit, some elements round to different neighbours, 6% to 25% apart.
- **"fp8 vs bf16" rows**: the effect that the emulation must reproduce.
- **error cosine**: the cosine between TE's gradient error (FP8 minus bf16) and the emulation's, median over the parameters.
  It is the direct test: an emulation with another rounding, but with errors of the right size, would have 0.
- **Losses**: the first step's loss shows the forward pass. Later losses also drift, because both optimizers divide by the
  size of their gradients, and small gradients are noisy.

**Scales of delayed scaling**
- Each side fills its amax history by its own calibration passes, as a user's run does. Here, all three passes run before the first step.
  train.py makes one pass before each of its first three steps, because there the gradients of the layers appear one step after the other.
- From scale 1, the first pass sees the gradient of a block's output. Only the second pass sees the gradients of fc1 and qkv.
- Weights and batches are the same on both sides. So the amaxes and the scales agree, except for the noise of the bf16 rows: one part in some
  hundred. If a scale differs by that much, it moves as many elements across a rounding boundary as inputs that differ by that much.
- So carrying TE's scales over to the emulation can remove only part of a small difference. One more run on the GPU shows this: "TE's scales"
  takes over TE's scales and amax histories before its first step. Judge the emulation by the runs without it."""  # noqa: E501


@dataclass
class Side:
    """Whose layers, and where."""

    name: str
    device: torch.device
    emulated: bool


@dataclass
class Result:
    """What one run leaves behind."""

    losses: list[float]                  # of each step
    norms: list[float]                   # total gradient norm of each step
    gradients: dict[str, torch.Tensor]   # of the first step, by parameter; fp32 on the CPU
    scales: dict[str, torch.Tensor]      # delayed scaling's state at the beginning of the first step, on the CPU
    seconds: float


def train_run(side: Side, config: str, flags: list[str], first_step: int, steps: int,
              weights: dict[str, torch.Tensor] | None = None,
              scales: dict[str, torch.Tensor] | None = None) -> tuple[Result, dict[str, torch.Tensor]]:
    """Train `steps` steps from step `first_step` of the data, as train.run() does.

    All calibration passes come before the first step: the gradients of all layers are there from the start.

    Args:
        weights: {parameter: tensor} to begin with (None: train.py's initialisation).
        scales: delayed scaling's state to take over after the calibration (Result.scales).
    Returns: the result, and the final weights.
    Raises: UserError if TE or the emulation cannot be chosen as `side` says.
    """
    gc.collect()  # of the run before: the emulation joins the states of all delayed-scaling models that are alive
    start = time.perf_counter()
    cfg = train.read_flags(flags + CONFIGS[config] + (["--USE_EMULATION=True"] if side.emulated else []))
    # Logits of a whole step fit a GPU; a CPU takes them in pieces. Sums over the pieces are fp32 in both.
    cfg.loss_chunk_size = 4096 if side.device.type == "cuda" else 512
    procs = Processes(0, 0, 1, side.device, None)
    ring = train.TokenRing(str(ROOT / "data"), cfg.dataset, "train", cfg.vocab_size,
                           (first_step + steps) * cfg.total_batch_size + 1)
    torch.manual_seed(cfg.seed)
    run = train.build(cfg, procs, train.DataLoader(ring, cfg, procs))
    if run.precision.emulated != side.emulated:
        raise UserError(f"{side.name}: {run.precision.name} {run.precision.reason}; use a GPU that has this format")
    if weights is not None:
        with torch.no_grad():
            for name, p in run.model.named_parameters():
                p.copy_(weights[name])
    run.loader.start_step(first_step)

    gradients, take_step = {}, run.optimizers.step

    def step_and_record() -> None:
        """Keep a copy of the first gradients that the optimizers are given."""
        if not gradients:
            gradients.update((n, p.grad.detach().float().cpu().clone()) for n, p in run.model.named_parameters())
        take_step()

    run.optimizers.step = step_and_record
    for _ in range(run.precision.calibration_steps(cfg)):
        train.calibrate(run)
    live = fp8_state(run.model)
    if scales is not None:
        for name, tensor in live.items():
            tensor.copy_(scales[name])
    state = {name: tensor.cpu().clone() for name, tensor in live.items()}
    losses, norms = [], []
    for step in range(steps):
        run.optimizers.set_schedule(step)
        result = train.train_step(run)
        losses.append(result.loss)
        norms.append(result.norm)
    run.loader.close()
    final = {n: p.detach().float().cpu().clone() for n, p in run.model.named_parameters()}
    result = Result(losses, norms, gradients, state, time.perf_counter() - start)
    print(f"{config:<8} {side.name:<28} {result.seconds:5.1f} s  loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
    return result, final


def train_run_in_process(side: Side, config: str, flags: list[str], first_step: int, steps: int, folder: str) -> None:
    """Call train_run() in a process of its own: read the weights from a folder, and write the Result to it."""
    torch.set_num_threads(max(1, min(16, os.cpu_count() or 1) // len(CONFIGS)))
    torch.set_float32_matmul_precision("high")
    result, _ = train_run(side, config, flags, first_step, steps, torch.load(f"{folder}/weights.pt"))
    torch.save(vars(result), f"{folder}/{config}.pt")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine of the angle between two float64 tensors; 1 if both are zero."""
    product = (a.norm() * b.norm()).item()
    return (a * b).sum().item() / product if product else float(a.norm() == b.norm())


def median(values: list[float]) -> float:
    """Return the upper median."""
    return sorted(values)[len(values) // 2]


def compare(device: torch.device, config: str, pair: str, a: Result, b: Result, a_bf16: Result | None = None,
            b_bf16: Result | None = None) -> dict:
    """Return one row of the table: run `b` against run `a`; with their bf16 runs, also the cosine of their errors."""
    tensors = {}
    for name in a.gradients:
        g, h = (r.gradients[name].to(device).double() for r in (a, b))
        tensors[name] = dict(relative=((g - h).norm() / g.norm().clamp(min=1e-30)).item(), cosine=cosine(g, h))
        if a_bf16 is not None:
            e, f = (r.gradients[name].to(device).double() for r in (a_bf16, b_bf16))
            tensors[name]["error_cosine"] = cosine(g - e, h - f)
    worst = max(tensors, key=lambda n: tensors[n]["relative"])
    gaps = [y - x for x, y in zip(a.losses, b.losses, strict=False)]  # the CPU's runs may have fewer steps
    error_cosines = [t["error_cosine"] for t in tensors.values()] if a_bf16 is not None else None
    return dict(
        config=config, pair=pair, loss_diff=gaps, loss_diff_first=gaps[0],
        loss_diff_mean_abs=sum(map(abs, gaps)) / len(gaps), loss_diff_max_abs=max(map(abs, gaps)),
        norm_relative_diff=[y / x - 1 for x, y in zip(a.norms, b.norms, strict=False)],
        grad_relative_median=median([t["relative"] for t in tensors.values()]),
        grad_relative_max=tensors[worst]["relative"], grad_relative_worst=worst,
        grad_cosine_min=min(t["cosine"] for t in tensors.values()),
        error_cosine_median=median(error_cosines) if error_cosines else None, tensors=tensors)


def compare_all(device: torch.device, results: dict[tuple[str, str], Result], te: str,
                emulations: list[str]) -> list[dict]:
    """Return all rows, computed on `device`. results: {(config, name of the side): Result}."""
    rows = []
    for config in CONFIGS:
        fp8 = config != "bf16"
        for side in emulations:
            names = [(config, te), (config, side)]
            if fp8:
                names += [("bf16", te), ("bf16", side.removesuffix(", TE's scales"))]
            if all(name in results for name in names):
                rows.append(compare(device, config, f"{side} vs {te}", *(results[name] for name in names)))
        for side in (te, *emulations):
            if fp8 and (config, side) in results and ("bf16", side) in results:
                rows.append(compare(device, config, f"{side}: fp8 vs bf16", results["bf16", side],
                                    results[config, side]))
    return rows


def table(head: list[str], rows: list[list]) -> str:
    """Return a Markdown table with aligned columns."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def summary_table(rows: list[dict]) -> str:
    """Return the table of all comparisons."""
    head = ["recipe", "runs", "loss, step 1", "norm, step 1", "grad diff median", "max", "worst parameter",
            "cosine min", "error cosine", "mean abs loss gap", "max"]
    return table(head, [[
        r["config"], r["pair"], f"{r['loss_diff_first']:+.5f}", f"{100 * r['norm_relative_diff'][0]:+.2f}%",
        f"{r['grad_relative_median']:.4f}", f"{r['grad_relative_max']:.4f}", r["grad_relative_worst"],
        f"{r['grad_cosine_min']:.5f}", "" if r["error_cosine_median"] is None else f"{r['error_cosine_median']:.3f}",
        f"{r['loss_diff_mean_abs']:.5f}", f"{r['loss_diff_max_abs']:.5f}"] for r in rows])


def loss_table(results: dict[tuple[str, str], Result], steps: int) -> str:
    """Return the table of the losses of each step."""
    rows = [[step + 1] + [f"{r.losses[step]:.4f}" if step < len(r.losses) else "" for r in results.values()]
            for step in range(steps)]
    return table(["step"] + [f"{config}, {side}" for config, side in results], rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line (default: the program's own)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "results" / card_name() / "emulation_vs_te"),
                        help="path of the two files, without .json or .md")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run")
    parser.add_argument("--cpu_steps", type=int, help="steps of the runs on the CPU (default: as --steps)")
    parser.add_argument("--bf16_steps", type=int, default=20, help="steps in bf16 before them")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU alone, with the emulation in TE's place")
    return parser.parse_args(argv)


def choose_sides(dry_run: bool) -> tuple[Side, list[Side], Side]:
    """Return TE, its emulations (the CPU's last), and the emulation that takes TE's scales. Raises UserError."""
    cpu = torch.device("cpu")
    if dry_run:
        return (Side("TE (stand-in)", cpu, True), [Side("emulation CPU", cpu, True)],
                Side("emulation CPU, TE's scales", cpu, True))
    if not torch.cuda.is_available():
        raise UserError("there is no GPU; use --dry_run to try the program without one")
    gpu = torch.device("cuda", 0)
    return (Side("TE", gpu, False), [Side("emulation GPU", gpu, True), Side("emulation CPU", cpu, True)],
            Side("emulation GPU, TE's scales", gpu, True))


def main(argv: list[str] | None = None) -> None:
    """Train all runs, print the tables and write them. Raises UserError."""
    args = parse_arguments(argv)
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as train.py sets it

    te, emulations, scaled = choose_sides(args.dry_run)
    dataset = "fineweb10B" if list((ROOT / "data" / "fineweb10B").glob("*_train_??????.bin")) else "shakespeare"
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
        results["delayed", scaled.name], _ = train_run(scaled, "delayed", *what, weights,
                                                       results["delayed", te.name].scales)
        for config, task in tasks.items():
            task.result()
            results[config, on_cpu.name] = Result(**torch.load(f"{folder}/{config}.pt"))
    results = {name: results[name] for name in sorted(results, key=lambda name: list(CONFIGS).index(name[0]))}

    rows = compare_all(te.device, results, te.name, [s.name for s in emulations] + [scaled.name])
    plain = {n: r for n, r in results.items() if n[1] != scaled.name}
    machine = describe_machine(te.device)
    seconds = time.perf_counter() - started
    about = {
        "command": " ".join(["python tools/compare_emulation.py", *(sys.argv[1:] if argv is None else argv)]),
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
    pathlib.Path(f"{out}.md").write_text(
        f"# Transformer Engine and its emulation\n"
        f"`{about['command']}`, {about['date']}, {about['device']}, {versions}, commit {about['git_commit']}, "
        f"{about['cores']} CPU cores, {dataset}, {seconds:.0f} s.\n\n"
        f"First, TE makes {args.bf16_steps} steps in bf16. Then each run makes {args.steps} steps from those weights "
        f"on the same batches (4 layers, width 256, {512 if args.dry_run else 4096} tokens a step).\n\n"
        f"{summary}\n\n{LEGEND}\n\n## Losses\n{losses}\n")
    print(f"wrote {out}.json and {out}.md")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"compare_emulation.py: error: {error}") from None
