"""Matmuls by QuACK, on Hopper, whose epilogues also do what separate kernels would do after them.

MLP     relu^2 or its gradient, and in FP8 the amax and quantization. fc1's output goes to memory once, after relu^2,
        and its gradient once, as E4M3 and E5M2, or as bf16. Measured on an H100 in FP8 for 32,768 tokens, 1,280 wide:
        forward 0.357 ms, not 0.560; backward 0.668 ms (0.125 of it for a transpose), not 0.934. In bf16: +3.1%
        tokens/s and 6.7 GB less (H200, preset classic, vocabulary 50,304).
head    the sums of exp() over the softcapped logits of each token, so that the loss is known without reading the logits
        once more; for a head in FP8 with a softcap. cuBLAS promotes the head's sums to fp32, QuACK does not. +1.0%
        tokens/s (preset classic).
Muon    two of the three matmuls of an orthogonalisation step have symmetric results, of which QuACK computes half; and
        none copies the matrix that it adds, as torch.baddbmm does. 17.9 ms a step, not 25.2 (H200, d20, one GPU).
q, k, v in FP8 nothing is added; QuACK is faster than cuBLAS at this shape. +0.3% tokens/s.

QuACK (https://github.com/Dao-AILab/quack, PyPI: quack-kernels) compiles a kernel at its first use, which takes 4 to 10
seconds, and keeps it in a cache on disk.
"""

import functools
import math
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from nanofp8.config import UserError
from nanofp8.host import optional

# Compute capabilities on which QuACK's speed and loss were measured, by the blocks' format; "auto" takes it there
TRIED = {"fp8-delayed": ((9, 0),), "bf16": ((9, 0),)}


class Quack(NamedTuple):
    """Where QuACK multiplies, beside Muon's orthogonalisation."""

    fp8: bool = False   # in blocks in FP8, and in an FP8 head
    bf16: bool = False  # in MLPs in bf16; with fp8, those of evaluations and of HIGH_PRECISION_LAYERS


NO_QUACK = Quack()


@functools.cache
def library() -> tuple[ModuleType | None, str]:
    """Return the module with our epilogues, or None and the reason why it cannot be imported."""
    return optional("quack-kernels", "nanofp8.epilogue_functions", "QuACK")


def choose_quack(cfg: SimpleNamespace, device: torch.device, blocks: str) -> tuple[Quack, str]:
    """Return where QuACK multiplies, and what the start-up table says about it.

    blocks: format of the blocks, of precision.FORMATS, if our kernels run them; else "".
    Raises: UserError if USE_QUACK is True but QuACK cannot run.
    """
    if cfg.USE_QUACK is False or not blocks and cfg.USE_QUACK == "auto":
        return NO_QUACK, ""
    capability = torch.cuda.get_device_capability(device) if blocks else None
    if not blocks:
        missing = ("there is no GPU" if device.type != "cuda" else
                   "it needs our kernels, in bf16 or in FP8 with delayed scaling")
    elif capability[0] != 9:
        missing = "only on Hopper"
    elif cfg.USE_QUACK == "auto" and capability not in TRIED[blocks]:
        missing = f"its loss in {blocks} is not measured on this GPU; --USE_QUACK=True"
    else:
        missing = "" if library()[0] else library()[1]
    if missing and cfg.USE_QUACK is True:
        raise UserError(f"USE_QUACK=True cannot run: {missing}; use --USE_QUACK=auto", 2)
    if missing:
        return NO_QUACK, f"no QuACK: {missing}"
    # A run in FP8 computes too little in bf16 to be worth another kernel's compilation
    return Quack(blocks != "bf16", blocks == "bf16" or cfg.USE_QUACK is True), f"matmuls by {library()[1]}"


FAST = (("fp8_slow_accum", False),)  # sums stay in the tensor cores, as with cuBLAS's fast accumulation
SQUARES = dict(tile_M=128, tile_N=256, cluster_M=2, cluster_N=1)  # of symmetric results half of them are computed
TILE_N = 192  # columns that a warp group computes at once in PINGPONG matmuls
# Two warp groups take turns: one multiplies while the other runs its epilogue
PINGPONG = dict(tile_M=128, tile_N=TILE_N, cluster_M=2, cluster_N=1, pingpong=True, post_init_attrs=FAST)


def bf16_matmul(epilogue: str, a: Any, b: Any, c: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
    """Return a @ b.T (N, K) bf16, as an epilogue of epilogue_functions.py makes it.

    a (N, C), b (K, C): both fused.Fp8, or both bf16, where b may be a transposed view. c (N, K): the epilogue reads it.
    """
    if not isinstance(a, torch.Tensor):
        arguments |= dict(f=a.inverse_scale.view(1), g=b.inverse_scale.view(1))
        a, b = a.data, b.data
    out = torch.empty(len(a), len(b), dtype=torch.bfloat16, device=a.device)
    getattr(library()[0], epilogue).gemm(a, b, out, c, epi_args=arguments, **PINGPONG)
    return out


def plain_matmul(x: Any, weight: Any) -> torch.Tensor:
    """Return x @ weight.T (N, K) bf16. x (N, C), weight (K, C): fused.Fp8."""
    return bf16_matmul("plain", x, weight)


def logits_matmul(h: Any, weight: Any, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits h @ weight.T (N, V) bf16, and sums (N, tiles) fp32.

    The sums of a row add up to that of exp(softcap * tanh(logit / softcap) - softcap) over its V logits, as they are
    rounded to bf16. h (N, C), weight (V, C): fused.Fp8; softcap > 0.
    """
    N, V = len(h.data), len(weight.data)
    sums = torch.empty(N, -(-V // TILE_N), dtype=torch.float32, device=h.data.device)
    # With tanh(x) = 1 - 2 / (exp(2 x) + 1) a term is 2 ** (depth / (2 ** (rate * logit) + 1))
    rate, depth = 2 / softcap / math.log(2), -2 * softcap / math.log(2)
    return bf16_matmul("logits", h, weight, rate=rate, depth=depth, sums=sums), sums


def odd_polynomial(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """Return a X + b (X X^T) X + c (X X^T)^2 X for each matrix X of x (L, M, N) bf16, contiguous.

    M and N must be multiples of 8.
    """
    gram, inner, out = *x.new_empty(2, *x.shape[:2], x.shape[1]), torch.empty_like(x)
    library()[0].gemm_symmetric(x, x, gram, None, None, **SQUARES)
    library()[0].gemm_symmetric(gram, gram, inner, gram, None, **SQUARES, alpha=c, beta=b)
    library()[0].gemm(inner, x.mT, out, x, None, **SQUARES, beta=a)
    return out


def amax_of(parts: torch.Tensor, amax: torch.Tensor) -> None:
    """Raise amax (one element) to the largest of the epilogue's row maxima (N, tiles)."""
    torch.maximum(amax, parts.amax().view(1), out=amax)


def relu2_matmul(x: Any, weight: Any, scaling: Any) -> torch.Tensor:
    """Return relu(x @ weight.T)^2 (N, K): in E4M3 by `scaling`, whose amax is raised, or bf16.

    x (N, C), weight (K, C): fused.Fp8, or bf16. scaling: fused.Scaling; None: bf16.
    """
    if scaling is None:
        return bf16_matmul("relu2_bf16", x, weight)
    N, K = x.data.shape[0], weight.data.shape[0]
    out = torch.empty(N, K, dtype=scaling.dtype, device=x.data.device)
    parts = torch.empty(N, -(-K // TILE_N), dtype=torch.float32, device=x.data.device)
    library()[0].relu2.gemm(
        x.data, weight.data, out, None, **PINGPONG,
        epi_args=dict(f=x.inverse_scale.view(1), g=weight.inverse_scale.view(1), s=scaling.scale, amax=parts))
    amax_of(parts, scaling.amax)
    return out


def relu2_backward_matmul(grad: Any, weight: Any, activation: Any, scaling: Any) -> tuple[Any, Any]:
    """Return (grad @ weight.T) * 2 * sqrt(activation), the gradient of relu^2's input, as matmul operands.

    grad (N, C), weight (K, C), activation (N, K): fused.Fp8, or bf16. scaling: fused.Scaling, whose amax is raised;
    None: bf16. The root halves the error of the activation's rounding: in bf16 the gradient is off by 0.19%. Computed
    from relu^2's input by a matmul and a kernel, it is off by 0.29%. Where the input is below 1e-19, its square
    underflows, and the gradient is 0.
    Returns: fused.Fp8 (N, K) and (K, N), E5M2; or bf16 and its transposed view.
    """
    if scaling is None:
        d_input = bf16_matmul("relu2_backward_bf16", grad, weight, activation)
        return d_input, d_input.t()
    (N, K), device = activation.data.shape, activation.data.device
    rows = torch.empty(N, K, dtype=scaling.dtype, device=device)
    cols = torch.empty(K, N, dtype=scaling.dtype, device=device)
    parts = torch.empty(N, -(-K // 256), dtype=torch.float32, device=device)
    library()[0].relu2_backward.gemm(
        grad.data, weight.data, rows, activation.data, tile_M=128, tile_N=256, cluster_M=2, cluster_N=1,
        epi_args=dict(f=grad.inverse_scale.view(1), g=weight.inverse_scale.view(1),
                      h=activation.inverse_scale.view(1), s=scaling.scale, cols=cols.t(), amax=parts),
        post_init_attrs=FAST)
    amax_of(parts, scaling.amax)
    return grad._replace(data=rows, inverse_scale=scaling.inverse), grad._replace(
        data=cols, inverse_scale=scaling.inverse)
