"""Triton kernels for what lies between a block's matmuls, each in one pass over memory, and for the loss.

Importing this module needs Triton. Set TRITON_INTERPRET=1 before the import to run the kernels on a CPU in Triton's
interpreter, which the tests do.

Conventions:
- N = B * T tokens (rows), C = n_embd, V = vocabulary, H heads of D = 2 * HALF values. Matrices are row-major and
  contiguous. Values are bf16 in memory and fp32 in registers.
- An argument *_ptr points to a tensor; the docstrings name the tensor without _ptr. `columns`, `rows` and `tokens` are
  vectors of indices, `offsets` are the distances of the elements from a tensor's first element.
- FP8: outputs are rounded to E4M3 (largest value 448; activations) or E5M2 (57344; gradients) after multiplication by
  `scale` (one fp32 element), and saturate. `amax` (one fp32 element) is raised to the largest |value| before scaling:
  delayed scaling derives its next scale from it. Without FP8 outputs are bf16, and scale and amax are None.
- cols, or *_cols, is the transpose of an FP8 output. Hopper's FP8 matmuls need it when they sum over tokens. It is
  written as 32-bit words of four tokens each. A program therefore takes QUADS groups of four consecutive tokens: token
  4 * quad + i for i from 0 to 3. Launches need N divisible by 4 for a matrix with cols. An argument None is a constant:
  where matmuls need no transposes, kernels are compiled without them.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter cannot run PTX
LOG2_E = tl.constexpr(1.4426950408889634)
# PTX: four fp32 values, rounded and saturating, as FP8 bytes of one 32-bit word, lowest byte first
PACK = ("{{ .reg .b16 lo, hi; cvt.rn.satfinite.{0}.f32 lo, $2, $1; cvt.rn.satfinite.{0}.f32 hi, $4, $3; "
        "mov.b32 $0, {{lo, hi}}; }}")
TO_E4M3, TO_E5M2 = tl.constexpr(PACK.format("e4m3x2")), tl.constexpr(PACK.format("e5m2x2"))


@triton.jit
def round_fp8(values, output_ptr):
    """Return fp32 values, which fit it, in the FP8 format that `output_ptr` points to."""
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    if INTERPRETED or tl.target_info.cuda_capability_geq(9, 0):
        return values.to(dtype)
    # On Ada, Triton (3.6) would cut them to fp16 before it rounds them (triton pull request 11753)
    return tl.inline_asm_elementwise(TO_E4M3 if dtype.is_fp8e4nv() else TO_E5M2, "=r,f,f,f,f", [values],
                                     dtype=tl.uint8, is_pure=True, pack=4).to(dtype, bitcast=True)


@triton.jit
def as_fp8(values, scale, output_ptr, MAX: tl.constexpr):
    """Return values * scale in the dtype that `output_ptr` points to, saturating at MAX; NaN stays NaN."""
    return round_fp8(tl.clamp(values * scale, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL), output_ptr)


@triton.jit
def pack_fp8(values0, values1, values2, values3, scale, E5M2: tl.constexpr):
    """Return four fp32 tensors times scale as FP8 bytes of one tensor of 32-bit words, lowest byte first.

    E5M2 if true, E4M3 otherwise; saturating. The conversion is inline PTX because a compiler may get it wrong: ptxas of
    CUDA 13.0 breaks every fourth value when FP8 values are taken apart into bytes (a 16-bit shift of a register that
    holds two pairs; seen on an H100).
    """
    values0, values1, values2, values3 = values0 * scale, values1 * scale, values2 * scale, values3 * scale
    if INTERPRETED:
        packed = tl.zeros(values0.shape, tl.uint32)
        for values, shift in ((values0, 0), (values1, 8), (values2, 16), (values3, 24)):
            if E5M2:
                fp8 = tl.clamp(values, -57344.0, 57344.0).to(tl.float8e5)
            else:
                fp8 = tl.clamp(values, -448.0, 448.0).to(tl.float8e4nv)
            packed |= fp8.to(tl.uint8, bitcast=True).to(tl.uint32) << shift
        return packed
    return tl.inline_asm_elementwise(TO_E5M2 if E5M2 else TO_E4M3, "=r,f,f,f,f", [values0, values1, values2, values3],
                                     dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def raise_amax(amax_ptr, largest):
    """Raise amax to `largest`, a scalar, with one atomic operation a program, and none if it would change nothing.

    All programs write to the same address, so that atomics would wait for each other.
    """
    if largest > tl.load(amax_ptr):
        tl.atomic_max(amax_ptr, largest)


# Each *_rows function computes every fourth row of a program's output, stores it and returns it in fp32, so that its
# caller can pass four of them to pack_fp8().
@triton.jit
def quantize_rows(x_ptr, out_ptr, scale_ptr, rows, columns, M, K, E5M2: tl.constexpr):
    """Store the given rows and columns of x in FP8, if out is not None; return them, fp32, before the scale."""
    offsets, mask = rows.to(tl.int64)[:, None] * K + columns[None, :], (rows < M)[:, None] & (columns < K)[None, :]
    values = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if out_ptr is not None:
        fp8 = as_fp8(values, tl.load(scale_ptr), out_ptr, 57344.0 if E5M2 else 448.0)
        tl.store(out_ptr + offsets, fp8, mask=mask)
    return values


@triton.jit
def quantize_fp8(x_ptr, out_ptr, cols_ptr, scale_ptr, amax_ptr, M, K, E5M2: tl.constexpr, QUADS: tl.constexpr,
                 BLOCK: tl.constexpr):
    """Compute out = x * scale in FP8 and cols = out.T, and raise amax to the largest |x|, without NaN.

    x (M, K) bf16 or fp32; out (M, K) E5M2 or E4M3, or None; cols (K, M / 4) words of the same, or None; amax None: not
    raised. The results are those of Transformer Engine's kernel (common/transpose/rtc/cast_transpose.cu), bit for bit.
    A program takes 4 * QUADS rows and BLOCK columns.
    """
    quads, columns = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values0 = quantize_rows(x_ptr, out_ptr, scale_ptr, 4 * quads, columns, M, K, E5M2)
    values1 = quantize_rows(x_ptr, out_ptr, scale_ptr, 4 * quads + 1, columns, M, K, E5M2)
    values2 = quantize_rows(x_ptr, out_ptr, scale_ptr, 4 * quads + 2, columns, M, K, E5M2)
    values3 = quantize_rows(x_ptr, out_ptr, scale_ptr, 4 * quads + 3, columns, M, K, E5M2)
    if cols_ptr is not None:
        cols_offsets = columns.to(tl.int64)[:, None] * (M // 4) + quads[None, :]
        tl.store(cols_ptr + cols_offsets,
                 tl.trans(pack_fp8(values0, values1, values2, values3, tl.load(scale_ptr), E5M2)),
                 mask=(columns < K)[:, None] & (quads < M // 4)[None, :])
    if amax_ptr is not None:
        largest = tl.maximum(tl.maximum(tl.abs(values0), tl.abs(values1)),
                             tl.maximum(tl.abs(values2), tl.abs(values3)))
        raise_amax(amax_ptr, tl.max(largest))


@triton.jit
def transpose_fp8(x_ptr, cols_ptr, M, K, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the transpose of a matrix of bytes, of whatever format.

    x (M, K / 4): words of four columns; cols (K, M / 4): words of four rows. A program takes 4 * QUADS rows and
    4 * BLOCK columns. It works on words, because ptxas may get single bytes wrong, see pack_fp8().
    """
    quads, words = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = (4 * quads).to(tl.int64)[:, None] * (K // 4) + words[None, :]
    mask = (quads < M // 4)[:, None] & (words < K // 4)[None, :]
    row0 = tl.load(x_ptr + offsets, mask=mask, other=0)
    row1 = tl.load(x_ptr + offsets + K // 4, mask=mask, other=0)
    row2 = tl.load(x_ptr + offsets + 2 * (K // 4), mask=mask, other=0)
    row3 = tl.load(x_ptr + offsets + 3 * (K // 4), mask=mask, other=0)
    for i in tl.static_range(4):
        column = (row0 >> 8 * i & 255) | (row1 >> 8 * i & 255) << 8 | (row2 >> 8 * i & 255) << 16 | row3 >> 8 * i << 24
        cols_offsets = (4 * words + i).to(tl.int64)[:, None] * (M // 4) + quads[None, :]
        tl.store(cols_ptr + cols_offsets, tl.trans(column), mask=tl.trans(mask))


@triton.jit
def add_norm_forward(x_ptr, delta_ptr, x0_ptr, x_scale_ptr, x0_scale_ptr, gain_ptr, residual_ptr, y_ptr, rstd_ptr,
                     scale_ptr, amax_ptr, N, C, eps, ADD: tl.constexpr, MIX: tl.constexpr, FP8: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute residual = x + delta (if ADD), then y = RMSNorm(residual) * gain; ROWS rows a program.

    With MIX, residual = x_scale * (x + delta) + x0_scale * x0; both scales are one element.
    x (N, C) bf16, or fp32 without ADD and MIX; delta, x0, residual (N, C) bf16, used with ADD, MIX, either; gain (C,);
    y (N, C) bf16 or E4M3; rstd (N,) fp32: 1 / RMS of each row, written for backward. BLOCK: power of two >= C.
    """
    columns = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    largest = 0.0
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        offsets, mask = row.to(tl.int64) * C + columns, (columns < C) & (row < N)
        value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(delta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if MIX:
            value = value * tl.load(x_scale_ptr).to(tl.float32) + tl.load(x0_scale_ptr).to(tl.float32) * tl.load(
                x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADD or MIX:
            value = value.to(tl.bfloat16).to(tl.float32)  # the norm of the rounded values, as backward sees them
            tl.store(residual_ptr + offsets, value.to(tl.bfloat16), mask=mask)
        rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / C + eps)
        value = value * rstd * gain
        tl.store(rstd_ptr + row, rstd, mask=row < N)
        if FP8:
            largest = tl.maximum(largest, tl.max(tl.abs(value), axis=0))
            tl.store(y_ptr + offsets, as_fp8(value, tl.load(scale_ptr), y_ptr, 448.0), mask=mask)
        else:
            tl.store(y_ptr + offsets, value.to(tl.bfloat16), mask=mask)
    if FP8:
        raise_amax(amax_ptr, largest)


@triton.jit
def norm_columns_fp8(residual_ptr, gain_ptr, rstd_ptr, cols_ptr, scale_ptr, N, C, QUADS: tl.constexpr,
                     BLOCK: tl.constexpr):
    """Compute the transpose of add_norm_forward's FP8 output y once more, for the weight gradient.

    residual (N, C) bf16; gain (C,); rstd (N,) fp32; cols (C, N / 4) words of E4M3. A program takes 4 * QUADS rows and
    BLOCK columns.
    """
    quads, columns = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    values0 = normed_rows(residual_ptr, gain, rstd_ptr, 4 * quads, columns, N, C)
    values1 = normed_rows(residual_ptr, gain, rstd_ptr, 4 * quads + 1, columns, N, C)
    values2 = normed_rows(residual_ptr, gain, rstd_ptr, 4 * quads + 2, columns, N, C)
    values3 = normed_rows(residual_ptr, gain, rstd_ptr, 4 * quads + 3, columns, N, C)
    packed = pack_fp8(values0, values1, values2, values3, tl.load(scale_ptr), False)
    tl.store(cols_ptr + columns.to(tl.int64)[:, None] * (N // 4) + quads[None, :], tl.trans(packed),
             mask=(columns < C)[:, None] & (quads < N // 4)[None, :])


@triton.jit
def normed_rows(residual_ptr, gain, rstd_ptr, rows, columns, N, C):
    """Return RMSNorm(residual) * gain of the given rows and columns, fp32, with add_norm_forward's rounding."""
    offsets, mask = rows.to(tl.int64)[:, None] * C + columns[None, :], (rows < N)[:, None] & (columns < C)[None, :]
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
    return tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd[:, None] * gain[None, :]


@triton.jit
def embed_norm_forward(table_ptr, tokens_ptr, y_ptr, rstd_ptr, C, eps, BLOCK: tl.constexpr):
    """Compute y = RMSNorm(table[token]) of one token, and rstd, which is 1 / RMS of that row.

    table (V, C); tokens (N,) int32; y (N, C) bf16; rstd (N,) fp32. BLOCK: power of two >= C.
    """
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(tokens_ptr + token).to(tl.int64)
    value = tl.load(table_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / C + eps)
    tl.store(rstd_ptr + token, rstd)
    tl.store(y_ptr + token * C + columns, (value * rstd).to(tl.bfloat16), mask=columns < C)


@triton.jit
def add_norm_backward(dy_ptr, residual_ptr, gain_ptr, rstd_ptr, d_residual_ptr, x0_ptr, x_scale_ptr, x0_scale_ptr,
                      d_x0_ptr, dx_ptr, rows_ptr, scale_ptr, amax_ptr, dgain_ptr, d_x0_out_ptr, dots_ptr, N, C,
                      ADD: tl.constexpr, MIX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute dx = gradient through RMSNorm (+ d_residual, if ADD), rows = dx in E5M2, and each program's share of
    dgain.

    dy, residual, dx, rows (N, C); rows, scale, amax: None if not wanted; d_residual (N, C): gradient that reaches the
    residual past the norm; rstd (N,) fp32 from add_norm_forward; dgain (programs, C) fp32, which the caller sums over
    programs.
    With MIX, that sum g is the gradient of x_scale * x + x0_scale * x0. Then dx = x_scale * g,
    d_x0_out = d_x0 + x0_scale * g, and dots (2, programs) fp32 are each program's sums of g * residual and of g * x0.
    """
    columns = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    dgain = tl.zeros((BLOCK,), tl.float32)
    residual_dot, x0_dot = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    largest = 0.0
    for i in tl.range(ROWS, num_stages=3):  # loads the next rows meanwhile
        row = tl.program_id(0) * ROWS + i
        offsets, mask = row.to(tl.int64) * C + columns, (columns < C) & (row < N)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = residual * rstd
        dx = (dy * gain - normed * (tl.sum(dy * gain * normed, axis=0) / C)) * rstd
        if ADD:
            dx += tl.load(d_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if MIX:
            x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            residual_dot += dx * residual
            x0_dot += dx * x0
            d_x0 = tl.load(d_x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            d_x0 += tl.load(x0_scale_ptr).to(tl.float32) * dx
            tl.store(d_x0_out_ptr + offsets, d_x0.to(tl.bfloat16), mask=mask)
            dx *= tl.load(x_scale_ptr).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if rows_ptr is not None:
            dx = dx.to(tl.bfloat16).to(tl.float32)  # as if dx were quantized
            tl.store(rows_ptr + offsets, as_fp8(dx, tl.load(scale_ptr), rows_ptr, 57344.0), mask=mask)
            largest = tl.maximum(largest, tl.max(tl.abs(dx), axis=0))
        dgain += dy * normed
    if rows_ptr is not None:
        raise_amax(amax_ptr, largest)
    tl.store(dgain_ptr + tl.program_id(0) * C + columns, dgain, mask=columns < C)
    if MIX:
        tl.store(dots_ptr + tl.program_id(0), tl.sum(residual_dot, axis=0))
        tl.store(dots_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(x0_dot, axis=0))


@triton.jit
def value_embedding_forward(qkv_ptr, table_ptr, tokens_ptr, residual_ptr, rstd_ptr, gain_ptr, gate_ptr, inputs_ptr,
                            gates_ptr, C, heads, CHANNELS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Add gate * table[token] to v of one token, in place; a gate for each head of D values.

    gates = 3 * sigmoid(inputs @ gate.T), inputs = the first CHANNELS values of RMSNorm(residual) * gain.
    qkv (N, 3C) bf16; table (V, C); tokens (N,) int32; residual (N, C) bf16; rstd (N,) fp32; gain (C,); gate (heads,
    CHANNELS). Written for backward: inputs (N, CHANNELS), gates (N, heads), fp32. HEADS: power of two >= heads.
    """
    token, channels = tl.program_id(0).to(tl.int64), tl.arange(0, 16)
    head, used = tl.arange(0, HEADS), tl.arange(0, 16) < CHANNELS
    x = tl.load(residual_ptr + token * C + channels, mask=used, other=0.0).to(tl.float32)
    x *= tl.load(rstd_ptr + token) * tl.load(gain_ptr + channels, mask=used, other=0.0).to(tl.float32)
    weights = tl.load(gate_ptr + head[:, None] * CHANNELS + channels[None, :],
                      mask=(head < heads)[:, None] & used[None, :], other=0.0).to(tl.float32)
    gates = 3.0 / (1.0 + tl.exp(-tl.sum(weights * x[None, :], axis=1)))
    tl.store(inputs_ptr + token * CHANNELS + channels, x, mask=used)
    tl.store(gates_ptr + token * heads + head, gates, mask=head < heads)
    offsets, mask = head[:, None] * D + tl.arange(0, D)[None, :], (head < heads)[:, None]
    row = tl.load(tokens_ptr + token).to(tl.int64)
    v_ptrs = qkv_ptr + token * 3 * C + 2 * C + offsets
    v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    v += gates[:, None] * tl.load(table_ptr + row * C + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(v_ptrs, v.to(tl.bfloat16), mask=mask)


@triton.jit
def value_embedding_backward(dv_ptr, table_ptr, tokens_ptr, gate_ptr, gates_ptr, dy_ptr, d_logits_ptr, stride, C, heads,
                             CHANNELS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Compute d_logits, the gradient of the gates before the sigmoid, and add its share to dy, in place; one token.

    dv (N, heads, D) bf16 with `stride` values between tokens; dy (N, C) bf16: gradient of RMSNorm's output; d_logits
    (N, heads) fp32; the rest as in value_embedding_forward.
    """
    token, channels = tl.program_id(0).to(tl.int64), tl.arange(0, 16)
    head, used = tl.arange(0, HEADS), tl.arange(0, 16) < CHANNELS
    offsets, mask = head[:, None] * D + tl.arange(0, D)[None, :], (head < heads)[:, None]
    row = tl.load(tokens_ptr + token).to(tl.int64)
    dv = tl.load(dv_ptr + token * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(table_ptr + row * C + offsets, mask=mask, other=0.0).to(tl.float32)
    gates = tl.load(gates_ptr + token * heads + head, mask=head < heads, other=0.0)
    d_logits = tl.sum(dv * values, axis=1) * gates * (1.0 - gates / 3.0)
    tl.store(d_logits_ptr + token * heads + head, d_logits, mask=head < heads)
    weights = tl.load(gate_ptr + head[:, None] * CHANNELS + channels[None, :],
                      mask=(head < heads)[:, None] & used[None, :], other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * C + channels, mask=used, other=0.0).to(tl.float32)
    dy += tl.sum(weights * d_logits[:, None], axis=0)
    tl.store(dy_ptr + token * C + channels, dy.to(tl.bfloat16), mask=used)


@triton.jit
def looked_up_rows(d_rows_ptr, factors_ptr, order_ptr, start, end, columns, stride, C, heads, head, ROWS: tl.constexpr):
    """Return the sum of factors * d_rows over one token's positions, order[start:end]; see embedding_gradient."""
    total = tl.zeros(columns.shape, tl.float32)
    for first in range(start, end, ROWS):
        index = first + tl.arange(0, ROWS)
        position = tl.load(order_ptr + index, mask=index < end, other=0)
        mask = (index < end)[:, None] & (columns < C)[None, :]
        rows = tl.load(d_rows_ptr + position[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        factors = tl.load(factors_ptr + position * heads + head, mask=index < end, other=0.0)
        total += tl.sum(rows * factors[:, None], axis=0)
    return total


@triton.jit
def embedding_gradient(grad_ptr, d_rows_ptr, factors_ptr, order_ptr, starts_ptr, V, stride, C, heads, D: tl.constexpr,
                       ROWS: tl.constexpr, MORE_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Add to grad (V, C) the gradients of the rows that an embedding looked up, without atomics: always the same sums.

    d_rows (N, C): gradient of each looked-up row, `stride` values apart, times factors (N, heads), each for D columns.
    order (N,): positions sorted by token; starts (V + 1,): where each token begins in it. A program takes BLOCK
    columns, all of one head, of every num_programs-th token, because frequent tokens have neighbouring ids in GPT-2's
    vocabulary. Most tokens occur once or twice in a micro-batch, so it reads ROWS rows at a time; the most frequent
    occurs a thousand times, and its program would end last, so it reads MORE_ROWS of it.
    """
    columns, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) * BLOCK // D
    for token in range(tl.program_id(1), V, tl.num_programs(1)):
        start, end = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
        if start < end:
            if end - start > 4 * MORE_ROWS:
                total = looked_up_rows(d_rows_ptr, factors_ptr, order_ptr, start, end, columns, stride, C, heads, head,
                                       MORE_ROWS)
            else:
                total = looked_up_rows(d_rows_ptr, factors_ptr, order_ptr, start, end, columns, stride, C, heads, head,
                                       ROWS)
            pointers = grad_ptr + tl.full((), C, tl.int64) * token + columns
            grad = tl.load(pointers, mask=columns < C, other=0.0).to(tl.float32) + total
            tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=columns < C)


@triton.jit
def relu2_forward(pre_activation_ptr, activation_ptr, scale_ptr, amax_ptr, size,
                  FP8: tl.constexpr, BLOCK: tl.constexpr):
    """Compute activation = relu(pre_activation)^2 of `size` values; activation in bf16 or E4M3."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    activation = tl.maximum(tl.load(pre_activation_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32), 0.0)
    activation *= activation
    if FP8:
        tl.store(activation_ptr + offsets, as_fp8(activation, tl.load(scale_ptr), activation_ptr, 448.0),
                 mask=offsets < size)
        raise_amax(amax_ptr, tl.max(activation, axis=0))
    else:
        tl.store(activation_ptr + offsets, activation.to(tl.bfloat16), mask=offsets < size)


@triton.jit
def relu2_backward_rows(grad_ptr, pre_activation_ptr, out_ptr, activation_rows_ptr, scale_ptr, activation_scale_ptr,
                        rows, columns, M, K, FP8: tl.constexpr):
    """Store the gradient through relu^2 of the given rows and columns; return it, and relu^2."""
    offsets, mask = rows.to(tl.int64)[:, None] * K + columns[None, :], (rows < M)[:, None] & (columns < K)[None, :]
    relu = tl.maximum(tl.load(pre_activation_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0.0)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * 2.0 * relu
    if FP8:
        tl.store(out_ptr + offsets, as_fp8(grad, tl.load(scale_ptr), out_ptr, 57344.0), mask=mask)
    else:
        tl.store(out_ptr + offsets, grad.to(tl.bfloat16), mask=mask)
    activation = relu * relu
    if activation_rows_ptr is not None:
        tl.store(activation_rows_ptr + offsets,
                 as_fp8(activation, tl.load(activation_scale_ptr), activation_rows_ptr, 448.0), mask=mask)
    return grad, activation


@triton.jit
def relu2_backward(grad_ptr, pre_activation_ptr, out_ptr, cols_ptr, activation_rows_ptr, activation_cols_ptr, scale_ptr,
                   amax_ptr, activation_scale_ptr, M, K, FP8: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out = grad * 2 * relu(pre_activation); in FP8 also relu^2 for the weight gradient, and cols = out.T.

    grad, pre_activation (M, K) bf16; out (M, K) bf16 (may be grad itself) or E5M2; cols (K, M / 4) words of E5M2, or
    None. relu^2 is quantized to E4M3 by activation_scale, as in the forward pass: with cols to activation_cols
    (K, M / 4) words, without to activation_rows (M, K); the other one is None. A program takes 4 * QUADS rows and BLOCK
    columns.
    """
    quads, columns = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad0, activation0 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, activation_rows_ptr, scale_ptr, activation_scale_ptr, 4 * quads,
        columns, M, K, FP8)
    grad1, activation1 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, activation_rows_ptr, scale_ptr, activation_scale_ptr, 4 * quads + 1,
        columns, M, K, FP8)
    grad2, activation2 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, activation_rows_ptr, scale_ptr, activation_scale_ptr, 4 * quads + 2,
        columns, M, K, FP8)
    grad3, activation3 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, activation_rows_ptr, scale_ptr, activation_scale_ptr, 4 * quads + 3,
        columns, M, K, FP8)
    if FP8:
        if cols_ptr is not None:
            cols_offsets = columns.to(tl.int64)[:, None] * (M // 4) + quads[None, :]
            mask = (columns < K)[:, None] & (quads < M // 4)[None, :]
            tl.store(cols_ptr + cols_offsets,
                     tl.trans(pack_fp8(grad0, grad1, grad2, grad3, tl.load(scale_ptr), True)), mask=mask)
            tl.store(activation_cols_ptr + cols_offsets,
                     tl.trans(pack_fp8(activation0, activation1, activation2, activation3,
                                       tl.load(activation_scale_ptr), False)), mask=mask)
        largest = tl.maximum(tl.maximum(tl.abs(grad0), tl.abs(grad1)), tl.maximum(tl.abs(grad2), tl.abs(grad3)))
        raise_amax(amax_ptr, tl.max(largest))


@triton.jit
def rope_qk_norm_forward(qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, n_rows, T, heads, C3, eps,
                         HALF: tl.constexpr, ROWS: tl.constexpr):
    """Apply rotary position embedding (half-split), then RMSNorm without gain, to q and k in place.

    qkv (N, C3 = 3C) bf16; cos, sin (T, HALF) fp32; rstd (n_rows,) fp32: 1 / RMS of each row, written for backward.
    A row is one head of q or k of one token: `heads` = 2 * n_head rows a token, n_rows = N * heads. v is not touched.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, dims, mask = rows // heads, tl.arange(0, HALF)[None, :], (rows < n_rows)[:, None]
    offsets = tokens.to(tl.int64)[:, None] * C3 + (rows % heads)[:, None] * (2 * HALF) + dims
    angles = (tokens % T)[:, None] * HALF + dims
    cos, sin = tl.load(cos_ptr + angles, mask=mask), tl.load(sin_ptr + angles, mask=mask)
    x1 = tl.load(qkv_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)  # rotation does not change it
    tl.store(qkv_ptr + offsets, ((x1 * cos - x2 * sin) * rstd[:, None]).to(tl.bfloat16), mask=mask)
    tl.store(qkv_ptr + offsets + HALF, ((x1 * sin + x2 * cos) * rstd[:, None]).to(tl.bfloat16), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def load_halves(ptr, offsets, HALF: tl.constexpr):
    """Return the first and the second HALF values of the heads that begin at `offsets`."""
    return tl.load(ptr + offsets), tl.load(ptr + offsets + HALF)


@triton.jit
def rope_qk_norm_gradient(grad1, grad2, y1, y2, cos_ptr, sin_ptr, rstd_ptr, tokens, head, T, heads,
                          HALF: tl.constexpr):
    """Return the gradient through QK norm and RoPE of one head of the given tokens: its two halves, fp32."""
    angles = (tokens % T)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos, sin = tl.load(cos_ptr + angles), tl.load(sin_ptr + angles)
    rstd = tl.load(rstd_ptr + tokens * heads + head)[:, None]
    grad1, grad2, y1, y2 = grad1.to(tl.float32), grad2.to(tl.float32), y1.to(tl.float32), y2.to(tl.float32)
    dot = (tl.sum(grad1 * y1 + grad2 * y2, axis=1) / (2 * HALF))[:, None]
    rotated_grad1, rotated_grad2 = rstd * (grad1 - y1 * dot), rstd * (grad2 - y2 * dot)
    return rotated_grad1 * cos + rotated_grad2 * sin, rotated_grad2 * cos - rotated_grad1 * sin


@triton.jit
def store_halves(out_ptr, offsets, mask, values1, values2, scale_ptr, FP8: tl.constexpr, HALF: tl.constexpr):
    """Store what load_halves() would return, in E5M2 or bf16."""
    if FP8:
        tl.store(out_ptr + offsets, as_fp8(values1, tl.load(scale_ptr), out_ptr, 57344.0), mask=mask)
        tl.store(out_ptr + offsets + HALF, as_fp8(values2, tl.load(scale_ptr), out_ptr, 57344.0), mask=mask)
    else:
        tl.store(out_ptr + offsets, values1.to(tl.bfloat16), mask=mask)
        tl.store(out_ptr + offsets + HALF, values2.to(tl.bfloat16), mask=mask)


# All of grad and qkv is loaded before anything is stored: compilers move no load before a store, so that a later load
# would be waited for anew. In place of tokens past the end the last one is loaded: a masked load would first set its
# registers to zero.
@triton.jit
def rope_qk_norm_backward(grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, cols_ptr, scale_ptr, amax_ptr,
                          N, T, heads, C3, FP8: tl.constexpr, HALF: tl.constexpr, QUADS: tl.constexpr):
    """Compute the gradient through QK norm and RoPE of q and k; copy v's.

    QK norm's is rstd * (grad - y * mean(grad * y)) with the forward pass's outputs y = qkv; it is then rotated back.
    grad, qkv (N, C3) bf16; out (N, C3) bf16 (grad itself) or E5M2; cols (C3, N / 4) words of E5M2, or None; rstd
    (N * heads,) fp32 from rope_qk_norm_forward. A program takes one head of q, k or v of 4 * QUADS tokens: the grid's
    second dimension is 3 * n_head, or `heads` = 2 * n_head in bf16, where v's gradient is in place already.
    """
    quads, head, dims = tl.arange(0, QUADS), tl.program_id(1), tl.arange(0, HALF)
    start = tl.program_id(0) * (4 * QUADS)
    left = N - start  # tokens from this program's first one on
    first = start.to(tl.int64) * C3 + head * (2 * HALF)
    grad_ptr, qkv_ptr, out_ptr = grad_ptr + first, qkv_ptr + first, out_ptr + first
    tokens0, tokens1 = tl.minimum(4 * quads, left - 1), tl.minimum(4 * quads + 1, left - 1)
    tokens2, tokens3 = tl.minimum(4 * quads + 2, left - 1), tl.minimum(4 * quads + 3, left - 1)
    offsets0, offsets1 = tokens0[:, None] * C3 + dims[None, :], tokens1[:, None] * C3 + dims[None, :]
    offsets2, offsets3 = tokens2[:, None] * C3 + dims[None, :], tokens3[:, None] * C3 + dims[None, :]
    grad1_0, grad2_0 = load_halves(grad_ptr, offsets0, HALF)
    grad1_1, grad2_1 = load_halves(grad_ptr, offsets1, HALF)
    grad1_2, grad2_2 = load_halves(grad_ptr, offsets2, HALF)
    grad1_3, grad2_3 = load_halves(grad_ptr, offsets3, HALF)
    if head < heads:
        y1_0, y2_0 = load_halves(qkv_ptr, offsets0, HALF)
        y1_1, y2_1 = load_halves(qkv_ptr, offsets1, HALF)
        y1_2, y2_2 = load_halves(qkv_ptr, offsets2, HALF)
        y1_3, y2_3 = load_halves(qkv_ptr, offsets3, HALF)
        values1_0, values2_0 = rope_qk_norm_gradient(
            grad1_0, grad2_0, y1_0, y2_0, cos_ptr, sin_ptr, rstd_ptr, start + tokens0, head, T, heads, HALF)
        values1_1, values2_1 = rope_qk_norm_gradient(
            grad1_1, grad2_1, y1_1, y2_1, cos_ptr, sin_ptr, rstd_ptr, start + tokens1, head, T, heads, HALF)
        values1_2, values2_2 = rope_qk_norm_gradient(
            grad1_2, grad2_2, y1_2, y2_2, cos_ptr, sin_ptr, rstd_ptr, start + tokens2, head, T, heads, HALF)
        values1_3, values2_3 = rope_qk_norm_gradient(
            grad1_3, grad2_3, y1_3, y2_3, cos_ptr, sin_ptr, rstd_ptr, start + tokens3, head, T, heads, HALF)
    else:
        values1_0, values2_0 = grad1_0.to(tl.float32), grad2_0.to(tl.float32)
        values1_1, values2_1 = grad1_1.to(tl.float32), grad2_1.to(tl.float32)
        values1_2, values2_2 = grad1_2.to(tl.float32), grad2_2.to(tl.float32)
        values1_3, values2_3 = grad1_3.to(tl.float32), grad2_3.to(tl.float32)
    store_halves(out_ptr, offsets0, (4 * quads < left)[:, None], values1_0, values2_0, scale_ptr, FP8, HALF)
    store_halves(out_ptr, offsets1, (4 * quads + 1 < left)[:, None], values1_1, values2_1, scale_ptr, FP8, HALF)
    store_halves(out_ptr, offsets2, (4 * quads + 2 < left)[:, None], values1_2, values2_2, scale_ptr, FP8, HALF)
    store_halves(out_ptr, offsets3, (4 * quads + 3 < left)[:, None], values1_3, values2_3, scale_ptr, FP8, HALF)
    if FP8:
        if cols_ptr is not None:
            cols_ptr += (head * (2 * HALF)).to(tl.int64) * (N // 4) + tl.program_id(0) * QUADS
            cols_offsets, mask = dims[:, None] * (N // 4) + quads[None, :], (quads < left // 4)[None, :]
            tl.store(cols_ptr + cols_offsets,
                     tl.trans(pack_fp8(values1_0, values1_1, values1_2, values1_3, tl.load(scale_ptr), True)),
                     mask=mask)
            tl.store(cols_ptr + cols_offsets + HALF * (N // 4),
                     tl.trans(pack_fp8(values2_0, values2_1, values2_2, values2_3, tl.load(scale_ptr), True)),
                     mask=mask)
        largest1 = tl.maximum(tl.maximum(tl.abs(values1_0), tl.abs(values1_1)),
                              tl.maximum(tl.abs(values1_2), tl.abs(values1_3)))
        largest2 = tl.maximum(tl.maximum(tl.abs(values2_0), tl.abs(values2_1)),
                              tl.maximum(tl.abs(values2_2), tl.abs(values2_3)))
        raise_amax(amax_ptr, tl.max(tl.maximum(largest1, largest2)))


# The kernels of the cross-entropy take few instructions a logit, because GPUs would otherwise need as long for them as
# for the memory: tl.exp and a division take five each, to handle subnormal and huge values, which do not matter here;
# tl.exp2 and PTX's approximate reciprocal take one.
@triton.jit
def softcap_tail(logits, softcap):
    """Return tail = 1 / (exp(2 * logits / softcap) + 1).

    tanh(logits / softcap) is 1 - 2 * tail. So the softcapped logits are softcap * (1 - 2 * tail), and their derivative
    is 4 * (tail - tail^2).
    """
    divisor = tl.exp2(logits * (2.0 * LOG2_E / softcap)) + 1.0
    if INTERPRETED:
        return 1.0 / divisor
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True,
                                     pack=1)


@triton.jit
def cross_entropy_loss(logits_ptr, targets_ptr, loss_ptr, lse_ptr, V, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Compute each row's cross-entropy `loss` and log-sum-exp `lse` of the softcapped logits, one row a program.

    logits (N, V) bf16, before the softcap; targets (N,) int64, negative: loss 0; loss, lse (N,) fp32. Each of the BLOCK
    lanes keeps its own sum, and its own maximum (Milakov and Gimelshein, arXiv 1805.02867) unless the softcap bounds
    the logits.
    """
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * V
    maximum = tl.full((BLOCK,), softcap if CAP else -1e30, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        if CAP:
            exp = tl.exp2(softcap_tail(logits, softcap) * (-2.0 * LOG2_E * softcap))  # of softcapped logits - softcap
        else:
            new_maximum = tl.maximum(maximum, tl.where(columns < V, logits, -1e30))
            sums *= tl.exp2((maximum - new_maximum) * LOG2_E)
            maximum = new_maximum
            exp = tl.exp2((logits - maximum) * LOG2_E)
        sums += tl.where(columns < V, exp, 0.0)
    row_maximum = tl.max(maximum, axis=0)
    lse = row_maximum + tl.log(tl.sum(sums * tl.exp(maximum - row_maximum), axis=0))
    store_row_loss(row, row_ptr, targets_ptr, loss_ptr, lse_ptr, lse, softcap, CAP)


@triton.jit
def store_row_loss(row, row_ptr, targets_ptr, loss_ptr, lse_ptr, lse, softcap, CAP: tl.constexpr):
    """Store a row's loss and log-sum-exp. row_ptr: its logits; the rest as in cross_entropy_loss."""
    target = tl.load(targets_ptr + row)
    logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    if CAP:
        logit = softcap * (1.0 - 2.0 * softcap_tail(logit, softcap))
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, tl.where(target >= 0, lse - logit, 0.0))


@triton.jit
def cross_entropy_of_sums(logits_ptr, targets_ptr, sums_ptr, loss_ptr, lse_ptr, V, parts, softcap, BLOCK: tl.constexpr):
    """Compute what cross_entropy_loss computes, from sums of exp(softcapped logit - softcap), one row a program.

    sums (N, parts) fp32: those of a row add up to the sum over its V logits. BLOCK is at least `parts`.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + row.to(tl.int64) * parts + columns, mask=columns < parts, other=0.0)
    lse = softcap + tl.log(tl.sum(sums, axis=0))
    store_row_loss(row, logits_ptr + row.to(tl.int64) * V, targets_ptr, loss_ptr, lse_ptr, lse, softcap, True)


@triton.jit
def cross_entropy_gradient_rows(logits, targets_ptr, lse_ptr, tokens, columns, N, softcap, scale, CAP: tl.constexpr):
    """Return `scale` times the gradient for the logits of the given tokens and columns, fp32."""
    target = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1).to(tl.int32)[:, None]
    lse = tl.load(lse_ptr + tokens, mask=tokens < N, other=0.0)[:, None]
    lse = tl.where(target >= 0, lse, float("inf"))  # without a target all probabilities are 0, and so is the gradient
    onehot = tl.where(columns[None, :] == target, 1.0, 0.0)
    logits = logits.to(tl.float32)
    if CAP:
        tail = softcap_tail(logits, softcap)
        probability = tl.exp2((softcap - lse) * LOG2_E - tail * (2.0 * LOG2_E * softcap))
        return (probability - onehot) * ((tail - tail * tail) * (4.0 * scale))
    return (tl.exp2((logits - lse) * LOG2_E) - onehot) * scale


@triton.jit
def cross_entropy_gradient(logits_ptr, targets_ptr, lse_ptr, out_ptr, cols_ptr, N, V, softcap, scale,
                           CAP: tl.constexpr, FP8: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the gradient of the summed loss for the logits before the softcap.

    logits, targets, lse: as in cross_entropy_loss; out (N, V) bf16 (may be logits itself) or E5M2; cols (V, N / 4)
    words of E5M2, or None. scale is a number: in FP8 a constant, which serves because gradients of logits lie in
    [-1, 1], and by which none saturates; in bf16 the factor of the loss. A program takes 4 * QUADS tokens and BLOCK
    columns. It loads all its logits before it stores anything, because compilers move no load before a store.
    """
    quads, lanes = tl.arange(0, QUADS), tl.arange(0, BLOCK)
    tokens, columns = tl.program_id(0) * (4 * QUADS) + 4 * quads, tl.program_id(1) * BLOCK + lanes
    first = (tl.program_id(0) * (4 * QUADS)).to(tl.int64) * V + tl.program_id(1) * BLOCK
    offsets, used = (4 * quads)[:, None] * V + lanes[None, :], (columns < V)[None, :]
    mask0, mask1 = (tokens < N)[:, None] & used, (tokens + 1 < N)[:, None] & used
    mask2, mask3 = (tokens + 2 < N)[:, None] & used, (tokens + 3 < N)[:, None] & used
    logits_ptr, out_ptr = logits_ptr + first, out_ptr + first
    logits0 = tl.load(logits_ptr + offsets, mask=mask0)
    logits1 = tl.load(logits_ptr + V + offsets, mask=mask1)
    logits2 = tl.load(logits_ptr + 2 * V + offsets, mask=mask2)
    logits3 = tl.load(logits_ptr + 3 * V + offsets, mask=mask3)
    grad0 = cross_entropy_gradient_rows(logits0, targets_ptr, lse_ptr, tokens, columns, N, softcap, scale, CAP)
    grad1 = cross_entropy_gradient_rows(logits1, targets_ptr, lse_ptr, tokens + 1, columns, N, softcap, scale, CAP)
    grad2 = cross_entropy_gradient_rows(logits2, targets_ptr, lse_ptr, tokens + 2, columns, N, softcap, scale, CAP)
    grad3 = cross_entropy_gradient_rows(logits3, targets_ptr, lse_ptr, tokens + 3, columns, N, softcap, scale, CAP)
    tl.store(out_ptr + offsets, round_fp8(grad0, out_ptr) if FP8 else grad0.to(tl.bfloat16), mask=mask0)
    tl.store(out_ptr + V + offsets, round_fp8(grad1, out_ptr) if FP8 else grad1.to(tl.bfloat16), mask=mask1)
    tl.store(out_ptr + 2 * V + offsets, round_fp8(grad2, out_ptr) if FP8 else grad2.to(tl.bfloat16), mask=mask2)
    tl.store(out_ptr + 3 * V + offsets, round_fp8(grad3, out_ptr) if FP8 else grad3.to(tl.bfloat16), mask=mask3)
    if FP8 and cols_ptr is not None:
        cols_ptr += (tl.program_id(1) * BLOCK).to(tl.int64) * (N // 4) + tl.program_id(0) * QUADS
        mask = (columns < V)[:, None] & (tl.program_id(0) * QUADS + quads < N // 4)[None, :]
        tl.store(cols_ptr + lanes[:, None] * (N // 4) + quads[None, :],
                 tl.trans(pack_fp8(grad0, grad1, grad2, grad3, 1.0, True)), mask=mask)


@triton.jit
def muon_momentum(grad_ptr, momentum_ptr, update_ptr, mu_ptr, size, NESTEROV: tl.constexpr, BLOCK: tl.constexpr):
    """Compute momentum = mu * momentum + grad, in place, and update = grad + mu * momentum (NESTEROV) or momentum.

    grad, momentum: `size` values; update: the same in bf16; mu: one element.
    """
    mu = tl.load(mu_ptr)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    momentum = mu * tl.load(momentum_ptr + offsets, mask=offsets < size, other=0.0) + grad
    tl.store(momentum_ptr + offsets, momentum, mask=offsets < size)
    update = grad + mu * momentum if NESTEROV else momentum
    tl.store(update_ptr + offsets, update.to(tl.bfloat16), mask=offsets < size)


@triton.jit
def muon_update(weight_ptr, update_ptr, lr_ptr, update_lr_ptr, decay_ptr, size, CAUTIOUS: tl.constexpr,
                BLOCK: tl.constexpr):
    """Compute weight -= lr * decay * weight + update_lr * update, in place; with CAUTIOUS, decay only where weight and
    update have the same sign, or one of them is zero.

    weight: `size` fp32 values; update: the same, in any format; lr, update_lr, decay: one element.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + offsets, mask=offsets < size, other=0.0)
    update = tl.load(update_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    decayed = weight * (tl.load(lr_ptr) * tl.load(decay_ptr))
    if CAUTIOUS:
        decayed = tl.where(weight * update >= 0.0, decayed, 0.0)
    tl.store(weight_ptr + offsets, weight - decayed - tl.load(update_lr_ptr) * update, mask=offsets < size)
