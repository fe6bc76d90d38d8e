"""The model, its loss and its precision: parameters, initialisation, RoPE, causality, recomputation, number formats."""

import math

import numpy as np
import pytest
import torch

from nanofp8 import te_emulation as te
import train
from nanofp8 import loss
from nanofp8.fused import current_scaling, weight_operand
from nanofp8.loss import ChunkedCrossEntropy
from nanofp8.plain import rms_norm, rope_qk_norm
from nanofp8.precision import fp8_state
from nanofp8.runlog import parameter_table
from helpers import CPU, VOCAB, emulated_precision, make_cfg, make_model, one_process, relative, tokens_and_targets

pytestmark = pytest.mark.usefixtures("fresh")
RECIPES = {
    "fp8-delayed": dict(), "fp8-current": dict(FP8_RECIPE="current"), "fp8-block": dict(FP8_RECIPE="block"),
    "fp8-mxfp8": dict(FP8_RECIPE="mxfp8"), "nvfp4": dict(USE_NVFP4=True),
}


def precision_of(cfg):
    return train.select_precision(cfg, CPU)


def forward(model, cfg, x, y=None, quantized=True, **kwargs):
    with precision_of(cfg).autocast(one_process(), quantized=quantized):
        return model(x, y, **kwargs)


# -----------------------------------------------------------------------------------------------------
# Parameters


def test_parameter_count_at_the_default_flags():
    """561,040,640 = 2 x 83,886,080 + 20 x 12 x 1280^2 + 41 x 1280, on the meta device: nothing is allocated."""
    cfg = train.read_flags(["--preset=d20"], has_gpu=False)
    model = train.GPT(cfg, emulated_precision(cfg), lambda f: f, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 561_040_640
    assert sum(n for _, n, _ in parameter_table(cfg)) == 561_040_640
    assert train.flops_per_token(cfg) == 6 * (20 * 12 * 1280**2 + 65536 * 1280) + 6 * 20 * 2048 * 1280


def test_the_parameter_table_adds_up():
    model = make_model(n_layer=3, n_embd=96, n_head=3, vocab_size=VOCAB + 7)
    assert sum(n for _, n, _ in parameter_table(model.cfg)) == sum(p.numel() for p in model.parameters())


def test_parameter_names_and_shapes():
    """Names are what checkpoints are written by: a change breaks every checkpoint there is."""
    model = make_model(n_layer=2)
    V, C = VOCAB, 64
    block = {
        "attn.qkv.layer_norm_weight": (C,), "attn.qkv.weight": (3 * C, C), "attn.proj.weight": (C, C),
        "mlp.layer_norm_weight": (C,), "mlp.fc1_weight": (4 * C, C), "mlp.fc2_weight": (C, 4 * C),
    }
    expected = {"embed.weight": (V, C), "norm.weight": (C,), "head.weight": (V, C)}
    expected |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert set(model.state_dict()) == set(expected)  # no buffer, no extra state
    assert all(p.dtype == torch.float32 for p in model.parameters())


# -----------------------------------------------------------------------------------------------------
# Initialisation


def std_is(weight, std):
    """Mean 0 and the given std, within five standard errors."""
    n = weight.numel()
    return abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * n) and abs(weight.mean().item()) < 5 * std / math.sqrt(n)


@pytest.mark.parametrize("fan_out,fan_in,std", [(1024, 256, 1 / 16), (256, 256, 1 / 16), (256, 1024, 1 / 64), (64, 1024, 1 / 128)])
def test_spectral_init(fan_out, fan_in, std):
    """1/sqrt(fan_in) for tall and square, times sqrt(fan_out/fan_in) for wide ones; the spectral norm is then of the
    order sqrt(fan_out/fan_in): between 0.9 and 2.1 times it (Marchenko-Pastur: (1 + sqrt(r)) for aspect ratio r)."""
    weight = train.spectral_init(torch.empty(fan_out, fan_in))
    assert std_is(weight, std)
    assert 0.9 < torch.linalg.matrix_norm(weight, 2) / math.sqrt(fan_out / fan_in) < 2.1


def test_initial_weights():
    model = make_model(zeros=True, n_layer=2, n_embd=256)
    assert std_is(model.embed.weight, 1.0) and model.head.weight.eq(0).all() and model.norm.weight.eq(1).all()
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        assert all(std_is(part, 1 / 16) for part in (q, k, v)) and not torch.equal(q, k)
        assert std_is(block.mlp.fc1_weight, 1 / 16)
        assert block.attn.proj.weight.eq(0).all() and block.mlp.fc2_weight.eq(0).all()
        assert block.attn.qkv.layer_norm_weight.eq(1).all() and block.mlp.layer_norm_weight.eq(1).all()
    assert not torch.equal(model.blocks[0].mlp.fc1_weight, model.blocks[1].mlp.fc1_weight)


def test_the_same_seed_gives_the_same_model():
    a, b, c = make_model(seed=3, zeros=True), make_model(seed=3, zeros=True), make_model(seed=4, zeros=True)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_loss_is_ln_vocab(name):
    """The head is zero, so every token is equally likely; 1e-6 is fp32 rounding of a mean."""
    cfg = make_cfg(n_embd=128, **RECIPES[name])
    x, y = tokens_and_targets(cfg)
    loss = forward(make_model(cfg, zeros=True), cfg, x, y)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() / y.numel() == pytest.approx(math.log(VOCAB), rel=1e-6)


# -----------------------------------------------------------------------------------------------------
# RoPE and QK norm


def rope_inputs(T=24, H=2, D=16, B=2, seed=0):
    cfg = make_cfg(n_embd=H * D, n_head=H, block_size=T, batch_size=B, total_batch_size=B * T, USE_FP8=False)
    model = make_model(cfg)
    qkv = torch.randn(B, T, 3 * H * D, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return qkv, model.cos, model.sin, H, D


def test_rope_and_qk_norm_against_float64():
    """Half-split pairs (i, i + D/2) turned by t * base^(-2i/D), then divided by their RMS. One bf16 rounding: 2^-8."""
    qkv, cos, sin, H, D = rope_inputs()
    B, T, _ = qkv.shape
    q, k, v = rope_qk_norm(qkv, cos, sin, H, 1e-6)
    x = qkv.double().numpy().reshape(B, T, 3, H, D)
    angle = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    turn = np.exp(1j * angle)[None, :, None, :]
    for got, part in ((q, 0), (k, 1)):
        z = (x[:, :, part, :, : D // 2] + 1j * x[:, :, part, :, D // 2:]) * turn
        want = np.concatenate([z.real, z.imag], axis=-1)
        want /= np.sqrt((want**2).mean(-1, keepdims=True) + 1e-6)
        assert got.dtype == torch.bfloat16 and got.shape == (B, T, H, D) and got.is_contiguous()
        np.testing.assert_allclose(got.double().numpy(), want, rtol=2**-8, atol=1e-5)
    assert torch.equal(v, qkv.view(B, T, 3, H, D)[:, :, 2]) and v.is_contiguous()


def test_scores_depend_on_the_distance_alone():
    """The same q at i and k at j score alike wherever i - j is alike. bf16 outputs: a score of D terms of order 1
    is off by about 2^-8 * sqrt(D)."""
    _, cos, sin, H, D = rope_inputs(T=24, H=1, D=32)
    one = torch.randn(3 * D).bfloat16()
    q, k, _ = rope_qk_norm(one.expand(1, 24, 3 * D).contiguous(), cos, sin, 1, 1e-6)
    scores = q[0, :, 0].double() @ k[0, :, 0].double().T
    spread = 0.0
    for distance in range(-23, 24):
        diagonal = scores.diagonal(distance)
        spread = max(spread, (diagonal - diagonal.mean()).abs().max().item())
    assert spread < 4 * 2**-8 * math.sqrt(D)
    means = torch.stack([scores.diagonal(d).mean() for d in range(-23, 24)])
    assert means.std() > 10 * spread / 4  # and they do depend on it


def test_rotation_keeps_the_norm_and_qk_norm_makes_it_one():
    """Turning does not change a head's RMS, so norm(turn(x)) has RMS 1 at any position and for any size of x;
    a bf16 rounding of each entry moves the RMS by far less than 2^-8."""
    qkv, cos, sin, H, _ = rope_inputs()
    for size in (1e-2, 1.0, 1e3):
        q, k, _ = rope_qk_norm((qkv * size), cos, sin, H, 1e-10)
        for x in (q, k):
            rms = x.double().square().mean(-1).sqrt()
            assert (rms - 1).abs().max() < 2**-8
    unturned, _, _ = rope_qk_norm(qkv, torch.ones_like(cos), torch.zeros_like(sin), H, 1e-6)
    turned, _, _ = rope_qk_norm(qkv, cos, sin, H, 1e-6)
    assert torch.equal(turned[:, 0], unturned[:, 0])  # position 0 is not turned
    D = turned.shape[-1]
    pairs = lambda x: (x[..., : D // 2].double().square() + x[..., D // 2:].double().square()).sqrt()  # noqa: E731
    assert (pairs(turned) - pairs(unturned)).abs().max() < 4 * 2**-8


def test_rms_norm():
    x = torch.randn(5, 7, 64) * torch.logspace(-3, 3, 5)[:, None, None]
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = rms_norm(x, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)


def test_the_rope_table_is_fp32_and_follows_the_base():
    """bf16 could not tell position 2047 from 2048: model.bfloat16() must leave the table alone."""
    model = make_model(block_size=2048, batch_size=1, total_batch_size=2048, rope_base=500.0).bfloat16()
    angle = np.arange(2048)[:, None] * 500.0 ** (-np.arange(16) / 16)
    assert model.cos.dtype == model.sin.dtype == torch.float32
    np.testing.assert_allclose(model.cos, np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(model.sin, np.sin(angle), atol=1e-7)


# -----------------------------------------------------------------------------------------------------
# Causality


@pytest.mark.parametrize("quantized", [False, True])
def test_a_later_token_never_changes_an_earlier_logit(quantized):
    """Exactly, in bf16 and under delayed scaling (whose scales come from earlier passes). T is not a round number."""
    cfg = make_cfg(block_size=80, batch_size=2, total_batch_size=160)
    model = make_model(cfg).eval()
    x, y = tokens_and_targets(cfg)
    if quantized:
        forward(model, cfg, x, y).backward()  # fill the amax history
    with torch.no_grad():
        base = forward(model, cfg, x, quantized=quantized)
        for t in (1, 17, 40, 63, 64, 79):
            changed = x.clone()
            changed[:, t:] = (changed[:, t:] + 1) % VOCAB
            logits = forward(model, cfg, changed, quantized=quantized)
            assert torch.equal(logits[:, :t], base[:, :t])
            assert (logits[:, t:] != base[:, t:]).any(-1).all()


def test_sequences_of_a_batch_do_not_mix():
    cfg = make_cfg(USE_FP8=False)
    model, (x, _) = make_model(cfg).eval(), tokens_and_targets(cfg)
    with torch.no_grad():
        base = forward(model, cfg, x)
        x[0] = (x[0] + 1) % VOCAB
        assert torch.equal(forward(model, cfg, x)[1:], base[1:])


def test_logits_are_softcapped_and_shorter_sequences_are_fine():
    cfg = make_cfg(logit_softcap=2.0)
    model, (x, _) = make_model(cfg), tokens_and_targets(cfg)
    with torch.no_grad():
        model.head.weight.mul_(100)
        logits = forward(model, cfg, x[:, :7], quantized=False)
    assert logits.shape == (8, 7, VOCAB) and logits.dtype == torch.float32
    assert 1.5 < logits.abs().max() <= 2.0


def test_loss_and_logits_agree():
    """The loss over chunks is the cross-entropy of the logits; both from the same bf16 operands, summed in fp32."""
    cfg = make_cfg(USE_FP8=False)
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    with torch.no_grad():
        logits, loss = forward(model, cfg, x), forward(model, cfg, x, y)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), y.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


# -----------------------------------------------------------------------------------------------------
# Number formats


# Relative error of all logits against bf16, for random weights through two blocks. Rounding to E4M3 is off by 2.6%
# (RMS) a value and to E2M1 by about 9%; a few such matmuls in a row add up to what is allowed here.
@pytest.mark.parametrize("name,allowed", [("fp8-delayed", 0.1), ("fp8-current", 0.1), ("fp8-block", 0.1), ("fp8-mxfp8", 0.1),
                                          ("nvfp4", 0.35)])
def test_quantized_logits_and_gradients_are_close_to_bf16_and_not_equal(name, allowed):
    cfg = make_cfg(n_embd=128, **RECIPES[name])
    precision = precision_of(cfg)
    assert precision.name == name and precision.emulated and "EMULATED" in precision.reason
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    for _ in range(2):  # delayed scaling: the first passes only fill the amax history
        forward(model, cfg, x, y).backward()
    out = {}
    for quantized in (False, True):
        model.zero_grad()
        with torch.no_grad():
            logits = forward(model, cfg, x, quantized=quantized)
        loss = forward(model, cfg, x, y, quantized=quantized)
        loss.backward()
        out[quantized] = logits, loss, {n: p.grad.clone() for n, p in model.named_parameters()}
    error = relative(out[True][0], out[False][0])
    assert 1e-3 < error < allowed
    assert out[True][1].item() == pytest.approx(out[False][1].item(), rel=allowed / 5)
    for n, grad in out[True][2].items():
        assert relative(grad, out[False][2][n]) < 2.5 * allowed, n


def test_bf16_says_no_emulation_of_numbers():
    precision = precision_of(make_cfg(USE_FP8=False))
    assert precision.name == "bf16" and precision.recipe is None and "EMULATED" not in precision.reason


def test_nvfp4_takes_the_place_of_fp8():
    assert precision_of(make_cfg(n_embd=128, USE_NVFP4=True, USE_FP8=True)).name == "nvfp4"
    assert precision_of(make_cfg(n_embd=128, USE_NVFP4=True, USE_FP8=False)).name == "nvfp4"


def test_delayed_scaling_takes_its_flags():
    recipe = precision_of(make_cfg(FP8_MARGIN=2, FP8_AMAX_HISTORY=5)).recipe
    assert recipe.margin == 2 and recipe.amax_history_len == 5 and recipe.amax_compute_algo == "max"


def test_fp8_state_names_live_tensors():
    cfg = make_cfg()
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    forward(model, cfg, x, y).backward()
    state = fp8_state(model)
    modules = [f"blocks.{i}.{m}" for i in range(2) for m in ("attn.qkv", "attn.proj", "mlp")]
    assert set(state) == {f"{m}.{d}.{t}" for m in modules for d in ("scaling_fwd", "scaling_bwd") for t in ("scale", "amax_history")}
    before = {k: v.clone() for k, v in state.items()}
    forward(model, cfg, x, y, quantized=False)
    assert all(torch.equal(v, before[k]) for k, v in state.items())  # bf16 feeds nothing
    forward(model, cfg, x, y).backward()
    assert not all(torch.equal(v, before[k]) for k, v in state.items())
    assert fp8_state(make_model(make_cfg(USE_FP8=False))) == {}


# -----------------------------------------------------------------------------------------------------
# Recomputation


def losses_and_grads(micro_batches=2, **changes):
    """Two steps of two micro-batches (weights quantized once a step), without updates between."""
    cfg = make_cfg(**changes)
    te._state.__init__()
    model, out = make_model(cfg), []
    for step in range(2):
        for m in range(micro_batches):
            loss = forward(model, cfg, *tokens_and_targets(cfg, seed=10 * step + m), first=m == 0)
            loss.backward()
            out.append(loss.detach())
    state = {k: v.clone() for k, v in fp8_state(model).items()}
    return out, {n: p.grad for n, p in model.named_parameters()}, state


@pytest.fixture(scope="module")
def plain_passes():
    return {fp8: losses_and_grads(USE_FP8=fp8) for fp8 in (False, True)}


@pytest.mark.parametrize("flags", [
    ("USE_AC_BLOCKS",), ("USE_AC_ATTENTION",), ("USE_AC_LM_HEAD",), ("USE_AC_BLOCKS", "USE_AC_ATTENTION", "USE_AC_LM_HEAD"),
], ids="+".join)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8-delayed"])
def test_recomputation_changes_nothing(plain_passes, fp8, flags):
    """Bit for bit: losses, gradients, and the amax history of delayed scaling (recomputation must not feed it twice)."""
    plain, plain_grads, plain_state = plain_passes[fp8]
    got, grads, state = losses_and_grads(USE_FP8=fp8, **{flag: True for flag in flags})
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    for name, grad in grads.items():
        assert torch.equal(grad, plain_grads[name]), name
    assert state.keys() == plain_state.keys() and (bool(state) == fp8)
    for name, value in state.items():
        assert torch.equal(value, plain_state[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_chunk_size_does_not_matter(recompute):
    """Other chunks only reorder fp32 sums: loss and head within 1e-5; what passes a rounding to bf16 within 2^-8.
    64 divides the 256 tokens, the others do not; 8192 is more than there are."""
    plain, plain_grads, _ = losses_and_grads(USE_FP8=False, loss_chunk_size=64, USE_AC_LM_HEAD=recompute)
    for chunk in (1, 7, 100, 8192):
        got, grads, _ = losses_and_grads(USE_FP8=False, loss_chunk_size=chunk, USE_AC_LM_HEAD=recompute)
        for a, b in zip(got, plain, strict=True):
            assert a.item() == pytest.approx(b.item(), rel=1e-5)
        assert relative(grads["head.weight"], plain_grads["head.weight"]) < 1e-5
        for name, grad in grads.items():
            assert relative(grad, plain_grads[name]) < 2**-8, name


def test_quantized_weights_are_made_once_a_step():
    """first=False takes the weights quantized at first=True; first=None quantizes anew."""
    cfg = make_cfg(FP8_RECIPE="current")
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    first = forward(model, cfg, x, y, first=True).item()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1_weight.mul_(-1.5)
    assert forward(model, cfg, x, y, first=False).item() == first
    assert forward(model, cfg, x, y).item() != first
    assert forward(model, cfg, x, y, first=True).item() == forward(model, cfg, x, y).item()


# -----------------------------------------------------------------------------------------------------
# Loss


def chunked(h, weight, targets, softcap, chunk, recompute, scaling=None):
    """ChunkedCrossEntropy with the weight in bf16, or in FP8 by scaling(weight)."""
    operand = weight_operand(weight, scaling or (lambda w: None), None, {})
    return ChunkedCrossEntropy.apply(h, weight, targets, operand, softcap, chunk, recompute, "")


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
    """train.py calls it there; autocast must not turn its fp32 matmuls into bf16 ones (the backward pass runs outside)."""
    out = []
    for enabled in (False, True):
        h, weight, targets = loss_case()
        h.requires_grad_(), weight.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = chunked(h, weight, targets, 15.0, 16, recompute)
        loss.backward()
        out.append((loss.detach(), h.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*out))


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
    """Under no_grad the head computes the loss alone: gradients would be three times the work and a (V, C) fp32 tensor."""
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
    """Logits from E4M3 values of h and weight by their amax, gradients of logits in E5M2 at scale 2^15, all matmuls of these
    values: against the same in float64 with ml_dtypes' casts."""
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


def test_current_scaling_of_zeros():
    s = current_scaling(torch.zeros(16, 16), torch.float8_e4m3fn)
    assert s.scale.item() == s.inverse.item() == 1
