"""What Transformer Engine (TE) can do on each kind of GPU, as its source says. Imports nothing, not even torch.

Line numbers are those of TE 2.20.2: Python below transformer_engine/ of the wheel transformer_engine, C++ below csrc/
of the source archive transformer_engine_torch, CUDA below transformer_engine/ of branch release_v2.19.
"""

import re

TE_OLDEST = (2, 17)   # the first version with transformer_engine.pytorch.constants.DType, which fused.py needs
TE_MADE_FOR = "2.20.2"  # of requirements.txt; no other version has been run

# A user reports rare FP8 gradients on compute capability 12.x that are finite and far too large, from TE's kernel that
# casts and transposes (NVIDIA/TransformerEngine pull request 3215, open; not in 2.20.2). So steps whose gradient norm
# lies this many deviations above the mean are skipped there
GRAD_ZSCORE_12 = 8.0
NVFP4_OLDEST_12 = (2, 19)  # the first version that has all of NVFP4's ingredients on compute capability 12.x


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (2, 20, 0) for "2.20.0.dev0+1a2b3c"; () if there are none."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def unsupported_version(version: str) -> str:
    """Return why this version of Transformer Engine cannot be used, or "". A version without numbers is not refused."""
    numbers = version_numbers(version)
    if not numbers or numbers[:2] >= TE_OLDEST:
        return ""
    return (f"Transformer Engine {version} is too old; this code was made for {TE_MADE_FOR} and needs "
            f"{'.'.join(map(str, TE_OLDEST))} or newer")


def nvfp4_lacks(capability: tuple[int, int], version: str) -> tuple[str, ...]:
    """Return the flags of NVFP4's ingredients for which this version of Transformer Engine has no kernels there.

    On compute capability 12.x the fused Hadamard kernel of 10.0 to 11.0 is not used (csrc/quantizer.cpp:1934), and
    rounding in software came with 2.19 (common/util/ptx.cuh:607): before it, gradients were all zeros.
    """
    if capability[0] == 12 and () < version_numbers(version)[:2] < NVFP4_OLDEST_12:
        return "NVFP4_HADAMARD", "NVFP4_STOCHASTIC_ROUNDING"
    return ()
