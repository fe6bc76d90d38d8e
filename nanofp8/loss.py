"""Compute the loss in chunks of tokens: head matmul, softcap, cross-entropy.

The logits of all tokens never exist at once: those of 32,768 tokens and a vocabulary of 65,536 take 4.3 GB in bf16.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn

from nanofp8 import epilogues, plain
from nanofp8.fused import (
    Fp8,
    Operand,
    Operands,
    Scaling,
    as_int32,
    as_operands,
    current_scaling,
    matmul,
    outputs,
    quantize,
    te_gemm,
    use_kernels,
    weight_operand,
)
from nanofp8.optional_triton import kernels, triton
from nanofp8.zero import gradient_of

LOGIT_GRAD_SCALE = 2.0 ** 15  # gradients of logits lie in [-1, 1]: this constant maps them into E5M2's range


def logits_and_sums(h: Operand, weight: Operand, softcap: float,
                    quack: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits h @ weight.T (N, V), and with `quack` the sums from epilogues.logits_matmul(), else None.

    h (N, C), weight (V, C).
    """
    return epilogues.logits_matmul(h, weight, softcap) if quack else (matmul(h, weight), None)


def softcap_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, softcap: float,
                          sums: torch.Tensor | None = None) -> torch.Tensor:
    """Return the summed cross-entropy of softcap * tanh(logits / softcap), a scalar fp32.

    logits (N, V); targets (N,) int64, -1: ignored; softcap 0: none; sums: from logits_and_sums(). Softcap: arXiv
    2408.00118.
    """
    if use_kernels(logits):
        return cross_entropy_kernels(logits, targets, softcap, sums)[0]
    capped = plain.softcap(logits.float(), softcap)
    target_logits = capped.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return ((torch.logsumexp(capped, dim=1) - target_logits) * (targets >= 0)).sum()


def softcap_cross_entropy_and_grad(logits: torch.Tensor, targets: torch.Tensor, softcap: float,
                                   scaling: Scaling | None = None,
                                   loss_weight: float = 1.0,
                                   sums: torch.Tensor | None = None) -> tuple[torch.Tensor, Operands]:
    """Return softcap_cross_entropy(), and its gradient for the logits as matmul operands (N, V) and (V, N).

    The gradient is FP8 by `scaling`, whose scale must be LOGIT_GRAD_SCALE; or, if that is None, in the logits' dtype
    and multiplied by `loss_weight`. The logits may be overwritten. sums: from logits_and_sums().
    """
    # A GPU without FP8 matmuls has no instructions to round to FP8 either
    if use_kernels(logits) and (scaling is None or te_gemm() or not logits.is_cuda):
        loss, lse = cross_entropy_kernels(logits, targets, softcap, sums)
        N, V = logits.shape
        rows, cols = outputs(logits, scaling)
        kernels.cross_entropy_gradient[(triton.cdiv(N, 64), triton.cdiv(V, 64))](
            logits, targets, lse, rows, as_int32(cols), N, V, softcap or 1.0,
            loss_weight if scaling is None else LOGIT_GRAD_SCALE, softcap > 0, scaling is not None, 16, 64)
        return loss, as_operands(rows, cols, scaling)
    capped = logits.float()
    if softcap:
        tanh = capped.div_(softcap).tanh_()
        capped = tanh * softcap
    valid, index = targets >= 0, targets.clamp(min=0)[:, None]
    lse = torch.logsumexp(capped, dim=1)
    loss = ((lse - capped.gather(1, index)[:, 0]) * valid).sum()
    # d loss / d z = softmax(z) - onehot(target);  d z / d logits = 1 - tanh^2
    grad = capped.sub_(lse[:, None]).exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    if softcap:
        grad = grad.mul_(tanh.square_().neg_().add_(1))
    grad.mul_(valid[:, None] if scaling else valid[:, None] * loss_weight)
    return loss, quantize(grad.to(logits.dtype), scaling)


def cross_entropy_kernels(logits: torch.Tensor, targets: torch.Tensor, softcap: float,
                          sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss (scalar fp32) and the log-sum-exp of each row (N,) fp32, by Triton.

    With sums, from logits_and_sums(), only the targets' logits are read.
    """
    N, V = logits.shape
    loss, lse = torch.empty(2, N, dtype=torch.float32, device=logits.device)
    if sums is not None:
        parts = sums.shape[1]
        kernels.cross_entropy_of_sums[(N,)](
            logits, targets, sums, loss, lse, V, parts, softcap, triton.next_power_of_2(parts))
        return loss.sum(), lse
    kernels.cross_entropy_loss[(N,)](logits, targets, loss, lse, V, softcap or 1.0, softcap > 0, 2048, num_warps=8)
    return loss.sum(), lse


class ChunkedCrossEntropy(torch.autograd.Function):
    """Compute `loss_weight` times the summed cross-entropy of softcap(h @ weight.T), `chunk` tokens at a time.

    Args:
        h: (N, C) bf16, the head's input.
        weight: (V, C) fp32.
        targets: (N,) int64, -1: ignored.
        operand: the weight's matmul operands (rows, cols). Fp8: all matmuls of the head run in FP8, with h scaled by
            its amax and the gradients of the logits by LOGIT_GRAD_SCALE.
        softcap: 0: none.
        chunk: tokens whose logits exist at once.
        recompute: False computes the gradients of h and weight in the forward pass, while each chunk's logits exist.
            True keeps nothing in the forward pass and computes the logits again in the backward pass.
        in_place: as in fused.weight_gradient(). Not "": backward() must start at this loss, whose gradient is then 1,
            because without `recompute` the forward pass adds to gradient_of(weight) already.
        loss_weight: multiplies the loss, and so its gradients.
        quack: compute the logits by QuACK; needs Fp8 and a softcap.
    Returns: the loss, a scalar fp32.
    """

    @staticmethod
    def forward(ctx, h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, operand: Operands, softcap: float,
                chunk: int, recompute: bool, in_place: str = "", loss_weight: float = 1.0,
                quack: bool = False) -> torch.Tensor:
        ctx.in_place, ctx.rest = in_place, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            if not recompute:
                loss, *ctx.grads = ChunkedCrossEntropy.loss_and_grads(
                    h, weight, targets, operand, softcap, chunk, in_place, loss_weight, quack)
                return loss
            ctx.save_for_backward(h, weight, targets)
            ctx.rest = operand, softcap, chunk, in_place, loss_weight, quack
        scaling = current_scaling(h, torch.float8_e4m3fn) if isinstance(operand[0], Fp8) else None
        loss = torch.zeros((), device=h.device)
        for h_chunk, target_chunk in zip(h.split(chunk), targets.split(chunk), strict=True):
            h_rows, _ = quantize(h_chunk, scaling, colwise=False)
            logits, sums = logits_and_sums(h_rows, operand[0], softcap, quack)
            loss += softcap_cross_entropy(logits, target_chunk, softcap, sums)
            del logits  # before the next chunk's are made
        return loss * loss_weight

    @staticmethod
    def loss_and_grads(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, operand: Operands, softcap: float,
                       chunk: int, in_place: str, loss_weight: float,
                       quack: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the loss (scalar fp32), its gradient for h (N, C) bf16, and for the weight (V, C) fp32.

        The last is None if it went to gradient_of(weight).
        """
        scaling = current_scaling(h, torch.float8_e4m3fn) if isinstance(operand[0], Fp8) else None
        grad_scaling = scaling and Scaling(
            torch.full_like(scaling.scale, LOGIT_GRAD_SCALE),
            torch.full_like(scaling.scale, loss_weight / LOGIT_GRAD_SCALE), None, torch.float8_e5m2)
        loss, dh = torch.zeros((), device=h.device), torch.empty_like(h)
        given = gradient_of(weight) if in_place else None
        dw, add = given, in_place == "add"
        for h_chunk, target_chunk, dh_chunk in zip(h.split(chunk), targets.split(chunk), dh.split(chunk), strict=True):
            h_rows, h_cols = quantize(h_chunk, scaling)
            logits, sums = logits_and_sums(h_rows, operand[0], softcap, quack)
            chunk_loss, (grad_rows, grad_cols) = softcap_cross_entropy_and_grad(
                logits, target_chunk, softcap, grad_scaling, loss_weight, sums)
            del logits  # before the next chunk's are made
            loss += chunk_loss
            dh_chunk.copy_(matmul(grad_rows, operand[1]))
            if dw is None:
                dw = matmul(grad_cols, h_cols, torch.float32)
            else:
                matmul(grad_cols, h_cols, out=dw, add=add)
            add = True
        return loss * loss_weight, dh, None if dw is given else dw

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple:
        dh, dw = ChunkedCrossEntropy.loss_and_grads(*ctx.saved_tensors, *ctx.rest)[1:] if ctx.rest else ctx.grads
        ctx.grads = None
        if not ctx.in_place:
            dh.mul_(grad_loss)
            dw.mul_(grad_loss)
        return dh, dw, None, None, None, None, None, None, None, None


class LMHead(nn.Module):
    """Output projection with logit softcap, and the loss over it in chunks of tokens."""

    def __init__(self, cfg: SimpleNamespace, device: torch.device, quack: bool = False):
        """Start with zeros: (V, C) fp32. cfg: vocab_size, n_embd, logit_softcap, loss_chunk_size, USE_AC_LM_HEAD.

        quack: let QuACK compute the logits of an FP8 head with softcap.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cfg.vocab_size, cfg.n_embd, device=device))
        self.softcap, self.chunk, self.recompute = cfg.logit_softcap, cfg.loss_chunk_size, cfg.USE_AC_LM_HEAD
        self.quack = quack and self.softcap > 0
        self.cache = {}  # quantized weight of this step

    def forward(self, h: torch.Tensor, targets: torch.Tensor | None = None, first: bool | None = None,
                fp8: bool = False, in_place: str = "", loss_weight: float = 1.0) -> torch.Tensor:
        """Return loss_weight x the summed loss, a scalar fp32; without targets, softcapped logits (B, T, V) fp32.

        Args:
            h: (B, T, C) bf16.
            targets: (B, T) int64, -1: no target.
            first: as in GPT.forward().
            fp8: matmuls in FP8, by current scaling.
            in_place: as in ChunkedCrossEntropy.
        """
        if targets is None:
            logits = plain.softcap(matmul(h.flatten(0, 1), self.weight.to(h.dtype)).float(), self.softcap)
            return logits.view(*h.shape[:2], -1)
        operand = weight_operand(self.weight, lambda w: current_scaling(w, torch.float8_e4m3fn) if fp8 else None,
                                 first, self.cache)
        return ChunkedCrossEntropy.apply(h.flatten(0, 1), self.weight, targets.flatten(), operand, self.softcap,
                                         self.chunk, self.recompute or not torch.is_grad_enabled(), in_place,
                                         loss_weight, self.quack and fp8)
