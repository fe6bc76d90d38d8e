"""Compare te_emulation.py with Transformer Engine's own NVFP4 reference (NVFP4QuantizerRef, plain PyTorch).

On a GPU the reference is imported with TE. Without one, its source file is loaded alone, with stand-ins for the two
base classes of TE's compiled part. TE_SOURCE is a checkout of TransformerEngine (2.20), or a folder that pip unpacked.
tests/test_nvfp4_reference.py (CPU) and tests/gpu/test_nvfp4_vs_te.py (GPU) run the comparisons below.
"""

import importlib.util
import os
import pathlib
import sys
import types
from unittest import mock

import torch

from nanofp8 import te_emulation as te

CASES = ("normal", "binades", "gradients", "outliers", "zeros", "all zeros", "ties", "tiny", "subnormal", "huge",
         "every bf16", "inf")
# The reference transforms by a bf16 matmul. On a CPU that matmul flushes subnormal products to 0, so these cases are
# left out.
RHT_CASES = tuple(c for c in CASES if c not in ("tiny", "subnormal", "inf", "every bf16"))


def load():
    """Return the module reference_nvfp4, imported with TE or loaded from TE_SOURCE; None if there is neither."""
    name = "transformer_engine.pytorch.custom_recipes.reference_nvfp4"
    if torch.cuda.is_available():
        try:
            return importlib.import_module(name)
        except ImportError:
            return None
    folder = pathlib.Path(os.environ.get("TE_SOURCE", "")) / "transformer_engine" / "pytorch" / "custom_recipes"
    if not os.environ.get("TE_SOURCE") or not folder.is_dir():
        return None

    class Quantizer:
        def __init__(self, *, rowwise, columnwise):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    stubs = {}
    for package in ("transformer_engine", "transformer_engine.pytorch", name.rpartition(".")[0]):
        stubs[package] = types.ModuleType(package)
        stubs[package].__path__ = []
    stubs["transformer_engine.pytorch.quantized_tensor"] = types.SimpleNamespace(
        Quantizer=Quantizer, QuantizedTensorStorage=object)
    stubs["transformer_engine.pytorch.tensor"] = types.ModuleType("transformer_engine.pytorch.tensor")
    stubs["transformer_engine.pytorch.tensor.utils"] = types.SimpleNamespace(is_custom=lambda tensor: True)
    with mock.patch.dict(sys.modules, stubs):
        for part in ("reference_utils", "gemm", "reference_nvfp4"):
            full = f"{name.rpartition('.')[0]}.{part}"
            spec = importlib.util.spec_from_file_location(full, folder / f"{part}.py")
            module = sys.modules[full] = importlib.util.module_from_spec(spec)
            setattr(stubs[name.rpartition(".")[0]], part, module)
            spec.loader.exec_module(module)
        return module


def values(case, dtype, device, shape=(256, 384)):
    """Return a tensor to quantize. The largest value of "ties" is 6 x 448, so encode and block scales are exact."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=g)
    if case == "binades":
        x = x * torch.exp2(torch.randint(-24, 12, shape, generator=g).float())
    elif case == "gradients":
        x = x * 1e-7
    elif case == "outliers":
        x[torch.rand(shape, generator=g) < 1e-3] *= 3e4
    elif case == "zeros":
        x[:128, :128] = 0
        x[200], x[:, 300] = 0, 0
    elif case == "all zeros":
        x = x * 0
    elif case == "ties":
        grid = torch.tensor([0, .25, .5, .75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6]) * 448
        x = grid[torch.randint(len(grid), shape, generator=g)] * x.sign()
        x[::16], x[:, ::16] = 6 * 448.0, 6 * 448.0
    elif case == "tiny":
        x = x * 1e-37
    elif case == "subnormal":
        x = x * 1e-39
    elif case == "huge":
        x = (x * 1e38).clamp(-3e38, 3e38)
    elif case == "every bf16":
        codes = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        x = codes.view(torch.bfloat16).float().reshape(256, 256)
        x = torch.where(x.isfinite(), x, 1.0)[:, torch.randperm(256, generator=g)]
    elif case == "inf":
        x[5, 7], x[130, 200] = float("inf"), -float("inf")
    elif case == "nan":
        x[5, 7] = float("nan")
    x = x.to(dtype)
    x = torch.where(x == 0, 0, x)  # no -0: see test_minus_zero
    if case == "minus zero":
        x[5, 7] = -0.0
    return x.to(device)


def unpack(codes):
    """Unpack E2M1 codes (M, N/2) uint8, low half first, to (M, N) int32."""
    codes = codes.int()
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def e2m1_codes(x):
    """Return the codes (int32) of fp32 values on the E2M1 grid; bit 3 is the sign."""
    grid = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6], device=x.device)
    return torch.searchsorted(grid, x.abs()).int() + 8 * torch.signbit(x).int()


def quantize_both(reference, x, two_d=False, rht=False):
    """Quantize x with the reference and with the emulation, along rows and along columns.

    Returns: (theirs, ours), each {name: tensor}: codes, block scales as bytes, amax.
    """
    quantizer = reference.NVFP4QuantizerRef(dtype=reference.reference_utils.Fp4Formats.E2M1,
                                            quant_tile_shape=(16, 16) if two_d else (1, 16), with_rht=rht)
    row, row_scale, col, col_scale, row_amax, col_amax = quantizer._quantize(x)
    if two_d:  # the reference repeats the scale of a 16x16 square for each row
        for scale in (row_scale, col_scale):
            assert torch.equal(scale[::16].repeat_interleave(16, 0).view(torch.uint8), scale.view(torch.uint8))
        row_scale, col_scale = row_scale[::16], col_scale[::16]
    theirs = dict(row=unpack(row), row_scale=row_scale, row_amax=row_amax,
                  col=unpack(col), col_scale=col_scale, col_amax=col_amax)
    a = te.quantize_nvfp4(x, -1, two_d)
    b = te.quantize_nvfp4(te.hadamard_transform(x, 0) if rht else x, 0, two_d)
    ours = dict(row=e2m1_codes(a.values), row_scale=a.scale, row_amax=a.amax.reshape(1),
                col=e2m1_codes(b.values).t(), col_scale=b.scale.t(), col_amax=b.amax.reshape(1))

    def as_bits(tensor):
        tensor = tensor.contiguous()
        return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor.float()

    return {n: as_bits(t) for n, t in theirs.items()}, {n: as_bits(t) for n, t in ours.items()}


def mismatches(reference, x, **how):
    """Return {name: number of elements that differ} for the six tensors of quantize_both()."""
    theirs, ours = quantize_both(reference, x, **how)
    assert all(theirs[n].shape == ours[n].shape for n in theirs)
    return {n: int((theirs[n] != ours[n]).sum()) for n in theirs}


def matmul_both(reference, rht=True, tokens=128, width=64, out=96, device="cpu"):
    """Run one linear layer with the reference's quantizers and matmul, and with the emulation.

    Without stochastic rounding, which the reference does not have.
    Returns: {name: (theirs, ours)} in fp32 for output, input gradient and weight gradient.
    """
    g = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(tokens, n, generator=g).bfloat16().to(device) for n in (width, out))
    layer = te.Linear(width, out, params_dtype=torch.bfloat16, device=device)
    make = lambda two_d, rht: reference.NVFP4QuantizerRef(  # noqa: E731
        dtype=reference.reference_utils.Fp4Formats.E2M1, quant_tile_shape=(16, 16) if two_d else (1, 16), with_rht=rht)
    qx, qdy = make(False, rht).quantize(x), make(False, rht).quantize(dy)
    qw = make(True, False).quantize(layer.weight.detach())
    kinds, by = reference.gemm.GEMMType, make(False, rht)
    multiply = lambda kind, a, sa, b, sb, qa, qb: by.qgemm(  # noqa: E731
        a, b, None, torch.float32, sa, sb, gemm_type=kind, qresult_x=qa, qresult_w=qb)
    theirs = dict(output=multiply(kinds.FPROP, qx.data, qx.scale, qw.data, qw.scale, qx, qw),
                  input=multiply(kinds.DGRAD, qdy.data, qdy.scale, qw.data_t, qw.scale_t, qdy, qw),
                  weight=multiply(kinds.WGRAD, qdy.data_t, qdy.scale_t, qx.data_t, qx.scale_t, qdy, qx))
    inp = x.clone().requires_grad_()
    with te.autocast(recipe=te.recipe.NVFP4BlockScaling(disable_rht=not rht, disable_stochastic_rounding=True)):
        y = layer(inp)
    y.backward(dy)
    ours = dict(output=y.detach(), input=inp.grad, weight=layer.weight.grad)
    return {n: (theirs[n], ours[n].float()) for n in theirs}
