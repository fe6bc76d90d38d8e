"""te_emulation.py: number formats bit by bit, delayed scaling's bookkeeping, layers, recomputation, ranks.

The references here are written in numpy (float64, or float32 where the format's definition is in
float32) and ml_dtypes, independently of the code under test.
"""

import copy
import itertools
import math
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanofp8 import te_emulation as te  # noqa: E402

torch.set_num_threads(1)
R = te.recipe
RECIPES = {
    "delayed": R.DelayedScaling,
    "current": R.Float8CurrentScaling,
    "block": R.Float8BlockScaling,
    "mxfp8": R.MXFP8BlockScaling,
    "nvfp4": R.NVFP4BlockScaling,
}
FP8 = {torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, 448.0), torch.float8_e5m2: (ml_dtypes.float8_e5m2, 57344.0)}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    te.manual_seed(0)
    te._state.__init__()


def bf16(*shape, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def spread(*shape, seed=0):
    """Return values over many binades, so that blocks differ and some elements become subnormal or zero."""
    g = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-12, 8, shape, generator=g).float()
    x = torch.randn(shape, generator=g) * torch.exp2(exponent)
    x[:16, :16] = 0  # whole blocks of zeros
    return x.bfloat16()


def every_bf16():
    """Return all 65536 bf16 values, as fp32."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def around(values):
    """Return the values and their fp32 neighbours, which test ties and near-ties."""
    v = np.asarray(values, dtype=np.float32)
    above, below = (np.nextafter(v, np.float32(side)) for side in (np.inf, -np.inf))
    return torch.from_numpy(np.concatenate([v, above, below]))


def midpoints(grid):
    grid = np.unique(np.asarray(grid, dtype=np.float64))
    return np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])


# ------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("dtype", FP8, ids=["e4m3", "e5m2"])
def test_fp8_cast_matches_ml_dtypes(dtype):
    ref_dtype, top = FP8[dtype]
    grid = np.arange(256, dtype=np.uint8).view(ref_dtype).astype(np.float64)
    x = torch.cat([every_bf16(), around(midpoints(grid[np.isfinite(grid)]))])
    got = te.quantize_fp8(x, torch.tensor(1.0), dtype).view(torch.uint8).numpy()
    with np.errstate(invalid="ignore"):
        want = np.clip(x.numpy(), -top, top).astype(ref_dtype)
    nan = np.isnan(x.numpy())
    assert (got[~nan] == want.view(np.uint8)[~nan]).all()
    assert np.isnan(got.view(ref_dtype).astype(np.float32)[nan]).all()


@pytest.mark.parametrize("dtype", FP8, ids=["e4m3", "e5m2"])
def test_fp8_cast_saturates(dtype):
    top = FP8[dtype][1]
    x = torch.tensor([math.inf, -math.inf, top * 1.5, -top * 64, 3e38])
    assert te.quantize_fp8(x, torch.tensor(1.0), dtype).float().tolist() == [top, -top, top, -top, top]
    # the scale is applied in fp32, before the clamp
    assert te.quantize_fp8(torch.tensor([3e38]), torch.tensor(1e10), dtype).float().tolist() == [top]


def test_e2m1_rounding_matches_ml_dtypes():
    grid = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    x = torch.cat([every_bf16(), around(midpoints(grid))])
    got = te.round_e2m1(x).numpy()
    with np.errstate(invalid="ignore"):
        want = np.clip(x.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    nan = np.isnan(x.numpy())
    assert (got[~nan] == want[~nan]).all() and (np.signbit(got[~nan]) == np.signbit(x.numpy()[~nan])).all()
    assert (got[nan] == 6).all()


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert te.round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert te.round_e2m1(-ties).tolist() == [-0.0, -1, -1, -2, -2, -4, -4, -6]


def test_e8m0_rounds_up():
    x = np.abs(every_bf16().numpy())
    edges = np.array([1e-45, 6e-39, 2.0**-127, 2.0**-126], np.float32)
    x = np.concatenate([x, np.nextafter(x[np.isfinite(x)], np.float32(0)), edges])
    x = np.abs(x)
    got = te.float_to_e8m0(torch.from_numpy(x)).numpy()
    for v, e in zip(x.tolist(), got.tolist(), strict=True):
        if math.isnan(v):
            assert e == 255
        elif math.isinf(v):
            assert e == 254
        else:
            mantissa, exponent = math.frexp(v)  # v = mantissa * 2^exponent, mantissa in [.5, 1)
            smallest = (exponent - 1 if mantissa == 0.5 else exponent) if v else -127
            assert e == min(max(smallest + 127, 0), 254), (v, e)


def test_e8m0_decodes_like_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = te.e8m0_to_float(torch.from_numpy(codes).int()).numpy()
    np.testing.assert_array_equal(got, want)


def test_scale_of_ordinary_and_odd_amaxes():
    amax = np.abs(np.random.default_rng(0).standard_normal(4096).astype(np.float32)) * np.float32(2) ** 20
    got = te.compute_scale(torch.from_numpy(amax), 448.0).numpy()
    np.testing.assert_array_equal(got, np.float32(448) / amax)  # correctly rounded
    pow2 = te.compute_scale(torch.from_numpy(amax), 448.0, force_pow_2=True).numpy()
    np.testing.assert_array_equal(pow2, np.exp2(np.floor(np.log2(448 / amax.astype(np.float64)))))
    odd = te.compute_scale(torch.tensor([0.0, math.inf, math.nan, 1e-38, 1e-44]), 57344.0)
    assert odd.tolist() == [1.0, 1.0, 1.0, te.FP32_MAX, te.FP32_MAX]


def test_amax_skips_nan_and_keeps_inf():
    assert te.compute_amax(torch.tensor([1.0, -3.0, math.nan])).item() == 3
    assert te.compute_amax(torch.tensor([1.0, -math.inf, math.nan])).item() == math.inf


# ----------------------------------------------------------------------------------- block formats


def each_tile(shape, rows, cols):
    for i, j in itertools.product(range(0, shape[0], rows), range(0, shape[1], cols)):
        yield (slice(i, i + rows), slice(j, j + cols)), (i // rows, j // cols)


@pytest.mark.parametrize("dtype", FP8, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("rows,cols", [(1, 128), (128, 1), (128, 128)])
def test_float8_block_against_float64(rows, cols, dtype):
    ref_dtype, top = FP8[dtype]
    x = spread(256, 384)
    if rows == cols:
        q, scale_inv = te.quantize_block_2d(x, dtype)
    else:
        q, scale_inv = te.quantize_block_1d(x, dtype, dim=-1 if rows == 1 else 0)
    assert q.dtype == dtype and scale_inv.shape == (256 // rows, 384 // cols)
    x64, q64 = x.double().numpy(), q.float().double().numpy()
    for tile, index in each_tile(x.shape, rows, cols):
        amax = np.abs(x64[tile]).max()
        scale = 2.0 ** math.floor(math.log2(top / amax)) if amax else 1.0
        assert scale_inv[index].item() == 1 / scale
        np.testing.assert_array_equal(q64[tile], (x64[tile] * scale).astype(ref_dtype).astype(np.float64))


@pytest.mark.parametrize("dim", [-1, 0])
def test_mxfp8_against_float64(dim):
    x = spread(64, 96)
    q, e8m0 = te.quantize_mxfp8(x, dim=dim)
    rows, cols = (1, 32) if dim == -1 else (32, 1)
    x64, q64 = x.double().numpy(), q.float().double().numpy()
    assert e8m0.dtype == torch.uint8
    for tile, index in each_tile(x.shape, rows, cols):
        amax = np.abs(x64[tile]).max()
        exponent = math.ceil(math.log2(amax / 448)) if amax else -127
        assert e8m0[index].item() == exponent + 127
        np.testing.assert_array_equal(
            q64[tile], (x64[tile] * 2.0**-exponent).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        )
    assert np.abs(q64).max() <= 448


def reference_nvfp4(x, rows, cols):
    """Quantize to NVFP4 by its definition, in float32 numpy: (codes, block scales, amax)."""
    f, x = np.float32, x.float().numpy()
    amax = np.abs(x).max()
    encode = f(448 * 6) / amax
    multiplier, decode = encode * (f(1) / f(6)), f(1) / encode
    codes, scales = np.zeros_like(x), np.zeros((x.shape[0] // rows, x.shape[1] // cols), np.float32)
    for tile, index in each_tile(x.shape, rows, cols):
        scale = min(np.abs(x[tile]).max() * multiplier, f(448)).astype(ml_dtypes.float8_e4m3fn).astype(f)
        scales[index] = scale
        with np.errstate(divide="ignore"):
            block_encode = min(f(1) / (scale * decode), np.finfo(f).max)
        scaled = np.clip(x[tile] * block_encode, -6, 6)
        codes[tile] = scaled.astype(ml_dtypes.float4_e2m1fn).astype(f)
    return codes, scales, amax


@pytest.mark.parametrize("rows,cols", [(1, 16), (16, 1), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4_against_its_definition(rows, cols, dtype):
    x = spread(64, 96, seed=3).to(dtype)
    if dtype == torch.float32:
        x = x + torch.randn(x.shape) * 1e-3 * x  # use all mantissa bits
    got = te.quantize_nvfp4(x, dim=0 if cols == 1 else -1, two_d=rows == cols)
    codes, scales, amax = reference_nvfp4(x, rows, cols)
    assert got.amax.item() == amax
    np.testing.assert_array_equal(got.scale.float().numpy(), scales)
    np.testing.assert_array_equal(got.values.numpy(), codes)


def test_nvfp4_of_zeros_and_of_inf():
    assert (te.quantize_nvfp4(torch.zeros(16, 16).bfloat16()).values == 0).all()
    x = torch.ones(16, 16)
    x[0, 0] = math.inf
    q = te.quantize_nvfp4(x)
    assert torch.isfinite(q.values).all() and torch.isfinite(q.scale.float()).all()


def test_values_times_scales_are_exact_in_bf16():
    x = spread(128, 128)
    x[0, 0] = 2.0**60
    for q, s, rows, cols in (
        (*te.quantize_block_1d(x), 1, 128),
        (lambda q, e: (q, te.e8m0_to_float(e.int())))(*te.quantize_mxfp8(x)) + (1, 32),
        (lambda t: (t.values, t.scale.float()))(te.quantize_nvfp4(x)) + (1, 16),
    ):
        exact = q.double() * s.double().repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        assert (te._dequantize(q, s, rows, cols).double() == exact).all()


def test_stochastic_rounding_takes_only_neighbours_and_is_unbiased():
    x = [0.0, 0.1, 0.25, 0.4, 0.5, 0.9, 1.3, 1.9, 2.0, 2.2, 3.0, 3.7, 4.0, 4.5, 5.9, 6.0, -0.3, -2.9, -5.0]
    x = torch.tensor(x)
    draws = te.stochastic_round_e2m1(x.expand(10_000, -1))
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-grid.flip(0), grid])
    for value, column in zip(x, draws.T, strict=True):
        lower, upper = grid[grid <= value].max(), grid[grid >= value].min()
        assert set(column.tolist()) <= {lower.item(), upper.item()}
        # five standard errors of the mean of 10,000 draws
        step, p = (upper - lower).item(), ((value - lower) / (upper - lower)).nan_to_num().item()
        assert abs(column.mean().item() - value.item()) <= 5 * step * math.sqrt(p * (1 - p) / 10_000) + 1e-6
    assert te.stochastic_round_e2m1(torch.tensor([7.0, -100.0, math.inf, math.nan])).tolist() == [6, -6, 6, 6]


def test_stochastic_rounding_is_seeded_and_independent_of_torch_seed():
    x = torch.rand(1000) * 6
    te.manual_seed(5)
    first, state, second = te.stochastic_round_e2m1(x), te.get_rng_state(), te.stochastic_round_e2m1(x)
    assert not torch.equal(first, second)
    te.set_rng_state(state)
    torch.manual_seed(99)
    assert torch.equal(te.stochastic_round_e2m1(x), second)
    te.manual_seed(5)
    assert torch.equal(te.stochastic_round_e2m1(x), first)


def test_hadamard_transform_is_orthogonal_and_cancels():
    h = te.hadamard_matrix("cpu")
    assert torch.equal(h @ h.T, torch.eye(16)) and h.abs().unique().tolist() == [0.25]
    assert (h[:, 0] * 4).tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    a, b = torch.randn(64, 24), torch.randn(64, 40)
    ha, hb = te.hadamard_transform(a, 0), te.hadamard_transform(b, 0)
    torch.testing.assert_close(ha.T @ hb, a.T @ b, atol=1e-4, rtol=1e-4)
    assert torch.equal(te.hadamard_transform(a, 0).T, te.hadamard_transform(a.T.contiguous(), -1))
    # outliers are spread over their block
    spike = torch.zeros(16, 1)
    spike[3] = 16
    assert te.hadamard_transform(spike, 0).abs().unique().tolist() == [4]


# --------------------------------------------------------------------------------- delayed scaling


def reference_update(history, scale, scaled_max, algo):
    """Do one update tensor by tensor; it changes history (H, N) and scale (N,) in place."""
    length, count = history.shape
    for n in range(count):
        last = history[0, n]
        if last == 0:
            continue
        rolled = [history[i + 1, n] if i < length - 1 else last for i in range(length)]
        amax = last if algo == "most_recent" else max(rolled)
        history[:, n] = [0.0] + rolled[1:]
        if math.isfinite(amax) and amax > 0:
            quotient = np.float32(scaled_max) / np.float32(amax)
            scale[n] = min(quotient, np.float32(te.FP32_MAX))


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_amax_and_scale_update(algo, length):
    rng = np.random.default_rng(length)
    history, scale = np.zeros((length, 6), np.float32), np.ones(6, np.float32)
    h, s = torch.from_numpy(history.copy()), torch.from_numpy(scale.copy())
    for step in range(12):
        amax = np.abs(rng.standard_normal(6)).astype(np.float32)
        amax[0] = 0 if step % 3 else amax[0]  # not quantized in every step
        amax[1] = np.inf if step == 4 else amax[1]
        amax[2] = 1e-42
        amax[3] = 0
        history[0] = amax
        h[0] = torch.from_numpy(amax)
        with np.errstate(over="ignore"):
            reference_update(history, scale, 448 * 2.0**-1, algo)
        h, s = te.update_amax_and_scale(h, s, h[0].clone(), 448 * 2.0**-1, algo)
        np.testing.assert_array_equal(h.numpy(), history)
        np.testing.assert_array_equal(s.numpy(), scale)
    assert s[3] == 1 and s[2] == te.FP32_MAX


def step(module, x, rcp, first=None, group=None, grad=True):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        with te.autocast(enabled=rcp is not None, recipe=rcp, amax_reduction_group=group):
            y = module(x, is_first_microbatch=first)
    if grad:
        y.float().square().mean().backward()
    return y


def test_delayed_scale_comes_from_the_steps_before():
    rcp = R.DelayedScaling(amax_history_len=4)
    layer = te.Linear(32, 16)
    seen = []
    for t in range(7):
        x = bf16(16, 32, scale=2.0 ** (3 - t), seed=t)
        expected = 448 / max(seen[-4:]) if seen else 1.0
        layer.init_fp8_meta_tensors(rcp)
        used = layer.fp8_meta["scaling_fwd"].scale[0].item()
        assert used == pytest.approx(expected, rel=1e-6)
        y = step(layer, x, rcp)
        w_scale = te.compute_scale(te.compute_amax(layer.weight), 448.0).item() if t else 1.0
        q = te.quantize_fp8(x, torch.tensor(used), torch.float8_e4m3fn).double()
        w = te.quantize_fp8(layer.weight.detach(), torch.tensor(w_scale), torch.float8_e4m3fn).double()
        torch.testing.assert_close(y.double(), (q @ w.T / used / w_scale), rtol=2**-8, atol=1e-6)
        seen.append(x.abs().max().item())
    history = layer.fp8_meta["scaling_fwd"].amax_history
    assert history[:, 0].tolist() == [0.0] + seen[-3:]


def test_delayed_state_has_te_layout_and_stays_out_of_the_state_dict():
    rcp = R.DelayedScaling(amax_history_len=8)
    for module, x, gemms in ((te.Linear(32, 16), bf16(8, 32), 1), (te.LayerNormMLP(32, 64), bf16(8, 32), 2)):
        step(module, x, rcp)
        fwd, bwd = module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]
        assert fwd.scale.shape == (3 * gemms,) and fwd.amax_history.shape == (8, 3 * gemms)
        assert bwd.scale.shape == (2 * gemms,) and bwd.amax_history.shape == (8, 2 * gemms)
        # input, weight, (output) and grad_output, (grad_input): one entry each at the end, the rest 0
        assert (fwd.amax_history[-1] > 0).tolist() == [True, True, False] * gemms
        assert (bwd.amax_history[-1] > 0).tolist() == [True, False] * gemms
        assert (fwd.amax_history[:-1] == 0).all() and (bwd.amax_history[:-1] == 0).all()
        for state, top in ((fwd, 448.0), (bwd, 57344.0)):
            assert state.scale[0].item() == pytest.approx(top / state.amax_history[-1, 0].item(), rel=1e-6)
        assert set(module.state_dict()) == {n for n, _ in module.named_parameters()}
    mlp = module
    assert fwd.amax_history[-1, 1] == mlp.fc1_weight.abs().max()
    assert fwd.amax_history[-1, 4] == mlp.fc2_weight.abs().max()


def test_forward_scales_update_at_exit_of_the_outermost_autocast_only():
    rcp, layer = R.DelayedScaling(amax_history_len=4), te.Linear(32, 16)
    x = bf16(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
        with te.autocast(recipe=rcp):
            layer(x)
        state = layer.fp8_meta["scaling_fwd"]
        assert state.scale[0] == 1 and state.amax_history[0, 0] > 0
        layer(2 * x)  # a second call in the region: the larger amax counts
    assert layer.fp8_meta["scaling_fwd"].amax_history[:, 0].tolist() == [0, 0, 0, 2 * x.abs().max().item()]
    assert (layer.fp8_meta["scaling_bwd"].amax_history == 0).all()


def test_evaluation_records_amaxes_but_updates_nothing():
    rcp, layer = R.DelayedScaling(amax_history_len=4), te.Linear(32, 16)
    step(layer, bf16(16, 32), rcp, grad=False)
    state = layer.fp8_meta["scaling_fwd"]
    assert state.amax_history[0, 0] > 0 and (state.amax_history[1:] == 0).all() and (state.scale == 1).all()


def test_evaluation_inside_a_training_region_leaves_the_backward_update_to_training():
    rcp, layer = R.DelayedScaling(amax_history_len=4), te.Linear(32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
        with torch.no_grad():
            layer(bf16(16, 32))
        y = layer(bf16(16, 32))
    y.float().sum().backward()
    assert layer.fp8_meta["scaling_bwd"].amax_history[-1, 0] == 1


def test_backward_scales_update_once_when_the_first_module_is_done():
    rcp = R.DelayedScaling(amax_history_len=4)
    a, b = te.Linear(32, 32), te.LayerNormMLP(32, 64)
    calls = []
    original = te._Global.reduce_and_update
    te._Global.reduce_and_update = lambda self, forward: (calls.append(forward), original(self, forward))
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
            y = b(a(bf16(16, 32)))
        y.float().sum().backward()
    finally:
        te._Global.reduce_and_update = original
    assert calls == [True, False]
    for module in (a, b):
        assert (module.fp8_meta["scaling_bwd"].amax_history[-1, ::2] > 0).all()
        assert (module.fp8_meta["scaling_bwd"].amax_history[0] == 0).all()


def test_state_can_be_made_before_the_first_pass():
    rcp, mlp, linear = R.DelayedScaling(amax_history_len=4), te.LayerNormMLP(32, 64), te.Linear(32, 16)
    mlp.init_fp8_meta_tensors(rcp)
    with te.autocast(recipe=rcp):
        linear.init_fp8_metadata()
        with pytest.raises(ValueError, match="num_gemms must be 2"):
            mlp.init_fp8_metadata(num_gemms=1)
    assert mlp.fp8_meta["scaling_bwd"].scale.tolist() == [1] * 4
    state = linear.fp8_meta["scaling_fwd"]
    state.scale.fill_(2)
    step(linear, bf16(16, 32), rcp)
    assert linear.fp8_meta["scaling_fwd"] is state and state.scale[2] == 2 and state.amax_history[-1, 0] > 0


def test_history_survives_another_length_and_a_copy_updates_apart():
    layer = te.Linear(32, 16)
    step(layer, bf16(16, 32), R.DelayedScaling(amax_history_len=4))
    twin = copy.deepcopy(layer)
    step(twin, bf16(16, 32, seed=1), R.DelayedScaling(amax_history_len=6))
    assert layer.fp8_meta["scaling_fwd"].amax_history.shape[0] == 4
    history = twin.fp8_meta["scaling_fwd"].amax_history[:, 0]
    assert history.shape == (6,) and history[2] == bf16(16, 32).abs().max()
    assert history[5] == bf16(16, 32, seed=1).abs().max()


# ------------------------------------------------------------------------------------------ layers


def test_parameter_names_and_shapes():
    shapes = lambda m: {n: tuple(p.shape) for n, p in m.named_parameters()}  # noqa: E731
    assert shapes(te.Linear(32, 48)) == {"weight": (48, 32)}
    assert shapes(te.LayerNormLinear(32, 48)) == {"layer_norm_weight": (32,), "weight": (48, 32)}
    mlp = te.LayerNormMLP(32, 128)
    assert shapes(mlp) == {"layer_norm_weight": (32,), "fc1_weight": (128, 32), "fc2_weight": (32, 128)}
    assert shapes(te.RMSNorm(32)) == {"weight": (32,)} and shapes(te.RMSNorm(hidden_size=8)) == {"weight": (8,)}
    assert shapes(te.DotProductAttention(2, 16)) == {}
    assert list(mlp.state_dict()) == ["layer_norm_weight", "fc1_weight", "fc2_weight"]
    assert te.Linear(16, 16, params_dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_init_methods_and_meta_device():
    mlp = te.LayerNormMLP(
        32, 64, init_method=lambda w: torch.nn.init.constant_(w, 2), output_layer_init_method=torch.nn.init.zeros_
    )
    assert (mlp.fc1_weight == 2).all() and (mlp.fc2_weight == 0).all() and (mlp.layer_norm_weight == 1).all()
    assert te.Linear(512, 512).weight.std().item() == pytest.approx(0.023, rel=0.02)
    meta = te.LayerNormMLP(32, 64, device="meta", init_method=torch.nn.init.ones_)
    assert meta.fc1_weight.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert (meta.fc1_weight == 1).all() and (meta.layer_norm_weight == 1).all()


def rms(x, w, eps=1e-5):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


class Stack(torch.nn.Module):
    def __init__(self, width=128, recompute=None, checkpoint_mlp=False):
        super().__init__()
        self.qkv = te.LayerNormLinear(width, 3 * width)
        self.out = te.Linear(3 * width, width)
        self.mlp = te.LayerNormMLP(width, 2 * width, checkpoint=checkpoint_mlp)
        self.recompute = recompute
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape) * (1 / math.sqrt(p.shape[-1]) if p.dim() == 2 else 0.2) + (p.dim() == 1))

    def body(self, x, first):
        return x + self.mlp(self.out(self.qkv(x, first), first), first)

    def forward(self, x, is_first_microbatch=None):
        if self.recompute is None:
            return self.body(x, is_first_microbatch)
        return te.checkpoint(self.body, x, is_first_microbatch, use_reentrant=self.recompute)

    def reference(self, x):
        h = rms(x, self.qkv.layer_norm_weight) @ self.qkv.weight.T @ self.out.weight.T
        z = rms(h, self.mlp.layer_norm_weight) @ self.mlp.fc1_weight.T
        return x + z.relu().square() @ self.mlp.fc2_weight.T


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# Largest relative error (Frobenius norm) of the output, the input's gradient and every parameter's
# gradient of a stack of four GEMMs, against fp32. Measured: about 60% of these.
TOLERANCE = {None: 0.02, "delayed": 0.25, "current": 0.2, "block": 0.2, "mxfp8": 0.2, "nvfp4": 0.7}


@pytest.mark.parametrize("name", TOLERANCE)
def test_layers_are_close_to_fp32(name):
    stack, rcp = Stack(), RECIPES[name]() if name else None
    x = torch.randn(256, 128, requires_grad=True)
    for _ in range(3 if name == "delayed" else 1):  # delayed scaling needs a history
        stack.zero_grad()
        x.grad = None
        y = step(stack, x, rcp)
    grads = [x.grad] + [p.grad.clone() for p in stack.parameters()]
    x2 = x.detach().clone().requires_grad_()
    stack.zero_grad()
    ref = stack.reference(x2)
    ref.square().mean().backward()
    assert y.dtype == torch.bfloat16 or y.dtype == torch.float32
    assert relative(y, ref) < TOLERANCE[name]
    for got, want in zip(grads, [x2.grad] + [p.grad for p in stack.parameters()], strict=True):
        assert got.dtype == want.dtype and relative(got, want) < TOLERANCE[name]


def test_current_scaling_linear_is_exact_up_to_summation():
    """Compare output and both gradients with those of the quantized values in float64."""
    layer, x = te.Linear(64, 48), bf16(32, 64, scale=3).requires_grad_()
    g = bf16(32, 48, scale=1e-4, seed=7)
    with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=R.Float8CurrentScaling()):
        y = layer(x)
    y.backward(g)

    def dequantized(t, dtype):
        ref_dtype, top = FP8[dtype]
        t = t.detach().float().numpy()
        scale = np.float32(top) / np.abs(t).max()
        return torch.from_numpy((t * scale).astype(ref_dtype).astype(np.float64) / np.float64(scale))

    xq, wq = dequantized(x, torch.float8_e4m3fn), dequantized(layer.weight, torch.float8_e4m3fn)
    gq = dequantized(g, torch.float8_e5m2)
    for got, want in ((y, xq @ wq.T), (x.grad, gq @ wq), (layer.weight.grad, gq.T @ xq)):
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4 * want.abs().max().item())
    # the GEMM returns wgrad in bf16 even for an fp32 parameter
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())


@pytest.mark.parametrize("name", ["block", "mxfp8", "nvfp4"])
def test_each_gemm_takes_the_direction_it_sums_over(name):
    """Compare dgrad and wgrad with those of independently dequantized operands (NVFP4: nothing random)."""
    plain = {"disable_rht": True, "disable_stochastic_rounding": True} if name == "nvfp4" else {}
    rcp = RECIPES[name](**plain)
    layer, x = te.Linear(128, 256), spread(128, 128, seed=1).requires_grad_()
    g = spread(128, 256, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
        y = layer(x)
    y.backward(g)
    w = layer.weight.detach()

    def dequantize(t, dim, weight=False):
        if name == "nvfp4":
            rows, cols = (16, 16) if weight else (1, 16) if dim else (16, 1)
            q, s, amax = reference_nvfp4(t.detach(), rows, cols)
            q, s = torch.from_numpy(q).double(), torch.from_numpy(s).double() * float(amax) / 2688
        elif name == "block":
            rows, cols = (128, 128) if weight else (1, 128) if dim else (128, 1)
            q, s = te.quantize_block_2d(t.detach()) if weight else te.quantize_block_1d(t.detach(), dim=dim)
            q, s = q.double(), s.double()
        else:
            rows, cols = (1, 32) if dim else (32, 1)
            q, s = te.quantize_mxfp8(t.detach(), dim=dim)
            q, s = q.double(), torch.exp2(s.double() - 127)
        return q * s.repeat_interleave(rows, 0).repeat_interleave(cols, 1)

    wanted = {
        "y": (y, dequantize(x, -1) @ dequantize(w, -1, True).T),
        "dx": (x.grad, dequantize(g, -1) @ dequantize(w, 0, True)),
        "dw": (layer.weight.grad, dequantize(g, 0).T @ dequantize(x, 0)),
    }
    for what, (got, want) in wanted.items():
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5 * want.abs().max().item(), msg=what)


def test_nvfp4_random_parts():
    """RHT and stochastic rounding change the weight's gradient; only rounding changes the input's."""
    x, g = bf16(64, 64), bf16(64, 64, seed=1)

    def grads(seed, **kwargs):
        torch.manual_seed(0)
        te.manual_seed(seed)
        layer, inp = te.Linear(64, 64), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=R.NVFP4BlockScaling(**kwargs)):
            y = layer(inp)
        y.backward(g)
        return y, inp.grad, layer.weight.grad

    plain = grads(0, disable_rht=True, disable_stochastic_rounding=True)
    rht = grads(0, disable_stochastic_rounding=True)
    assert torch.equal(plain[0], rht[0]) and torch.equal(plain[1], rht[1]) and not torch.equal(plain[2], rht[2])
    a, b, again = grads(1), grads(2), grads(1)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])
    assert all(torch.equal(p, q) for p, q in zip(a, again, strict=True))
    # the mean over draws approaches the gradient of the unrounded dy
    mean = sum(grads(s)[1].double() for s in range(64)) / 64
    torch.manual_seed(0)
    w = te.Linear(64, 64).weight.detach()
    q = te.quantize_nvfp4(w, two_d=True)
    wq = q.values.double() * q.scale.double().repeat_interleave(16, 0).repeat_interleave(16, 1) * q.amax.item() / 2688
    want = g.double() @ wq
    assert relative(mean, want) < 0.35 * relative(a[1], want)


def test_norm_is_quantized_from_fp32_under_delayed_scaling_and_from_bf16_otherwise():
    """The recorded amax shows which values were quantized."""
    x = bf16(16, 32)
    layer = te.LayerNormLinear(32, 16)
    with torch.no_grad():
        layer.layer_norm_weight.uniform_(0.5, 1.5)
    gain = layer.layer_norm_weight.detach().bfloat16().float()  # the gain is cast to bf16 first
    exact = rms(x.float(), gain)
    step(layer, x, R.DelayedScaling())
    recorded = layer.fp8_meta["scaling_fwd"].amax_history[-1, 0].item()
    assert recorded == pytest.approx(exact.abs().max().item(), rel=1e-6)
    assert recorded != exact.bfloat16().abs().max().item()
    y = step(layer, x, R.Float8CurrentScaling())
    rounded = exact.bfloat16()
    linear = te.Linear(32, 16)
    linear.weight = layer.weight
    assert torch.equal(y, step(linear, rounded, R.Float8CurrentScaling()))


@pytest.mark.parametrize("activation", ["srelu", "relu", "gelu"])
def test_activations(activation):
    mlp = te.LayerNormMLP(32, 64, activation=activation)
    with torch.no_grad():
        mlp.fc1_weight.mul_(20)
    x = torch.randn(16, 32, requires_grad=True)
    y = mlp(x)  # fp32 throughout: no autocast
    acts = {"srelu": lambda z: z.relu() ** 2, "relu": torch.relu, "gelu": lambda z: F.gelu(z, approximate="tanh")}
    want = acts[activation](rms(x, mlp.layer_norm_weight) @ mlp.fc1_weight.T) @ mlp.fc2_weight.T
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)
    inputs = [x, *mlp.parameters()]
    g = torch.randn_like(y)
    for got, ref in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(got, ref, atol=1e-4, rtol=1e-3)


def test_bf16_without_quantization_matches_torch():
    layer, x = te.Linear(64, 32), torch.randn(16, 64, requires_grad=True)
    y = step(layer, x, None)
    want = (x.bfloat16().double() @ layer.weight.bfloat16().double().T).bfloat16()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=2**-7, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(enabled=False):
        assert torch.equal(layer(x), y)


def test_rmsnorm():
    norm, x = te.RMSNorm(64, eps=1e-6), torch.randn(4, 8, 64, requires_grad=True)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    y, g = norm(x), torch.randn(4, 8, 64)
    want = rms(x, norm.weight, 1e-6)
    torch.testing.assert_close(y, want)
    for got, ref in zip(*(torch.autograd.grad(t, [x, norm.weight], g) for t in (y, want)), strict=True):
        torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [None, 2])
def test_attention(groups):
    B, T, H, D = 2, 24, 4, 16
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, groups or H, D), torch.randn(B, T, groups or H, D)
    y = te.DotProductAttention(H, D, num_gqa_groups=groups)(q, k, v)
    k, v = (t.repeat_interleave(H // (groups or H), 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    want = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(B, T, H * D)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_zero_weight_and_a_zero_gradient_are_harmless(name):
    mlp = te.LayerNormMLP(128, 128, output_layer_init_method=torch.nn.init.zeros_)
    x = bf16(128, 128).requires_grad_()
    for _ in range(2):
        y = step(mlp, x, RECIPES[name]())
    assert (y == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in [x, *mlp.parameters()])


def test_gradients_only_where_asked():
    layer, x = te.LayerNormLinear(32, 16), bf16(16, 32)
    layer.weight.requires_grad_(False)
    step(layer, x, R.Float8CurrentScaling())
    assert layer.weight.grad is None and layer.layer_norm_weight.grad is not None and x.grad is None


# ----------------------------------------------------------------------- caching and recomputation


@pytest.mark.parametrize("name", RECIPES)
def test_first_microbatch_caches_the_quantized_weight(name):
    layer, rcp, x = te.Linear(128, 128), RECIPES[name](), bf16(128, 128)
    run = lambda first: step(layer, x, rcp, first=first, grad=False)  # noqa: E731
    before = run(True)
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.equal(run(False), before)  # the old weight
    assert torch.equal(run(None), -before)  # neither reads nor writes the cache
    assert torch.equal(run(False), before)
    assert torch.equal(run(True), -before) and torch.equal(run(False), -before)


def test_cached_weight_is_not_recorded_again():
    layer, rcp = te.Linear(32, 16), R.DelayedScaling(amax_history_len=4)
    step(layer, bf16(16, 32), rcp, first=True)
    step(layer, bf16(16, 32, seed=1), rcp, first=False)
    history = layer.fp8_meta["scaling_fwd"].amax_history
    assert (history[:, 0] > 0).tolist() == [False, False, True, True]
    assert (history[:, 1] > 0).tolist() == [False, False, False, True]


def train(stack, rcp, steps=3, microbatches=2):
    te.manual_seed(0)
    result = []
    for t in range(steps):
        stack.zero_grad()
        for m in range(microbatches):
            x = bf16(128, 128, scale=2.0**t, seed=10 * t + m).requires_grad_()
            y = step(stack, x, rcp, first=m == 0)
            result += [y.detach(), x.grad]
        result += [p.grad.clone() for p in stack.parameters()]
        with torch.no_grad():
            for p in stack.parameters():
                p -= 0.01 * p.grad
    for module in stack.modules():
        for key in ("scaling_fwd", "scaling_bwd"):
            state = getattr(module, "fp8_meta", {}).get(key)
            if state is not None:
                result += [state.scale.clone(), state.amax_history.clone()]
    return result


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "mlp", "both"])
def test_recomputation_changes_nothing(name, how):
    rcp = RECIPES[name](amax_history_len=4) if name == "delayed" else RECIPES[name]()
    torch.manual_seed(1)
    plain = Stack()
    torch.manual_seed(1)
    recompute = {"reentrant": True, "non-reentrant": False, "mlp": None, "both": False}[how]
    again = Stack(recompute=recompute, checkpoint_mlp=how in ("mlp", "both"))
    want, got = train(plain, rcp), train(again, rcp)
    assert len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_interleaved_recomputation_uses_each_pass_own_scales(reentrant):
    """Run two forward passes, then their backward passes in reverse order."""
    rcp, results = R.DelayedScaling(amax_history_len=4), []
    for recompute in (None, reentrant):
        torch.manual_seed(1)
        stack, losses = Stack(recompute=recompute), []
        for t in range(3):
            x = bf16(128, 128, scale=4.0**t, seed=t).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
                losses.append(stack(x).float().square().mean())
        for loss in reversed(losses):
            loss.backward()
        histories = [m.fp8_meta["scaling_fwd"].amax_history for m in (stack.qkv, stack.mlp)]
        results.append([p.grad for p in stack.parameters()] + histories)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpoint_without_gradients_just_runs():
    with torch.no_grad():
        assert te.checkpoint(lambda x, k: x * k, torch.ones(2), k=3).tolist() == [3, 3]
    assert te._state.frames == []


def test_autocast_inside_a_checkpointed_function():
    rcp = R.DelayedScaling(amax_history_len=4)
    for reentrant in (None, True, False):
        torch.manual_seed(3)
        layer = te.Linear(32, 16)

        def function(x, layer=layer):
            with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
                return layer(x)

        for t in range(3):
            x = bf16(16, 32, scale=2.0**t, seed=t).requires_grad_()
            y = function(x) if reentrant is None else te.checkpoint(function, x, use_reentrant=reentrant)
            y.float().square().mean().backward()
        if reentrant is None:
            want = [layer.weight.grad, layer.fp8_meta["scaling_fwd"].amax_history]
        assert torch.equal(layer.weight.grad, want[0])
        assert torch.equal(layer.fp8_meta["scaling_fwd"].amax_history, want[1])


def test_fused_wgrad_accumulation():
    layer = te.Linear(64, 32, fuse_wgrad_accumulation=True)
    with pytest.raises(ValueError, match="main_grad"):
        step(layer, bf16(16, 64), R.Float8CurrentScaling())
    layer.weight.main_grad = torch.full((32, 64), 7.0)
    plain = te.Linear(64, 32)
    plain.weight = torch.nn.Parameter(layer.weight.detach().clone())
    for m in range(2):
        step(layer, bf16(16, 64, seed=m), R.Float8CurrentScaling(), first=m == 0)  # the first overwrites
        step(plain, bf16(16, 64, seed=m), R.Float8CurrentScaling(), first=m == 0)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad, plain.weight.grad, rtol=1e-2, atol=1e-4)
    # no rounding to bf16 in between
    assert not torch.equal(layer.weight.main_grad, layer.weight.main_grad.bfloat16().float())


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: te.Linear(16, 16, bias=True), "bias"),
        (lambda: te.LayerNormLinear(16, 16, normalization="LayerNorm"), "normalization"),
        (lambda: te.LayerNormMLP(16, 16, activation="swiglu"), "activation"),
        (lambda: te.DotProductAttention(2, 16, qkv_format="sbhd"), "qkv_format"),
        (lambda: te.DotProductAttention(2, 16, attn_mask_type="padding"), "attn_mask_type"),
        (lambda: te.DotProductAttention(2, 16, window_size=(128, 128)), "window_size"),
        (lambda: te.autocast(calibrating=True), "calibrating"),
        (lambda: te.autocast(recipe="delayed"), "not a recipe"),
        (lambda: R.DelayedScaling(fp8_format=R.Format.E5M2), "E5M2"),
        (lambda: R.DelayedScaling(amax_compute_algo=max), "amax_compute_algo"),
        (lambda: R.DelayedScaling(fp8_dpa=True), "attention"),
        (lambda: R.Float8CurrentScaling(use_power_2_scales=True), "use_power_2_scales"),
        (lambda: R.Float8BlockScaling(x_block_scaling_dim=2), "128"),
        (lambda: R.MXFP8BlockScaling(enable_2d_quantization=True), "enable_2d_quantization"),
        (lambda: R.NVFP4BlockScaling(nvfp4_4over6="all"), "4over6"),
        (lambda: R.NVFP4BlockScaling(backward_override="high_precision"), "backward_override"),
        (lambda: te.RMSNorm(), "normalized_shape"),
    ],
)
def test_unsupported_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError):
        te.Linear(16, 16, parallel_mode="column")


@pytest.mark.parametrize(
    "name, shape", [("delayed", (12, 32)), ("block", (64, 128)), ("mxfp8", (16, 32)), ("nvfp4", (8, 16))]
)
def test_shapes_that_the_format_cannot_take(name, shape):
    with pytest.raises(ValueError, match="divisible"):
        step(te.Linear(shape[1], 128), bf16(*shape), RECIPES[name]())


def test_wrong_dtypes_and_widths():
    with pytest.raises(TypeError, match="outside of autocasted"):
        te.Linear(16, 16)(bf16(16, 16))
    with te.autocast(recipe=R.NVFP4BlockScaling()), pytest.raises(ValueError, match="bfloat16"):
        te.Linear(16, 16)(torch.randn(16, 16))
    with pytest.raises(ValueError, match="features"):
        te.Linear(16, 16)(torch.randn(16, 32))
    with pytest.raises(NotImplementedError):
        te.quantized_model_init(enabled=True)


def test_an_error_inside_autocast_restores_the_state():
    with pytest.raises(RuntimeError, match="boom"):
        with te.autocast(recipe=R.DelayedScaling()):
            raise RuntimeError("boom")
    assert not te._state.enabled and te._state.depth == 0
    context = te.autocast()
    with context, pytest.raises(RuntimeError, match="more than once"):
        context.__enter__()


def test_availability_and_recipes():
    for ask in (te.is_fp8_available, te.is_mxfp8_available, te.is_fp8_block_scaling_available, te.is_nvfp4_available):
        assert ask() is True and ask(return_reason=True) == (True, "")
    d = R.DelayedScaling()
    assert (d.margin, d.fp8_format, d.amax_history_len) == (0, R.Format.HYBRID, 1024)
    assert (d.amax_compute_algo, d.reduce_amax) == ("max", True)
    assert R.Float8BlockScaling().fp8_format == R.MXFP8BlockScaling().fp8_format == R.Format.E4M3
    assert R.Format.HYBRID.value.max_fwd == 448 and R.Format.HYBRID.value.max_bwd == 57344
    assert d.delayed() and not d.nvfp4() and R.NVFP4BlockScaling().nvfp4()


# ------------------------------------------------------------------------- compilation and ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["current", "nvfp4", "delayed"])
def test_torch_compile(name):
    """dynamo traces the layers (as one graph, except delayed scaling) and the results are the same."""
    torch.manual_seed(2)
    layer, rcp = te.LayerNormLinear(128, 128), RECIPES[name]()
    x, results = bf16(128, 128), []
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: layer(t) * 2, backend="aot_eager", fullgraph=name != "delayed")
    for function in (lambda t: layer(t) * 2, compiled):
        te.manual_seed(0)
        layer.fp8_meta = {}
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
            y = function(x)
        y.float().square().mean().backward()
        results.append([y] + [p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


WORKER = textwrap.dedent(
    """
    import os, sys, torch, torch.distributed as dist
    sys.path.insert(0, {root!r})
    from nanofp8 import te_emulation as te

    torch.set_num_threads(1)
    rank = int(os.fork() == 0)  # rank 1 imports nothing
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(rank)) * (1 + 3 * rank)

    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(te.LayerNormLinear(64, 64), te.Linear(64, 64), te.LayerNormMLP(64, 128))

    def train(model, steps=3, **kwargs):
        recipe = te.recipe.DelayedScaling(amax_history_len=4, **kwargs)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = None
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with te.autocast(recipe=recipe, amax_reduction_group=mesh.get_group()):
                    y = model(x)
            y.float().square().mean().backward()

    def states(model):
        return [(s.scale, s.amax_history) for m in model.modules() if hasattr(m, "fp8_meta")
                for s in (m.fp8_meta["scaling_fwd"], m.fp8_meta["scaling_bwd"])]

    def gathered(t):
        out = [torch.empty_like(t) for _ in range(2)]
        dist.all_gather(out, t.contiguous())
        return out

    def equal_on_all_ranks(model):
        pairs = [gathered(t) for state in states(model) for t in state]
        return all(torch.equal(a, b) for a, b in pairs)

    ddp = torch.nn.parallel.DistributedDataParallel(build())
    train(ddp)
    assert equal_on_all_ranks(ddp)
    # amax is the largest of all ranks: here rank 1's, whose inputs and so gradients are larger
    torch.testing.assert_close(states(ddp)[0][0][0], torch.tensor(448.0) / states(ddp)[0][1][:, 0].max())
    grads = [p.grad.clone() for p in ddp.parameters()]

    local = torch.nn.parallel.DistributedDataParallel(build())
    train(local, reduce_amax=False)
    assert not equal_on_all_ranks(local)

    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    sharded = build()
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded)
    assert equal_on_all_ranks(sharded)
    for a, b in zip(states(ddp), states(sharded)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for p, g in zip(sharded.parameters(), grads):
        torch.testing.assert_close(p.grad.full_tensor(), g, rtol=1e-5, atol=1e-7)

    low = build()
    fully_shard(low, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    train(low)
    assert equal_on_all_ranks(low) and all(p.grad.dtype == torch.float32 for p in low.parameters())
    dist.barrier()
    dist.destroy_process_group()
    print("fine", flush=True)
    if rank == 0:
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    """
)


def test_amaxes_are_reduced_in_the_order_in_which_modules_ran():
    """Ranks share amaxes by place. A new module may have the id of a deleted one, on one rank and not on another: its
    place is the last all the same."""
    class State:
        pass

    everything, (first, second, third) = te._Global(), (State() for _ in range(3))
    for state in (first, second):
        everything.register(state, True, te.recipe.DelayedScaling(), None)
    (_, _, members), = everything.registry.values()
    members[id(first)] = weakref.ref(State())  # deleted at once
    for state in (first, second, third, first):
        everything.register(state, True, te.recipe.DelayedScaling(), None)
    assert [member() for member in members.values()] == [second, first, third]


def test_modules_of_a_model_before_do_not_count():
    layers = [te.Linear(16, 16) for _ in range(2)]
    for layer in layers:
        te.forget_modules()
        with te.autocast(recipe=te.recipe.DelayedScaling()):
            layer(bf16(16, 16).float())
        for _, _, members in te._state.registry.values():
            (member,) = members.values()
            assert member() in (layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"])


@pytest.mark.slow
def test_two_ranks_share_amaxes_under_ddp_and_fsdp2(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "store")], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("fine") == 2, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", ["delayed", "nvfp4"])
def test_compiled_kernels(name):
    """compile_kernels() compiles quantizers, norm and their gradients, also inside checkpoints."""
    torch.manual_seed(2)
    layer, rcp = te.LayerNormLinear(64, 64), RECIPES[name]()
    with torch.no_grad():
        layer.layer_norm_weight.fill_(2.0)
    x, results = bf16(64, 64), []
    torch._dynamo.reset()
    for compiling in (False, True):
        te.compile_kernels(compiling)
        try:
            te.manual_seed(0)
            layer.fp8_meta = {"num_gemms": 1}
            layer.zero_grad()
            torch._dynamo.utils.counters.clear()
            with torch.autocast("cpu", dtype=torch.bfloat16), te.autocast(recipe=rcp):
                y = te.checkpoint(layer, x, use_reentrant=False) if compiling else layer(x)
            y.float().square().mean().backward()
        finally:
            te.compile_kernels(False)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5) == compiling
        results.append([y] + [p.grad for p in layer.parameters()])
    # Compiled and eager norms sum in different orders, so a value may be rounded to its neighbour.
    for a, b in zip(*results, strict=True):
        assert relative(b, a) < 2e-3


def test_random_numbers_are_uniform_and_independent():
    """The hashed numbers of stochastic rounding are uniform; neighbours, rows and calls are not correlated."""
    te.manual_seed(3)
    a, b = te._uniform(torch.empty(512, 512)), te._uniform(torch.empty(512, 512))
    n = a.numel()
    assert a.dtype == torch.float32 and a.min() >= 0 and a.max() < 1
    bits = (a * 2**24).int()
    for k in range(24):
        assert abs(((bits >> k) & 1).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert abs(a.double().mean() - 0.5) < 5 * math.sqrt(1 / 12 / n) and abs(a.double().var() - 1 / 12) < 1e-3
    x = a.double() - 0.5
    for other in (x.roll(1, 1), x.roll(1, 0), x.roll(16, 1), x.T, b.double() - 0.5):
        assert abs((x * other).mean()) < 5 / 12 / math.sqrt(n)


@pytest.mark.parametrize("quantize, inverse, of_inf", [
    (lambda x: te.quantize_block_1d(x), lambda s: s, 1.0), (lambda x: te.quantize_block_2d(x), lambda s: s, 1.0),
    (lambda x: te.quantize_mxfp8(x), te.e8m0_to_float, 2.0**127)], ids=["1x128", "128x128", "mxfp8"])
def test_blocks_of_zeros_nan_and_inf(quantize, inverse, of_inf):
    """Zeros stay zero. NaN stays NaN and leaves its block's scale as it is. inf saturates and changes the scale."""
    x = torch.full((128, 256), 3.0).bfloat16()
    x[:, :128] = 0
    q, scale = quantize(x)
    assert (q.float()[:, :128] == 0).all() and torch.isfinite(inverse(scale)).all()
    clean = inverse(scale)[0, -1].item()
    x[0, 200] = math.nan
    q, scale = quantize(x)
    assert q.float().isnan().nonzero().tolist() == [[0, 200]]
    assert inverse(scale)[0, -1 if len(scale[0]) == 2 else 200 // 32] == clean
    x[0, 200] = -math.inf
    q, scale = quantize(x)
    assert q.float()[0, 200] == -448 and inverse(scale)[0, -1 if len(scale[0]) == 2 else 200 // 32] == of_inf
    assert not q.float().isnan().any()
