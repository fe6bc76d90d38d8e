"""parts.py: value embeddings, residual scalars and windows in a model of TE's (emulated) modules."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from helpers import PARTS, make_cfg, make_model, make_optimizers, relative, tokens_and_targets
from nanofp8 import plain
from nanofp8.config import UserError
from nanofp8.parts import token_order
from nanofp8.sizes import value_embed_error, value_layers, windows


def test_value_layers_are_every_second_counted_from_the_last():
    for n_layer, n_value_embed, layers in ((12, 3, [7, 9, 11]), (5, 3, [0, 2, 4]), (5, 0, [])):
        cfg = SimpleNamespace(n_layer=n_layer, n_value_embed=n_value_embed)
        assert value_layers(cfg) == layers and not value_embed_error(cfg)


def test_more_value_embeddings_than_fit_are_refused():
    with pytest.raises(UserError, match="n_value_embed=4.*--n_value_embed=3"):
        train.check_flags(make_cfg(n_layer=5, n_value_embed=4), 1)


def test_windows_follow_the_pattern_and_the_last_block_sees_all():
    cfg = SimpleNamespace(n_layer=5, block_size=32, window_pattern="SL", window_size=8)
    assert windows(cfg) == [8, 32, 8, 32, 32]
    cfg.window_size = 64  # no more than there is
    assert windows(cfg) == [32] * 5


def reference_loss(model, cfg, x, y):
    """The loss of a whole model with all parts, from its parameters, in float64 without rounding."""
    C, H, T, w = cfg.n_embd, cfg.n_head, cfg.block_size, {n: p.double() for n, p in model.named_parameters()}

    def norm(h):
        return h * (h.square().mean(-1, keepdim=True) + cfg.norm_eps).rsqrt()

    cos, sin = (t.double()[None, :, None] for t in plain.rope_tables(T, C // H, cfg.rope_base))
    h = x0 = norm(F.embedding(x, w["embed.weight"]))
    for i in range(cfg.n_layer):
        def part(name, i=i):
            return w[f"blocks.{i}.{name}"]

        if cfg.USE_X0:
            h = w["scales.x"][i] * h + w["scales.x0"][i] * x0
        y_in = norm(h) * part("attn.qkv.layer_norm_weight")
        q, k, v = (y_in @ part("attn.qkv.weight").T).view(*x.shape, 3, H, C // H).unbind(2)
        if i in value_layers(cfg):
            gates = 3 * torch.sigmoid(y_in[..., :12] @ part("attn.value_embed.gate").T)
            v = v + gates[..., None] * F.embedding(x, part("attn.value_embed.table")).view_as(v)
        q, k = (norm(torch.cat((t1 * cos - t2 * sin, t1 * sin + t2 * cos), -1)) * cfg.qk_scale
                for t1, t2 in (t.chunk(2, -1) for t in (q, k)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (C // H) ** -0.5
        distance = torch.arange(T)[:, None] - torch.arange(T)
        scores = scores.masked_fill((distance < 0) | (distance >= windows(cfg)[i]), -torch.inf)
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        h = h + attended @ part("attn.proj.weight").T
        y_in = norm(h) * part("mlp.layer_norm_weight")
        h = h + (y_in @ part("mlp.fc1_weight").T).relu().square() @ part("mlp.fc2_weight").T
    logits = norm(h) * w["norm.weight"] @ w["head.weight"].T
    return F.cross_entropy(plain.softcap(logits, cfg.logit_softcap).flatten(0, 1), y.flatten(), reduction="sum")


@pytest.mark.parametrize("part", ["all", "n_value_embed", "USE_X0", "qk_scale", "window_pattern",
                                  "USE_AC_BLOCKS", "USE_AC_ATTENTION"])
def test_loss_and_gradients_against_plain_float64(part):
    """bf16 rounding: 1% of the gradients of matrices and tables, 5% of the few scalars."""
    chosen = PARTS if part == "all" or part.startswith("USE_AC") else {k: v for k, v in PARTS.items()
                                                                      if k == part or k == "window_size"}
    cfg = make_cfg(**chosen, USE_FP8=False, n_layer=3, **{part: True} if part.startswith("USE_AC") else {})
    model = make_model(cfg)
    x, y = tokens_and_targets(cfg)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)
    loss.backward()
    expected = reference_loss(model, cfg, x, y)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert relative(p.grad, gradient) < (0.05 if p.numel() < 100 else 0.025), name


def test_each_parameter_has_one_optimizer_and_its_own_rate():
    cfg = make_cfg(**PARTS, learning_rate_value=0.7, learning_rate_x0=0.3)
    model = make_model(cfg)
    optimizers = make_optimizers(model, cfg)
    groups = {name: [n for n, p in model.named_parameters() if any(p is q for q in group["params"])]
              for name, group in optimizers.groups.items()}
    assert sorted(sum(groups.values(), [])) == sorted(n for n, _ in model.named_parameters())
    assert groups["values"] == ["blocks.1.attn.value_embed.table"]
    assert "blocks.1.attn.value_embed.gate" in groups["gains"]
    assert (groups["x"], groups["x0"]) == (["scales.x"], ["scales.x0"])
    assert [optimizers.base_lr[n] for n in ("values", "x0", "x")] == pytest.approx([0.7, 0.3, 0.003])


def test_token_order_lists_each_tokens_positions():
    idx = torch.tensor([[3, 1, 3], [0, 3, 1]], dtype=torch.int32)
    where = token_order(idx, 5)
    positions = [where.order[a:b].tolist() for a, b in zip(where.starts, where.starts[1:], strict=False)]
    assert positions == [[3], [1, 5], [], [0, 2, 4], []]
    with torch.no_grad():
        assert token_order(idx, 5).order is None


def test_flops_count_the_windows():
    full, half = (train.flops_per_token(make_cfg(n_layer=2, block_size=32, window_pattern=p, window_size=8))
                  for p in ("L", "S"))
    pairs = sum(min(i + 1, 8) for i in range(32)) / 32  # of a block with a window, the diagonal counted whole
    assert full - half == pytest.approx(12 * 64 * (16 - pairs), rel=0.1)
