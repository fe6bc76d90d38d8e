"""The choice of QuACK. Its matmuls are tested in test_kernels.py."""

from types import SimpleNamespace

import pytest
import torch

from nanofp8 import epilogues
from nanofp8.config import UserError
from nanofp8.epilogues import NO_QUACK, Quack, choose_quack

FP8, FP8_AUTO, BF16, NONE = Quack(True, True), Quack(True, False), Quack(False, True), NO_QUACK
ERROR = None


@pytest.mark.parametrize("wanted, blocks, capability, installed, where, says", [
    ("auto", "fp8-delayed", (9, 0), True, FP8_AUTO, "matmuls by QuACK 0.6"),
    (True, "fp8-delayed", (9, 0), True, FP8, "matmuls by QuACK 0.6"),
    (False, "fp8-delayed", (9, 0), True, NONE, ""),
    ("auto", "fp8-delayed", (9, 0), False, NONE, "no QuACK: gone"),
    (True, "fp8-delayed", (9, 0), False, ERROR, "gone"),
    ("auto", "fp8-delayed", (12, 0), True, NONE, "no QuACK: only on Hopper"),
    (True, "fp8-delayed", (12, 0), True, ERROR, "only on Hopper"),
    ("auto", "bf16", (9, 0), True, BF16, "matmuls by QuACK 0.6"),
    ("auto", "bf16", (9, 1), True, NONE, "no QuACK: its loss in bf16 is not measured on this GPU; --USE_QUACK=True"),
    (True, "bf16", (9, 0), True, BF16, "matmuls by QuACK 0.6"),
    (False, "bf16", (9, 0), True, NONE, ""),
    (True, "bf16", (9, 0), False, ERROR, "gone"),
    ("auto", "bf16", (8, 0), True, NONE, "no QuACK: only on Hopper"),
    ("auto", "", (9, 0), True, NONE, ""),
    (True, "", (9, 0), True, ERROR, "it needs our kernels"),
])
def test_choice(wanted, blocks, capability, installed, where, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(epilogues, "library", lambda: (epilogues, "QuACK 0.6") if installed else (None, "gone"))
    cfg, device = SimpleNamespace(USE_QUACK=wanted), torch.device("cuda")
    if where is ERROR:
        with pytest.raises(UserError, match=f"USE_QUACK=True.*{says}.*--USE_QUACK=auto"):
            choose_quack(cfg, device, blocks)
    else:
        assert choose_quack(cfg, device, blocks) == (where, says)


def test_a_machine_without_it():
    found, text = epilogues.library()
    assert found is not None or "QuACK" in text
