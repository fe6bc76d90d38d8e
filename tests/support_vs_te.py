"""Compare nanofp8/cards.py with Transformer Engine's own functions, under faked GPUs and libraries.

tests/test_cards.py does it with the functions taken from TE_SOURCE, tests/gpu/test_cards_vs_te.py with the library.
"""

import ast
import itertools
import os
import pathlib
import types
from types import SimpleNamespace

import torch

from nanofp8 import cards

FUNCTIONS = {
    "is_fp8_available": "_compute_fp8_support", "is_mxfp8_available": "_compute_mxfp8_support",
    "is_nvfp4_available": "_compute_nvfp4_support",
    "is_fp8_block_scaling_available": "_compute_fp8_block_scaling_support",
}
ANY_LAYOUT = "is_non_tn_fp8_gemm_supported"  # of utils.py
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1),
                (13, 0)]
CUDA, CUBLASLT = ("12.0", "12.1", "12.8", "12.9", "13.0", "13.2"), (120102, 120103, 130100)


def load(file="quantization.py", names=()):
    """Return a module with functions of a file of TE_SOURCE alone, and {function: line}; None without it.

    names: of the functions, by default those of FUNCTIONS.
    TE_SOURCE is a checkout of TransformerEngine, or a folder that its wheel was unpacked in.
    """
    path = pathlib.Path(os.environ.get("TE_SOURCE", "")) / "transformer_engine" / "pytorch" / file
    if not os.environ.get("TE_SOURCE") or not path.exists():
        return None
    tree, names = ast.parse(path.read_text(encoding="utf-8")), names or FUNCTIONS.values()
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    lines = {node.name: node.lineno for node in tree.body}
    module = types.ModuleType("part_of_te")
    exec(compile("import functools, torch\nfrom typing import Tuple", "", "exec"), module.__dict__)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module, lines


def differences(quantization, monkeypatch):
    """Return where cards.supports() differs from Transformer Engine. quantization: its module, or load()'s."""
    found = []
    for capability, cuda, cublaslt in itertools.product(CAPABILITIES, CUDA, CUBLASLT):
        for name, value in dict(
                get_device_compute_capability=lambda capability=capability: capability,
                tex=SimpleNamespace(get_cublasLt_version=lambda cublaslt=cublaslt: cublaslt),
                torch=SimpleNamespace(version=SimpleNamespace(cuda=cuda))).items():
            monkeypatch.setattr(quantization, name, value, raising=False)
        for question, function in FUNCTIONS.items():
            theirs, why = getattr(quantization, function)()
            if theirs != cards.supports(question, capability, float(cuda), cublaslt):
                found.append((question, capability, cuda, cublaslt, theirs, why))
    return found


def layout_differences(function, monkeypatch):
    """Return the compute capabilities at which cards.any_fp8_layout() differs from TE's function ANY_LAYOUT."""
    found = []
    for capability in CAPABILITIES:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, capability=capability: capability)
        if function.__wrapped__() != cards.any_fp8_layout(capability):  # it keeps its first answer
            found.append(capability)
    return found
