"""Loss: head, softcap and cross-entropy in chunks, so that all logits never exist at once."""

import torch

from nanofp8.fused import Fp8, Scaling, as_int32, as_operand, current_scaling, matmul, quantize, te_gemm, use_kernels

try:
    import triton
except ImportError:  # no GPU build of torch: the plain versions serve
    triton = None
else:
    from nanofp8 import kernels


def softcap_cross_entropy(logits, targets, softcap):
    """Summed cross-entropy of softcapped logits. logits (N, V), targets (N,) int64, -1 ignored. Scalar fp32."""
    if use_kernels(logits):
        return cross_entropy_kernels(logits, targets, softcap)[0]
    capped = logits.float()
    if softcap:
        capped = torch.tanh(capped / softcap) * softcap
    target_logits = capped.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return ((torch.logsumexp(capped, dim=1) - target_logits) * (targets >= 0)).sum()


LOGIT_GRAD_SCALE = 2.0 ** 15  # gradients of logits are within [-1, 1] by nature: a fixed power of two serves E5M2


def softcap_cross_entropy_and_grad(logits, targets, softcap, scaling=None):
    """The summed loss as above, and its gradient for the logits before the softcap as matmul operands.

    (N, V) and (V, N). The gradient is in the logits' dtype (in their place), or in FP8 by `scaling`.
    """
    # GPUs without FP8 cannot round to it either
    if use_kernels(logits) and (scaling is None or te_gemm() or not logits.is_cuda):
        loss, lse = cross_entropy_kernels(logits, targets, softcap)
        N, V = logits.shape
        rows = logits if scaling is None else torch.empty(N, V, dtype=scaling.dtype, device=logits.device)
        cols = None if scaling is None else torch.empty(V, N, dtype=scaling.dtype, device=logits.device)
        kernels.cross_entropy_gradient[(triton.cdiv(N, 64), triton.cdiv(V, 64))](
            logits, targets, lse, rows, as_int32(cols), N, V, softcap or 1.0, LOGIT_GRAD_SCALE,
            softcap > 0, scaling is not None, 16, 64)
        return loss, (rows, rows.t()) if scaling is None else (as_operand(rows, scaling), as_operand(cols, scaling))
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
    return loss, quantize(grad.mul_(valid[:, None]).to(logits.dtype), scaling)


def cross_entropy_kernels(logits, targets, softcap):
    """Summed loss (scalar fp32) and the log-sum-exp of each row (N,) fp32."""
    N, V = logits.shape
    loss, lse = torch.empty(2, N, dtype=torch.float32, device=logits.device)
    kernels.cross_entropy_loss[(N,)](logits, targets, loss, lse, V, softcap or 1.0, softcap > 0, 2048, num_warps=8)
    return loss.sum(), lse


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of softcap(h @ weight.T) against targets, `chunk` tokens at a time.

    With recompute=False the gradients of h and weight are formed chunk by chunk in the forward pass, while the
    logits are there anyway; with True the forward pass keeps nothing and the backward pass makes the logits again.

    forward arguments: h (N, C) bf16, weight (V, C), targets (N,) int64 with -1 ignored, operand: the weight's matmul
    operands, Fp8 for FP8 matmuls (h by its amax, gradients of logits by LOGIT_GRAD_SCALE), softcap (0: none).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, operand, softcap, chunk, recompute, in_place):
        ctx.arguments, ctx.in_place = (operand, softcap, chunk), in_place
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needs_grad and not recompute:
            loss, *ctx.grads = ChunkedCrossEntropy.loss_and_grads(h, targets, operand, softcap, chunk)
            ctx.save_for_backward(weight)
            return loss
        if needs_grad:
            ctx.save_for_backward(weight, h, targets)
        scaling = current_scaling(h, torch.float8_e4m3fn) if isinstance(operand[0], Fp8) else None
        return sum(
            softcap_cross_entropy(
                matmul(quantize(h_chunk, scaling, colwise=False)[0], operand[0]), target_chunk, softcap)
            for h_chunk, target_chunk in zip(h.split(chunk), targets.split(chunk), strict=True))

    @staticmethod
    def loss_and_grads(h, targets, operand, softcap, chunk):
        """Loss, its gradient for h (N, C) bf16, and for the weight (V, C) fp32."""
        scaling = current_scaling(h, torch.float8_e4m3fn) if isinstance(operand[0], Fp8) else None
        grad_scaling = scaling and Scaling(
            torch.full_like(scaling.scale, LOGIT_GRAD_SCALE), torch.full_like(scaling.scale, 1 / LOGIT_GRAD_SCALE),
            None, torch.float8_e5m2)
        loss, dh, dw = torch.zeros((), device=h.device), torch.empty_like(h), None
        for h_chunk, target_chunk, dh_chunk in zip(h.split(chunk), targets.split(chunk), dh.split(chunk), strict=True):
            h_rows, h_cols = quantize(h_chunk, scaling)
            chunk_loss, (grad_rows, grad_cols) = softcap_cross_entropy_and_grad(
                matmul(h_rows, operand[0]), target_chunk, softcap, grad_scaling)
            loss += chunk_loss
            dh_chunk.copy_(matmul(grad_rows, operand[1]))
            dw = matmul(grad_cols, h_cols, torch.float32) if dw is None else matmul(grad_cols, h_cols, out=dw)
        return loss, dh, dw

    @staticmethod
    def backward(ctx, grad_loss):
        weight, *rest = ctx.saved_tensors
        dh, dw = ChunkedCrossEntropy.loss_and_grads(*rest, *ctx.arguments)[1:] if rest else ctx.grads
        ctx.grads = None
        dh.mul_(grad_loss)
        if ctx.in_place == "write":
            torch.mul(dw, grad_loss, out=weight.grad)
            dw = None
        elif ctx.in_place and weight.grad is not None:
            weight.grad.addcmul_(dw, grad_loss)
            dw = None
        else:
            dw = dw.mul_(grad_loss).to(weight.dtype)
        return dh, dw, None, None, None, None, None, None
