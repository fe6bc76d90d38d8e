"""
Kernels in Triton, which a first reading may skip: Block.forward without `fused` is the same mathematics, and fused.py
puts these together. All that lies between the matmuls of a block, each in one pass over memory.
N = B * T tokens ("rows"), C = n_embd. Where FP8 is true they write E4M3 or E5M2 (by the type of the output), values times
`scale`, and raise `amax`, the largest |value| so far, for delayed scaling's next scale. *_cols is the transpose, which
Hopper's FP8 matmuls want when they sum over tokens.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # by Triton's interpreter, for tests on CPUs


@triton.jit
def as_fp8(x, scale, pointer, MAX: tl.constexpr):
    """x * scale rounded to what `pointer` points to, saturating at MAX; NaN stays NaN."""
    return tl.clamp(x * scale, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL).to(pointer.dtype.element_ty)


@triton.jit
def as_word(x0, x1, x2, x3, scale, E5M2: tl.constexpr):
    """Four fp32 tensors times scale as the bytes of one tensor of 32-bit words, lowest first, in E5M2 or E4M3.

    Transposes are written in words, four tokens each. Taking FP8 values apart into bytes is left to no compiler:
    ptxas of CUDA 13.0 gets every fourth wrong (a 16-bit shift of a register that holds two pairs, seen on an H100).
    """
    x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
    if INTERPRETED:
        word = tl.zeros(x0.shape, tl.uint32)
        for x, shift in ((x0, 0), (x1, 8), (x2, 16), (x3, 24)):
            if E5M2:
                q = tl.clamp(x, -57344.0, 57344.0).to(tl.float8e5)
            else:
                q = tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv)
            word |= q.to(tl.uint8, bitcast=True).to(tl.uint32) << shift
        return word
    kind: tl.constexpr = "e5m2x2" if E5M2 else "e4m3x2"
    return tl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite." + kind + ".f32 lo, $2, $1; "
        "cvt.rn.satfinite." + kind + ".f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f", [x0, x1, x2, x3], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def raise_amax(amax, largest):
    """One atomic for a whole program, and none where it would change nothing: they all go to one address."""
    if largest > tl.load(amax):
        tl.atomic_max(amax, largest)


@triton.jit
def add_norm_forward(x, delta, gain, stream, y, rstd, scale, amax, N, C, eps,
                     ADD: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """stream = x + delta (if ADD), then y = RMSNorm(stream) * gain. x, delta, stream (N, C), gain (C,), rstd (N,) fp32."""
    c = tl.arange(0, BLOCK)
    g = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    largest = 0.0
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        at, mask = row.to(tl.int64) * C + c, (c < C) & (row < N)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
            v = v.to(tl.bfloat16).to(tl.float32)  # the norm is of what the stream holds
            tl.store(stream + at, v.to(tl.bfloat16), mask=mask)
        r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / C + eps)
        v = v * r * g
        tl.store(rstd + row, r, mask=row < N)
        if FP8:
            largest = tl.maximum(largest, tl.max(tl.abs(v), axis=0))
            tl.store(y + at, as_fp8(v, tl.load(scale), y, 448.0), mask=mask)
        else:
            tl.store(y + at, v.to(tl.bfloat16), mask=mask)
    if FP8:
        raise_amax(amax, largest)


@triton.jit
def add_norm_backward(dy, stream, gain, rstd, residual, dx, dgain, N, C, ADD: tl.constexpr, ROWS: tl.constexpr,
                      BLOCK: tl.constexpr):
    """dx = RMSNorm's gradient + residual (the stream's own, if ADD); dgain (programs, C) fp32, to be added up."""
    c = tl.arange(0, BLOCK)
    g = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        at, mask = row.to(tl.int64) * C + c, (c < C) & (row < N)
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < N, other=0.0)
        v = tl.load(stream + at, mask=mask, other=0.0).to(tl.float32) * r
        grad = (d * g - v * (tl.sum(d * g * v, axis=0) / C)) * r
        if ADD:
            grad += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=mask)
        total += d * v
    tl.store(dgain + tl.program_id(0) * C + c, total, mask=c < C)


@triton.jit
def relu2_forward(u, a, scale, amax, n, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """a = relu(u)^2, elementwise over n values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.maximum(tl.load(u + at, mask=at < n, other=0.0).to(tl.float32), 0.0)
    v *= v
    if FP8:
        tl.store(a + at, as_fp8(v, tl.load(scale), a, 448.0), mask=at < n)
        raise_amax(amax, tl.max(v, axis=0))
    else:
        tl.store(a + at, v.to(tl.bfloat16), mask=at < n)


# The *_row functions take every fourth token of a program, as as_word() wants them, write the gradient and return it
@triton.jit
def relu2_backward_row(da, u, du, scale, m, k, M, K, FP8: tl.constexpr):
    at, mask = m.to(tl.int64)[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :]
    v = tl.maximum(tl.load(u + at, mask=mask, other=0.0).to(tl.float32), 0.0)
    d = tl.load(da + at, mask=mask, other=0.0).to(tl.float32) * 2.0 * v
    if FP8:
        tl.store(du + at, as_fp8(d, tl.load(scale), du, 57344.0), mask=mask)
    else:
        tl.store(du + at, d.to(tl.bfloat16), mask=mask)
    return d, v * v


@triton.jit
def relu2_backward(da, u, du, du_cols, a_cols, scale, amax, a_scale, M, K, FP8: tl.constexpr,
                   QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """du = da * 2 relu(u); in FP8 also its transpose, and that of relu(u)^2 for the weight gradient. da, u (M, K) bf16."""
    quad, k = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d0, a0 = relu2_backward_row(da, u, du, scale, 4 * quad, k, M, K, FP8)
    d1, a1 = relu2_backward_row(da, u, du, scale, 4 * quad + 1, k, M, K, FP8)
    d2, a2 = relu2_backward_row(da, u, du, scale, 4 * quad + 2, k, M, K, FP8)
    d3, a3 = relu2_backward_row(da, u, du, scale, 4 * quad + 3, k, M, K, FP8)
    if FP8:
        across, mask = k.to(tl.int64)[:, None] * (M // 4) + quad[None, :], (k < K)[:, None] & (4 * quad < M)[None, :]
        tl.store(du_cols + across, tl.trans(as_word(d0, d1, d2, d3, tl.load(scale), True)), mask=mask)
        tl.store(a_cols + across, tl.trans(as_word(a0, a1, a2, a3, tl.load(a_scale), False)), mask=mask)
        raise_amax(amax, tl.max(tl.maximum(tl.maximum(tl.abs(d0), tl.abs(d1)), tl.maximum(tl.abs(d2), tl.abs(d3)))))


@triton.jit
def rope_qk_norm_forward(qkv, cos, sin, rstd, n_rows, T, heads, C3, eps, HALF: tl.constexpr, ROWS: tl.constexpr):
    """rope_qk_norm of q and k in place. A row is one head of q or k of one token, `heads` = 2 * n_head of them.

    qkv (B*T, C3) bf16; cos, sin (T, HALF) fp32; rstd (n_rows,) fp32, written: 1 / RMS of each row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, d, mask = row // heads, tl.arange(0, HALF)[None, :], (row < n_rows)[:, None]
    at = token.to(tl.int64)[:, None] * C3 + (row % heads)[:, None] * (2 * HALF) + d
    angle = (token % T)[:, None] * HALF + d
    c, s = tl.load(cos + angle, mask=mask), tl.load(sin + angle, mask=mask)
    x1 = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)  # a rotation keeps the norm
    tl.store(qkv + at, ((x1 * c - x2 * s) * r[:, None]).to(tl.bfloat16), mask=mask)
    tl.store(qkv + at + HALF, ((x1 * s + x2 * c) * r[:, None]).to(tl.bfloat16), mask=mask)
    tl.store(rstd + row, r, mask=row < n_rows)


@triton.jit
def rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, n, head, N, T, heads, C3, FP8: tl.constexpr,
                              HALF: tl.constexpr):
    d, mask = tl.arange(0, HALF), (n < N)[:, None]
    at = n.to(tl.int64)[:, None] * C3 + head * (2 * HALF) + d[None, :]
    g1 = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(grad + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if head < heads:
        angle = (n % T)[:, None] * HALF + d[None, :]
        c, s = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
        y1 = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
        y2 = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + n * heads + head, mask=n < N, other=0.0)[:, None]
        dot = (tl.sum(g1 * y1 + g2 * y2, axis=1) / (2 * HALF))[:, None]
        h1, h2 = r * (g1 - y1 * dot), r * (g2 - y2 * dot)
        g1, g2 = h1 * c + h2 * s, h2 * c - h1 * s
    if FP8:
        tl.store(out + at, as_fp8(g1, tl.load(scale), out, 57344.0), mask=mask)
        tl.store(out + at + HALF, as_fp8(g2, tl.load(scale), out, 57344.0), mask=mask)
    else:
        tl.store(out + at, g1.to(tl.bfloat16), mask=mask)
        tl.store(out + at + HALF, g2.to(tl.bfloat16), mask=mask)
    return g1, g2


@triton.jit
def rope_qk_norm_backward(grad, qkv, cos, sin, rstd, out, cols, scale, amax, N, T, heads, C3, FP8: tl.constexpr,
                          HALF: tl.constexpr, QUADS: tl.constexpr):
    """The gradient from the forward pass's outputs y: rstd * (dy - y * mean(dy * y)), rotated back; v's stays as it is.

    A program takes one head (of q, k or v) of 4 * QUADS tokens. grad, out (N, C3), cols (C3, N / 4); in bf16 out is grad.
    """
    quad, head = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1)
    p0, q0 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad, head, N, T, heads, C3, FP8, HALF)
    p1, q1 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad + 1, head, N, T, heads, C3, FP8, HALF)
    p2, q2 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad + 2, head, N, T, heads, C3, FP8, HALF)
    p3, q3 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad + 3, head, N, T, heads, C3, FP8, HALF)
    if FP8:
        across = (head * (2 * HALF) + tl.arange(0, HALF)).to(tl.int64)[:, None] * (N // 4) + quad[None, :]
        mask = (4 * quad < N)[None, :]
        tl.store(cols + across, tl.trans(as_word(p0, p1, p2, p3, tl.load(scale), True)), mask=mask)
        tl.store(cols + across + HALF * (N // 4), tl.trans(as_word(q0, q1, q2, q3, tl.load(scale), True)), mask=mask)
        p = tl.maximum(tl.maximum(tl.abs(p0), tl.abs(p1)), tl.maximum(tl.abs(p2), tl.abs(p3)))
        q = tl.maximum(tl.maximum(tl.abs(q0), tl.abs(q1)), tl.maximum(tl.abs(q2), tl.abs(q3)))
        raise_amax(amax, tl.max(tl.maximum(p, q)))


@triton.jit
def softcapped(logits, softcap, CAP: tl.constexpr):
    """softcap * tanh(logits / softcap), and tanh; by exp, which a GPU has in hardware."""
    t = 1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0)
    if CAP:
        logits = t * softcap
    return logits, t


@triton.jit
def cross_entropy_loss(logits, targets, loss, lse, V, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """loss, lse (N,) fp32: cross-entropy and log-sum-exp of softcapped logits (N, V) bf16, one row a program.

    Each lane keeps its own sum, and its own maximum unless the softcap bounds it.
    """
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * V
    highest = tl.full((BLOCK,), softcap if CAP else -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z, _ = softcapped(tl.load(at + c, mask=c < V, other=0.0).to(tl.float32), softcap, CAP)
        if not CAP:
            higher = tl.maximum(highest, tl.where(c < V, z, -1e30))
            total *= tl.exp(highest - higher)
            highest = higher
        total += tl.where(c < V, tl.exp(z - highest), 0.0)
    top = tl.max(highest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
    target = tl.load(targets + row)
    z, _ = softcapped(tl.load(at + tl.maximum(target, 0)).to(tl.float32), softcap, CAP)
    tl.store(lse + row, log_sum)
    tl.store(loss + row, tl.where(target >= 0, log_sum - z, 0.0))


@triton.jit
def cross_entropy_gradient_row(logits, targets, lse, out, n, c, N, V, softcap, scale, CAP: tl.constexpr, FP8: tl.constexpr):
    at, mask = n.to(tl.int64)[:, None] * V + c[None, :], (n < N)[:, None] & (c < V)[None, :]
    z, t = softcapped(tl.load(logits + at, mask=mask, other=0.0).to(tl.float32), softcap, CAP)
    target = tl.load(targets + n, mask=n < N, other=-1)[:, None]
    g = tl.exp(z - tl.load(lse + n, mask=n < N, other=0.0)[:, None]) - tl.where(c[None, :] == target, 1.0, 0.0)
    if CAP:
        g *= 1.0 - t * t
    g = tl.where(target >= 0, g, 0.0)
    if FP8:
        tl.store(out + at, as_fp8(g, scale, out, 57344.0), mask=mask)
    else:
        tl.store(out + at, g.to(tl.bfloat16), mask=mask)
    return g


@triton.jit
def cross_entropy_gradient(logits, targets, lse, out, cols, N, V, softcap, scale, CAP: tl.constexpr, FP8: tl.constexpr,
                           QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of the summed loss for the logits before the softcap, (N, V); out may be logits itself in bf16."""
    quad, c = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g0 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad, c, N, V, softcap, scale, CAP, FP8)
    g1 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad + 1, c, N, V, softcap, scale, CAP, FP8)
    g2 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad + 2, c, N, V, softcap, scale, CAP, FP8)
    g3 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad + 3, c, N, V, softcap, scale, CAP, FP8)
    if FP8:
        across, mask = c.to(tl.int64)[:, None] * (N // 4) + quad[None, :], (c < V)[:, None] & (4 * quad < N)[None, :]
        tl.store(cols + across, tl.trans(as_word(g0, g1, g2, g3, scale, True)), mask=mask)
