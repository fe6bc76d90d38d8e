"""FP8 matmuls whose epilogue computes relu^2 or its gradient, records the amax and quantizes; by QuACK, on Hopper.

The two wide tensors of the MLP then never exist in bf16: fc1's output goes to memory once, as E4M3 after relu^2, and
its gradient once, as E5M2. Measured on an H100 for 32,768 tokens, 1,280 wide: forward 0.357 ms, not 0.560; backward
0.668 ms (0.125 of it for a transpose), not 0.934.

QuACK (https://github.com/Dao-AILab/quack, PyPI: quack-kernels) compiles a kernel at its first use, which takes 4 to 10
seconds, and keeps it in a cache on disk.
"""

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from nanofp8.config import UserError
from nanofp8.host import optional

TRIED = ((9, 0),)  # compute capabilities on which QuACK has trained; "auto" takes it there


@functools.cache
def library() -> tuple[ModuleType | None, str]:
    """Return the module with our epilogues, or None and the reason why it cannot be imported."""
    return optional("quack-kernels", "nanofp8.epilogue_functions", "QuACK")


def choose_quack(cfg: SimpleNamespace, device: torch.device, fp8: bool) -> tuple[bool, str]:
    """Return whether QuACK's matmuls run, and what the start-up table says about it.

    fp8: whether blocks run in FP8 by our kernels.
    Raises: UserError if USE_QUACK is True but QuACK cannot run.
    """
    if cfg.USE_QUACK is False or not fp8 and cfg.USE_QUACK == "auto":
        return False, ""
    if not fp8:
        missing = "it needs FP8 with delayed scaling in our kernels"
    elif torch.cuda.get_device_capability(device)[0] != 9:
        missing = "only on Hopper"
    elif cfg.USE_QUACK == "auto" and torch.cuda.get_device_capability(device) not in TRIED:
        missing = "not tried on this GPU; --USE_QUACK=True"
    else:
        missing = "" if library()[0] else library()[1]
    if missing and cfg.USE_QUACK is True:
        raise UserError(f"USE_QUACK=True cannot run: {missing}; use --USE_QUACK=auto", 2)
    return not missing, f"no QuACK: {missing}" if missing else f"relu^2 in the matmuls by {library()[1]}"


FAST = (("fp8_slow_accum", False),)  # sums stay in the tensor cores, as with cuBLAS's fast accumulation


def amax_of(parts: torch.Tensor, amax: torch.Tensor) -> None:
    """Raise amax (one element) to the largest of the epilogue's row maxima (N, tiles)."""
    torch.maximum(amax, parts.amax().view(1), out=amax)


def relu2_matmul(x: Any, weight: Any, scaling: Any) -> torch.Tensor:
    """Return relu(x @ weight.T)^2 (N, K) in E4M3 by `scaling`, whose amax is raised.

    x (N, C), weight (K, C): fused.Fp8. scaling: fused.Scaling.
    """
    N, K = x.data.shape[0], weight.data.shape[0]
    out = torch.empty(N, K, dtype=scaling.dtype, device=x.data.device)
    parts = torch.empty(N, -(-K // 192), dtype=torch.float32, device=x.data.device)
    library()[0].relu2.gemm(
        x.data, weight.data, out, None, tile_M=128, tile_N=192, cluster_M=2, cluster_N=1, pingpong=True,
        epi_args=dict(f=x.inverse_scale.view(1), g=weight.inverse_scale.view(1), s=scaling.scale, amax=parts),
        post_init_attrs=FAST)
    amax_of(parts, scaling.amax)
    return out


def relu2_backward_matmul(grad: Any, weight: Any, activation: Any, scaling: Any) -> tuple[Any, Any]:
    """Return (grad @ weight.T) * 2 * sqrt(activation), the gradient of relu^2's input, as matmul operands.

    grad (N, C), weight (K, C), activation (N, K): fused.Fp8. scaling: fused.Scaling, whose amax is raised.
    Returns: fused.Fp8 (N, K) and (K, N), E5M2.
    """
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
