"""FP8_STATS_INTERVAL: the numbers, the pass that computes them, the records in log.jsonl and the picture."""

import contextlib
import math
import sys
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch

import train
from helpers import (
    PARTS,
    losses,
    make_cfg,
    make_model,
    one_process,
    records,
    relative,
    tokens_and_targets,
    train_here,
)
from nanofp8 import fp8_stats, fused
from nanofp8 import te_emulation as te
from nanofp8.loss import LOGIT_GRAD_SCALE
from nanofp8.precision import fp8_state, keep_high_precision

R = te.recipe
BLOCKS = [f"blocks.{i}.{m}" for i in range(2) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
LAYERS = [*BLOCKS, "head"]


def stats(x, rcp, kind="input", scale=None):
    return dict(zip(te.STATISTICS, te.quantization_stats(x, rcp, kind, scale).tolist(), strict=True))


# -----------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("kind, dtype, top", [("input", ml_dtypes.float8_e4m3fn, 448),
                                              ("gradient", ml_dtypes.float8_e5m2, 57344)])
def test_delayed_scaling_by_hand(kind, dtype, top):
    """Too large a scale saturates values, too small a one rounds them to zero: as many as with numpy's cast."""
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 48)
    x[:, 7] = 0
    for scale in (1.0, top / 1.5, 4.0 * top):
        got = stats(x, R.DelayedScaling(), kind, torch.tensor(scale))
        scaled = x.numpy() * np.float32(scale)
        q = np.clip(scaled, -top, top).astype(dtype).astype(np.float64)
        nonzero = (x != 0).sum().item()
        limit = 464 if top == 448 else 61440
        assert got["amax"] == x.abs().max() and got["scale"] == pytest.approx(scale)
        assert got["saturated"] == pytest.approx((np.abs(scaled) > limit).sum() / nonzero)
        assert got["underflow"] == pytest.approx(((q == 0) & (x.numpy() != 0)).sum() / nonzero)
        x64 = x.double().numpy()
        assert got["error"] == pytest.approx(np.linalg.norm(q / scale - x64) / np.linalg.norm(x64), rel=1e-4)
    assert got["saturated"] > 0.05


@pytest.mark.parametrize("rcp, kind, error", [
    (R.Float8CurrentScaling(), "input", 0.03), (R.Float8CurrentScaling(), "gradient", 0.06),
    (R.Float8BlockScaling(), "weight", 0.03), (R.Float8BlockScaling(), "input", 0.03),
    (R.MXFP8BlockScaling(), "input", 0.03), (R.NVFP4BlockScaling(), "input", 0.12),
    (R.NVFP4BlockScaling(), "weight", 0.13), (R.NVFP4BlockScaling(), "gradient", 0.17),
], ids=lambda v: getattr(type(v), "__name__", v))
def test_scales_from_the_tensor_itself_saturate_nothing(rcp, kind, error):
    """Check the error of normal values in each format. It is largest with stochastic rounding (NVFP4's gradients)."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = stats(x, rcp, kind)
    # A block's scale may be rounded down, so that its largest value lies above 6, where stochastic rounding saturates
    assert got["saturated"] == 0 or rcp.nvfp4() and kind == "gradient" and got["saturated"] < 1 / 16
    assert got["underflow"] < 0.2 and got["amax"] == x.abs().max()
    assert 0.6 * error < got["error"] < error
    spread = torch.cat([x, x * 1e-6])
    assert stats(spread, R.Float8CurrentScaling())["underflow"] > 0.4
    assert stats(spread, R.MXFP8BlockScaling())["underflow"] < 0.01
    assert stats(spread, R.NVFP4BlockScaling())["underflow"] > 0.5  # here the scale of the block itself becomes 0


@pytest.mark.parametrize("rcp", [R.DelayedScaling(), R.Float8CurrentScaling(), R.Float8BlockScaling(),
                                 R.MXFP8BlockScaling(), R.NVFP4BlockScaling()], ids=lambda r: type(r).__name__)
def test_odd_tensors(rcp):
    scale = torch.tensor(2.0) if rcp.delayed() else None
    zero = stats(torch.zeros(128, 128).bfloat16(), rcp, scale=scale)
    assert zero["amax"] == zero["saturated"] == zero["underflow"] == zero["error"] == 0
    x = torch.ones(128, 128)
    x[0, 0] = math.nan
    assert math.isnan(stats(x, rcp, scale=scale)["error"])  # logged as null


# -----------------------------------------------------------------------------------------------------
# The pass


@pytest.mark.parametrize("changes", [{}, PARTS, *({name: value, "window_size": 8} for name, value in PARTS.items()
                                                  if name != "window_size")], ids=lambda changes: "-".join(changes))
def test_the_pass_sees_what_training_sees(fresh, changes):
    """Compare the inputs, weights and gradients of all matmuls with those of the layers themselves in a bf16 pass."""
    cfg = make_cfg(USE_FP8=False, **changes)
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    precision = train.select_precision(cfg, torch.device("cpu"))
    want, got = {}, {}
    forward, backward = te._linear_forward, te._linear_backward
    matmuls, last_first = iter(BLOCKS), iter([BLOCKS[4 * b + m] for b in (1, 0) for m in (3, 2, 1, 0)])

    def spied_forward(run, h, weight, *rest):
        name = next(matmuls)
        want[name, "input"], want[name, "weight"] = h, weight
        return forward(run, h, weight, *rest)

    def spied_backward(run, dy, *rest):
        want[next(last_first), "gradient"] = dy
        return backward(run, dy, *rest)

    with (mock.patch.object(te, "_linear_forward", spied_forward),
          mock.patch.object(te, "_linear_backward", spied_backward)):
        with precision.autocast(one_process()):
            loss = model(x, y) * 0.01
        loss.backward()

    order = iter([(BLOCKS[4 * b + m], k) for b in (1, 0) for m in range(4) for k in ("input", "weight")])

    def spied_stats(tensor, rcp, kind, scale):
        name = next(order)[0] if kind != "gradient" else next(reverse)
        got[name, kind] = tensor
        return torch.zeros(5)

    reverse = iter([BLOCKS[4 * b + m] for b in (1, 0) for m in (3, 2, 1, 0)])
    with mock.patch.object(te, "quantization_stats", spied_stats):
        result = fp8_stats.collect(model, x, y, R.Float8CurrentScaling(), {}, [], 0.01)
    assert list(result) == LAYERS and want.keys() == got.keys()
    for key in want:
        assert got[key].shape == want[key].shape and relative(got[key], want[key]) < 0.02, key


def test_live_scales_and_layers_in_bf16(fresh):
    """Delayed scaling reports the scales of the next step, slot by slot. A layer in bf16 has no statistics."""
    cfg = make_cfg(HIGH_PRECISION_LAYERS="blocks.1.attn")
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    in_bf16 = keep_high_precision(model, cfg.HIGH_PRECISION_LAYERS, te)
    precision = train.select_precision(cfg, torch.device("cpu"))
    for _ in range(3):
        with precision.autocast(one_process()):
            loss = model(x, y) * 0.01
        loss.backward()
    state = fp8_state(model)
    before = {k: v.clone() for k, v in state.items()}
    result = fp8_stats.collect(model, x, y, precision.recipe, state, in_bf16, 0.01)
    assert list(result) == LAYERS
    assert [n for n in LAYERS if not result[n]] == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "head"]
    for name, kind, key, slot in (("attn.qkv", "input", "scaling_fwd", 0), ("attn.qkv", "weight", "scaling_fwd", 1),
                                  ("attn.proj", "gradient", "scaling_bwd", 0), ("mlp.fc1", "weight", "scaling_fwd", 1),
                                  ("mlp.fc2", "input", "scaling_fwd", 3), ("mlp.fc2", "weight", "scaling_fwd", 4),
                                  ("mlp.fc1", "gradient", "scaling_bwd", 0), ("mlp.fc2", "gradient", "scaling_bwd", 2)):
        layer = f"blocks.0.{name.replace('.fc1', '').replace('.fc2', '')}"
        held, history = (state[f"{layer}.{key}.{what}"][..., slot] for what in ("scale", "amax_history"))
        numbers = result[f"blocks.0.{name}"][kind]
        assert numbers["scale"] == pytest.approx(held.item(), rel=1e-6)
        assert numbers["amax"] == pytest.approx(history.max().item(), rel=0.1)  # the same batch in bf16
        assert numbers["saturated"] < 1e-3 and 0.01 < numbers["error"] < 0.08
    assert all(torch.equal(v, before[k]) for k, v in fp8_state(model).items())
    assert all(p.grad is not None for p in model.parameters())  # the gradients of the loop above are still there


def test_the_head(fresh):
    """The statistics of an FP8 head describe the tensors that training quantizes, with training's scales."""
    cfg = make_cfg(logit_softcap=2.0, loss_chunk_size=1024)  # one chunk
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # with a head of zeros all gradients would be alike
    y.view(-1)[:3] = -1
    precision, quantize, seen = train.select_precision(cfg, torch.device("cpu")), fused.quantize, []

    def spied(tensor, s, **rest):
        seen.append((tensor.detach().clone(), s))
        return quantize(tensor, s, **rest)

    with (mock.patch("nanofp8.fused.quantize", spied), mock.patch("nanofp8.loss.quantize", spied),
          precision.autocast(one_process())):
        model(x, y)
    (weight, _), (h, _), (gradient, s), *_ = seen
    assert s.dtype == torch.float8_e5m2 and gradient.shape[1] == cfg.vocab_size
    rcp, loss_scale = R.Float8CurrentScaling(), 0.01
    want = {"input": stats(h, rcp), "weight": stats(weight, rcp),
            "gradient": stats(gradient.float() * loss_scale, rcp, "gradient", s.scale / loss_scale)}
    got = fp8_stats.collect(model, x, y, precision.recipe, fp8_state(model), [], loss_scale, LOGIT_GRAD_SCALE)["head"]
    assert list(got) == list(fp8_stats.KINDS) and got["weight"] == pytest.approx(want["weight"], rel=1e-5)
    for kind in ("input", "gradient"):
        assert got[kind] == pytest.approx(want[kind], rel=0.05, abs=1e-4), kind
    assert got["gradient"]["scale"] == pytest.approx(2.0 ** 15 / loss_scale) and got["gradient"]["amax"] <= loss_scale


def test_some_sequences_of_a_large_micro_batch_are_enough(fresh, monkeypatch):
    cfg = make_cfg()
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)

    def collect(*batch):
        return fp8_stats.collect(model, *batch, R.Float8CurrentScaling(), {}, [], 0.01)

    whole = collect(x, y)
    monkeypatch.setattr(fp8_stats, "TOKENS", 2 * x.shape[1] + 1)
    assert collect(x, y) == collect(x[:2], y[:2]) != whole
    monkeypatch.setattr(fp8_stats, "TOKENS", 1)
    assert collect(x, y) == collect(x[:1], y[:1])


# -----------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.slow
@pytest.mark.parametrize("changes, watched_layers", [
    (dict(), 9), (dict(USE_NVFP4=True, n_embd=128, batch_size=4), 8),
    (dict(FP8_RECIPE="mxfp8", HIGH_PRECISION_LAYERS="blocks.1"), 5),
    (dict(HIGH_PRECISION_LAYERS="head"), 8), (dict(USE_FP8_HEAD=False), 8),
], ids=["delayed", "nvfp4", "mxfp8", "bf16-head", "no-fp8-head"])
def test_a_run_with_statistics_trains_the_same(fresh, shards, tmp_path, changes, watched_layers):
    """Losses are equal bit for bit, also with stochastic rounding. Records come at FP8_STATS_INTERVAL, in order."""
    off = train_here(tmp_path / "off", shards, max_iters=4, **changes)
    on = train_here(tmp_path / "on", shards, max_iters=4, FP8_STATS_INTERVAL=2, **changes)
    assert (losses(off) == losses(on)).all() and not records(off, "fp8_stats")
    kinds = [(r["kind"], r["step"]) for r in records(on) if r["step"] == 1]
    assert kinds == [("train", 1), ("fp8_stats", 1)]
    found = records(on, "fp8_stats")
    assert [r["step"] for r in found] == [1, 3] and all(r["seconds"] > 0 for r in found)
    for r in found:
        watched = [layer for layer in r["layers"].values() if layer]
        assert list(r["layers"]) == LAYERS and len(watched) == watched_layers
        for layer in watched:
            assert list(layer) == list(fp8_stats.KINDS)
            assert all(list(numbers) == list(te.STATISTICS) for numbers in layer.values())
            assert all(0 <= n[s] <= 1 for n in layer.values() for s in ("saturated", "underflow"))
    fp8_stats.plot(records(on), str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_sharded_optional_parts_are_gathered(fresh, shards, tmp_path):
    """Under FSDP2 the numbers are nearly those of a model that is not sharded."""
    changes = PARTS | dict(max_iters=2, FP8_STATS_INTERVAL=2, eval_tokens=32, learning_rate_x0=0.05)
    (plain,), (sharded,) = (records(train_here(tmp_path, shards, USE_FSDP2=flag, **changes), "fp8_stats")
                            for flag in (False, True))
    for name, kinds in plain["layers"].items():
        for kind, numbers in kinds.items():
            assert sharded["layers"][name][kind] == pytest.approx(numbers, rel=0.3, abs=1e-3), (name, kind)


def test_wandb_gets_a_curve_for_each_number(fresh, shards, tmp_path, monkeypatch):
    logged = {}
    fake = SimpleNamespace(log=lambda values: logged.update({(k, values["step"]): v for k, v in values.items()}),
                           finish=lambda: None, define_metric=lambda name, step_metric: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: fake))
    folder = train_here(tmp_path, shards, max_iters=2, FP8_STATS_INTERVAL=2, USE_WANDB=True)
    (record,), (done,) = records(folder, "fp8_stats"), records(folder, "done")
    for layer, kinds in record["layers"].items():
        for kind, numbers in kinds.items():
            assert all(logged[f"fp8_stats/layers/{layer}/{kind}/{name}", 1] == value for name, value in numbers.items())
    assert logged["done/val_losses/bf16", 1] == done["val_loss"] and ("train/loss", 0) in logged


def test_off_is_off(fresh, shards, tmp_path):
    with mock.patch.object(fp8_stats, "collect", side_effect=AssertionError):
        train_here(tmp_path, shards, max_iters=2)


@pytest.mark.parametrize("changes", [dict(USE_FP8=False, FP8_STATS_INTERVAL=5), dict(FP8_STATS_INTERVAL=-1)])
def test_wrong_input_is_one_line(fresh, shards, tmp_path, changes):
    with contextlib.redirect_stdout(None), pytest.raises(SystemExit) as error:
        train_here(tmp_path, shards, **changes)
    assert error.value.code == 2
