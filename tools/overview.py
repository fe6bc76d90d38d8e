"""
Draw pictures from measured results: README's docs/overview.png, loss over time beside a bar chart of speeds, and
docs/speed_steps.png, the changes since commit 1ea897b that made one H100 faster.

    python tools/overview.py
"""

import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

from nanofp8.files import replace_file
from nanofp8.plots import pyplot, smooth

# nanochat on four H100s: smoothed train loss after each eighth of its run; its time on the host of our runs is in
# results/NOTES.md, "Time to val loss 3.5885 on four H100s"
NANOCHAT_SECONDS, NANOCHAT_LOSS = 158.7, 3.5885
NANOCHAT_CURVE = (5.845, 5.116, 4.675, 4.262, 4.007, 3.783, 3.644, 3.629)
STYLES = {"speedrun": dict(color="tab:red", ha="right"), "d20": dict(color="tab:blue", ha="left")}


def draw(path: pathlib.Path) -> None:
    """Draw results/h100/race_four_gpus.json (losses) and results/h200/speed.json (speeds) into a PNG."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(5, 5))

    race = json.loads((ROOT / "results/h100/race_four_gpus.json").read_text())["runs"]
    for name, style in STYLES.items():
        run, color = race[name], style["color"]
        seconds = [(i + 1) * run["tokens"] / run["steps"] / run["tok_per_sec"] for i in range(run["steps"])]
        left.plot(seconds, smooth(run["train_losses"], 0.95), color=color, linewidth=1.5)
        left.plot(seconds[-1], run["val_loss"], "o", color=color)
        left.annotate(f"{name}: {seconds[-1]:.0f} s", (seconds[-1], run["val_loss"]), xytext=(0, -16),
                      textcoords="offset points", weight="bold", **style)
    left.plot([(i + 1) / 8 * NANOCHAT_SECONDS for i in range(8)], NANOCHAT_CURVE, color="0.4", linewidth=1.5)
    left.plot(NANOCHAT_SECONDS, NANOCHAT_LOSS, "o", color="0.4")
    left.annotate(f"nanochat: {NANOCHAT_SECONDS:.0f} s", (NANOCHAT_SECONDS, NANOCHAT_LOSS), xytext=(-8, 26),
                  textcoords="offset points", ha="center", color="0.4", weight="bold")
    left.axhline(NANOCHAT_LOSS, color="0.6", linewidth=0.8, linestyle="--")
    left.set(xlabel="seconds of training on four H100s", ylabel="train loss, smoothed; dots: val loss", xlim=(0, 180),
             ylim=(3.4, 5.2), title="Time to val loss 3.59 (older, lower learning rates)")
    left.grid(alpha=0.3)

    speed = json.loads((ROOT / "results/h200/speed.json").read_text())
    measured = {run["label"]: run["tok_per_sec"] for run in speed["runs"]}
    bars = [("FP8, delayed scaling", measured["FP8 delayed"], "tab:blue"),
            ("FP8, current scaling", measured["FP8 current"], "tab:blue"),
            ("FP8, TE's own modules", measured["FP8 delayed, TE's modules, head in bf16"], "tab:blue"),
            ("nanochat, FP8", speed["nanochat"]["tok_per_sec"], "0.6"),
            ("bf16", measured["bf16"], "tab:blue"),
            ("train_orig.py: GPT-2, bf16", measured["train_orig.py (bf16)"], "0.6")]
    for i, (_, value, color) in enumerate(bars):
        right.barh(i, value / 1000, color=color)
        right.text(value / 1000 - 3, i, f"{value / 1000:.0f}k", va="center", ha="right", color="white", weight="bold")
    right.set_yticks(range(len(bars)), [name for name, *_ in bars])
    right.invert_yaxis()
    right.set(xlabel="thousand tokens per second", title="One H200, commit f9019b4 (522M parameters)")
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
        left.spines[side].set_visible(False)
    replace_file(path, lambda temporary: fig.savefig(temporary, dpi=110, format="png"))


def draw_steps(path: pathlib.Path) -> None:
    """Draw results/h100/quack_flash4.json and against_1ea897b.json into a PNG: speed and memory after each change."""
    plt = pyplot()

    first = json.loads((ROOT / "results/h100/quack_flash4.json").read_text())
    second = json.loads((ROOT / "results/h100/against_1ea897b.json").read_text())
    cards = second["tokens_per_s"].values()

    def of_first(name: str) -> tuple[list[float], float]:
        runs = first[name].values()
        return ([run["medians"][0] / first["old"][card]["medians"][0] for card, run in first[name].items()],
                max(run["peak_gb"] for run in runs))

    def of_second(name: str) -> tuple[list[float], float]:
        return [card[name] / card["old"] for card in cards if name in card and "old" in card], second["peak_gb"][name]

    steps = [("commit 1ea897b", *of_first("old")),
             ("less kept and moved\n(Triton kernels)", *of_first("new")),
             ("flash-attn-4", *of_first("flash")),
             ("relu\u00b2 in QuACK's\nFP8 matmuls", *of_first("both")),
             ("logits, q, k, v by\nQuACK; less kept", *of_second("main")),
             ("kernels of RoPE and\ncross-entropy", *of_second("next"))]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(6, 4), sharey=True)
    for i, (_, ratios, memory) in enumerate(steps):
        mean = statistics.mean(ratios)
        left.plot([min(ratios), max(ratios)], [i, i], color="tab:blue", linewidth=4, alpha=0.35, solid_capstyle="round")
        left.plot(mean, i, "o", color="tab:blue", markersize=9)
        left.annotate(f"{mean:.3f}", (max(ratios), i), xytext=(8, 0), textcoords="offset points", va="center",
                      weight="bold", color="tab:blue")
        right.barh(i, memory, color="tab:blue")
        right.text(memory - 0.4, i, f"{memory:.1f} GB", va="center", ha="right", color="white", weight="bold")
    left.set_yticks(range(len(steps)), [name for name, *_ in steps])
    left.invert_yaxis()
    left.set(xlabel="tokens per second against commit 1ea897b on the same card (dot: mean, bar: all cards)",
             xlim=(0.995, 1.125), title="One H100, FP8: each row adds to those above")
    right.set(xlabel="peak memory, GB", title="preset classic")
    left.grid(axis="x", alpha=0.3)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    replace_file(path, lambda temporary: fig.savefig(temporary, dpi=110, format="png"))


if __name__ == "__main__":
    draw(ROOT / "docs" / "overview.png")
    draw_steps(ROOT / "docs" / "speed_steps.png")
