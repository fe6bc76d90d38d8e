"""The Triton kernels against plain PyTorch: on a GPU if there is one, otherwise on the CPU in Triton's interpreter.

conftest.py sets TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import contextlib
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import helpers
from nanofp8 import epilogues, fused, loss
from nanofp8.fused import (
    EmbedNorm,
    Fp8,
    FusedBlocks,
    FusedMLP,
    FusedQKV,
    MLPLayer,
    Passed,
    QKVLayer,
    RopeQKNorm,
    Scaling,
    add_norm,
    add_norm_grad,
    columns,
    current_scaling,
    norm_columns,
    quantize,
    transposed,
    weight_gradient,
    weight_operand,
)
from nanofp8.loss import LOGIT_GRAD_SCALE, ChunkedCrossEntropy, softcap_cross_entropy, softcap_cross_entropy_and_grad
from nanofp8.muon import apply_update, momentum_update, polar_express
from nanofp8.parts import ValueEmbedding, table_gradient, token_order, value_embedding_grad
from nanofp8.plain import rope_qk_norm

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NEEDS_TRANSPOSES = fused.needs_transposes  # itself: the tests replace it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, D = (2, 32, 3, 16) if DEVICE == "cpu" else (2, 512, 10, 128)
C, N = H * D, B * T
SIZE = 0.2 * (48 / C) ** 0.5  # standard deviation of weights: products keep theirs at any width

pytest.importorskip("triton")
pytestmark = [  # both come from the interpreter; the softcap's tanh is computed from exp, which may overflow
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def convert_float(x, source, target, rounding):
    """Triton's interpreter._convert_float, but rounding to nearest as a GPU does: the interpreter truncates."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": E4M3, "fp8e5": E5M2}
    words = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    source, target = types[str(source)], types[str(target)]
    x = torch.from_numpy(x.copy()).view(source) if x.dtype.kind == "u" else torch.from_numpy(x.copy()).to(source)
    return x.to(target).view(words[target.itemsize]).numpy()


@pytest.fixture(scope="module", autouse=True)
def kernels_on_cpu():
    """Without a GPU, run these tests' CPU tensors through the kernels in the interpreter, with transposes as on Hopper;
    all other tests do not."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            from triton.runtime import interpreter
            patch.setattr(interpreter, "_convert_float", convert_float)
            patch.setattr(fused, "INTERPRET_ON_CPU", True)
            patch.setattr(fused, "needs_transposes", lambda: True)
        yield


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_scaling(scale, dtype, fp8=True):
    """A Scaling that records the amax from zero; None unless fp8."""
    if not fp8:
        return None
    scale = torch.full((1,), float(scale), device=DEVICE)
    return Scaling(scale, 1 / scale, torch.zeros(1, device=DEVICE), dtype)


def cast(x, scaling):
    """Quantize x by torch's own casts."""
    fp8_max = torch.finfo(scaling.dtype).max
    return (x.float() * scaling.scale).clamp(-fp8_max, fp8_max).to(scaling.dtype)


def relative(a, b):
    """Norm of the difference by the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def near(a, b, share=0.01):
    """Whether few FP8 elements differ: sums in another order move some across a rounding boundary."""
    return (a.float() != b.float()).float().mean().item() <= share


def norm_reference(x, gain, eps=1e-6):
    """RMSNorm with gain, fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def tables():
    """RoPE's cos and sin, each (T, D / 2)."""
    angle = torch.outer(torch.arange(T).double(), 10000.0 ** (-torch.arange(D // 2).double() / (D // 2)))
    return angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_add_norm_and_its_gradient(add, fp8):
    x, delta, dy, d_residual = (randn(N, C, seed=i) for i in range(4))
    gain = 1 + 0.1 * randn(C, seed=5, dtype=torch.float32)
    scaling = make_scaling(250.0, E4M3, fp8)
    residual, y, rstd = add_norm(x, delta if add else None, gain, 1e-6, scaling)
    reference = (x.float() + delta.float()).bfloat16() if add else x
    leaf, gain_leaf = reference.float().requires_grad_(), gain.clone().requires_grad_()
    expected = norm_reference(leaf, gain_leaf)
    assert torch.equal(residual, reference)
    assert relative(rstd, torch.rsqrt(reference.float().square().mean(-1) + 1e-6)) < 1e-6
    if fp8:
        assert near(y.data, cast(expected, scaling)) and relative(scaling.amax, expected.detach().abs().max()) < 1e-5
        assert (y.data.float() == 448).any()  # the scale is large enough that some values saturate
    else:
        assert relative(y, expected) < 3e-3
    d_scaling = make_scaling(30000.0, E5M2) if fp8 else None  # some values saturate
    dx, dx_rows, dgain, _ = add_norm_grad(dy, residual, gain, rstd, d_residual if add else None, scaling=d_scaling)
    expected.backward(dy.float())
    assert relative(dx, leaf.grad + (d_residual.float() if add else 0)) < 4e-3
    assert relative(dgain, gain_leaf.grad) < 1e-4
    if fp8:  # as if dx were quantized afterwards
        assert torch.equal(dx_rows.data.float(), cast(dx, d_scaling).float()) and d_scaling.amax == dx.abs().max()
        assert (dx_rows.data.float().abs() == 57344).any() and dx_rows.inverse_scale is d_scaling.inverse
    else:
        assert dx_rows is dx
    y_cols = transposed(y)
    assert torch.equal((y_cols.data if fp8 else y_cols).t().float(), (y.data if fp8 else y).float())


def test_the_norms_output_made_again():
    """Its transpose has the same bits as the transpose of the forward pass's output."""
    x, delta, gain = randn(N, C), randn(N, C, seed=1), 1 + 0.1 * randn(C, seed=5, dtype=torch.float32)
    scaling = make_scaling(250.0, E4M3)
    residual, y, rstd = add_norm(x, delta, gain, 1e-6, scaling)
    cols = norm_columns(None, residual, gain, rstd, scaling)
    assert torch.equal(cols.data.float(), y.data.float().t()) and cols.inverse_scale is scaling.inverse


def test_columns_made_again():
    """They have the same bits as the transpose of the forward pass's values, and leave the amax alone."""
    x, scaling = randn(N, C), make_scaling(250.0, E4M3)
    rows, _ = quantize(x, scaling, colwise=False)
    scaling.amax.zero_()
    cols = columns(x, scaling)
    assert torch.equal(cols.data.float(), rows.data.float().t()) and cols.inverse_scale is scaling.inverse
    assert scaling.amax == 0
    assert torch.equal(columns(rows.data.to(E4M3), scaling).data.float(), cols.data.float())
    assert torch.equal(columns(x, None), x.t())


@pytest.mark.parametrize("in_place", ["", "add", "write", "main_grad"])
def test_embedding_with_norm_and_its_gradient(in_place):
    """Against plain PyTorch; the gradient is rounded to bf16 before it is summed in fp32. One token fills a third."""
    elsewhere, in_place = in_place == "main_grad", in_place.replace("main_grad", "add")
    V = 50
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    idx[0, : T // 3] = 7
    table, dy = 2 * randn(V, C, dtype=torch.float32), randn(N, C, seed=1)
    ours, theirs = table.clone().requires_grad_(), table.clone().requires_grad_()
    if elsewhere:
        ours.main_grad = torch.ones_like(ours)
    elif in_place:
        ours.grad = torch.ones_like(ours)
    y = EmbedNorm.apply(ours, 1e-6, token_order(idx, V), in_place)
    expected = norm_reference(torch.nn.functional.embedding(idx.flatten(), theirs), 1.0)
    y.backward(dy)
    expected.backward(dy.float())
    ours.grad = ours.main_grad if elsewhere else ours.grad
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 3e-3
    assert relative(ours.grad - (1 if in_place else 0), theirs.grad) < 5e-3
    assert torch.equal(ours.grad[~torch.isin(torch.arange(V, device=DEVICE), idx)].sum(),
                       torch.tensor(0.0 if not in_place else (V - len(idx.unique())) * C, device=DEVICE))


@pytest.mark.parametrize("heads", [1, H])
def test_gradient_of_looked_up_rows(heads):
    """Against float64, for tokens that occur never, once, 8 and 9 times, and around 128 times, where the kernel begins
    to read more rows at once. Rows lie apart, and what lies between them is not read."""
    counts = torch.tensor([0, 1, 8, 9, 127, 128, 129, 300, 0, 2])
    idx = torch.repeat_interleave(torch.arange(10), counts)[torch.randperm(704, generator=torch.manual_seed(0))]
    spread, factors = torch.full((704, 3 * C), math.nan, dtype=torch.bfloat16, device=DEVICE), torch.rand(704, heads)
    d_rows, factors = spread[:, C:2 * C], factors.to(DEVICE)
    d_rows.copy_(randn(704, C))
    table = torch.zeros(10, C, device=DEVICE)
    where = token_order(idx.to(DEVICE, torch.int32)[None], 10)
    grad = table_gradient(table, d_rows, 3 * C, factors, where, "")
    expected = torch.zeros(10, heads, C // heads, dtype=torch.float64, device=DEVICE).index_add_(
        0, idx.to(DEVICE), d_rows.double().view(704, heads, -1) * factors.double()[..., None]).view(10, C)
    assert relative(grad, expected) < 1e-6 and not grad[0].any() and not grad[8].any()
    for token in range(1, 8):
        assert relative(grad[token], expected[token]) < 1e-6
    assert torch.equal(grad, table_gradient(table, d_rows, 3 * C, factors, where, ""))


def equal_bits(a, b):
    """Whether two FP8 tensors hold the same bytes; NaN may have any sign."""
    a, b = (x.to(torch.float32).nan_to_num(nan=12345.0).view(torch.int32) for x in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (48, 80), (132, 200), (34, 64), (36, 30)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_quantize(shape, dtype, source, own, monkeypatch):
    """own: by our kernels, as on compute capability 12.x; heights and widths may not be divisible by 4."""
    monkeypatch.setattr(fused, "own_quantize", lambda: own)
    if own:
        monkeypatch.setattr(fused, "needs_transposes", lambda: True)
    x = randn(*shape, dtype=source)
    x[0, :4] = torch.tensor([0.0, 1e9, -1e9, float("nan")])
    scaling = make_scaling(64.0, dtype)
    rows, cols = quantize(x, scaling)
    assert equal_bits(rows.data, cast(x, scaling)) and equal_bits(cols.data, rows.data.t())
    assert rows.inverse_scale is cols.inverse_scale is scaling.inverse
    if own or DEVICE == "cuda":  # plain PyTorch's amax of NaN is NaN
        assert scaling.amax.item() == torch.tensor(1e9).to(source).item()
    only_rows, nothing = quantize(x, scaling, colwise=False)
    assert nothing is None and torch.equal(only_rows.data.view(torch.uint8), rows.data.view(torch.uint8))
    assert equal_bits(transposed(rows).data, cols.data)
    if own:
        assert rows.data.dtype == cols.data.dtype == dtype and cols.data.is_contiguous()
        scaling.amax.fill_(2e9)  # it is raised, never lowered
        quantize(x.t().contiguous().t(), scaling)
        assert scaling.amax.item() == 2e9
        assert equal_bits(quantize(x, scaling._replace(amax=None))[1].data, cols.data)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_our_kernel_quantizes_every_value_as_transformer_engine_does(dtype, monkeypatch):
    """All bf16 values, and fp32 values at the middle between two FP8 values and next to it. Where Transformer Engine
    runs, its bytes are the reference, NaN's too; elsewhere torch's."""
    fp8 = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    fp8 = fp8[fp8.isfinite()].sort().values
    middle = (fp8[1:] + fp8[:-1]) / 2
    beside = [torch.nextafter(middle, torch.tensor(side)) for side in (-math.inf, math.inf)]
    fp32 = torch.cat([middle, *beside, fp8, -fp8, 2 * fp8])
    fp32 = torch.cat([fp32, fp32.new_zeros(-len(fp32) % 32)]).view(32, -1).contiguous()
    bf16 = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    for x, scale in ((fp32, 1.0), (bf16, 1.0), (bf16, 3.0), (bf16, 2.0 ** -20)):
        scaling = make_scaling(scale, dtype)
        results = []
        for own in (False, True):
            monkeypatch.setattr(fused, "own_quantize", lambda own=own: own)
            results.append([operand.data for operand in quantize(x.to(DEVICE), scaling._replace(amax=None))])
        for theirs, ours in zip(*results, strict=True):
            if DEVICE == "cuda" and fused.te_gemm():
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
            assert equal_bits(ours, theirs)


@pytest.mark.parametrize("capability, own, transposes", [
    ((8, 9), False, True), ((9, 0), False, True), ((10, 0), False, False), ((10, 3), False, False),
    ((12, 0), True, True), ((12, 1), True, True)])
def test_where_our_kernel_quantizes_and_where_transposes_are_made(capability, own, transposes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for gemm in (None, print):  # without Transformer Engine FP8 is emulated
        monkeypatch.setattr(fused, "te_gemm", lambda gemm=gemm: gemm)
        assert fused.own_quantize.__wrapped__() == (own and gemm is print)
        assert NEEDS_TRANSPOSES.__wrapped__() == (transposes and gemm is print)


def test_weight_operand_is_made_once_a_step():
    weight, cache = torch.nn.Parameter(randn(32, 16, dtype=torch.float32)), {}
    calls = []

    def by_amax(w):
        calls.append(1)
        return current_scaling(w, E4M3)

    first = weight_operand(weight, by_amax, True, cache)
    assert weight_operand(weight, by_amax, False, cache) is first and len(calls) == 1
    assert weight_operand(weight, by_amax, True, cache) is not first
    weight_operand(weight, by_amax, None, {})
    assert len(calls) == 3
    assert first[0].data.float().abs().max() == 448


def test_a_cached_weight_keeps_the_scale_it_was_quantized_by():
    weight, cache, scaling = torch.nn.Parameter(randn(32, 16, dtype=torch.float32)), {}, make_scaling(100.0, E4M3)
    rows, cols = weight_operand(weight, lambda _: scaling, True, cache)
    scaling.scale.mul_(2), scaling.inverse.div_(2)  # in place, as delayed scaling does between micro-batches
    again = weight_operand(weight, lambda _: scaling, False, cache)
    assert again[0] is rows and again[1] is cols
    for operand, shape in ((rows, (32, 16)), (cols, (16, 32))):
        value = operand.data.float() * operand.inverse_scale
        assert relative(value if shape == (32, 16) else value.t(), weight) < 0.04


@pytest.mark.parametrize("softcap, low", [(0.0, 0), (15.0, 0), (43.0, 0), (43.0, 130)])  # 43: the largest
@pytest.mark.parametrize("fp8", [False, True])
def test_cross_entropy(softcap, low, fp8):
    """low: all logits lie around -low, where their exponentials are smallest."""
    V = 200
    logits = 8 * randn(N, V) - low
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[::7] = -1
    leaf = logits.float().requires_grad_()
    capped = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    expected = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="sum")
    expected.backward()
    assert relative(softcap_cross_entropy(logits, targets, softcap), expected) < 1e-5
    scaling = make_scaling(LOGIT_GRAD_SCALE, E5M2, fp8)
    loss, (rows, cols) = softcap_cross_entropy_and_grad(logits.clone(), targets, softcap, scaling)
    assert relative(loss, expected) < 1e-5
    if fp8:
        assert near(rows.data, cast(leaf.grad, scaling), 0.02) and torch.equal(cols.data.t().float(), rows.data.float())
        assert (rows.data[::7].float() == 0).all()
    else:
        assert relative(rows, leaf.grad) < 4e-3


@pytest.mark.parametrize("transposes", [True, False])
def test_kernels_write_transposes_only_if_matmuls_need_them(transposes, monkeypatch):
    """Without them the kernels write the same rows, of any number, and cols are views."""
    monkeypatch.setattr(fused, "own_quantize", lambda: True)
    results = []
    for needed in (True, transposes):
        monkeypatch.setattr(fused, "needs_transposes", lambda needed=needed: needed)
        cos, sin = tables()
        grads = [randn(B, T, H, D, seed=i) for i in range(3)]
        qkv, rstd = randn(N, 3 * C, seed=3), randn(N * 2 * H, seed=4, dtype=torch.float32).abs()
        d_qkv = make_scaling(2000, E5M2)
        operands = [*fused.rope_qk_norm_grad(*grads, qkv, rstd, cos, sin, d_qkv)]
        d_pre, activation = make_scaling(500, E5M2), make_scaling(8, E4M3)
        operands += fused.relu2_grad(randn(N, 4 * C, seed=5), randn(N, 4 * C, seed=6), None, d_pre, activation)
        targets = torch.randint(200, (N,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        operands += softcap_cross_entropy_and_grad(8 * randn(N, 200), targets, 15.0,
                                                   make_scaling(LOGIT_GRAD_SCALE, E5M2))[1]
        operands += quantize(randn(N, C), make_scaling(64, E4M3))
        results.append([operand.data for operand in operands] + [d_qkv.amax, d_pre.amax])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float())
    rows_and_cols = [results[1][i:i + 2] for i in (0, 2, 5, 7)]
    for rows, cols in rows_and_cols:
        assert rows.is_contiguous() and cols.is_contiguous() == transposes
        assert (cols.data_ptr() == rows.data_ptr()) != transposes and torch.equal(rows.t().float(), cols.float())
    assert results[1][4].is_contiguous() == transposes and activation.amax == 0  # relu^2 again, which the forward saw
    expected = cast(torch.relu(randn(N, 4 * C, seed=6).float()).square(), activation)
    assert torch.equal(results[1][4].t().float(), expected.float())


class ColumnMajor:
    """TE's general_gemm, as its C++ calls cuBLAS (common/gemm/cublaslt_gemm.cu:329, :135 and :226), in fp32.

    A matrix is its memory alone: columns `lda`, `ldb` and `m` values apart. Without `any_layout` only "TN" is taken.
    """

    def __init__(self, any_layout):
        self.any_layout, self.calls = any_layout, []

    @staticmethod
    def storage(data, fp8_scale_inv, fp8_dtype, fake_dtype):
        assert data.dtype == torch.uint8 and data.is_contiguous() and fake_dtype == torch.bfloat16
        return SimpleNamespace(memory=data.view(fp8_dtype), scale=fp8_scale_inv)

    def general_gemm(self, A, B, out_dtype, out, accumulate, layout, use_split_accumulator):
        (A0, A1), (B0, B1), (transa, transb) = A.memory.shape, B.memory.shape, layout
        m, n, k = (A0 if transa == "T" else A1), (B1 if transb == "T" else B0), (A1 if transa == "T" else A0)
        lda, ldb = (k if transa == "T" else m), (n if transb == "T" else k)
        assert layout in ("TN", "NN", "NT") and (layout == "TN" or self.any_layout)
        assert (B0 if transb == "T" else B1) == k and lda % 16 == ldb % 16 == 0
        a = A.memory.as_strided((m, k), (lda, 1) if transa == "T" else (1, lda)).float().contiguous()
        b = B.memory.as_strided((n, k), (1, ldb) if transb == "T" else (ldb, 1)).float().contiguous()
        with torch.autocast(DEVICE, enabled=False):
            result = (b @ a.t() * (A.scale * B.scale)).to(out_dtype)  # column-major (m, n) is row-major (n, m)
        self.calls.append((layout, A.memory, B.memory, out_dtype, accumulate, use_split_accumulator))
        if out is None:
            return result, None
        assert out.shape == (n, m) and out.dtype == out_dtype and out.is_contiguous()
        return out.add_(result) if accumulate else out.copy_(result), None


def use_column_major(monkeypatch, any_layout):
    """Let fused.py's call of TE's general_gemm multiply all FP8 matrices, by ColumnMajor; quantize by our kernels."""
    cublas = ColumnMajor(any_layout)
    helpers.fake_transformer_engine(monkeypatch, capability=(10, 0) if any_layout else (12, 0))
    storage = "transformer_engine.pytorch.tensor.storage.float8_tensor_storage"
    monkeypatch.setattr(sys.modules["transformer_engine.pytorch.cpp_extensions"], "general_gemm", cublas.general_gemm)
    monkeypatch.setattr(sys.modules[storage], "Float8TensorStorage", cublas.storage)
    monkeypatch.setattr(fused, "te_types", lambda: ({E4M3: E4M3, E5M2: E5M2}, None))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        gemm = fused.te_gemm.__wrapped__()

    def matmul(a, b, dtype=torch.bfloat16, out=None, add=True, fast=False):
        """fused.matmul on a GPU."""
        return gemm(a, b, dtype if out is None else out.dtype, out, add and out is not None, fast)

    for module in (fused, loss):
        monkeypatch.setattr(module, "matmul", matmul)
    monkeypatch.setattr(fused, "own_quantize", lambda: True)
    monkeypatch.setattr(fused, "needs_transposes", lambda: not any_layout)
    return cublas


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's own matmuls run instead")
@pytest.mark.parametrize("in_place", ["", "add", "write"])
def test_views_in_place_of_transposes(in_place, monkeypatch):
    """A block and the head with cuBLAS that takes any layout, as on B200: the results are those with transposes, bit
    for bit, from views of the same memory. FP8 matrices are made in no layout but their own."""
    cos, sin = tables()
    x, delta, gain = randn(B, T, C), randn(B, T, C, seed=1), 1 + 0.1 * randn(C, seed=2, dtype=torch.float32)
    shapes = {"qkv": (3 * C, C), "proj": (C, C), "fc1": (4 * C, C), "fc2": (C, 4 * C), "head": (208, C)}
    targets = torch.randint(208, (N,), generator=torch.Generator().manual_seed(1))

    def run(any_layout):
        """Return outputs and gradients, the matmuls, and the shapes of FP8 matrices that were allocated."""
        cublas, made, empty = use_column_major(monkeypatch, any_layout), [], torch.empty

        def recorded(*shape, dtype=None, device=None):
            if dtype in (E4M3, E5M2):
                made.append(tuple(torch.Size(*shape) if isinstance(shape[0], torch.Size) else shape))
            return empty(*shape, dtype=dtype, device=device)

        monkeypatch.setattr(torch, "empty", recorded)
        weights = {name: (SIZE * randn(*shape, seed=3 + i, dtype=torch.float32)).requires_grad_()
                   for i, (name, shape) in enumerate(shapes.items())}
        for weight in weights.values():
            weight.grad = torch.ones_like(weight) if in_place else None
        leaves = [tensor.clone().requires_grad_() for tensor in (x, delta, gain)]
        cache, e4m3, e5m2 = {}, make_scaling(90, E4M3), make_scaling(2000, E5M2)
        shared = SimpleNamespace(in_place=in_place, where=None, operand=lambda weight, scaling: weight_operand(
            weight, lambda _: scaling, True, cache))
        qkv_layer = QKVLayer(fused=shared, eps=1e-6, n_head=H, cos=cos, sin=sin, on_last_gradient=None, input=e4m3,
                             weight=e4m3, d_qkv=e5m2)
        mlp_layer = MLPLayer(fused=shared, eps=1e-6, attention_out=e4m3, proj=e4m3, d_proj=e5m2, input=e4m3, fc1=e4m3,
                             d_pre_activation=e5m2, activation=e4m3, fc2=e4m3, d_mlp_out=e5m2)
        residual, q, k, v, _ = FusedQKV.apply(*leaves, weights["qkv"], qkv_layer)
        residual, delta_out = FusedMLP.apply((q + k + v).flatten(2), residual, weights["proj"], gain, weights["fc1"],
                                             weights["fc2"], mlp_layer)
        head = weight_operand(weights["head"], lambda w: current_scaling(w, E4M3), True, cache)
        value = ChunkedCrossEntropy.apply((residual + delta_out).flatten(0, 1), weights["head"], targets, head, 15.0,
                                          N // 2, False, in_place)
        value.backward()
        monkeypatch.setattr(torch, "empty", empty)
        results = [value, residual, delta_out, *(leaf.grad for leaf in leaves), e4m3.amax, e5m2.amax]
        return results + [weight.grad for weight in weights.values()], cublas.calls, made

    (results, calls, made), (same, plain_calls, plain_made) = run(True), run(False)
    for a, b in zip(results, same, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert all(call[0] == "TN" for call in plain_calls) and len(calls) == len(plain_calls)
    # Forward, input gradient and weight gradient of the head's two chunks, then of the block's matmuls in turn
    order = ["TN"] * 4 + ["TN", "NN", "NT"] * 2 + ["NN", "NT"] * 4
    assert [call[0] for call in calls] == order
    for (layout, a, b, *options), (_, plain_a, plain_b, *plain_options) in zip(calls, plain_calls, strict=True):
        assert options == plain_options
        for mine, theirs, transpose in ((a, plain_a, layout[0] == "N"), (b, plain_b, layout[1] == "T")):
            assert equal_bits(mine.t() if transpose else mine, theirs)
    weights_read = {call[1].data_ptr() for call in calls if call[0] == "TN"}
    assert {call[1].data_ptr() for call in calls if call[0] == "NN"} == weights_read and len(weights_read) == 5
    gradients = [[call[2].data_ptr() for call in calls if call[0] == layout] for layout in ("NN", "NT")]
    assert sorted(gradients[0]) == sorted(gradients[1])
    # With transposes: of 5 weights, 2 inputs and 2 gradients of the head, 4 gradients and 3 inputs of the block. relu^2
    # is made once more in both cases
    assert len(plain_made) - len(made) == 5 + 2 + 2 + 4 + 3
    own_layouts = {*shapes.values(), (N, C), (N, 3 * C), (N, 4 * C), (N // 2, C), (N // 2, 208)}
    assert set(made) == own_layouts


@pytest.mark.parametrize("needed", [True, False])
def test_transformer_engines_quantizer_makes_the_transpose_or_none(needed, monkeypatch):
    """quantize() on a GPU with Transformer Engine, whose quantizer is a stub: cols are what it made, or a view."""
    for name, answer in (("needs_transposes", needed), ("own_quantize", False), ("te_gemm", print)):
        monkeypatch.setattr(fused, name, lambda answer=answer: answer)
    data = torch.arange(32 * 16).to(torch.uint8).view(32, 16)
    made = SimpleNamespace(_data=data, _transpose=data.t().contiguous() if needed else None)
    scaling = make_scaling(1, E4M3)._replace(quantizer=lambda x: made)
    rows, cols = quantize(SimpleNamespace(is_cuda=True), scaling)
    assert rows.data.data_ptr() == data.data_ptr() and rows.data.dtype == cols.data.dtype == E4M3
    assert cols.data.data_ptr() == (made._transpose if needed else data).data_ptr()
    assert torch.equal(cols.data.view(torch.uint8), data.t())


def reference_qkv(x, delta, gain, weight, cos, sin):
    residual = x + delta
    q, k, v = (norm_reference(residual, gain) @ weight.t()).view(B, T, 3, H, D).unbind(2)
    cos, sin = cos[None, :, None], sin[None, :, None]

    def rotate_and_norm(head):
        x1, x2 = head.chunk(2, dim=-1)
        return norm_reference(torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1), 1.0)

    return residual, rotate_and_norm(q), rotate_and_norm(k), v


# Stands for FusedBlocks: weights are quantized anew at every use
FUSED = SimpleNamespace(
    in_place="", where=None, operand=lambda weight, scaling: weight_operand(weight, lambda _: scaling, None, {}))


@pytest.mark.parametrize("fp8, quack", [(False, False), (True, False), (True, True)])
def test_first_part_of_a_block(fp8, quack, monkeypatch):
    """Within the format's rounding: E4M3 has 3 bits of mantissa and E5M2 has 2, products are off by 4% and 7%."""
    if quack:
        use_quack(monkeypatch)
    cos, sin = tables()
    x, delta = randn(B, T, C), randn(B, T, C, seed=1)
    gain, weight = 1 + 0.1 * randn(C, seed=2, dtype=torch.float32), SIZE * randn(3 * C, C, seed=3, dtype=torch.float32)
    grads = [randn(B, T, C, seed=4)] + [randn(B, T, H, D, seed=5 + i) for i in range(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in (x, delta, gain, weight)]
    updates = []
    layer = QKVLayer(
        fused=FUSED, eps=1e-6, n_head=H, cos=cos, sin=sin, on_last_gradient=lambda: updates.append(1),
        input=make_scaling(90, E4M3, fp8), weight=make_scaling(400, E4M3, fp8), d_qkv=make_scaling(2000, E5M2, fp8),
        quack=quack)
    *outputs, x0 = FusedQKV.apply(*leaves, layer)
    assert x0 is None
    torch.autograd.backward(outputs, [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)])
    plain = [tensor.float().clone().requires_grad_() for tensor in (x, delta, gain, weight)]
    expected = reference_qkv(*plain, cos, sin)
    torch.autograd.backward(expected, [grad.float() for grad in grads])
    assert updates == [1]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) < (0.05 if fp8 else 6e-3)
    for ours, theirs in zip(leaves, plain, strict=True):
        assert relative(ours.grad, theirs.grad) < (0.08 if fp8 else 1e-2)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    if fp8:  # quantizing records the amax
        assert layer.input.amax > 0 and layer.d_qkv.amax > 0


@pytest.mark.parametrize("x0_on, values_on, first_block, in_place, heads_first", [
    *((*parts, first_block, in_place, False) for parts in ((True, False), (False, True), (True, True))
      for first_block in (False, True) for in_place in ("", "add")), (True, True, False, "add", True)])
def test_residual_scalars_and_value_embedding(x0_on, values_on, first_block, in_place, heads_first):
    """In bf16 against plain PyTorch: 1% of each output and gradient. One token fills a third of a sequence.

    A scalar's gradient is a sum of N * C products of either sign. It may come out near zero while the products'
    rounding errors stay, so that its error is measured by the products' norm: what such a sum is without luck.
    heads_first: gradients of q, k and v lie in memory as (B, H, T, D), as attention by plain matmuls returns them.
    """
    V = 50
    cos, sin = tables()
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    idx[0, : T // 3] = 7
    embed = ValueEmbedding(SimpleNamespace(vocab_size=V, n_embd=C, n_head=H), torch.device(DEVICE))
    shared = SimpleNamespace(**vars(FUSED) | dict(in_place=in_place, where=token_order(idx, V)))
    layer = QKVLayer(fused=shared, eps=1e-6, n_head=H, cos=cos, sin=sin, on_last_gradient=None, input=None,
                     weight=None, d_qkv=None)
    inputs = dict(
        x=randn(B, T, C), delta=randn(B, T, C, seed=1), gain=1 + 0.1 * randn(C, seed=2, dtype=torch.float32),
        weight=SIZE * randn(3 * C, C, seed=3, dtype=torch.float32), x0=randn(B, T, C, seed=8),
        x_scale=torch.tensor(1.1, device=DEVICE), x0_scale=torch.tensor(-0.3, device=DEVICE),
        table=C ** -0.5 * randn(V, C, seed=10, dtype=torch.float32),
        gate=0.3 * randn(*embed.gate.shape, seed=11, dtype=torch.float32))
    off = {"delta"} if first_block else set()
    off |= set() if x0_on else {"x0", "x_scale", "x0_scale"}
    off |= set() if values_on else {"table", "gate"}
    ours, theirs = ({name: None if name in off else tensor.clone().to(dtype or tensor.dtype).requires_grad_()
                     for name, tensor in inputs.items()} for dtype in (None, torch.float32))
    if in_place and values_on:
        ours["table"].grad = torch.ones_like(ours["table"])
    grads = [randn(B, T, C, seed=4), *(randn(B, T, H, D, seed=5 + i) for i in range(3)), randn(B, T, C, seed=9)]
    if heads_first:
        grads[1:4] = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads[1:4]]
    outputs = FusedQKV.apply(*list(ours.values())[:4], layer, *list(ours.values())[4:])

    zero = torch.zeros(B, T, C, device=DEVICE)
    added, x0 = theirs["x"] + (zero if first_block else theirs["delta"]), theirs["x0"]
    mixed = theirs["x_scale"] * added + theirs["x0_scale"] * x0 if x0_on else added
    mixed.retain_grad()
    residual, q, k, v = reference_qkv(mixed, zero, theirs["gain"], theirs["weight"], cos, sin)
    if values_on:
        embed.table.data, embed.gate.data = theirs["table"].data, theirs["gate"].data
        v = torch.func.functional_call(embed, dict(table=theirs["table"], gate=theirs["gate"]),
                                       (v, residual, theirs["gain"], 1e-6, idx))
    for results in (outputs, (residual, q, k, v, x0)):
        kept = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if r is not None]
        torch.autograd.backward(*map(list, zip(*kept, strict=True)))
    for a, b in zip(outputs, (residual, q, k, v, x0), strict=True):
        assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-2)
    for name in inputs.keys() - off:
        got, want = ours[name].grad - (1 if name == "table" and in_place else 0), theirs[name].grad
        summed = mixed.grad * (added if name == "x_scale" else x0) if want.ndim == 0 else want
        assert (got - want).norm() < 1e-2 * summed.norm(), name


def test_value_embedding_gradient_of_sequences_of_one_token():
    """There a gradient may call itself contiguous although the stride between its tokens is D."""
    N, V = 8, 50
    tokens = token_order(torch.randint(V, (N, 1), dtype=torch.int32, device=DEVICE), V)
    dv, gates = randn(N, H, 1, D).transpose(1, 2), randn(N, H, seed=1, dtype=torch.float32)
    assert dv.is_contiguous() and dv.stride(1) == D
    table, gate, inputs = randn(V, C, seed=2), randn(H, 12, seed=3), randn(N, 12, seed=4, dtype=torch.float32)
    results = []
    for grad in (dv, dv.reshape(N, C).clone().view(N, 1, H, D)):
        dy = torch.zeros(N, C, dtype=dv.dtype, device=DEVICE)
        results.append((*value_embedding_grad(grad, dy, table, gate, tokens, inputs, gates, ""), dy))
    for ours, usual in zip(*results, strict=True):
        assert torch.equal(ours, usual)


@pytest.mark.parametrize("packed", [False, True])
def test_rope_and_qk_norm_in_place(packed):
    """Against plain PyTorch. packed: the gradients are views of one tensor, as attention returns them."""
    cos, sin = tables()
    qkv, grads = randn(B, T, 3 * C), randn(B, T, 3, H, D, seed=1)
    grad_parts = [grad.contiguous() for grad in grads.unbind(2)]

    def run(function):
        leaf = qkv.clone().requires_grad_()
        outputs = function(leaf * 1, cos, sin, H, 1e-6)  # * 1: a leaf must not be overwritten
        output_grads = grads.clone().unbind(2) if packed else [grad.clone() for grad in grad_parts]
        torch.autograd.backward(outputs, output_grads)
        return outputs, leaf.grad

    (plain, plain_grad), (in_place, in_place_grad) = run(rope_qk_norm), run(RopeQKNorm.apply)
    for a, b in zip(in_place, plain, strict=True):
        assert a.shape == (B, T, H, D) and relative(a, b) < 3e-3
    assert relative(in_place_grad, plain_grad) < 6e-3
    # Views of one tensor with the strides of TE's layout bs3hd
    assert all(x.stride() == (T * 3 * C, 3 * C, D, 1) for x in in_place)
    assert [x.storage_offset() for x in in_place] == [0, C, 2 * C]


@pytest.mark.parametrize("head", [16, 128, 2048])
def test_no_head_asks_for_more_threads_than_a_gpu_has(monkeypatch, head):
    asked = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, num_warps: asked.append(num_warps)

    monkeypatch.setattr(fused.kernels, "rope_qk_norm_backward", Kernel())
    grads = [randn(1, 2, 1, head) for _ in range(3)]
    fused.rope_qk_norm_grad(*grads, randn(2, 3 * head), None, None, None, None)
    assert 4 <= asked[0] <= 32  # of 32 threads each


class PlainQuack:
    """The matmuls of nanofp8/epilogue_functions.py in plain PyTorch, called as QuACK is."""

    @staticmethod
    def matmul(a, b, out, epi_args, tile_M, tile_N, cluster_M, cluster_N, post_init_attrs, pingpong=False):
        """Return a @ b.T (fp32), and check what QuACK would refuse or not survive."""
        assert all(factor.shape == (1,) for name, factor in epi_args.items() if name in "fghs")
        shape = len(a), -(-len(b) // tile_N)
        assert all(parts.shape == shape for name, parts in epi_args.items() if name in ("amax", "sums"))
        assert out.shape == (len(a), len(b)) and a.shape[1] == b.shape[1]
        assert tile_N % 16 == 0 and tile_N <= (208 if pingpong else 256)
        fp8 = "f" in epi_args
        assert a.is_contiguous() and out.is_contiguous()
        assert b.is_contiguous() or b.t().is_contiguous()
        product = a.float() @ b.float().t()
        return product * epi_args["f"] * epi_args["g"] if fp8 else product

    @staticmethod
    def store(values, out, epi_args, tile_N):
        quantized = cast(values, SimpleNamespace(dtype=out.dtype, scale=epi_args["s"]))
        out.copy_(quantized)
        if "cols" in epi_args:
            epi_args["cols"].copy_(quantized)
        epi_args["amax"].copy_(torch.stack([part.abs().amax(1) for part in values.split(tile_N, 1)], 1))

    class relu2:
        @staticmethod
        def gemm(a, b, out, c, epi_args, tile_N, **options):
            assert c is None
            values = PlainQuack.matmul(a, b, out, epi_args, tile_N=tile_N, **options).relu().square()
            PlainQuack.store(values, out, epi_args, tile_N)

    class relu2_backward:
        @staticmethod
        def gemm(a, b, out, c, epi_args, tile_N, **options):
            values = PlainQuack.matmul(a, b, out, epi_args, tile_N=tile_N, **options)
            PlainQuack.store(values * 2 * (c.float() * epi_args["h"]).sqrt(), out, epi_args, tile_N)

    class relu2_bf16:
        @staticmethod
        def gemm(a, b, out, c, epi_args, **options):
            assert c is None and not epi_args
            out.copy_(PlainQuack.matmul(a, b, out, epi_args, **options).relu().square())

    class relu2_backward_bf16:
        @staticmethod
        def gemm(a, b, out, c, epi_args, **options):
            assert c.dtype == out.dtype == torch.bfloat16 and c.shape == out.shape and c.is_contiguous()
            assert not epi_args
            out.copy_(PlainQuack.matmul(a, b, out, epi_args, **options) * (2 * c.float().sqrt()))

    class plain:
        @staticmethod
        def gemm(a, b, out, c, epi_args, **options):
            assert c is None and out.dtype == torch.bfloat16
            out.copy_(PlainQuack.matmul(a, b, out, epi_args, **options))

    class logits:
        @staticmethod
        def gemm(a, b, out, c, epi_args, tile_N, **options):
            rate, depth = epi_args["rate"], epi_args["depth"]
            assert c is None and isinstance(rate, float) and isinstance(depth, float)
            out.copy_(PlainQuack.matmul(a, b, out, epi_args, tile_N=tile_N, **options))
            terms = (depth / ((rate * out.float()).exp2() + 1)).exp2()
            epi_args["sums"].copy_(torch.stack([part.sum(1) for part in terms.split(tile_N, 1)], 1))


    @staticmethod
    def gemm(a, b, out, c, semaphore, alpha=1.0, beta=1.0, **tiles):
        assert semaphore is None and tiles == epilogues.SQUARES and a.dtype == out.dtype == torch.bfloat16
        assert a.is_contiguous() and out.is_contiguous() and (c is None or c.is_contiguous())
        assert out.shape == (len(a), a.shape[1], b.shape[1]) and a.shape[2] == b.shape[2]
        assert all(stride == 1 or stride % 8 == 0 for x in (a, b, out) for stride in x.stride())  # else it refuses them
        out.copy_(alpha * (a.float() @ b.float().mT) + (0.0 if c is None else beta * c.float()))

    @staticmethod
    def gemm_symmetric(a, b, out, c, semaphore, **options):
        assert a is b and out.shape[1] == out.shape[2]
        PlainQuack.gemm(a, b, out, c, semaphore, **options)


def use_quack(monkeypatch):
    """On a GPU use QuACK itself, or skip the test; on a CPU use PlainQuack."""
    if DEVICE == "cpu":
        monkeypatch.setattr(epilogues, "library", lambda: (PlainQuack, "QuACK in plain PyTorch"))
    elif torch.cuda.get_device_capability()[0] != 9 or not epilogues.library()[0]:
        pytest.skip(epilogues.library()[1])


def as_fp8(x, scale, dtype):
    """x (M, K) as a fused.Fp8 operand."""
    scaling = make_scaling(scale, dtype)
    return Fp8(cast(x, scaling), scaling.inverse)


@pytest.mark.parametrize("shape", [(3, C, C), (2, 4 * C, C), (C, 4 * C), (2, 768, 768), (2, 66, 64)])
def test_orthogonalisation_by_quack(monkeypatch, shape):
    """As close to the polynomials in float64 as without QuACK. The memory of results holds NaN before."""
    dions = pytest.importorskip("dion.polar_express")
    use_quack(monkeypatch)
    G = randn(*shape)
    wide = (G.mT if shape[-2] > shape[-1] else G).double()
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in dions._POLAR_EXPRESS_COEFFS:
        A = wide @ wide.mT
        wide = a * wide + (b * A + c * A @ A) @ wide
    exact, plain = wide.mT if shape[-2] > shape[-1] else wide, polar_express(G)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(math.nan))
    ours = polar_express(G, quack=True)
    assert ours.dtype == torch.bfloat16 and ours.shape == G.shape
    assert relative(ours, exact) < 1.1 * relative(plain, exact) + 1e-3


def test_relu2_in_the_epilogue_of_a_matmul(monkeypatch):
    """Against float64. The outputs' memory holds NaN before: every element must be written."""
    use_quack(monkeypatch)
    share, close = (0.06, 5e-3) if DEVICE == "cuda" else (0.01, 1e-3)  # fast accumulation cuts products short
    x, weight = as_fp8(randn(N, C), 90, E4M3), as_fp8(SIZE * randn(4 * C, C, seed=1), 400, E4M3)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(
        *shape, dtype=dtype, device=device).fill_(float("nan")))
    scaling, d_scaling = make_scaling(60.0, E4M3), make_scaling(9000.0, E5M2)  # some values saturate
    product = (x.data.double() * x.inverse_scale) @ (weight.data.double() * weight.inverse_scale).t()
    expected = product.relu().square()
    activation = Fp8(epilogues.relu2_matmul(x, weight, scaling), scaling.inverse)
    assert near(activation.data, cast(expected, scaling), share) and (activation.data.float() == 448).any()
    assert relative(scaling.amax, expected.max()) < close

    grad, fc2 = as_fp8(randn(N, C, seed=2), 5000, E5M2), as_fp8(SIZE * randn(4 * C, C, seed=3), 400, E4M3)
    expected = (grad.data.double() * grad.inverse_scale) @ (fc2.data.double() * fc2.inverse_scale).t()
    expected *= 2 * (activation.data.double() * activation.inverse_scale).sqrt()
    rows, cols = epilogues.relu2_backward_matmul(grad, fc2, activation, d_scaling)
    assert near(rows.data, cast(expected, d_scaling), share) and torch.equal(rows.data.float(), cols.data.float().t())
    assert rows.inverse_scale is cols.inverse_scale is d_scaling.inverse
    assert relative(d_scaling.amax, expected.abs().max()) < close
    assert not rows.data.float().isnan().any()

    amax = d_scaling.amax.clone()  # it is raised, never lowered
    epilogues.relu2_backward_matmul(grad._replace(inverse_scale=grad.inverse_scale / 4), fc2, activation, d_scaling)
    assert torch.equal(d_scaling.amax, amax)


@pytest.mark.parametrize("rows, columns, sums", [(N, 4 * C, C), (N - 8, 4 * C + 8, C)])
def test_relu2_in_the_epilogue_of_a_bf16_matmul(rows, columns, sums, monkeypatch):
    """Against float64, in rows of several sizes. The gradient is more exact than from relu^2's input in bf16. It is 0
    where the square underflows. The outputs' memory holds NaN before."""
    use_quack(monkeypatch)
    sizes = 1.0, 1e-12, 1e12, 1e-24, 0.0  # of every fifth row
    x, weight = randn(rows, sums), SIZE * randn(columns, sums, seed=1)
    x *= torch.tensor(sizes, device=DEVICE).repeat(rows)[:rows, None].to(x.dtype)
    grad, fc2 = randn(rows, sums, seed=2), SIZE * randn(sums, columns, seed=3)
    grad[5] = 0
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(
        *shape, dtype=dtype, device=device).fill_(float("nan")))
    activation = epilogues.relu2_matmul(x, weight, None)
    d_input, cols = epilogues.relu2_backward_matmul(grad, fc2.t(), activation, None)
    assert activation.dtype == d_input.dtype == torch.bfloat16 and activation.shape == d_input.shape == (rows, columns)
    assert cols.data_ptr() == d_input.data_ptr() and torch.equal(cols, d_input.t())
    inputs = (x.double() @ weight.double().t()).relu()
    d_activation = grad.double() @ fc2.double()
    expected = 2 * inputs * d_activation
    from_input = (2 * inputs.bfloat16().double() * d_activation.bfloat16().double()).bfloat16()
    for start in range(3):
        part = slice(start, None, len(sizes))
        # Rounding to bf16 once makes an error of 2^-9 at most, and of 1.7e-3 on average
        assert relative(activation[part], inputs[part].square()) < 1.8e-3
        assert relative(d_input[part], expected[part]) < min(2.2e-3, relative(from_input[part], expected[part]))
    for tensor in (activation, d_input):
        assert not tensor[3::5].any() and not tensor[4::5].any()
    assert not d_input[5].any() and activation[5].any()


@pytest.mark.parametrize("rows, columns, sums", [(N, C, C), (N, 3 * C, C), (N, C, 4 * C), (N - 16, C + 16, C)])
def test_bf16_from_a_matmul(rows, columns, sums, monkeypatch):
    """Against float64. The output's memory holds NaN before."""
    use_quack(monkeypatch)
    x, weight = as_fp8(randn(rows, sums), 90, E4M3), as_fp8(SIZE * randn(columns, sums, seed=1), 400, E4M3)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(
        *shape, dtype=dtype, device=device).fill_(float("nan")))
    expected = (x.data.double() * x.inverse_scale) @ (weight.data.double() * weight.inverse_scale).t()
    result = epilogues.plain_matmul(x, weight)
    assert result.dtype == torch.bfloat16
    # 2^-8 is half a unit of bf16's last place; tensor cores cut products short (fast accumulation)
    torch.testing.assert_close(result.double(), expected, rtol=2 ** -8, atol=0.1 if DEVICE == "cuda" else 1e-5)
    assert relative(result, expected) < (8e-3 if DEVICE == "cuda" else 3e-3)


def targets_of(rows, V):
    """(rows,) int64 targets, every seventh of which is ignored; the first and the last column are among them."""
    targets = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1], targets[2], targets[::7] = 0, V - 1, -1
    return targets.to(DEVICE)


@pytest.mark.parametrize("V", [384, 208, 400])  # two full tiles; a tile and a part of one, of two
@pytest.mark.parametrize("size, softcap", [(1.0, 15.0), (40.0, 15.0), (0.0, 15.0), (4.0, 30.0)])
def test_logits_and_the_sums_of_their_exponentials(V, size, softcap, monkeypatch):
    """Sums, loss and gradient against float64 of the same bf16 logits; memory holds NaN before. Logits far beyond the
    softcap, and zeros, for which columns beyond the last one would count as much as those that exist."""
    use_quack(monkeypatch)
    h, weight = as_fp8(randn(N, C), 90, E4M3), as_fp8(size * randn(V, C, seed=1) / C ** 0.5, 11, E4M3)
    targets, empty = targets_of(N, V), torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, dtype, device: empty(
            *shape, dtype=dtype, device=device).fill_(float("nan")))
        logits, sums = epilogues.logits_matmul(h, weight, softcap)
    expected = (h.data.double() * h.inverse_scale) @ (weight.data.double() * weight.inverse_scale).t()
    cut = 0.01 * max(1, size) if DEVICE == "cuda" else 1e-5  # fast accumulation
    torch.testing.assert_close(logits.double(), expected, rtol=2 ** -8, atol=cut)
    leaf = logits.double().requires_grad_()
    capped = softcap * torch.tanh(leaf / softcap)
    assert sums.shape == (N, -(-V // 192)) and relative(sums.sum(1), (capped - softcap).exp().sum(1)) < 2e-5
    terms = (capped - softcap).exp().split(192, 1)
    assert relative(sums, torch.stack([part.sum(1) for part in terms], 1)) < 2e-5
    value = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="sum")
    value.backward()
    assert relative(softcap_cross_entropy(logits, targets, softcap, sums), value) < 1e-5
    scaling = make_scaling(LOGIT_GRAD_SCALE, E5M2)
    ours, (rows, cols) = softcap_cross_entropy_and_grad(logits, targets, softcap, scaling, sums=sums)
    assert relative(ours, value) < 1e-5
    assert near(rows.data, cast(leaf.grad, scaling), 0.02) and torch.equal(cols.data.t().float(), rows.data.float())


@pytest.mark.parametrize("recompute", [False, True])
def test_head_by_quack(recompute, monkeypatch):
    """Loss and gradients in chunks, those of training and of evaluation, as without QuACK. A head without softcap
    does not use it."""
    use_quack(monkeypatch)
    V, h, targets = 400, randn(N, C), targets_of(N, 400)
    weight = 3 * randn(V, C, seed=1, dtype=torch.float32) / C ** 0.5
    calls, logits_matmul = [], epilogues.logits_matmul
    monkeypatch.setattr(epilogues, "logits_matmul", lambda *args: calls.append(1) or logits_matmul(*args))
    cfg = SimpleNamespace(vocab_size=V, n_embd=C, logit_softcap=15.0, loss_chunk_size=N // 2, USE_AC_LM_HEAD=recompute)

    def run(cfg, quack):
        """Return the losses of training and evaluation, the gradients, and how often QuACK ran."""
        head, leaf = loss.LMHead(cfg, torch.device(DEVICE), quack), h.clone().requires_grad_()
        head.weight.data = weight.clone()
        calls.clear()
        with torch.no_grad():
            evaluated = head(leaf.view(B, T, C), targets.view(B, T), fp8=True)
        value = head(leaf.view(B, T, C), targets.view(B, T), fp8=True)
        value.backward()
        return evaluated, value, leaf.grad, head.weight.grad, len(calls)

    *plain, none = run(cfg, False)
    *quack, several = run(cfg, True)
    assert none == 0 and several == (6 if recompute else 4)
    value, gradient = (1e-3, 0.05) if DEVICE == "cuda" else (1e-4, 0.02)
    for a, b, tolerance in zip(quack, plain, (value, value, gradient, gradient), strict=True):
        assert relative(a, b) < tolerance
    assert run(SimpleNamespace(**vars(cfg) | dict(logit_softcap=0.0)), True)[-1] == 0


@pytest.mark.parametrize("changed", [False, True])
def test_a_gradient_that_is_quantized_where_it_is_computed(changed, monkeypatch):
    """The next block's first part hands it on to this block's second part: same bits, one quantization less. If
    autograd has changed it on its way, it is quantized as without."""
    matmul = fused.matmul

    def in_bf16(*args, **options):  # as on a GPU; a CPU's return fp32, so that autograd rounds their gradients
        return matmul(*args, **options).bfloat16() if options.get("fast") else matmul(*args, **options)

    monkeypatch.setattr(fused, "matmul", in_bf16)
    cos, sin = tables()
    gain = 1 + 0.1 * randn(C, seed=7, dtype=torch.float32)
    counted, plain = [], fused.quantize
    monkeypatch.setattr(fused, "quantize", lambda x, *args, **options: counted.append(x) or plain(x, *args, **options))

    def run(handed_on):
        """Return the gradients, the amax of the gradient in question, and how often backward quantizes."""
        d_mlp_out, e4m3, e5m2 = make_scaling(5000, E5M2), make_scaling(90, E4M3), make_scaling(2000, E5M2)
        passed = Passed(d_mlp_out) if handed_on else None
        mlp = MLPLayer(fused=FUSED, eps=1e-6, attention_out=e4m3, proj=e4m3, d_proj=e5m2, input=e4m3, fc1=e4m3,
                       d_pre_activation=e5m2, activation=e4m3, fc2=e4m3, d_mlp_out=d_mlp_out, d_passed=passed)
        qkv = QKVLayer(fused=FUSED, eps=1e-6, n_head=H, cos=cos, sin=sin, on_last_gradient=None, input=e4m3,
                       weight=e4m3, d_qkv=e5m2, d_before=passed)
        leaves = [randn(B, T, C, seed=i).requires_grad_() for i in range(2)]
        weights = [(SIZE * randn(*shape, seed=2 + i, dtype=torch.float32)).requires_grad_()
                   for i, shape in enumerate([(C, C), (4 * C, C), (C, 4 * C), (3 * C, C)])]
        x, delta = FusedMLP.apply(*leaves, weights[0], gain, *weights[1:3], mlp)
        outputs = FusedQKV.apply(x, delta * 2 if changed else delta, gain, weights[3], qkv)[:4]
        counted.clear()
        torch.autograd.backward(outputs, [randn(*output.shape, seed=9 + i) for i, output in enumerate(outputs)])
        assert passed is None or passed.kept is None
        return [leaf.grad for leaf in leaves + weights], d_mlp_out.amax, len(counted)

    (grads, amax, count), (same, same_amax, plain_count) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert count == plain_count - (not changed) and (changed or torch.equal(amax, same_amax))


@pytest.mark.parametrize("fp8, quack", [(False, False), (False, True), (True, False), (True, True)])
def test_second_part_of_a_block(fp8, quack, monkeypatch):
    if quack:
        use_quack(monkeypatch)
    attention_out, x = randn(B, T, C), randn(B, T, C, seed=1)
    shapes = [(C, C), (4 * C, C), (C, 4 * C)]
    proj, fc1, fc2 = (SIZE * randn(*shape, seed=2 + i, dtype=torch.float32) for i, shape in enumerate(shapes))
    gain = 1 + 0.1 * randn(C, seed=7, dtype=torch.float32)
    grads = randn(B, T, C, seed=8), randn(B, T, C, seed=9)
    leaves = [tensor.clone().requires_grad_() for tensor in (attention_out, x, proj, gain, fc1, fc2)]
    layer = MLPLayer(
        fused=FUSED, eps=1e-6, attention_out=make_scaling(90, E4M3, fp8), proj=make_scaling(400, E4M3, fp8),
        d_proj=make_scaling(1000, E5M2, fp8), input=make_scaling(90, E4M3, fp8), fc1=make_scaling(400, E4M3, fp8),
        d_pre_activation=make_scaling(500, E5M2, fp8), activation=make_scaling(8, E4M3, fp8),
        fc2=make_scaling(400, E4M3, fp8), d_mlp_out=make_scaling(5000, E5M2, fp8), quack=quack)
    outputs = FusedMLP.apply(*leaves, layer)
    torch.autograd.backward(outputs, [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)])
    plain = [tensor.float().clone().requires_grad_() for tensor in (attention_out, x, proj, gain, fc1, fc2)]
    attention_out, x, proj, gain, fc1, fc2 = plain
    residual = x + attention_out @ proj.t()
    mlp_out = torch.relu(norm_reference(residual, gain) @ fc1.t()).square() @ fc2.t()
    torch.autograd.backward((residual, mlp_out), [grad.float() for grad in grads])
    for ours, theirs in zip(outputs, (residual, mlp_out), strict=True):
        assert relative(ours, theirs) < (0.08 if fp8 else 1e-2)
    for ours, theirs in zip(leaves, plain, strict=True):
        assert relative(ours.grad, theirs.grad) < (0.15 if fp8 else 1.5e-2)
    if fp8:
        quantized = "attention_out d_proj input d_pre_activation activation d_mlp_out"
        assert all(getattr(layer, name).amax > 0 for name in quantized.split())


def test_weight_gradients_in_place():
    x, dy = randn(N, C), randn(N, 2 * C, seed=1)
    weight = torch.nn.Parameter(torch.zeros(2 * C, C, device=DEVICE))
    expected = dy.t().float() @ x.float()
    weight.grad = torch.ones_like(weight)
    assert weight_gradient(dy.t(), x.t(), weight, "add") is None
    assert relative(weight.grad, 1 + expected) < 1e-4
    assert weight_gradient(dy.t(), x.t(), weight, "write") is None
    assert relative(weight.grad, expected) < 1e-4
    assert relative(weight_gradient(dy.t(), x.t(), weight, ""), expected) < 1e-4
    weight.grad = None
    assert relative(weight_gradient(dy.t(), x.t(), weight, "add"), expected) < 1e-4
    # A bf16 weight whose gradients are summed in fp32 elsewhere
    weight = torch.nn.Parameter(torch.zeros(2 * C, C, device=DEVICE, dtype=torch.bfloat16))
    weight.main_grad = torch.ones(2 * C, C, device=DEVICE)
    assert weight_gradient(dy.t(), x.t(), weight, "add") is None and weight.grad is None
    assert relative(weight.main_grad, 1 + expected) < 1e-4


class LayerStub:
    """What FusedBlocks reads of a TE layer with one or two matmuls."""

    def __init__(self, gemms, fp8=True):
        self.gemms, self.fp8, self.prepared = gemms, fp8, []
        self.fp8_meta = {key: SimpleNamespace(scale=torch.full((count * gemms,), scale, device=DEVICE),
                                              amax_history=torch.zeros(4, count * gemms, device=DEVICE))
                         for key, count, scale in (("scaling_fwd", 3, 90.0), ("scaling_bwd", 2, 1000.0))}

    def prepare_forward(self, x, num_gemms):
        self.prepared.append(num_gemms)

    def end_forward(self):
        assert self.prepared == [self.gemms]


def test_fused_blocks_share_delayed_scaling_with_te(monkeypatch):
    """begin() copies TE's scales; kernels raise TE's amaxes; the backward pass ends with TE's update of its scales."""
    if fused.te_gemm() is None:
        monkeypatch.setattr(fused, "te_quantizer", lambda scaling, colwise: None)
    updates = []
    state = SimpleNamespace(is_fp8_enabled=lambda: True,
                            reduce_and_update_fp8_tensors=lambda **arguments: updates.append(arguments))
    te = SimpleNamespace(quantization=SimpleNamespace(FP8GlobalStateManager=state),
                         autocast=lambda enabled: contextlib.nullcontext())
    blocks = [SimpleNamespace(attn=SimpleNamespace(qkv=LayerStub(1), proj=LayerStub(1), n_head=H, eps=1e-6),
                              mlp=LayerStub(2, fp8=block == 0)) for block in range(2)]
    cos, sin = tables()
    shared = FusedBlocks(SimpleNamespace(te=te, blocks=blocks, cos=cos, sin=sin), epilogues.Quack(bf16=True))
    x = randn(B, T, C)
    blocks[0].mlp.fp8_meta["scaling_fwd"].scale[3] = 8.0
    shared.begin(x, True, "", None)
    (first_qkv, first_mlp), (last_qkv, last_mlp) = shared.blocks
    assert last_mlp.input is last_mlp.activation is last_mlp.d_mlp_out is None  # runs in bf16
    assert last_mlp.quack and not first_mlp.quack and not first_qkv.quack and not last_qkv.quack
    assert last_qkv.on_last_gradient is None and last_qkv.input.dtype == E4M3 and last_qkv.d_qkv.dtype == E5M2
    assert first_mlp.activation.scale.item() == 8 and first_mlp.activation.inverse.item() == 1 / 8
    addresses = [part.data_ptr() for part in first_mlp.activation[:3]]

    weights = [SIZE * randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(
        [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)])]
    qkv, proj, fc1, fc2 = (torch.nn.Parameter(weight) for weight in weights)
    gain = torch.ones(C, device=DEVICE)
    residual, q, k, v, _ = FusedQKV.apply(x.requires_grad_(), None, gain, qkv, first_qkv)
    outputs = FusedMLP.apply((q + k + v).flatten(2), residual, proj, gain, fc1, fc2, first_mlp)
    scales = [layer.fp8_meta[key].scale for layer in (blocks[0].attn.qkv, blocks[0].attn.proj, blocks[0].mlp)
              for key in layer.fp8_meta]
    for scale in scales:  # TE updates them in place after the forward pass; backward must use the old ones
        scale.mul_(2)
    assert first_mlp.activation.scale.item() == 8 and updates == []
    torch.autograd.backward(outputs, [randn(B, T, C, seed=i).to(output.dtype) for i, output in enumerate(outputs)])
    assert updates == [{"forward": False}]

    # TE's numbers of the quantized tensors: inputs and weights, then output gradients
    for layer, forward, backward in ((blocks[0].attn.qkv, [0, 1], [0]), (blocks[0].attn.proj, [0, 1], [0]),
                                     (blocks[0].mlp, [0, 1, 3, 4], [0, 2])):
        for key, slots in (("scaling_fwd", forward), ("scaling_bwd", backward)):
            history = layer.fp8_meta[key].amax_history
            assert history[0].nonzero().flatten().tolist() == slots and (history[1:] == 0).all()
    expected = norm_reference(x.detach(), gain).abs().max()
    assert relative(blocks[0].attn.qkv.fp8_meta["scaling_fwd"].amax_history[0, 0], expected) < 1e-3
    assert relative(blocks[0].mlp.fp8_meta["scaling_bwd"].amax_history[0, 2], randn(B, T, C, seed=1).abs().max()) == 0

    shared.begin(x, False, "", None)
    assert first_mlp is shared.blocks[0][1] and first_mlp.activation.scale.item() == 16
    assert [part.data_ptr() for part in first_mlp.activation[:3]] == addresses
    rows, _ = shared.operand(fc1, first_mlp.fc1)
    assert rows.inverse_scale.item() == pytest.approx(1 / 90)  # quantized in the first micro-batch


PLAIN_PATH = """
import sys
if sys.argv[1] == "missing":
    sys.modules["triton"] = None
import torch
import train
from nanofp8 import fused, loss
logits = torch.arange(12.0).view(3, 4)
assert not fused.use_kernels(logits) and (fused.triton is None) == (sys.argv[1] == "missing")
value, (rows, cols) = loss.softcap_cross_entropy_and_grad(logits.clone(), torch.tensor([0, 1, -1]), 15.0)
assert torch.allclose(value, loss.softcap_cross_entropy(logits, torch.tensor([0, 1, -1]), 15.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["missing", "interpreted"])
def test_cpu_tensors_take_the_plain_path(triton):
    """Without Triton everything is imported and runs; TRITON_INTERPRET=1 alone sends no tensor through the kernels."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", PLAIN_PATH, triton], env=env, check=True,
                   cwd=pathlib.Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("nesterov", [False, True])
def test_muons_momentum(nesterov):
    grads = [randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(48, 16), (3, 5)])]
    momenta = [randn(*g.shape, seed=9, dtype=torch.float32) for g in grads]
    expected = [0.9 * m + g for m, g in zip(momenta, grads, strict=True)]
    updates = momentum_update(grads, momenta, torch.tensor(0.9), nesterov)
    for grad, moment, update, want in zip(grads, momenta, updates, expected, strict=True):
        assert relative(moment, want) < 1e-6 and update.dtype == torch.bfloat16
        assert relative(update, 0.9 * want + grad if nesterov else want) < 4e-3


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muons_update(cautious, dtype):
    """As TorchMuon and Dion: decay from the old weight by the base learning rate, where no sign speaks against it."""
    weights = [randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(48, 16), (3, 5)])]
    updates = [randn(*w.shape, seed=7, dtype=dtype) for w in weights]
    weights[0][0, :4] = 0
    mask = [(w * u >= 0) | (not cautious) for w, u in zip(weights, updates, strict=True)]
    expected = [w - 0.1 * 0.5 * w * m - 0.2 * u.float() for w, u, m in zip(weights, updates, mask, strict=True)]
    apply_update(weights, updates, torch.tensor(0.1, device=DEVICE), torch.tensor(0.2, device=DEVICE),
                 torch.tensor(0.5), cautious)
    for weight, want in zip(weights, expected, strict=True):
        assert relative(weight, want) < 1e-6


@pytest.mark.parametrize("cautious", [False, True])
def test_muons_functions_against_dions(cautious):
    muon = pytest.importorskip("dion").muon
    grads = [randn(32, 16, seed=i, dtype=torch.float32) for i in range(2)]
    runs = []
    for before, after in ((momentum_update, apply_update), (muon.muon_update_pre_orthogonalize,
                                                           muon.muon_update_post_orthogonalize)):
        momenta = [randn(32, 16, seed=5 + i, dtype=torch.float32) for i in range(2)]
        weights = [randn(32, 16, seed=8 + i, dtype=torch.float32) for i in range(2)]
        with torch.compiler.set_stance("force_eager"):
            updates = before(grads, momenta, torch.tensor(0.9), True)
            after(weights, updates, torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.5), cautious)
        runs.append(momenta + updates + weights)
    for a, b in zip(*runs, strict=True):
        assert relative(a, b) < 4e-3
