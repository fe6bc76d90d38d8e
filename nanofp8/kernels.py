"""
Kernels in Triton, which a first reading may skip: Block.forward without `fused` is the same mathematics, and fused.py
puts these together. All that lies between the matmuls of a block, each in one pass over memory.
N = B * T tokens ("rows"), C = n_embd. Where FP8 is true they write E4M3 or E5M2 (by the type of the output), values
times `scale`, and raise `amax`, the largest |value| so far, for delayed scaling's next scale. *_cols is the transpose,
which Hopper's FP8 matmuls want when they sum over tokens.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # by Triton's interpreter, for tests on CPUs


@triton.jit
def as_fp8(values, scale, output_ptr, MAX: tl.constexpr):
    """values * scale rounded to what `output_ptr` points to, saturating at MAX; NaN stays NaN."""
    return tl.clamp(values * scale, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL).to(output_ptr.dtype.element_ty)


@triton.jit
def pack_fp8(values0, values1, values2, values3, scale, E5M2: tl.constexpr):
    """Four fp32 tensors times scale as the bytes of one tensor of 32-bit words, lowest first, in E5M2 or E4M3.

    Transposes are written in words, four tokens each. Taking FP8 values apart into bytes is left to no compiler:
    ptxas of CUDA 13.0 gets every fourth wrong (a 16-bit shift of a register that holds two pairs, seen on an H100).
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
    pair: tl.constexpr = "e5m2x2" if E5M2 else "e4m3x2"
    return tl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite." + pair + ".f32 lo, $2, $1; "
        "cvt.rn.satfinite." + pair + ".f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f", [values0, values1, values2, values3], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def raise_amax(amax_ptr, largest):
    """One atomic for a whole program, and none where it would change nothing: they all go to one address."""
    if largest > tl.load(amax_ptr):
        tl.atomic_max(amax_ptr, largest)


@triton.jit
def add_norm_forward(x_ptr, delta_ptr, gain_ptr, residual_ptr, y_ptr, rstd_ptr, scale_ptr, amax_ptr, N, C, eps,
                     ADD: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """residual = x + delta (if ADD), then y = RMSNorm(residual) * gain.

    x, delta, residual (N, C), gain (C,), rstd (N,) fp32.
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
            value = value.to(tl.bfloat16).to(tl.float32)  # the norm is of what the residual stream holds
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
def add_norm_backward(dy_ptr, residual_ptr, gain_ptr, rstd_ptr, d_residual_ptr, dx_ptr, dgain_ptr, N, C,
                      ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = RMSNorm's gradient + d_residual (if ADD); dgain (programs, C) fp32, to be added up."""
    columns = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    dgain = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        offsets, mask = row.to(tl.int64) * C + columns, (columns < C) & (row < N)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        normed = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
        dx = (dy * gain - normed * (tl.sum(dy * gain * normed, axis=0) / C)) * rstd
        if ADD:
            dx += tl.load(d_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dgain += dy * normed
    tl.store(dgain_ptr + tl.program_id(0) * C + columns, dgain, mask=columns < C)


@triton.jit
def relu2_forward(pre_activation_ptr, activation_ptr, scale_ptr, amax_ptr, size,
                  FP8: tl.constexpr, BLOCK: tl.constexpr):
    """activation = relu(pre_activation)^2, elementwise over `size` values."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    activation = tl.maximum(tl.load(pre_activation_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32), 0.0)
    activation *= activation
    if FP8:
        tl.store(activation_ptr + offsets, as_fp8(activation, tl.load(scale_ptr), activation_ptr, 448.0),
                 mask=offsets < size)
        raise_amax(amax_ptr, tl.max(activation, axis=0))
    else:
        tl.store(activation_ptr + offsets, activation.to(tl.bfloat16), mask=offsets < size)


# The *_rows functions take every fourth token of a program, as pack_fp8() wants them, write the gradient and return it
@triton.jit
def relu2_backward_rows(grad_ptr, pre_activation_ptr, out_ptr, scale_ptr, rows, columns, M, K, FP8: tl.constexpr):
    offsets, mask = rows.to(tl.int64)[:, None] * K + columns[None, :], (rows < M)[:, None] & (columns < K)[None, :]
    relu = tl.maximum(tl.load(pre_activation_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0.0)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * 2.0 * relu
    if FP8:
        tl.store(out_ptr + offsets, as_fp8(grad, tl.load(scale_ptr), out_ptr, 57344.0), mask=mask)
    else:
        tl.store(out_ptr + offsets, grad.to(tl.bfloat16), mask=mask)
    return grad, relu * relu


@triton.jit
def relu2_backward(grad_ptr, pre_activation_ptr, out_ptr, cols_ptr, activation_cols_ptr, scale_ptr, amax_ptr,
                   activation_scale_ptr, M, K, FP8: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """out = grad * 2 relu(pre_activation); in FP8 also its transpose, and that of relu^2 for the weight gradient.

    grad, pre_activation (M, K) bf16.
    """
    quads, columns = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad0, activation0 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, scale_ptr, 4 * quads, columns, M, K, FP8)
    grad1, activation1 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, scale_ptr, 4 * quads + 1, columns, M, K, FP8)
    grad2, activation2 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, scale_ptr, 4 * quads + 2, columns, M, K, FP8)
    grad3, activation3 = relu2_backward_rows(
        grad_ptr, pre_activation_ptr, out_ptr, scale_ptr, 4 * quads + 3, columns, M, K, FP8)
    if FP8:
        cols_offsets = columns.to(tl.int64)[:, None] * (M // 4) + quads[None, :]
        mask = (columns < K)[:, None] & (4 * quads < M)[None, :]
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
    """rope_qk_norm of q and k in place. A row is one head of q or k of one token, `heads` = 2 * n_head of them.

    qkv (B*T, C3) bf16; cos, sin (T, HALF) fp32; rstd (n_rows,) fp32, written: 1 / RMS of each row.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, dims, mask = rows // heads, tl.arange(0, HALF)[None, :], (rows < n_rows)[:, None]
    offsets = tokens.to(tl.int64)[:, None] * C3 + (rows % heads)[:, None] * (2 * HALF) + dims
    angles = (tokens % T)[:, None] * HALF + dims
    cos, sin = tl.load(cos_ptr + angles, mask=mask), tl.load(sin_ptr + angles, mask=mask)
    x1 = tl.load(qkv_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)  # a rotation keeps the norm
    tl.store(qkv_ptr + offsets, ((x1 * cos - x2 * sin) * rstd[:, None]).to(tl.bfloat16), mask=mask)
    tl.store(qkv_ptr + offsets + HALF, ((x1 * sin + x2 * cos) * rstd[:, None]).to(tl.bfloat16), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def rope_qk_norm_backward_rows(grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, scale_ptr, tokens, head,
                               N, T, heads, C3, FP8: tl.constexpr, HALF: tl.constexpr):
    dims, mask = tl.arange(0, HALF), (tokens < N)[:, None]
    offsets = tokens.to(tl.int64)[:, None] * C3 + head * (2 * HALF) + dims[None, :]
    grad1 = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad2 = tl.load(grad_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    if head < heads:
        angles = (tokens % T)[:, None] * HALF + dims[None, :]
        cos, sin = tl.load(cos_ptr + angles, mask=mask, other=0.0), tl.load(sin_ptr + angles, mask=mask, other=0.0)
        y1 = tl.load(qkv_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y2 = tl.load(qkv_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + tokens * heads + head, mask=tokens < N, other=0.0)[:, None]
        dot = (tl.sum(grad1 * y1 + grad2 * y2, axis=1) / (2 * HALF))[:, None]
        rotated_grad1, rotated_grad2 = rstd * (grad1 - y1 * dot), rstd * (grad2 - y2 * dot)
        grad1, grad2 = rotated_grad1 * cos + rotated_grad2 * sin, rotated_grad2 * cos - rotated_grad1 * sin
    if FP8:
        tl.store(out_ptr + offsets, as_fp8(grad1, tl.load(scale_ptr), out_ptr, 57344.0), mask=mask)
        tl.store(out_ptr + offsets + HALF, as_fp8(grad2, tl.load(scale_ptr), out_ptr, 57344.0), mask=mask)
    else:
        tl.store(out_ptr + offsets, grad1.to(tl.bfloat16), mask=mask)
        tl.store(out_ptr + offsets + HALF, grad2.to(tl.bfloat16), mask=mask)
    return grad1, grad2


@triton.jit
def rope_qk_norm_backward(grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, cols_ptr, scale_ptr, amax_ptr,
                          N, T, heads, C3, FP8: tl.constexpr, HALF: tl.constexpr, QUADS: tl.constexpr):
    """The gradient from the forward pass's outputs y: rstd * (dy - y * mean(dy * y)), rotated back; v's stays as it is.

    A program takes one head (of q, k or v) of 4 * QUADS tokens. grad, out (N, C3), cols (C3, N / 4); in bf16 out is
    grad.
    """
    quads, head = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1)
    grad1_0, grad2_0 = rope_qk_norm_backward_rows(
        grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, scale_ptr, 4 * quads, head,
        N, T, heads, C3, FP8, HALF)
    grad1_1, grad2_1 = rope_qk_norm_backward_rows(
        grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, scale_ptr, 4 * quads + 1, head,
        N, T, heads, C3, FP8, HALF)
    grad1_2, grad2_2 = rope_qk_norm_backward_rows(
        grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, scale_ptr, 4 * quads + 2, head,
        N, T, heads, C3, FP8, HALF)
    grad1_3, grad2_3 = rope_qk_norm_backward_rows(
        grad_ptr, qkv_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, scale_ptr, 4 * quads + 3, head,
        N, T, heads, C3, FP8, HALF)
    if FP8:
        cols_offsets = (head * (2 * HALF) + tl.arange(0, HALF)).to(tl.int64)[:, None] * (N // 4) + quads[None, :]
        mask = (4 * quads < N)[None, :]
        tl.store(cols_ptr + cols_offsets,
                 tl.trans(pack_fp8(grad1_0, grad1_1, grad1_2, grad1_3, tl.load(scale_ptr), True)), mask=mask)
        tl.store(cols_ptr + cols_offsets + HALF * (N // 4),
                 tl.trans(pack_fp8(grad2_0, grad2_1, grad2_2, grad2_3, tl.load(scale_ptr), True)), mask=mask)
        largest1 = tl.maximum(tl.maximum(tl.abs(grad1_0), tl.abs(grad1_1)),
                              tl.maximum(tl.abs(grad1_2), tl.abs(grad1_3)))
        largest2 = tl.maximum(tl.maximum(tl.abs(grad2_0), tl.abs(grad2_1)),
                              tl.maximum(tl.abs(grad2_2), tl.abs(grad2_3)))
        raise_amax(amax_ptr, tl.max(tl.maximum(largest1, largest2)))


@triton.jit
def softcapped(logits, softcap, CAP: tl.constexpr):
    """softcap * tanh(logits / softcap), and tanh; by exp, which a GPU has in hardware."""
    tanh = 1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0)
    if CAP:
        logits = tanh * softcap
    return logits, tanh


@triton.jit
def cross_entropy_loss(logits_ptr, targets_ptr, loss_ptr, lse_ptr, V, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """loss, lse (N,) fp32: cross-entropy and log-sum-exp of softcapped logits (N, V) bf16, one row a program.

    Each lane keeps its own sum, and its own maximum unless the softcap bounds it.
    """
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * V
    maximum = tl.full((BLOCK,), softcap if CAP else -1e30, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        capped, _ = softcapped(tl.load(row_ptr + columns, mask=columns < V, other=0.0).to(tl.float32), softcap, CAP)
        if not CAP:
            new_maximum = tl.maximum(maximum, tl.where(columns < V, capped, -1e30))
            sums *= tl.exp(maximum - new_maximum)
            maximum = new_maximum
        sums += tl.where(columns < V, tl.exp(capped - maximum), 0.0)
    row_maximum = tl.max(maximum, axis=0)
    lse = row_maximum + tl.log(tl.sum(sums * tl.exp(maximum - row_maximum), axis=0))
    target = tl.load(targets_ptr + row)
    capped, _ = softcapped(tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32), softcap, CAP)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, tl.where(target >= 0, lse - capped, 0.0))


@triton.jit
def cross_entropy_gradient_rows(logits_ptr, targets_ptr, lse_ptr, out_ptr, tokens, columns, N, V, softcap, scale,
                                CAP: tl.constexpr, FP8: tl.constexpr):
    offsets, mask = tokens.to(tl.int64)[:, None] * V + columns[None, :], (tokens < N)[:, None] & (columns < V)[None, :]
    capped, tanh = softcapped(tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32), softcap, CAP)
    target = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1)[:, None]
    lse = tl.load(lse_ptr + tokens, mask=tokens < N, other=0.0)[:, None]
    grad = tl.exp(capped - lse) - tl.where(columns[None, :] == target, 1.0, 0.0)
    if CAP:
        grad *= 1.0 - tanh * tanh
    grad = tl.where(target >= 0, grad, 0.0)
    if FP8:
        tl.store(out_ptr + offsets, as_fp8(grad, scale, out_ptr, 57344.0), mask=mask)
    else:
        tl.store(out_ptr + offsets, grad.to(tl.bfloat16), mask=mask)
    return grad


@triton.jit
def cross_entropy_gradient(logits_ptr, targets_ptr, lse_ptr, out_ptr, cols_ptr, N, V, softcap, scale,
                           CAP: tl.constexpr, FP8: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of the summed loss for the logits before the softcap, (N, V); out may be logits itself in bf16."""
    quads, columns = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad0 = cross_entropy_gradient_rows(
        logits_ptr, targets_ptr, lse_ptr, out_ptr, 4 * quads, columns, N, V, softcap, scale, CAP, FP8)
    grad1 = cross_entropy_gradient_rows(
        logits_ptr, targets_ptr, lse_ptr, out_ptr, 4 * quads + 1, columns, N, V, softcap, scale, CAP, FP8)
    grad2 = cross_entropy_gradient_rows(
        logits_ptr, targets_ptr, lse_ptr, out_ptr, 4 * quads + 2, columns, N, V, softcap, scale, CAP, FP8)
    grad3 = cross_entropy_gradient_rows(
        logits_ptr, targets_ptr, lse_ptr, out_ptr, 4 * quads + 3, columns, N, V, softcap, scale, CAP, FP8)
    if FP8:
        cols_offsets = columns.to(tl.int64)[:, None] * (N // 4) + quads[None, :]
        mask = (columns < V)[:, None] & (4 * quads < N)[None, :]
        tl.store(cols_ptr + cols_offsets, tl.trans(pack_fp8(grad0, grad1, grad2, grad3, scale, True)), mask=mask)
