"""Fused blocks: the block's two halves as autograd functions, cuBLAS's matmuls with Triton kernels between them."""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

try:
    import triton
except ImportError:  # no GPU build of torch: the plain versions serve
    triton = None
else:
    from nanofp8 import kernels


def kernels_fit(cfg, device):
    """Whether our own Triton kernels can run the blocks: on a GPU, for head sizes that are powers of two."""
    head = cfg.n_embd // cfg.n_head
    return cfg.USE_TRITON and triton is not None and device.type == "cuda" and head & (head - 1) == 0


def use_kernels(x):
    """Whether a tensor is one for the kernels: on a GPU, or anywhere in Triton's interpreter, for tests."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


class Fp8(NamedTuple):
    """An FP8 matrix (its values in fp32 where it is emulated) and the factor, one fp32 element, that they must be
    multiplied by."""

    data: torch.Tensor
    inverse_scale: torch.Tensor


class Scaling(NamedTuple):
    """How one tensor is quantized: one-element fp32 tensors scale, 1 / scale, amax (raised in place; None: not
    wanted)."""

    scale: torch.Tensor
    inverse: torch.Tensor
    amax: torch.Tensor
    dtype: torch.dtype
    quantizer: object = None  # TE's, where it is kept


def as_operand(data, scaling):
    """Values that a kernel wrote as a matmul operand: in FP8 by a Scaling, or in bf16 (scaling None)."""
    return data if scaling is None else Fp8(data, scaling.inverse)


def scale_and_amax(scaling):
    """The arguments scale and amax of a kernel that writes FP8; (None, None) where it writes bf16."""
    return (None, None) if scaling is None else (scaling.scale, scaling.amax)


@functools.cache
def te_gemm():
    """TE's FP8 matmul as function(a, b, dtype, out, add, fast), see matmul(); None where it cannot run: then it is
    emulated."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return None
    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    except ImportError:
        return None

    def operand(x):
        return Float8TensorStorage(data=x.data.view(torch.uint8), fp8_scale_inv=x.inverse_scale,
                                   fp8_dtype=te_types()[0][x.data.dtype], fake_dtype=torch.bfloat16)

    # BLAS counts columns where torch counts rows: its first operand is our second
    return lambda a, b, dtype, out, add, fast: general_gemm(
        operand(b), operand(a), dtype, out=out, accumulate=add, layout="TN", use_split_accumulator=not fast)[0]


def matmul(a, b, dtype=torch.bfloat16, out=None, add=True, fast=False):
    """a @ b.T with fp32 accumulation, (M, K) and (N, K): both Fp8 (K contiguous), or both bf16 (transposed views too).

    Args:
        dtype: of the result, unless `out`, fp32 (M, N), takes it: added to what is there, or in its place (add=False).
        fast: FP8 sums stay in the tensor cores, as TE has it for forward passes; else they are carried on in fp32.
    A CPU multiplies in fp32, which holds the same products exactly, and returns fp32: its caller rounds, if at all.
    """
    scale = None
    if isinstance(a, Fp8):
        if a.data.is_cuda and te_gemm():
            return te_gemm()(a, b, dtype if out is None else out.dtype, out, add and out is not None, fast)
        # Emulated: exact products of the values, scaled after the sum
        scale, a, b = a.inverse_scale * b.inverse_scale, a.data.float(), b.data.float()
    if a.is_cuda and scale is None:
        if out is not None:
            return torch.addmm(out, a, b.t(), beta=float(add), out_dtype=torch.float32, out=out)
        return a @ b.t() if dtype == a.dtype else torch.mm(a, b.t(), out_dtype=dtype)
    with torch.autocast(a.device.type, enabled=False):  # which would make the matmul bf16 again
        product = a.float() @ b.float().t() if scale is None else (a @ b.t()) * scale
        return product if out is None else out.add_(product) if add else out.copy_(product)


@functools.cache
def te_types():
    """TE's enumeration of number formats by torch's dtype, and its module of kernels."""
    import transformer_engine_torch
    from transformer_engine.pytorch.constants import DType
    return {torch.float8_e4m3fn: DType.kFloat8E4M3, torch.float8_e5m2: DType.kFloat8E5M2}, transformer_engine_torch


def te_quantizer(scaling, colwise=True):
    """TE's quantizer for a Scaling; its results are bare storages rather than tensors that autograd would follow."""
    from transformer_engine.pytorch import Float8Quantizer
    amax = torch.empty_like(scaling.scale) if scaling.amax is None else scaling.amax
    quantizer = Float8Quantizer(scaling.scale, amax, te_types()[0][scaling.dtype], columnwise=colwise)
    quantizer.internal = True
    return quantizer


def quantize(x, scaling, colwise=True):
    """x (M, K) as matmul operands (rows, cols): itself and its transpose, in FP8, or bf16 views (scaling None)."""
    if scaling is None:
        return x, x.t()
    if x.is_cuda and te_gemm():
        quantized = (scaling.quantizer or te_quantizer(scaling, colwise))(x)
        rows = Fp8(quantized._data.view(scaling.dtype), scaling.inverse)
        if not colwise:
            return rows, None
        # Where matmuls take any layout (B200), TE makes no transpose
        if quantized._transpose is None:
            return rows, transposed(rows)
        return rows, Fp8(quantized._transpose.view(scaling.dtype), scaling.inverse)
    fp8_max = torch.finfo(scaling.dtype).max
    quantized = (x.float() * scaling.scale).clamp_(-fp8_max, fp8_max).to(scaling.dtype)
    if scaling.amax is not None:
        scaling.amax.copy_(torch.maximum(scaling.amax, x.detach().abs().max().float()))
    quantized = quantized.float()  # which is what is multiplied where there is no FP8
    return Fp8(quantized, scaling.inverse), Fp8(quantized.t(), scaling.inverse) if colwise else None


def transposed(operand):
    """A row-wise operand as the operand of a sum over its rows."""
    if not isinstance(operand, Fp8):
        return operand.t()
    if not operand.data.is_cuda or not te_gemm():
        return Fp8(operand.data.t(), operand.inverse_scale)
    te_dtypes, te_kernels = te_types()
    dtype = operand.data.dtype
    cols = te_kernels.fp8_transpose(operand.data.view(torch.uint8), te_dtypes[dtype], out=None)
    return Fp8(cols.view(dtype), operand.inverse_scale)


def weight_operand(weight, scaling, first, cache):
    """A weight as matmul operands (rows, cols), by scaling(weight) in FP8, or in bf16 where that is None.

    first: True in a step's first micro-batch, which fills the cache, False in the others, which use it; None: made
    anew.
    """
    if first is False and weight in cache:
        return cache[weight]
    values = weight.detach()
    weight_scaling = scaling(values)
    if weight_scaling is not None:
        # Delayed scaling's scale moves on between micro-batches, while these values stay
        operands = quantize(values, weight_scaling._replace(inverse=weight_scaling.inverse.clone()))
    else:
        # A CPU multiplies these values in fp32
        values = values.bfloat16() if values.is_cuda else values.bfloat16().float()
        operands = values, values.t()
    if first is not None:
        cache[weight] = operands
    return operands


def current_scaling(x, dtype):
    """Scaling by the tensor's own amax, so that its largest value becomes the format's; 1 for a tensor of zeros."""
    amax = torch.linalg.vector_norm(x.detach(), math.inf, dtype=torch.float32).reshape(1)
    scale = torch.where(amax > 0, torch.finfo(dtype).max / amax, torch.ones_like(amax))
    return Scaling(scale, 1.0 / scale, None, dtype)


class AddNorm(torch.autograd.Function):
    """RMSNorm(x + delta) * gain in bf16, and nothing else in between (delta may be None)."""

    @staticmethod
    def forward(ctx, x, delta, gain, eps):
        residual, y, rstd = add_norm(x, delta, gain, eps, None)
        ctx.save_for_backward(residual, gain, rstd)
        ctx.add = delta is not None
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        residual, gain, rstd = ctx.saved_tensors
        dx, dgain = add_norm_grad(dy.flatten(0, -2), residual, gain, rstd, None)
        dx = dx.view(dy.shape)
        return dx, dx if ctx.add else None, dgain, None


def add_norm(x, delta, gain, eps, scaling):
    """residual (N, C) = x + delta, y = RMSNorm(residual) * gain (bf16, or FP8 by `scaling`), rstd (N,) fp32."""
    x = x.flatten(0, -2)
    N, C = x.shape
    residual = x if delta is None else torch.empty(N, C, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(N, C, dtype=torch.bfloat16 if scaling is None else scaling.dtype, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    rows_per_program = 4
    kernels.add_norm_forward[(triton.cdiv(N, rows_per_program),)](
        x, x if delta is None else delta, gain, residual, y, rstd, *scale_and_amax(scaling), N, C, eps,
        delta is not None, scaling is not None, rows_per_program, triton.next_power_of_2(C))
    return residual, as_operand(y, scaling), rstd


def add_norm_grad(dy, residual, gain, rstd, d_residual):
    """Gradients of the residual (N, C) and gain (C,)."""
    N, C = residual.shape
    rows_per_program = 16
    dx = torch.empty_like(residual)
    dgain_parts = torch.empty(triton.cdiv(N, rows_per_program), C, dtype=torch.float32, device=dy.device)
    kernels.add_norm_backward[(len(dgain_parts),)](
        dy, residual, gain, rstd, dx if d_residual is None else d_residual, dx, dgain_parts, N, C,
        d_residual is not None, rows_per_program, triton.next_power_of_2(C), num_warps=8)
    return dx, dgain_parts.sum(0).to(gain.dtype)


def as_int32(cols):
    """An FP8 matrix (K, M) as the kernels write it, (K, M / 4) words; None for None."""
    return None if cols is None else cols.view(torch.int32)


def weight_gradient(dy_cols, x_cols, weight, in_place):
    """dy.T @ x for a weight, from both operands' transposes.

    in_place: "" returns it; "add" adds it onto weight.grad where there is one, and "write" puts it there, and return
    None.
    """
    if in_place and weight.grad is not None:
        matmul(dy_cols, x_cols, out=weight.grad, add=in_place == "add")
        return None
    return matmul(dy_cols, x_cols, weight.dtype)


class QKVLayer(NamedTuple):
    """What FusedQKV needs beside its tensors; input, weight, d_qkv: these tensors' Scaling, or None for bf16."""

    fused: "FusedBlocks"
    eps: float
    n_head: int
    cos: torch.Tensor
    sin: torch.Tensor
    on_last_gradient: Callable | None
    input: Scaling | None
    weight: Scaling | None
    d_qkv: Scaling | None


class FusedQKV(torch.autograd.Function):
    """The block's first part: x + delta -> RMSNorm -> q, k, v -> RoPE and QK norm.

    Arguments: x, delta (B, T, C) bf16 (delta, the block before's MLP, may be None), gain (C,), weight (3C, C), and
    `layer`, from FusedBlocks.register(). Returns the residual x + delta, and q, k, v, each (B, T, H, D), parts of one
    tensor, which attention takes as it is (TE's layout bs3hd).
    """

    @staticmethod
    def forward(ctx, x, delta, gain, weight, layer):
        B, T, C = x.shape
        residual, y, rstd = add_norm(x, delta, gain, layer.eps, layer.input)
        weight_rows, ctx.weight_cols = layer.fused.operand(weight, layer.weight)
        qkv = matmul(y, weight_rows, fast=True)                                        # (N, 3C)
        rope_rstd = rope_qk_norm_in_place(qkv, layer.cos, layer.sin, T, layer.n_head, layer.eps)
        ctx.layer, ctx.add, ctx.in_place = layer, delta is not None, layer.fused.in_place
        ctx.save_for_backward(residual, gain, rstd, weight, qkv, rope_rstd, y if layer.input is None else y.data)
        return residual.view(B, T, C), *qkv.view(B, T, 3, layer.n_head, C // layer.n_head).unbind(2)

    @staticmethod
    def backward(ctx, d_residual, dq, dk, dv):
        residual, gain, rstd, weight, qkv, rope_rstd, y = ctx.saved_tensors
        layer = ctx.layer
        d_rows, d_cols = rope_qk_norm_grad(dq, dk, dv, qkv, rope_rstd, layer.cos, layer.sin, layer.d_qkv)
        dy = matmul(d_rows, ctx.weight_cols)
        dx, dgain = add_norm_grad(dy, residual, gain, rstd, d_residual)
        d_weight = weight_gradient(d_cols, transposed(as_operand(y, layer.input)), weight, ctx.in_place)
        if layer.on_last_gradient:  # every gradient of this pass is quantized
            layer.on_last_gradient()
        dx = dx.view(d_residual.shape)
        return dx, dx if ctx.add else None, dgain, d_weight, None


def rope_qk_norm_in_place(qkv, cos, sin, T, n_head, eps):
    """rope_qk_norm of qkv (N, 3C) bf16 in place; returns 1 / RMS of each head of q and k, (N * 2 * n_head,) fp32."""
    N, C3 = qkv.shape
    rstd = torch.empty(N * 2 * n_head, dtype=torch.float32, device=qkv.device)
    kernels.rope_qk_norm_forward[(triton.cdiv(len(rstd), 16),)](
        qkv, cos, sin, rstd, len(rstd), T, 2 * n_head, C3, eps, C3 // 6 // n_head, 16)
    return rstd


def rope_qk_norm_grad(dq, dk, dv, qkv, rstd, cos, sin, scaling):
    """The gradient of what went into RoPE and QK norm, from their outputs qkv (N, 3C): operands (rows, cols).

    scaling: of the result, or None for bf16, which takes the place of dq, dk, dv where they are parts of one tensor,
    as attention returns them.
    """
    B, T, H, D = dq.shape
    N, C3 = qkv.shape
    packed = qkv.view(B, T, 3, H, D)
    is_packed = all(
        grad.stride() == packed.stride()[:2] + packed.stride()[3:] and grad.data_ptr() == dq.data_ptr() + i * H * D * 2
        and grad.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr() for i, grad in enumerate((dq, dk, dv)))
    grad = dq.as_strided(packed.shape, packed.stride()) if is_packed else torch.stack((dq, dk, dv), dim=2)
    grad, fp8 = grad.view(N, C3), scaling is not None
    rows = torch.empty(N, C3, dtype=scaling.dtype, device=grad.device) if fp8 else grad
    cols = torch.empty(C3, N, dtype=scaling.dtype, device=grad.device) if fp8 else None
    kernels.rope_qk_norm_backward[(triton.cdiv(N, 128), (3 if fp8 else 2) * H)](
        grad, qkv, cos, sin, rstd, rows, as_int32(cols), *scale_and_amax(scaling), N, T, 2 * H, C3, fp8, D // 2, 32)
    return (as_operand(rows, scaling), as_operand(cols, scaling)) if fp8 else (grad, grad.t())


class RopeQKNorm(torch.autograd.Function):
    """rope_qk_norm in place of qkv (B, T, 3C), whose own values nothing needs any more, for blocks of TE's modules."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, eps):
        B, T, C3 = qkv.shape
        qkv = qkv.detach().view(B * T, C3)
        ctx.save_for_backward(qkv, rope_qk_norm_in_place(qkv, cos, sin, T, n_head, eps), cos, sin)
        return qkv.view(B, T, 3, n_head, C3 // 3 // n_head).unbind(2)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, rstd, cos, sin = ctx.saved_tensors
        rows, _ = rope_qk_norm_grad(dq, dk, dv, qkv, rstd, cos, sin, None)
        return rows.view(*dq.shape[:2], -1), None, None, None, None


class MLPLayer(NamedTuple):
    """What FusedMLP needs beside its tensors; from attention_out on: these tensors' Scaling, or None for bf16."""

    fused: "FusedBlocks"
    eps: float
    attention_out: Scaling | None
    proj: Scaling | None
    d_proj: Scaling | None
    input: Scaling | None
    fc1: Scaling | None
    d_pre_activation: Scaling | None
    activation: Scaling | None
    fc2: Scaling | None
    d_mlp_out: Scaling | None


class FusedMLP(torch.autograd.Function):
    """The block's second part: attention's output -> projection, residual -> RMSNorm -> MLP with relu^2.

    Arguments: attention_out and x, the residual, (B, T, C) bf16; proj (C, C), gain (C,), fc1 (4C, C), fc2 (C, 4C), and
    `layer`, from FusedBlocks.register(). Returns the residual x + proj(attention_out), and the MLP's output, which the
    next part adds. Kept for the backward pass: attention_out and the norm's output (in FP8 as quantized), the residual,
    and relu^2's input; in FP8 relu^2 is quantized once more for the weight gradient, by the same scale, rather than
    kept.
    """

    @staticmethod
    def forward(ctx, attention_out, x, proj, gain, fc1, fc2, layer):
        B, T, C = x.shape
        attention_out = attention_out.view(B * T, C)
        proj_rows, proj_cols = layer.fused.operand(proj, layer.proj)
        fc1_rows, fc1_cols = layer.fused.operand(fc1, layer.fc1)
        fc2_rows, fc2_cols = layer.fused.operand(fc2, layer.fc2)
        attention_rows, _ = quantize(attention_out, layer.attention_out, colwise=False)
        residual, y, rstd = add_norm(x, matmul(attention_rows, proj_rows, fast=True), gain, layer.eps, layer.input)
        pre_activation = matmul(y, fc1_rows, fast=True)                                # (N, 4C)
        size, scaling = pre_activation.numel(), layer.activation
        activation = torch.empty(pre_activation.shape, dtype=pre_activation.dtype if scaling is None else scaling.dtype,
                                 device=pre_activation.device)
        kernels.relu2_forward[(triton.cdiv(size, 8192),)](
            pre_activation, activation, *scale_and_amax(scaling), size, scaling is not None, 8192, num_warps=8)
        mlp_out = matmul(as_operand(activation, scaling), fc2_rows, fast=True)
        ctx.layer, ctx.in_place, ctx.weight_cols = layer, layer.fused.in_place, (proj_cols, fc1_cols, fc2_cols)
        ctx.save_for_backward(attention_out if layer.attention_out is None else attention_rows.data, residual, gain,
                              rstd, pre_activation, proj, fc1, fc2,
                              *((y, activation) if scaling is None else (y.data, None)))
        return residual.view(B, T, C), mlp_out.view(B, T, C)

    @staticmethod
    def backward(ctx, d_residual, d_mlp_out):
        attention_out, residual, gain, rstd, pre_activation, proj, fc1, fc2, y, activation = ctx.saved_tensors
        layer, shape, (proj_cols, fc1_cols, fc2_cols) = ctx.layer, d_mlp_out.shape, ctx.weight_cols
        M, K = pre_activation.shape
        d_rows, d_cols = quantize(d_mlp_out.flatten(0, 1), layer.d_mlp_out)
        d_activation = matmul(d_rows, fc2_cols)
        scaling, activation_scaling, device = layer.d_pre_activation, layer.activation, pre_activation.device
        fp8 = scaling is not None
        d_pre_rows = torch.empty(M, K, dtype=scaling.dtype, device=device) if fp8 else d_activation
        d_pre_cols = torch.empty(K, M, dtype=scaling.dtype, device=device) if fp8 else None
        activation_cols = torch.empty(K, M, dtype=activation_scaling.dtype, device=device) if fp8 else None
        kernels.relu2_backward[(triton.cdiv(M, 128), triton.cdiv(K, 64))](
            d_activation, pre_activation, d_pre_rows, as_int32(d_pre_cols), as_int32(activation_cols),
            *scale_and_amax(scaling), scale_and_amax(activation_scaling)[0], M, K, fp8, 32, 64)
        if fp8:
            d_pre_rows, d_pre_cols = Fp8(d_pre_rows, scaling.inverse), Fp8(d_pre_cols, scaling.inverse)
            activation_cols = Fp8(activation_cols, activation_scaling.inverse)
        else:
            d_pre_cols, activation_cols = d_pre_rows.t(), activation.t()
        d_fc2 = weight_gradient(d_cols, activation_cols, fc2, ctx.in_place)
        dy = matmul(d_pre_rows, fc1_cols)
        dx, dgain = add_norm_grad(dy, residual, gain, rstd, d_residual.flatten(0, 1))
        d_fc1 = weight_gradient(d_pre_cols, transposed(as_operand(y, layer.input)), fc1, ctx.in_place)
        d_rows, d_cols = quantize(dx, layer.d_proj)
        d_attention_out = matmul(d_rows, proj_cols)
        attention_cols = transposed(as_operand(attention_out, layer.attention_out))
        d_proj = weight_gradient(d_cols, attention_cols, proj, ctx.in_place)
        return d_attention_out.view(shape), dx.view(shape), d_proj, dgain, d_fc1, d_fc2, None


class FusedBlocks:
    """What the fused blocks need beside their tensors: which layers run in FP8, by which scales, with which weights.

    Delayed scaling's state is TE's own, held by the layers: their scales are copied when a pass begins, since TE
    updates them in place when its forward half ends, and the kernels raise the live amaxes. One pass at a time: a
    backward pass must be over before the next forward pass begins. Buffers stay where they are, so that CUDA graphs may
    hold on to them.
    """

    def __init__(self, model):
        self.model, self.cache = model, {}
        self.formats = {}  # {whether FP8 is on: (blocks, live scales, their copy, its inverse)}

    def begin(self, x, first, in_place):
        """Start a pass; x: any tensor on the model's device, first and in_place: as GPT.forward() has them."""
        state = self.model.te.quantization.FP8GlobalStateManager
        enabled = state.is_fp8_enabled()
        if enabled not in self.formats:
            self.formats[enabled] = self.register(x, state)
        self.first, self.in_place = first, in_place
        self.blocks, live, scale, inverse = self.formats[enabled]
        if live:
            torch.cat(live, out=scale)
            torch.reciprocal(scale[:, None], out=inverse[:, :1])

    def register(self, x, state):
        """Let TE set its layers up for the present format, and lay out what each block needs."""
        te, fp8_metas = self.model.te, []
        for block in self.model.blocks:
            for layer, gemms in ((block.attn.qkv, 1), (block.attn.proj, 1), (block.mlp, 2)):
                with te.autocast(enabled=False) if getattr(layer, "in_bf16", False) else contextlib.nullcontext():
                    layer.prepare_forward(x, num_gemms=gemms)
                    layer.end_forward()
                if layer.fp8:
                    fp8_metas += [(layer, key, layer.fp8_meta[key]) for key in ("scaling_fwd", "scaling_bwd")]
        total = sum(len(meta.scale) for *_, meta in fp8_metas)
        scale = torch.ones(total, device=x.device)
        inverse = torch.ones(total, 4, device=x.device)  # 16 bytes apart: cuBLAS wants them so aligned
        offsets = dict(zip(((layer, key) for layer, key, _ in fp8_metas),
                           itertools.accumulate((len(meta.scale) for *_, meta in fp8_metas), initial=0), strict=False))

        def tensor_scaling(layer, key, i, colwise=True):
            """Of a layer's i-th tensor, by TE's numbers: input 0, weight 1, a second matmul's 3 and 4; gradients 0 and
            2."""
            if (layer, key) not in offsets:
                return None
            offset, dtype = offsets[layer, key] + i, torch.float8_e4m3fn if key == "scaling_fwd" else torch.float8_e5m2
            amax = layer.fp8_meta[key].amax_history[0, i:i + 1]
            scaling = Scaling(scale[offset:offset + 1], inverse[offset, :1], amax, dtype)
            return scaling._replace(quantizer=te_quantizer(scaling, colwise))

        blocks, forward, backward = [], "scaling_fwd", "scaling_bwd"
        for i, block in enumerate(self.model.blocks):
            attn, qkv, proj, mlp = block.attn, block.attn.qkv, block.attn.proj, block.mlp
            # TE's own modules do the same when the backward pass leaves the first of them
            on_last_gradient = None
            if i == 0 and fp8_metas:
                on_last_gradient = functools.partial(state.reduce_and_update_fp8_tensors, forward=False)
            blocks.append((
                QKVLayer(
                    fused=self, eps=attn.eps, n_head=attn.n_head, cos=self.model.cos, sin=self.model.sin,
                    on_last_gradient=on_last_gradient, input=tensor_scaling(qkv, forward, 0),
                    weight=tensor_scaling(qkv, forward, 1), d_qkv=tensor_scaling(qkv, backward, 0)),
                MLPLayer(
                    fused=self, eps=attn.eps, attention_out=tensor_scaling(proj, forward, 0, colwise=False),
                    proj=tensor_scaling(proj, forward, 1), d_proj=tensor_scaling(proj, backward, 0),
                    input=tensor_scaling(mlp, forward, 0), fc1=tensor_scaling(mlp, forward, 1),
                    d_pre_activation=tensor_scaling(mlp, backward, 0), activation=tensor_scaling(mlp, forward, 3),
                    fc2=tensor_scaling(mlp, forward, 4), d_mlp_out=tensor_scaling(mlp, backward, 2))))
        return blocks, [meta.scale for *_, meta in fp8_metas], scale, inverse

    def operand(self, weight, scaling):
        """A weight as matmul operands, by its Scaling or in bf16."""
        return weight_operand(weight, lambda _: scaling, self.first, self.cache)


class MicroBatchGraphs:
    """Forward and backward pass of a micro-batch as CUDA graphs: one for a step's first, which writes its gradients and
    quantizes the weights, and one for the others, which add to them. Python is then out of the way between kernels.

    Everything that a graph reads or writes keeps its place: inputs, loss, gradients, scales, quantized weights.
    """

    def __init__(self, parallel, loader, precision, procs):
        self.model, self.loader, self.precision, self.procs = parallel.model, loader, precision, procs
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        self.batch, self.loss = list(loader.peek()), torch.zeros((), device=procs.device)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # Gradients that autograd adds up: all but the matmuls' own
        self.summed_gradients = [parameter.grad for name, parameter in self.model.named_parameters()
                       if parameter.ndim == 1 or name.startswith("embed")]
        for first in (True, False)[:loader.accumulation]:
            self.capture(first)

    def __call__(self, x, y, first):
        """Run one micro-batch, x (B, T) int32, y (B, T) int64; returns its share of the step's loss, a scalar that the
        next overwrites."""
        self.batch[0].copy_(x)
        self.batch[1].copy_(y)
        self.graphs[first].replay()
        return self.loss

    def capture(self, first):
        self.model.in_place = "write" if first else "add"
        self.graphs[first] = torch.cuda.CUDAGraph()
        # The loader's thread allocates pinned memory meanwhile, which only this thread must not
        with torch.cuda.graph(self.graphs[first], pool=self.pool, capture_error_mode="thread_local"):
            if first:
                torch._foreach_zero_(self.summed_gradients)
            with self.precision.autocast(self.procs):
                loss = self.model(*self.batch, first=first) * self.loader.loss_scale
            loss.backward()
            self.loss.copy_(loss.detach())
