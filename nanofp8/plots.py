"""Pictures of a run: loss.png. And matplotlib, as all pictures take it."""

import math
import os
from types import ModuleType
from typing import Sequence

from nanofp8.files import replace_file


def smooth(values: Sequence[float | None], beta: float = 0.9) -> list[float]:
    """Return the exponential moving average of `values` with bias correction, a list as long as `values`.

    None and NaN (skipped steps) do not count.
    """
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        if value is not None and math.isfinite(value):
            average, weight = beta * average + (1 - beta) * value, beta * weight + (1 - beta)
        smoothed.append(average / weight if weight else math.nan)
    return smoothed


def pyplot() -> ModuleType:
    """Return matplotlib.pyplot for pictures in files. Raises ImportError without matplotlib."""
    os.environ["MPLBACKEND"] = "Agg"  # Jupyter sets another for all that it starts; matplotlib refuses one it lacks
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot_losses(records: Sequence[dict], path: str, title: str) -> None:
    """Draw training loss (thin, and smoothed) and val loss over tokens as a PNG.

    records: of kind "train" and "val", as log.jsonl has them; at least one.
    Raises: ImportError without matplotlib, and whatever goes wrong with fonts and files.
    """
    plt = pyplot()
    train = [r for r in records if r["kind"] == "train" and r["loss"] is not None and math.isfinite(r["loss"])]
    val = [r for r in records if r["kind"] == "val" and r["val_loss"] is not None]
    fig, ax = plt.subplots(figsize=(8, 4.5))
    unit, label = (1e6, "million tokens") if (train or val)[-1]["tokens"] >= 2e6 else (1e3, "thousand tokens")
    if train:
        x, loss = [r["tokens"] / unit for r in train], [r["loss"] for r in train]
        ax.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="train loss")
        # A short run is smoothed less: an average over 10 steps would lag behind 40
        curve = smooth(loss, beta=min(0.9, len(loss) / (len(loss) + 20)))
        ax.plot(x, curve, color="tab:blue", linewidth=1.5, label="train loss, smoothed")
    if val:
        ax.plot([r["tokens"] / unit for r in val], [r["val_loss"] for r in val], "o-", color="tab:orange",
                markersize=4, label="val loss")
        ax.annotate(f"{val[-1]['val_loss']:.3f}", (val[-1]["tokens"] / unit, val[-1]["val_loss"]),
                    textcoords="offset points", xytext=(0, 8), ha="center", color="tab:orange")
    ax.set(xlabel=label, ylabel="cross-entropy (nats per token)")
    ax.set_title(title, parse_math=False)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    replace_file(path, lambda temporary: fig.savefig(temporary, dpi=120, format="png"))
    plt.close(fig)
