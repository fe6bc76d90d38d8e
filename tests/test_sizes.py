"""BatchPlan: how many tokens each optimizer step reads, where the batch is constant and where it grows."""

import math
from types import SimpleNamespace

import pytest

import helpers
import train
from nanofp8.config import UserError
from nanofp8.schedule import Schedule
from nanofp8.sizes import BatchPlan, auto_batch, batch_sizes, steps_for


def plan_of(steps=100, total=1024, ramp=""):
    return BatchPlan(SimpleNamespace(max_iters=steps, total_batch_size=total, batch_ramp=ramp))


def test_a_constant_batch():
    plan = plan_of(7, 96)
    assert [plan.batch(k) for k in range(7)] == [96] * 7
    assert [plan.tokens(k) for k in range(8)] == list(range(0, 700, 96))
    assert [plan.position(k) for k in range(7)] == list(range(7)) and plan.total == 672 and plan.describe() == ""
    assert plan_of(1).position(0) == 0.0


@pytest.mark.parametrize("ramp,shares", [
    ("0.25,0.6", [0.25, 0.35, 0.4]), ("0.7", [0.7, 0.3]), (".1,.2,.3", [0.1, 0.1, 0.1, 0.7])])
def test_the_batch_doubles_at_the_given_shares_of_the_tokens(ramp, shares):
    plan, largest = plan_of(4000, 1024, ramp), len(shares) - 1
    sizes = [plan.batch(k) for k in range(4000)]
    assert plan.total == sum(sizes) and all(plan.tokens(k) == sum(sizes[:k]) for k in (1, 1999, 3500, 4000))
    assert sorted(set(sizes)) == [1024 >> n for n in range(largest, -1, -1)] and sizes == sorted(sizes)
    for i, share in enumerate(shares):
        read = sum(size for size in sizes if size == 1024 >> (largest - i))
        assert read / plan.total == pytest.approx(share, abs=0.001)
    positions = [plan.position(k) for k in range(4000)]
    assert positions[0] == 0 and positions[-1] == 3999 and positions == sorted(positions)


@pytest.mark.parametrize("tokens,total,ramp", [
    (10**6, 1024, ""), (10**6, 1024, "0.25,0.6"), (50 * 10**6, 131072, "0.25,0.6"), (12345678, 4096, "0.5")])
def test_the_number_of_steps_follows_from_the_tokens(tokens, total, ramp):
    cfg = SimpleNamespace(total_batch_size=total, batch_ramp=ramp)
    cfg.max_iters = steps_for(tokens, cfg)
    assert abs(BatchPlan(cfg).total - tokens) <= 2 * total


def test_a_resumed_run_keeps_its_stages():
    """The steps at which the batch grows, though a run of twice the length would have others."""
    cfg = SimpleNamespace(total_batch_size=1024, batch_ramp="0.25,0.6", max_iters=100)
    first = BatchPlan(cfg)
    cfg.batch_starts, cfg.max_iters = [(step, batch) for step, _, batch in first.stages], 200
    longer = BatchPlan(cfg)
    assert longer.stages == first.stages and longer.total == first.total + 100 * 1024
    for steps in (7, 60, 110, 200):
        assert steps_for(longer.tokens(steps), cfg) == steps


@pytest.mark.parametrize("ramp", ["", "0.25,0.6", "0.3", "0.5,0.9"])
def test_the_same_command_gives_the_same_steps_again(ramp):
    """A resumed run, which keeps its stages, must not become longer or shorter by rounding. Its tokens are off by at
    most half of the largest step."""
    for tokens in range(4000, 200000, 977):
        cfg = SimpleNamespace(total_batch_size=1024, batch_ramp=ramp)
        cfg.max_iters = steps_for(tokens, cfg)
        plan = BatchPlan(cfg)
        assert abs(plan.total - tokens) <= 512
        cfg.batch_starts = [list(start) for start in plan.starts]
        assert steps_for(tokens, cfg) == cfg.max_iters, tokens


def test_warm_ups_are_over_after_their_steps_also_in_a_longer_run():
    """They count steps, which a new length does not move. Fractions are fractions of the tokens."""
    flags = dict(total_batch_size=256, batch_ramp="0.25,0.6", warmup_iters=30, muon_momentum_iters=40,
                 lr_scaling="none", lr_schedule="linear", warmdown_ratio=0.1)
    cfg = helpers.make_cfg(**flags, max_iters=200)
    short = Schedule(cfg, 10**9)
    cfg.batch_starts, cfg.max_iters = short.plan.starts, 800
    longer = Schedule(cfg, 10**9)
    for step in (0, 15, 29, 30, 39, 40, 100, 150):
        assert short.factor(step) == longer.factor(step) and short.momentum(step) == longer.momentum(step), step
    assert short.factor(15) < short.factor(29) == short.factor(30) == 1
    assert short.momentum(40) == 0.95 > short.momentum(39)
    ratios = dict(warmup_ratio=0.3, muon_momentum_ratio=0.6)
    by_ratio = Schedule(helpers.make_cfg(**flags | ratios, max_iters=200), 10**9)
    for steps, ratio in ((by_ratio.warmup, 0.3), (by_ratio.momentum_iters, 0.6)):
        assert by_ratio.plan.tokens(steps) / by_ratio.plan.total == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("warmup", [1, 4, 16])
@pytest.mark.parametrize("ramp", ["", "0.25,0.6", "0.9"])
def test_the_warm_up_does_not_overshoot(ramp, warmup):
    flags = dict(max_iters=200, total_batch_size=256, batch_ramp=ramp, warmup_iters=warmup, lr_scaling="none")
    factors = [Schedule(helpers.make_cfg(**flags), 10**9).factor(step) for step in range(200)]
    assert max(factors) <= 1 and factors[0] == 1 / warmup


def test_short_runs_skip_stages():
    """A stage without a step is not named."""
    assert [plan_of(steps, 1024, "0.25,0.6").batch(steps - 1) for steps in (1, 2, 3)] == [512, 512, 1024]
    assert plan_of(1, 1024, "0.25,0.6").describe() == "512 tokens in all steps"
    assert plan_of(2, 1024, "0.25,0.6").describe() == "256 tokens a step, 512 from step 2"
    assert plan_of(100, 1024, "0.25,0.6").describe() == "256 tokens a step, 512 from step 49, 1,024 from step 82"


def test_rates_follow_the_batch_and_schedules_the_tokens():
    """Where rates follow the batch, a step of a quarter of it has half of them. The last step ends all schedules."""
    flags = dict(max_iters=200, total_batch_size=256, batch_ramp="0.25,0.6", warmup_iters=0, lr_schedule="linear",
                 warmdown_ratio=0.5, min_lr_ratio=0.1, weight_decay=0.2, weight_decay_end=0.5)
    followed, fixed = (Schedule(helpers.make_cfg(**flags, lr_scaling=scaling), 10**9) for scaling in ("sqrt", "none"))
    assert [fixed.factor(0), followed.factor(0)] == pytest.approx([1.0, 0.5 * math.sqrt(256 / 524288)])
    plan = followed.plan
    half = next(k for k in range(200) if plan.tokens(k) >= 0.75 * plan.total)  # half of the warm-down
    assert fixed.factor(half) == pytest.approx(0.55, abs=0.035) and half > 150
    assert followed.factor(half) / fixed.factor(half) == pytest.approx(math.sqrt(256 / 524288))
    assert fixed.factor(199) == pytest.approx(0.1) and fixed.weight_decay(199) == pytest.approx(0.1)
    highest = max(map(followed.factor, range(200)))
    said = f"muon {0.02 * highest:.3g} (flags x {highest:.3g} for 200 steps of up to 256"
    assert said in followed.rates(dict(muon=0.02))
    assert highest < 0.95 * followed.scale  # the last doubling comes when the rates already fall
    assert followed.epochs == plan.total / 10**9
    constant = Schedule(helpers.make_cfg(max_iters=100, total_batch_size=128, lr_scaling="sqrt"), 3200)
    growing = Schedule(helpers.make_cfg(max_iters=150, total_batch_size=128, batch_ramp="0.5", lr_scaling="sqrt"), 3200)
    assert constant.epochs == growing.epochs == 4  # the same tokens; the decay is that of the mean batch
    mean, ratio = growing.plan.total / 150, constant.table_decay("auto", 0.1) / growing.table_decay("auto", 0.1)
    assert ratio == pytest.approx((40 * math.sqrt(mean)) / (40 * math.sqrt(128)))


def test_the_batch_of_a_ramp(monkeypatch):
    """"auto" is the batch before the last doubling. total_batch_size alone is a constant batch."""
    def flags(*given):
        return train.read_flags(["--preset=d12", "--train_tokens=50000000", *given], has_gpu=False)

    assert auto_batch(50 * 10**6) == 65536
    cfg = flags()
    assert (cfg.total_batch_size, cfg.batch_ramp, cfg.max_iters) == (131072, "0.25,0.6", 801)
    assert flags("--batch_ramp=").total_batch_size == flags("--batch_ramp=", "--USE_X0=False").total_batch_size == 65536
    cfg = flags("--total_batch_size=65536")
    assert (cfg.total_batch_size, cfg.batch_ramp, cfg.max_iters) == (65536, "", 763)
    cfg = flags("--total_batch_size=65536", "--batch_ramp=0.5")
    assert (cfg.total_batch_size, cfg.batch_ramp) == (65536, "0.5")
    assert train.read_flags(["--preset=d20"], has_gpu=False).batch_ramp == ""


def test_ranks_that_do_not_divide_the_first_batch():
    cfg = helpers.make_cfg(total_batch_size=1024, batch_ramp="0.25,0.6", batch_size=8)  # 256 = 8 sequences of 32
    train.check_flags(cfg, 1)
    with pytest.raises(UserError, match=r"total_batch_size=1024 .*batch_ramp = 3 x 8 x 32 x 4 = 3072; use "
                                        r"--total_batch_size=3072 --batch_ramp=0.25,0.6$") as caught:
        train.check_flags(cfg, 3)
    assert caught.value.status == 2
    with pytest.raises(UserError, match=r"continue on 2 rank\(s\) with --batch_size=auto$"):
        train.check_flags(cfg, 3, resumed=True)
    with pytest.raises(UserError, match="--batch_size=auto"):
        train.check_flags(cfg, 2)
    assert batch_sizes(cfg, 2) == [4, 2, 1] and batch_sizes(cfg, 3) == []
