"""plain.py against train.GPT and against formulas written out here."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import make_model, relative, tokens_and_targets
from nanofp8 import plain


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

        def attend(qkv):
            q, k, v = (t.transpose(1, 2) for t in plain.rope_qk_norm(qkv, model.cos, model.sin, cfg.n_head, 1e-6))
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
            return y.transpose(1, 2).flatten(2)

        return plain.block_forward(x, lambda name, h: F.linear(h, weights[name]),
                                   lambda name, h: F.rms_norm(h, h.shape[-1:], gains[name], 1e-6), attend)

    with torch.no_grad():
        x = plain.rms_norm(model.embed(tokens), cfg.norm_eps).float()
        for part in model.blocks:
            x = block(part, x)
        h = F.rms_norm(x, x.shape[-1:], model.norm.weight, cfg.norm_eps)
        logits = plain.softcap(F.linear(h, model.head.weight), cfg.logit_softcap)
    assert relative(logits, want) < 0.015
