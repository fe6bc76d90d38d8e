"""Measure what quantizing does to the tensors of a run: train.py's FP8_STATS_INTERVAL.

    python train.py --FP8_STATS_INTERVAL=50     # log.jsonl: kind "fp8_stats"; the picture: fp8_stats.png

Every FP8_STATS_INTERVAL steps, collect() runs one extra forward and backward pass on the first tokens of the next
micro-batch. Training time does not include it. The pass runs the blocks in plain bf16 (plain.py), whatever library and
kernels train them. It hands each operand of the blocks' matmuls, and of an FP8 head's, to
te_emulation.quantization_stats(). It changes no weights, optimizer state, data position, scales, amax history or random
numbers. Under DDP and FSDP2 every rank runs the pass on its own micro-batch, and rank 0's numbers are logged.
"""

import functools
import itertools
import math
import os

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from nanofp8 import plain, te_emulation

KINDS = ("input", "weight", "gradient")
TOKENS = 4096       # of the micro-batch, in whole sequences: more change the numbers little, and take their time
HEAD_TOKENS = 1024  # the first of them, whose logits' gradients are looked at: each has as many as there are words
# Matmul -> where its layer keeps delayed scaling's state:
# (layer, slots of input and weight in scaling_fwd, slot of the gradient in scaling_bwd)
MATMULS = {"attn.qkv": ("attn.qkv", (0, 1), 0), "attn.proj": ("attn.proj", (0, 1), 0),
           "mlp.fc1": ("mlp", (0, 1), 0), "mlp.fc2": ("mlp", (3, 4), 2)}

# =====================================================================================================
# The pass


def whole(parameter):
    """A parameter as a plain tensor; sharded ones are gathered, so all ranks must call."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def multiply(a, b):
    """a @ b of bf16 matrices, in bf16. A CPU multiplies in fp32, which is fast on every CPU."""
    return a @ b if a.is_cuda else (a.float() @ b.float()).to(a.dtype)


def rms_norm_with_gain(x, eps, gain):
    """RMSNorm with gain (C,) fp32 over the last dimension of x, in fp32, returned in bf16."""
    return (x.float() * plain.inverse_rms(x, eps) * gain).bfloat16()


class WatchedMatmul(torch.autograd.Function):
    """x (..., K) bf16 @ weight (N, K)^T; `see(kind, tensor)` is shown both, and the gradient of the result."""

    @staticmethod
    def forward(ctx, x, weight, see):
        see("input", x)
        see("weight", weight)
        ctx.weight, ctx.see = weight.to(x.dtype), see
        return multiply(x, ctx.weight.t())

    @staticmethod
    def backward(ctx, dy):
        ctx.see("gradient", dy)
        return multiply(dy, ctx.weight), None, None


def block_forward(block, x, cos, sin, n_head, eps, see):
    """A block of train.py's model on x (B, T, C) bf16; see(matmul, kind, tensor) is shown what its matmuls take."""

    def linear(name, h):
        weight = whole(block.get_parameter(plain.MATRICES[name]))
        return WatchedMatmul.apply(h, weight, lambda kind, tensor: see(name, kind, tensor.flatten(0, -2)))

    def attend(qkv):
        q, k, v = (heads.transpose(1, 2) for heads in plain.rope_qk_norm(qkv, cos, sin, n_head, eps))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def norm(name, h):
        return rms_norm_with_gain(h, eps, whole(block.get_parameter(plain.GAINS[name])))

    return plain.block_forward(x, linear, norm, attend)


def head_gradient(head, h, targets, loss_scale, see):
    """Gradient of loss_scale x summed cross-entropy for h (N, C) bf16, HEAD_TOKENS at a time.

    see(kind, tensor) is shown h, the weight, and the gradient of the first logits, fp32.
    """
    weight, gradients = whole(head.weight), []
    see("input", h)
    see("weight", weight)
    weight = weight.to(h.dtype)
    for hc, tc in zip(h.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
        logits = multiply(hc, weight.t()).float().requires_grad_()
        loss = F.cross_entropy(plain.softcap(logits, head.softcap), tc, ignore_index=-1, reduction="sum") * loss_scale
        (gradient,) = torch.autograd.grad(loss, logits)
        if not gradients:
            see("gradient", gradient)
        gradients.append(multiply(gradient.to(h.dtype), weight))
    return torch.cat(gradients)


def collect(model, x, y, recipe, scales, in_bf16, loss_scale, logit_scale=None):
    """Statistics of one micro-batch.

    Gradients are those of the mean loss of a step, the head's too, which training multiplies by loss_scale only after
    its matmuls.

    A block's inputs are kept from a first pass without gradients; then, from the last block to the first, each runs
    again with them, so that no more than one block's activations exist at once.

    Args:
        model: train.py's GPT, plain, or sharded by FSDP2.
        x, y: (B, T) token ids and targets; the first sequences are looked at, up to TOKENS tokens, and at least one.
        recipe: of te_emulation.py or of Transformer Engine.
        scales: train.fp8_state(model), for delayed scaling's live scales.
        in_bf16: names of the layers that are not quantized; they have no statistics, {"blocks.0.attn.qkv": {}}.
        loss_scale: what training multiplies a micro-batch's summed loss by.
        logit_scale: of an FP8 head, the scale of the summed loss's gradients; None: the head is in bf16, and has no
            statistics.
    Returns: {"blocks.0.attn.qkv": {"input": {"amax": 3.1, ...}, "weight": {...}, "gradient": {...}}, ...}; numbers that
        are not finite are None.
    """
    cfg, seen = model.cfg, {}
    x, y = (t[:max(1, TOKENS // t.shape[1])] for t in (x, y))
    random_state = te_emulation.get_rng_state()

    def watch(block, matmul, kind, tensor):
        layer, forward_slots, backward_slot = MATMULS[matmul]
        if f"blocks.{block}.{layer}" in in_bf16:
            return
        scale = None
        if recipe.delayed():
            held, slot = "scaling_fwd", forward_slots[kind == "weight"]
            if kind == "gradient":
                held, slot = "scaling_bwd", backward_slot
            scale = scales[f"blocks.{block}.{layer}.{held}.scale"][slot]
        seen[f"blocks.{block}.{matmul}", kind] = te_emulation.quantization_stats(tensor, recipe, kind, scale)

    def watch_head(kind, tensor):
        if logit_scale is not None:
            scale = torch.tensor(logit_scale / loss_scale, device=tensor.device) if kind == "gradient" else None
            recipe_of_head = te_emulation.recipe.Float8CurrentScaling()
            seen["head", kind] = te_emulation.quantization_stats(tensor, recipe_of_head, kind, scale)

    def run_block(i, h, see):
        return block_forward(model.blocks[i], h, model.cos, model.sin, cfg.n_head, cfg.norm_eps, see)

    with torch.no_grad():
        inputs = [plain.rms_norm(F.embedding(x.long(), whole(model.embed.weight)), cfg.norm_eps)]
        for i in range(cfg.n_layer):
            inputs.append(run_block(i, inputs[-1], lambda *_: None))
    last = inputs.pop().requires_grad_()
    h = rms_norm_with_gain(last, cfg.norm_eps, whole(model.norm.weight))
    gradient = head_gradient(model.head, h.detach().flatten(0, 1), y.flatten(), loss_scale, watch_head).view_as(h)
    (gradient,) = torch.autograd.grad(h, last, gradient)
    for i in reversed(range(cfg.n_layer)):
        h = inputs.pop().requires_grad_()
        out = run_block(i, h, functools.partial(watch, i))
        (gradient,) = torch.autograd.grad(out, h, gradient)
    te_emulation.set_rng_state(random_state)

    layers = {}
    if seen:
        rows = torch.stack(list(seen.values())).tolist()  # waits for the GPU, once
        for (layer, kind), row in zip(seen, rows, strict=True):
            numbers = [v if math.isfinite(v) else None for v in row]
            layers.setdefault(layer, {})[kind] = dict(zip(te_emulation.STATISTICS, numbers, strict=True))
    names = [f"blocks.{i}.{m}" for i in range(cfg.n_layer) for m in MATMULS] + ["head"]
    return {n: {k: layers[n][k] for k in KINDS} if n in layers else {} for n in names}


# =====================================================================================================
# The picture

TITLES = {"amax": "largest magnitude (amax)", "scale": "scale", "saturated": "saturated, share of non-zero values",
          "underflow": "become zero, share of non-zero values", "error": "relative quantization error"}
FLOOR = 1e-6  # shares below are drawn as none


def plot(records, path):
    """Heat maps of a run's "fp8_stats" records: layers x steps, a panel for each statistic and kind of tensor."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import NullFormatter

    records = [r for r in records if r["kind"] == "fp8_stats" and any(r["layers"].values())]
    if not records:
        return
    n_blocks = 1 + max(int(name.split(".")[1]) for r in records for name in r["layers"] if name != "head")
    bands = [[f"blocks.{i}.{m}" for i in range(n_blocks)] for m in MATMULS]  # one for each matmul
    if any(r["layers"].get("head") for r in records):
        bands.append(["head"] * max(1, n_blocks // 4))  # drawn higher than it is, to be seen
    layers, ends = sum(bands, []), list(itertools.accumulate(map(len, bands)))
    steps = [r["step"] + 1 for r in records]
    stats = te_emulation.STATISTICS
    fig, axes = plt.subplots(len(stats), len(KINDS), figsize=(13, 15), sharex=True, sharey=True, layout="constrained")
    for row, stat in zip(axes, stats, strict=True):
        for ax, kind in zip(row, KINDS, strict=True):
            cells = [[r["layers"].get(n, {}).get(kind, {}).get(stat) for r in records] for n in layers]
            grid = np.ma.masked_invalid(np.array(cells, dtype=float))
            share = stat in ("saturated", "underflow")
            cmap = matplotlib.colormaps["magma_r" if share else "viridis"].with_extremes(bad="0.88", under="white")
            known = grid.compressed()
            if share:
                norm = LogNorm(FLOOR, 1.0)
            elif stat == "error":
                low, high = (known.min(), known.max()) if known.size and known.max() > 0 else (0, 1)
                norm = Normalize(min(low, 0.8 * high), high)
            else:
                positive = known[known > 0]
                low, high = (positive.min(), positive.max()) if positive.size else (1, 1)
                norm = LogNorm(low, high if high > low else low * 10)
                grid = np.ma.masked_less_equal(grid, 0)
            image = ax.imshow(np.ma.maximum(grid, FLOOR / 2) if share else grid, aspect="auto", interpolation="nearest",
                              cmap=cmap, norm=norm, extent=(-0.5, len(steps) - 0.5, len(layers) - 0.5, -0.5))
            bar = fig.colorbar(image, ax=ax, pad=0.01, aspect=16, extend="min" if share else "neither")
            bar.ax.tick_params(which="both", labelsize=7)
            if share or (norm.vmin > 0 and norm.vmax > 30 * norm.vmin):  # whole powers of ten are enough
                bar.ax.yaxis.set_minor_formatter(NullFormatter())
            for end in ends[:-1]:
                ax.axhline(end - 0.5, color="0.35", linewidth=0.8)
            ax.set_title(kind if stat == stats[0] else "", fontsize=12, fontweight="bold")
            ax.tick_params(labelsize=8, left=False)
            for side in ax.spines.values():
                side.set_color("0.35")
        row[0].set_ylabel(TITLES[stat], fontsize=9)
    middles = [end - len(band) / 2 - 0.5 for end, band in zip(ends, bands, strict=True)]
    axes[0, 0].set_yticks(middles, [band[0].split(".")[-1] for band in bands])
    shown = sorted({round(i * (len(steps) - 1) / 5) for i in range(6)})
    axes[0, 0].set_xticks(shown, [f"{steps[i]:,}" for i in shown])
    for ax in axes[-1]:
        ax.set_xlabel("optimizer steps", fontsize=9)
    fig.suptitle(f"What {records[-1]['format']} does to the matmuls' operands\n"
                 f"each matmul's band goes from block 0 (top) to block {n_blocks - 1} (bottom); "
                 "grey: kept in bf16, or nothing to show", fontsize=11)
    temporary = path + ".new"
    fig.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)
    plt.close(fig)
