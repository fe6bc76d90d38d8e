"""procs.py: ranks and what they share, and how a script ends."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from helpers import TRAIN, fails_in_one_line, one_process, train_here
from nanofp8.config import UserError
from nanofp8.procs import Processes, command_line, memory_error_message, report_good_end, start_processes

pytestmark = pytest.mark.usefixtures("fresh")


# -----------------------------------------------------------------------------------------------------
# Ranks


def test_one_process_has_what_it_sums_and_sends(capsys):
    procs = one_process()
    tensor = torch.ones(2)
    assert procs.sum(tensor) is tensor and tensor.tolist() == [1, 1]
    assert procs.broadcast({"a": 1}) == {"a": 1}
    procs.print("once")
    one_process(rank=1, world_size=2).print("not by rank 1")
    assert procs.is_main and capsys.readouterr().out == "once\n"


def test_a_group_of_one_without_torchrun():
    procs = start_processes()
    assert (procs.rank, procs.local_rank, procs.world_size, procs.device) == (0, 0, 1, torch.device("cpu"))
    assert dist.is_initialized() and procs.mesh.size() == 1 and procs.mesh.mesh_dim_names == ("data",)
    again = start_processes()  # another script in the same process joins the group that is there
    assert again.world_size == 1


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2.*has 2.*NPROC") as caught:
        start_processes()
    assert caught.value.status == 2 and not dist.is_initialized()


# -----------------------------------------------------------------------------------------------------
# The end of a script


@pytest.mark.parametrize("local_rank,named,left", [(0, True, True), (1, True, False), (0, False, False)])
def test_a_good_end_leaves_a_file_for_run_sh(tmp_path, monkeypatch, local_rank, named, left):
    monkeypatch.delenv("ENDED_WELL", raising=False)
    if named:
        monkeypatch.setenv("ENDED_WELL", str(tmp_path / "yes"))
    report_good_end(Processes(local_rank, local_rank, 2, torch.device("cpu"), None))
    assert (tmp_path / "yes").exists() == left


def ended_with(capsys, run, world_size=1, **read):
    """Exit status and stderr of command_line() around `run`."""
    with pytest.raises(SystemExit) as stop:
        command_line(run, lambda argv: SimpleNamespace(argv=argv, rank_timeout=9.0), "/x/script.py", [], **read)
    assert not dist.is_initialized()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("status", [1, 2])
def test_a_user_error_is_one_line_with_its_status(capsys, status):
    def run(cfg, procs):
        raise UserError("the disk is full; make room", status)

    assert ended_with(capsys, run) == (status, "script.py: error: the disk is full; make room\n")


def test_a_script_that_succeeds_returns_its_result():
    result = command_line(lambda cfg, procs: (cfg.argv, procs.world_size), lambda argv: SimpleNamespace(argv=argv),
                          "s.py", ["a"])
    assert result == (["a"], 1)
    assert not dist.is_initialized()


def test_another_exception_keeps_its_traceback():
    def run(cfg, procs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command_line(run, lambda argv: SimpleNamespace(), "s.py", [])
    assert not dist.is_initialized()


CFG = SimpleNamespace(batch_size=16, block_size=1, USE_AC_BLOCKS=False, USE_AC_LM_HEAD=True)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_names_the_rank_and_what_needs_less(error):
    """Numbers are halved and switches set, where that is possible."""
    procs = one_process(rank=3, world_size=4)
    line = memory_error_message(error, procs, CFG, list(vars(CFG)))
    assert all(word in line for word in ("rank 3", "memory", "--batch_size=8 or --USE_AC_BLOCKS=True")), line
    assert "block_size" not in line and "USE_AC_LM_HEAD" not in line
    assert "--" not in memory_error_message(error, procs, CFG, [])


def test_other_errors_have_nothing_to_do_with_memory():
    assert memory_error_message(RuntimeError("a shape does not fit"), one_process(), CFG, ["batch_size"]) == ""


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
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4096 bytes.")))
    fails_in_one_line(capsys, 1, "rank 0 has too little memory", out_dir=tmp_path, data_dir=shards)


def test_ctrl_c_before_training_is_one_line(tmp_path, shards, fresh, monkeypatch, capsys):
    monkeypatch.setattr(train, "calibrate", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as error:
        train_here(tmp_path, shards)
    assert error.value.code == 130 and capsys.readouterr().err == f"{os.path.basename(TRAIN)}: stopped by Ctrl-C\n"
    assert not list(tmp_path.iterdir())
