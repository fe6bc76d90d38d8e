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
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from nanofp8 import plain, te_emulation
from nanofp8.files import replace_file

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


@dataclass
class Recorder:
    """Take the statistics of each tensor that the pass shows, without waiting for the GPU."""

    recipe: Any           # of te_emulation.py or of Transformer Engine
    scales: dict          # precision.fp8_state(model): delayed scaling's live scales
    in_bf16: Collection   # names of the layers that are not quantized
    loss_scale: float     # factor of a micro-batch's summed loss
    logit_scale: float | None  # scale of the gradients of an FP8 head's logits; None: the head is in bf16
    seen: dict = field(default_factory=dict)  # {(matmul, kind): fp32 (5,), the STATISTICS}

    def see_block(self, block, matmul, kind, tensor):
        """Record an operand (M, N) of a matmul of block number `block`."""
        layer, forward_slots, backward_slot = MATMULS[matmul]
        if f"blocks.{block}.{layer}" in self.in_bf16:
            return
        scale = None
        if self.recipe.delayed():
            held, slot = "scaling_fwd", forward_slots[kind == "weight"]
            if kind == "gradient":
                held, slot = "scaling_bwd", backward_slot
            scale = self.scales[f"blocks.{block}.{layer}.{held}.scale"][slot]
        self.seen[f"blocks.{block}.{matmul}", kind] = te_emulation.quantization_stats(tensor, self.recipe, kind, scale)

    def see_head(self, kind, tensor):
        """Record an operand (M, N) of the head's matmuls, which use current scaling whatever the recipe."""
        if self.logit_scale is None:
            return
        scale = None
        if kind == "gradient":
            scale = torch.tensor(self.logit_scale / self.loss_scale, device=tensor.device)
        recipe = te_emulation.recipe.Float8CurrentScaling()
        self.seen["head", kind] = te_emulation.quantization_stats(tensor, recipe, kind, scale)

    def results(self, n_layer):
        """Return what collect() returns. Waits for the GPU, once."""
        layers = {f"blocks.{i}.{matmul}": {} for i in range(n_layer) for matmul in MATMULS} | {"head": {}}
        rows = torch.stack(list(self.seen.values())).tolist() if self.seen else []
        found = dict(zip(self.seen, rows, strict=True))
        for layer, kind in itertools.product(layers, KINDS):
            if (layer, kind) in found:
                numbers = [v if math.isfinite(v) else None for v in found[layer, kind]]
                layers[layer][kind] = dict(zip(te_emulation.STATISTICS, numbers, strict=True))
        return layers


def run_pass(model, x, y, recorder):
    """Run one forward and backward pass that shows the recorder each operand.

    A first forward pass without gradients keeps the input of each block. Then, from the last block to the first, each
    block runs again with gradients, so that only one block's activations exist at once.
    """
    cfg = model.cfg

    def run_block(i, h, see):
        return block_forward(model.blocks[i], h, model.cos, model.sin, cfg.n_head, cfg.norm_eps, see)

    with torch.no_grad():
        inputs = [plain.rms_norm(F.embedding(x.long(), whole(model.embed.weight)), cfg.norm_eps)]
        for i in range(cfg.n_layer):
            inputs.append(run_block(i, inputs[-1], lambda *_: None))
    last = inputs.pop().requires_grad_()
    h = rms_norm_with_gain(last, cfg.norm_eps, whole(model.norm.weight))
    gradient = head_gradient(model.head, h.detach().flatten(0, 1), y.flatten(), recorder.loss_scale, recorder.see_head)
    (gradient,) = torch.autograd.grad(h, last, gradient.view_as(h))
    for i in reversed(range(cfg.n_layer)):
        h = inputs.pop().requires_grad_()
        out = run_block(i, h, functools.partial(recorder.see_block, i))
        (gradient,) = torch.autograd.grad(out, h, gradient)


def collect(model, x, y, recipe, scales, in_bf16, loss_scale, logit_scale=None):
    """Statistics of one micro-batch.

    Gradients are those of the mean loss of a step, the head's too, which training multiplies by loss_scale only after
    its matmuls.

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
    x, y = (t[:max(1, TOKENS // t.shape[1])] for t in (x, y))
    recorder = Recorder(recipe, scales, in_bf16, loss_scale, logit_scale)
    random_state = te_emulation.get_rng_state()
    run_pass(model, x, y, recorder)
    te_emulation.set_rng_state(random_state)
    return recorder.results(model.cfg.n_layer)


# =====================================================================================================
# The picture

TITLES = {"amax": "largest magnitude (amax)", "scale": "scale", "saturated": "saturated, share of non-zero values",
          "underflow": "become zero, share of non-zero values", "error": "relative quantization error"}
SHARES = ("saturated", "underflow")
FLOOR = 1e-6  # shares below are drawn as none


def bands_of(records):
    """Return the layers to draw from top to bottom, in bands: one band for each matmul of the blocks, and the head's.

    Returns: (bands, n_blocks); bands is a list of lists of layer names.
    """
    n_blocks = 1 + max(int(name.split(".")[1]) for record in records for name in record["layers"] if name != "head")
    bands = [[f"blocks.{i}.{matmul}" for i in range(n_blocks)] for matmul in MATMULS]
    if any(record["layers"].get("head") for record in records):
        bands.append(["head"] * max(1, n_blocks // 4))  # drawn several rows high, or it could not be seen
    return bands, n_blocks


def color_scale(stat, grid):
    """Choose matplotlib's norm for a grid of one statistic, and mask what it cannot show: (norm, grid)."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    known = grid.compressed()
    if stat in SHARES:
        return LogNorm(FLOOR, 1.0), np.ma.maximum(grid, FLOOR / 2)
    if stat == "error":
        low, high = (known.min(), known.max()) if known.size and known.max() > 0 else (0, 1)
        return Normalize(min(low, 0.8 * high), high), grid
    positive = known[known > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1, 1)
    return LogNorm(low, high if high > low else low * 10), np.ma.masked_less_equal(grid, 0)


def draw_panel(axes, records, bands, stat, kind):
    """Draw one heat map: layers x steps, one statistic of one kind of tensor, with its color bar."""
    import matplotlib
    import numpy as np
    from matplotlib.ticker import NullFormatter

    layers = sum(bands, [])
    cells = [[record["layers"].get(name, {}).get(kind, {}).get(stat) for record in records] for name in layers]
    norm, grid = color_scale(stat, np.ma.masked_invalid(np.array(cells, dtype=float)))
    share = stat in SHARES
    cmap = matplotlib.colormaps["magma_r" if share else "viridis"].with_extremes(bad="0.88", under="white")
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=cmap, norm=norm,
                        extent=(-0.5, len(records) - 0.5, len(layers) - 0.5, -0.5))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=16, extend="min" if share else "neither")
    bar.ax.tick_params(which="both", labelsize=7)
    if share or (norm.vmin > 0 and norm.vmax > 30 * norm.vmin):  # label whole powers of ten only
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    for end in itertools.accumulate(map(len, bands[:-1])):
        axes.axhline(end - 0.5, color="0.35", linewidth=0.8)
    axes.set_title(kind if stat == te_emulation.STATISTICS[0] else "", fontsize=12, fontweight="bold")
    axes.tick_params(labelsize=8, left=False)
    for side in axes.spines.values():
        side.set_color("0.35")


def plot(records, path):
    """Heat maps of a run's "fp8_stats" records: layers x steps, a panel for each statistic and kind of tensor."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [record for record in records if record["kind"] == "fp8_stats" and any(record["layers"].values())]
    if not records:
        return
    bands, n_blocks = bands_of(records)
    fig, grid = plt.subplots(len(te_emulation.STATISTICS), len(KINDS), figsize=(13, 15), sharex=True, sharey=True,
                             layout="constrained")
    for row, stat in zip(grid, te_emulation.STATISTICS, strict=True):
        for axes, kind in zip(row, KINDS, strict=True):
            draw_panel(axes, records, bands, stat, kind)
        row[0].set_ylabel(TITLES[stat], fontsize=9)
    ends = itertools.accumulate(map(len, bands))
    middles = [end - len(band) / 2 - 0.5 for end, band in zip(ends, bands, strict=True)]
    grid[0, 0].set_yticks(middles, [band[0].split(".")[-1] for band in bands])
    shown = sorted({round(i * (len(records) - 1) / 5) for i in range(6)})
    grid[0, 0].set_xticks(shown, [f"{records[i]['step'] + 1:,}" for i in shown])
    for axes in grid[-1]:
        axes.set_xlabel("optimizer steps", fontsize=9)
    fig.suptitle(f"What {records[-1]['format']} does to the matmuls' operands\n"
                 f"each matmul's band goes from block 0 (top) to block {n_blocks - 1} (bottom); "
                 "grey: kept in bf16, or nothing to show", fontsize=11)
    replace_file(path, lambda temporary: fig.savefig(temporary, dpi=110, format="png"))
    plt.close(fig)
