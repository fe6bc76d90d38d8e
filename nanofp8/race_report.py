"""What a race of variants found: noise, differences and what they are worth, as a table and a picture."""

import functools
import itertools
import math
import shlex
import statistics
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

from nanofp8.plots import pyplot, smooth
from nanofp8.reports import RunData, header, table, write_report

SPEED_FROM = 60     # step from which speed is measured: the first ones are faster, before a GPU reaches its power limit
CLEAR = 3           # a difference counts if it is this many times its noise
FARTHEST = 10       # no estimate lies farther from the lengths that were trained than this factor


@dataclass(frozen=True)
class Race:
    """What is compared."""

    variants: dict[str, list[str]]  # flags by name; differences are taken to the first
    lengths: list[float]            # of the runs, in `unit`, shortest first
    unit: str                       # "tokens" or "minutes" of training
    seeds: list[int]
    gpus: list[str | None]          # as CUDA_VISIBLE_DEVICES takes them; [None] without a GPU
    target: float | None            # val loss to reach

    @property
    def base(self) -> str:
        """Name of the first variant."""
        return next(iter(self.variants))


def amount(tokens: float, noise: float | None = None) -> str:
    """Return a number of tokens, and its noise if given, in a few characters, such as 81.92k or 60.03 ± 0.12M."""
    unit, letter = (1e6, "M") if tokens >= 1e6 else (1e3, "k")
    return f"{tokens / unit:.2f}" + ("" if noise is None else f" ± {noise / unit:.2f}") + letter


def name_of(length: float, unit: str) -> str:
    """Return a length of runs in words, such as "60M tokens" or "3 minutes"."""
    if unit == "minutes":
        return f"{length:g} minute{'s' * (length != 1)}"
    return f"{length / 1e6:g}M tokens" if length >= 1e6 else f"{length / 1e3:g}k tokens"


# ----------------------------------------------------------------------------------------------------------------------
# Results


def summarize(runs: Mapping[tuple[str, float, int], RunData], race: Race) -> tuple[list[dict], float | None, int]:
    """Return one row per length and variant as plain numbers, the noise of a run, and its degrees of freedom.

    The noise is the standard deviation of val losses with different seeds, pooled over all rows; None with one seed.
    Differences are to the first variant's row of the same length.
    """
    rows = []
    for length, variant in itertools.product(race.lengths, race.variants):
        own = {seed: run for (v, n, seed), run in runs.items() if (v, n) == (variant, length)}
        if own:
            rows.append(summarize_row(variant, length, own))
    known = [[loss for loss in row["val_losses"].values() if loss is not None] for row in rows]
    freedom = sum(len(losses) - 1 for losses in known if losses)
    squares = sum((loss - statistics.mean(losses)) ** 2 for losses in known if losses for loss in losses)
    noise = math.sqrt(squares / freedom) if freedom else None
    for row, losses in zip(rows, known, strict=True):
        base = next((r for r in rows if r["length"] == row["length"] and r["label"] == race.base), None)
        row |= dict(difference=None, difference_noise=None, clear=None)
        row["val_loss"] = statistics.mean(losses) if losses else None
        row["mean_noise"] = noise / math.sqrt(len(losses)) if noise is not None and losses else None
        if base is None or base is row or None in (base["val_loss"], row["val_loss"]):
            continue
        row["difference"] = row["val_loss"] - base["val_loss"]
        if noise is not None:
            row["difference_noise"] = math.hypot(row["mean_noise"], base["mean_noise"])
            row["clear"] = abs(row["difference"]) > CLEAR * row["difference_noise"]
    return rows, noise, freedom


def summarize_row(variant: str, length: float, own: Mapping[int, RunData]) -> dict[str, Any]:
    """Return what one variant's runs of one length say by themselves. own: runs by seed."""
    runs = list(own.values())
    config = runs[0].config
    late = [r for run in runs for r in run.train if r["step"] >= SPEED_FROM] or [r for run in runs for r in run.timed]
    minutes = {seed: run.done["train_seconds"] / 60 for seed, run in own.items()}
    speed = statistics.median_high(r["tok_per_sec"] for r in late)
    if config.get("batch_ramp"):  # small steps are slower than large ones
        speed = statistics.mean(run.done["tokens"] / run.done["train_seconds"] for run in runs)
    tokens = [r["tokens"] for r in runs[0].train]
    seconds = list(itertools.accumulate((b - a) / r["tok_per_sec"] for a, b, r in zip(
        [0, *tokens], tokens, runs[0].train, strict=False)))
    return dict(
        label=variant, length=length, tokens=runs[0].done["tokens"], steps=config["max_iters"],
        total_batch_size=config["total_batch_size"], parameters=config["parameters"],
        val_losses={seed: run.val_loss for seed, run in own.items()}, each_minutes=minutes,
        minutes=statistics.mean(minutes.values()),
        tok_per_sec=speed,
        peak_mem_gb=max(r["peak_mem_gb"] for run in runs for r in run.train),
        at=dict(tokens=[t / tokens[-1] for t in tokens], minutes=[s / seconds[-1] for s in seconds]),
        losses={s: [None if x is None else round(x, 5) for x in run.losses] for s, run in own.items()}, config=config)


def fit(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Fit val loss = a + b x ln(tokens) to all runs of each variant with several lengths; return {variant: a, b}."""
    fits = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        points = [(math.log(row["tokens"]), loss) for row in rows if row["label"] == label
                  for loss in row["val_losses"].values() if loss is not None]
        if len({x for x, _ in points}) > 1:
            b, a = statistics.linear_regression(*zip(*points, strict=True))
            fits[label] = dict(a=a, b=b)
    return fits


def pick_slope(label: str, base: str, fits: Mapping[str, dict[str, float]]) -> tuple[float, str] | None:
    """Return a slope b and whose it is: the variant's, else the first variant's, else any. None if none falls."""
    for name in dict.fromkeys([label, base, *fits]):
        if name in fits and fits[name]["b"] < 0:
            return fits[name]["b"], name
    return None


def worth(rows: Sequence[dict], base: str, fits: Mapping[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return what each row with a difference needs to reach the first variant's loss, as parts of that one's tokens
    and time.

    `tokens` is None where it would lie more than FARTHEST times from the row's own. `measured` says whether the
    variant was trained on fewer and on more tokens than that.
    """
    results = []
    for row in rows:
        slope = pick_slope(row["label"], base, fits)
        if row["difference"] is None or slope is None:
            continue
        b, source = slope
        other = next(r for r in rows if r["label"] == base and r["length"] == row["length"])
        exponent = -row["difference"] / b
        result = dict(label=row["label"], length=row["length"], val_loss=other["val_loss"], slope_of=source,
                      tokens=None)
        if abs(exponent) <= math.log(FARTHEST):
            tokens = row["tokens"] * math.exp(exponent)
            trained = [r["tokens"] for r in rows if r["label"] == row["label"]]
            part = tokens / other["tokens"]
            noise = row["difference_noise"]
            result |= dict(
                tokens=tokens, of_tokens=part, of_tokens_noise=None if noise is None else part * noise / -b,
                of_time=tokens / row["tokens"] * row["minutes"] / other["minutes"],
                measured=min(trained) <= tokens <= max(trained))
        results.append(result)
    return results


def reach(rows: Sequence[dict], target: float, base: str, fits: Mapping[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return tokens and minutes in which each variant reaches a val loss, on the line through its two nearest lengths.

    `how` is "measured between" two lengths, "extrapolated", or why there is no figure (then `tokens` is None).
    """
    results = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = sorted((r for r in rows if r["label"] == label and r["val_loss"] is not None), key=lambda r: r["tokens"])
        result = dict(label=label, tokens=None, minutes=None, noise=None, how="no val loss")
        results.append(result)
        if len(own) > 1:
            a, z = min(itertools.pairwise(own), key=lambda pair: max(
                min(r["val_loss"] for r in pair) - target, target - max(r["val_loss"] for r in pair)))
            distance = math.log(z["tokens"] / a["tokens"])
            b, whose = (z["val_loss"] - a["val_loss"]) / distance, ""
            pace = (z["minutes"] - a["minutes"]) / (z["tokens"] - a["tokens"])
        elif own:
            a = z = own[0]
            b, source = pick_slope(label, base, fits) or (0.0, "")
            distance, pace, whose = math.inf, a["minutes"] / a["tokens"], f" with the slope of {source}"
        else:
            continue
        if b >= 0:
            result["how"] = "its loss does not fall with the tokens" if len(own) > 1 else "needs a second length"
            continue
        exponent = (target - a["val_loss"]) / b
        if not -math.log(FARTHEST) <= exponent <= math.log(z["tokens"] / a["tokens"] * FARTHEST):
            result["how"] = f"more than {FARTHEST} times from the lengths trained"
            continue
        tokens, share = a["tokens"] * math.exp(exponent), exponent / distance
        if a["mean_noise"] is not None:
            result["noise"] = tokens * math.hypot((1 - share) * a["mean_noise"], share * z["mean_noise"]) / -b
        inside = a["tokens"] <= tokens <= z["tokens"]
        result |= dict(tokens=tokens, minutes=a["minutes"] + pace * (tokens - a["tokens"]),
                       how="between two lengths" if inside else f"extrapolated{whose}")
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Report


def columns(rows: Sequence[dict], race: Race) -> list[tuple[str, Callable[[dict], str]]]:
    """Return (title, row -> cell) of the table's columns."""
    sizes = {row["parameters"] for row in rows}

    def difference(row: dict) -> str:
        if row["difference"] is None:
            return ""
        noise = row["difference_noise"]
        return f"{row['difference']:+.4f}" + ("" if noise is None else f" ± {noise:.4f}")

    def each(row: dict) -> str:
        return ", ".join("none" if loss is None else f"{loss:.4f}" for loss in row["val_losses"].values())

    return [
        ("variant", lambda r: r["label"]),
        ("parameters", lambda r: f"{r['parameters'] / 1e6:.1f}M" if len(sizes) > 1 else ""),
        ("asked for", lambda r: name_of(r["length"], race.unit) if race.unit == "minutes" else ""),
        ("tokens", lambda r: amount(r["tokens"])), ("steps", lambda r: f"{r['steps']:,}"),
        ("tokens a step", lambda r: ("up to " if r["config"].get("batch_ramp") else "") + f"{r['total_batch_size']:,}"),
        ("val loss", lambda r: "" if r["val_loss"] is None else f"{r['val_loss']:.4f}"),
        ("each seed", lambda r: each(r) if len(race.seeds) > 1 else ""),
        (f"minus {race.base}", difference),
        (f"more than {CLEAR} x noise", lambda r: "" if r["clear"] is None else "yes" if r["clear"] else "no"),
        ("tokens/s", lambda r: f"{r['tok_per_sec']:,.0f}"), ("minutes", lambda r: f"{r['minutes']:.2f}"),
        ("peak GB", lambda r: f"{r['peak_mem_gb']:.1f}"),
    ]


def noise_text(rows: Sequence[dict], race: Race, noise: float | None, freedom: int) -> str:
    """Return which differences are more than noise, and how well the noise is known."""
    if noise is None:
        return "The noise is not known, because no row has two seeds: differences may be chance."
    compared = [r for r in rows if r["clear"] is not None]
    clear = [f"{r['label']} at {name_of(r['length'], race.unit)} ({r['difference']:+.4f})"
             for r in compared if r["clear"]]
    text = (f"Noise: one run's val loss varies by {noise:.4f} with its seed (standard deviation, pooled over all rows; "
            f"{freedom} degrees of freedom, so this figure is itself uncertain by "
            f"{100 / math.sqrt(2 * freedom):.0f}%). ± is the noise of a difference of means.")
    if compared:
        text += (f" Differences of more than {CLEAR} times that: {'; '.join(clear) or 'none'}."
                 f"{' The others may be chance.' if len(clear) < len(compared) else ''}")
    return text


def worth_text(rows: Sequence[dict], race: Race, fits: Mapping[str, dict[str, float]]) -> list[str]:
    """Return what differences are worth, in lines; or why that is left out."""
    if len(race.variants) < 2:
        return []
    results = worth(rows, race.base, fits)
    if not results:
        why = ("no variant has val losses of two lengths; give two, such as --tokens=60e6,100e6" if not fits else
               "no variant's loss falls with the tokens" if pick_slope("", race.base, fits) is None else
               "there is no difference to compare")
        return [f"What a difference is worth is left out: {why}."]
    lines = [f"What the differences are worth in tokens and time, to reach the val loss of {race.base}:", ""]
    for r in results:
        goal = (f"- {r['label']} reaches {race.base}'s val loss at {name_of(r['length'], race.unit)} "
                f"({r['val_loss']:.4f})")
        if r["tokens"] is None:
            lines.append(f"{goal}: no figure, because it lies more than {FARTHEST} times from the lengths trained.")
            continue
        noise = "" if r["of_tokens_noise"] is None else f" ± {r['of_tokens_noise']:.3f}"
        notes = [] if r["measured"] else ["extrapolated"]
        notes += [] if r["slope_of"] == r["label"] else [f"with the slope of {r['slope_of']}"]
        lines.append(f"{goal} with {r['of_tokens']:.3f}{noise} of the tokens and {r['of_time']:.3f} of the time"
                     f"{' (' + ', '.join(notes) + ')' if notes else ''}.")
    return lines


def target_text(target: float, results: Sequence[dict]) -> list[str]:
    """Return the table of what each variant needs to reach the target, in lines."""
    return [f"Val loss {target:g} is reached after:", "", *table(results, [
        ("variant", lambda r: r["label"]),
        ("tokens", lambda r: "" if r["tokens"] is None else amount(r["tokens"], r["noise"])),
        ("minutes", lambda r: "" if r["minutes"] is None else f"{r['minutes']:.2f}"), ("how", lambda r: r["how"])])]


def markdown(rows: list[dict], race: Race, noise: float | None, freedom: int, command: str) -> str:
    """Return the report: date, device, command, the table, how to read it, and what the differences are worth."""
    config, fits = rows[0]["config"], fit(rows)
    gpus = "" if race.gpus == [None] else " on one GPU"
    seeds = ", ".join(map(str, race.seeds))
    text = [
        *header(config, command),
        f"Each run is a whole schedule{gpus}, on {config['dataset']}. Variants:", "",
        *(f"- {name}: {shlex.join(flags) or 'the flags of all'}" for name, flags in race.variants.items()), "",
        *table(rows, columns(rows, race)), "",
        f"Val loss is that after the last step, evaluated in bf16 over {config['eval_tokens']:,} tokens"
        f"{f', the mean over seeds {seeds}' if len(race.seeds) > 1 else ''}. Tokens/s is the median from "
        f"step {SPEED_FROM} on (in shorter runs, after the warm-up); where the batch grows, the mean of all steps. "
        f"Minutes are those of training alone, without "
        f"start-up and evaluation.", "",
        noise_text(rows, race, noise, freedom), ""]
    if fits:
        text += ["Fits: " + "; ".join(f"{name}: val loss = {f['a']:.3f} {'-' if f['b'] < 0 else '+'} "
                                      f"{abs(f['b']):.4f} x ln(tokens)" for name, f in fits.items()) + ".", ""]
    if lines := worth_text(rows, race, fits):
        text += [*lines, ""]
    if race.target is not None:
        text += [*target_text(race.target, reach(rows, race.target, race.base, fits)), ""]
    return "\n".join(text)


# ----------------------------------------------------------------------------------------------------------------------
# Picture


def round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from low to high for a logarithmic axis, at most eight."""
    for digits in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [d * 10.0 ** k for k in decades for d in digits if low <= d * 10.0 ** k <= high]
        if len(ticks) <= 8:
            break
    return ticks


def between(a: dict, z: dict, key: str) -> list[float]:
    """Return tokens or minutes at 21 points from row a to row z, equally far apart in log(tokens).

    Val loss falls linearly over them: so a line drawn through them agrees with what reach() reports.
    """
    tokens = [a["tokens"] * (z["tokens"] / a["tokens"]) ** (i / 20) for i in range(21)]
    pace = (z[key] - a[key]) / (z["tokens"] - a["tokens"])
    return [a[key] + pace * (t - a["tokens"]) for t in tokens]


def draw_curve(ax: Any, row: dict, scale: float, key: str, color: str) -> None:
    """Draw a row's smoothed train loss over tokens or minutes, the mean over seeds, in the last 60% of the steps."""
    # A short run is smoothed less: an average over many steps would lag behind
    curves = [smooth(losses, min(0.98, row["steps"] / (row["steps"] + 20))) for losses in row["losses"].values()]
    steps = range(int(0.4 * row["steps"]), min(map(len, curves)))
    ax.plot([row[key] * row["at"][key][i] / scale for i in steps],
            [statistics.mean(curve[i] for curve in curves) for i in steps], color=color, linewidth=1, alpha=0.6)


def plot(rows: Sequence[dict], race: Race, path: str) -> None:
    """Draw val loss over tokens and over minutes of training.

    Lines go through the means over seeds, each seed is a point, error bars are the noise of the means. With one length
    the smoothed train losses are drawn instead of lines.
    """
    plt = pyplot()
    rows = [row for row in rows if row["val_loss"] is not None]
    if not rows:
        return
    alone = len({row["length"] for row in rows}) < 2
    unit, label = (1e6, "million tokens") if max(r["tokens"] for r in rows) >= 2e6 else (1e3, "thousand tokens")
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.3), layout="constrained", sharey=True)
    for i, (name, marker) in enumerate(zip(race.variants, itertools.cycle("osD^vPX<>"), strict=False)):
        color = f"C{(i - 1) % 10}" if i else "black"
        own = sorted((row for row in rows if row["label"] == name), key=lambda row: row["tokens"])
        for ax, key, scale in ((axes[0], "tokens", unit), (axes[1], "minutes", 1.0)):
            for a, z in itertools.pairwise(own):
                losses = [a["val_loss"] + (z["val_loss"] - a["val_loss"]) * i / 20 for i in range(21)]
                ax.plot([x / scale for x in between(a, z, key)], losses, color=color, linewidth=1.3)
            for row in own:
                if alone:
                    draw_curve(ax, row, scale, key, color)
                losses = {seed: loss for seed, loss in row["val_losses"].items() if loss is not None}
                x = [row["each_minutes"][seed] if key == "minutes" else row["tokens"] / scale for seed in losses]
                ax.plot(x, list(losses.values()), linestyle="", marker=marker, color=color, markersize=6,
                        markerfacecolor="none", zorder=3)
                if row["mean_noise"]:
                    ax.errorbar([row[key] / scale], [row["val_loss"]], yerr=row["mean_noise"], color=color, capsize=4,
                                elinewidth=1.3, zorder=4)
        if own:
            axes[0].plot([], [], color=color, marker=marker, markersize=6, markerfacecolor="none", label=name)
    if race.target is not None:
        for ax in axes:
            ax.axhline(race.target, color="gray", linestyle="--", zorder=1, label=f"target {race.target:g}")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.margins(x=0.06)
    axes[0].set_xscale("log")
    low, high = axes[0].get_xlim()
    ticks = round_ticks(low, high)
    axes[0].set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes[0].minorticks_off()
    axes[0].set_xlim(low, high)
    axes[0].set(xlabel=label, ylabel="loss (nats per token)" if alone else "val loss (nats per token)",
                title="Val loss by tokens")
    axes[1].set(xlabel="minutes of training", title="Val loss by time")
    lines = "thin lines: smoothed train loss" if alone else "lines: through the means"
    bars = ", bars: noise of the means" if any(row["mean_noise"] for row in rows) else ""
    fig.suptitle(f"points: val loss of each run after its whole schedule{bars}, {lines}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center",
               ncols=len(labels) if sum(map(len, labels)) + 8 * len(labels) < 130 else 3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def report(runs: Mapping[tuple[str, float, int], RunData], race: Race, out: str, command: str) -> None:
    """Write out.json, out.md and out.png from the runs by (variant, length, seed), and print the table."""
    rows, noise, freedom = summarize(runs, race)
    fits = fit(rows)
    data = dict(
        base=race.base, variants=race.variants, noise=noise, degrees_of_freedom=freedom, fits=fits,
        worth=worth(rows, race.base, fits), target=race.target,
        reached=[] if race.target is None else reach(rows, race.target, race.base, fits), rows=rows)
    write_report(out, command, data, markdown(rows, race, noise, freedom, command),
                 functools.partial(plot, rows, race))
