"""procs.py: ranks and what they share, and how a script ends."""

import os
from unittest import mock

import pytest
import torch

import train
from helpers import TRAIN, fails_in_one_line, train_here


def test_too_little_memory_is_one_line(tmp_path, shards, fresh, monkeypatch, capsys):
    """In training; the run folder stays as it is, and what would need less is named."""
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit) as error:
        train_here(tmp_path, shards, batch_size=4)
    line = capsys.readouterr().err
    assert error.value.code == 1 and line.count("\n") == 1 and "--batch_size=2 or --USE_AC_BLOCKS=True" in line
    monkeypatch.setattr(train, "GPT", mock.Mock(side_effect=RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")))
    fails_in_one_line(capsys, 1, "rank 0 has too little memory", out_dir=tmp_path, data_dir=shards)


def test_ctrl_c_before_training_is_one_line(tmp_path, shards, fresh, monkeypatch, capsys):
    monkeypatch.setattr(train, "calibrate", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as error:
        train_here(tmp_path, shards)
    assert error.value.code == 130 and capsys.readouterr().err == f"{os.path.basename(TRAIN)}: stopped by Ctrl-C\n"
    assert not list(tmp_path.iterdir())
