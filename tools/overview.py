"""
Draw README's picture, docs/overview.png, from measured results: loss curves beside a bar chart of speeds.

    python tools/overview.py
"""

import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanofp8.files import replace_file
from nanofp8.plots import smooth

# The curves lie on each other: a wide light line below, thin ones above
CURVES = {"bf16": dict(color="0.75", linewidth=6), "FP8 delayed": dict(color="tab:blue", linewidth=1.8),
          "NVFP4": dict(color="tab:orange", linewidth=1.4, linestyle="--")}


def draw(path: pathlib.Path) -> None:
    """Draw results/h200/precision.json (losses) and results/h200/speed.json (speeds) into a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(5, 5))

    study = json.loads((ROOT / "results/h200/precision.json").read_text())
    for row in study["formats"]:
        if row["label"] in CURVES:
            curves = [smooth(losses, 0.95) for losses in row["losses"].values()]
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            tokens = [(i + 1) * row["config"]["total_batch_size"] / 1e6 for i in range(len(mean))]
            name = "FP8" if row["label"] == "FP8 delayed" else row["label"] + " (emulated)" * row["emulated"]
            left.plot(tokens[20:], mean[20:], **CURVES[row["label"]], label=f"{name}: val loss {row['val_loss']:.3f}")
    left.set(xlabel="million tokens", ylabel="train loss, smoothed",
             title="The same loss in FP8 (186M parameters, mean of two seeds)")
    left.legend()
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
    right.set(xlabel="thousand tokens per second", title="The 561M model (vocabulary 50,304) on one H200")
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
        left.spines[side].set_visible(False)
    replace_file(path, lambda temporary: fig.savefig(temporary, dpi=110, format="png"))


if __name__ == "__main__":
    draw(ROOT / "docs" / "overview.png")
