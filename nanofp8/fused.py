"""Fused blocks: the block's two halves as autograd functions, cuBLAS's matmuls with Triton kernels between them."""

import contextlib
import functools
import itertools
import math
import os
from types import SimpleNamespace
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
    """An FP8 matrix (its values in fp32 where it is emulated) and the factor, one fp32 element, that they must be multiplied by."""

    data: torch.Tensor
    inverse_scale: torch.Tensor


class Scaling(NamedTuple):
    """How one tensor is quantized: one-element fp32 tensors scale, 1 / scale, amax (raised in place; None: not wanted)."""

    scale: torch.Tensor
    inverse: torch.Tensor
    amax: torch.Tensor
    dtype: torch.dtype
    quantizer: object = None  # TE's, where it is kept


@functools.cache
def te_gemm():
    """TE's FP8 matmul as function(a, b, dtype, out, add, fast), see matmul(); None where it cannot run: then it is emulated."""
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
    return lambda a, b, dtype, out, add, fast: general_gemm(operand(b), operand(a), dtype, out=out, accumulate=add, layout="TN",
                                                            use_split_accumulator=not fast)[0]


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


def te_quantizer(s, colwise=True):
    """TE's quantizer for Scaling s; its results are bare storages rather than tensors that autograd would follow."""
    from transformer_engine.pytorch import Float8Quantizer
    amax = torch.empty_like(s.scale) if s.amax is None else s.amax
    quantizer = Float8Quantizer(s.scale, amax, te_types()[0][s.dtype], columnwise=colwise)
    quantizer.internal = True
    return quantizer


def quantize(x, s, colwise=True):
    """x (M, K) as matmul operands (rows, cols): itself and its transpose, in FP8 by Scaling s, or bf16 views (s None)."""
    if s is None:
        return x, x.t()
    if x.is_cuda and te_gemm():
        q = (s.quantizer or te_quantizer(s, colwise))(x)
        rows = Fp8(q._data.view(s.dtype), s.inverse)
        if not colwise:
            return rows, None
        # Where matmuls take any layout (B200), TE makes no transpose
        return rows, transposed(rows) if q._transpose is None else Fp8(q._transpose.view(s.dtype), s.inverse)
    top = torch.finfo(s.dtype).max
    q = (x.float() * s.scale).clamp_(-top, top).to(s.dtype)
    if s.amax is not None:
        s.amax.copy_(torch.maximum(s.amax, x.detach().abs().max().float()))
    q = q.float()  # which is what is multiplied where there is no FP8
    return Fp8(q, s.inverse), Fp8(q.t(), s.inverse) if colwise else None


def transposed(y):
    """A row-wise operand as the operand of a sum over its rows."""
    if not isinstance(y, Fp8):
        return y.t()
    if not y.data.is_cuda or not te_gemm():
        return Fp8(y.data.t(), y.inverse_scale)
    kinds, tex = te_types()
    return Fp8(tex.fp8_transpose(y.data.view(torch.uint8), kinds[y.data.dtype], out=None).view(y.data.dtype), y.inverse_scale)


def weight_operand(weight, scaling, first, cache):
    """A weight as matmul operands (rows, cols), by scaling(weight) in FP8, or in bf16 where that is None.

    first: True in a step's first micro-batch, which fills the cache, False in the others, which use it; None: made anew.
    """
    if first is False and weight in cache:
        return cache[weight]
    w = weight.detach()
    s = scaling(w)
    if s is not None:
        # Delayed scaling's scale moves on between micro-batches, while these values stay
        made = quantize(w, s._replace(inverse=s.inverse.clone()))
    else:
        w = w.bfloat16() if w.is_cuda else w.bfloat16().float()  # a CPU multiplies these values in fp32
        made = w, w.t()
    if first is not None:
        cache[weight] = made
    return made


def current_scaling(x, dtype):
    """Scaling by the tensor's own amax, so that its largest value becomes the format's; 1 for a tensor of zeros."""
    amax = torch.linalg.vector_norm(x.detach(), math.inf, dtype=torch.float32).reshape(1)
    scale = torch.where(amax > 0, torch.finfo(dtype).max / amax, torch.ones_like(amax))
    return Scaling(scale, 1.0 / scale, None, dtype)


class AddNorm(torch.autograd.Function):
    """RMSNorm(x + delta) * gain in bf16, and nothing else in between (delta may be None)."""

    @staticmethod
    def forward(ctx, x, delta, gain, eps):
        stream, y, rstd = add_norm(x, delta, gain, eps, None)
        ctx.save_for_backward(stream, gain, rstd)
        ctx.add = delta is not None
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        stream, gain, rstd = ctx.saved_tensors
        dx, dgain = add_norm_grad(dy.flatten(0, -2), stream, gain, rstd, None)
        dx = dx.view(dy.shape)
        return dx, dx if ctx.add else None, dgain, None


def add_norm(x, delta, gain, eps, s):
    """stream (N, C) = x + delta, y = RMSNorm(stream) * gain (bf16, or FP8 by Scaling s), rstd (N,) fp32."""
    x = x.flatten(0, -2)
    N, C = x.shape
    stream = x if delta is None else torch.empty(N, C, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(N, C, dtype=torch.bfloat16 if s is None else s.dtype, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    rows = 4
    kernels.add_norm_forward[(triton.cdiv(N, rows),)](
        x, x if delta is None else delta, gain, stream, y, rstd, s and s.scale, s and s.amax, N, C, eps,
        delta is not None, s is not None, rows, triton.next_power_of_2(C))
    return stream, y if s is None else Fp8(y, s.inverse), rstd


def add_norm_grad(dy, stream, gain, rstd, residual):
    """Gradients of stream (N, C) and gain (C,)."""
    N, C = stream.shape
    rows = 16
    dx, partial = torch.empty_like(stream), torch.empty(triton.cdiv(N, rows), C, dtype=torch.float32, device=dy.device)
    kernels.add_norm_backward[(len(partial),)](
        dy, stream, gain, rstd, dx if residual is None else residual, dx, partial, N, C,
        residual is not None, rows, triton.next_power_of_2(C), num_warps=8)
    return dx, partial.sum(0).to(gain.dtype)


def words(cols):
    """An FP8 matrix (K, M) as the kernels write it, (K, M / 4) words; None for None."""
    return None if cols is None else cols.view(torch.int32)


def weight_gradient(dy_cols, x_cols, weight, in_place):
    """dy.T @ x for a weight, from both operands' transposes.

    in_place: "" returns it; "add" adds it onto weight.grad where there is one, and "write" puts it there, and return None.
    """
    if in_place and weight.grad is not None:
        matmul(dy_cols, x_cols, out=weight.grad, add=in_place == "add")
        return None
    return matmul(dy_cols, x_cols, weight.dtype)


class FusedQKV(torch.autograd.Function):
    """The block's first part: x + delta -> RMSNorm -> q, k, v -> RoPE and QK norm.

    Arguments: x, delta (B, T, C) bf16 (delta, the block before's MLP, may be None), gain (C,), weight (3C, C), and `p`,
    from FusedBlocks.register(). Returns the stream x + delta, and q, k, v, each (B, T, H, D), parts of one tensor, which attention
    takes as it is (TE's layout bs3hd).
    """

    @staticmethod
    def forward(ctx, x, delta, gain, weight, p):
        B, T, C = x.shape
        stream, y, rstd = add_norm(x, delta, gain, p.eps, p.input)
        w, ctx.w_cols = p.fused.operand(weight, p.weight)
        qkv = matmul(y, w, fast=True)                                                  # (N, 3C)
        rope_rstd = rope_qk_norm_in_place(qkv, p.cos, p.sin, T, p.n_head, p.eps)
        ctx.p, ctx.add, ctx.in_place = p, delta is not None, p.fused.in_place
        ctx.save_for_backward(stream, gain, rstd, weight, qkv, rope_rstd, y if p.input is None else y.data)
        return stream.view(B, T, C), *qkv.view(B, T, 3, p.n_head, C // p.n_head).unbind(2)

    @staticmethod
    def backward(ctx, d_stream, dq, dk, dv):
        stream, gain, rstd, weight, qkv, rope_rstd, y = ctx.saved_tensors
        p, (N, C3) = ctx.p, qkv.shape
        d_rows, d_cols = rope_qk_norm_grad(dq, dk, dv, qkv, rope_rstd, p)
        dy = matmul(d_rows, ctx.w_cols)
        dx, dgain = add_norm_grad(dy, stream, gain, rstd, d_stream)
        dw = weight_gradient(d_cols, transposed(y if p.input is None else Fp8(y, p.input.inverse)), weight, ctx.in_place)
        if p.last:  # every gradient of this pass is quantized
            p.last()
        dx = dx.view(d_stream.shape)
        return dx, dx if ctx.add else None, dgain, dw, None


def rope_qk_norm_in_place(qkv, cos, sin, T, n_head, eps):
    """rope_qk_norm of qkv (N, 3C) bf16 in place; returns 1 / RMS of each head of q and k, (N * 2 * n_head,) fp32."""
    N, C3 = qkv.shape
    rstd = torch.empty(N * 2 * n_head, dtype=torch.float32, device=qkv.device)
    kernels.rope_qk_norm_forward[(triton.cdiv(len(rstd), 16),)](
        qkv, cos, sin, rstd, len(rstd), T, 2 * n_head, C3, eps, C3 // 6 // n_head, 16)
    return rstd


def rope_qk_norm_grad(dq, dk, dv, qkv, rstd, p):
    """The gradient of what went into RoPE and QK norm, from their outputs qkv (N, 3C): operands (rows, cols).

    p: cos, sin, and grad, the Scaling of the result or None for bf16, which takes the place of dq, dk, dv where they are parts of
    one tensor, as attention returns them.
    """
    B, T, H, D = dq.shape
    N, C3 = qkv.shape
    packed = qkv.view(B, T, 3, H, D)
    together = all(g.stride() == packed.stride()[:2] + packed.stride()[3:] and g.data_ptr() == dq.data_ptr() + i * H * D * 2
                   and g.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr() for i, g in enumerate((dq, dk, dv)))
    grad = (dq.as_strided(packed.shape, packed.stride()) if together else torch.stack((dq, dk, dv), dim=2)).view(N, C3)
    fp8 = p.grad is not None
    rows = torch.empty(N, C3, dtype=p.grad.dtype, device=grad.device) if fp8 else grad
    cols = torch.empty(C3, N, dtype=p.grad.dtype, device=grad.device) if fp8 else None
    kernels.rope_qk_norm_backward[(triton.cdiv(N, 128), (3 if fp8 else 2) * H)](
        grad, qkv, p.cos, p.sin, rstd, rows, words(cols), p.grad and p.grad.scale, p.grad and p.grad.amax, N, T, 2 * H, C3, fp8,
        D // 2, 32)
    return (Fp8(rows, p.grad.inverse), Fp8(cols, p.grad.inverse)) if fp8 else (grad, grad.t())


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
        rows, _ = rope_qk_norm_grad(dq, dk, dv, qkv, rstd, SimpleNamespace(cos=cos, sin=sin, grad=None))
        return rows.view(*dq.shape[:2], -1), None, None, None, None


class FusedMLP(torch.autograd.Function):
    """The block's second part: attention's output -> projection, residual -> RMSNorm -> MLP with relu^2.

    Arguments: o (B, T, C) attention's output, x (B, T, C) the stream, both bf16; proj (C, C), gain (C,), fc1 (4C, C), fc2 (C, 4C),
    and `p`, from FusedBlocks.register(). Returns the stream x + proj(o), and the MLP's output, which the next part adds.
    Kept for the backward pass: o and the norm's output (in FP8 as quantized), the stream, and relu^2's input; in FP8 relu^2 is
    quantized once more for the weight gradient, by the same scale, rather than kept.
    """

    @staticmethod
    def forward(ctx, o, x, proj, gain, fc1, fc2, p):
        B, T, C = x.shape
        o = o.view(B * T, C)
        w_proj, w_fc1, w_fc2 = p.fused.operand(proj, p.proj), p.fused.operand(fc1, p.fc1), p.fused.operand(fc2, p.fc2)
        o_rows, _ = quantize(o, p.o, colwise=False)
        stream, y, rstd = add_norm(x, matmul(o_rows, w_proj[0], fast=True), gain, p.eps, p.input)
        u = matmul(y, w_fc1[0], fast=True)                                             # (N, 4C)
        a = torch.empty(u.shape, dtype=u.dtype if p.a is None else p.a.dtype, device=u.device)
        kernels.relu2_forward[(triton.cdiv(u.numel(), 8192),)](
            u, a, p.a and p.a.scale, p.a and p.a.amax, u.numel(), p.a is not None, 8192, num_warps=8)
        out = matmul(a if p.a is None else Fp8(a, p.a.inverse), w_fc2[0], fast=True)
        ctx.p, ctx.in_place, ctx.w_cols = p, p.fused.in_place, (w_proj[1], w_fc1[1], w_fc2[1])
        ctx.save_for_backward(o if p.o is None else o_rows.data, stream, gain, rstd, u, proj, fc1, fc2,
                              *((y, a) if p.a is None else (y.data, None)))
        return stream.view(B, T, C), out.view(B, T, C)

    @staticmethod
    def backward(ctx, d_stream, d_out):
        o, stream, gain, rstd, u, proj, fc1, fc2, y, a = ctx.saved_tensors
        p, shape, (w_proj, w_fc1, w_fc2) = ctx.p, d_out.shape, ctx.w_cols
        M, K = u.shape
        d_rows, d_cols = quantize(d_out.flatten(0, 1), p.d_out)
        da = matmul(d_rows, w_fc2)
        fp8 = p.d_u is not None
        du = torch.empty(M, K, dtype=p.d_u.dtype, device=u.device) if fp8 else da
        du_cols = torch.empty(K, M, dtype=p.d_u.dtype, device=u.device) if fp8 else None
        a_cols = torch.empty(K, M, dtype=p.a.dtype, device=u.device) if fp8 else None
        kernels.relu2_backward[(triton.cdiv(M, 128), triton.cdiv(K, 64))](
            da, u, du, words(du_cols), words(a_cols), p.d_u and p.d_u.scale, p.d_u and p.d_u.amax, p.a and p.a.scale, M, K, fp8,
            32, 64)
        if fp8:
            du, du_cols, a_cols = Fp8(du, p.d_u.inverse), Fp8(du_cols, p.d_u.inverse), Fp8(a_cols, p.a.inverse)
        else:
            du_cols, a_cols = du.t(), a.t()
        dw2 = weight_gradient(d_cols, a_cols, fc2, ctx.in_place)
        dy = matmul(du, w_fc1)
        dx, dgain = add_norm_grad(dy, stream, gain, rstd, d_stream.flatten(0, 1))
        dw1 = weight_gradient(du_cols, transposed(Fp8(y, p.input.inverse) if fp8 else y), fc1, ctx.in_place)
        d_rows, d_cols = quantize(dx, p.d_proj)
        do = matmul(d_rows, w_proj)
        dwp = weight_gradient(d_cols, transposed(o if p.o is None else Fp8(o, p.o.inverse)), proj, ctx.in_place)
        return do.view(shape), dx.view(shape), dwp, dgain, dw1, dw2, None


class FusedBlocks:
    """What the fused blocks need beside their tensors: which layers run in FP8, by which scales, with which weights.

    Delayed scaling's state is TE's own, held by the layers: their scales are copied when a pass begins, since TE updates
    them in place when its forward half ends, and the kernels raise the live amaxes. One pass at a time: a backward pass must be
    over before the next forward pass begins. Buffers stay where they are, so that CUDA graphs may hold on to them.
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
        te, held = self.model.te, []
        for block in self.model.blocks:
            for layer, gemms in ((block.attn.qkv, 1), (block.attn.proj, 1), (block.mlp, 2)):
                with te.autocast(enabled=False) if getattr(layer, "in_bf16", False) else contextlib.nullcontext():
                    layer.prepare_forward(x, num_gemms=gemms)
                    layer.end_forward()
                if layer.fp8:
                    held += [(layer, key, layer.fp8_meta[key]) for key in ("scaling_fwd", "scaling_bwd")]
        total = sum(len(meta.scale) for *_, meta in held)
        scale = torch.ones(total, device=x.device)
        inverse = torch.ones(total, 4, device=x.device)  # 16 bytes apart: cuBLAS wants them so aligned
        offsets = dict(zip(((layer, key) for layer, key, _ in held), itertools.accumulate((len(m.scale) for *_, m in held), initial=0)))

        def scaling(layer, key, i, colwise=True):
            """Of a layer's i-th tensor, by TE's numbers: input 0, weight 1, a second matmul's 3 and 4; gradients 0 and 2."""
            if (layer, key) not in offsets:
                return None
            at, dtype = offsets[layer, key] + i, torch.float8_e4m3fn if key == "scaling_fwd" else torch.float8_e5m2
            s = Scaling(scale[at:at + 1], inverse[at, :1], layer.fp8_meta[key].amax_history[0, i:i + 1], dtype)
            return s._replace(quantizer=te_quantizer(s, colwise))

        blocks, forward, backward = [], "scaling_fwd", "scaling_bwd"
        for i, block in enumerate(self.model.blocks):
            attn, qkv, proj, mlp = block.attn, block.attn.qkv, block.attn.proj, block.mlp
            shared = dict(fused=self, eps=attn.eps)
            # TE's own modules do the same when the backward pass leaves the first of them
            last = functools.partial(state.reduce_and_update_fp8_tensors, forward=False) if i == 0 and held else None
            blocks.append((
                SimpleNamespace(**shared, n_head=attn.n_head, cos=self.model.cos, sin=self.model.sin, last=last,
                                input=scaling(qkv, forward, 0), weight=scaling(qkv, forward, 1), grad=scaling(qkv, backward, 0)),
                SimpleNamespace(**shared, o=scaling(proj, forward, 0, colwise=False), proj=scaling(proj, forward, 1),
                                d_proj=scaling(proj, backward, 0), input=scaling(mlp, forward, 0), fc1=scaling(mlp, forward, 1),
                                d_u=scaling(mlp, backward, 0), a=scaling(mlp, forward, 3), fc2=scaling(mlp, forward, 4),
                                d_out=scaling(mlp, backward, 2))))
        return blocks, [meta.scale for *_, meta in held], scale, inverse

    def operand(self, weight, s):
        """A weight as matmul operands, by Scaling s or in bf16."""
        return weight_operand(weight, lambda w: s, self.first, self.cache)


class MicroBatchGraphs:
    """Forward and backward pass of a micro-batch as CUDA graphs: one for a step's first, which writes its gradients and quantizes
    the weights, and one for the others, which add to them. Python is then out of the way between kernels.

    Everything that a graph reads or writes keeps its place: inputs, loss, gradients, scales, quantized weights.
    """

    def __init__(self, parallel, loader, precision, procs):
        self.model, self.loader, self.precision, self.procs = parallel.model, loader, precision, procs
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        self.batch, self.loss = list(loader.peek()), torch.zeros((), device=procs.device)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        # Gradients that autograd adds up: all but the matmuls' own
        self.summed = [p.grad for n, p in self.model.named_parameters() if p.ndim == 1 or n.startswith("embed")]
        for first in (True, False)[:loader.accumulation]:
            self.capture(first)

    def __call__(self, x, y, first):
        """Run one micro-batch, x (B, T) int32, y (B, T) int64; returns its share of the step's loss, a scalar that the next overwrites."""
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
                torch._foreach_zero_(self.summed)
            with self.precision.autocast(self.procs):
                loss = self.model(*self.batch, first=first) * self.loader.loss_scale
            loss.backward()
            self.loss.copy_(loss.detach())
