"""te_emulation.py's NVFP4 against Transformer Engine's reference of it on a GPU; needs no Blackwell.

Quantizers bit for bit, and whole TE layers under CustomRecipe, whose quantizers and matmuls are the reference's. The
reference rounds to nearest, so stochastic rounding is off here (tests/test_emulation.py is for that).
"""

import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import nvfp4_reference  # noqa: E402
from nvfp4_reference import CASES, RHT_CASES, matmul_both, mismatches, values  # noqa: E402
from test_te_vs_emulation import LAYERS, fresh, make_batch, make_pair, relative, run_pass  # noqa: E402, F401

from nanofp8 import te_emulation as emulation  # noqa: E402

DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def reference(te):
    module = nvfp4_reference.load()
    if module is None:
        pytest.skip("this Transformer Engine has no NVFP4QuantizerRef")
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("two_d", [False, True], ids=["1x16", "16x16"])
@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_amax_bit_for_bit(reference, case, two_d, dtype):
    counts = mismatches(reference, values(case, dtype, DEVICE), two_d=two_d)
    assert not any(counts.values()), counts


@pytest.mark.parametrize("case", RHT_CASES)
def test_hadamard_transform(reference, case):
    """A bf16 matmul on both sides, so equal but for the order of 16 fp32 sums: at most 1 in 1,000 values in its last
    bit; where none differs, codes and scales are equal too."""
    x = values(case, torch.bfloat16, DEVICE)
    quantizer = reference.NVFP4QuantizerRef(dtype=reference.reference_utils.Fp4Formats.E2M1, with_rht=True)
    theirs, ours = quantizer._apply_rht(x.t().contiguous()).t(), emulation.hadamard_transform(x, 0)
    differ = theirs != ours
    print(case, int(differ.sum()), "of", x.numel())
    assert differ.float().mean() <= 1e-3
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * x.abs().max().item())
    if not differ.any():
        assert not any(mismatches(reference, x, rht=True).values())


@pytest.mark.parametrize("rht", [False, True])
def test_the_three_matmuls(reference, rht):
    """One linear layer by the reference's blockwise matmul: equal in bf16 but for the order of fp32 sums."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, (theirs, ours) in matmul_both(reference, rht, tokens=512, width=256, out=384, device=DEVICE).items():
        assert (theirs.bfloat16() != ours.bfloat16()).float().mean().item() < 1e-2, name
        assert relative(ours, theirs) < 3e-3, name


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "LayerNormMLP"])
def test_whole_layers(te, reference, layer):
    """TE's own layers with the reference's quantizers: within 0.1 of the effect that NVFP4 has on each tensor.

    Not LayerNormMLP: there TE 2.20 asks the reference to transpose a tensor that it quantized by rows alone, which the
    reference does byte by byte, two values in each (NVFP4TensorRef._create_transpose), and its matmul then refuses the
    shape.
    """
    from transformer_engine.common.recipe import CustomRecipe
    theirs, ours = make_pair(te, LAYERS[layer])
    x, dy = make_batch(layer)
    exact = run_pass(te, theirs, None, x, dy)
    a = run_pass(te, theirs, CustomRecipe(qfactory=reference.nvfp4_ref_rht_2d_factory), x, dy)
    b = run_pass(emulation, ours, emulation.recipe.NVFP4BlockScaling(disable_stochastic_rounding=True), x, dy)
    effect = {n: relative(a[n], exact[n]) for n in a}
    gaps = {n: relative(b[n], a[n]) for n in a}
    print(f"{layer}: " + ", ".join(f"{n} {gaps[n]:.4f} (effect {effect[n]:.4f})" for n in a))
    assert all(0.02 < e < 0.6 for e in effect.values()), f"NVFP4 was not on, or off the scale: {effect}"
    assert all(gaps[n] < 0.1 * effect[n] for n in a), (gaps, effect)
