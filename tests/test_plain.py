"""plain.py against train.GPT and against formulas written out here."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import make_cfg, make_model, relative, tokens_and_targets
from nanofp8 import plain
from nanofp8.plain import rms_norm, rope_qk_norm


@pytest.mark.parametrize("changes", [{}, dict(rope_base=500.0, n_head=4, block_size=16)])
def test_rope_tables_are_those_of_the_model(fresh, changes):
    model = make_model(**changes)
    cfg = model.cfg
    cos, sin = plain.rope_tables(cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_base)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (cfg.block_size, cfg.n_embd // cfg.n_head // 2)
    assert torch.equal(cos, model.cos) and torch.equal(sin, model.sin)
    assert sin[3, 1].item() == pytest.approx(math.sin(3 * cfg.rope_base ** (-2 / (cfg.n_embd // cfg.n_head))), rel=1e-6)


def test_rotate_is_a_rotation_of_pairs():
    """Two heads' dot product depends on the distance of their positions only, and lengths stay the same."""
    cos, sin = plain.rope_tables(64, 8, 100.0)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    turned_q, turned_k = plain.rotate(q.expand(64, 8), cos, sin), plain.rotate(k.expand(64, 8), cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(64))
    torch.testing.assert_close((turned_q[10:] * turned_k[:-10]).sum(-1), (turned_q[10] @ turned_k[0]).expand(54))


def test_relu2_and_its_gradient_in_bf16_are_those_of_fp32_rounded_once():
    x = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = plain.relu2(x)
    y.backward(gradient)
    assert torch.equal(y, torch.relu(x.float()).square().bfloat16())
    assert torch.equal(x.grad, (gradient.float() * 2 * torch.relu(x.detach().float())).bfloat16())


def test_softcap():
    logits = torch.tensor([-1e4, -1.0, 0.0, 0.01, 1e4])
    torch.testing.assert_close(plain.softcap(logits, 15.0), 15 * torch.tanh(logits / 15))
    assert plain.softcap(logits, 0) is logits


def test_the_plain_model_has_the_logits_of_the_real_one(fresh):
    """Embedding, blocks and head of train.GPT's weights through plain.py, with gains, in fp32."""
    model = make_model()
    cfg, (tokens, _) = model.cfg, tokens_and_targets(model.cfg)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(tokens)

    def block(part, x):
        weights = {"attn.qkv": part.attn.qkv.weight, "attn.proj": part.attn.proj.weight,
                   "mlp.fc1": part.mlp.fc1_weight, "mlp.fc2": part.mlp.fc2_weight}
        gains = {"attn.qkv": part.attn.qkv.layer_norm_weight, "mlp.fc1": part.mlp.layer_norm_weight}

        def attend(qkv, h):
            q, k, v = (t.transpose(1, 2) for t in plain.rope_qk_norm(qkv, model.cos, model.sin, cfg.n_head, 1e-6))
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
            return y.transpose(1, 2).flatten(2)

        return plain.block_forward(x, lambda name, h: F.linear(h, weights[name]),
                                   lambda name, h: F.rms_norm(h, h.shape[-1:], gains[name], 1e-6), attend)

    with torch.no_grad():
        x = model.embed(tokens).float()
        for part in model.blocks:
            x = block(part, x)
        h = F.rms_norm(x, x.shape[-1:], model.norm.weight, cfg.norm_eps)
        logits = plain.softcap(F.linear(h, model.head.weight), cfg.logit_softcap)
    assert relative(logits, want) < 0.015


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
