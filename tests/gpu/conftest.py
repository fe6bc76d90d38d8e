"""Tests that need a CUDA GPU and Transformer Engine: python -m pytest tests/gpu. Elsewhere all of them are skipped."""

import functools
import pathlib

import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent


@functools.cache
def missing():
    """Why nothing in this folder can run here, or an empty string."""
    if not torch.cuda.is_available():
        return "tests/gpu needs a CUDA GPU"
    try:
        import transformer_engine.pytorch as te
    except Exception as error:  # a wheel for another torch fails with more than ImportError
        return f"tests/gpu needs Transformer Engine, which cannot be imported: {error}"
    available, why = te.is_fp8_available(return_reason=True)
    return "" if available else f"tests/gpu needs a GPU with FP8: {why}"


def pytest_collection_modifyitems(items):
    ours = [item for item in items if HERE in item.path.parents]
    if ours and missing():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=missing()))


@pytest.fixture(scope="session")
def te():
    """The real library; te_emulation.py is imported by the tests under its own name."""
    import transformer_engine.pytorch
    return transformer_engine.pytorch
