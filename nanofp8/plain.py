"""The model in plain PyTorch: for reading, for statistics (fp8_stats.py) and for sampling (sample.py).

train.py builds the same model from Transformer Engine's modules and from Triton kernels. Shapes here: B sequences of
T tokens, width C, heads of size D.

    embedding -> RMSNorm -> n_layer x block_forward -> RMSNorm with gain -> head -> softcap

Of the optional parts (parts.py), add_values() is here. Callers scale the residual and choose what attention sees.
"""

import math
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# The four matmuls of a block, and the RMSNorm gains in front of two of them -> their parameters in train.py's Block
MATRICES = {"attn.qkv": "attn.qkv.weight", "attn.proj": "attn.proj.weight", "mlp.fc1": "mlp.fc1_weight",
            "mlp.fc2": "mlp.fc2_weight"}
GAINS = {"attn.qkv": "attn.qkv.layer_norm_weight", "mlp.fc1": "mlp.layer_norm_weight"}
TABLE, GATE = "attn.value_embed.table", "attn.value_embed.gate"  # of a block with a value embedding


def spectral_init(weight: Tensor) -> Tensor:
    """Draw from a normal with std = 1/sqrt(fan_in) * min(1, sqrt(fan_out/fan_in)) (arXiv 2310.17813)."""
    fan_out, fan_in = weight.shape
    return nn.init.normal_(weight, std=fan_in ** -0.5 * min(1.0, math.sqrt(fan_out / fan_in)))


def rope_tables(
    block_size: int, head_size: int, base: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of the rotary angles position * base^(-2i / head_size), i < head_size / 2.

    Returns: cos, sin, each (block_size, head_size / 2) fp32. They are computed in float64 on the CPU and rounded once.
    Keep them in fp32: with bf16's 8 bits, neighbouring positions would share the values of low frequencies.
    Source: RoPE, arXiv 2104.09864.
    """
    half = head_size // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute 1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept, in fp32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm without gain over the last dimension, computed in fp32, returned in bf16 (arXiv 1910.07467)."""
    x = x.float()
    return (x * inverse_rms(x, eps)).bfloat16()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of each head by the angles of its position (half-split RoPE).

    Args:
        x: (..., D), any floating-point dtype.
        cos, sin: fp32, from rope_tables; shaped so that they broadcast to (..., D/2).
    Returns: (..., D) fp32.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


def rope_qk_norm(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Apply RoPE (half-split) to q and k, then RMSNorm without gain to each of their heads.

    Args:
        qkv: (B, T, 3*C) bf16, rows of q, then k, then v.
        cos, sin: (block_size, D/2) fp32 with D = C / n_head; the first T positions are used.
    Returns: q, k, v, each (B, T, n_head, D) bf16 and contiguous.
    Sources: RoPE arXiv 2104.09864; QK norm arXiv 2302.05442 (as RMSNorm: plain L2 norm slows convergence).
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).unbind(2)
    cos, sin = cos[None, :T, None, :], sin[None, :T, None, :]
    return rms_norm(rotate(q, cos, sin), eps), rms_norm(rotate(k, cos, sin), eps), v.contiguous()


def add_values(v: Tensor, h: Tensor, gate: Tensor, values: Tensor) -> Tensor:
    """Add a value embedding to v, each head times its own gate, computed in fp32 (arXiv 2410.17897).

    Args:
        v: (B, T, n_head, D).
        h: (B, T, C), the input of v's matmul. The gates depend on its first channels.
        gate: (n_head, channels), the gates' weights.
        values: (B, T, C), the tokens' rows of the table.
    Returns: (B, T, n_head, D) in the dtype of v.
    """
    gates = 3 * torch.sigmoid(F.linear(h[..., :gate.shape[1]].float(), gate.float()))
    return (v.float() + gates[..., None] * values.view(v.shape)).to(v.dtype)


def relu2(x: Tensor) -> Tensor:
    """Apply relu(x)^2, the MLP's activation, in the dtype of x (arXiv 2109.08668)."""
    return torch.relu(x).square()


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Squash logits smoothly into (-cap, cap); cap 0 leaves them as they are (arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap) if cap else logits


def block_forward(
    x: Tensor, linear: Callable[[str, Tensor], Tensor], norm: Callable[[str, Tensor], Tensor],
    attend: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Run one transformer block: x + attention(x), then x + MLP(x).

    The callers differ in how they multiply, normalize and attend, so they pass these three in.

    Args:
        x: (B, T, C), the residual.
        linear: linear(name, h) multiplies h by the transposed weight `name` of MATRICES: "attn.qkv" (3C, C),
            "attn.proj" (C, C), "mlp.fc1" (4C, C) or "mlp.fc2" (C, 4C).
        norm: norm(name, h) applies the RMSNorm in front of the matmul `name` of GAINS.
        attend: attend(qkv, h) takes qkv (B, T, 3C) through RoPE, QK norm and causal attention to (B, T, C). h (B, T, C)
            is the input of qkv's matmul, which the gates of a value embedding need.
    Returns: (B, T, C) in the dtype of x.
    """
    h = norm("attn.qkv", x)
    x = x + linear("attn.proj", attend(linear("attn.qkv", h), h))
    return x + linear("mlp.fc2", relu2(linear("mlp.fc1", norm("mlp.fc1", x))))
