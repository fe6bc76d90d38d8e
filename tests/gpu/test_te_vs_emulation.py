"""te_emulation.py against Transformer Engine, on the same tensors on one GPU: quantizers, delayed scaling, layers.

Quantizers are compared bit for bit. Layers cannot be: the order of fp32 sums differs, and on Hopper the
accumulator of FP8 matmuls without split accumulation (the forward ones, except under block scaling) keeps about 14
bits. Their tolerances are therefore given as a fraction of the effect that quantization itself has, which each test
measures: ||TE in FP8 - TE in bf16|| / ||TE in bf16||, 4% to 9%. Quantization with the right errors in the wrong
places would be off by 1.4 of it.
"""

import math
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanofp8 import te_emulation as emulation  # noqa: E402
from nanofp8.precision import fp8_state  # noqa: E402

DEVICE = torch.device("cuda")
RECIPES = ("delayed", "current", "block")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8 = pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=["e4m3", "e5m2"])
SOURCE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])

WIDTH, HIDDEN, BATCH, LENGTH = 256, 512, 8, 256  # 2,048 tokens
LAYERS = {
    "Linear": lambda lib: lib.Linear(WIDTH, HIDDEN, bias=False, params_dtype=torch.float32, device=DEVICE),
    "LayerNormLinear": lambda lib: lib.LayerNormLinear(
        WIDTH, HIDDEN, eps=1e-6, bias=False, normalization="RMSNorm", params_dtype=torch.float32, device=DEVICE),
    "LayerNormMLP": lambda lib: lib.LayerNormMLP(
        WIDTH, 4 * WIDTH, eps=1e-6, bias=False, normalization="RMSNorm", activation="srelu", params_dtype=torch.float32,
        device=DEVICE),
}


@pytest.fixture(autouse=True)
def fresh(te):
    """No state of another test: both libraries update all delayed-scaling modules they know of together."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    FP8GlobalStateManager.reset()
    emulation._state.__init__()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


def recipe_of(lib, name, history=8):
    """The recipe as train.py builds it, from TE or from the emulation; None for bf16."""
    if name == "bf16":
        return None
    if lib is emulation:
        recipes = emulation.recipe
    else:
        from transformer_engine.common import recipe as recipes
    if name == "delayed":
        return recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID, margin=0, amax_history_len=history,
                                      amax_compute_algo="max")
    return {"current": recipes.Float8CurrentScaling, "block": recipes.Float8BlockScaling}[name]()


def make_pair(te, make):
    """The same layer of both libraries with the same weights and gains."""
    torch.manual_seed(1)
    ours, theirs = make(emulation), make(te)
    with torch.no_grad():
        for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (name, p.shape) == (other, q.shape)
            p.normal_(std=p.shape[-1] ** -0.5) if p.dim() == 2 else p.uniform_(0.5, 1.5)
            q.copy_(p)
    return theirs, ours


def make_batch(layer, scale=1.0, seed=2):
    """Input and gradient of the output, (8, 256, C) bf16; gradients of a size that E5M2 must scale up."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    out = HIDDEN if layer != "LayerNormMLP" else WIDTH
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=g, device=DEVICE) * scale
    dy = torch.randn(BATCH, LENGTH, out, generator=g, device=DEVICE) * 1e-6 * scale
    return x.bfloat16(), dy.bfloat16()


def run_pass(lib, module, rcp, x, dy, first=None, recompute=False):
    """Forward and backward pass; {name: fp32 tensor} of the output and all gradients."""
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), lib.autocast(enabled=rcp is not None, recipe=rcp):
        y = lib.checkpoint(module, x, first, use_reentrant=False) if recompute else module(x, is_first_microbatch=first)
    y.backward(dy)
    return {"output": y.detach().float(), "input": x.grad.float(),
            **{n: p.grad.float().clone() for n, p in module.named_parameters()}}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()  # 0 where both are zero


def copy_state(source, target):
    """Delayed scaling's state of one module into the other, through train.py's accessor."""
    held = fp8_state(target)
    for name, tensor in fp8_state(source).items():
        held[name].copy_(tensor)


# --------------------------------------------------------------------------- quantizers, bit for bit


def values(case, fp8, dtype):
    """A tensor (256, 384) to quantize, in bf16 or fp32. 384 is 3 blocks of 128: TE pads their scales to 4."""
    g = torch.Generator(device=DEVICE).manual_seed(3)
    shape = (256, 384)
    x = torch.randn(shape, generator=g, device=DEVICE)
    if case == "binades":  # from far below the smallest FP8 value to saturation
        x = x * torch.exp2(torch.randint(-24, 12, shape, generator=g, device=DEVICE).float())
    elif case == "gradients":
        x = x * 1e-7
    elif case == "outliers":
        x[torch.rand(shape, generator=g, device=DEVICE) < 1e-4] *= 3e4
    elif case == "zeros":  # blocks, rows and columns of zeros, of both signs
        x[:128, :128] = 0
        x[200], x[:, 300], x[201] = 0, 0, -0.0
    elif case == "all zeros":
        x = x * 0
    elif case == "ties":  # midpoints between neighbours, with the largest value in each block so that the scale is 1
        finite = torch.arange(0x7C if fp8 == E5M2 else 0x7F, dtype=torch.uint8, device=DEVICE).view(fp8).float()
        grid = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
        x = grid[torch.randint(len(grid), shape, generator=g, device=DEVICE)] * x.sign()
        x[::128], x[:, ::128] = finite.max(), finite.max()
    elif case == "tiny":  # the quotient fp8_max / amax is above the largest fp32
        x = x * 1e-37
    elif case == "subnormal":
        x = x * 1e-39
    elif case == "huge":
        x = (x * 1e38).clamp(-3e38, 3e38)
    elif case == "every bf16":
        bits = torch.arange(-32768, 32768, dtype=torch.int32, device=DEVICE).to(torch.int16)
        x = bits.view(torch.bfloat16).float().reshape(256, 256)
        x = torch.where(x.isfinite(), x, 1.0)[:, torch.randperm(256, generator=g, device=DEVICE)]
    elif case == "inf":
        x[5, 7], x[130, 200] = math.inf, -math.inf
    elif case == "nan":
        x[5, 7] = math.nan
    return x.to(dtype)


CASES = ("normal", "binades", "gradients", "outliers", "zeros", "all zeros", "ties", "tiny", "subnormal", "huge",
         "every bf16",
         "inf", "nan")


def count_mismatches(theirs, ours):
    """Elements that differ in any bit, NaNs (of either sign) apart. theirs: uint8 for FP8 data, or fp32."""
    both_nan = ours.float().isnan() & (theirs.view(ours.dtype).float().isnan() if theirs.dtype == torch.uint8
                                       else theirs.isnan())
    if theirs.dtype == torch.uint8:
        differ = theirs != ours.contiguous().view(torch.uint8)
    else:
        differ = theirs.contiguous().view(torch.int32) != ours.contiguous().view(torch.int32)
    return int((differ & ~both_nan).sum())


def te_dtype(te, fp8):
    return te.DType.kFloat8E4M3 if fp8 == E4M3 else te.DType.kFloat8E5M2


def check(**pairs):
    """All pairs (TE's tensor, the emulation's) agree in every bit."""
    counts = {name: f"{n} of {ours.numel()}" for name,
              (theirs, ours) in pairs.items() if (n := count_mismatches(theirs, ours))}
    assert not counts, f"mismatches: {counts}"


@FP8
@SOURCE
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_delayed_quantizer_bit_for_bit(te, case, dtype, fp8):
    """Float8Quantizer: values, transposed values, scale_inv and the recorded amax, under several scales."""
    x = values(case, fp8, dtype)
    for number in (1.0, 37.3, 3e-3, 2.0 ** 14):
        scale = torch.tensor([number], device=DEVICE)
        amax = torch.zeros(1, device=DEVICE)
        q = te.Float8Quantizer(scale, amax, te_dtype(te, fp8), rowwise=True, columnwise=True)(x)
        ours = emulation.quantize_fp8(x, scale, fp8)
        check(values=(q._data, ours), transposed=(q._transpose, ours.t()),
              scale_inv=(q._scale_inv.flatten(), 1.0 / scale),
              amax=(amax, emulation.compute_amax(x).reshape(1)))


@FP8
@SOURCE
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_current_quantizer_bit_for_bit(te, case, dtype, fp8):
    """Float8CurrentScalingQuantizer: values, transposed values and the scale's inverse."""
    x = values(case, fp8, dtype)
    q = te.Float8CurrentScalingQuantizer(te_dtype(te, fp8), device=DEVICE, rowwise=True, columnwise=True)(x)
    scale = emulation.compute_scale(emulation.compute_amax(x), emulation.FP8_MAX[fp8])
    ours = emulation.quantize_fp8(x, scale, fp8)
    check(values=(q._data, ours), transposed=(q._transpose, ours.t()),
          scale_inv=(q._scale_inv.flatten(), (1.0 / scale).reshape(1)))


@FP8
@SOURCE
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", [1, 2], ids=["1x128", "128x128"])
@torch.no_grad()
def test_block_quantizer_bit_for_bit(te, dims, case, dtype, fp8):
    """Float8BlockQuantizer: values and scales along rows and along columns, without the scales' padding."""
    x = values(case, fp8, dtype)
    m, n = x.shape
    q = te.Float8BlockQuantizer(te_dtype(te, fp8), rowwise=True, columnwise=True, block_scaling_dim=dims)(x)
    if dims == 1:
        row, row_scale = emulation.quantize_block_1d(x, fp8, -1)  # scales (M, N/128); TE's are transposed
        col, col_scale = emulation.quantize_block_1d(x, fp8, 0)   # scales (M/128, N)
        their_row_scale, their_col_scale = q._rowwise_scale_inv[:, :m].t(), q._columnwise_scale_inv[:, :n]
    else:
        row, row_scale = col, col_scale = emulation.quantize_block_2d(x, fp8)  # scales (M/128, N/128)
        their_row_scale, their_col_scale = q._rowwise_scale_inv[:, :n // 128], q._columnwise_scale_inv[:, :m // 128].t()
    assert their_row_scale.shape == row_scale.shape and their_col_scale.shape == col_scale.shape
    check(rows=(q._rowwise_data, row), row_scales=(their_row_scale, row_scale),
          columns=(q._columnwise_data, col.t()), column_scales=(their_col_scale, col_scale))


@FP8
@SOURCE
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_mxfp8_quantizer_bit_for_bit(te, case, dtype, fp8):
    """MXFP8Quantizer: values and E8M0 scales of blocks of 32 along rows and along columns, without the scales' padding.
    Written by TE's source: no GPU that has MXFP8 was at hand."""
    available, why = te.is_mxfp8_available(return_reason=True)
    if not available:
        pytest.skip(why)
    x = values(case, fp8, dtype)
    m, n = x.shape
    q = te.MXFP8Quantizer(te_dtype(te, fp8), rowwise=True, columnwise=True)(x)
    row, row_scale = emulation.quantize_mxfp8(x, fp8, -1)  # scales (M, N/32)
    col, col_scale = emulation.quantize_mxfp8(x, fp8, 0)   # scales (M/32, N); TE does not transpose the values either
    check(rows=(q._rowwise_data, row), row_scales=(q._rowwise_scale_inv[:m, :n // 32], row_scale),
          columns=(q._columnwise_data, col), column_scales=(q._columnwise_scale_inv[:m // 32, :n], col_scale))


KERNELS = {
    "delayed": lambda x, fp8: emulation._quantize_delayed(x, torch.full((), 37.3, device=DEVICE), fp8),
    "current": emulation._quantize_current,
    "block rows": emulation._quantize_rows,
    "block columns": emulation._quantize_columns,
    "block squares": emulation._quantize_squares,
    "mxfp8 rows": lambda x, fp8: emulation._quantize_mx(x, fp8, -1),
    "mxfp8 columns": lambda x, fp8: emulation._quantize_mx(x, fp8, 0),
    "nvfp4 rows": lambda x, fp8: emulation._quantize_fp4(x, -1, False, False),
    "nvfp4 columns, stochastic": lambda x, fp8: emulation._quantize_fp4(x, 0, False, True),
    "nvfp4 squares": lambda x, fp8: emulation._quantize_fp4(x, -1, True, False),
}


@SOURCE
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_compiled_quantizers_give_the_same_bits(kernel, dtype):
    """What torch.compile makes of the emulation's quantizers, against eager torch, random numbers included."""
    for case in CASES:
        x, results = values(case, E4M3, dtype), []
        for compiling in (False, True):
            emulation.compile_kernels(compiling)
            emulation.manual_seed(1)
            out = KERNELS[kernel](x, E4M3)
            results.append([t.float() for t in (out if isinstance(out, tuple) else (out,))])
        emulation.compile_kernels(False)
        counts = [count_mismatches(a, b) for a, b in zip(*results, strict=True)]
        assert not any(counts), (case, counts)


# ----------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_in_bf16(te, layer):
    """Only the order of fp32 sums differs, and now and then the last bit (2^-8) of a bf16 value: 5e-3 in norm."""
    theirs, ours = make_pair(te, LAYERS[layer])
    x, dy = make_batch(layer)
    a, b = run_pass(te, theirs, None, x, dy), run_pass(emulation, ours, None, x, dy)
    gaps = {n: relative(b[n], a[n]) for n in a}
    assert max(gaps.values()) < 5e-3, gaps


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_in_fp8(te, layer, name):
    """Within a fraction of the effect of quantization (see the top of this file).

    Linear and LayerNormLinear quantize the same values on both sides, so only the sums differ: 0.25 of the effect,
    where an accumulator off by 5e-3 makes 0.15. In LayerNormMLP the second matmul quantizes what the first one
    summed up, and values near a rounding boundary go to the other side: errors of 5e-3 there become 0.35 to 0.47 of
    the effect; 0.6 is allowed.
    """
    theirs, ours = make_pair(te, LAYERS[layer])
    x, dy = make_batch(layer)
    exact = run_pass(te, theirs, None, x, dy)
    their_recipe, our_recipe = recipe_of(te, name), recipe_of(emulation, name)
    if name == "delayed":
        for _ in range(2):
            run_pass(te, theirs, their_recipe, x, dy)
            run_pass(emulation, ours, our_recipe, x, dy)
        copy_state(theirs, ours)
    a, b = run_pass(te, theirs, their_recipe, x, dy), run_pass(emulation, ours, our_recipe, x, dy)
    effect = {n: relative(a[n], exact[n]) for n in a}
    gaps = {n: relative(b[n], a[n]) for n in a}
    print(f"{layer} {name}: " + ", ".join(f"{n} {gaps[n]:.4f} (effect {effect[n]:.4f})" for n in a))
    assert all(0.01 < e < 0.2 for e in effect.values()), f"FP8 was not on, or off the scale: {effect}"
    limit = 0.6 if layer == "LayerNormMLP" else 0.25
    assert all(gaps[n] < limit * effect[n] for n in a), (gaps, effect)


def test_norm_and_attention(te):
    """RMSNorm and causal attention, never quantized, in bf16: 1e-2 in norm (attention rounds its weights to bf16)."""
    torch.manual_seed(4)
    x = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE).bfloat16()
    results = []
    for lib in (te, emulation):
        norm = lib.RMSNorm(WIDTH, eps=1e-6, dtype=torch.float32, device=DEVICE)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, WIDTH))
        attention = lib.DotProductAttention(2, WIDTH // 2, attention_dropout=0.0, qkv_format="bshd",
                                            attn_mask_type="causal")
        inp = x.clone().requires_grad_()
        q, k, v = (f(inp).view(BATCH, LENGTH, 2, WIDTH // 2)
                   for f in (lambda t: t * 1.5, lambda t: t.roll(1, -1), lambda t: t.roll(2, -1)))
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y, z = norm(inp), attention(q, k, v)
        (y.float().square().sum() + (z.float() * x.flip(0).float()).sum()).backward()
        results.append([y.float(), z.float(), inp.grad.float(), norm.weight.grad.float()])
    gaps = [relative(ours, theirs) for theirs, ours in zip(*results, strict=True)]
    assert max(gaps) < 1e-2, gaps


# ------------------------------------------------------------------------------- delayed scaling's state

# Relative tolerance of an amax. Columns are those of fp8_meta: input, weight, output of each GEMM forward, gradients of
# output and input backward. What is quantized as it was given has none; a norm's output is fp32, summed in another
# order (1e-5); the activation and its gradient depend on the first matmul's bf16 output, whose last bits differ and
# are doubled by the square (5e-2).
AMAX_TOLERANCE = {
    ("Linear", "scaling_fwd"): (0, 0, 0), ("Linear", "scaling_bwd"): (0, 0),
    ("LayerNormLinear", "scaling_fwd"): (1e-5, 0, 0), ("LayerNormLinear", "scaling_bwd"): (0, 0),
    ("LayerNormMLP", "scaling_fwd"): (1e-5, 0, 0, 5e-2, 0, 0), ("LayerNormMLP", "scaling_bwd"): (5e-2, 0, 0, 0),
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_delayed_state_follows_te(te, layer, micro_batches):
    """Scales and amax histories after every pass: same rows filled, same numbers within AMAX_TOLERANCE.

    Amaxes rise and fall, the history of 4 rows is outgrown, and with 3 micro-batches a step the quantized weights
    are kept (is_first_microbatch False), which must not count as a new amax of the weight.
    """
    theirs, ours = make_pair(te, LAYERS[layer])
    their_recipe, our_recipe = recipe_of(te, "delayed", history=4), recipe_of(emulation, "delayed", history=4)
    passes = 0
    for step, factor in enumerate((1.0, 3.0, 0.5, 0.2, 0.2, 0.1, 2.0)):
        for m in range(micro_batches):
            x, dy = make_batch(layer, scale=factor * (1 + 0.1 * m), seed=10 + passes)
            first = m == 0 if micro_batches > 1 else None
            run_pass(te, theirs, their_recipe, x, dy, first)
            run_pass(emulation, ours, our_recipe, x, dy, first)
            passes += 1
            a, b = fp8_state(theirs), fp8_state(ours)
            assert a.keys() == b.keys() and len(a) == 4
            for name in a:
                assert a[name].shape == b[name].shape, name
                tolerance = torch.tensor(AMAX_TOLERANCE[layer, name.split(".")[-2]], device=DEVICE)
                if name.endswith("scale"):
                    tolerance = tolerance.clamp(min=1e-6)  # a division
                where = f"{name} after pass {passes} (step {step}): TE {a[name].tolist()}, emulation {b[name].tolist()}"
                assert torch.equal(a[name] == 0, b[name] == 0), where
                assert ((a[name] - b[name]).abs() <= tolerance * a[name].abs()).all(), where
        with torch.no_grad():  # an optimizer step
            for module in (theirs, ours):
                for p in module.parameters():
                    p.mul_(1.25 if step % 2 == 0 else 0.5)


# ------------------------------------------------------------------------------- recomputation


class Stack(torch.nn.Module):
    """Residual layers as in a block of the GPT."""

    def __init__(self, lib):
        super().__init__()
        common = dict(bias=False, params_dtype=torch.float32, device=DEVICE)
        self.a = lib.LayerNormLinear(WIDTH, HIDDEN, eps=1e-6, normalization="RMSNorm", **common)
        self.b = lib.Linear(HIDDEN, WIDTH, **common)
        self.c = lib.LayerNormMLP(WIDTH, 4 * WIDTH, eps=1e-6, normalization="RMSNorm", activation="srelu", **common)

    def forward(self, x, is_first_microbatch=None):
        x = x + self.b(self.a(x, is_first_microbatch=is_first_microbatch), is_first_microbatch=is_first_microbatch)
        return x + self.c(x, is_first_microbatch=is_first_microbatch)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("which", ["te", "emulation"])
def test_checkpoint_changes_nothing(te, which, name):
    """te.checkpoint against plain passes, three steps of two micro-batches with the quantized weights kept.

    The emulation repeats the same operations: equal in every bit. TE may choose other kernels: 1e-3 in norm.
    """
    lib = te if which == "te" else emulation
    results, states = [], []
    for recompute in (False, True):
        torch.manual_seed(5)
        stack, rcp, passes = Stack(lib), recipe_of(lib, name), []
        for step in range(3):
            for m in range(2):
                x, dy = make_batch("LayerNormMLP", seed=20 + 2 * step + m)
                passes.append(run_pass(lib, stack, rcp, x, dy, m == 0, recompute))
        results.append(passes)
        states.append({n: t.clone() for n, t in fp8_state(stack).items()})
    for plain, again in zip(*results, strict=True):
        for n in plain:
            if lib is emulation:
                assert torch.equal(plain[n], again[n]), n
            else:
                assert relative(again[n], plain[n]) < 1e-3, n
    assert states[0].keys() == states[1].keys() and bool(states[0]) == (name == "delayed")
    for n, tensor in states[0].items():
        torch.testing.assert_close(states[1][n], tensor, rtol=0 if lib is emulation else 1e-2, atol=0)
