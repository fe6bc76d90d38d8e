"""
Compare runs side by side: loss curves, noise, speed and memory, as a table and a plot in results/.

    python bench.py speed                                   # precisions, wrappers, vocabularies, batches; train_orig.py
    python bench.py precision                               # the study: bf16 and each format, two seeds each, gaps and noise
    python bench.py ablation                                # NVFP4 without one of its four ingredients at a time
    python bench.py emulation                               # speed of the emulated formats against bf16
    torchrun --standalone --nproc_per_node=2 bench.py wrappers --max_iters=77      # FSDP2, then DDP
    python bench.py report --out=results/mine out/a out/b   # the same table and plot from run folders that exist

All train by train.py's own run() (train_orig.py by its), one after another in one process group; any flag of train.py can be given as --name=value.
`precision`, `ablation` and `wrappers` take total_batch_size=65536 and 20 warm-up steps, so that a few million tokens are enough
steps to mean something (on a CPU the first two take preset tiny's); `speed` takes 24 steps, of which the first 4 do not count.
--rows="bf16; FP8 delayed" picks rows of the modes that compare speeds, as --formats does of the studies below.
--out=PATH names the files to write (PATH.json, PATH.md, PATH.png). Ctrl-C and SIGTERM end all: of a study, what is finished stays.

`precision` and `ablation` train from the same weights on the same tokens for each seed: --seeds=3 for three seeds of everything,
--seeds=2,1 for two of bf16 and one of each format; --formats="bf16,FP8 block" picks rows. They say what they will cost first. A
run that is finished with the same flags, code and device is taken as it is, so a study that was stopped goes on;
and with several GPUs, each can train some of the --formats, and a last start with all of them makes the table.
"""

import datetime
import gc
import json
import os
import re
import shlex
import statistics
import sys
import time

import torch
import torch.distributed as dist

import train
from nanofp8.config import UserError, script_flags
from nanofp8.machine import Clock, describe_machine
from nanofp8.procs import start_processes
from nanofp8.plots import smooth
from nanofp8.runlog import read_log
import train_orig

COMPARISON = ["--total_batch_size=65536", "--warmup_iters=20", "--eval_interval=0", "--keep_checkpoints=0"]
COMMON = {
    "precision": [*COMPARISON, "--preset=d12", "--max_iters=381"],
    "ablation": [*COMPARISON, "--n_layer=8", "--n_embd=256", "--n_head=2", "--vocab_size=50304", "--max_iters=77"],
    "emulation": ["--total_batch_size=65536", "--max_iters=12", "--warmup_iters=4", "--eval_interval=0", "--eval_tokens=1", "--keep_checkpoints=0"],
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
        "FP8 delayed, vocab 50,304, a quarter of the batch": ["--vocab_size=50304", "total_batch_size/4"],
        "bf16, vocab 50,304, a quarter of the batch": ["--USE_FP8=False", "--vocab_size=50304", "total_batch_size/4"],
        "FP8 delayed, half the micro-batch": ["batch_size/2"],
        "FP8 delayed, head in bf16": ["--USE_FP8_HEAD=False"],
        "FP8 delayed, no CUDA graphs": ["--USE_CUDA_GRAPHS=False"],
        "FP8 delayed, TE's modules, head in bf16": ["--USE_TRITON=False", "--USE_FP8_HEAD=False"],
        "FP8 delayed, FSDP2": ["--USE_FSDP2=True"],
        "FP8 delayed, DDP": ["--USE_DDP=True"],
        "train_orig.py": ["train_orig.py"],
    },
    "precision": {
        "bf16": ["--USE_FP8=False", "--FP8_STATS_INTERVAL=0"],
        "FP8 delayed": ["--FP8_RECIPE=delayed"],
        "FP8 current": ["--FP8_RECIPE=current"],
        "FP8 block": ["--FP8_RECIPE=block"],
        "MXFP8": ["--FP8_RECIPE=mxfp8"],
        "NVFP4": ["--USE_NVFP4=True", "last blocks in bf16"],
    },
    "ablation": {
        "bf16": ["--USE_FP8=False", "--FP8_STATS_INTERVAL=0"],
        "NVFP4": ["--USE_NVFP4=True", "last blocks in bf16"],
        "no Hadamard": ["--USE_NVFP4=True", "last blocks in bf16", "--NVFP4_HADAMARD=False"],
        "no stochastic rounding": ["--USE_NVFP4=True", "last blocks in bf16", "--NVFP4_STOCHASTIC_ROUNDING=False"],
        "no 2-D weights": ["--USE_NVFP4=True", "last blocks in bf16", "--NVFP4_2D_WEIGHTS=False"],
        "no blocks in bf16": ["--USE_NVFP4=True"],
        "none of the four": ["--USE_NVFP4=True", "--NVFP4_HADAMARD=False", "--NVFP4_STOCHASTIC_ROUNDING=False", "--NVFP4_2D_WEIGHTS=False"],
    },
    "emulation": {
        "bf16": ["--USE_FP8=False"],
        "FP8 delayed": ["--USE_EMULATION=True", "--FP8_RECIPE=delayed"],
        "FP8 current": ["--USE_EMULATION=True", "--FP8_RECIPE=current"],
        "FP8 block": ["--USE_EMULATION=True", "--FP8_RECIPE=block"],
        "MXFP8": ["--USE_EMULATION=True", "--FP8_RECIPE=mxfp8"],
        "NVFP4": ["--USE_EMULATION=True", "--USE_NVFP4=True"],
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
        torch.cuda.reset_peak_memory_stats()


def train_one(script, cfg, procs, label):
    """script.run(cfg): its run folder, or None where it could not be trained, which is said: the others go on.

    Raises UserError if it was stopped by a signal, which train.py takes for a good end.
    """
    folder = None
    try:
        folder = script.run(cfg, procs)
    except UserError as error:  # a batch that this number of ranks does not divide, a loss that is no longer finite
        if error.one_rank:
            raise
        procs.print(f"{label} left out: {error}")
    except torch.OutOfMemoryError:
        if procs.world_size > 1:  # the other ranks may have had enough
            raise
        procs.print(f"{label} left out: the GPU's memory is too small")
    forget_last_run()
    if folder and not procs.broadcast(procs.is_main and any(r["kind"] == "done" for r in read_log(folder))):
        raise UserError(f"stopped by a signal in {label}; what was finished before is in {cfg.out_dir}")
    return folder


def train_variants(mode, flags, labels):
    """Train these variants of a mode in this process group; returns ({label: run folder}, whether this is rank 0)."""
    procs, folders = start_processes(), {}
    for label in labels:
        extra = VARIANTS[mode][label]
        script = train_orig if "train_orig.py" in extra else train
        own = [f for f in extra if f.startswith("--")] + ["--run_name=" + "-".join(re.sub(r"[^\w .-]", "", label).split()).lower()]
        given = flags
        if script is train_orig:  # it has fewer flags
            table = script_flags(script.__file__)
            given = [f for f in flags if f[2:].split("=")[0] in table and not f.startswith("--batch_size")]
        common = [f for f in COMMON[mode] if script is train or not f.startswith("--keep_checkpoints")]
        cfg = script.read_flags([*common, *given, *own])
        for name in ("total_batch_size/4", "batch_size/2"):
            if name in extra:
                key, by = name.split("/")
                setattr(cfg, key, max(1, getattr(cfg, key) // int(by)))
        procs.print(f"\n===== {label} =====")
        if folder := train_one(script, cfg, procs, label):
            folders[label] = folder
    if not folders:
        raise UserError("no run could be made with these flags (each says why above)")
    return folders, procs.is_main


def read_run(folder):
    """config.json and log.jsonl of a run folder: (config, train records, val records, done record or None)."""
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(folder, "log.jsonl")) as f:
            records = [json.loads(line) for line in f]
    except OSError as error:
        raise UserError(f"{folder} is no run folder of train.py: {error.strerror} ({error.filename})", 2)
    kinds = {k: [r for r in records if r["kind"] == k] for k in ("train", "val", "done")}
    if not kinds["train"]:
        raise UserError(f"{folder}/log.jsonl holds no training step yet", 2)
    return config, kinds["train"], kinds["val"], (kinds["done"] or [None])[-1]


def largest_gap(a, b):
    """Largest |difference| of two rows' smoothed losses after the warm-up, at steps both have; None without any."""
    gaps = [abs(x - y) for x, y in zip(smooth(a["losses"]), smooth(b["losses"]))][a["warmup"]:]
    return max(gaps) if gaps else None


def summarize(runs):
    """One row a run ({label: folder}), with gaps to the first run; and the noise, if two runs are bf16 with other seeds.

    A val loss over one sequence a rank, which is what `speed` evaluates, is left out. Noise is the largest gap of smoothed loss between two bf16 runs with different seeds on the same tokens. Speed is
    the median over the steps after the warm-up.
    """
    rows = []
    for label, folder in runs.items():
        config, steps, val, done = read_run(folder)
        after = steps[config["warmup_iters"]:] or steps
        mfus = [r["mfu"] for r in after if r["mfu"] is not None]
        losses = [r["loss"] for r in steps]
        rows.append(dict(
            label=label, precision=config.get("precision", "bf16"), wrapper=config.get("wrapper"),
            gpus=config["world_size"], seed=config["seed"], parameters=config["parameters"], device=config["device"], versions=config["versions"],
            vocab_size=config["vocab_size"], total_batch_size=config["total_batch_size"], batch_size=config["batch_size"],
            warmup=config["warmup_iters"], compile_seconds=(done or {}).get("compile_seconds"),
            tokens=steps[-1]["tokens"], train_loss=smooth(losses)[-1],
            val_loss=val[-1]["val_loss"] if val and config["eval_tokens"] > config["world_size"] * config["block_size"] else None,
            tok_per_sec=statistics.median_high(r["tok_per_sec"] for r in after),
            mfu=statistics.median_high(mfus) if mfus else None,
            peak_mem_gb=max(r["peak_mem_gb"] for r in steps), train_seconds=done["train_seconds"] if done else None,
            losses=[None if x is None else round(x, 5) for x in losses], grad_norms=[r["grad_norm"] for r in steps]))
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
              f"{base['warmup']} warm-up steps. Speed: median over the steps after the warm-up, optimizer included. "
              "Compile: with calibration and pinned memory; a process's first run compiles for those after it."]
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
    curves = {r["label"]: smooth(r["losses"]) for r in rows}
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


def write_report(out, command, data, text, draw):
    """Write out.json (data, with date and command), out.md (text) and, by draw(path), out.png; print the text."""
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(out + ".json", "w") as f:
        json.dump(dict(date=str(datetime.date.today()), command=command, **data), f, indent=1)
    with open(out + ".md", "w") as f:
        f.write(text)
    try:
        draw(out + ".png")
    except ImportError:
        print("no matplotlib: no plot")
    print("\n" + text, flush=True)


def report(runs, out, command):
    """Write out.json, out.md and out.png from run folders ({label: folder}), and print the table."""
    rows, noise = summarize(runs)
    write_report(out, command, dict(noise=noise, runs=rows), markdown(rows, noise, command), lambda path: plot(rows, noise, path))


# -----------------------------------------------------------------------------------------------------
# The study of number formats: same weights, same tokens, several seeds

ON_A_CPU = ["--preset=tiny", "--eval_interval=0", "--keep_checkpoints=0"]


def plan_study(mode, flags, seeds, labels):
    """{(label, seed): cfg} of all runs of a study, bf16 first, each with its share of blocks that stay in bf16.

    seeds: how many of bf16, and how many of each format.
    """
    plan = {}
    for label in labels:
        extra = VARIANTS[mode][label]
        for seed in range(1, seeds[label != "bf16"] + 1):
            name = "-".join([mode, *label.lower().split(), f"seed{seed}"])
            own = [f for f in extra if f.startswith("--")] + [f"--seed={seed}", f"--run_name={name}"]
            common = COMMON[mode] if torch.cuda.is_available() else ON_A_CPU
            cfg = train.read_flags([*common, *flags, *own])
            if "last blocks in bf16" in extra and "HIGH_PRECISION_LAYERS" not in cfg.explicit:
                last = max(1, round(0.15 * cfg.n_layer))  # NVIDIA kept 10 of 62 blocks, most of them the last (arXiv 2509.25149)
                cfg.HIGH_PRECISION_LAYERS = ",".join(f"blocks.{i}" for i in range(cfg.n_layer - last, cfg.n_layer))
            plan[label, seed] = cfg
    return plan


def finished_run(cfg, machine):
    """The folder of a run that was finished with these very flags, by this code and on this device; None without one."""
    wanted = {k: v for k, v in vars(cfg).items() if k not in ("explicit", "run_name", "out_dir")} | {k: machine[k] for k in ("device", "code")}
    for n in range(1, 100):
        folder = os.path.join(cfg.out_dir, cfg.run_name if n == 1 else f"{cfg.run_name}-{n}")
        if not os.path.isdir(folder):
            return None
        try:
            config, _, _, done = read_run(folder)
        except (UserError, ValueError):  # one that was broken off
            continue
        if done and all(config.get(k) == v for k, v in wanted.items()):
            return folder


def matmul_rate(device):
    """FLOP/s of square matmuls as training makes them: bf16 on a GPU, fp32 on a CPU. The best of a few."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, clock, best = torch.randn(n, n, device=device, dtype=dtype), Clock(device), 0.0
    for _ in range(6):
        begin = clock.mark()
        a @ a
        best = max(best, 2 * n ** 3 / clock.ms(begin, clock.mark()) * 1000)
    return best


def train_study(mode, flags, seeds, labels):
    """Train what is missing of a study; returns ({(label, seed): run folder}, whether this is rank 0)."""
    procs, plan = start_processes(), plan_study(mode, flags, seeds, labels)
    machine = describe_machine(procs.device)
    for cfg in plan.values():  # what is wrong should be known before the first run
        train.check_flags(cfg, procs.world_size)
        train.open_data(cfg, procs)
    folders = procs.broadcast({key: finished_run(cfg, machine) for key, cfg in plan.items()} if procs.is_main else None)
    missing = {key: cfg for key, cfg in plan.items() if not folders[key]}
    flops, emulated = {}, set()
    for key, cfg in missing.items():
        precision = train.select_precision(cfg, procs.device)
        if precision.emulated and precision.recipe is not None and procs.device.type == "cuda":
            emulated.add(key)
        flops[key] = train.flops_per_token(cfg) * cfg.max_iters * cfg.total_batch_size * (3 if key in emulated else 1)
    if missing:
        cfg, rate = next(iter(missing.values())), matmul_rate(procs.device)
        minutes = sum(flops.values()) / (rate * procs.world_size / 3) / 60
        tokens = cfg.max_iters * cfg.total_batch_size / 1e6
        procs.print(f"{mode}: {len(missing)} runs to train ({len(plan) - len(missing)} are there) of {tokens:.2f}M tokens, "
                    f"{train.flops_per_token(cfg) / 1e9:.2f} GFLOP a token: about {minutes:.0f} minutes at a third of the "
                    f"{rate / 1e12:.2g} TFLOP/s measured here, without compilation"
                    + (f"; {len(emulated)} emulated ones counted three times" if emulated else ""))
    start, done = time.perf_counter(), 0
    for key, cfg in missing.items():
        procs.print(f"\n===== {key[0]}, seed {key[1]} =====")
        folders[key] = train_one(train, cfg, procs, f"{key[0]}, seed {key[1]}")
        done += flops[key]
        left = (time.perf_counter() - start) * (sum(flops.values()) / done - 1)
        procs.print(f"{(time.perf_counter() - start) / 60:.1f} minutes so far, about {left / 60:.1f} left")
    folders = {key: folder for key, folder in folders.items() if folder}
    if not folders:
        raise UserError("no run could be made with these flags (each says why above)")
    return folders, procs.is_main


def summarize_study(folders):
    """(rows, noise, val noise): a row a format, with its runs' losses and their gaps to the bf16 run of the same seed.

    Noise is the largest gap of smoothed train loss between two bf16 runs with other seeds, val noise that of val losses.
    """
    runs = {}
    for (label, seed), folder in folders.items():
        config, steps, val, done = read_run(folder)
        losses = [r["loss"] for r in steps]
        after = steps[config["warmup_iters"]:] or steps
        runs[label, seed] = dict(config=config, losses=losses, warmup=config["warmup_iters"], val=done["val_losses"]["bf16"],
                                 val_in_format=done["val_losses"].get(config["precision"]), seconds=done["train_seconds"],
                                 tok_per_sec=statistics.median_high(r["tok_per_sec"] for r in after))
    bf16 = {seed: run for (label, seed), run in runs.items() if label == "bf16"}
    pairs = [(a, b) for s, a in bf16.items() for t, b in bf16.items() if s < t]
    noise = max((largest_gap(a, b) or 0.0 for a, b in pairs), default=None)
    val_noise = max((abs(a["val"] - b["val"]) for a, b in pairs), default=None)
    rows = []
    for label in dict.fromkeys(label for label, _ in runs):
        own = {seed: run for (name, seed), run in runs.items() if name == label}
        paired = {} if label == "bf16" else {s: r for s, r in own.items() if s in bf16}
        config = next(iter(own.values()))["config"]
        gaps = [r["val"] - bf16[s]["val"] for s, r in paired.items()]
        rows.append(dict(
            label=label, precision=config["precision"], emulated=config["emulated"] and config["precision"] != "bf16",
            in_bf16=config["HIGH_PRECISION_LAYERS"], seeds=list(own), config=config,
            tokens=config["max_iters"] * config["total_batch_size"], warmup=config["warmup_iters"],
            losses={s: [None if x is None else round(x, 5) for x in r["losses"]] for s, r in own.items()},
            val_losses={s: r["val"] for s, r in own.items()}, val_in_format={s: r["val_in_format"] for s, r in own.items()},
            val_loss=statistics.mean(r["val"] for r in own.values()), gaps=gaps,
            largest_gap=max((largest_gap(bf16[s], r) or 0.0 for s, r in paired.items()), default=None),
            tok_per_sec=statistics.median(r["tok_per_sec"] for r in own.values()), seconds=sum(r["seconds"] for r in own.values())))
    return rows, noise, val_noise


def study_markdown(rows, noise, val_noise, command):
    """The table, with device, date, model and command above it, and how to read it below."""
    config = rows[0]["config"]
    bf16 = next((r["val_loss"] for r in rows if r["label"] == "bf16"), None)
    versions = ", ".join(f"{k} {v}" for k, v in config["versions"].items() if v)
    lines = [
        f"{datetime.date.today()}, {config['device']}, {versions}", "", f"    {command}", "",
        f"{config['parameters'] / 1e6:.1f}M parameters ({config['n_layer']} layers, width {config['n_embd']}, vocabulary "
        f"{config['vocab_size']:,}), {rows[0]['tokens'] / 1e6:.2f}M tokens of {config['dataset']}, {config['total_batch_size']:,} a step.", "",
        "| format | by | seeds | val loss | gap to bf16 | in % | each seed's gap | largest gap in training | against noise | evaluated in the format | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        gap = statistics.mean(r["gaps"]) if r["gaps"] else None
        formats = [b - r["val_losses"][s] for s, b in r["val_in_format"].items() if b is not None and r["label"] != "bf16"]
        by = "emulated" if r["emulated"] else "hardware" if r["precision"] != "bf16" else ""
        lines.append(" | ".join([
            f"| {r['label']}", by, str(len(r["seeds"])), f"{r['val_loss']:.4f}", "" if gap is None else f"{gap:+.4f}",
            "" if gap is None or not bf16 else f"{100 * gap / bf16:+.2f}%", ", ".join(f"{g:+.4f}" for g in r["gaps"]),
            "" if r["largest_gap"] is None else f"{r['largest_gap']:.4f}",
            "" if r["largest_gap"] is None or not noise else f"{r['largest_gap'] / noise:.1f}x",
            f"{statistics.mean(formats):+.4f}" if formats else "", f"{r['tok_per_sec']:,.0f} |"]))
    lines += ["", "Runs of one seed begin with the same weights and read the same tokens. Gaps are to the bf16 run of the same seed; val loss is "
              "evaluated in bf16, and the last column but one says how much evaluating in the format itself adds. Largest gap: of smoothed train loss "
              f"(exponential average, 0.9) after {rows[0]['warmup']} warm-up steps."]
    if noise is not None:
        lines.append(f"Noise, between bf16 runs with different seeds: {noise:.4f} in training (largest gap, smoothed), {val_noise:.4f} in val loss.")
    kept = dict.fromkeys(r["in_bf16"] for r in rows if r["in_bf16"])
    if kept:
        lines.append(f"Kept in bf16 ({', '.join(r['label'] for r in rows if r['in_bf16'])}): {'; '.join(kept)}.")
    return "\n".join(lines) + "\n"


def plot_study(rows, noise, val_noise, path):
    """Loss curves; each format's gap to bf16 in training (the mean over seeds, their spread as a band, noise in grey), and in val loss."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained", width_ratios=(4, 6, 4))
    bf16 = {s: smooth(x) for r in rows if r["label"] == "bf16" for s, x in r["losses"].items()}
    unit, label = (1e6, "million tokens") if rows[0]["tokens"] >= 2e6 else (1e3, "thousand tokens")

    def draw(ax, curves, row, color):
        at = [(i + 1) * row["config"]["total_batch_size"] / unit for i in range(min(map(len, curves)))][row["warmup"]:]
        across = list(zip(*curves))[row["warmup"]:]
        ax.plot(at, [statistics.mean(x) for x in across], color=color, linewidth=1.5, label=row["label"])
        ax.fill_between(at, [min(x) for x in across], [max(x) for x in across], color=color, alpha=0.15, linewidth=0)

    for i, row in enumerate(rows):
        color = "black" if row["label"] == "bf16" else f"C{i % 10}"
        smoothed = {s: smooth(x) for s, x in row["losses"].items()}
        draw(left, list(smoothed.values()), row, color)
        gaps = [[a - b for a, b in zip(curve, bf16[s])] for s, curve in smoothed.items() if s in bf16]
        if row["label"] != "bf16" and gaps:
            draw(middle, gaps, row, color)
            right.plot(row["gaps"], [i] * len(gaps), "o", color=color, alpha=0.7)
    if noise is not None:
        for span, by in ((middle.axhspan, noise), (right.axvspan, val_noise)):
            span(-by, by, color="gray", alpha=0.15, label="noise: bf16, other seeds")
    for ax in (left, middle, right):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    middle.axhline(0, color="black", linewidth=1)
    right.axvline(0, color="black", linewidth=1)
    left.set(xlabel=label, ylabel="train loss, smoothed", title="Loss after warm-up")
    middle.set(xlabel=label, ylabel="train loss minus bf16's, smoothed", title="In training: gap to bf16 of the same seed")
    right.set(xlabel="val loss minus bf16's", title="At the end: gap in val loss, each seed", ylim=(len(rows) - 0.5, -0.5))
    right.locator_params(axis="x", nbins=6)
    right.set_yticks([i for i, r in enumerate(rows) if r["gaps"]], [r["label"] for r in rows if r["gaps"]])
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report_study(folders, out, command):
    """Write out.json, out.md and out.png of a study's runs, and print the table."""
    rows, noise, val_noise = summarize_study(folders)
    write_report(out, command, dict(noise=noise, val_noise=val_noise, formats=rows), study_markdown(rows, noise, val_noise, command),
                 lambda path: plot_study(rows, noise, val_noise, path))


def take_options(args, *names):
    """({name: value} of those --name=value among the arguments, the other arguments)."""
    own = [a for a in args if a.startswith("--") and "=" in a and a[2:].split("=")[0] in names]
    return dict(a[2:].split("=", 1) for a in own), [a for a in args if a not in own]


def pick(mode, option, names):
    """The labels of a mode with these names, all of them for None, in the mode's order. Raises UserError."""
    names = [*VARIANTS[mode]] if names is None else [name.strip() for name in names]
    for name in names:
        if name not in VARIANTS[mode]:
            raise UserError(f"--{option}: {mode} has {'; '.join(VARIANTS[mode])}, not '{name}'", 2)
    return [label for label in VARIANTS[mode] if label in names]


def study_options(mode, args):
    """(seeds of bf16 and of formats, labels, the other arguments) from --seeds and --formats. Raises UserError."""
    given, rest = take_options(args, "seeds", "formats")
    seeds = given.get("seeds", "2").split(",")
    if not (len(seeds) <= 2 and all(n.isdigit() and int(n) > 0 for n in seeds)):
        raise UserError(f"--seeds takes a number of runs, or two (bf16, each format), not '{given['seeds']}'", 2)
    return (int(seeds[0]), int(seeds[-1])), pick(mode, "formats", given["formats"].split(",") if "formats" in given else None), rest


def main(argv):
    mode, args = (argv[0], argv[1:]) if argv else ("", [])
    if mode in ("", "--help", "-h"):
        print(__doc__)
        return
    out = next((a[len("--out="):] for a in args if a.startswith("--out=")), os.path.join("results", mode))
    args = [a for a in args if not a.startswith("--out=")]
    start = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if "LOCAL_WORLD_SIZE" in os.environ else "python"
    command = f"{start} bench.py {shlex.join(argv)}"
    if any(a.startswith("--log_interval=") and a != "--log_interval=1" for a in args):
        raise UserError("comparisons need every step's record: leave --log_interval at 1", 2)
    if mode == "report":
        if not args or any(a.startswith("-") for a in args):
            raise UserError("report takes run folders, each as FOLDER or LABEL=FOLDER", 2)
        named = [a.split("=", 1) if "=" in a else (os.path.basename(a.rstrip("/")), a) for a in args]
        report(dict(named), out, command)
    elif mode in ("precision", "ablation"):
        seeds, labels, flags = study_options(mode, args)
        folders, is_main = train_study(mode, flags, seeds, labels)
        if is_main:
            report_study(folders, out, command)
    elif mode in VARIANTS:
        given, flags = take_options(args, "rows")
        folders, is_main = train_variants(mode, flags, pick(mode, "rows", given["rows"].split(";") if "rows" in given else None))
        if is_main:
            report(folders, out, command)
    else:
        raise UserError(f"bench.py does {', '.join((*VARIANTS, 'report'))}, not '{mode}'", 2)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"bench.py: error: {error}", file=sys.stderr)
        raise SystemExit(error.status)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
