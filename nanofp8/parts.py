"""Parts of the model that presets "speedrun" and "d12" add to nanochat's shape; each is off by default.

- Residual scalars: each block reads x_scale * x + x0_scale * x0, where x0 is the normalized token embedding and both
  scalars are learned (KellerJordan/modded-nanogpt, karpathy/nanochat).
- Value embeddings: some blocks add gate * table[token] to v; each head's gate depends on the block's input
  (arXiv 2410.17897; tables and gates as in modded-nanogpt and nanochat).

And what all models use: the order of a micro-batch's tokens, by which gradients of looked-up rows are summed. (Sliding
windows, arXiv 2004.05150, are sizes.windows() and an argument of attention.)
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanofp8.optional_triton import kernels, triton
from nanofp8.plain import add_values, inverse_rms
from nanofp8.sizes import GATE_CHANNELS
from nanofp8.zero import gradient_of


class ResidualScalars(nn.Module):
    """Learned scalars by which each block mixes the residual x and the token embedding x0: a * x + b * x0."""

    def __init__(self, n_layer: int, device: torch.device):
        """Start as nanochat does: most of the embedding goes to the first blocks. (n_layer,) each, fp32."""
        super().__init__()
        self.x = nn.Parameter(torch.linspace(1.15, 1.05, n_layer, device=device))
        self.x0 = nn.Parameter(torch.linspace(0.20, 0.05, n_layer, device=device))

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Return the two scalars of each block."""
        return list(zip(self.x.unbind(), self.x0.unbind(), strict=True))


def mix_residual(x: Tensor, x0: Tensor, x_scale: Tensor, x0_scale: Tensor) -> Tensor:
    """Return x_scale * x + x0_scale * x0 in the dtype of x, computed in fp32. The scales are scalars."""
    return (x_scale.float() * x.float() + x0_scale.float() * x0.float()).to(x.dtype)


class ValueEmbedding(nn.Module):
    """A table of one value vector per token, and the gates that scale it: v += gate * table[token]."""

    def __init__(self, cfg: SimpleNamespace, device: torch.device):
        """Draw the table (V, C) like v's weight, and the gates' weights (n_head, GATE_CHANNELS) near zero: all gates
        start near 1.5. Both fp32."""
        super().__init__()
        self.table = nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd, device=device))
        self.gate = nn.Parameter(torch.empty(cfg.n_head, min(GATE_CHANNELS, cfg.n_embd), device=device))
        nn.init.normal_(self.table, std=cfg.n_embd ** -0.5)
        nn.init.normal_(self.gate, std=0.01)

    def forward(self, v: Tensor, x: Tensor, gain: Tensor, eps: float, idx: Tensor) -> Tensor:
        """Return v + gate * table[idx] in plain PyTorch.

        v (B, T, H, D); x (B, T, C): what the block's RMSNorm reads; gain (C,) and eps: that norm's; idx (B, T) int32.
        """
        channels = self.gate.shape[1]
        inputs = (x[..., :channels].float() * inverse_rms(x, eps)) * gain[:channels].float()
        return add_values(v, inputs, self.gate, F.embedding(idx, self.table).float())


class TokenOrder(NamedTuple):
    """The tokens of a micro-batch, and where each occurs: what an embedding's gradient needs to be summed in order."""

    tokens: Tensor         # (N,) int32
    order: Tensor | None   # (N,) int64, positions sorted by token; None: no gradients are computed
    starts: Tensor | None  # (V + 1,) int64, where each token begins in `order`


def token_order(idx: Tensor, vocab_size: int) -> TokenOrder:
    """Sort the positions of a micro-batch by token, unless gradients are off. idx (B, T) int32."""
    tokens = idx.flatten()
    if not torch.is_grad_enabled():
        return TokenOrder(tokens, None, None)
    ordered, order = tokens.sort(stable=True)
    ids = torch.arange(vocab_size + 1, dtype=tokens.dtype, device=idx.device)
    return TokenOrder(tokens, order, torch.searchsorted(ordered, ids))


def add_value_embedding(qkv: Tensor, table: Tensor, gate: Tensor, where: TokenOrder, residual: Tensor, rstd: Tensor,
                        gain: Tensor) -> tuple[Tensor, Tensor]:
    """Add gates * table[tokens] to v in place, in a Triton kernel; return the gates' inputs (N, channels) and the gates
    (N, H), fp32, for backward. Arguments: kernels.value_embedding_forward."""
    N, C = residual.shape
    heads, channels = gate.shape
    inputs = torch.empty(N, channels, dtype=torch.float32, device=qkv.device)
    gates = torch.empty(N, heads, dtype=torch.float32, device=qkv.device)
    kernels.value_embedding_forward[(N,)](
        qkv, table, where.tokens, residual, rstd, gain, gate, inputs, gates, C, heads, channels,
        triton.next_power_of_2(heads), C // heads)
    return inputs, gates


def value_embedding_grad(dv: Tensor, dy: Tensor, table: Tensor, gate: Tensor, where: TokenOrder, inputs: Tensor,
                         gates: Tensor, in_place: str) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of table and gate, and add the gates' share to dy (N, C), the gradient of the norm's output.

    dv (B, T, H, D) bf16; inputs, gates: from add_value_embedding(). in_place: as in table_gradient().
    """
    B, T, H, D = dv.shape
    if dv.stride()[2:] != (D, 1) or B > 1 and dv.stride(0) != T * dv.stride(1):
        dv = dv.contiguous()  # attention by plain matmuls returns (B, H, T, D) in memory
    (N, C), (heads, channels) = dy.shape, gate.shape
    stride = C if dv.is_contiguous() else dv.stride(1)  # the stride of a dimension of 1 may be anything
    d_logits = torch.empty_like(gates)
    kernels.value_embedding_backward[(N,)](
        dv, table, where.tokens, gate, gates, dy, d_logits, stride, C, heads, channels, triton.next_power_of_2(heads),
        C // heads)
    return table_gradient(table, dv, stride, gates, where, in_place), (d_logits.t() @ inputs).to(gate.dtype)


def table_gradient(table: Tensor, d_rows: Tensor, stride: int, factors: Tensor, where: TokenOrder,
                   in_place: str) -> Tensor | None:
    """Return the gradient (V, C) of a table whose rows were looked up.

    Args:
        d_rows: (N, C) bf16, `stride` values between rows: gradient of each row that was looked up ...
        factors: (N, H) fp32 ... to be multiplied by these; each counts for C / H columns.
        in_place: if it is not "" and gradient_of(table) exists, the gradient is added to it, and None returned.
    """
    C, heads = table.shape[1], factors.shape[1]
    columns = math.gcd(128, C // heads)  # of a program
    given = gradient_of(table) if in_place else None
    grad = torch.zeros_like(table) if given is None else given
    kernels.embedding_gradient[(triton.cdiv(C, columns), min(len(grad), 4096))](
        grad, d_rows, factors, where.order, where.starts, len(grad), stride, C, heads, C // heads, 8, 32, columns,
        num_warps=1)
    return grad if given is None else None
