"""Causal attention by Transformer Engine (cuDNN), flash-attn-4 or torch.

Measured on an H100 (16 sequences of 2,048 tokens, 10 heads of 128, forward and backward pass of one layer): Transformer
Engine with cuDNN 1.458 ms, flash-attn-4 1.296 ms; with a window of 512 tokens 0.963 and 0.860 ms.

flash-attn-4 (https://github.com/Dao-AILab/flash-attention, PyPI: flash-attn-4) is a beta. It compiles its kernels at
the first use.
"""

import functools
import os
import warnings
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F

from nanofp8 import cards
from nanofp8.config import UserError
from nanofp8.host import cudnn_version, optional
from nanofp8.sizes import has_windows

TRIED = ((9, 0),)  # compute capabilities on which flash-attn-4 has trained; "auto" takes it there

# Keep compiled kernels on disk. Read when flash-attn-4 is imported, which Transformer Engine does in its own import
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# Where cuDNN has no fused attention, Transformer Engine (2.18 to 2.20.2 ask this variable) would take flash-attn-4. It
# gives causal attention the window (-1, 0), of which flash-attn-4 4.0.0b36 makes zeros (TransformerEngine issue 3528)
os.environ.setdefault("NVTE_FLASH_ATTN_V4", "0")


@functools.cache
def flash4() -> tuple[ModuleType | None, str]:
    """Return flash-attn-4's functions, or None and the reason why it cannot run."""
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # of the compiler, once a kernel
    return optional("flash-attn-4", "flash_attn.cute.interface", "flash-attn-4")


def unfused(cfg: SimpleNamespace, device: torch.device) -> str:
    """Return why Transformer Engine's attention will be slow on this GPU, and what to do; "" if it will not.

    Without cuDNN's fused attention it takes flash-attn if that is installed and fits, else plain matmuls, whose memory
    grows with block_size^2.
    """
    why = cards.unfused_attention(torch.cuda.get_device_capability(device), cfg.n_embd // cfg.n_head,
                                  cudnn_version(torch)[0])
    if not why:
        return ""
    without = " with --window_pattern=L" if has_windows(cfg) else ""
    remedy = f"use --attention=torch{without}" + (", or update cuDNN" if "older" in why else "")
    return f"unfused, slow and with memory for block_size^2, unless flash-attn steps in: {why}; {remedy}"


def choose_attention(cfg: SimpleNamespace, device: torch.device, emulated: bool) -> tuple[str, str, str]:
    """Return which attention runs, "te", "flash4" or "torch", what the start-up table says about it, and a warning.

    emulated: whether Transformer Engine is emulated.
    Raises: UserError if the one that cfg.attention asks for cannot run.
    """
    head, wanted = cfg.n_embd // cfg.n_head, cfg.attention
    if wanted == "torch":
        if has_windows(cfg):
            raise UserError("attention='torch' has no windows; use --window_pattern=L, or another --attention", 2)
        return "torch", "torch's scaled_dot_product_attention", ""
    by_te = "torch, by the emulation" if emulated else "Transformer Engine"
    warning = unfused(cfg, device) if device.type == "cuda" and not emulated else ""
    if wanted == "cudnn" and emulated:
        raise UserError("attention='cudnn' cannot run: Transformer Engine, which calls it, is emulated here; use "
                        "--attention=auto", 2)
    if wanted == "cudnn":
        return "te", by_te, warning
    if device.type != "cuda":
        missing = "it needs a GPU"
    elif (capability := torch.cuda.get_device_capability(device))[0] < 9 or head not in (64, 128):
        missing = f"no kernels for compute capability {capability[0]}.{capability[1]} and heads of {head}"
    elif wanted == "auto" and capability not in TRIED:
        missing = "not tried on this GPU; --attention=flash4"
    else:
        missing = "" if flash4()[0] else flash4()[1]
    if not missing:
        return "flash4", flash4()[1], ""
    if wanted == "flash4":
        raise UserError(f"attention='flash4' cannot run: {missing}; use --attention=auto", 2)
    return "te", by_te if device.type != "cuda" else f"{by_te} (flash-attn-4: {missing})", warning


class FlashAttention4(torch.autograd.Function):
    """Compute causal attention by flash-attn-4.

    q, k, v: (B, T, H, D) bf16. window: number of tokens that each attends to, its own included; None: all before it.
    Returns: (B, T, H, D) bf16. The gradients of q, k and v are views of one tensor, as rope_qk_norm_grad() wants them.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None,
                scale: float) -> torch.Tensor:
        ctx.options = dict(softmax_scale=scale, causal=True)
        if window is not None:
            ctx.options |= dict(window_size_left=window - 1, window_size_right=0)
        out, lse = flash4()[0]._flash_attn_fwd(q, k, v, return_lse=True, **ctx.options)[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out: torch.Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = q.new_empty(*q.shape[:2], 3, *q.shape[2:]).unbind(2)
        flash4()[0]._flash_attn_bwd(q, k, v, out, d_out, lse, dq=dq, dk=dk, dv=dv, **ctx.options)
        return dq, dk, dv, None, None


class CausalAttention(torch.nn.Module):
    """Causal attention over all tokens, or over the last `window`; by flash-attn-4 or torch."""

    def __init__(self, name: str, window: int | None, scale: float):
        """name: "flash4" or "torch", which has no windows. scale: factor on q @ k.T."""
        super().__init__()
        self.name, self.window, self.scale = name, window, scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return (B, T, H * D) bf16 for q, k, v (B, T, H, D) bf16."""
        if self.name == "flash4":
            return FlashAttention4.apply(q, k, v, self.window, self.scale).flatten(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale).transpose(1, 2).flatten(2)


def make_attention(cfg: SimpleNamespace, name: str, window: int, te: ModuleType) -> torch.nn.Module:
    """Return a module from q, k, v (B, T, H, D) to (B, T, H * D).

    name: from choose_attention(). window: number of tokens that each attends to. te: Transformer Engine or its
    emulation.
    """
    head, limit = cfg.n_embd // cfg.n_head, window if window < cfg.block_size else None
    scale = cfg.qk_scale ** 2 * head ** -0.5
    if name != "te":
        return CausalAttention(name, limit, scale)
    # It asks for an argument that older versions do not have
    warnings.filterwarnings("ignore", "Relying on pointer-based detection", DeprecationWarning)
    return te.DotProductAttention(cfg.n_head, head, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal",
                                  window_size=None if limit is None else (limit - 1, 0), softmax_scale=scale)
