"""Learning rate, weight decay and momentum at each step."""

import math
from types import SimpleNamespace

from nanofp8.sizes import BatchPlan

REFERENCE_BATCH, REFERENCE_TOKENS, SHORTEST_TOKENS = 524288, 891289600, 50e6  # of lr_scale()
TIMESCALE, MEASURED_EPOCHS, SHORTEST_TIMESCALE = 0.28, 4, 40  # of table_decay(): epochs, epochs, steps


def lr_factor(step: float, warmup_iters: float, max_iters: int, min_lr_ratio: float,
              warmdown_ratio: float | None = None) -> float:
    """Return the learning-rate factor of a step (from 0): linear from 1/warmup_iters to 1 at step warmup_iters - 1,
    then a cosine from step warmup_iters to min_lr_ratio at step max_iters - 1. With warmdown_ratio, instead of the
    cosine: 1, then linear to min_lr_ratio over that fraction of all steps, or over those after the warm-up if they
    are fewer (0: 1 to the end)."""
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    if warmdown_ratio is not None:
        length = min(warmdown_ratio * max_iters, max_iters - warmup_iters)
        left = min(1.0, max(0, max_iters - 1 - step) / length) if length > 0 else 1.0
        return min_lr_ratio + (1 - min_lr_ratio) * left
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def momentum_at(step: int, start: float, end: float, iters: int) -> float:
    """Return Muon's momentum at a step: linear from `start` at step 0 to `end` at step `iters`, then constant."""
    return end if step >= iters else start + (end - start) * step / iters


def lr_scale(cfg: SimpleNamespace) -> float:
    """Return the factor that lr_scaling puts on all learning rates; flags give them for the REFERENCE values above.

    "sqrt" follows the square root of the batch: the noise of a gradient grows with 1 / sqrt(batch), and a step of Muon
    or AdamW is as long as its rate. "length" also follows the run's tokens to the power -0.32, found for AdamW (arXiv
    2409.19913) and for Muon (arXiv 2603.28743). Runs below 50M tokens, which were not measured, get the rates of 50M.
    """
    if cfg.lr_scaling == "none":
        return 1.0
    by_batch = math.sqrt(cfg.total_batch_size / REFERENCE_BATCH)
    tokens = max(SHORTEST_TOKENS, BatchPlan(cfg).total)
    return by_batch * (tokens / REFERENCE_TOKENS) ** -0.32 if cfg.lr_scaling == "length" else by_batch


def steps_of_fraction(cfg: SimpleNamespace, ratio: float, iters: int) -> int:
    """Return the steps of a warm-up over this fraction of the run's tokens; those of its flag in steps if it is 0."""
    plan = BatchPlan(cfg)
    return plan.steps_until(ratio * plan.total) if ratio else iters


class Schedule:
    """Learning-rate factor, Muon's weight decay and Muon's momentum at each step.

    Where the batch grows, they follow the tokens that were read: `position` of BatchPlan stands in for the step. A
    warm-up that is given in steps counts steps. All fractions are of the run's tokens.
    """

    def __init__(self, cfg: SimpleNamespace, data_tokens: int):
        """Resolve fractions of the run to steps. cfg: all flags. data_tokens: tokens of the train shards."""
        self.cfg, self.plan = cfg, BatchPlan(cfg)
        self.warmup = steps_of_fraction(cfg, cfg.warmup_ratio, cfg.warmup_iters)
        self.momentum_iters = steps_of_fraction(cfg, cfg.muon_momentum_ratio, cfg.muon_momentum_iters)
        self.warmdown = cfg.warmdown_ratio if cfg.lr_schedule == "linear" else None
        self.scale = lr_scale(cfg)
        self.epochs = self.plan.total / data_tokens
        self.steps_of_epoch = cfg.max_iters / self.epochs

    def factor(self, step: int) -> float:
        """Return the factor on all learning rates at a step (from 0)."""
        at, warmup = step, self.warmup
        if step >= warmup:
            at, warmup = self.plan.position(step), self.plan.position(warmup)
        factor = lr_factor(at, warmup, self.cfg.max_iters, self.cfg.min_lr_ratio, self.warmdown)
        return self.scale * self.of_batch(self.plan.batch(step)) * factor

    def of_batch(self, tokens: float) -> float:
        """Return what smaller steps than total_batch_size multiply the learning rates by, if these follow the batch."""
        return 1.0 if self.cfg.lr_scaling == "none" else math.sqrt(tokens / self.cfg.total_batch_size)

    def weight_decay(self, step: int) -> float:
        """Return Muon's weight decay at a step; it is also multiplied by the learning rate."""
        done = self.plan.position(step) / max(1, self.cfg.max_iters - 1)
        return self.cfg.weight_decay * (1 + (self.cfg.weight_decay_end - 1) * done)

    def table_decay(self, flag: float | str, learning_rate: float) -> float:
        """Return AdamW's weight decay of a table, the head or an embedding; it is also multiplied by the learning rate.

        Text that is read several times is learned by heart, and most of all by the head: there each token has weights
        of its own. "auto" makes a table forget: at its highest rate an update shrinks to 1/e within TIMESCALE
        epochs (the unit is that of arXiv 2405.13698), but not within less than SHORTEST_TIMESCALE steps. This is for
        MEASURED_EPOCHS or more; fewer get less, two a third and one none, which fits what was measured
        there (docs/recipe.md). Where the batch grows, a step of the run's mean batch counts.

        Args: flag: a number, or "auto". learning_rate: of the table, as its flag gives it.
        """
        if flag != "auto":
            return flag
        again = self.epochs - 1
        if again <= 0 or not learning_rate:
            return 0.0
        timescale = max(TIMESCALE * self.steps_of_epoch, SHORTEST_TIMESCALE)
        highest = learning_rate * self.scale * self.of_batch(self.plan.total / self.cfg.max_iters)
        return min(1.0, again / (MEASURED_EPOCHS - 1)) / (timescale * highest)

    def repeated_text_note(self) -> str:
        """Return a remark for the start-up table where value embeddings read text at least twice, else ""."""
        if not self.cfg.n_value_embed or self.epochs < 2:
            return ""
        return "value embeddings learn it by heart; over four epochs --n_value_embed=0 ended far lower (docs/recipe.md)"

    def rates(self, learning_rates: dict[str, float]) -> str:
        """Return the highest learning rates of parameter groups, {name: by its flag}, for the start-up table."""
        highest, ramp = self.scale, self.plan.describe() and "up to "
        if ramp:  # a larger batch may come when the rates already fall
            starts = [first for first, _ in self.plan.starts]
            steps = {self.warmup - 1, self.warmup, *starts, *(first - 1 for first in starts), self.cfg.max_iters - 1}
            highest = max(self.factor(step) for step in steps if 0 <= step < self.cfg.max_iters)
        rates = ", ".join(f"{name} {lr * highest:.3g}" for name, lr in learning_rates.items())
        return rates if highest == 1 else (f"{rates} (flags x {highest:.3g} for {self.cfg.max_iters:,} steps of "
                                           f"{ramp}{self.cfg.total_batch_size:,} tokens)")

    def decays(self, adam_groups: list[dict]) -> str:
        """Return the weight decays of Muon and of AdamW's parameter groups for the start-up table."""
        first, last = (f"{self.weight_decay(step):.3g}" for step in (0, self.cfg.max_iters - 1))
        decays = [f"{g['name']} {g['weight_decay']:.3g}" for g in adam_groups if g["weight_decay"]]
        return ", ".join([f"Muon {first}" + (f" to {last}" if last != first else ""), *decays])

    def momentum(self, step: int) -> float:
        """Return Muon's momentum at a step: warm-up, then muon_momentum, or as the rates fall to muon_momentum_end."""
        cfg = self.cfg
        momentum = momentum_at(step, cfg.muon_momentum_start, cfg.muon_momentum, self.momentum_iters)
        if cfg.muon_momentum_end:
            # From 1 to 0, as the rates fall
            left = lr_factor(self.plan.position(step), 0, cfg.max_iters, 0.0, self.warmdown)
            momentum = min(momentum, cfg.muon_momentum_end + (cfg.muon_momentum - cfg.muon_momentum_end) * left)
        return momentum
