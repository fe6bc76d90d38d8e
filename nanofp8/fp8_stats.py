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
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanofp8 import plain, te_emulation
from nanofp8.files import replace_file
from nanofp8.parts import mix_residual
from nanofp8.plots import pyplot
from nanofp8.sizes import windows

KINDS = ("input", "weight", "gradient")
TOKENS = 4096       # tokens of the micro-batch that the pass uses, in whole sequences; more hardly change the numbers
HEAD_TOKENS = 1024  # the head's gradient statistics use the first of them: logits are large (HEAD_TOKENS x vocab_size)
# Matmul -> where its layer keeps delayed scaling's state:
# (layer, slots of input and weight in scaling_fwd, slot of the gradient in scaling_bwd)
MATMULS = {"attn.qkv": ("attn.qkv", (0, 1), 0), "attn.proj": ("attn.proj", (0, 1), 0),
           "mlp.fc1": ("mlp", (0, 1), 0), "mlp.fc2": ("mlp", (3, 4), 2)}
Statistics = dict[str, dict[str, dict[str, float | None]]]  # layer -> kind of tensor -> name of the number -> number

# =====================================================================================================
# The pass


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter as a plain tensor. A sharded one is gathered, so all ranks must call this."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of bf16 matrices, in bf16. On a CPU the product is computed in fp32, which every CPU does fast."""
    return a @ b if a.is_cuda else (a.float() @ b.float()).to(a.dtype)


def rms_norm_with_gain(x: Tensor, eps: float, gain: Tensor) -> Tensor:
    """Apply RMSNorm with gain (C,) fp32 over the last dimension of x, computed in fp32, returned in bf16."""
    return (x.float() * plain.inverse_rms(x, eps) * gain).bfloat16()


class WatchedMatmul(torch.autograd.Function):
    """Compute x (..., K) bf16 @ weight (N, K)^T. see(kind, tensor) gets x, the weight and the result's gradient."""

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


def block_forward(
    model: torch.nn.Module, i: int, tokens: Tensor, x: Tensor, x0: Tensor, see: Callable[[str, str, Tensor], None],
) -> Tensor:
    """Run block number i of train.py's model on x (B, T, C) bf16, with its present weights and gains.

    tokens (B, T) int64; x0 (B, T, C) bf16, their normalized embeddings (used with USE_X0). see(matmul, kind, tensor) is
    called with each operand of the block's matmuls as a matrix; with gradients in backward.
    """
    block, cfg = model.blocks[i], model.cfg
    window, softmax_scale = windows(cfg)[i], cfg.qk_scale ** 2 * (cfg.n_embd // cfg.n_head) ** -0.5

    def linear(name, h):
        weight = whole(block.get_parameter(plain.MATRICES[name]))
        return WatchedMatmul.apply(h, weight, lambda kind, tensor: see(name, kind, tensor.flatten(0, -2)))

    def attend(qkv, h):
        q, k, v = plain.rope_qk_norm(qkv, model.cos, model.sin, cfg.n_head, cfg.norm_eps)
        if block.attn.value_embed is not None:
            table, gate = (whole(block.get_parameter(name)) for name in (plain.TABLE, plain.GATE))
            v = plain.add_values(v, h, gate, F.embedding(tokens, table))
        T = tokens.shape[1]
        mask = None if window >= T else te_emulation.window_mask(T, window - 1, x.device)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=softmax_scale)
        return y.transpose(1, 2).flatten(2)

    def norm(name, h):
        return rms_norm_with_gain(h, cfg.norm_eps, whole(block.get_parameter(plain.GAINS[name])))

    if cfg.USE_X0:
        x = mix_residual(x, x0, whole(model.scales.x)[i], whole(model.scales.x0)[i])
    return plain.block_forward(x, linear, norm, attend)


def head_gradient(
    head: torch.nn.Module, h: Tensor, targets: Tensor, loss_scale: float, see: Callable[[str, Tensor], None]
) -> Tensor:
    """Return the gradient (N, C) bf16 of loss_scale x summed cross-entropy with respect to h (N, C) bf16.

    Works on HEAD_TOKENS tokens at a time. see(kind, tensor) is called with h, the weight, and the gradient of the
    first HEAD_TOKENS tokens' logits in fp32.
    """
    weight, gradients = whole(head.weight), []
    see("input", h)
    see("weight", weight)
    weight = weight.to(h.dtype)
    for some_h, some_targets in zip(h.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
        logits = multiply(some_h, weight.t()).float().requires_grad_()
        capped = plain.softcap(logits, head.softcap)
        loss = F.cross_entropy(capped, some_targets, ignore_index=-1, reduction="sum") * loss_scale
        (gradient,) = torch.autograd.grad(loss, logits)
        if not gradients:
            see("gradient", gradient)
        gradients.append(multiply(gradient.to(h.dtype), weight))
    return torch.cat(gradients)


@dataclass
class Recorder:
    """Compute the statistics of each operand as the pass reaches it, without waiting for the GPU."""

    recipe: Any                # of te_emulation.py or of Transformer Engine
    scales: dict[str, Tensor]  # precision.fp8_state(model): delayed scaling's live scales
    in_bf16: Collection[str]   # names of the layers that are not quantized
    loss_scale: float          # factor of a micro-batch's summed loss
    logit_scale: float | None  # scale of the gradients of an FP8 head's logits; None: the head is in bf16
    seen: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (matmul, kind) -> fp32 (5,), the STATISTICS

    def see_block(self, block: int, matmul: str, kind: str, tensor: Tensor) -> None:
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

    def see_head(self, kind: str, tensor: Tensor) -> None:
        """Record an operand (M, N) of the head's matmuls, which use current scaling whatever the recipe."""
        if self.logit_scale is None:
            return
        scale = None
        if kind == "gradient":
            scale = torch.tensor(self.logit_scale / self.loss_scale, device=tensor.device)
        recipe = te_emulation.recipe.Float8CurrentScaling()
        self.seen["head", kind] = te_emulation.quantization_stats(tensor, recipe, kind, scale)

    def results(self, n_layer: int) -> Statistics:
        """Return what collect() returns. This waits for the GPU, once."""
        layers = {f"blocks.{i}.{matmul}": {} for i in range(n_layer) for matmul in MATMULS} | {"head": {}}
        rows = torch.stack(list(self.seen.values())).tolist() if self.seen else []
        found = dict(zip(self.seen, rows, strict=True))
        for layer, kind in itertools.product(layers, KINDS):
            if (layer, kind) in found:
                numbers = [number if math.isfinite(number) else None for number in found[layer, kind]]
                layers[layer][kind] = dict(zip(te_emulation.STATISTICS, numbers, strict=True))
        return layers


def run_pass(model: torch.nn.Module, x: Tensor, y: Tensor, recorder: Recorder) -> None:
    """Run one forward and backward pass on token ids x and targets y (B, T), and show the recorder each operand.

    A first forward pass without gradients keeps the input of each block. Then, from the last block to the first, each
    block runs again with gradients, so that only one block's activations exist at once. The gradient of the token
    embedding is not computed: no matmul gets it.
    """
    cfg, tokens = model.cfg, x.long()
    with torch.no_grad():
        x0 = plain.rms_norm(F.embedding(tokens, whole(model.embed.weight)), cfg.norm_eps)
        inputs = [x0]
        for i in range(cfg.n_layer):
            inputs.append(block_forward(model, i, tokens, inputs[-1], x0, lambda *_: None))
    last = inputs.pop().requires_grad_()
    h = rms_norm_with_gain(last, cfg.norm_eps, whole(model.norm.weight))
    gradient = head_gradient(model.head, h.detach().flatten(0, 1), y.flatten(), recorder.loss_scale, recorder.see_head)
    (gradient,) = torch.autograd.grad(h, last, gradient.view_as(h))
    for i in reversed(range(cfg.n_layer)):
        h = inputs.pop().detach().requires_grad_()  # the first block's is x0, which must stay without gradients
        out = block_forward(model, i, tokens, h, x0, functools.partial(recorder.see_block, i))
        (gradient,) = torch.autograd.grad(out, h, gradient)


def collect(
    model: torch.nn.Module, x: Tensor, y: Tensor, recipe: Any, scales: dict[str, Tensor], in_bf16: Collection[str],
    loss_scale: float, logit_scale: float | None = None,
) -> Statistics:
    """Compute the statistics of one micro-batch. All ranks must call this if the parameters are sharded.

    Gradients are those of a step's mean loss. That holds for the head as well, although training quantizes its
    gradients without loss_scale, which is a factor of their inverse scale.

    Args:
        model: train.py's GPT, not wrapped, or sharded by FSDP2.
        x, y: (B, T) token ids and targets (int64; -1: no target). The first sequences are used: TOKENS tokens at most,
            one sequence at least.
        recipe: the blocks' recipe, of te_emulation.py or of Transformer Engine.
        scales: precision.fp8_state(model), which holds delayed scaling's live scales.
        in_bf16: names of the layers that are not quantized. They have no statistics: {"blocks.0.attn.qkv": {}}.
        loss_scale: the factor by which training multiplies a micro-batch's summed loss.
        logit_scale: the scale of the gradients of an FP8 head's logits (of the summed loss). None: the head is in
            bf16 and has no statistics.
    Returns: {"blocks.0.attn.qkv": {"input": {"amax": 3.1, ...}, "weight": {...}, "gradient": {...}}, ..., "head": ...}.
        The names of the numbers are te_emulation.STATISTICS. A number that is not finite is None.
    """
    sequences = max(1, TOKENS // x.shape[1])
    x, y = x[:sequences], y[:sequences]
    recorder = Recorder(recipe, scales, in_bf16, loss_scale, logit_scale)
    random_state = te_emulation.get_rng_state()
    run_pass(model, x, y, recorder)
    te_emulation.set_rng_state(random_state)
    return recorder.results(model.cfg.n_layer)


# =====================================================================================================
# The picture

TITLES = {"amax": "largest magnitude (amax)", "scale": "scale", "saturated": "saturated, share of non-zero values",
          "underflow": "underflow to zero, share of non-zero values", "error": "relative quantization error"}
SHARES = ("saturated", "underflow")
FLOOR = 1e-6  # smaller shares are drawn like 0


def bands_of(records: list[dict]) -> tuple[list[list[str]], int]:
    """Return the layers to draw, from top to bottom, and the number of blocks.

    The layers come as bands, lists of layer names: one band for each matmul of the blocks, then the head's, if any.
    """
    n_blocks = 1 + max(int(name.split(".")[1]) for record in records for name in record["layers"] if name != "head")
    bands = [[f"blocks.{i}.{matmul}" for i in range(n_blocks)] for matmul in MATMULS]
    if any(record["layers"].get("head") for record in records):
        bands.append(["head"] * max(1, n_blocks // 4))  # several rows high: one row is too thin to see
    return bands, n_blocks


def color_scale(stat: str, grid: Any) -> tuple[Any, Any]:
    """Choose the color scale for a masked array of one statistic: (matplotlib norm, array with more cells masked)."""
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


def draw_panel(axes: Any, records: list[dict], bands: list[list[str]], stat: str, kind: str) -> None:
    """Draw one heat map with its color bar: layers x steps, one statistic of one kind of tensor."""
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


def plot(records: list[dict], path: str) -> None:
    """Draw heat maps of a run's "fp8_stats" records into the PNG file `path`; nothing if no record has numbers.

    Each statistic and kind of tensor has a panel, layers x steps. Records of other kinds are ignored.
    Raises: ImportError without matplotlib; OSError. `path` never holds half a picture.
    """
    plt = pyplot()

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
