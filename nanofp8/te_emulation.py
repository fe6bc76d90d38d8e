"""A pure-PyTorch stand-in for the part of NVIDIA Transformer Engine (TE) that train.py uses.

train.py imports this module as `te` where there is no GPU, where TE is not installed, or where the
chosen number format has no hardware. It has the same names, constructor arguments, parameter names
and shapes as TE 2.20, and reproduces TE's numerics, so a run here predicts the loss curve (not the
speed) of a run there.

How the emulation works
-----------------------
A low-precision matrix multiplication does three things: it rounds both operands to values that the
format can hold, multiplies those values exactly and sums the products in fp32, and scales the sum.
All three are possible with ordinary tensors, because every value of a small format is also a bf16
value, and the product of two bf16 values is exact in fp32:

    format             values       one scale per                        multiplied as
    -----------------  -----------  -----------------------------------  --------------------------------
    delayed, current   E4M3 / E5M2  tensor (fp32)                        values; sum times scale_inv a * b
    Float8Block        E4M3         1x128 (weights 128x128), power of 2  value * scale_inv, exact in bf16
    MXFP8              E4M3         1x32, power of 2 (E8M0)              value * scale_inv, exact in bf16
    NVFP4              E2M1         1x16 (weights 16x16), E4M3,          value * block scale, exact in bf16;
                                    under one fp32 scale per tensor      sum times amax a * b / 2688^2

Not reproduced: the order in which fp32 sums are formed (on Hopper, the reduced precision
of the FP8 accumulator in fprop as well), and which random numbers stochastic rounding draws. Power of
two scales below 2^-124 reach the subnormal range of bf16 and may lose bits there; no real tensor does.

Each Linear layer runs three GEMMs. "rowwise" data is quantized in blocks along the last dimension,
"columnwise" data along the first; the summed-over dimension of the GEMM decides which one is needed:

    fprop   y  = x  (rowwise)    @ w (rowwise)^T       sums over in_features
    dgrad   dx = dy (rowwise)    @ w (columnwise)      sums over out_features
    wgrad   dw = dy (columnwise)^T @ x (columnwise)    sums over tokens

For per-tensor scales and for square weight blocks the two are the same data.

Each step between two matmuls (norm, activation, their gradients, quantizing, scaling a sum) is one
function of tensors, marked @_kernel. Eager torch runs it as 10 to 60 passes over memory; after
compile_kernels() each is a few kernels made by torch.compile, with the same results to the bit, but
for norms and gelu. The layers may also be traced whole by a torch.compile around them (under delayed
scaling they stay eager): then torch._inductor.config.emulate_precision_casts = True keeps the
roundings to bf16 that inductor leaves out between fused operations.
"""

import contextlib
import dataclasses
import functools
import math
import types
import weakref
from enum import Enum
from typing import Callable, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

FP32_MAX = torch.finfo(torch.float32).max
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
E2M1_MAX = 6.0
NVFP4_BLOCK, MXFP8_BLOCK, FP8_BLOCK = 16, 32, 128
# TE decodes an NVFP4 product with amax_a * amax_b / (6 * 448)^2.
NVFP4_GEMM_FACTOR = 1.0 / (E2M1_MAX * E2M1_MAX * 448.0 * 448.0)


# ----------------------------------------------------------------------------------------------
# Recipes: the fields and defaults of transformer_engine.common.recipe
# ----------------------------------------------------------------------------------------------


class _FormatMax(NamedTuple):
    """Largest values of a format in the forward and in the backward pass."""

    max_fwd: float
    max_bwd: float


class Format(Enum):
    """Number formats and their largest values in the forward and in the backward pass."""

    E2M1 = _FormatMax(6, 6)
    E4M3 = _FormatMax(448, 448)
    E5M2 = _FormatMax(57344, 57344)
    HYBRID = _FormatMax(448, 57344)


def _require(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition` holds. Arguments that are not emulated are refused, never ignored."""
    if not condition:
        raise ValueError(message)


class Recipe:
    """Base class of the recipes. Its methods tell the kind of a recipe, by TE's names."""

    def nvfp4(self) -> bool:
        return isinstance(self, NVFP4BlockScaling)

    def mxfp8(self) -> bool:
        return isinstance(self, MXFP8BlockScaling)

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)

    def float8_current_scaling(self) -> bool:
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        return isinstance(self, Float8BlockScaling)

    def custom(self) -> bool:
        return False

    def _check(self, formats: tuple = (Format.E4M3, Format.HYBRID)) -> None:
        """Raise ValueError for values of the shared fields that are not emulated."""
        name = type(self).__name__
        _require(
            self.fp8_format in formats,
            f"{name}: fp8_format={self.fp8_format} is not supported; use {' or '.join(map(str, formats))}",
        )
        _require(
            not (self.fp8_dpa or self.fp8_mha),
            f"{name}: FP8 attention is not emulated; leave out fp8_dpa and fp8_mha",
        )
        _require(self.backward_override is None, f"{name}: backward_override is not emulated; leave it at None")

    def fp8_dtype(self, forward: bool) -> torch.dtype:
        """Return E4M3; E5M2 for the gradients of a HYBRID recipe."""
        hybrid_grad = self.fp8_format == Format.HYBRID and not forward
        return torch.float8_e5m2 if hybrid_grad else torch.float8_e4m3fn


@dataclasses.dataclass
class DelayedScaling(Recipe):
    """One scale per tensor, from the largest amax of the last `amax_history_len` steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Union[str, Callable] = "max"
    scaling_factor_compute_algo: Optional[Callable] = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Optional[str] = None

    def __post_init__(self):
        self._check()
        _require(self.amax_history_len >= 1, "DelayedScaling: amax_history_len must be at least 1")
        _require(
            self.amax_compute_algo in ("max", "most_recent"),
            "DelayedScaling: amax_compute_algo must be 'max' or 'most_recent'",
        )
        _require(
            self.scaling_factor_compute_algo is None,
            "DelayedScaling: scaling_factor_compute_algo is not emulated; leave it at None",
        )


@dataclasses.dataclass
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from the tensor's own amax."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Optional[str] = None

    def __post_init__(self):
        self._check()
        # TE reads this from the environment when its class is defined, and ignores the argument.
        _require(
            not self.use_power_2_scales,
            "Float8CurrentScaling: use_power_2_scales=True is not emulated; leave it out",
        )


@dataclasses.dataclass
class Float8BlockScaling(Recipe):
    """Power-of-two scales per 1x128 activations and gradients and per 128x128 weights."""

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Optional[str] = None

    def __post_init__(self):
        self._check()
        _require(not self.use_f32_scales, "Float8BlockScaling: use_f32_scales=True is not emulated; leave it out")
        dims = (self.x_block_scaling_dim, self.w_block_scaling_dim, self.grad_block_scaling_dim)
        _require(
            dims == (1, 2, 1),
            "Float8BlockScaling: x_, w_ and grad_block_scaling_dim must be 1, 2, 1 (1x128, 128x128, 1x128 blocks), "
            f"got {dims}",
        )


@dataclasses.dataclass
class MXFP8BlockScaling(Recipe):
    """E8M0 (power-of-two) scales per 32 values."""

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Optional[str] = None
    enable_2d_quantization: bool = False

    def __post_init__(self):
        self._check()
        # TE's MXFP8 kernels never read the margin: another value would do nothing.
        _require(self.margin == 0, f"MXFP8BlockScaling: margin has no effect and must be 0, got {self.margin}")
        _require(
            not self.enable_2d_quantization,
            "MXFP8BlockScaling: enable_2d_quantization=True is not emulated; leave it out",
        )


@dataclasses.dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 values, E4M3 scales per 16 values (weights 16x16), one fp32 scale per tensor."""

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    row_scaled_activation: bool = False
    nvfp4_4over6: str = "none"
    nvfp4_4over6_e4m3_use_256: str = "all"
    nvfp4_4over6_err_mode: str = "MAE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Optional[str] = None

    def __post_init__(self):
        self._check(formats=(Format.E4M3,))
        _require(
            self.fp4_format == Format.E2M1,
            f"NVFP4BlockScaling: fp4_format must be Format.E2M1, got {self.fp4_format}",
        )
        _require(
            not self.row_scaled_activation,
            "NVFP4BlockScaling: row_scaled_activation=True is not emulated; leave it out",
        )
        _require(self.nvfp4_4over6 == "none", "NVFP4BlockScaling: nvfp4_4over6 is not emulated; leave it at 'none'")


recipe = types.SimpleNamespace(
    Format=Format,
    Recipe=Recipe,
    DelayedScaling=DelayedScaling,
    Float8CurrentScaling=Float8CurrentScaling,
    Float8BlockScaling=Float8BlockScaling,
    MXFP8BlockScaling=MXFP8BlockScaling,
    NVFP4BlockScaling=NVFP4BlockScaling,
)


def _available(return_reason: bool = False) -> Union[bool, tuple]:
    """Return True, or (True, ""): the emulation runs everywhere."""
    return (True, "") if return_reason else True


is_fp8_available = is_mxfp8_available = is_fp8_block_scaling_available = is_nvfp4_available = _available


# ----------------------------------------------------------------------------------------------
# Compilation
# ----------------------------------------------------------------------------------------------

_compiling = False


def compile_kernels(on: bool = True) -> None:
    """Run functions marked @_kernel through torch.compile from now on (on=False: eagerly).

    They stay eager on GPUs before sm_89, for which Triton has no E4M3.
    """
    global _compiling
    _compiling = on and not (torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9))


def _kernel(function: Callable) -> Callable:
    """Mark a function of tensors and constants for compile_kernels(), which turns it into few passes over memory."""
    compiled = None

    @functools.wraps(function)
    def run(*args):
        nonlocal compiled
        if not _compiling or torch.compiler.is_compiling():
            return function(*args)
        if compiled is None:
            # Each shape is compiled on its own: four kinds of layers with three tensors each, and evaluation.
            limits = torch._dynamo.config
            limits.recompile_limit = max(64, limits.recompile_limit)
            # Round and divide as in eager mode. (The second option has another name since torch 2.11.)
            known = torch._inductor.list_options()
            wanted = ("emulate_precision_casts", "eager_numerics.division_rounding", "emulate_divison_rounding")
            options = {name: True for name in wanted if name in known}
            compiled = torch.compile(function, dynamic=False, fullgraph=True, options=options)
        return compiled(*args)

    return run


# ----------------------------------------------------------------------------------------------
# Random numbers for stochastic rounding
# ----------------------------------------------------------------------------------------------

_seed = 1234
_generators: dict = {}


def manual_seed(seed: int) -> None:
    """Seed stochastic rounding on every device. torch.manual_seed has no effect on it."""
    global _seed
    _seed = seed
    for generator in _generators.values():
        generator.manual_seed(seed)


def get_rng_state() -> dict:
    """Return the state of stochastic rounding: {"seed": int, "generators": {device: uint8 tensor}}."""
    return {"seed": _seed, "generators": {d: g.get_state() for d, g in _generators.items()}}


def set_rng_state(state: dict) -> None:
    """Restore what get_rng_state() returned."""
    global _seed
    _seed = state["seed"]
    for device in list(_generators):
        if device not in state["generators"]:
            del _generators[device]
    for device, generator_state in state["generators"].items():
        _generator(torch.device(device)).set_state(generator_state)


def _generator(device: torch.device) -> torch.Generator:
    """Return the generator of a device; make and seed it first if there is none."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = str(device)
    if key not in _generators:
        _generators[key] = torch.Generator(device=device).manual_seed(_seed)
    return _generators[key]


# torch.compile cannot trace a generator, so a custom operator hides it. The tag tells the compiler that two calls
# give different numbers.
@torch.library.custom_op(
    "te_emulation::draw_key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _draw_key(like: torch.Tensor) -> torch.Tensor:
    """Draw two random int32 (2,) on the device of `like`, from its generator."""
    return torch.randint(-(2**31), 2**31, (2,), generator=_generator(like.device), device=like.device).int()


@_draw_key.register_fake
def _(like):
    return torch.empty(2, dtype=torch.int32, device=like.device)


def _uniform(like: torch.Tensor) -> torch.Tensor:
    """Draw fp32 multiples of 2^-24 in [0, 1), of the shape and on the device of `like`.

    Only a key comes from the generator. The numbers are hashes of key and position (the 32-bit mix
    "lowbias32", github.com/skeeto/hash-prospector), so a compiled quantizer computes them in registers.
    """
    key = _draw_key(like)
    h = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape) ^ key[0]
    # Multiplication wraps; >> keeps the sign, so its bits are masked off.
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = h ^ key[1]
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    h = h ^ ((h >> 16) & 0xFFFF)
    return ((h >> 8) & 0xFFFFFF).float() * 2.0**-24


# ----------------------------------------------------------------------------------------------
# Quantization
# ----------------------------------------------------------------------------------------------


def _abs(x: torch.Tensor) -> torch.Tensor:
    """Return |x| with NaN as 0: TE's amax kernels use fmaxf, which skips NaN and keeps inf."""
    return torch.nan_to_num(x.abs(), nan=0.0, posinf=math.inf)


def _divide(number: float, x: torch.Tensor) -> torch.Tensor:
    """Return number / x, correctly rounded. (torch computes `number / x` as number * (1 / x).)"""
    return torch.full_like(x, number) / x


def compute_amax(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of a tensor, an fp32 scalar; NaN is skipped."""
    return _abs(x).amax().float()


def compute_scale(amax: torch.Tensor, fp8_max: float, force_pow_2: bool = False) -> torch.Tensor:
    """Compute the scale that maps amax to fp8_max, fp32.

    It is 1 where amax is 0, inf or NaN, and the largest fp32 where the quotient overflows. With force_pow_2 it is
    rounded down to a power of two. Source: common/recipe/recipe_common.cuh.
    """
    usable = torch.isfinite(amax) & (amax > 0)
    scale = _divide(fp8_max, torch.where(usable, amax, 1.0)).clamp(max=FP32_MAX)
    if force_pow_2:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(usable, scale, 1.0)


def quantize_fp8(x: torch.Tensor, scale: torch.Tensor, fp8_dtype: torch.dtype) -> torch.Tensor:
    """Return x * scale in fp8: rounded to nearest even, saturating (inf too); NaN stays NaN."""
    fp8_max = FP8_MAX[fp8_dtype]
    return (x.float() * scale).clamp(-fp8_max, fp8_max).to(fp8_dtype)


def _tiles(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """View (M, N) as tiles (M/rows, rows, N/cols, cols)."""
    m, n = x.shape
    return x.reshape(m // rows, rows, n // cols, cols)


def _tile_amax(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return the largest magnitude in each tile of x (M, N): fp32 (M/rows, N/cols)."""
    tiles = _abs(_tiles(x, rows, cols))
    if rows > 1:
        tiles = tiles.amax(1, keepdim=True)
    if cols > 1:
        tiles = tiles.amax(3, keepdim=True)
    return tiles[:, 0, :, 0].float()


def _times_tile(x: torch.Tensor, tile_scale: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return x (M, N) in fp32, each tile times its scale (M/rows, N/cols)."""
    return (_tiles(x.float(), rows, cols) * tile_scale[:, None, :, None]).reshape(x.shape)


def _tile_shape(dim: int, block: int) -> tuple:
    """Return (rows, cols) of 1-D blocks along `dim`."""
    return (1, block) if dim in (-1, 1) else (block, 1)


def quantize_block_1d(
    x: torch.Tensor, fp8_dtype: torch.dtype = torch.float8_e4m3fn, dim: int = -1, block: int = FP8_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to FP8 with one power-of-two scale per `block` values along `dim` (-1 rowwise, 0 columnwise).

    x (M, N), bf16 or fp32. Returns fp8 (M, N) and scale_inv fp32 (M, N/block) or (M/block, N).
    Source: common/transpose/quantize_transpose_vector_blockwise.cu.
    """
    return _quantize_fp8_tiles(x, fp8_dtype, *_tile_shape(dim, block))


def quantize_block_2d(
    x: torch.Tensor, fp8_dtype: torch.dtype = torch.float8_e4m3fn, block: int = FP8_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to FP8 with one power-of-two scale per block x block square.

    x (M, N), bf16 or fp32. Returns fp8 (M, N) and scale_inv fp32 (M/block, N/block).
    Source: common/transpose/quantize_transpose_square_blockwise.cu.
    """
    return _quantize_fp8_tiles(x, fp8_dtype, block, block)


def _quantize_fp8_tiles(x, fp8_dtype, rows, cols):
    """Quantize each rows x cols tile of x (M, N): fp8 (M, N) and scale_inv fp32 (M/rows, N/cols)."""
    fp8_max = FP8_MAX[fp8_dtype]
    scale = compute_scale(_tile_amax(x, rows, cols), fp8_max, force_pow_2=True)
    q = _times_tile(x, scale, rows, cols).clamp(-fp8_max, fp8_max).to(fp8_dtype)
    return q, _divide(1.0, scale)


def float_to_e8m0(x: torch.Tensor) -> torch.Tensor:
    """Return the biased exponent (int32, 0..255) of the smallest power of two >= x >= 0; 255 for NaN, 254 for inf.

    Source: float_to_e8m0 in common/util/ptx_arch_spec.cuh.
    """
    bits = x.float().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    round_up = (mantissa > 0) & (exponent < 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    e8m0 = (exponent + round_up).clamp(max=254)
    return torch.where(torch.isnan(x), 255, e8m0)


def e8m0_to_float(biased: torch.Tensor) -> torch.Tensor:
    """Return 2^(biased - 127) in fp32; NaN for 255."""
    # 2^-127 is subnormal in fp32: its exponent field is 0 and its first mantissa bit is set.
    bits = torch.where(biased == 0, 0x400000, biased.int() << 23)
    return torch.where(biased == 255, math.nan, bits.int().view(torch.float32))


def quantize_mxfp8(
    x: torch.Tensor, fp8_dtype: torch.dtype = torch.float8_e4m3fn, dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to MXFP8 in blocks of 32 along `dim` (-1 rowwise, 0 columnwise).

    x (M, N), bf16 or fp32. Returns fp8 (M, N) and uint8 E8M0 exponents (M, N/32) or (M/32, N). The scale is the amax
    times the rounded reciprocal of the format's maximum, rounded up to a power of two, so that nothing saturates.
    Source: common/cast/mxfp8/quantize_mxfp8.cuh.
    """
    q, e8m0 = _quantize_mxfp8(x, fp8_dtype, dim)
    return q, e8m0.to(torch.uint8)


def _quantize_mxfp8(x, fp8_dtype, dim):
    """Do the work of quantize_mxfp8; the exponents are int32."""
    rows, cols = _tile_shape(dim, MXFP8_BLOCK)
    fp8_max = FP8_MAX[fp8_dtype]
    e8m0 = float_to_e8m0(_tile_amax(x, rows, cols) * (1.0 / fp8_max))
    encode = e8m0_to_float(254 - e8m0)
    q = _times_tile(x, encode, rows, cols).clamp(-fp8_max, fp8_max).to(fp8_dtype)
    return q, e8m0


def _e2m1_step(a: torch.Tensor) -> tuple:
    """Return the distance between the E2M1 values (0, .5, 1, 1.5, 2, 3, 4, 6) around fp32 a >= 0, and its inverse."""
    # Masking the exponent field gives the power of two at or below a; half of it is .5 below 2, 1 below 4, else 2.
    power = a.clamp(1.0, E2M1_MAX).view(torch.int32) & 0x7F800000
    return power.view(torch.float32) * 0.5, (0x7F000000 - power).view(torch.float32) * 2.0


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 value, in fp32; ties go to the even code, large values saturate, NaN becomes +6.

    E2M1 has no NaN, so cvt.rn.satfinite.e2m1x2.f32 gives the largest value.
    """
    a = x.float().abs()
    step, inverse = _e2m1_step(a)
    # a/step is the code up to an even number, so torch's round-half-to-even is the format's.
    q = (torch.round(a * inverse) * step).clamp(max=E2M1_MAX)
    return torch.where(torch.isnan(x), E2M1_MAX, torch.copysign(q, x.float()))


def stochastic_round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to one of the two neighbouring E2M1 values at random, in fp32, with probabilities whose mean is x."""
    a = x.float().abs().clamp(max=E2M1_MAX)
    step, inverse = _e2m1_step(a)
    # The fp32 sum below may round a value on the grid up to the next one; the minimum prevents that.
    ratio = a * inverse
    q = torch.minimum(torch.floor(ratio + _uniform(a)), torch.ceil(ratio)) * step
    return torch.where(torch.isnan(x), E2M1_MAX, torch.copysign(q, x.float()))


class NVFP4Tensor(NamedTuple):
    """A tensor in NVFP4: an element is values * scale * amax / (6 * 448)."""

    values: torch.Tensor  # fp32 (M, N) on the E2M1 grid
    scale: torch.Tensor   # fp8 E4M3, one per block: (M, N/16), (M/16, N) or (M/16, N/16)
    amax: torch.Tensor    # fp32 scalar, of the whole tensor


def quantize_nvfp4(
    x: torch.Tensor, dim: int = -1, two_d: bool = False, stochastic: bool = False
) -> NVFP4Tensor:
    """Quantize to NVFP4.

    x (M, N), bf16 or fp32, in 1x16 blocks along `dim` (-1 rowwise, 0 columnwise), or with two_d in 16x16 squares;
    stochastic: round stochastically.
    Source: common/transpose/quantize_transpose_vector_blockwise_fp4.cu, common/cast/nvfp4/core_nvfp4.cuh
    (their default path: block scale = amax_block * (encode * 1/6), exact division for the reciprocals).
    """
    rows, cols = (NVFP4_BLOCK, NVFP4_BLOCK) if two_d else _tile_shape(dim, NVFP4_BLOCK)
    tile_amax = _tile_amax(x, rows, cols)
    amax = tile_amax.amax()
    encode = _divide(448.0 * E2M1_MAX, amax).clamp(max=FP32_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    scale = (tile_amax * (encode * (1.0 / E2M1_MAX))).clamp(max=448.0).to(torch.float8_e4m3fn)
    # The reciprocal of the rounded scale; FP32_MAX for blocks whose scale rounds to 0.
    tile_encode = _divide(1.0, scale.float() * _divide(1.0, encode)).clamp(max=FP32_MAX)
    scaled = _times_tile(x, tile_encode, rows, cols)
    values = stochastic_round_e2m1(scaled) if stochastic else round_e2m1(scaled)
    return NVFP4Tensor(values, scale, amax)


# The fixed signs of TE's random Hadamard transform.
RHT_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


_hadamard: dict = {}


def hadamard_matrix(device: Union[str, torch.device]) -> torch.Tensor:
    """Return the orthogonal matrix diag(signs) @ Sylvester's Hadamard matrix / 4, fp32 (16, 16)."""
    device = torch.device(device)
    if device not in _hadamard:
        h = torch.ones(1, 1)
        while h.shape[0] < NVFP4_BLOCK:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        _hadamard[device] = (torch.tensor(RHT_SIGNS, dtype=torch.float32)[:, None] * h / 4.0).to(device)
    return _hadamard[device]


def hadamard_transform(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Apply the random Hadamard transform to each 16 values along `dim` of x (M, N); the result has x's dtype.

    Like TE's, it sums in fp32 and rounds once to bf16, before the amax is taken: so does a GPU's bf16
    matmul. (The matrix holds +-1/4, so no product is rounded.)
    """
    m, n = x.shape
    dtype = x.dtype if x.is_cuda else torch.float32
    h, blocks = hadamard_matrix(x.device).to(dtype), x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if dim in (-1, 1):
            out = blocks.reshape(-1, NVFP4_BLOCK) @ h
        else:
            blocks = blocks.reshape(m // NVFP4_BLOCK, NVFP4_BLOCK, n)
            out = torch.bmm(h.t().expand(len(blocks), -1, -1), blocks)
    return out.reshape(m, n).to(x.dtype)


# The numbers of quantization_stats(), in this order.
STATISTICS = ("amax", "scale", "saturated", "underflow", "error")


@torch.no_grad()
def quantization_stats(
    x: torch.Tensor, rcp: Recipe, kind: str, scale: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Measure what a recipe's quantizer does to a tensor: fp32 (5,), the STATISTICS.

    amax       largest magnitude
    scale      factor of the values before rounding; with block scales, their median
    saturated  share of the non-zero values that exceed the format's range
    underflow  share of the non-zero values that become 0
    error      |quantized - x| / |x| in the Frobenius norm

    Args:
        x: (M, N), bf16 or fp32, quantized in blocks along the last dimension (as for the forward matmul, and
            for the gradient of its input), without Hadamard transform.
        rcp: a recipe of this module or of Transformer Engine.
        kind: "input", "weight" or "gradient".
        scale: delayed scaling's present scale of this tensor, an fp32 scalar; other recipes compute their own.
    """
    hybrid = rcp.fp8_format.name == "HYBRID" and kind == "gradient"
    fp8_dtype = torch.float8_e5m2 if hybrid else torch.float8_e4m3fn
    # A value saturates above the middle between the largest value and the next one, which the format does not have.
    limit, rows, cols = 61440.0 if hybrid else 464.0, 1, x.shape[1]
    if rcp.nvfp4():
        two_d = kind == "weight" and not rcp.disable_2d_quantization
        rows, cols, limit = NVFP4_BLOCK if two_d else 1, NVFP4_BLOCK, 7.0
        stochastic = kind == "gradient" and not rcp.disable_stochastic_rounding
        limit = E2M1_MAX if stochastic else limit  # above 6, stochastic rounding has no upper neighbour
        q, block_scale, amax = quantize_nvfp4(x, -1, two_d, stochastic)
        decode = block_scale.float() * (amax / (E2M1_MAX * 448.0))
    elif rcp.mxfp8():
        cols = MXFP8_BLOCK
        q, e8m0 = _quantize_mxfp8(x, fp8_dtype, -1)
        decode = e8m0_to_float(e8m0)
    elif rcp.float8_block_scaling():
        rows, cols = FP8_BLOCK if kind == "weight" else 1, FP8_BLOCK
        q, decode = _quantize_fp8_tiles(x, fp8_dtype, rows, cols)
    else:
        scale = compute_scale(compute_amax(x), FP8_MAX[fp8_dtype]) if scale is None else scale
        q, decode, rows = quantize_fp8(x, scale, fp8_dtype), (1.0 / scale).reshape(1, 1), x.shape[0]
    x, q = _tiles(x.float(), rows, cols), _tiles(q.float(), rows, cols)
    tile_decode = decode[:, None, :, None]
    magnitude, nonzero = x.abs(), x != 0
    count = nonzero.sum().clamp(min=1)
    saturated = ((magnitude > limit * tile_decode) & (tile_decode > 0)).sum() / count
    underflow = ((q * tile_decode == 0) & nonzero).sum() / count  # NVFP4's block scales may be 0 too
    norm = torch.linalg.vector_norm(x)
    error = torch.linalg.vector_norm(q * tile_decode - x) / torch.where(norm > 0, norm, 1.0)
    used = torch.where(decode > 0, 1.0 / decode, math.nan)  # leave out blocks whose scale rounds to 0
    return torch.stack([magnitude.amax(), used.nanmedian(), saturated, underflow, error])


# ----------------------------------------------------------------------------------------------
# Global state: the active recipe, delayed scaling's amaxes, recomputation
# ----------------------------------------------------------------------------------------------


class DelayedScalingState:
    """Scales and amax history of a module's tensors in one direction, in TE's layout.

    scale: fp32 (N,), starts at 1. amax_history: fp32 (H, N), starts at 0. Row 0 collects the amax of
    the current step; the last row is the newest finished step. For each GEMM there are columns for
    input, weight and output (forward), or grad_output and grad_input (backward). Output and
    grad_input are never quantized here, so their columns stay 0.
    """

    def __init__(self, amax_history_len: int, num_tensors: int, device):
        self.scale = torch.ones(num_tensors, dtype=torch.float32, device=device)
        self.amax_history = torch.zeros(amax_history_len, num_tensors, dtype=torch.float32, device=device)

    def to(self, device: Union[str, torch.device]) -> None:
        """Move the state to a device, in place."""
        self.scale, self.amax_history = self.scale.to(device), self.amax_history.to(device)

    def resize(self, amax_history_len: int) -> None:
        """Truncate or zero-pad the history at its end, as TE does."""
        extra = amax_history_len - self.amax_history.shape[0]
        if extra:
            self.amax_history = F.pad(self.amax_history, (0, 0, 0, extra)).clone()


class _Global:
    """The state that autocast sets. There is one instance, `_state`."""

    def __init__(self):
        self.enabled = False
        self.recipe = None
        self.group = None
        self.depth = 0
        # True until the first quantized module of the region has run. That module's backward runs
        # last, so it updates the gradients' scales.
        self.first_module = False
        # Checkpointed functions that are running, outermost first.
        self.frames = []
        # (forward, recipe, group) -> references to the states that are reduced together.
        self.registry = {}

    def register(self, state, forward, rcp, group):
        """Note a module's state for the next reduce_and_update()."""
        # The key holds the recipe's fields: two equal recipes share one reduction.
        key = (forward, repr(rcp), id(group) if group is not None else None)
        members = self.registry.setdefault(key, (rcp, group, {}))[2]
        known = members.get(id(state))
        if known is None or known() is not state:
            # All ranks need the same order. The id may be that of a deleted model's state, whose place is another.
            members.pop(id(state), None)
            # A weak reference: a deleted model takes no part in the reduction.
            members[id(state)] = weakref.ref(state)

    @torch.no_grad()
    def reduce_and_update(self, forward: bool):
        """Reduce the amaxes over the ranks, roll the histories and compute the next scales."""
        for (is_forward, *_), (rcp, group, members) in self.registry.items():
            if is_forward != forward:
                continue
            states = [ref() for ref in members.values()]
            states = [s for s in states if s is not None]
            if not states:
                continue
            dist = torch.distributed
            amax = torch.cat([s.amax_history[0] for s in states])
            if (
                rcp.reduce_amax
                and dist.is_available()
                and dist.is_initialized()
                and dist.get_world_size(group) > 1
            ):
                dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
            sizes = [s.scale.numel() for s in states]
            history, scale = update_amax_and_scale(
                torch.cat([s.amax_history for s in states], dim=1),
                torch.cat([s.scale for s in states]),
                amax,
                FP8_MAX[rcp.fp8_dtype(forward)] * 2.0**-rcp.margin,
                rcp.amax_compute_algo,
            )
            torch._foreach_copy_([s.amax_history for s in states], list(history.split(sizes, dim=1)))
            torch._foreach_copy_([s.scale for s in states], list(scale.split(sizes)))


def update_amax_and_scale(
    history: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor, scaled_max: float, algo: str = "max"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do one step of delayed scaling: (history (H, N), scale (N,), amax (N,)) -> new history, new scale.

    A tensor that was not quantized since the last update (amax 0) keeps its history and scale. The
    history of the others rolls up by one row, the new amax becomes the last row, and row 0 is cleared.
    The oldest row still counts in this maximum. An amax that is inf or NaN keeps the old scale; an inf
    does so until it leaves the history. Source: kernel_bulk in common/recipe/delayed_scaling.cu.
    """
    rolled = torch.cat([history[1:], amax[None]])
    top = amax if algo == "most_recent" else torch.nan_to_num(rolled, nan=0.0, posinf=math.inf).amax(0)
    cleared = torch.cat([torch.zeros_like(amax)[None], rolled[1:]])
    seen = amax != 0
    new_scale = _divide(scaled_max, top).clamp(max=FP32_MAX)
    usable = seen & torch.isfinite(top) & (top > 0)
    return torch.where(seen, cleared, history), torch.where(usable, new_scale, scale)


_state = _Global()


def forget_modules() -> None:
    """Leave all modules that have run so far out of delayed scaling's updates and reductions, until they run again.

    For several models one after another: a deleted one may be collected later on one rank than on another.
    """
    _state.registry.clear()


class FP8GlobalStateManager:
    """The part of TE's class of this name that train.py uses."""

    is_fp8_enabled = staticmethod(lambda: _state.enabled)
    reset = staticmethod(lambda: _state.__init__())


quantization = types.SimpleNamespace(FP8GlobalStateManager=FP8GlobalStateManager)  # a module in TE


class autocast:
    """A context manager that quantizes the layers which run inside, by `recipe` (default: DelayedScaling).

    amax_reduction_group: the process group whose ranks share delayed scaling's amaxes; None: all ranks.
    """

    def __init__(
        self, enabled: bool = True, calibrating: bool = False, recipe: Optional[Recipe] = None,
        amax_reduction_group=None,
    ):
        _require(not calibrating, "autocast: calibrating=True is not emulated; leave it out")
        recipe = DelayedScaling() if recipe is None else recipe
        _require(
            isinstance(recipe, Recipe),
            f"autocast: {recipe!r} is not a recipe of this module; use one of te_emulation.recipe",
        )
        self._args = (enabled, recipe, amax_reduction_group)
        self._saved = None

    def __enter__(self):
        if self._saved is not None:
            raise RuntimeError("autocast context manager cannot be entered more than once concurrently")
        self._saved = (_state.enabled, _state.recipe, _state.group, _state.first_module)
        _state.enabled, _state.recipe, _state.group = self._args
        if _state.depth == 0:
            _state.first_module = True
        _state.depth += 1
        return self

    def __exit__(self, exc_type, exc_value, traceback):
        _state.enabled, _state.recipe, _state.group, _state.first_module = self._saved
        self._saved = None
        _state.depth -= 1
        # A reentrant checkpoint runs its first pass without gradients, although gradients are wanted.
        grad = torch.is_grad_enabled() or any(not f.recomputing for f in _state.frames)
        if self._args[0] and _state.depth == 0 and grad and exc_type is None:
            _state.reduce_and_update(forward=True)


class _Frame:
    """What the first pass of one call of checkpoint() hands to the recomputation."""

    def __init__(self):
        self.context = None  # the autocast state of the first pass
        self.recomputing = False
        self.scales = []  # delayed scaling's forward scales, in the order of use
        self.cursor = 0  # index of the next scale to reuse
        self.first = False  # whether the region's first module ran inside
        self.first_left = False  # the same, until that module has run again

    @contextlib.contextmanager
    def run(self):
        """Wrap each run of the checkpointed function; all but the first are recomputations."""
        saved = (_state.enabled, _state.recipe, _state.group)
        self.recomputing = self.context is not None
        if self.recomputing:
            _state.enabled, _state.recipe, _state.group = self.context
            self.cursor, self.first_left = 0, self.first
            _state.depth += 1  # an autocast inside the function is not the outermost: no update
        else:
            self.context = saved
        _state.frames.append(self)
        try:
            yield
        finally:
            _state.frames.pop()
            if self.recomputing:
                _state.depth -= 1
                _state.enabled, _state.recipe, _state.group = saved


@torch.compiler.disable
def checkpoint(function: Callable, *args, use_reentrant: bool = True, **kwargs):
    """Run function(*args, **kwargs) and keep only its inputs; the backward pass runs it again.

    Under delayed scaling the recomputation quantizes with the scales of the first pass and does not
    change the amax history. (TE swaps the old scales and history in, and out again.)
    """
    for name in ("distribute_saved_activations", "tp_group", "get_rng_state_tracker", "context_fn"):
        _require(not kwargs.pop(name, None), f"checkpoint: {name} is not emulated; leave it out")
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    frame = _Frame()

    def run(*run_args):
        with frame.run():
            return function(*run_args, **kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=use_reentrant)


# ----------------------------------------------------------------------------------------------
# One forward pass of one module
# ----------------------------------------------------------------------------------------------


class _Operand(NamedTuple):
    """A quantized tensor: bf16 values for rowwise and columnwise use, and a factor for the sum.

    factor is scale_inv (per-tensor FP8), amax (NVFP4) or None (the scale is in the values).
    """

    row: torch.Tensor
    row_factor: Optional[torch.Tensor]
    col: torch.Tensor
    col_factor: Optional[torch.Tensor]


@_kernel
def _quantize_delayed(x, scale, fp8_dtype):
    """Quantize x (M, N) by a given scale: bf16 values, their factor, and the amax for the history."""
    return quantize_fp8(x, scale, fp8_dtype).to(torch.bfloat16), _divide(1.0, scale), compute_amax(x)


@_kernel
def _quantize_current(x, fp8_dtype):
    """Quantize x (M, N) by the scale of its own amax: bf16 values and their factor."""
    scale = compute_scale(compute_amax(x), FP8_MAX[fp8_dtype])
    return quantize_fp8(x, scale, fp8_dtype).to(torch.bfloat16), _divide(1.0, scale)


@_kernel
def _quantize_rows(x, fp8_dtype):
    """Quantize x (M, N) in 1x128 blocks: bf16 values times scale_inv."""
    return _dequantize(*quantize_block_1d(x, fp8_dtype, -1), 1, FP8_BLOCK)


@_kernel
def _quantize_columns(x, fp8_dtype):
    """Quantize x (M, N) in 128x1 blocks: bf16 values times scale_inv."""
    return _dequantize(*quantize_block_1d(x, fp8_dtype, 0), FP8_BLOCK, 1)


@_kernel
def _quantize_squares(x, fp8_dtype):
    """Quantize x (M, N) in 128x128 blocks: bf16 values times scale_inv."""
    return _dequantize(*quantize_block_2d(x, fp8_dtype), FP8_BLOCK, FP8_BLOCK)


@_kernel
def _quantize_mx(x, fp8_dtype, dim):
    """Quantize x (M, N) to MXFP8 along `dim`: bf16 values times scale_inv."""
    q, e8m0 = _quantize_mxfp8(x, fp8_dtype, dim)
    return _dequantize(q, e8m0_to_float(e8m0), *_tile_shape(dim, MXFP8_BLOCK))


@_kernel
def _quantize_fp4(x, dim, two_d, stochastic):
    """Quantize x (M, N) to NVFP4: bf16 values times block scales, and the tensor's amax, which is their factor."""
    q = quantize_nvfp4(x, dim, two_d, stochastic)
    rows, cols = (NVFP4_BLOCK, NVFP4_BLOCK) if two_d else _tile_shape(dim, NVFP4_BLOCK)
    return _dequantize(q.values, q.scale.float(), rows, cols), q.amax


class _Pass:
    """The settings of one forward pass of a module and of its backward. It holds no activations."""

    def __init__(self, module, x):
        self.dtype = _activation_dtype(module, x)
        self.recipe = _state.recipe if _state.enabled else None
        self.eps = getattr(module, "eps", None)
        self.activation = getattr(module, "activation", None)
        self.fuse_wgrad = module.fuse_wgrad_accumulation
        self.overwrite_main_grad = False
        self.delayed = self.recipe is not None and self.recipe.delayed()
        self.update_backward = False
        if not self.delayed:
            return
        module.init_fp8_meta_tensors(self.recipe, device=x.device)
        self.fwd = module.fp8_meta["scaling_fwd"]
        self.bwd = module.fp8_meta["scaling_bwd"]
        _state.register(self.fwd, True, self.recipe, _state.group)
        _state.register(self.bwd, False, self.recipe, _state.group)
        self._enter_frames(any(p.requires_grad for p in module.parameters()) or x.requires_grad)

    def _enter_frames(self, requires_grad):
        """Choose the forward scales, and the module whose backward updates the gradients' scales."""
        frames = _state.frames
        again = next((f for f in reversed(frames) if f.recomputing), None)
        first_pass = next((f for f in reversed(frames) if not f.recomputing), None)
        self.record = again is None
        if again is None:
            self.fwd_scale = self.fwd.scale
        else:
            self.fwd_scale = again.scales[again.cursor]
            again.cursor += 1
        for frame in frames:
            if not frame.recomputing:
                frame.scales.append(self.fwd_scale.clone())
        # Exactly one module's backward updates the gradients' scales: the first one's. The first pass of
        # a reentrant checkpoint builds no graph, so its recomputation does it instead.
        if not requires_grad:
            return
        first = again.first_left if again is not None else _state.first_module
        if again is not None:
            again.first_left = False
        else:
            _state.first_module = False
        if torch.is_grad_enabled():
            self.update_backward = first
        elif first_pass is not None:
            first_pass.first |= first
        elif again is None:
            _state.first_module = first  # a pass without gradients does not count as the first

    def quantize(self, x, kind: str, gemm: int = 0) -> _Operand:
        """Quantize x (M, N), in self.dtype or fp32 (see fused_dtype); kind is "input", "weight" or "grad"."""
        rcp, forward = self.recipe, kind != "grad"
        fp8_dtype = rcp.fp8_dtype(forward)
        if self.delayed:
            state = self.fwd if forward else self.bwd
            slot = gemm * 3 + (kind == "weight") if forward else gemm * 2
            scale = (self.fwd_scale if forward else state.scale)[slot]
            values, factor, amax = _quantize_delayed(x, scale, fp8_dtype)
            if self.record or not forward:
                with torch.no_grad():
                    current = state.amax_history[0, slot]
                    current.copy_(torch.maximum(current, amax))
            return _Operand(values, factor, values, factor)
        if rcp.float8_current_scaling():
            values, factor = _quantize_current(x, fp8_dtype)
            return _Operand(values, factor, values, factor)
        if rcp.float8_block_scaling():
            if kind == "weight":
                values = _quantize_squares(x, fp8_dtype)
                return _Operand(values, None, values, None)
            return _Operand(_quantize_rows(x, fp8_dtype), None, _quantize_columns(x, fp8_dtype), None)
        if rcp.mxfp8():
            return _Operand(_quantize_mx(x, fp8_dtype, -1), None, _quantize_mx(x, fp8_dtype, 0), None)
        two_d = kind == "weight" and not rcp.disable_2d_quantization
        stochastic = kind == "grad" and not rcp.disable_stochastic_rounding
        row, row_amax = _quantize_fp4(x, -1, two_d, stochastic)
        if two_d:
            return _Operand(row, row_amax, row, row_amax)
        # Only wgrad uses the transform. Both its operands are transformed along the tokens, so the
        # transforms cancel in the product. Weights are never transformed.
        if kind != "weight" and not rcp.disable_rht:
            x = hadamard_transform(x, 0)
        return _Operand(row, row_amax, *_quantize_fp4(x, 0, False, stochastic))

    @property
    def fused_dtype(self) -> torch.dtype:
        """The dtype in which the result of an fp32 norm, activation or its derivative reaches the quantizer.

        Delayed scaling's kernels are fused: they quantize, and take the amax, directly from fp32. In
        every other case the values are rounded to bf16 first: a separate kernel writes them to memory,
        or, for MXFP8's activations, the fused kernel rounds them. Sources: pytorch/csrc/extensions/
        {normalization,activation,bias}.cpp choose the kernels, which are in common/normalization/
        rmsnorm/rmsnorm_fwd_kernels.cuh, common/transpose/cast_transpose_fusion.cu and
        common/cast/mxfp8/quantize_mxfp8.cuh.
        """
        return torch.float32 if self.delayed else self.dtype

    def gemm(self, a, a_factor, b, b_factor, out_dtype=None):
        """Return a (M, K) @ b (K, N), scaled by both factors after the fp32 sum, in out_dtype (default: self.dtype)."""
        factor = None
        if a_factor is not None:
            factor = a_factor * b_factor
            if self.recipe.nvfp4():
                factor = factor * NVFP4_GEMM_FACTOR
        return _matmul(a, b, factor, out_dtype or self.dtype)

    def weight_grad(self, weight, dy, dy_factor, x, x_factor):
        """Return dy (T, N)^T @ x (T, K), rounded to the activation dtype, in the weight's dtype.

        With fuse_wgrad_accumulation, add it to weight.main_grad in that tensor's dtype instead, without
        the rounding in between, and return None.
        """
        if not self.fuse_wgrad:
            return self.gemm(dy.t(), dy_factor, x, x_factor).to(weight.dtype)
        main_grad = getattr(weight, "main_grad", None)
        _require(
            main_grad is not None,
            "fuse_wgrad_accumulation needs weight.main_grad; set it before the backward pass",
        )
        grad = self.gemm(dy.t(), dy_factor, x, x_factor, main_grad.dtype)
        if self.overwrite_main_grad:
            main_grad.copy_(grad)
        else:
            main_grad.add_(grad)
        return None


def _dequantize(q, scale_inv, rows, cols):
    """Return (M, N) values times tile scales in bf16: exact for power-of-two scales, and for E4M3 scales of E2M1."""
    return _times_tile(q, scale_inv, rows, cols).to(torch.bfloat16)


def _matmul(a, b, factor, out_dtype):
    """Return a @ b with fp32 sums, times factor (fp32 scalar or None), rounded once to out_dtype."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            out = a @ b
        elif a.device.type == "cuda":
            if factor is None and out_dtype == a.dtype:
                return torch.mm(a, b)
            out = torch.mm(a, b, out_dtype=torch.float32)
        else:
            out = a.float() @ b.float()
        return out.to(out_dtype) if factor is None else _scale_sum(out, factor, out_dtype)


@_kernel
def _scale_sum(out, factor, dtype):
    """Multiply the sums of a matmul by a factor, and round them to dtype."""
    return (out * factor).to(dtype)


def _activation_dtype(module, x):
    """Return torch.autocast's dtype where it is on; else the input's, which the parameters must share."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    for name, param in module.named_parameters():
        if param.dtype != x.dtype:
            raise TypeError(
                "Data types for parameters must match when outside of autocasted region. "
                f"Found input dtype: {x.dtype} and {name!r} dtype: {param.dtype}"
            )
    return x.dtype


@_kernel
def _rmsnorm(x, weight, eps, dtype):
    """Normalize x (M, N) in fp32 with gain (N,), both in the activation dtype: y in `dtype`, and 1/rms (M, 1) fp32."""
    x = x.float()
    rsigma = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (weight.float() * (rsigma * x)).to(dtype), rsigma


@_kernel
def _rmsnorm_backward(dz, x, rsigma, weight, dtype):
    """Return dx (M, N) in dtype, and dweight (N,) summed in fp32 and rounded to dtype, as TE's kernel does."""
    dz, y = dz.float(), x.float() * rsigma
    dy = dz * weight.float()
    dx = rsigma * (dy - y * (dy * y).mean(-1, keepdim=True))
    return dx.to(dtype), (dz * y).sum(0).to(dtype)


def _srelu(x):
    return torch.relu(x).square()


def _dsrelu(x):
    return 2.0 * torch.relu(x)


def _drelu(x):
    return (x > 0).to(x.dtype)


def _gelu(x):
    return F.gelu(x, approximate="tanh")


def _dgelu(x):
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)


_ACTIVATIONS = {"srelu": (_srelu, _dsrelu), "relu": (torch.relu, _drelu), "gelu": (_gelu, _dgelu)}


@_kernel
def _activate(z, name, dtype):
    """Apply the activation to fc1's output z (bf16), in fp32."""
    return _ACTIVATIONS[name][0](z.float()).to(dtype)


@_kernel
def _activate_backward(da, z, name, dtype):
    """Return the gradient of z from that of the activation, computed in fp32."""
    return (da.float() * _ACTIVATIONS[name][1](z.float())).to(dtype)


def _check_execution(rcp, dtype, *tensors):
    """Raise ValueError for what TE's kernels refuse: dtypes, and shapes that the format's blocks do not divide."""
    rows, cols = 8, 16
    if rcp.float8_block_scaling():
        rows = cols = FP8_BLOCK
    elif rcp.mxfp8():
        rows = cols = MXFP8_BLOCK
    elif rcp.nvfp4():
        rows = cols = NVFP4_BLOCK
    for t in tensors:
        _require(
            t.shape[0] % rows == 0 and t.shape[1] % cols == 0,
            f"{type(rcp).__name__} needs the product of all dimensions but the last divisible by {rows} "
            f"and the last dimension divisible by {cols}, but got a tensor of {list(t.shape)}",
        )
    if rcp.nvfp4() and not rcp.disable_rht:
        _require(
            dtype == torch.bfloat16,
            f"NVFP4's random Hadamard transform needs bfloat16 activations, got {dtype}; use torch.autocast",
        )


def _linear_forward(run, x, weight, operand, gemm):
    """Return y = x @ weight^T, and the columnwise x and its factor, which wgrad needs.

    x is in bf16, or fp32 (see _Pass.fused_dtype). operand: the quantized weight, or None without quantization.
    """
    if run.recipe is None:
        return _matmul(x, weight.to(run.dtype).t(), None, run.dtype), x, None
    q = run.quantize(x, "input", gemm)
    y = run.gemm(q.row, q.row_factor, operand.row.t(), operand.row_factor)
    return y, q.col, q.col_factor


def _linear_backward(run, dy, x_col, x_factor, weight, w_col, w_factor, gemm, need_dx, need_dw):
    """Return the gradients of x and weight from dy (T, N) in bf16, or fp32 (see _Pass.fused_dtype)."""
    if run.recipe is None:
        dy = _Operand(dy, None, dy, None)
        w_col = weight.to(run.dtype)
    else:
        dy = run.quantize(dy, "grad", gemm)
    dx = run.gemm(dy.row, dy.row_factor, w_col, w_factor) if need_dx else None
    dw = run.weight_grad(weight, dy.col, dy.col_factor, x_col, x_factor) if need_dw else None
    return dx, dw


class _LinearFunction(torch.autograd.Function):
    """[RMSNorm and] one linear layer. x (T, K), norm_weight (K,) or None, weight (N, K)."""

    @staticmethod
    def forward(ctx, x, norm_weight, weight, run, operand):
        x = x.to(run.dtype)
        rsigma = gain = None
        h = x
        if norm_weight is not None:
            gain = norm_weight.to(run.dtype)
            h, rsigma = _rmsnorm(x, gain, run.eps, run.fused_dtype)
        y, h_col, h_factor = _linear_forward(run, h, weight, operand, 0)
        w_col, w_factor = (None, None) if operand is None else (operand.col, operand.col_factor)
        # Without a norm the unquantized input is not needed again.
        x_saved = x if norm_weight is not None else None
        ctx.save_for_backward(x_saved, norm_weight, rsigma, weight, h_col, h_factor, w_col, w_factor)
        ctx.run = run
        return y

    @staticmethod
    def backward(ctx, dy):
        x, norm_weight, rsigma, weight, h_col, h_factor, w_col, w_factor = ctx.saved_tensors
        run = ctx.run
        need_x, need_norm, need_w = ctx.needs_input_grad[:3]
        dy = dy.contiguous().to(run.dtype)
        dx, dw = _linear_backward(
            run, dy, h_col, h_factor, weight, w_col, w_factor, 0, need_x or need_norm, need_w
        )
        dnorm = None
        if norm_weight is not None and dx is not None:
            dx, dnorm = _rmsnorm_backward(dx, x, rsigma, norm_weight.to(run.dtype), run.dtype)
            dnorm = dnorm.to(norm_weight.dtype)
        if run.update_backward:
            _state.reduce_and_update(forward=False)
        return dx if need_x else None, dnorm if need_norm else None, dw, None, None


class _MLPFunction(torch.autograd.Function):
    """RMSNorm, fc1, activation, fc2. x (T, K), fc1 (F, K), fc2 (K, F)."""

    @staticmethod
    def forward(ctx, x, norm_weight, fc1, fc2, run, operand1, operand2):
        x = x.to(run.dtype)
        quantized = run.recipe is not None
        h, rsigma = _rmsnorm(x, norm_weight.to(run.dtype), run.eps, run.fused_dtype)
        z, h_col, h_factor = _linear_forward(run, h, fc1, operand1, 0)
        a = _activate(z, run.activation, run.fused_dtype)
        y, a_col, a_factor = _linear_forward(run, a, fc2, operand2, 1)
        w1, w1_factor = (operand1.col, operand1.col_factor) if quantized else (None, None)
        w2, w2_factor = (operand2.col, operand2.col_factor) if quantized else (None, None)
        ctx.save_for_backward(
            x, norm_weight, rsigma, fc1, fc2, h_col, h_factor, w1, w1_factor, z, a_col, a_factor, w2, w2_factor
        )
        ctx.run = run
        return y

    @staticmethod
    def backward(ctx, dy):
        (
            x, norm_weight, rsigma, fc1, fc2, h_col, h_factor, w1, w1_factor, z, a_col, a_factor, w2, w2_factor
        ) = ctx.saved_tensors
        run = ctx.run
        need_x, need_norm, need_fc1, need_fc2 = ctx.needs_input_grad[:4]
        dy = dy.contiguous().to(run.dtype)
        need_dz = need_x or need_norm or need_fc1
        da, dfc2 = _linear_backward(run, dy, a_col, a_factor, fc2, w2, w2_factor, 1, need_dz, need_fc2)
        dx = dnorm = dfc1 = None
        if need_dz:
            dz = _activate_backward(da, z, run.activation, run.fused_dtype)
            dx, dfc1 = _linear_backward(
                run, dz, h_col, h_factor, fc1, w1, w1_factor, 0, need_x or need_norm, need_fc1
            )
        if dx is not None:
            dx, dnorm = _rmsnorm_backward(dx, x, rsigma, norm_weight.to(run.dtype), run.dtype)
            dnorm = dnorm.to(norm_weight.dtype)
        if run.update_backward:
            _state.reduce_and_update(forward=False)
        return dx if need_x else None, dnorm if need_norm else None, dfc1, dfc2, None, None, None


class _NormFunction(torch.autograd.Function):
    """RMSNorm. x (T, N), weight (N,)."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x = x.to(dtype)
        y, rsigma = _rmsnorm(x, weight.to(dtype), eps, dtype)
        ctx.save_for_backward(x, weight, rsigma)
        ctx.dtype = dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rsigma = ctx.saved_tensors
        dx, dw = _rmsnorm_backward(dy.to(ctx.dtype), x, rsigma, weight.to(ctx.dtype), ctx.dtype)
        return dx, dw.to(weight.dtype), None, None


# ----------------------------------------------------------------------------------------------
# Modules
# ----------------------------------------------------------------------------------------------


def _default_init(weight):
    """Initialize as TE does by default."""
    torch.nn.init.normal_(weight, mean=0.0, std=0.023)


class _Module(torch.nn.Module):
    """Base class of the TE modules: parameters, weight cache and delayed-scaling state."""

    num_gemms = 1

    def __init__(self, bias, normalization, params_dtype, device, name, fuse_wgrad_accumulation):
        super().__init__()
        kind = type(self).__name__
        _require(not bias, f"{kind}: bias=True is not emulated; use bias=False")
        _require(normalization in (None, "RMSNorm"), f"{kind}: normalization must be 'RMSNorm', got {normalization!r}")
        self.name = name
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self._device = device
        self._init_methods = {}
        # Plain attributes, not parameters or buffers: state_dict() must not have them.
        self.fp8_meta = {"num_gemms": self.num_gemms}
        self._fp8_workspaces = {}

    def _add_parameter(self, name, shape, init_method):
        param = torch.nn.Parameter(torch.empty(shape, dtype=self.params_dtype, device=self._device))
        self.register_parameter(name, param)
        self._init_methods[name] = init_method

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Initialize the parameters in place; those on the meta device are skipped."""
        if defer_init:
            return
        with torch.no_grad():
            for name, init_method in self._init_methods.items():
                param = getattr(self, name)
                if param.device.type != "meta":
                    init_method(param)

    def init_fp8_meta_tensors(self, recipe: Recipe, device: Optional[torch.device] = None) -> None:
        """Create fp8_meta["scaling_fwd"] and ["scaling_bwd"] for DelayedScaling, unless they exist."""
        if not recipe.delayed():
            return
        if device is None:
            device = next(self.parameters()).device
            device = torch.device("cpu") if device.type == "meta" else device
        self.fp8_meta["recipe"] = recipe
        for key, per_gemm in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            state = self.fp8_meta.get(key)
            if state is None:
                count = self.num_gemms * per_gemm
                self.fp8_meta[key] = DelayedScalingState(recipe.amax_history_len, count, device)
            else:
                state.resize(recipe.amax_history_len)
                if state.scale.device != device:
                    state.to(device)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Create fp8_meta's tensors before the first pass, as in TE. Call it inside autocast."""
        _require(
            num_gemms == self.num_gemms,
            f"{type(self).__name__}: num_gemms must be {self.num_gemms}, got {num_gemms}",
        )
        if _state.enabled:
            self.init_fp8_meta_tensors(_state.recipe)

    def _weight(self, name, run, gemm, is_first_microbatch):
        """Return the quantized weight. is_first_microbatch: None: quantize; True: quantize and keep; False: reuse."""
        if run.recipe is None:
            return None
        weight = getattr(self, name)
        kept = self._fp8_workspaces.get(name) if is_first_microbatch is not None else None
        again = any(f.recomputing for f in _state.frames)
        # A weight quantized by another recipe is not reused. A recomputation reuses what its first pass kept.
        if kept is not None and kept[0] == run.recipe and (is_first_microbatch is False or again):
            return kept[1]
        with torch.no_grad():
            operand = run.quantize(weight.detach(), "weight", gemm)
        if is_first_microbatch is not None:
            self._fp8_workspaces[name] = (dataclasses.replace(run.recipe), operand)
        return operand

    def _begin(self, x, is_first_microbatch):
        """Return the pass's settings, and x as a matrix (tokens, features)."""
        run = _Pass(self, x)
        run.overwrite_main_grad = is_first_microbatch is True
        x = x.reshape(-1, x.shape[-1])
        if run.recipe is not None:
            _check_execution(run.recipe, run.dtype, x, *(p for p in self.parameters() if p.dim() == 2))
        return run, x

    def forward(self, inp: torch.Tensor, is_first_microbatch: Optional[bool] = None) -> torch.Tensor:
        """Run the module on inp (..., in_features). is_first_microbatch: see TE, or _weight()."""
        _require(
            inp.shape[-1] == self.in_features,
            f"{type(self).__name__}: input has {inp.shape[-1]} features, expected {self.in_features}",
        )
        # Delayed scaling updates tensors that outlive the call and counts passes, which torch.compile
        # cannot trace. (It does not trace TE's modules either.)
        if _state.enabled and _state.recipe.delayed():
            return self._forward_eager(inp, is_first_microbatch)
        return self._forward(inp, is_first_microbatch)

    @torch.compiler.disable
    def _forward_eager(self, inp, is_first_microbatch):
        return self._forward(inp, is_first_microbatch)


class Linear(_Module):
    """y = x @ weight^T; weight (out_features, in_features)."""

    def __init__(
        self, in_features, out_features, *, bias=False, params_dtype=None, init_method=None,
        device=None, name=None, fuse_wgrad_accumulation=False,
    ):
        super().__init__(bias, None, params_dtype, device, name, fuse_wgrad_accumulation)
        self.in_features, self.out_features = in_features, out_features
        self._add_parameter("weight", (out_features, in_features), init_method or _default_init)
        self.reset_parameters()

    def _forward(self, inp, is_first_microbatch):
        run, x = self._begin(inp, is_first_microbatch)
        operand = self._weight("weight", run, 0, is_first_microbatch)
        y = _LinearFunction.apply(x, None, self.weight, run, operand)
        return y.view(*inp.shape[:-1], self.out_features)


class LayerNormLinear(_Module):
    """RMSNorm with gain layer_norm_weight (in_features,), then weight (out_features, in_features)."""

    def __init__(
        self, in_features, out_features, eps=1e-5, *, bias=False, normalization="RMSNorm", params_dtype=None,
        init_method=None, device=None, name=None, fuse_wgrad_accumulation=False,
    ):
        super().__init__(bias, normalization, params_dtype, device, name, fuse_wgrad_accumulation)
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        self._add_parameter("layer_norm_weight", (in_features,), torch.nn.init.ones_)
        self._add_parameter("weight", (out_features, in_features), init_method or _default_init)
        self.reset_parameters()

    def _forward(self, inp, is_first_microbatch):
        run, x = self._begin(inp, is_first_microbatch)
        operand = self._weight("weight", run, 0, is_first_microbatch)
        y = _LinearFunction.apply(x, self.layer_norm_weight, self.weight, run, operand)
        return y.view(*inp.shape[:-1], self.out_features)


class LayerNormMLP(_Module):
    """RMSNorm, fc1_weight (ffn_hidden_size, hidden_size), activation, fc2_weight (transposed shape)."""

    num_gemms = 2

    def __init__(
        self, hidden_size, ffn_hidden_size, eps=1e-5, *, bias=False, normalization="RMSNorm", activation="srelu",
        init_method=None, output_layer_init_method=None, params_dtype=None, device=None, name=None,
        fuse_wgrad_accumulation=False, checkpoint=False,
    ):
        super().__init__(bias, normalization, params_dtype, device, name, fuse_wgrad_accumulation)
        _require(
            activation in _ACTIVATIONS,
            f"LayerNormMLP: activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}",
        )
        self.in_features, self.eps, self.activation, self.checkpoint = hidden_size, eps, activation, checkpoint
        self._add_parameter("layer_norm_weight", (hidden_size,), torch.nn.init.ones_)
        self._add_parameter("fc1_weight", (ffn_hidden_size, hidden_size), init_method or _default_init)
        self._add_parameter("fc2_weight", (hidden_size, ffn_hidden_size), output_layer_init_method or _default_init)
        self.reset_parameters()

    def _forward(self, inp, is_first_microbatch):
        if self.checkpoint:
            return checkpoint(self._mlp, inp, is_first_microbatch, use_reentrant=False)
        return self._mlp(inp, is_first_microbatch)

    def _mlp(self, inp, is_first_microbatch):
        run, x = self._begin(inp, is_first_microbatch)
        operand1 = self._weight("fc1_weight", run, 0, is_first_microbatch)
        operand2 = self._weight("fc2_weight", run, 1, is_first_microbatch)
        args = (x, self.layer_norm_weight, self.fc1_weight, self.fc2_weight, run, operand1, operand2)
        return _MLPFunction.apply(*args).view(inp.shape)


class RMSNorm(torch.nn.Module):
    """RMSNorm with gain `weight` (normalized_shape,). hidden_size is TE's old name of normalized_shape."""

    def __init__(
        self, normalized_shape=None, eps=1e-5, *, hidden_size=None, params_dtype=None, dtype=None, device=None
    ):
        super().__init__()
        size = hidden_size if normalized_shape is None else normalized_shape
        _require(isinstance(size, int), f"RMSNorm: normalized_shape must be an integer, got {size!r}")
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=dtype or params_dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1, unless it is on the meta device."""
        if self.weight.device.type != "meta":
            torch.nn.init.ones_(self.weight)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalize inp (..., normalized_shape)."""
        device_type = inp.device.type
        autocast_on = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast_on else self.weight.dtype
        x = inp.reshape(-1, inp.shape[-1])
        return _NormFunction.apply(x, self.weight, self.eps, dtype).view(inp.shape)


@functools.lru_cache(maxsize=8)
def window_mask(tokens: int, before: int, device: torch.device) -> torch.Tensor:
    """Return which tokens (columns) each token (row) attends to: itself and `before` tokens before it; bool (T, T)."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
    return (distance >= 0) & (distance <= before)


class DotProductAttention(torch.nn.Module):
    """Causal attention through torch's SDPA: q, k, v (B, T, H, D) -> (B, T, H * D). Never quantized."""

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, *, qkv_format="bshd",
        attn_mask_type="causal", window_size=None, softmax_scale=None, layer_number=None,
    ):
        super().__init__()
        _require(qkv_format == "bshd", f"DotProductAttention: qkv_format must be 'bshd', got {qkv_format!r}")
        _require(
            attn_mask_type in ("causal", "no_mask"),
            f"DotProductAttention: attn_mask_type must be 'causal' or 'no_mask', got {attn_mask_type!r}",
        )
        causal = attn_mask_type == "causal"
        _require(
            window_size is None or tuple(window_size) in ((-1, -1), (-1, 0) if causal else (-1, -1))
            or causal and window_size[0] >= 0 and window_size[1] == 0,
            f"DotProductAttention: window_size={window_size} is not emulated; use None, or (tokens, 0) with causal",
        )
        self.window = window_size[0] if window_size is not None and window_size[0] >= 0 else None
        _require(
            isinstance(kv_channels, int),
            f"DotProductAttention: kv_channels must be an integer, got {kv_channels!r}",
        )
        self.num_attention_heads, self.kv_channels = num_attention_heads, kv_channels
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.attention_dropout, self.causal, self.layer_number = attention_dropout, causal, layer_number
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(kv_channels)

    def forward(
        self, query_layer: torch.Tensor, key_layer: torch.Tensor, value_layer: torch.Tensor
    ) -> torch.Tensor:
        """Attend: q, k, v (B, T, H, D) -> (B, T, H * D)."""
        q, k, v = (t.transpose(1, 2) for t in (query_layer, key_layer, value_layer))
        out = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if self.window is None else window_mask(q.shape[2], self.window, q.device),
            is_causal=self.causal and self.window is None,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=self.num_gqa_groups != self.num_attention_heads,
        )
        return out.transpose(1, 2).flatten(2)


def quantized_model_init(*args, **kwargs):
    """Raise NotImplementedError: parameters that are stored quantized are not emulated."""
    raise NotImplementedError("quantized_model_init is not emulated; create the model without it, in fp32")
