"""train.py's schedules, parameter groups and clipping."""

import functools
from types import SimpleNamespace

import pytest
import torch

import train
from helpers import make_cfg, make_model, make_optimizers, one_process, random_grads
from nanofp8.muon import set_value
from nanofp8.schedule import Schedule, lr_factor, momentum_at
from train_orig import clip_gradients

pytestmark = pytest.mark.usefixtures("fresh")


def test_learning_rate_at_its_corners():
    """100 steps of which 10 warm up, down to a tenth."""
    f = lambda step: lr_factor(step, 10, 100, 0.1)  # noqa: E731
    assert f(0) == 0.1 and f(8) == 0.9 and f(9) == 1.0 and f(10) == 1.0
    assert f(99) == pytest.approx(0.1) and f(10_000) == pytest.approx(0.1)  # last step, and beyond the end
    assert lr_factor(30, 10, 51, 0.1) == pytest.approx(0.55)  # half way down: step 30 of 10 ... 50
    factors = [f(step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[11] < 1.0 and all(0.1 - 1e-9 <= x <= 1 for x in factors)


def test_learning_rate_without_warm_up():
    factors = [lr_factor(step, 0, 5, 0.0) for step in range(5)]
    assert factors[0] == 1.0 and factors[4] == pytest.approx(0.0) and factors[2] == pytest.approx(0.5)


@pytest.mark.parametrize("warmup,max_iters", [(0, 1), (1, 1), (1, 2), (5, 1), (5, 3), (5, 5), (5, 6), (100, 60)])
def test_learning_rate_of_runs_that_end_in_or_at_the_warm_up(warmup, max_iters):
    """Never above 1, never 0, rising to the end: the cosine has no room, and nothing divides by zero."""
    factors = [lr_factor(step, warmup, max_iters, 0.1) for step in range(max_iters)]
    assert factors == [min(1.0, (step + 1) / max(1, warmup)) for step in range(max_iters)]


def test_min_lr_ratio_one_keeps_the_learning_rate():
    assert all(lr_factor(step, 3, 20, 1.0) == 1.0 for step in range(2, 20))


def test_linear_schedule_at_its_corners():
    """100 steps: 10 warm up, then 1, then linear over the last 50 to a tenth at the last one."""
    f = lambda step: lr_factor(step, 10, 100, 0.1, 0.5)  # noqa: E731
    assert f(0) == 0.1 and all(f(step) == 1.0 for step in range(9, 50)) and f(50) == pytest.approx(0.982)
    assert f(74) == pytest.approx(0.1 + 0.9 * 25 / 50) and f(99) == pytest.approx(0.1)
    assert lr_factor(0, 0, 1, 0.1, 0.5) == f(10_000) == pytest.approx(0.1)  # a run of one step; beyond the end
    assert all(lr_factor(step, 2, 20, 0.1, 0.0) == 1.0 for step in range(1, 20))  # no warm-down: not the cosine


def test_a_warm_down_that_is_longer_than_what_the_warm_up_leaves():
    """It starts after the warm-up; the rate does not jump."""
    factors = [lr_factor(step, 10, 20, 0.0, 0.99) for step in range(20)]
    assert factors[9] == 1.0 and factors[10:] == pytest.approx([left / 10 for left in range(9, -1, -1)])
    assert lr_factor(4, 5, 5, 0.1, 0.75) == 1.0


def schedule(data_tokens=10**12, **flags):
    return Schedule(make_cfg(**dict(max_iters=200, warmup_iters=7, muon_momentum_iters=9) | flags), data_tokens)


def test_fractions_of_the_run_beat_numbers_of_steps():
    s = schedule(warmup_ratio=0.1, muon_momentum_ratio=0.25, muon_momentum_start=0.5, muon_momentum=0.9)
    assert s.warmup == 20 and s.factor(9) == pytest.approx(0.5) and s.factor(19) == 1.0
    assert s.momentum(0) == 0.5 and s.momentum(25) == pytest.approx(0.7) and s.momentum(50) == s.momentum(199) == 0.9
    assert schedule().warmup == 7 and schedule().momentum_iters == 9
    short = schedule(warmup_ratio=0.01, muon_momentum_ratio=0.01, max_iters=20)  # less than half a step: none
    assert short.factor(0) == 1.0 and short.momentum_iters == 0


@pytest.mark.parametrize("tokens,factor", [(524288, 1.0), (131072, 0.5), (2097152, 2.0)])
def test_sqrt_scaling_follows_the_batch(tokens, factor):
    s = schedule(lr_scaling="sqrt", total_batch_size=tokens)
    assert s.factor(100) == pytest.approx(factor * schedule(lr_scaling="none", total_batch_size=tokens).factor(100))


@pytest.mark.parametrize("tokens,factor", [(891289600, 1.0), (891289600 / 4, 4 ** 0.32), (891289600 * 4, 4 ** -0.32),
                                           (50e6, 2.514), (5e6, 2.514)])
def test_length_scaling_follows_batch_and_length(tokens, factor):
    """Shorter runs get higher rates, to the power 0.32; those below 50M tokens the rates of 50M. 131,072 a step halve
    them."""
    s = schedule(lr_scaling="length", total_batch_size=131072, max_iters=round(tokens / 131072))
    assert s.scale == pytest.approx(factor / 2, rel=1e-3)


def test_weight_decay_falls_linearly_to_its_end():
    s = schedule(weight_decay=0.2, weight_decay_end=0.0)
    assert s.weight_decay(0) == 0.2 and s.weight_decay(199) == 0.0
    assert s.weight_decay(99) == pytest.approx(0.2 * 100 / 199)
    assert schedule(weight_decay=0.2, weight_decay_end=1.0).weight_decay(150) == 0.2


def test_momentum_falls_with_the_warm_down():
    flags = dict(lr_schedule="linear", warmdown_ratio=0.5, muon_momentum=0.95, muon_momentum_end=0.85)
    s = schedule(**flags)
    assert s.momentum(50) == 0.95 and s.momentum(149) == pytest.approx(0.90) and s.momentum(199) == pytest.approx(0.85)
    assert schedule(**flags | dict(muon_momentum_end=0.0)).momentum(199) == 0.95
    cosine = schedule(**flags | dict(lr_schedule="cosine"))
    assert 0.85 < cosine.momentum(150) < 0.95 and cosine.momentum(199) == pytest.approx(0.85)
    assert schedule(**flags | dict(warmdown_ratio=0.0)).momentum(199) == 0.95  # the rates do not fall either


def test_the_startup_table_prints_the_rates_that_are_used():
    flags = dict(learning_rate=0.04, learning_rate_embed=0.6, lr_ratio_fc2=2.0)
    def text(**more):
        optimizers = make_optimizers(make_model(), **flags, **more)
        return optimizers.schedule.rates(optimizers.base_lr)

    assert "qkv 0.04, matrices 0.04, fc2 0.08, embed 0.6," in text()
    scaled = text(lr_scaling="sqrt", total_batch_size=131072)
    assert "qkv 0.02, matrices 0.02, fc2 0.04, embed 0.3," in scaled and "131,072" in scaled


@pytest.mark.parametrize("steps, part", [(100, 0), (200, 0), (400, 1 / 3), (500, 0.5), (800, 1), (900, 1)])
@pytest.mark.parametrize("scaling, scale", [("none", 1), ("sqrt", 0.5)])
def test_tables_forget_what_they_read_again(steps, part, scaling, scale):
    """A pass is 200 steps. With four passes an update shrinks to 1/e in 56 steps at the highest rate, with more passes
    too; with one pass not at all."""
    s = schedule(data_tokens=200 * 131072, max_iters=steps, total_batch_size=131072, lr_scaling=scaling)
    decay = s.table_decay("auto", 0.02)
    assert decay * 0.02 * scale * 56 == pytest.approx(part)
    assert s.table_decay(0.3, 0.02) == 0.3 and s.table_decay("auto", 0.0) == 0.0


@pytest.mark.parametrize("steps, tables, noted", [(400, 0, False), (150, 3, False), (200, 3, True), (400, 3, True)])
def test_value_embeddings_on_repeated_text_are_noted(steps, tables, noted):
    """A pass is 100 steps."""
    note = schedule(data_tokens=100 * 64, total_batch_size=64, max_iters=steps, n_value_embed=tables)
    assert ("--n_value_embed=0" in note.repeated_text_note()) == noted


def test_tables_do_not_forget_within_a_few_steps():
    """A pass of 2 steps would make the decay larger than the weight."""
    s = schedule(data_tokens=2 * 131072, max_iters=1000, total_batch_size=131072, lr_scaling="none")
    assert s.table_decay("auto", 0.5) * 0.5 == pytest.approx(1 / 40)


def test_each_table_forgets_at_its_own_rate():
    """Embedding, head and value embeddings; the rest does not. A number given for one is used for it. A pass is 100
    steps, of which 28 are fewer than the least of 40."""
    flags = dict(max_iters=400, total_batch_size=64, lr_scaling="none", n_value_embed=1, learning_rate_embed=0.5,
                 learning_rate_head=0.01, learning_rate_value=0.25, weight_decay_embed="auto", weight_decay_head="auto")
    make = lambda **more: make_optimizers(  # noqa: E731
        make_model(n_value_embed=1), data_tokens=100 * 64, **flags | more)
    optimizers = make()
    decays = {name: group["weight_decay"] for name, group in optimizers.groups.items()}
    assert decays["embed"] * 0.5 == pytest.approx(1 / 40) and decays["head"] * 0.01 == pytest.approx(1 / 40)
    assert decays["values"] * 0.25 == pytest.approx(1 / 40) and decays["gains"] == 0
    assert "head 2.5" in optimizers.schedule.decays([*optimizers.groups.values()][3:])
    optimizers = make(weight_decay_head=0.25, weight_decay_embed=0.0, weight_decay=0.2, weight_decay_end=0.0)
    assert [optimizers.groups[name]["weight_decay"] for name in ("embed", "head", "values")] == [0, 0.25, 0]
    assert optimizers.schedule.decays([*optimizers.groups.values()][3:]) == "Muon 0.2 to 0, head 0.25"


def test_numbers_that_a_graph_reads_stay_in_place():
    tensor = torch.tensor(1.0)
    group = dict(lr=tensor, mu=0.5)
    set_value(group, "lr", 0.25)
    set_value(group, "mu", 0.75)
    assert group["lr"] is tensor and tensor == 0.25 and group["mu"] == 0.75


@pytest.mark.parametrize("graphs", [False, True])
def test_rows_are_sent_before_muon_runs(graphs, monkeypatch):
    optimizers, calls = make_optimizers(make_model()), []
    optimizers.capture(None)
    assert not optimizers.graphs  # on a CPU
    if graphs:
        optimizers.graphs = [SimpleNamespace(replay=functools.partial(calls.append, what)) for what in ("adam", "muon")]
    for optimizer, what in zip(optimizers.all, ("muon", "adam"), strict=True):
        monkeypatch.setattr(optimizer, "step", functools.partial(calls.append, what))
    monkeypatch.setattr(optimizers.buffers, "send_rows", lambda: calls.append("rows"))
    optimizers.step()
    assert calls == ["adam", "rows", "muon"]


def test_momentum_at_its_corners():
    m = lambda step: momentum_at(step, 0.85, 0.95, 300)  # noqa: E731
    assert m(0) == 0.85 and m(150) == pytest.approx(0.90) and m(300) == m(10**6) == 0.95 and m(299) < 0.95
    assert momentum_at(0, 0.85, 0.95, 0) == 0.95  # no warm-up at all


def test_each_parameter_is_in_exactly_one_group():
    model = make_model()
    optimizers = make_optimizers(model)
    names = {id(p): name for name, p in model.named_parameters()}
    members = {group: sorted(names[id(p)] for p in g["params"]) for group, g in optimizers.groups.items()}
    assert sorted(sum(members.values(), [])) == sorted(names.values())
    expected = {
        "embed": ["embed.weight"], "head": ["head.weight"],
        "qkv": [f"blocks.{i}.attn.qkv.weight" for i in range(2)],
        "matrices": sorted(f"blocks.{i}.{m}" for i in range(2)
                           for m in ("attn.proj.weight", "mlp.fc1_weight")),
        "fc2": [f"blocks.{i}.mlp.fc2_weight" for i in range(2)],
        "gains": sorted([f"blocks.{i}.{m}.layer_norm_weight" for i in range(2)
                         for m in ("attn.qkv", "mlp")] + ["norm.weight"]),
    }
    assert members == expected
    assert len({id(g) for g in optimizers.groups.values()}) == 6


def test_rates_decays_and_betas_follow_their_flags():
    flags = dict(learning_rate=1.5, learning_rate_embed=2.5, learning_rate_head=3.5, learning_rate_gain=4.5,
                 weight_decay=0.1, weight_decay_end=1.0, lr_schedule="cosine",
                 weight_decay_embed=0.2, weight_decay_head=0.3, weight_decay_gain=0.4)
    optimizers = make_optimizers(make_model(), **flags, warmup_iters=4, max_iters=12, min_lr_ratio=0.2, adam_beta1=0.7,
                                 adam_beta2=0.9, adam_eps=1e-7, muon_momentum_start=0.5, muon_momentum=0.9,
                                 muon_momentum_iters=8, lr_ratio_fc2=2.0, adam_beta2_embed=0.99)
    base = dict(qkv=1.5, matrices=1.5, fc2=3.0, embed=2.5, head=3.5, gains=4.5)
    decay = dict(qkv=0.1, matrices=0.1, fc2=0.1, embed=0.2, head=0.3, gains=0.4)
    for step in (0, 3, 4, 7, 11, 2, 0):  # any order: a step's rates do not depend on the ones before
        rates = optimizers.set_schedule(step)
        factor, momentum = lr_factor(step, 4, 12, 0.2), momentum_at(step, 0.5, 0.9, 8)
        for name, group in optimizers.groups.items():
            assert float(group["lr"]) == pytest.approx(base[name] * factor)
            assert group["weight_decay"] == decay[name]
        assert all(optimizers.groups[name]["mu"] == momentum for name in ("qkv", "matrices", "fc2"))
        assert rates == pytest.approx(dict(lr_muon=1.5 * factor, lr_embed=2.5 * factor, lr_head=3.5 * factor,
                                           momentum=momentum))
    for name in ("embed", "head", "gains"):
        assert optimizers.groups[name]["betas"] == (0.7, 0.99 if name == "embed" else 0.9)
        assert optimizers.groups[name]["eps"] == 1e-7


def test_a_step_moves_each_parameter_by_its_own_rate():
    """With one group's learning rate zero, exactly that group stands still."""
    flags = dict(qkv="learning_rate", matrices="learning_rate", fc2="learning_rate", embed="learning_rate_embed",
                 head="learning_rate_head",
                 gains="learning_rate_gain")
    for flag in sorted(set(flags.values())):
        model = make_model()
        optimizers = make_optimizers(model, **{flag: 0.0})
        before = {id(p): p.detach().clone() for p in model.parameters()}
        optimizers.set_schedule(3)
        random_grads(model, 1)
        optimizers.step()
        for name, group in optimizers.groups.items():
            for p in group["params"]:
                assert torch.equal(p, before[id(p)]) == (flags[name] == flag)


def test_zero_grad_drops_every_gradient():
    model = make_model()
    random_grads(model, 1)
    train.Parallel(model, "none", make_cfg(), one_process()).buffers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def gradients(*values):
    params = [torch.nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(params, values, strict=True):
        p.grad = torch.tensor(v)
    return params


def test_clipping_goes_by_the_global_norm():
    params = gradients([3.0, 0.0], [0.0, 4.0, 0.0])
    params.append(torch.nn.Parameter(torch.zeros(2)))  # no gradient: no part
    norm = clip_gradients(params, 1.0)
    assert norm.item() == 5.0  # before clipping
    assert params[0].grad.tolist() == pytest.approx([0.6, 0.0])
    assert params[1].grad.tolist() == pytest.approx([0.0, 0.8, 0.0])
    assert params[2].grad is None


@pytest.mark.parametrize("max_norm", [0.0, 5.1, 1e9])
def test_small_gradients_and_max_norm_0_are_left_alone(max_norm):
    params = gradients([3.0, 0.0], [0.0, 4.0])
    assert clip_gradients(params, max_norm).item() == 5.0
    assert params[0].grad.tolist() == [3.0, 0.0] and params[1].grad.tolist() == [0.0, 4.0]
