"""
Compare runs side by side: loss curves, noise, speed and memory, as a table and a plot in results/.

    python bench.py speed                                   # precisions, wrappers, vocabularies, batches; train_orig.py
    python bench.py precision --max_iters=77                # bf16 (two seeds), then each FP8 recipe, one after another
    torchrun --standalone --nproc_per_node=2 bench.py wrappers --max_iters=77      # FSDP2, then DDP
    python bench.py report --out=results/mine out/a out/b   # the same table and plot from run folders that exist

All train by train.py's own run(), one after another in one process group; any flag of train.py can be given as --name=value.
`precision` and `wrappers` take total_batch_size=65536 and 20 warm-up steps, so that a few million tokens are enough steps to
mean something; `speed` takes 24 steps, of which the first 4 do not count. Under torchrun, `speed` compares the wrappers too.
--out=PATH names the files to write (PATH.json, PATH.md, PATH.png).
"""

import datetime
import gc
import json
import math
import os
import shlex
import statistics
import sys

import torch
import torch.distributed as dist

import train
import train_orig

COMPARISON = ["--total_batch_size=65536", "--warmup_iters=20", "--eval_interval=0", "--keep_checkpoints=0"]
COMMON = {
    "precision": COMPARISON,
    "wrappers": COMPARISON,
    "speed": ["--max_iters=24", "--warmup_iters=4", "--eval_interval=0", "--eval_tokens=1", "--keep_checkpoints=0"],
}
VARIANTS = {
    "speed": {
        "FP8 delayed": [],
        "FP8 current": ["--FP8_RECIPE=current"],
        "FP8 block": ["--FP8_RECIPE=block"],
        "bf16": ["--USE_FP8=False"],
        "FP8 delayed, vocab 50,304": ["--vocab_size=50304"],
        "bf16, vocab 50,304": ["--USE_FP8=False", "--vocab_size=50304"],
        "FP8 delayed, a quarter of the batch": ["total_batch_size/4"],
        "FP8 delayed, half the micro-batch": ["batch_size/2"],
        "FP8 delayed, FSDP2": ["--USE_FSDP2=True"],
        "FP8 delayed, DDP": ["--USE_DDP=True"],
        "train_orig.py": ["train_orig.py"],
    },
    "precision": {
        "bf16 seed 1": ["--USE_FP8=False", "--seed=1"],
        "bf16 seed 2": ["--USE_FP8=False", "--seed=2"],
        "FP8 delayed": ["--seed=1"],
        "FP8 current": ["--FP8_RECIPE=current", "--seed=1"],
        "FP8 block": ["--FP8_RECIPE=block", "--seed=1"],
    },
    "wrappers": {
        "FSDP2": ["--USE_FSDP2=True", "--seed=1"],
        "DDP": ["--USE_DDP=True", "--seed=1"],
    },
}


def forget_last_run():
    """Free what a finished run leaves behind in this process: TE's amax buffers and torch's memory pool."""
    if te := sys.modules.get("transformer_engine.pytorch.quantization"):
        te.FP8GlobalStateManager.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_variants(mode, flags):
    """Train each variant of a mode in this process group; returns ({label: run folder}, whether this is rank 0)."""
    procs, folders = train.start_processes(), {}
    for label, extra in VARIANTS[mode].items():
        script = train_orig if "train_orig.py" in extra else train
        presets, choices = script.PRESETS, script.CHOICES
        own = [f for f in extra if f.startswith("--")] + ["--run_name=" + "-".join(label.replace(",", "").split()).lower()]
        given = flags
        if script is train_orig:  # it has fewer flags
            table = train.read_flag_table(script.__file__)
            given = [f for f in flags if f[2:].split("=")[0] in table and not f.startswith("--batch_size")]
        common = [f for f in COMMON[mode] if script is train or not f.startswith("--keep_checkpoints")]
        cfg = train.parse_flags([*common, *given, *own], os.path.abspath(script.__file__), presets, choices)
        for name in ("total_batch_size/4", "batch_size/2"):
            if name in extra:
                key, by = name.split("/")
                setattr(cfg, key, max(1, getattr(cfg, key) // int(by)))
        procs.print(f"\n===== {label} =====")
        try:
            folders[label] = script.run(cfg, procs)
        except train.UserError as error:  # a batch that this number of ranks does not divide, say: the others go on
            procs.print(f"{label} left out: {error}")
        forget_last_run()
    if not folders:
        raise train.UserError("no run could be made with these flags (each says why above)")
    return folders, procs.is_main


def read_run(folder):
    """config.json and log.jsonl of a run folder: (config, train records, val records, done record or None)."""
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(folder, "log.jsonl")) as f:
            records = [json.loads(line) for line in f]
    except OSError as error:
        raise train.UserError(f"{folder} is no run folder of train.py: {error.strerror} ({error.filename})", 2)
    kinds = {k: [r for r in records if r["kind"] == k] for k in ("train", "val", "done")}
    if not kinds["train"]:
        raise train.UserError(f"{folder}/log.jsonl holds no training step yet", 2)
    return config, kinds["train"], kinds["val"], (kinds["done"] or [None])[-1]


def largest_gap(a, b):
    """Largest |difference| of two rows' smoothed losses after the warm-up, at steps both have; None without any."""
    gaps = [abs(x - y) for x, y in zip(train.smooth(a["losses"]), train.smooth(b["losses"]))][a["warmup"]:]
    return max(gaps) if gaps else None


def summarize(runs):
    """One row a run ({label: folder}), with gaps to the first run; and the noise, if two runs are bf16 with other seeds.

    Noise is the largest gap of smoothed loss between two bf16 runs with different seeds on the same tokens. Speed is
    the median over the steps after the warm-up.
    """
    rows = []
    for label, folder in runs.items():
        config, steps, val, done = read_run(folder)
        after = steps[config["warmup_iters"]:] or steps
        mfus = [r["mfu"] for r in after if r["mfu"] is not None]
        losses = [r["loss"] if r["loss"] is not None else math.nan for r in steps]
        rows.append(dict(
            label=label, precision=config.get("precision", "bf16"), wrapper=config.get("wrapper"),
            gpus=config["world_size"], seed=config["seed"], parameters=config["parameters"], device=config["device"], versions=config["versions"],
            vocab_size=config["vocab_size"], total_batch_size=config["total_batch_size"], batch_size=config["batch_size"],
            warmup=config["warmup_iters"], compile_seconds=(done or {}).get("compile_seconds"),
            tokens=steps[-1]["tokens"], train_loss=train.smooth(losses)[-1], val_loss=val[-1]["val_loss"] if val else None,
            tok_per_sec=statistics.median_high(r["tok_per_sec"] for r in after),
            mfu=statistics.median_high(mfus) if mfus else None,
            peak_mem_gb=max(r["peak_mem_gb"] for r in steps), train_seconds=done["train_seconds"] if done else None,
            losses=[round(x, 5) for x in losses], grad_norms=[r["grad_norm"] for r in steps]))
    # Gaps say something between runs of one model on the same tokens, which the first run's are
    alike = [r for r in rows if all(r[k] == rows[0][k] for k in ("parameters", "total_batch_size"))]
    for row in rows:
        row["gap"] = largest_gap(rows[0], row) if row in alike[1:] else None
    bf16 = [r for r in alike if r["precision"] == "bf16"]
    pairs = [(a, b) for a in bf16 for b in bf16 if a["seed"] < b["seed"]]
    noise = max((largest_gap(a, b) or 0.0 for a, b in pairs), default=None)
    return rows, noise


def markdown(rows, noise, command):
    """The table, with device, date and command above it and the noise below."""
    versions = ", ".join(f"{k} {v}" for k, v in rows[0]["versions"].items() if v)
    base = rows[0]
    lines = [
        f"{datetime.date.today()}, {base['device']}, {versions}", "", f"    {command}", "",
        "| run | GPUs | wrapper | tokens | train loss | val loss | val against first | largest gap | tokens/s | ratio | MFU | peak GB | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        both = r is not base and r["val_loss"] and base["val_loss"]
        versus = f"{100 * (r['val_loss'] / base['val_loss'] - 1):+.2f}%" if both else ""
        gap = "" if r["gap"] is None else f"{r['gap']:.4f}"
        lines.append(
            f"| {r['label']} | {r['gpus']} | {r['wrapper'] or ''} | {r['tokens'] / 1e6:.2f}M | {r['train_loss']:.4f} | "
            + (f"{r['val_loss']:.4f}" if r["val_loss"] else "") + f" | {versus} | {gap} | {r['tok_per_sec']:,.0f} | "
            f"{r['tok_per_sec'] / base['tok_per_sec']:.2f} | " + (f"{100 * r['mfu']:.1f}%" if r["mfu"] else "")
            + f" | {r['peak_mem_gb']:.1f} | " + (f"{r['compile_seconds']:.0f}" if r["compile_seconds"] is not None else "") + " |")
    lines += ["", "Train loss is smoothed (exponential average, 0.9). Largest gap: of smoothed train loss to the first run, after "
              f"{base['warmup']} warm-up steps. Speed: median over the steps after the warm-up, optimizer included."]
    if noise is not None:
        lines.append(f"Noise, the largest gap between two bf16 runs with different seeds: {noise:.4f}.")
    return "\n".join(lines) + "\n"


def plot(rows, noise, path):
    """Smoothed loss curves; beside them, where there is something to compare, each run's gap to the first and the noise."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    compared = [r for r in rows if r["gap"] is not None]
    fig, axes = plt.subplots(1, 2 if compared else 1, figsize=(12 if compared else 7, 4.5), squeeze=False)
    curves = {r["label"]: train.smooth(r["losses"]) for r in rows}
    colors = {r["label"]: f"C{i % 10}" for i, r in enumerate(rows)}

    def tokens(r, n):
        return [(i + 1) * r["total_batch_size"] / 1e6 for i in range(n)]

    for r in rows:
        curve = curves[r["label"]]
        axes[0, 0].plot(tokens(r, len(curve)), curve, color=colors[r["label"]], linewidth=1.3, label=r["label"])
    axes[0, 0].set(xlabel="million tokens", ylabel="train loss, smoothed")
    if compared:
        for r in compared:
            gap = [a - b for a, b in zip(curves[r["label"]], curves[rows[0]["label"]])]
            axes[0, 1].plot(tokens(r, len(gap))[r["warmup"]:], gap[r["warmup"]:], color=colors[r["label"]], linewidth=1.3, label=r["label"])
        if noise is not None:
            axes[0, 1].axhspan(-noise, noise, color="gray", alpha=0.15, label="noise: bf16, two seeds")
        axes[0, 1].axhline(0, color=colors[rows[0]["label"]], linewidth=1)
        axes[0, 1].set(xlabel="million tokens", ylabel=f"smoothed loss minus that of {rows[0]['label']}")
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(runs, out, command):
    """Write out.json, out.md and out.png from run folders ({label: folder}), and print the table."""
    rows, noise = summarize(runs)
    text = markdown(rows, noise, command)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(out + ".json", "w") as f:
        json.dump(dict(date=str(datetime.date.today()), command=command, noise=noise, runs=rows), f, indent=1)
    with open(out + ".md", "w") as f:
        f.write(text)
    try:
        plot(rows, noise, out + ".png")
    except ImportError:
        print("no matplotlib: no plot")
    print("\n" + text, flush=True)


def main(argv):
    mode, args = (argv[0], argv[1:]) if argv else ("", [])
    if mode in ("", "--help", "-h"):
        print(__doc__)
        return
    out = next((a[len("--out="):] for a in args if a.startswith("--out=")), os.path.join("results", mode))
    args = [a for a in args if not a.startswith("--out=")]
    command = "python bench.py " + shlex.join(argv)
    if mode == "report":
        if not args or any(a.startswith("-") for a in args):
            raise train.UserError("report takes run folders, each as FOLDER or LABEL=FOLDER", 2)
        named = [a.split("=", 1) if "=" in a else (os.path.basename(a.rstrip("/")), a) for a in args]
        report(dict(named), out, command)
    elif mode in VARIANTS:
        folders, is_main = train_variants(mode, args)
        if is_main:
            report(folders, out, command)
    else:
        raise train.UserError(f"bench.py does {', '.join((*VARIANTS, 'report'))}, not '{mode}'", 2)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except train.UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"bench.py: error: {error}", file=sys.stderr)
        raise SystemExit(error.status)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
