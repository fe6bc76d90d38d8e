"""Run transformer blocks as two autograd functions each: cuBLAS matmuls with Triton kernels between them.

Block.forward in train.py without `fused` is the same mathematics in Transformer Engine's (TE's) modules.

**How a block is split.** Attention itself stays outside, so that any implementation of it can be used:

    FusedQKV   residual = x + delta; q, k, v = RoPE and QK norm of RMSNorm(residual) @ qkv.T
               attention(q, k, v) -> attention_out
    FusedMLP   residual = residual + attention_out @ proj.T; delta = relu(RMSNorm(residual) @ fc1.T)^2 @ fc2.T

`delta` is not added to the residual here: the next block's FusedQKV (or the model's last AddNorm) adds it in the
kernel that computes the norm, which saves one pass over memory.

**What is saved for backward.** The residual (bf16) and 1 / RMS of each row, from which the norm's output follows; q and
k after RoPE and QK norm with the 1 / RMS of each head; relu^2's input; and attention's output, which attention saves
anyway. All this is bf16. In bf16 the inputs of the other matmuls too. In FP8 backward quantizes all inputs again, by
the same scales, unless matmuls need no transposes: then those that a norm or attention made are saved in FP8. With
QuACK (nanofp8/epilogues.py) relu^2's input does not exist: only its output is saved, in FP8 or bf16, and backward takes
its root.

**Delayed scaling.** Scales, amax histories and their update belong to TE's layers (`fp8_meta`), as without our kernels;
Precision.share_amaxes() gives all ranks the same ones after each step. TE overwrites the scales in place when
te.autocast ends after the forward pass, but the backward pass still needs the old ones. FusedBlocks.begin() therefore
copies all scales at the start of a pass. The kernels raise the first row of TE's amax histories directly.

**Addresses do not change.** Scales, amaxes and cached quantized weights keep their buffers as long as a CUDA graph
(MicroBatchGraphs) may be replayed, because it runs its kernels with the addresses that it was captured with.

Layouts: N = B * T tokens, C = n_embd. A matmul operand is "rows" (N, K), summed over K, or "cols", its transpose
(K, N), summed over tokens. Hopper's FP8 matmuls want the summed dimension contiguous in both operands, so that cols are
matrices of their own. On B200 they take any layout, as bf16 matmuls do everywhere: cols are views of the rows, and no
kernel writes a transpose. needs_transposes() is the one place that decides; matmul() sees a view by its strides.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nanofp8 import cards, epilogues
from nanofp8.optional_triton import kernels, triton
from nanofp8.parts import TokenOrder, add_value_embedding, table_gradient, value_embedding_grad
from nanofp8.zero import gradient_of

INTERPRET_ON_CPU = False  # for tests: run the kernels on CPU tensors too, in Triton's interpreter (TRITON_INTERPRET=1)


class Fp8(NamedTuple):
    """An FP8 matrix and the factor that its values must be multiplied by."""

    data: torch.Tensor           # float8; fp32 holding FP8 values where FP8 is emulated. Maybe a transposed view
    inverse_scale: torch.Tensor  # one element, fp32


Operand = Fp8 | torch.Tensor               # a matmul's operand: FP8, or bf16
Operands = tuple[Operand, Operand | None]  # rows and cols of one matrix; None: cols were not wanted


class Scaling(NamedTuple):
    """How one tensor is quantized: tensors of one fp32 element, and the format."""

    scale: torch.Tensor        # values are multiplied by it before rounding
    inverse: torch.Tensor      # 1 / scale
    amax: torch.Tensor | None  # raised in place to the largest |value| seen; None: not recorded
    dtype: torch.dtype         # float8_e4m3fn or float8_e5m2
    quantizer: object = None   # TE's quantizer, if one was made for this tensor


def kernels_fit(cfg: Any, device: torch.device) -> bool:
    """Return whether our Triton kernels can run here: USE_TRITON, a GPU, and a head size that is a power of two."""
    head = cfg.n_embd // cfg.n_head
    return cfg.USE_TRITON and triton is not None and device.type == "cuda" and head & (head - 1) == 0


def blocks_fit(cfg: Any, precision: Any, device: torch.device) -> bool:
    """Return whether blocks run in our kernels: in bf16 or delayed FP8, without recomputation. precision: Precision."""
    return precision.fused and kernels_fit(cfg, device) and not (cfg.USE_AC_BLOCKS or cfg.USE_AC_ATTENTION)


def use_kernels(x: torch.Tensor) -> bool:
    """Return whether the kernels take this tensor, which is on a GPU except in tests (INTERPRET_ON_CPU)."""
    return triton is not None and (x.is_cuda or INTERPRET_ON_CPU)


def as_operand(data: torch.Tensor, scaling: Scaling | None) -> Operand:
    """Return what a kernel wrote as a matmul operand: FP8 by `scaling`, or bf16 (scaling None)."""
    return data if scaling is None else Fp8(data, scaling.inverse)


def outputs(x: torch.Tensor, scaling: Scaling | None,
            transpose: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the memory for a kernel's output of x's shape (M, K), and for the output's transpose (K, M).

    Both are FP8 by `scaling`; the second is None if it is not wanted (transpose=False), or if matmuls need none.
    scaling None: x itself, which the kernel overwrites, and None.
    """
    if scaling is None:
        return x, None
    M, K = x.shape
    rows = torch.empty(M, K, dtype=scaling.dtype, device=x.device)
    cols = torch.empty(K, M, dtype=scaling.dtype, device=x.device) if transpose and needs_transposes() else None
    return rows, cols


def as_cols(rows: torch.Tensor | None, cols: torch.Tensor | None, scaling: Scaling | None) -> Operand:
    """Return the cols operand of an output: cols, or if a kernel wrote none, the transposed rows."""
    return transposed(as_operand(rows, scaling)) if cols is None else as_operand(cols, scaling)


def as_operands(rows: torch.Tensor, cols: torch.Tensor | None, scaling: Scaling | None) -> Operands:
    """Return what a kernel wrote to outputs() as matmul operands (rows, cols)."""
    return as_operand(rows, scaling), as_cols(rows, cols, scaling)


def scale_and_amax(scaling: Scaling | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a kernel's arguments scale and amax; (None, None) if it writes bf16."""
    return (None, None) if scaling is None else (scaling.scale, scaling.amax)


@functools.cache
def te_gemm() -> Callable | None:
    """Return TE's FP8 matmul as function(a, b, dtype, out, add, fast), with matmul()'s arguments.

    Return None where it cannot run (no TE, or a GPU older than sm_89): FP8 is then emulated.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return None
    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
        te_types()
    except Exception:  # not installed, broken, or too old
        return None

    def in_memory(x: Fp8) -> tuple[Any, bool]:
        """Return the matrix as it lies in memory, and whether x is its transpose."""
        is_view = not x.data.is_contiguous()
        data = x.data.t() if is_view else x.data
        return Float8TensorStorage(data=data.view(torch.uint8), fp8_scale_inv=x.inverse_scale,
                                   fp8_dtype=te_types()[0][data.dtype], fake_dtype=torch.bfloat16), is_view

    def gemm(a, b, dtype, out, add, fast):
        # BLAS is column-major and torch row-major: its first operand is our second, and a @ b.T of two rows is "TN".
        # With views it is "NN" or "NT", as TE's own Linear has it (pytorch/module/linear.py:1427, :1606)
        (a, a_is_view), (b, b_is_view) = in_memory(a), in_memory(b)
        layout = ("N" if b_is_view else "T") + ("T" if a_is_view else "N")
        return general_gemm(b, a, dtype, out=out, accumulate=add, layout=layout, use_split_accumulator=not fast)[0]

    return gemm


@functools.cache
def needs_transposes() -> bool:
    """Return whether cols operands in FP8 must be matrices of their own; False: views of the rows will do.

    It depends on the GPU: cards.any_fp8_layout(). The emulation multiplies views too.
    """
    return te_gemm() is not None and not cards.any_fp8_layout(torch.cuda.get_device_capability())


def matmul(a: Operand, b: Operand, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None,
           add: bool = True, fast: bool = False) -> torch.Tensor:
    """Return a @ b.T (M, N) with fp32 accumulation.

    Args:
        a, b: (M, K) and (N, K); both Fp8, or both bf16. Contiguous, or transposed views: of FP8 matrices only unless
            needs_transposes(), and of b alone or of both.
        dtype: the result's dtype, if `out` is None.
        out: fp32 (M, N) that receives the result.
        add: add to `out` (True) or overwrite it (False).
        fast: let FP8 sums stay in the tensor cores, as TE does in forward passes. Otherwise partial sums are promoted
            to fp32 (cuBLAS's "split accumulator").
    A CPU, and emulated FP8 on a GPU, multiply in fp32, which holds the same products exactly, and return fp32; the
    caller rounds if it has to.
    """
    scale = None
    if isinstance(a, Fp8):
        if a.data.is_cuda and te_gemm():
            return te_gemm()(a, b, dtype if out is None else out.dtype, out, add and out is not None, fast)
        # Emulation: exact products of the FP8 values, scaled after the sum as in cuBLAS
        scale, a, b = a.inverse_scale * b.inverse_scale, a.data.float(), b.data.float()
    if a.is_cuda and scale is None:
        if out is not None:
            return torch.addmm(out, a, b.t(), beta=float(add), out_dtype=torch.float32, out=out)
        return a @ b.t() if dtype == a.dtype else torch.mm(a, b.t(), out_dtype=dtype)
    with torch.autocast(a.device.type, enabled=False):  # autocast would run the matmul in bf16
        product = a.float() @ b.float().t() if scale is None else (a @ b.t()) * scale
        return product if out is None else out.add_(product) if add else out.copy_(product)


@functools.cache
def te_types() -> tuple[dict[torch.dtype, Any], Any]:
    """Return TE's enumeration of number formats by torch's dtype, and TE's extension module with its kernels."""
    import transformer_engine_torch
    from transformer_engine.pytorch.constants import DType
    return {torch.float8_e4m3fn: DType.kFloat8E4M3, torch.float8_e5m2: DType.kFloat8E5M2}, transformer_engine_torch


def te_quantizer(scaling: Scaling, colwise: bool = True) -> Any:
    """Return TE's quantizer for `scaling`; colwise: make the transpose too.

    Its results are bare storages (internal = True), because autograd does not need to follow them.
    """
    from transformer_engine.pytorch import Float8Quantizer
    amax = torch.empty_like(scaling.scale) if scaling.amax is None else scaling.amax
    quantizer = Float8Quantizer(scaling.scale, amax, te_types()[0][scaling.dtype], columnwise=colwise)
    quantizer.internal = True
    return quantizer


@functools.cache
def own_quantize() -> bool:
    """Return whether quantize() and transposed() run our Triton kernels, not TE's: on the GPUs of cards.own_quantize().

    Both write the same bits.
    """
    return te_gemm() is not None and cards.own_quantize(torch.cuda.get_device_capability())


def quantize(x: torch.Tensor, scaling: Scaling | None, colwise: bool = True) -> Operands:
    """Return x (M, K) and its transpose as matmul operands (rows, cols).

    In FP8 by `scaling`, saturating, with NaN staying NaN; or x itself and its view x.t(), if `scaling` is None.
    colwise=False: cols are not wanted, and None in FP8.
    """
    if scaling is None:
        return x, x.t()
    if own_quantize() and use_kernels(x):
        return quantize_by_triton(x, scaling, colwise)
    if x.is_cuda and te_gemm():
        quantized = (scaling.quantizer or te_quantizer(scaling, colwise))(x)
        rows = Fp8(quantized._data.view(scaling.dtype), scaling.inverse)
        if not colwise:
            return rows, None
        if quantized._transpose is None:  # unless needs_transposes(): csrc/quantizer.cpp:375 asks the same question
            return rows, transposed(rows)
        return rows, Fp8(quantized._transpose.view(scaling.dtype), scaling.inverse)
    fp8_max = torch.finfo(scaling.dtype).max
    quantized = (x.float() * scaling.scale).clamp_(-fp8_max, fp8_max).to(scaling.dtype)
    if scaling.amax is not None:
        scaling.amax.copy_(torch.maximum(scaling.amax, x.detach().abs().max().float()))
    quantized = quantized.float()  # without FP8 hardware the values are multiplied in fp32
    return Fp8(quantized, scaling.inverse), Fp8(quantized.t(), scaling.inverse) if colwise else None


def quantize_by_triton(x: torch.Tensor, scaling: Scaling, colwise: bool) -> Operands:
    """Return what quantize() returns, by our kernel."""
    (M, K), x = x.shape, x.contiguous()
    # The kernel writes words of four rows. Matrices of other heights are transposed afterwards
    rows, cols = outputs(x, scaling, transpose=colwise and M % 4 == 0)
    kernels.quantize_fp8[(triton.cdiv(M, 128), triton.cdiv(K, 64))](
        x, rows, as_int32(cols), *scale_and_amax(scaling), M, K, scaling.dtype == torch.float8_e5m2, 32, 64)
    return as_operands(rows, cols, scaling) if colwise else (as_operand(rows, scaling), None)


def columns(x: torch.Tensor, scaling: Scaling | None) -> Operand:
    """Return the cols operand (K, M) of x (M, K): of bf16 values that quantize() took in the forward pass, by the same
    scale, without recording the amax again; or of FP8 values, or of bf16 values that stay bf16 (scaling None)."""
    if scaling is None or x.dtype != torch.bfloat16:
        return transposed(as_operand(x, scaling))
    if not use_kernels(x):
        return quantize(x, scaling._replace(amax=None, quantizer=None))[1]
    M, K = x.shape
    cols = torch.empty(K, M, dtype=scaling.dtype, device=x.device)
    kernels.quantize_fp8[(triton.cdiv(M, 128), triton.cdiv(K, 64))](
        x, None, as_int32(cols), scaling.scale, None, M, K, scaling.dtype == torch.float8_e5m2, 32, 64)
    return as_operand(cols, scaling)


def transposed(operand: Operand) -> Operand:
    """Return the cols operand (K, M) of a rows operand (M, K): a view, or in FP8 a matrix if needs_transposes()."""
    if not isinstance(operand, Fp8):
        return operand.t()
    data = operand.data
    if needs_transposes() and own_quantize() and use_kernels(data):
        cols = transpose_by_triton(data)
    elif needs_transposes() and data.is_cuda:
        te_dtypes, te_kernels = te_types()
        cols = te_kernels.fp8_transpose(data.view(torch.uint8), te_dtypes[data.dtype], out=None).view(data.dtype)
    else:
        cols = data.t()
    return operand._replace(data=cols)


def transpose_by_triton(data: torch.Tensor) -> torch.Tensor:
    """Return the transpose (K, M) of an FP8 matrix (M, K), contiguous."""
    M, K = data.shape
    if M % 4 or K % 4:  # the kernel reads and writes words of four values
        return data.t().contiguous()
    cols = torch.empty(K, M, dtype=data.dtype, device=data.device)
    kernels.transpose_fp8[(triton.cdiv(M, 128), triton.cdiv(K, 128))](as_int32(data), as_int32(cols), M, K, 32, 32)
    return cols


def weight_operand(weight: torch.nn.Parameter, scaling: Callable[[torch.Tensor], Scaling | None], first: bool | None,
                   cache: dict[torch.nn.Parameter, Operands]) -> Operands:
    """Return a weight (M, K) as matmul operands (rows, cols).

    Args:
        scaling: function(weight) that returns how to quantize it, or None for bf16.
        first: True in a step's first micro-batch, which fills `cache`; False in the others, which read it;
            None: quantize anew and leave the cache alone.
        cache: the operands of all weights.
    """
    if first is False and weight in cache:
        return cache[weight]
    values = weight.detach()
    weight_scaling = scaling(values)
    if weight_scaling is not None:
        # Delayed scaling updates its scale between micro-batches; the cached values keep theirs
        operands = quantize(values, weight_scaling._replace(inverse=weight_scaling.inverse.clone()))
    else:
        # A CPU multiplies these values in fp32
        values = values.bfloat16() if values.is_cuda else values.bfloat16().float()
        operands = values, values.t()
    if first is not None:
        cache[weight] = operands
    return operands


def current_scaling(x: torch.Tensor, dtype: torch.dtype) -> Scaling:
    """Return the Scaling that maps the largest |value| of x to the largest of the format; scale 1 if x is all zeros."""
    amax = torch.linalg.vector_norm(x.detach(), math.inf, dtype=torch.float32).reshape(1)
    scale = (torch.finfo(dtype).max / amax).clamp(max=torch.finfo(torch.float32).max)  # inf times a zero would be NaN
    scale = torch.where(amax == 0, 1.0, scale)
    return Scaling(scale, 1.0 / scale, None, dtype)


class AddNorm(torch.autograd.Function):
    """Compute RMSNorm(x + delta) * gain, for the model's last norm. x, delta, result (..., C) bf16; gain (C,) fp32."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        residual, y, rstd = add_norm(x, delta, gain, eps, None)
        ctx.save_for_backward(residual, gain, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple:
        residual, gain, rstd = ctx.saved_tensors
        dx, _, dgain, _ = add_norm_grad(dy.flatten(0, -2), residual, gain, rstd, None)
        dx = dx.view(dy.shape)
        return dx, dx, dgain, None


class EmbedNorm(torch.autograd.Function):
    """Look up token embeddings and compute their RMSNorm without gain, in bf16.

    Args:
        table: (V, C), fp32.
        where: the tokens, N of them.
        in_place: as in weight_gradient(); the gradient is added, never written over.
    Returns: (N, C).
    """

    @staticmethod
    def forward(ctx, table: torch.Tensor, eps: float, where: TokenOrder, in_place: str) -> torch.Tensor:
        N, C = len(where.tokens), table.shape[1]
        y = torch.empty(N, C, dtype=torch.bfloat16, device=table.device)
        rstd = torch.empty(N, 1, dtype=torch.float32, device=table.device)
        kernels.embed_norm_forward[(N,)](table, where.tokens, y, rstd, C, eps, triton.next_power_of_2(C))
        ctx.save_for_backward(table, y, rstd)
        ctx.where, ctx.in_place = where, in_place
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple:
        table, y, rstd = ctx.saved_tensors
        ones = torch.ones(max(y.shape), device=dy.device)
        # Of normalized rows the norm's gradient lacks the factor rstd, which table_gradient() multiplies by
        d_rows, *_ = add_norm_grad(dy, y, ones[:y.shape[1]], ones[:len(y)], None)
        return table_gradient(table, d_rows, y.shape[1], rstd, ctx.where, ctx.in_place), None, None, None


class TokenEmbedding(torch.nn.Embedding):
    """Token embedding -> RMSNorm without gain."""

    def __init__(self, cfg: Any, norm: Callable, device: torch.device):
        """norm: plain.rms_norm, compiled or not."""
        super().__init__(cfg.vocab_size, cfg.n_embd, device=device)
        self.norm, self.eps = norm, cfg.norm_eps

    def forward(self, idx: torch.Tensor, where: TokenOrder | None = None, in_place: str = "") -> torch.Tensor:
        """Return (B, T, C) bf16 for token ids (B, T); with `where`, by EmbedNorm."""
        if where is None:
            return self.norm(super().forward(idx), self.eps)
        return EmbedNorm.apply(self.weight, self.eps, where, in_place).view(*idx.shape, -1)


class Mix(NamedTuple):
    """What add_norm mixes into the residual: x_scale * (x + delta) + x0_scale * x0."""

    x0: torch.Tensor        # (..., C) bf16
    x_scale: torch.Tensor   # one element
    x0_scale: torch.Tensor  # one element


def add_norm(x: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor, eps: float, scaling: Scaling | None,
             mix: Mix | None = None) -> tuple[torch.Tensor, Operand, torch.Tensor]:
    """Return (residual, y, rstd): residual = x + delta (N, C), y = RMSNorm(residual) * gain (N, C), rstd (N,) fp32.

    x (..., C); without delta and mix the residual is x itself. y is bf16, or FP8 by `scaling`. rstd is 1 / RMS of each
    row. RMSNorm: arXiv 1910.07467.
    """
    x = x.flatten(0, -2)
    N, C = x.shape
    same = delta is None and mix is None
    residual = x if same else torch.empty(N, C, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(N, C, dtype=torch.bfloat16 if scaling is None else scaling.dtype, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    rows_per_program = 4
    kernels.add_norm_forward[(triton.cdiv(N, rows_per_program),)](
        x, x if delta is None else delta, *(mix or (x, x, x)), gain, residual, y, rstd, *scale_and_amax(scaling), N, C,
        eps, delta is not None, mix is not None, scaling is not None, rows_per_program, triton.next_power_of_2(C))
    return residual, as_operand(y, scaling), rstd


def kept_for_backward(y: Operand, scaling: Scaling | None) -> torch.Tensor | None:
    """Return what backward needs of a norm's output y; None if norm_columns() will make its transpose anew."""
    return y if scaling is None else None if needs_transposes() else y.data


def norm_columns(y: torch.Tensor | None, residual: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor,
                 scaling: Scaling | None) -> Operand:
    """Return the cols operand (C, N) of add_norm's y, from kept_for_backward()'s result.

    If that is None, y is computed anew from residual (N, C) bf16, gain (C,) and rstd (N,) fp32, and quantized by
    `scaling`, with the same bits: keeping nothing saves 1 byte a value until backward, and costs reading 1 byte more.
    """
    if y is not None:
        return transposed(as_operand(y, scaling))
    N, C = residual.shape
    cols = torch.empty(C, N, dtype=scaling.dtype, device=residual.device)
    kernels.norm_columns_fp8[(triton.cdiv(N, 128), triton.cdiv(C, 64))](
        residual, gain, rstd, as_int32(cols), scaling.scale, N, C, 32, 64)
    return as_operand(cols, scaling)


def add_norm_grad(dy: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor,
                  d_residual: torch.Tensor | None, mix: Mix | None = None, d_x0: torch.Tensor | None = None,
                  scaling: Scaling | None = None) -> tuple[torch.Tensor, Operand, torch.Tensor, Mix | None]:
    """Return the gradient of add_norm's x (N, C), which delta shares; the same in E5M2 by `scaling` as a matmul operand
    (itself if that is None); and the gradients of gain (C,) and of mix.

    dy (N, C): gradient of y. d_residual (N, C): gradient that reaches the residual past the norm; None: there is none.
    d_x0, of x0's shape: gradient of x0 from later blocks, to which this one's is added; used with mix only.
    """
    N, C = residual.shape
    rows_per_program = 16
    dx = torch.empty_like(residual)
    rows = None if scaling is None else torch.empty(N, C, dtype=scaling.dtype, device=dx.device)
    programs = triton.cdiv(N, rows_per_program)
    dgain_parts = torch.empty(programs, C, dtype=torch.float32, device=dy.device)
    d_x0_out, dots = dx if mix is None else torch.empty_like(mix.x0), dgain_parts
    if mix is not None:
        dots = torch.empty(2, programs, dtype=torch.float32, device=dy.device)
    kernels.add_norm_backward[(programs,)](
        dy, residual, gain, rstd, dx if d_residual is None else d_residual, *(mix or (dx, dx, dx)),
        dx if d_x0 is None else d_x0, dx, rows, *scale_and_amax(scaling), dgain_parts, d_x0_out, dots, N, C,
        d_residual is not None, mix is not None, rows_per_program, triton.next_power_of_2(C), num_warps=8)
    d_mix = None
    if mix is not None:
        # residual = x_scale * (x + delta) + x0_scale * x0, and x + delta was not kept
        residual_dot, x0_dot = dots.sum(1)
        d_x_scale = (residual_dot - mix.x0_scale * x0_dot) / mix.x_scale
        d_x_scale = torch.where(mix.x_scale.abs() > 1e-3, d_x_scale, 0)  # the quotient says nothing any more
        d_mix = Mix(d_x0_out, d_x_scale.to(mix.x_scale.dtype), x0_dot.to(mix.x0_scale.dtype))
    return dx, as_operand(dx if rows is None else rows, scaling), dgain_parts.sum(0).to(gain.dtype), d_mix


def as_int32(cols: torch.Tensor | None) -> torch.Tensor | None:
    """View an FP8 matrix (K, M) as the 32-bit words (K, M / 4) that the kernels read or write; None for None.

    M must be a multiple of 4: torch raises RuntimeError otherwise.
    """
    return None if cols is None else cols.view(torch.int32)


def weight_gradient(dy_cols: Operand, x_cols: Operand, weight: torch.Tensor, in_place: str) -> torch.Tensor | None:
    """Compute a weight's gradient dy.T @ x (M, K) from dy_cols (M, N) and x_cols (K, N).

    in_place: "" returns it in the weight's dtype. "add" adds it to gradient_of(weight), "write" overwrites that; both
    return None, or the gradient if gradient_of(weight) does not exist yet.
    """
    given = gradient_of(weight) if in_place else None
    if given is not None:
        matmul(dy_cols, x_cols, out=given, add=in_place == "add")
        return None
    return matmul(dy_cols, x_cols, weight.dtype)


class Passed:
    """A gradient in FP8, which the kernel that computes it writes for the part before, whose matmuls need it."""

    def __init__(self, scaling: Scaling) -> None:
        """scaling: how the gradient is quantized."""
        self.scaling, self.kept = scaling, None

    def put(self, gradient: torch.Tensor, rows: Operand) -> None:
        """Keep the rows operand of a gradient (N, C)."""
        self.kept = gradient, rows

    def take(self, gradient: torch.Tensor) -> Operand | None:
        """Return what was kept, or None if autograd has changed the gradient on its way."""
        kept, self.kept = self.kept, None
        return kept[1] if kept is not None and kept[0].data_ptr() == gradient.data_ptr() else None


class QKVLayer(NamedTuple):
    """What one block's FusedQKV needs besides tensors. `input` to `d_qkv`: how they are quantized; None: bf16."""

    fused: "FusedBlocks"
    eps: float                         # RMSNorm's
    n_head: int
    cos: torch.Tensor                  # (T, D / 2) fp32
    sin: torch.Tensor
    on_last_gradient: Callable | None  # called when the backward pass has quantized its last gradient
    input: Scaling | None              # RMSNorm's output, the matmul's input
    weight: Scaling | None
    d_qkv: Scaling | None              # gradient of the matmul's output
    d_before: Passed | None = None     # gradient of x, for the MLPLayer of the block before; None: not in FP8
    quack: bool = False                # QuACK multiplies, which is faster here than cuBLAS


class FusedQKV(torch.autograd.Function):
    """Compute a block's first part: x + delta -> RMSNorm -> q, k, v -> RoPE and QK norm.

    Args:
        x: (B, T, C) bf16, the residual stream.
        delta: (B, T, C) bf16, output of the previous block's MLP; None in the first block.
        gain, weight: (C,) and (3C, C), fp32.
        layer: from FusedBlocks.register().
        x0, x_scale, x0_scale: (B, T, C) bf16 and one element each: the residual is x_scale * (x + delta) + x0_scale *
            x0. None: it is x + delta.
        table, gate: of a ValueEmbedding, which is added to v; None: there is none.
    Returns: the residual (B, T, C); q, k, v (B, T, H, D), bf16, views of one tensor (TE's layout bs3hd), which
    attention takes without a copy; and x0 for the next block, so that its gradient is summed in the kernel.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor, weight: torch.Tensor,
                layer: QKVLayer, x0: torch.Tensor | None = None, x_scale: torch.Tensor | None = None,
                x0_scale: torch.Tensor | None = None, table: torch.Tensor | None = None,
                gate: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        B, T, C = x.shape
        mix = None if x0 is None else Mix(x0, x_scale, x0_scale)
        residual, y, rstd = add_norm(x, delta, gain, layer.eps, layer.input, mix)
        weight_rows, ctx.weight_cols = layer.fused.operand(weight, layer.weight)
        qkv = epilogues.plain_matmul(y, weight_rows) if layer.quack else matmul(y, weight_rows, fast=True)  # (N, 3C)
        rope_rstd = rope_qk_norm_in_place(qkv, layer.cos, layer.sin, T, layer.n_head, layer.eps)
        gate_inputs, gates = None, None
        if table is not None:
            gate_inputs, gates = add_value_embedding(qkv, table, gate, layer.fused.where, residual, rstd, gain)
        ctx.layer, ctx.add, ctx.in_place, ctx.where = layer, delta is not None, layer.fused.in_place, layer.fused.where
        ctx.save_for_backward(residual, gain, rstd, weight, qkv, rope_rstd, kept_for_backward(y, layer.input),
                              x0, x_scale, x0_scale, table, gate, gate_inputs, gates)
        q, k, v = qkv.view(B, T, 3, layer.n_head, C // layer.n_head).unbind(2)
        return residual.view(B, T, C), q, k, v, None if x0 is None else x0.view_as(x0)

    @staticmethod
    def backward(ctx, d_residual: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
                 d_x0: torch.Tensor | None) -> tuple:
        (residual, gain, rstd, weight, qkv, rope_rstd, y, x0, x_scale, x0_scale, table, gate, gate_inputs,
         gates) = ctx.saved_tensors
        layer = ctx.layer
        d_rows, d_cols = rope_qk_norm_grad(dq, dk, dv, qkv, rope_rstd, layer.cos, layer.sin, layer.d_qkv)
        dy = matmul(d_rows, ctx.weight_cols)
        d_table, d_gate = None, None
        if table is not None:
            d_table, d_gate = value_embedding_grad(dv, dy, table, gate, ctx.where, gate_inputs, gates, ctx.in_place)
        mix = None if x0 is None else Mix(x0, x_scale, x0_scale)
        before = layer.d_before
        dx, dx_rows, dgain, d_mix = add_norm_grad(
            dy, residual, gain, rstd, d_residual, mix, d_x0, None if before is None else before.scaling)
        if before is not None:
            before.put(dx, dx_rows)
        y_cols = norm_columns(y, residual, gain, rstd, layer.input)
        d_weight = weight_gradient(d_cols, y_cols, weight, ctx.in_place)
        if layer.on_last_gradient:
            layer.on_last_gradient()
        dx = dx.view(d_residual.shape)
        return dx, dx if ctx.add else None, dgain, d_weight, None, *(d_mix or (None, None, None)), d_table, d_gate


def rope_qk_norm_in_place(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, T: int, n_head: int,
                          eps: float) -> torch.Tensor:
    """Apply nanofp8.plain.rope_qk_norm to qkv (N, 3C) bf16 in place.

    Return 1 / RMS of each head of q and k: (N * 2 * n_head,) fp32.
    """
    N, C3 = qkv.shape
    rstd = torch.empty(N * 2 * n_head, dtype=torch.float32, device=qkv.device)
    kernels.rope_qk_norm_forward[(triton.cdiv(len(rstd), 16),)](
        qkv, cos, sin, rstd, len(rstd), T, 2 * n_head, C3, eps, C3 // 6 // n_head, 16)
    return rstd


def rope_qk_norm_grad(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, qkv: torch.Tensor, rstd: torch.Tensor,
                      cos: torch.Tensor, sin: torch.Tensor, scaling: Scaling | None) -> Operands:
    """Return the gradient of what went into RoPE and QK norm, as matmul operands (N, 3C) and (3C, N).

    dq, dk, dv (B, T, H, D) bf16: gradients of the outputs; qkv (N, 3C) bf16: the outputs; rstd: from
    rope_qk_norm_in_place(). FP8 by `scaling`. In bf16 (scaling None) the result overwrites dq, dk and dv if they are
    views of one tensor, as attention returns them.
    """
    B, T, H, D = dq.shape
    N, C3 = qkv.shape
    packed = qkv.view(B, T, 3, H, D)
    is_packed = all(
        grad.stride() == packed.stride()[:2] + packed.stride()[3:] and grad.data_ptr() == dq.data_ptr() + i * H * D * 2
        and grad.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr() for i, grad in enumerate((dq, dk, dv)))
    grad = dq.as_strided(packed.shape, packed.stride()) if is_packed else torch.stack((dq, dk, dv), dim=2)
    grad, fp8 = grad.view(N, C3), scaling is not None
    rows, cols = outputs(grad, scaling)
    kernels.rope_qk_norm_backward[(triton.cdiv(N, 64), (3 if fp8 else 2) * H)](
        grad, qkv, cos, sin, rstd, rows, as_int32(cols), *scale_and_amax(scaling), N, T, 2 * H, C3, fp8, D // 2, 16,
        num_warps=min(32, max(4, D // 16)))
    return as_operands(rows, cols, scaling)


class RopeQKNorm(torch.autograd.Function):
    """Apply nanofp8.plain.rope_qk_norm in place, for blocks built from TE's modules.

    qkv (B, T, 3C) bf16 is overwritten: backward needs the outputs alone. cos, sin (T, D / 2) fp32. Returns q, k, v,
    each (B, T, H, D), views of qkv.
    """

    @staticmethod
    def forward(ctx, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_head: int,
                eps: float) -> tuple[torch.Tensor, ...]:
        B, T, C3 = qkv.shape
        qkv = qkv.detach().view(B * T, C3)
        ctx.save_for_backward(qkv, rope_qk_norm_in_place(qkv, cos, sin, T, n_head, eps), cos, sin)
        return qkv.view(B, T, 3, n_head, C3 // 3 // n_head).unbind(2)

    @staticmethod
    def backward(ctx, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple:
        qkv, rstd, cos, sin = ctx.saved_tensors
        rows, _ = rope_qk_norm_grad(dq, dk, dv, qkv, rstd, cos, sin, None)
        return rows.view(*dq.shape[:2], -1), None, None, None, None


class MLPLayer(NamedTuple):
    """What one block's FusedMLP needs besides tensors. `attention_out` to `d_mlp_out`: how these tensors are quantized;
    None: bf16."""

    fused: "FusedBlocks"
    eps: float                        # RMSNorm's
    attention_out: Scaling | None
    proj: Scaling | None              # weights: proj, fc1, fc2
    d_proj: Scaling | None            # gradient of proj's output
    input: Scaling | None             # RMSNorm's output, fc1's input
    fc1: Scaling | None
    d_pre_activation: Scaling | None  # gradient of fc1's output
    activation: Scaling | None        # relu^2's output, fc2's input
    fc2: Scaling | None
    d_mlp_out: Scaling | None         # gradient of fc2's output
    d_passed: Passed | None = None    # the same, if the next block's FusedQKV has quantized it
    quack: bool = False               # relu^2 within QuACK's matmuls; backward needs the activation, not fc1's output


def relu2(pre_activation: torch.Tensor, scaling: Scaling | None) -> torch.Tensor:
    """Return relu(pre_activation)^2, of its shape: bf16, or E4M3 by `scaling`."""
    size, dtype = pre_activation.numel(), pre_activation.dtype if scaling is None else scaling.dtype
    activation = torch.empty(pre_activation.shape, dtype=dtype, device=pre_activation.device)
    kernels.relu2_forward[(triton.cdiv(size, 8192),)](
        pre_activation, activation, *scale_and_amax(scaling), size, scaling is not None, 8192, num_warps=8)
    return activation


def relu2_grad(d_activation: torch.Tensor, pre_activation: torch.Tensor, activation: torch.Tensor | None,
               scaling: Scaling | None, activation_scaling: Scaling | None) -> tuple[Operand, Operand, Operand]:
    """Return the gradient of relu2's input as matmul operands (N, 4C) and (4C, N), and relu2's output as (4C, N).

    d_activation, pre_activation (N, 4C) bf16. In bf16 (scaling None) the result overwrites d_activation, and activation
    (N, 4C) is needed. In FP8 by `scaling`; activation is computed again, by activation_scaling. Of it the kernel writes
    the layout that the matmul takes. Where rows will do, the forward pass's could be kept instead. That would save this
    kernel 1 of the 6 bytes a value that it moves, for 1 byte a value of memory in every block until backward.
    """
    N, K = pre_activation.shape
    fp8 = scaling is not None
    rows, cols = outputs(d_activation, scaling)
    activation_rows, activation_cols = None, None
    if fp8 and cols is None:
        activation = activation_rows = torch.empty(N, K, dtype=activation_scaling.dtype, device=rows.device)
    elif fp8:
        activation_cols = torch.empty(K, N, dtype=activation_scaling.dtype, device=rows.device)
    kernels.relu2_backward[(triton.cdiv(N, 128), triton.cdiv(K, 64))](
        d_activation, pre_activation, rows, as_int32(cols), activation_rows, as_int32(activation_cols),
        *scale_and_amax(scaling), scale_and_amax(activation_scaling)[0], N, K, fp8, 32, 64)
    return *as_operands(rows, cols, scaling), as_cols(activation, activation_cols, activation_scaling)


class FusedMLP(torch.autograd.Function):
    """Compute a block's second part: attention's output -> projection -> add -> RMSNorm -> MLP with relu^2.

    Args:
        attention_out: (B, T, C) bf16, attention's output.
        x: (B, T, C) bf16, the residual stream.
        proj, fc1, fc2: weights (C, C), (4C, C), (C, 4C), fp32.
        gain: (C,) fp32.
        layer: from FusedBlocks.register().
    Returns: the residual x + attention_out @ proj.T, and the MLP's output, which the next part adds, (B, T, C) bf16.
    relu^2: arXiv 2109.08668.
    """

    @staticmethod
    def forward(ctx, attention_out: torch.Tensor, x: torch.Tensor, proj: torch.Tensor, gain: torch.Tensor,
                fc1: torch.Tensor, fc2: torch.Tensor, layer: MLPLayer) -> tuple[torch.Tensor, torch.Tensor]:
        B, T, C = x.shape
        attention_out = attention_out.view(B * T, C)
        proj_rows, proj_cols = layer.fused.operand(proj, layer.proj)
        fc1_rows, fc1_cols = layer.fused.operand(fc1, layer.fc1)
        fc2_rows, fc2_cols = layer.fused.operand(fc2, layer.fc2)
        attention_rows, _ = quantize(attention_out, layer.attention_out, colwise=False)
        residual, y, rstd = add_norm(x, matmul(attention_rows, proj_rows, fast=True), gain, layer.eps, layer.input)
        pre_activation, scaling = None, layer.activation
        if layer.quack:
            activation = epilogues.relu2_matmul(y, fc1_rows, scaling)                  # (N, 4C)
        else:
            pre_activation = matmul(y, fc1_rows, fast=True)
            activation = relu2(pre_activation, scaling)
        mlp_out = matmul(as_operand(activation, scaling), fc2_rows, fast=True)
        ctx.layer, ctx.in_place, ctx.weight_cols = layer, layer.fused.in_place, (proj_cols, fc1_cols, fc2_cols)
        # Attention keeps its output for its own backward pass, so that this costs no memory
        remade = layer.attention_out is None or needs_transposes()
        ctx.save_for_backward(attention_out if remade else attention_rows.data, residual, gain, rstd, pre_activation,
                              proj, fc1, fc2, kept_for_backward(y, layer.input),
                              activation if scaling is None or layer.quack else None)
        return residual.view(B, T, C), mlp_out.view(B, T, C)

    @staticmethod
    def backward(ctx, d_residual: torch.Tensor, d_mlp_out: torch.Tensor) -> tuple:
        attention_out, residual, gain, rstd, pre_activation, proj, fc1, fc2, y, activation = ctx.saved_tensors
        layer, shape, (proj_cols, fc1_cols, fc2_cols) = ctx.layer, d_mlp_out.shape, ctx.weight_cols
        d_mlp_out = d_mlp_out.flatten(0, 1)
        d_rows = None if layer.d_passed is None else layer.d_passed.take(d_mlp_out)
        d_rows, d_cols = quantize(d_mlp_out, layer.d_mlp_out) if d_rows is None else (d_rows, transposed(d_rows))
        if layer.quack:
            activation = as_operand(activation, layer.activation)
            d_pre_rows, d_pre_cols = epilogues.relu2_backward_matmul(
                d_rows, fc2_cols, activation, layer.d_pre_activation)
            activation_cols = transposed(activation)
        else:
            d_pre_rows, d_pre_cols, activation_cols = relu2_grad(
                matmul(d_rows, fc2_cols), pre_activation, activation, layer.d_pre_activation, layer.activation)
        d_fc2 = weight_gradient(d_cols, activation_cols, fc2, ctx.in_place)
        dy = matmul(d_pre_rows, fc1_cols)
        dx, d_rows, dgain, _ = add_norm_grad(dy, residual, gain, rstd, d_residual.flatten(0, 1), scaling=layer.d_proj)
        y_cols = norm_columns(y, residual, gain, rstd, layer.input)
        d_fc1 = weight_gradient(d_pre_cols, y_cols, fc1, ctx.in_place)
        d_cols = transposed(d_rows)
        d_attention_out = matmul(d_rows, proj_cols)
        attention_cols = columns(attention_out, layer.attention_out)
        d_proj = weight_gradient(d_cols, attention_cols, proj, ctx.in_place)
        return d_attention_out.view(shape), dx.view(shape), d_proj, dgain, d_fc1, d_fc2, None


class FusedBlocks:
    """Hold what the fused blocks share: which layers run in FP8, their scales, and the cache of quantized weights.

    Delayed scaling's state stays in TE's layers; the module's docstring says how it is shared. Only one pass at a time:
    a backward pass must end before the next forward pass begins, because begin() overwrites the scales.
    """

    def __init__(self, model: Any, quack: epilogues.Quack = epilogues.NO_QUACK) -> None:
        """model: train.GPT, whose blocks are made of TE's layers. quack: where QuACK multiplies."""
        self.model, self.cache = model, {}
        self.quack = quack
        self.formats = {}  # {whether FP8 is on: (blocks, TE's scales, buffer for their copy, buffer for its inverse)}

    def begin(self, x: torch.Tensor, first: bool | None, in_place: str, where: TokenOrder) -> None:
        """Start a pass: choose the layers of the present format and copy their scales.

        x: any tensor on the model's device. first: as in GPT.forward(). in_place: as in weight_gradient(). where: the
        pass's tokens.
        """
        state = self.model.te.quantization.FP8GlobalStateManager
        enabled = state.is_fp8_enabled()
        if enabled not in self.formats:
            self.formats[enabled] = self.register(x, state)
        self.first, self.in_place, self.where = first, in_place, where
        self.blocks, live_scales, scale, inverse = self.formats[enabled]
        if live_scales:
            torch.cat(live_scales, out=scale)
            torch.reciprocal(scale[:, None], out=inverse[:, :1])

    def register(self, x: torch.Tensor, state: Any) -> tuple[list[tuple[QKVLayer, MLPLayer]], list[torch.Tensor],
                                                             torch.Tensor, torch.Tensor]:
        """Let TE set up its layers for the present format, and allocate the buffers of their scales.

        x: any tensor on the model's device. state: TE's FP8GlobalStateManager.
        Returns: (QKVLayer, MLPLayer) of each block; the layers' own scales; buffers for a copy of all scales (total,)
        and for its inverse (total, 4), of which the first column is used.
        """
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
        inverse = torch.ones(total, 4, device=x.device)  # 16 bytes apart: cuBLAS requires this alignment
        offsets = dict(zip(((layer, key) for layer, key, _ in fp8_metas),
                           itertools.accumulate((len(meta.scale) for *_, meta in fp8_metas), initial=0), strict=False))

        def tensor_scaling(layer: Any, key: str, i: int, colwise: bool = True) -> Scaling | None:
            """Return the Scaling of a layer's i-th tensor, or None if the layer runs in bf16.

            TE numbers the tensors (FP8FwdTensors, FP8BwdTensors): forward, input 0 and weight 1 of the first matmul, 3
            and 4 of the second; backward, output gradient 0 of the first matmul, 2 of the second.
            """
            if (layer, key) not in offsets:
                return None
            offset, dtype = offsets[layer, key] + i, torch.float8_e4m3fn if key == "scaling_fwd" else torch.float8_e5m2
            amax = layer.fp8_meta[key].amax_history[0, i:i + 1]
            scaling = Scaling(scale[offset:offset + 1], inverse[offset, :1], amax, dtype)
            return scaling._replace(quantizer=te_quantizer(scaling, colwise))

        blocks, forward, backward, before = [], "scaling_fwd", "scaling_bwd", None
        for i, block in enumerate(self.model.blocks):
            attn, qkv, proj, mlp = block.attn, block.attn.qkv, block.attn.proj, block.mlp
            # The first block is the last in backward: TE's own modules update the gradients' scales there too
            on_last_gradient = None
            if i == 0 and fp8_metas:
                on_last_gradient = functools.partial(state.reduce_and_update_fp8_tensors, forward=False)
            d_mlp_out = tensor_scaling(mlp, backward, 2)
            passed = None if d_mlp_out is None else Passed(d_mlp_out)
            blocks.append((
                QKVLayer(
                    fused=self, eps=attn.eps, n_head=attn.n_head, cos=self.model.cos, sin=self.model.sin,
                    on_last_gradient=on_last_gradient, input=tensor_scaling(qkv, forward, 0),
                    weight=tensor_scaling(qkv, forward, 1), d_qkv=tensor_scaling(qkv, backward, 0), d_before=before,
                    quack=self.quack.fp8 and (qkv, forward) in offsets),
                MLPLayer(
                    fused=self, eps=attn.eps, attention_out=tensor_scaling(proj, forward, 0, colwise=False),
                    proj=tensor_scaling(proj, forward, 1), d_proj=tensor_scaling(proj, backward, 0),
                    input=tensor_scaling(mlp, forward, 0), fc1=tensor_scaling(mlp, forward, 1),
                    d_pre_activation=tensor_scaling(mlp, backward, 0), activation=tensor_scaling(mlp, forward, 3),
                    fc2=tensor_scaling(mlp, forward, 4), d_mlp_out=d_mlp_out, d_passed=passed,
                    quack=self.quack.fp8 if (mlp, forward) in offsets else self.quack.bf16)))
            before = passed
        return blocks, [meta.scale for *_, meta in fp8_metas], scale, inverse

    def operand(self, weight: torch.nn.Parameter, scaling: Scaling | None) -> Operands:
        """Return a weight as matmul operands (rows, cols), quantized once a step; scaling None: bf16."""
        return weight_operand(weight, lambda _: scaling, self.first, self.cache)


class MicroBatchGraphs:
    """Run the forward and backward pass of a micro-batch as a CUDA graph, to save the time of launching kernels.

    There are two graphs: the one for a step's first micro-batch overwrites the gradients and quantizes the weights, the
    one for the others adds to the gradients and uses the same quantized weights.

    Everything that a graph reads or writes keeps its address: inputs, loss, gradients, scales, quantized weights.
    Gradients must therefore not be set to None. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, parallel: Any, loader: Any, precision: Any, procs: Any) -> None:
        """Allocate gradients and capture the graphs; arguments: train.Parallel, DataLoader, Precision, Processes."""
        self.model, self.precision, self.procs = parallel.model, precision, procs
        self.graphs, self.pool, self.loss_weight = {}, torch.cuda.graph_pool_handle(), loader.loss_weight
        self.batch, self.loss = list(loader.peek()), torch.zeros((), device=procs.device)
        with parallel.buffers.in_model():
            for parameter in self.model.parameters():
                if gradient_of(parameter) is None:
                    parameter.grad = torch.zeros_like(parameter)
            # Matmuls overwrite the gradients of their weights; all others are added to and must start from zero
            written = {id(parameter) for parameter in (*self.model.matrices(), self.model.head.weight)}
            self.summed_gradients = [gradient_of(parameter) for parameter in self.model.parameters()
                                     if id(parameter) not in written]
            for first in (True, False)[:loader.accumulation]:
                self.capture(first)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, first: bool) -> torch.Tensor:
        """Run one micro-batch and return its share of the step's loss, a scalar that the next call overwrites.

        x (B, T) int32: tokens; y (B, T) int64: targets; first: whether it is the step's first micro-batch.
        """
        self.batch[0].copy_(x)
        self.batch[1].copy_(y)
        self.graphs[first].replay()
        return self.loss

    def capture(self, first: bool) -> None:
        """Capture the graph of a step's first micro-batch (first=True) or of its others."""
        self.graphs[first] = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may allocate pinned memory meanwhile, which a global capture forbids
        with torch.cuda.graph(self.graphs[first], pool=self.pool, capture_error_mode="thread_local"):
            if first:
                torch._foreach_zero_(self.summed_gradients)
            with self.precision.autocast(self.procs):
                loss = self.model(*self.batch, first=first, loss_weight=self.loss_weight,
                                  in_place="write" if first else "add")
            loss.backward()
            self.loss.copy_(loss.detach())
