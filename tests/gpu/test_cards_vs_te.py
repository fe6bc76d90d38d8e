"""cards.py against Transformer Engine's own functions, under faked compute capabilities. Any GPU with FP8 will do."""

import importlib
import pathlib
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parents[1]
for folder in (str(TESTS.parent), str(TESTS)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import support_vs_te  # noqa: E402
from test_cards import ASKED, BY_CAPABILITY, choice  # noqa: E402

from nanofp8 import cards  # noqa: E402
from nanofp8.host import cudnn_version  # noqa: E402
from nanofp8.precision import FORMATS  # noqa: E402


def test_support(te, monkeypatch):
    assert support_vs_te.differences(te.quantization, monkeypatch) == []
    function = getattr(importlib.import_module("transformer_engine.pytorch.utils"), support_vs_te.ANY_LAYOUT)
    assert support_vs_te.layout_differences(function, monkeypatch) == []


@pytest.mark.parametrize("capability", BY_CAPABILITY)
def test_train_py_asks_transformer_engine(te, monkeypatch, capability):
    """Its choice follows the library's own answers. The library keeps its first answers, so these are forgotten."""
    capability = BY_CAPABILITY[capability]
    for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        monkeypatch.setattr(te.quantization, name, None)
    monkeypatch.setattr(te.quantization, "get_device_compute_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for name, changes in ASKED.items():
        assert choice(changes) == cards.verdict(FORMATS[name].question, capability, asked=True), name
    assert choice({}) == cards.verdict(FORMATS["fp8-delayed"].question, capability, asked=False)


@pytest.mark.parametrize("head", [64, 72, 100, 128, 136, 192, 256, 264])
def test_fused_attention(te, head):
    """Transformer Engine chooses cuDNN's kernels on this card for the head sizes that cards.py names."""
    module = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    core = te.DotProductAttention(2, head, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal")
    q, k, v = (torch.randn(1, 256, 2, head, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    core(q, k, v)
    fused = importlib.import_module(module)._attention_backends["use_fused_attention"]
    why = cards.unfused_attention(torch.cuda.get_device_capability(), head, cudnn_version(torch)[0])
    assert bool(fused) != bool(why), why
