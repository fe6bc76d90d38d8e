"""What Transformer Engine (TE) can do on each kind of GPU, as its source says. Imports nothing, not even torch.

Line numbers are those of TE 2.20.2: Python below transformer_engine/ of the wheel transformer_engine, C++ below csrc/
of the source archive transformer_engine_torch, CUDA below transformer_engine/ of branch release_v2.19.
"""

import re
from typing import NamedTuple

TE_OLDEST = (2, 17)   # the first version with transformer_engine.pytorch.constants.DType, which fused.py needs
TE_MADE_FOR = "2.20.2"  # of requirements.txt; no other version has been run
MADE_FOR_CUDA = "13.0"  # of torch in requirements.txt
TORCH_OLDEST = (2, 10)  # the first version whose addmm adds bf16 products to fp32 (fused.py); 2.9 brought Muon

# A user reports rare FP8 gradients on compute capability 12.x that are finite and far too large, from TE's kernel that
# casts and transposes (NVIDIA/TransformerEngine pull request 3215, open; not in 2.20.2). Our kernels take its place in
# the fused blocks and the head (own_quantize); TE's modules still run it. So steps whose gradient norm lies this many
# deviations above the mean are skipped there
GRAD_ZSCORE_12 = 8.0
NVFP4_OLDEST_12 = (2, 19)  # the first version that has all of NVFP4's ingredients on compute capability 12.x


OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version; docs.nvidia.com/deploy/cuda-compatibility


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (2, 20, 0) for "2.20.0.dev0+1a2b3c"; () if there are none."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def version_name(number: int) -> str:
    """Return a version that cuDNN or cuBLASLt gives as one number: "9.18.1" for 91801, "13.4.0" for 130400."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def driver_fault(driver: str, cuda: str) -> str:
    """Return in what way this driver is too old for a torch that was built for this CUDA, with the remedy, or ""."""
    (number, *_), (major, *_) = version_numbers(driver) or (0,), version_numbers(cuda) or (0,)
    needed = OLDEST_DRIVER.get(major, 0)
    if not number or number >= needed:
        return ""
    older = ", or use torch and Transformer Engine for CUDA 12 (docs/install.md)" if number >= OLDEST_DRIVER[12] else ""
    return f"the NVIDIA driver is {driver}, but CUDA {cuda} needs {needed} or newer; update it{older}"


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a version is older than that. One without numbers is not."""
    numbers = version_numbers(version)
    return bool(numbers) and numbers[:2] < oldest


def old_torch(version: str) -> str:
    """Return why this version of torch cannot be used, or ""."""
    if not is_older(version, TORCH_OLDEST):
        return ""
    return f"torch {version} is too old, training needs {dotted(TORCH_OLDEST)} or newer"


def unsupported_version(version: str) -> str:
    """Return why this version of Transformer Engine cannot be used, or ""."""
    if not is_older(version, TE_OLDEST):
        return ""
    return (f"Transformer Engine {version} is too old; this code was made for {TE_MADE_FOR} and needs "
            f"{dotted(TE_OLDEST)} or newer")


def untried_version(version: str) -> str:
    """Return a remark on a version of Transformer Engine with which this code has not been run, or ""."""
    if version_numbers(version)[:2] == version_numbers(TE_MADE_FOR)[:2]:
        return ""
    return f" (not tried; {dotted(TE_OLDEST)} and newer are accepted, {TE_MADE_FOR} has been run)"


def nvfp4_lacks(capability: tuple[int, int], version: str) -> tuple[str, ...]:
    """Return the flags of NVFP4's ingredients for which this version of Transformer Engine has no kernels there.

    On compute capability 12.x the fused Hadamard kernel of 10.0 to 11.0 is not used (csrc/quantizer.cpp:1934), and
    rounding in software came with 2.19 (common/util/ptx.cuh:607): before it, gradients were all zeros.
    """
    if capability[0] == 12 and () < version_numbers(version)[:2] < NVFP4_OLDEST_12:
        return "NVFP4_HADAMARD", "NVFP4_STOCHASTIC_ROUNDING"
    return ()


def nvfp4_fault(cublaslt: int) -> str:
    """Return what is wrong with NVFP4 in this cuBLASLt, with the remedy, or "". cublaslt: version as one number."""
    if cublaslt != 130400:
        return ""
    return ("cuBLASLt 13.4.0 (CUDA 13.2 Update 1) may ignore the tensor-wide scales of NVFP4, say NVIDIA's release "
            "notes; install cuBLAS 13.4.1 or newer, or use --USE_NVFP4=False")


def unfused_attention(capability: tuple[int, int], head_size: int, cudnn: int) -> str:
    """Return why cuDNN has no fused attention to train with; "" if it has.

    Transformer Engine up to 2.19 lists what cuDNN can do (common/fused_attn/fused_attn.cpp:299, 312, 344, 523). 2.20.2
    asks cuDNN, whose frontend limits head sizes alike (node/scaled_dot_product_flash_attention.h:1129 of 1.23). So
    whether an older cuDNN works on compute capability 12.0 after all is not known. 12.1 has no such line. Another
    limit of 12.0 (pytorch/attention/dot_product_attention/utils.py:1013) is for queries and values of different sizes.

    cudnn: its version as one number; 0: unknown.
    """
    oldest = 90200 if capability < (10, 0) else 91801 if capability == (12, 0) else 90700
    if cudnn in (91000, 91001):  # known bugs, as cuDNN's frontend says
        oldest = max(oldest, 91002)
    if 0 < cudnn < oldest:
        return (f"cuDNN {version_name(cudnn)} is older than {version_name(oldest)}, which compute capability "
                f"{dotted(capability)} needs")
    largest = 256 if capability[0] == 9 or capability[0] == 10 and head_size == 256 and cudnn >= 92300 else 128
    if head_size % 8 or head_size > largest:
        return f"in training cuDNN takes heads of a multiple of 8, at most {largest}, and these are of {head_size}"
    return ""


def own_quantize(capability: tuple[int, int]) -> bool:
    """Return whether fused.py quantizes and transposes FP8 by Triton kernels there, and not by TE's.

    TE's kernel is compiled at run time (common/transpose/cast_transpose.cu:263). GRAD_ZSCORE_12 says what is wrong.
    """
    return capability[0] == 12


def any_fp8_layout(capability: tuple[int, int]) -> bool:
    """Return whether cuBLAS multiplies FP8 matrices in any layout there, and not only with contiguous sums ("TN").

    For matrices with one scale each. It is what TE's is_non_tn_fp8_gemm_supported says (pytorch/utils.py:770;
    common/transformer_engine.cpp:1191), the same from 2.17 to 2.20.2: its quantizers make no transposes there either.
    """
    return (10, 0) <= capability < (12, 0) or capability >= (13, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Which format runs where


class Needs(NamedTuple):
    """What a GPU and its libraries must be for a format to run in hardware."""

    lowest: tuple[int, int]                # compute capability
    below: tuple[int, int] | None = None   # ... and lower than this one
    cuda: float = 0.0                      # version that torch was built for, as a number
    cublaslt: int = 0                      # as cublasLtGetVersion() gives it

    def __str__(self) -> str:
        last = f" to below {dotted(self.below)}" if self.below else " or newer"
        libraries = [f"CUDA {self.cuda}"] * (self.cuda > 0) + ["cuBLASLt 12.1.3"] * (self.cublaslt > 0)
        return f"{dotted(self.lowest)}{last}" + (f", with {' and '.join(libraries)} or newer" if libraries else "")


class Support(NamedTuple):
    """When one of Transformer Engine's functions says yes: if any of `needs` is met."""

    source: str
    needs: tuple[Needs, ...]


# By the function of transformer_engine.pytorch that precision.FORMATS names; the same from 2.17 to 2.20.2
SUPPORT = {
    "is_fp8_available": Support("pytorch/quantization.py:149", (
        Needs((9, 0)), Needs((8, 9), (9, 0), cuda=12.1, cublaslt=120103))),
    "is_mxfp8_available": Support("pytorch/quantization.py:162", (Needs((10, 0), (12, 0)),)),
    "is_nvfp4_available": Support("pytorch/quantization.py:171", (Needs((10, 0)),)),
    "is_fp8_block_scaling_available": Support("pytorch/quantization.py:178", (Needs((9, 0), cuda=12.9),)),
}


class Card(NamedTuple):
    """Cards of one compute capability."""

    names: str
    capability: tuple[int, int]


CARDS = (
    Card("A100, A800", (8, 0)), Card("RTX 30, A6000, A40", (8, 6)), Card("RTX 40, RTX Ada, L40S, L4", (8, 9)),
    Card("H100, H200", (9, 0)), Card("B200, GB200", (10, 0)), Card("B300, GB300", (10, 3)), Card("Thor", (11, 0)),
    Card("RTX 50, RTX PRO Blackwell", (12, 0)), Card("GB10", (12, 1)),
)
HAS_RUN = ((9, 0),)          # what is said of all others is read from source code
OLDEST = (8, 0)              # before it, GPUs have no bf16, and CUDA 13 ends at 7.5
NO_TRITON = ((11, 0),)       # Triton 3.6's ptxas is of CUDA 12.9, which does not know these (machine.check_triton)
MXFP8_FOR_BLOCK = (10, 0)    # from here on block scaling runs by MXFP8's matmuls (csrc/extensions/gemm.cpp:314)


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as NVIDIA writes it, such as "12.0"."""
    return f"{capability[0]}.{capability[1]}"


def supports(question: str, capability: tuple[int, int], cuda: float = 13.0, cublaslt: int = 130100) -> bool:
    """Return what Transformer Engine's function `question` answers on such a GPU; "" (bf16): True.

    cuda, cublaslt: versions, by default of requirements.txt.
    """
    return not question or any(
        need.lowest <= capability and (need.below is None or capability < need.below)
        and cuda >= need.cuda and cublaslt >= need.cublaslt for need in SUPPORT[question].needs)


def age_fault(capability: tuple[int, int]) -> str:
    """Return why a GPU of this compute capability is too old, or ""."""
    if capability >= OLDEST:
        return ""
    return f"the GPU has compute capability {dotted(capability)}, but training needs 8.0 (A100) or newer; use another"


def verdict(question: str, capability: tuple[int, int], asked: bool) -> str:
    """Return what a run does with the format that Transformer Engine's function `question` is about.

    asked: whether a flag asked for a format.
    Returns: "native", "emulated", "bf16" (which runs instead) or "refused".
    """
    if capability < OLDEST or capability in NO_TRITON:
        return "refused"
    if supports(question, capability):
        return "native"
    return "emulated" if asked else "bf16"
