"""Parts of the model in plain PyTorch."""

import torch


def rms_norm(x, eps):
    """RMSNorm without gain over the last dimension, computed in fp32, returned in bf16 (arXiv 1910.07467)."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).bfloat16()


def rope_qk_norm(qkv, cos, sin, n_head, eps):
    """Rotary position embedding (half-split) of q and k, then RMSNorm of each head without gain.

    Args:
        qkv: (B, T, 3*C) bf16, rows of q, then k, then v.
        cos, sin: (T, D/2) fp32 with D = C / n_head.
    Returns: q, k, v, each (B, T, n_head, D) bf16 and contiguous.
    Sources: RoPE arXiv 2104.09864; QK norm arXiv 2302.05442 (as RMSNorm: plain L2 norm slows convergence).
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).unbind(2)
    cos, sin = cos[None, :T, None, :], sin[None, :T, None, :]

    def rotate_and_norm(x):
        x1, x2 = x.float().chunk(2, dim=-1)
        return rms_norm(torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1), eps)

    return rotate_and_norm(q), rotate_and_norm(k), v.contiguous()


def rope_tables(block_size, head_size, base, device="cpu"):
    """Compute cos and sin of the rotary angles position * base^(-2i / head_size), i < head_size / 2."""
    half = head_size // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)
