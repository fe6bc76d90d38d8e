"""faults.py: steps that are skipped, ranks that die, runs that are interrupted, disks that fail."""

import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import two_rank_faults

import helpers
import train
from helpers import (
    ROOT,
    TRAIN,
    assert_one_error_line,
    before_step,
    fails_in_one_line,
    finish,
    flag_args,
    in_ckpt,
    learned,
    losses,
    marked_processes,
    poisoned,
    records,
    script_env,
    train_here,
    write_shard,
)
from nanofp8 import faults
from nanofp8.checkpoint import Checkpoints, find_checkpoint
from nanofp8.checkpoint_files import read_checkpoint, steps_of
from nanofp8.faults import Guard, Heartbeat, StopSignal, exit_now
from nanofp8.precision import fp8_state, snapshot_scales
from nanofp8.runlog import Progress

pytestmark = pytest.mark.usefixtures("fresh")

RUN = dict(eval_interval=3, ckpt_interval=1, keep_checkpoints=9)


class Killed(BaseException):
    """End a run in this process as a kill does: nothing in train.py catches this."""


def kill(*_):
    raise Killed


def flat(tree, prefix=""):
    """Flatten nested dicts to {name: tensor}, cloned."""
    if torch.is_tensor(tree):
        return {prefix: tree.detach().clone()}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}").items()}


def saved_states(run):
    """Return what run() returns, {step: {name: tensor}} of all saved model, optimizer and scaling states (no random
    states), and {step: meta}."""
    states, metas, save = {}, {}, Checkpoints.save

    def spied(self, step, make_state, meta):
        states[step] = flat({k: v for k, v in make_state().items() if k != "rng"})
        metas[step] = meta
        return save(self, step, make_state, meta)

    with mock.patch.object(Checkpoints, "save", spied):
        return run(), states, metas


@pytest.fixture(scope="session")
def whole(tmp_path_factory, shards):
    """Train the uninterrupted run."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: False)
    folder, states, metas = saved_states(lambda: train_here(tmp_path_factory.mktemp("whole"), shards, **RUN))
    patch.undo()
    return SimpleNamespace(folder=folder, states=states, metas=metas)


# -----------------------------------------------------------------------------------------------------
# Steps that are not finite


@pytest.mark.parametrize("how", helpers.POISONS)
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, shards, capsys, whole, how):
    """Weights, momenta, Adam's moments and step counts, scales and amax history stay as they were before the step, bit
    for bit. The log says why, and the run continues."""
    with poisoned(how, 3):
        folder, states, metas = saved_states(lambda: train_here(tmp_path, shards, **RUN))
    assert helpers.same_tensors(states[3], whole.states[3]) and helpers.same_tensors(states[4], states[3])
    assert any(name.startswith(".fp8.") for name in states[3]) and any(name.startswith(".optim.") for name in states[3])
    assert metas[4]["muon_momentum"] == metas[3]["muon_momentum"]  # the buffers' own, not the schedule's
    assert not helpers.same_tensors(states[5], states[4]) and all(torch.isfinite(t).all() for t in states[6].values())
    log = records(folder, "train")
    why = "gradient not finite" if "gradient" in how else "loss not finite"
    assert [r.get("skipped") for r in log] == [None] * 3 + [why] + [None] * 2
    assert [r["step"] for r in log] == list(range(6))
    assert log[3]["grad_norm"] is None and (log[3]["loss"] is None) == ("gradient" not in how)
    assert learned(folder, "train")[:3] == learned(whole.folder, "train")[:3] and log[4]["loss"] < 6.1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "SKIPPED" in line]
    assert line.startswith("step 4/6 ") and line.endswith(f"SKIPPED: {why}")


@pytest.mark.slow
@pytest.mark.parametrize("remedy", [True, False])
def test_without_restored_scales_one_step_would_flush_gradients_to_zero(tmp_path, shards, remedy):
    """Gradients of order 1e28, whose norm overflows, would determine the scales until their amax leaves the history."""
    keep = snapshot_scales if remedy else lambda model: lambda: None
    with poisoned("a loss of nan", 3, factor=1e30), mock.patch.object(train, "snapshot_scales", keep):
        folder, states, _ = saved_states(lambda: train_here(tmp_path, shards, **RUN))
    assert records(folder, "train")[3]["skipped"] == "gradient not finite"
    scales = torch.cat([t for name, t in states[6].items() if name.endswith("scaling_bwd.scale")])
    assert (scales < 1e-10).any() != remedy


def test_calibration_on_what_is_not_finite_leaves_the_scales(tmp_path, shards):
    cfg, procs = helpers.make_cfg(data_dir=str(shards)), helpers.one_process()
    model, loader = helpers.make_model(cfg), train.open_data(cfg, procs)[0]
    run = helpers.make_run(cfg, procs, model, loader)
    train.calibrate(run)
    before = flat(fp8_state(model))
    loader.loss_weight *= np.inf
    train.calibrate(run)
    assert helpers.same_tensors(flat(fp8_state(model)), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(USE_FP8=False), dict(FP8_RECIPE="current"), dict(USE_NVFP4=True, n_embd=128)])
def test_other_formats_skip_too(tmp_path, shards, changes):
    with poisoned("an inf inside", 2):
        folder, states, _ = saved_states(lambda: train_here(tmp_path, shards, max_iters=4, ckpt_interval=1,
                                                            keep_checkpoints=9, **changes))
    assert helpers.same_tensors(states[3], states[2]) and not helpers.same_tensors(states[4], states[3])
    assert [bool(r.get("skipped")) for r in records(folder, "train")] == [False, False, True, False]


def test_skipped_steps_are_logged_whatever_the_interval(tmp_path, shards):
    with poisoned("a loss of nan", 2):
        folder = train_here(tmp_path, shards, log_interval=5, keep_checkpoints=0)
    assert [r["step"] for r in records(folder, "train")] == [0, 2, 5]


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(tmp_path, shards, capsys, whole):
    """The run exits with status 1 and names its newest checkpoint, also if it was resumed between the skipped steps.
    Single skipped steps do not add up."""
    def go(**more):
        return dict(out_dir=tmp_path, data_dir=shards, max_bad_steps=2) | RUN | dict(run_name="r") | more

    with poisoned("a loss of nan", 1, 3, 4):
        fails_in_one_line(capsys, 1, "2 consecutive steps were skipped", "the last at step 5 (loss not finite)",
                          f"Newest checkpoint: {tmp_path}/r/ckpt/step_000004", **go())
    log = records(tmp_path / "r", "train")
    assert [bool(r.get("skipped")) for r in log] == [False, True, False, True, True]
    assert read_checkpoint(str(tmp_path / "r" / "ckpt" / "step_000004"))["guard"]["in_a_row"] == 1
    with poisoned("a loss of nan", 0):  # again in the first step after the checkpoint
        fails_in_one_line(capsys, 1, "2 consecutive steps", "step 5", **go(resume="auto"))
    assert train_here(**go(resume="auto")) == tmp_path / "r"
    assert [bool(r.get("skipped"))
            for r in records(tmp_path / "r", "train")] == [False, True, False, True, False, False]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with poisoned("a loss of nan", 0, 1):
        fails_in_one_line(capsys, 1, "Newest checkpoint: none", **go(run_name="none", ckpt_interval=0))
    # a process that trains on, as bench.py's does, finds things as they were
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers


# -----------------------------------------------------------------------------------------------------
# Spikes


def guard(**changes):
    return Guard(helpers.make_cfg(**dict(skip_loss_zscore=3.0, skip_grad_zscore=3.0, zscore_window=4) | changes))


def test_a_spike_is_judged_by_the_window():
    """The mean is 2 and the standard deviation 0.5: loss or norm above 3.5 is skipped; nothing below the mean is."""
    g = guard()
    for value in (1.5, 2.5, 1.5, 2.5):
        assert g.check(value, value + 100) == ""
    assert g.check(3.6, 102) == "loss 3.2 standard deviations above its mean"
    assert g.check(2.0, 103.6) == "gradient 3.2 standard deviations above its mean" and g.in_a_row == 2
    assert g.check(3.4, 102) == "" and g.in_a_row == 0
    assert g.check(-50.0, 102) == ""
    assert list(g.windows["loss"]) == [1.5, 2.5, 3.4, -50.0]


def test_skipped_steps_do_not_enter_the_window():
    """After many infinities, NaNs and spikes, the next normal value passes and the next spike is skipped."""
    g = guard()
    for value in (1.5, 2.5, 1.5, 2.5):
        g.check(value, value)
    window = list(g.windows["loss"])
    for bad in (np.nan, np.inf, -np.inf, 50.0) * 5:
        assert g.check(bad, 2.0) and g.check(2.0, bad)
    assert list(g.windows["loss"]) == list(g.windows["gradient"]) == window and g.in_a_row == 40
    assert g.check(2.0, 2.0) == "" and g.check(9.0, 2.0)


def test_no_outliers_without_a_full_window_or_a_spread():
    g = guard()
    assert not any(g.check(value, 1.0) for value in (1.0, 100.0, 1.0, 1.0))
    flat_window = guard(zscore_window=2)
    assert not any(flat_window.check(value, 1.0) for value in (1.0, 1.0, 5.0))
    off = guard(skip_loss_zscore=0.0, skip_grad_zscore=0.0)
    assert not any(off.check(value, value) for value in (1.0, 2.0, 1.0, 2.0, 1e9)) and off.state_dict()["windows"] == {}
    assert off.check(np.nan, 1.0) == "loss not finite" and off.check(1.0, np.inf) == "gradient not finite"


def test_a_guard_continues_from_its_state():
    a = guard()
    for value in (1.5, 2.5, 1.7, 2.5, 99.0):
        a.check(value, value)
    b = Guard(helpers.make_cfg(skip_loss_zscore=3.0, skip_grad_zscore=3.0, zscore_window=4),
              json.loads(json.dumps(a.state_dict())))
    assert b.state_dict() == a.state_dict() and b.in_a_row == 1 and a.check(7.0, 2.0) == b.check(7.0, 2.0) != ""


def test_the_gradient_limit_that_auto_stands_for():
    """It is given by the caller. A number in the flag beats it, also 0."""
    def limits(flag, auto):
        return Guard(helpers.make_cfg(skip_grad_zscore=flag), auto_grad_zscore=auto).limits

    assert limits("auto", 8.0) == {"gradient": 8.0} and limits("auto", 0.0) == limits(0, 8.0) == {}
    assert limits(3.5, 8.0) == {"gradient": 3.5} and Guard(helpers.make_cfg()).limits == {}
    assert str(guard(skip_grad_zscore=8)) == ("not finite or a loss 3 deviations above the mean or a gradient norm "
                                              "8 deviations above the mean")
    assert str(guard(skip_loss_zscore=0, skip_grad_zscore=0)) == "not finite"


SPIKES = dict(skip_loss_zscore=6.0, zscore_window=3)


@pytest.mark.slow
def test_a_spike_is_skipped_and_a_resumed_run_knows_the_window(tmp_path, shards):
    """The loss of step 4 is ten times too large. A run that is resumed after step 3 has too few new steps to fill its
    window of three, and still writes the same log."""
    with poisoned("a loss of nan", 4, factor=10.0):
        want, states, _ = saved_states(lambda: train_here(tmp_path, shards, run_name="whole", **RUN | SPIKES))
    log = records(want, "train")
    assert [bool(r.get("skipped")) for r in log] == [False] * 4 + [True, False]
    assert "standard deviations" in log[4]["skipped"]
    assert log[4]["loss"] > 40 and helpers.same_tensors(states[5], states[4])
    with before_step(3, kill), pytest.raises(Killed):
        train_here(tmp_path, shards, run_name="r", **RUN | SPIKES)
    done = steps_of(find_checkpoint(str(tmp_path / "r")))  # 2, or 3 where the last one was whole in time
    with poisoned("a loss of nan", 4 - done, factor=10.0):
        train_here(tmp_path, shards, run_name="r", resume="auto", **RUN | SPIKES)
    assert learned(tmp_path / "r") == learned(want)


# -----------------------------------------------------------------------------------------------------
# Broken off where it hurts


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_schedulers_stop_a_run(number):
    """Slurm, SGE and OAR send them before the time ends. Python's default would kill the process."""
    before = signal.getsignal(number)
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_sighup_stops_a_run_unless_it_was_ignored_at_the_start():
    """nohup ignores it for its command. It is put back as it was, whatever that was."""
    for before, ours in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        signal.signal(signal.SIGHUP, before)
        with StopSignal() as stop:
            assert (signal.getsignal(signal.SIGHUP) == stop.request) == ours
            os.kill(os.getpid(), signal.SIGHUP)
            assert bool(stop.requested) == ours
        assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.slow
def test_checkpoints_by_minutes(tmp_path, shards):
    often = train_here(tmp_path, shards, run_name="a", ckpt_interval=0, ckpt_minutes=1e-9, keep_checkpoints=9)
    assert in_ckpt(often) == [f"step_{s:06d}" for s in range(1, 7)]
    seldom = train_here(tmp_path, shards, run_name="b", ckpt_interval=4, ckpt_minutes=60, keep_checkpoints=9)
    assert in_ckpt(seldom) == ["step_000004", "step_000006"]

    def slow_step(run, step=train.train_step):
        run.last_save -= 400  # as if the step took this many seconds
        return step(run)

    with mock.patch.object(train, "train_step", slow_step):
        now_and_then = train_here(tmp_path, shards, run_name="c", ckpt_interval=0, ckpt_minutes=20, keep_checkpoints=9)
    assert in_ckpt(now_and_then) == ["step_000003", "step_000006"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before done", "before the last evaluation"])
def test_a_run_killed_after_its_last_checkpoint_is_finished(tmp_path, shards, capsys, whole, where):
    """The restarted run makes the evaluation if it is missing, writes `done` once and trains nothing. One more start is
    refused."""
    changes = RUN | dict(run_name="r")
    with pytest.raises(Killed):
        if where == "before done":
            with mock.patch.object(Progress, "done", kill):
                train_here(tmp_path, shards, **changes)
        else:  # a signal in the last step: the checkpoint goes first
            evaluations, real = [], train.evaluate

            def count(*args):
                evaluations.append(1)
                return kill() if len(evaluations) == 2 else real(*args)

            with before_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)), \
                    mock.patch.object(train, "evaluate", count):
                train_here(tmp_path, shards, **changes)
    assert not records(tmp_path / "r", "done") and in_ckpt(tmp_path / "r")[-1] == "step_000006"
    with mock.patch.object(train, "train_step", lambda *args: pytest.fail("a step was taken")):
        assert train_here(tmp_path, shards, resume="auto", **changes) == tmp_path / "r"
    assert learned(tmp_path / "r") == learned(whole.folder)
    (done,) = records(tmp_path / "r", "done")
    assert done["tok_per_sec_median"] > 0 and "done: val loss" in capsys.readouterr().out
    fails_in_one_line(capsys, 2, "step_000006 has 6 steps", "max_iters is 6", "raise --max_iters", out_dir=tmp_path,
                      data_dir=shards, resume="auto", **changes)


@pytest.mark.slow
def test_a_run_killed_in_its_first_evaluation_gets_it(tmp_path, shards, whole):
    def evaluate(*args):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and "step_000003" not in in_ckpt(tmp_path / "r"):
            args[-1]()  # gives a checkpoint that is on disk its name
        kill()

    with mock.patch.object(train, "evaluate", evaluate), pytest.raises(Killed):
        train_here(tmp_path, shards, run_name="r", **RUN)
    assert in_ckpt(tmp_path / "r")[-1] == "step_000003" and not records(tmp_path / "r", "val")
    train_here(tmp_path, shards, run_name="r", resume="auto", **RUN)
    assert learned(tmp_path / "r") == learned(whole.folder)
    assert [r["step"] for r in records(tmp_path / "r", "val")] == [2, 5]


@pytest.mark.slow
def test_started_again_by_torchrun(tmp_path, shards, monkeypatch, capsys, whole):
    """With --max-restarts the run continues in its own folder although `resume` was not given, and although a finished
    run and a newer one have its name. Another torchrun's run is left alone."""
    train_here(tmp_path, shards, run_name="r", **RUN)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with before_step(4, kill), pytest.raises(Killed):
        train_here(tmp_path, shards, run_name="r", **RUN)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    train_here(tmp_path, shards, run_name="r", **RUN)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for name, text in (("not ours", "[]"), ("half", '{"torchrun": "mine"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = {name: (tmp_path / name / "log.jsonl").read_bytes() for name in ("r", "r-3")}
    assert train_here(tmp_path, shards, run_name="r", **RUN) == tmp_path / "r-2"
    assert learned(tmp_path / "r-2") == learned(whole.folder)
    assert train_here(tmp_path, shards, run_name="r", **RUN) == tmp_path / "r-2"  # nothing is left to do: no failure
    assert learned(tmp_path / "r-2") == learned(whole.folder)
    assert all((tmp_path / name / "log.jsonl").read_bytes() == log for name, log in before.items())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "killed before its first checkpoint")
    capsys.readouterr()
    assert train_here(tmp_path, shards, run_name="r", **RUN) == tmp_path / "r-4"
    assert "starting a new run" in capsys.readouterr().out


# -----------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.slow
def test_a_folder_that_vanishes(tmp_path, shards, capsys, whole):
    """The run reports it and trains to its end; log, config and later checkpoints are written again."""
    def delete():
        while (tmp_path / "r").exists():  # a checkpoint is being written into it
            shutil.rmtree(tmp_path / "r", ignore_errors=True)

    with before_step(3, delete):
        train_here(tmp_path, shards, run_name="r", **RUN)
    out = capsys.readouterr().out
    assert "done: val loss" in out
    assert find_checkpoint(str(tmp_path / "r")) == str(tmp_path / "r" / "ckpt" / "step_000006")
    assert f"{records(whole.folder, 'val')[-1]['val_loss']:.4f}" in out
    assert out.count("log.jsonl was deleted") == 1
    assert learned(tmp_path / "r") == learned(whole.folder)
    fails_in_one_line(capsys, 2, "has 6 steps", "raise --max_iters", out_dir=tmp_path, data_dir=shards, run_name="r",
                      resume="auto", **RUN)


@pytest.mark.slow
def test_a_stop_whose_checkpoint_cannot_be_written_is_a_failure(tmp_path, shards, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with before_step(3, lambda: (os.kill(os.getpid(), signal.SIGTERM), setattr(dcp, "save", full))), \
            mock.patch.object(dcp, "save", dcp.save):
        fails_in_one_line(capsys, 1, "stopped by a signal after 4 steps", "could not be written",
                          f"Newest checkpoint: {tmp_path}/r/ckpt/step_000003",
                          out_dir=tmp_path, data_dir=shards, run_name="r", **RUN)


@pytest.mark.slow
def test_no_checkpoint_while_steps_are_skipped(tmp_path, shards, capsys):
    """Neither non-finite weights nor weights whose steps are all skipped are saved: they would replace good
    checkpoints. The error at the end names a checkpoint from which training continues."""
    run = dict(out_dir=tmp_path, data_dir=shards, run_name="r", **RUN | dict(keep_checkpoints=1, ckpt_interval=1))
    folder, train_step = train_here(**run | dict(max_iters=3)), train.train_step

    def spoiled(run):  # the weights overflow in a step whose gradients were finite
        result = train_step(run)
        run.model.head.weight.data[0, 0] = torch.inf
        return result

    with mock.patch.object(train, "train_step", spoiled), \
            mock.patch.object(Checkpoints, "report_failure", autospec=True,
                              side_effect=Checkpoints.report_failure) as failed:
        fails_in_one_line(capsys, 1, "4 consecutive steps were skipped",
                          f"Newest checkpoint: {folder}/ckpt/step_000003",
                          **run | dict(max_iters=30, resume="auto", max_bad_steps=4))
    assert [(call.args[1], call.args[3]) for call in failed.call_args_list] == [
        (4, "weights or optimizer state are not finite")]
    assert in_ckpt(folder) == ["step_000003"]
    train_here(**run | dict(max_iters=6, resume="auto"))
    assert in_ckpt(folder) == ["step_000006"] and np.isfinite(losses(folder)).all()


# -----------------------------------------------------------------------------------------------------
# Ranks that die. QUICK steps fast, and for long

QUICK = dict(n_layer=1, block_size=16, batch_size=4, total_batch_size=128, eval_interval=0, eval_tokens=64,
             FP8_AMAX_HISTORY=4)
ENDLESS = QUICK | dict(max_iters=100_000, warmup_iters=0, ckpt_interval=10, log_interval=10)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_pair(forker, folder, data, script=TRAIN, data_of_rank_1=None, **changes):
    """Start two ranks without torchrun, as on two machines: nothing ends one when the other dies."""
    data = data, data_of_rank_1 or data
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    return [forker.start(script, *flag_args(data_dir=data[rank], **ENDLESS | changes), cwd=folder, RANK=str(rank),
                         LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank in range(2)]


def wait_for_step(process):
    """Read a process's output until it has logged a step."""
    helpers.read_until(process, lambda line: line.startswith("step ") and "| loss" in line)


SLOW = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
from nanofp8.runlog import Progress

def slowly(function, rank):
    waits = [8] if os.environ["RANK"] == rank else []  # once: an evaluation comes in each number format
    return lambda *args: time.sleep(waits.pop() if waits else 0) or function(*args)

train.evaluate = slowly(train.evaluate, "1")
Progress.done = slowly(Progress.done, "0")
train.main()
"""
DEAD = [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL), (0, signal.SIGSTOP)]


@pytest.fixture(scope="module")
def pairs(forker, shards, tmp_path_factory):
    """How pairs of ranks ended: {name: two results}. They wait for their timeouts at the same time.

    A result has code, out, err, and seconds since the signal that its pair got.
    """
    folder, signalled = tmp_path_factory.mktemp("pairs"), {}
    (folder / "bad").mkdir()
    (folder / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    tokens = helpers.markov_tokens(6000, seed=1)
    tokens[4096 + 64 + 5] = 600
    write_shard(folder / "bad" / "synthetic" / "s_train_000001.bin", tokens)
    shutil.copy(shards / "synthetic" / "s_val_000000.bin", folder / "bad" / "synthetic")
    started = {"error": start_pair(forker, folder / "error", folder / "bad", rank_timeout=6),
               "slow": start_pair(forker, folder / "slow", shards, folder / "slow.py", max_iters=3, ckpt_interval=0,
                                  rank_timeout=6),
               "no data": start_pair(forker, folder / "one", shards, rank_timeout=6, data_of_rank_1=folder / "none"),
               "no data at all": start_pair(forker, folder / "both", folder / "none", rank_timeout=6)}
    try:
        started["shorter"] = start_pair(forker, folder / "shorter", shards, rank_timeout=90)
        wait_for_step(started["shorter"][0])
        started["shorter"][1].send_signal(signal.SIGSTOP)
        stuck = time.monotonic() + 3
        for dead, number in DEAD:
            pair = start_pair(forker, folder / f"dead-{dead}-{number}", shards, rank_timeout=6)
            started[dead, number] = pair
            wait_for_step(pair[0])
            pair[dead].send_signal(number)
            signalled[dead, number] = time.time()
        time.sleep(max(0, stuck - time.monotonic()))
        started["shorter"][0].send_signal(signal.SIGTERM)
        signalled["shorter"] = time.time()
        survivors = {**{(dead, number): [1 - dead] for dead, number in DEAD}, "shorter": [0]}
        results = {}
        for name, pair in started.items():
            results[name] = {rank: finish(pair[rank], timeout=120) for rank in survivors.get(name, (1, 0))}
            for rank, result in results[name].items():
                result.seconds = pair[rank].ended - signalled.get(name, 0)
        return results
    finally:
        for pair in started.values():
            for process in pair:
                process.kill()


@pytest.mark.parametrize("dead,number", DEAD)
def test_a_dead_rank_ends_the_other_and_is_named(pairs, dead, number):
    """A killed rank breaks the connection; a stopped one is only silent. Rank 0 holds the store for the heartbeats."""
    other = pairs[dead, number][1 - dead]
    assert other.seconds < 30
    assert other.code == 1 and "Traceback" not in other.err  # torch's own C++ warnings come before our line
    line = other.err.splitlines()[-1]
    assert line.startswith("train.py: error: ") and f"rank {dead} has not responded for" in line, other.err
    assert "--resume=auto" in line


def test_a_signal_shortens_the_wait_for_a_dead_rank(pairs):
    """torchrun sends SIGTERM to the other ranks when one has died. Stuck in a collective, they must not wait for the
    whole timeout."""
    result = pairs["shorter"][0]
    assert result.seconds < 25
    assert result.code == 1 and "rank 1 has not responded for 10 s" in result.err.splitlines()[-1], result.err


def test_an_error_on_one_rank_ends_both(pairs):
    """Only rank 1 reads a token id beyond the vocabulary. It prints the error, and rank 0 names rank 1."""
    assert_one_error_line(pairs["error"][1], 1, "token id 600")
    assert_one_error_line(pairs["error"][0], 1, "rank 1 has not responded")


def test_data_missing_on_one_machine_is_said_there(pairs):
    """Rank 0 waits for rank 1, and ends after the timeout. Where both lack data, only rank 0 says so."""
    one, both = pairs["no data"], pairs["no data at all"]
    assert_one_error_line(one[1], 1, "no train shards")
    assert "rank 1" in one[1].err
    assert_one_error_line(one[0], 1, "rank 1 has not responded")
    assert_one_error_line(both[0], 1, "no train shards")
    assert both[1].code == 1 and "train.py" not in both[1].err  # torch may say that the store of rank 0 has gone


def test_slow_ranks_are_not_missed(pairs):
    """Rank 1 takes longer than the timeout for an evaluation; rank 0 does for the end, after rank 1 has left."""
    assert [pairs["slow"][rank].code for rank in (0, 1)] == [0, 0], pairs["slow"]


@pytest.mark.parametrize("console", ["works", "reader has gone", "closed", "blocks"])
def test_a_rank_that_cannot_print_still_ends(monkeypatch, console):
    """It ends with its status, at once; a console that blocks delays it by a second."""
    read, write = os.pipe()
    release = threading.Event()

    class Blocked(io.StringIO):
        def write(self, text):
            release.wait(30)

    if console == "blocks":
        stream = Blocked()
    else:
        stream = os.fdopen(write, "w")
        if console == "reader has gone":
            os.close(read)
        elif console == "closed":
            stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    begin = time.monotonic()
    exit_now("train.py: error: rank 1 has not responded", 1)
    seconds = time.monotonic() - begin
    release.set()
    assert ended == [1] and (0.9 < seconds < 5 if console == "blocks" else seconds < 0.9)
    if console == "works":
        assert os.read(read, 1000) == b"train.py: error: rank 1 has not responded\n"


def test_a_silent_rank_ends_this_one_without_a_console(monkeypatch):
    """The heartbeat's thread ends the process though nobody reads stderr."""
    ended, store = threading.Event(), dist.HashStore()
    store.set("heartbeat/1", "0")
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stderr", os.fdopen(write, "w"))

    monkeypatch.setattr(os, "_exit", lambda status: ended.set() or heartbeat.closing.wait())
    heartbeat = Heartbeat(store, 0, 2, 2)
    try:
        assert ended.wait(15)
    finally:
        heartbeat.close()


@pytest.mark.parametrize("paused", [True, False])
def test_a_pause_of_all_ranks_is_not_the_death_of_one(monkeypatch, paused):
    """The clock jumps by 100 s between two looks of the heartbeat's thread, or 1 s at a time; rank 1 is silent."""
    added, ended, store = [0.0], threading.Event(), dist.HashStore()
    store.set("heartbeat/1", "0")
    clock = time.monotonic
    monkeypatch.setattr(faults.time, "monotonic", lambda: clock() + added[0])
    monkeypatch.setattr(faults, "exit_now", lambda *_: ended.set() or heartbeat.closing.wait())
    heartbeat = Heartbeat(store, 0, 2, 12)
    try:
        time.sleep(1.2)
        for _ in range(1 if paused else 30):
            added[0] += 100 if paused else 1
            if ended.wait(1.0):
                break
        assert ended.wait(2.5) != paused
    finally:
        heartbeat.close()


# -----------------------------------------------------------------------------------------------------
# run.sh with torchrun


def run_sh(cwd, *args, **env):
    """Start `bash run.sh` in a process group of its own, with this python."""
    return subprocess.Popen(["bash", str(ROOT / "run.sh"), *args], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            env=script_env(PYTHON=sys.executable, PYTHONUNBUFFERED="1", **env), start_new_session=True)


def workers(process):
    """Return {rank: pid} of the processes that run train.py below a run.sh."""
    mark = f"OF_RUN_SH={os.getpid()}.{process.args[2]}"
    return {int(environment[b"RANK"]): pid for pid, environment, command in marked_processes(mark)
            if b"RANK" in environment and b"train.py" in command}


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="no /proc")


@pytest.mark.slow
def test_wrong_input_under_run_sh_with_two_processes(tmp_path, shards):
    """One line, the worker's status, and no traceback of torchrun."""
    result = finish(run_sh(tmp_path,
                           *flag_args(data_dir=shards, out_dir=tmp_path / "out", **QUICK | dict(total_batch_size=1000)),
                           NPROC="2"), timeout=120)
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert sum("train.py: error:" in line for line in result.err.splitlines()) == 1 and "total_batch_size" in result.err


@pytest.mark.slow
@needs_proc
def test_run_sh_with_two_processes(tmp_path, shards):
    """Three runs side by side. SIGTERM to run.sh alone: status 0 and a checkpoint. A rank killed without restarts:
    status 1 and its number. A rank killed with one restart: the run continues in its own folder from its newest
    checkpoint, and its log is complete."""
    out = tmp_path / "out"
    done = train_here(out, shards, run_name="again", **QUICK | dict(max_iters=4))  # a finished run of the same name
    runs = {}
    for name, changes, env in (("again", dict(max_iters=100), dict(MAX_RESTARTS="1")), ("stop", {}, {}),
                               ("die", {}, {})):
        args = flag_args(data_dir=shards, out_dir=out, run_name=name, **ENDLESS | changes)
        runs[name] = run_sh(tmp_path, f"--run_name={name}", *args, NPROC="2",
                            OF_RUN_SH=f"{os.getpid()}.--run_name={name}", **env)
    try:
        for name, process in runs.items():
            helpers.read_until(process, lambda line: "checkpoint started" in line and "step 10/" not in line)
            if name == "stop":
                process.send_signal(signal.SIGTERM)
            else:
                os.kill(workers(process)[1], signal.SIGKILL)
        results = {name: finish(process, timeout=120) for name, process in runs.items()}
    finally:
        for process in runs.values():
            process.kill()
            for pid in workers(process).values():
                os.kill(pid, signal.SIGKILL)
    stop, die, again = results["stop"], results["die"], results["again"]
    assert stop.code == 0, stop.err
    steps = int(stop.out.split("stopped by a signal after ")[1].split()[0])
    assert in_ckpt(out / "stop")[-1] == f"step_{steps:06d}" and "training ended well after SIGTERM" in stop.err
    assert die.code == 1 and "stopped by a signal" not in die.out
    assert "rank 1 has not responded" in die.err and "(exitcode: -9) local_rank: 1" in die.err  # ours, and torchrun's
    assert not any("Traceback" in r.err for r in results.values())
    assert again.code == 0, again.err
    assert "resumed from" in again.out and str(out / "again-2") in again.out
    log = records(out / "again-2")
    assert [r["step"] for r in log if r["kind"] == "train"] == [*range(0, 100, 10), 99] and log[-1]["kind"] == "done"
    assert len(records(done, "train")) == 4  # the other one was left alone


def test_the_table_of_faults_names_tests_that_exist():
    """results/FAULTS.md: a letter for a file, then names of its tests."""
    text = (ROOT / "results" / "FAULTS.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^\| ([A-Z]) \| `(tests/\w+\.py)` \|$", text, re.M))
    defined = {letter: set(re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), re.M))
               for letter, path in files.items()}
    named, rows = [], re.findall(r"^\|.*\|$", text, re.M)
    for row in rows:
        for letter, names in re.findall(r"\b([A-Z]) ((?:`test_\w+`(?:, )?)+)", row.rstrip("| ").rpartition("|")[2]):
            named += [(letter, name) for name in re.findall(r"test_\w+", names)]
    assert len(named) == "".join(rows).count("`test_") > 100
    assert not [pair for pair in named if pair[1] not in defined[pair[0]]]


# -----------------------------------------------------------------------------------------------------
# What tests/gpu/test_faults_gpu.py does on two GPUs


@pytest.mark.slow
@pytest.mark.skipif("ALL_FAULTS" not in os.environ, reason="takes 25 s, and test_run_sh_with_two_processes and "
                    "test_checkpoint.py test nearly the same; set ALL_FAULTS=1")
def test_faults_of_two_ranks_in_processes_of_their_own(tmp_path, shards):
    """Afterwards, losses are those of the run that nothing happened to, bit for bit."""
    faults = two_rank_faults.run_faults(tmp_path, flag_args(data_dir=shards, **QUICK))
    for check in (two_rank_faults.check_killed_rank, two_rank_faults.check_full_disk,
                  two_rank_faults.check_damaged_checkpoint):
        check(faults, 0.0)
