"""Numbers that follow from the flags alone: parameters, FLOPs, windows, tokens of a step, micro-batches. No torch."""

import itertools
import math
from types import SimpleNamespace

GATE_CHANNELS = 12  # values of a block's input that decide the gates of its value embedding, as in nanochat


def parameter_table(cfg: SimpleNamespace) -> list[tuple[str, int, str]]:
    """Return [(part of the model, its parameters, explanation)], which add up to all parameters."""
    n, width, vocab = cfg.n_layer, cfg.n_embd, cfg.vocab_size
    tables, channels = cfg.n_value_embed, min(GATE_CHANNELS, width)
    rows = [
        ("token embedding", vocab * width, f"{vocab} x {width}"),
        ("value embeddings", tables * (vocab * width + cfg.n_head * channels),
         f"{tables} x ({vocab} x {width} + gates: {cfg.n_head} x {channels})"),
        ("attention", n * 4 * width ** 2, f"{n} x (q, k, v, proj: 4 x {width}^2)"),
        ("MLP", n * 8 * width ** 2, f"{n} x (fc1, fc2: 2 x {width} x {4 * width})"),
        ("RMSNorm gains", (2 * n + 1) * width, f"(2 x {n} + 1) x {width}"),
        ("residual scalars", 2 * n if cfg.USE_X0 else 0, f"2 x {n}"),
        ("output head", vocab * width, f"{vocab} x {width}"),
    ]
    return [row for row in rows if row[1]]


def parameter_count(cfg: SimpleNamespace) -> int:
    """Return how many parameters the model has."""
    return sum(count for _, count, _ in parameter_table(cfg))


def checkpoint_bytes(cfg: SimpleNamespace) -> int:
    """Return what a checkpoint takes on disk, about 1% too little: weights and optimizer state, without their headers.

    Weights are fp32. Muon keeps one fp32 moment of each weight of attention and MLP, AdamW two of all others; 8-bit
    AdamW keeps two bytes of each weight of embedding and head, and two fp32 scales per 256 weights.
    """
    parameters = {part: n for part, n, _ in parameter_table(cfg)}
    eight_bit = {"token embedding", "output head"} if cfg.USE_8BIT_ADAM else set()
    moments = sum(n * (4 if part in ("attention", "MLP") else 2 + 8 / 256 if part in eight_bit else 8)
                  for part, n in parameters.items())
    return round(4 * sum(parameters.values()) + moments)


def windows(cfg: SimpleNamespace) -> list[int]:
    """Return how many tokens each block attends to, itself included; block_size: all before it.

    cfg.window_pattern is repeated over the blocks; the last block always attends to all.
    """
    pattern = cfg.window_pattern
    sizes = [cfg.block_size if pattern[i % len(pattern)] == "L" else min(cfg.window_size, cfg.block_size)
             for i in range(cfg.n_layer)]
    return [*sizes[:-1], cfg.block_size]


def has_windows(cfg: SimpleNamespace) -> bool:
    """Whether a block attends to less than the sequence. cfg: as for windows()."""
    return min(windows(cfg)) < cfg.block_size


def value_layers(cfg: SimpleNamespace) -> list[int]:
    """Return the blocks that have a value embedding: every second one, counted from the last."""
    return sorted(range(cfg.n_layer - 1, -1, -2)[:cfg.n_value_embed])


def value_embed_error(cfg: SimpleNamespace) -> str:
    """Return why there are not as many value_layers() as n_value_embed, and what to do; "" if there are.

    cfg: flags of train.py, or of train_orig.py, which has no value embeddings.
    """
    if getattr(cfg, "n_value_embed", 0) <= (most := (cfg.n_layer + 1) // 2):
        return ""
    return (f"n_value_embed={cfg.n_value_embed} is more than every second one of n_layer={cfg.n_layer} blocks; "
            f"use --n_value_embed={most} or fewer")


def flops_per_token(cfg: SimpleNamespace) -> float:
    """Return the training FLOPs of one token: 6 x matmul parameters + 12 x width x pairs of tokens that attention
    compares, those of the causal half or of the window only."""
    matmul_parameters = cfg.n_layer * 12 * cfg.n_embd ** 2 + cfg.vocab_size * cfg.n_embd
    pairs = sum(window - window ** 2 / (2 * cfg.block_size) for window in windows(cfg))  # a token, mean over positions
    return 6 * matmul_parameters + 12 * cfg.n_embd * pairs


def auto_batch(train_tokens: int) -> int:
    """Return the tokens per step for a run of this length: the power of two nearest to 65,536 x (length / 70M)^0.383.

    65,536 was the best of 32,768, 65,536 and 131,072 at 70M tokens (docs/recipe.md); the exponent is nanochat's.
    """
    return 2 ** max(0, round(math.log2(65536 * (train_tokens / 70e6) ** 0.383)))


def ramp_points(text: str) -> list[float]:
    """Return the fractions that batch_ramp lists."""
    return [float(point) for point in text.split(",") if point]


def ramp_shares(cfg: SimpleNamespace) -> list[tuple[float, int]]:
    """Return [(share of the run's tokens, tokens of a step)]: one entry, or with batch_ramp one more per doubling."""
    points = ramp_points(getattr(cfg, "batch_ramp", ""))
    pairs = itertools.pairwise([0.0, *points, 1.0])
    return [(end - start, max(1, cfg.total_batch_size >> (len(points) - i))) for i, (start, end) in enumerate(pairs)]


def step_multiple(cfg: SimpleNamespace) -> int:
    """Return the ratio of the largest step of a run to its smallest: 1, or with batch_ramp a power of two."""
    return 2 ** (len(ramp_shares(cfg)) - 1)


def steps_for(tokens: float, cfg: SimpleNamespace) -> int:
    """Return the optimizer steps that read about this many tokens, at least one. cfg: as for BatchPlan.

    A resumed run's batch grows where it did before; so if its length is new, the steps follow from that.
    """
    about = round(sum(tokens * share / batch for share, batch in ramp_shares(cfg)))
    kept, flags = getattr(cfg, "batch_starts", None), vars(cfg) | dict(batch_starts=None)
    plans = [BatchPlan(SimpleNamespace(**flags | dict(max_iters=n))) for n in (about, about - 1, about + 1) if n > 0]
    plan = min(plans, key=lambda plan: abs(plan.total - tokens))
    if not kept or plan.starts == [tuple(start) for start in kept]:
        return plan.steps
    return max(1, BatchPlan(cfg).steps_until(tokens))


class BatchPlan:
    """How many tokens each optimizer step of a run reads: total_batch_size, or with batch_ramp less at first."""

    def __init__(self, cfg: SimpleNamespace):
        """Resolve fractions of the run to steps. A stage of a short run may have no step.

        cfg: max_iters, total_batch_size, batch_ramp, and batch_starts where a resumed run has them: its `starts`. It
        keeps the steps at which its batch grows, also if its length is new.
        """
        self.steps, stages, self.stages = cfg.max_iters, ramp_shares(cfg), []
        lengths = [share / batch for share, batch in stages]
        starts = getattr(cfg, "batch_starts", None) or [
            (round(self.steps * sum(lengths[:i]) / sum(lengths)), batch) for i, (_, batch) in enumerate(stages)]
        for first, batch in starts:  # first step of a stage, tokens before it, tokens of each of its steps
            self.stages.append((first, self.tokens(first) if self.stages else 0, batch))

    @property
    def starts(self) -> list[tuple[int, int]]:
        """First step and tokens of a step of each stage."""
        return [(first, batch) for first, _, batch in self.stages]

    def batch(self, step: int) -> int:
        """Return the tokens of a step (from 0)."""
        return next(batch for first, _, batch in reversed(self.stages) if first <= step)

    def tokens(self, step: int) -> int:
        """Return the tokens of all steps before this one."""
        return next(before + (step - first) * batch for first, before, batch in reversed(self.stages) if first <= step)

    def steps_until(self, tokens: float) -> int:
        """Return the number of steps that read this many tokens, rounded."""
        first, before, batch = next(stage for stage in reversed(self.stages) if stage[1] <= tokens)
        return first + round((tokens - before) / batch)

    @property
    def total(self) -> int:
        """Tokens of the run."""
        return self.tokens(self.steps)

    def position(self, step: int) -> float:
        """Return how far the run is at a step by its tokens, from 0 to steps - 1; without a ramp, the step itself."""
        last = self.tokens(self.steps - 1)
        return (self.steps - 1) * self.tokens(step) / last if last else float(step)

    def describe(self) -> str:
        """Return the stages of a ramp for the start-up table; "" without one. Stages without a step are left out."""
        if len(self.stages) == 1:
            return ""
        ends = [first for first, _, _ in self.stages[1:]] + [self.steps]
        used = [(first, batch) for (first, _, batch), end in zip(self.stages, ends, strict=True)
                if min(end, self.steps) > first]
        if len(used) == 1:
            return f"{used[0][1]:,} tokens in all steps"
        return ", ".join(f"{batch:,} from step {first + 1:,}" if first else f"{batch:,} tokens a step"
                         for first, batch in used)


def batch_sizes(cfg: SimpleNamespace, ranks: int, multiple: int = 1) -> list[int]:
    """Return the micro-batches up to cfg.batch_size that divide each step, largest first; [] if none does.

    Those that do not have a multiple of `multiple` tokens are left out, if others are left.
    """
    sequences, rest = divmod(cfg.total_batch_size, ranks * cfg.block_size * step_multiple(cfg))
    sizes = [] if rest or not sequences else [n for n in range(min(cfg.batch_size, sequences), 0, -1)
                                             if sequences % n == 0]
    return [n for n in sizes if n * cfg.block_size % multiple == 0] or sizes


def batch_error(cfg: SimpleNamespace, ranks: int, resumed: bool, fixed: bool = True) -> str:
    """Return why the steps are no multiples of what all ranks read at once, and what to do; "" if they are.

    resumed: total_batch_size and block_size cannot change. fixed: batch_size was given.
    """
    total, T, times = cfg.total_batch_size, cfg.block_size, step_multiple(cfg)
    micro = ranks * cfg.batch_size * T * times
    if total % micro == 0:
        return ""
    if resumed:
        fit = max(n for n in range(1, ranks + 1) if n == 1 or total % (n * T * times) == 0)
        remedy = "use --batch_size=auto" if fit == ranks else f"continue on {fit} rank(s)"
        if fixed and fit != ranks and total % (fit * cfg.batch_size * T * times):
            remedy += " with --batch_size=auto"
    else:
        unit = micro
        if not fixed:  # a power of two per rank, so that micro-batches fit, but small beside the step
            unit = ranks * T * times
            unit *= next(n for n in (16, 8, 4, 2, 1) if n <= max(1, min(cfg.batch_size, total / unit / 4)))
        remedy = f"use --total_batch_size={max(1, round(total / unit)) * unit}"
        if times > 1:
            remedy += f" --batch_ramp={cfg.batch_ramp}"
            if total % (micro // times if fixed else ranks * T) == 0:
                remedy += f", or --total_batch_size={total} --batch_ramp= for a constant batch"
        if total % (ranks * T * times) == 0:
            remedy += ", or --batch_size=auto"
    by_ramp = (" x 2 for each doubling by batch_ramp", f" x {times}") if times > 1 else ("", "")
    return (f"total_batch_size={total} is not a multiple of ranks x batch_size x block_size{by_ramp[0]} = "
            f"{ranks} x {cfg.batch_size} x {T}{by_ramp[1]} = {micro}; {remedy}")
