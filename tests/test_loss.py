"""loss.py: the softcapped cross-entropy in chunks, and its FP8 form."""

import math

import numpy as np
import pytest
import torch

from helpers import forward, make_cfg, make_model, relative, tokens_and_targets
from nanofp8 import loss
from nanofp8.fused import current_scaling, weight_operand
from nanofp8.loss import ChunkedCrossEntropy

pytestmark = pytest.mark.usefixtures("fresh")


def chunked(h, weight, targets, softcap, chunk, recompute, scaling=None):
    """ChunkedCrossEntropy with the weight in bf16, or in FP8 by scaling(weight)."""
    operand = weight_operand(weight, scaling or (lambda w: None), None, {})
    return ChunkedCrossEntropy.apply(h, weight, targets, operand, softcap, chunk, recompute, "")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("in_place", ["", "add", "write"])
def test_a_factor_and_gradients_in_place(in_place, recompute, fp8):
    """`factor` scales loss and gradients; in place, the weight's gradient is added to .grad or overwrites it."""
    h, weight, targets = loss_case()
    operand = weight_operand(weight, (lambda w: current_scaling(w, torch.float8_e4m3fn)) if fp8 else lambda w: None,
                             None, {})
    results = []
    for factor, mode in ((1.0, ""), (0.3, in_place)):
        leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
        if mode:
            leaves[1].grad = torch.ones_like(weight)
        given = leaves[1].grad
        value = ChunkedCrossEntropy.apply(*leaves, targets, operand, 15.0, 16, recompute, mode, factor)
        value.backward()
        assert given is None or leaves[1].grad is given
        results.append((value.detach(), leaves[0].grad, leaves[1].grad - (1 if mode == "add" else 0)))
    for plain, scaled in zip(*results, strict=True):
        assert relative(scaled, 0.3 * plain) < 4e-3  # bf16 rounds 0.3 times a value elsewhere
    assert results[1][0].item() == pytest.approx(0.3 * results[0][0].item(), rel=1e-6)


def loss_case(N=50, C=32, V=97, ignored=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, C, generator=g).bfloat16()
    weight = torch.randn(V, C, generator=g)  # logits of order sqrt(32): well into the softcap
    targets = torch.randint(V, (N,), generator=g)
    if ignored:
        targets[[0, 3, 4, 16, N - 1]] = -1
        targets[32:48] = -1  # a whole chunk of 16
    return h, weight, targets


def reference_loss(h, weight, targets, softcap, upstream):
    """Value, dh and dweight in float64, from the weight as bf16 rounds it."""
    h = h.double().requires_grad_()
    w = weight.bfloat16().double().requires_grad_()
    z = h @ w.T
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="sum")
    (loss * upstream).backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("chunk", [16, 50, 1000])
def test_loss_and_gradients_against_float64(recompute, softcap, ignored, chunk):
    """fp32 sums of exact products: 1e-5 for the loss and dweight. dh is rounded to bf16 once: 2^-9 in the norm
    of many entries, and 2^-8 (plus what cancels) for each."""
    h, weight, targets = loss_case(ignored=ignored)
    want, want_dh, want_dw = reference_loss(h, weight, targets, softcap, 0.25)
    h.requires_grad_(), weight.requires_grad_()
    loss = chunked(h, weight, targets, softcap, chunk, recompute)
    (loss * 0.25).backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert h.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert relative(weight.grad, want_dw) < 1e-5
    assert relative(h.grad, want_dh) < 2**-8
    torch.testing.assert_close(h.grad.double(), want_dh, rtol=2**-8, atol=1e-5)
    assert h.grad[targets < 0].eq(0).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_is_the_same_inside_autocast(recompute):
    """train.py calls it there; autocast must not turn its fp32 matmuls into bf16 ones (the backward pass runs
    outside)."""
    out = []
    for enabled in (False, True):
        h, weight, targets = loss_case()
        h.requires_grad_(), weight.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = chunked(h, weight, targets, 15.0, 16, recompute)
        loss.backward()
        out.append((loss.detach(), h.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_no_targets_at_all(recompute):
    h, weight, targets = loss_case()
    h.requires_grad_(), weight.requires_grad_()
    loss = chunked(h, weight, torch.full_like(targets, -1), 15.0, 16, recompute)
    loss.backward()
    assert loss.item() == 0 and h.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_huge_logits_stay_finite(recompute):
    """logsumexp, not exp: without a softcap, logits in the thousands; with one, tanh at its limits."""
    for softcap in (0.0, 15.0):
        h, weight, targets = loss_case()
        h, weight = (h * 100).requires_grad_(), (weight * 100).requires_grad_()
        loss = chunked(h, weight, targets, softcap, 16, recompute)
        loss.backward()
        assert loss.isfinite() and h.grad.isfinite().all() and weight.grad.isfinite().all()


def count_kernels(monkeypatch):
    calls = {"softcap_cross_entropy": 0, "softcap_cross_entropy_and_grad": 0}

    def counted(name, f):
        def call(*args):
            calls[name] += 1
            return f(*args)
        return call

    for name in calls:
        monkeypatch.setattr(loss, name, counted(name, getattr(loss, name)))
    return calls


@pytest.mark.parametrize("recompute", [False, True])
def test_evaluation_forms_no_gradients(recompute, monkeypatch):
    """Under no_grad the head computes the loss alone: gradients would be three times the work and a (V, C) fp32
    tensor."""
    cfg = make_cfg(USE_AC_LM_HEAD=recompute, USE_FP8=False)
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    calls = count_kernels(monkeypatch)
    with torch.no_grad():
        forward(model, cfg, x, y)
    assert list(calls.values()) == [4, 0]


@pytest.mark.parametrize("recompute,expected", [(False, [0, 2]), (True, [2, 2])])
def test_each_mode_makes_the_logits_as_often_as_it_says(recompute, expected, monkeypatch):
    h, weight, targets = loss_case()
    calls = count_kernels(monkeypatch)
    chunked(h.requires_grad_(), weight.requires_grad_(), targets, 15.0, 25, recompute).backward()
    assert list(calls.values()) == expected


def test_only_one_side_needs_a_gradient():
    for recompute in (False, True):
        h, weight, targets = loss_case()
        chunked(h, weight.requires_grad_(), targets, 15.0, 16, recompute).backward()
        assert h.grad is None and weight.grad is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_fp8_head_against_ml_dtypes(recompute):
    """Logits from E4M3 values of h and weight by their amax, gradients of logits in E5M2 at scale 2^15, all matmuls of
    these values: against the same in float64 with ml_dtypes' casts."""
    import ml_dtypes
    h, weight, targets = loss_case(N=48, C=32, V=96)

    def values(x, scale, kind, top):
        q = np.clip(x.float().numpy() * np.float32(scale), -top, top).astype(kind).astype(np.float64)
        return torch.from_numpy(q) / float(scale)

    hs, ws = (np.float32(448) / np.float32(t.float().abs().max()) for t in (h, weight))
    h8, w8 = values(h, hs, ml_dtypes.float8_e4m3fn, 448), values(weight, ws, ml_dtypes.float8_e4m3fn, 448)
    raw = (h8 @ w8.T).requires_grad_()
    loss = torch.nn.functional.cross_entropy(15 * torch.tanh(raw / 15), targets, ignore_index=-1, reduction="sum")
    loss.backward()
    g8 = values(raw.grad, 2.0**15, ml_dtypes.float8_e5m2, 57344)
    ours = chunked(h.requires_grad_(), weight.requires_grad_(), targets, 15.0, 16, recompute,
                   lambda w: current_scaling(w, torch.float8_e4m3fn))
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    # a few gradients of logits fall on the other side of a rounding boundary in fp32
    assert relative(weight.grad, g8.T @ h8) < 5e-3 and relative(h.grad, g8 @ w8) < 5e-3
    assert relative(weight.grad, raw.grad.T @ h8) > 2e-2  # E5M2 does show


@pytest.mark.parametrize("amax", [1e-37, 1e-42])
def test_current_scaling_of_tiny_values_keeps_zeros(amax):
    """448 / amax is beyond fp32 there, and inf times 0 would be NaN."""
    x = torch.tensor([[amax, 0.0]])
    s = current_scaling(x, torch.float8_e4m3fn)
    assert s.scale.isfinite().all() and (x * s.scale).isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_current_scaling_hides_nothing(bad):
    s = current_scaling(torch.tensor([[1.0, bad]]), torch.float8_e4m3fn)
    assert not (torch.tensor([[1.0, bad]]) * s.scale).isfinite().all()


def test_current_scaling_of_zeros():
    s = current_scaling(torch.zeros(16, 16), torch.float8_e4m3fn)
    assert s.scale.item() == s.inverse.item() == 1
