"""The choice of QuACK. Its matmuls are tested in test_kernels.py."""

from types import SimpleNamespace

import pytest
import torch

from nanofp8 import epilogues
from nanofp8.config import UserError
from nanofp8.epilogues import choose_quack


@pytest.mark.parametrize("wanted, fp8, capability, installed, runs", [
    ("auto", True, (9, 0), True, True), (True, True, (9, 0), True, True), (False, True, (9, 0), True, False),
    ("auto", True, (9, 0), False, False), (True, True, (9, 0), False, None), ("auto", True, (12, 0), True, False),
    (True, True, (12, 0), True, None), ("auto", False, (9, 0), True, False), (True, False, (9, 0), True, None),
])
def test_choice(wanted, fp8, capability, installed, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(epilogues, "library", lambda: (epilogues, "QuACK 0.6") if installed else (None, "gone"))
    monkeypatch.setattr(epilogues, "TRIED", ((9, 0),))
    cfg, device = SimpleNamespace(USE_QUACK=wanted), torch.device("cuda")
    if runs is None:
        with pytest.raises(UserError, match="USE_QUACK=True.*--USE_QUACK=auto"):
            choose_quack(cfg, device, fp8)
        return
    chosen, text = choose_quack(cfg, device, fp8)
    assert chosen == runs and bool(text) == (wanted is not False and fp8)
    assert ("gone" in text) == (fp8 and not installed)


def test_a_machine_without_it():
    found, text = epilogues.library()
    assert found is not None or "QuACK" in text
