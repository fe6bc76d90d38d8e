"""Compare te_emulation.py's NVFP4 with Transformer Engine's own reference on a CPU. Needs TE's source code:

    TE_SOURCE=/path/to/TransformerEngine python -m pytest tests/test_nvfp4_reference.py
"""

import nvfp4_reference
import pytest
import torch
from nvfp4_reference import CASES, RHT_CASES, matmul_both, mismatches, quantize_both, values

REFERENCE = nvfp4_reference.load() if not torch.cuda.is_available() else None
pytestmark = pytest.mark.skipif(REFERENCE is None,
                                reason="TE_SOURCE is not a checkout of TransformerEngine (on a GPU, run tests/gpu)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("two_d", [False, True], ids=["1x16", "16x16"])
@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_amax_bit_for_bit(case, two_d, dtype):
    counts = mismatches(REFERENCE, values(case, dtype, "cpu"), two_d=two_d)
    assert not any(counts.values()), counts


@pytest.mark.parametrize("case", RHT_CASES)
def test_hadamard_transform_bit_for_bit(case):
    counts = mismatches(REFERENCE, values(case, torch.bfloat16, "cpu"), rht=True)
    assert not any(counts.values()), counts


def test_minus_zero():
    """Only the code of -0 differs: the reference turns it into +0, the emulation keeps it, as TE's kernels do (cvt)."""
    theirs, ours = quantize_both(REFERENCE, values("minus zero", torch.bfloat16, "cpu"))
    for n in theirs:
        differ = theirs[n] != ours[n]
        assert differ.sum() == (n in ("row", "col"))
        assert theirs[n][differ].tolist() == [0] * int(differ.sum())
        assert ours[n][differ].tolist() == [8] * int(differ.sum())


def test_nan():
    """NaN makes the reference's amax and all codes NaN. The emulation skips it, as TE's kernels do (fmaxf)."""
    theirs, ours = quantize_both(REFERENCE, values("nan", torch.bfloat16, "cpu"))
    assert theirs["row_amax"].isnan().all() and ours["row_amax"].isfinite().all()
    assert ours["row"][5, 7] == 7  # E2M1 has no NaN: the largest value
    clean = quantize_both(REFERENCE, values("normal", torch.bfloat16, "cpu"))[0]
    assert int((clean["row"] != ours["row"]).sum()) <= 16  # only the block of the NaN, whose scale may differ


@pytest.mark.parametrize("rht", [False, True])
def test_the_three_matmuls(rht):
    """One linear layer with the reference's matmul: equal in bf16, but for the order of fp32 sums near a tie."""
    for name, (theirs, ours) in matmul_both(REFERENCE, rht).items():
        differ = (theirs.bfloat16() != ours.bfloat16()).float().mean().item()
        assert differ < 1e-3, (name, differ)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5 * theirs.abs().max().item())
