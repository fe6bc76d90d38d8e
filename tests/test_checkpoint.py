"""checkpoint.py: resuming over wrappers and ranks, kills, refused and damaged checkpoints.

Runs of one process happen in this process. Runs of two ranks (RANKS) happen one after another in one pair of processes
(WORKER). Runs that are killed happen in many processes, forked from one that has imported everything (KILLER).
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import two_rank_faults

import helpers
import sample
import train
from helpers import (
    PARTS,
    ROOT,
    TRAIN,
    assert_one_error_line,
    before_step,
    copy_of_run,
    finish,
    flag_args,
    in_ckpt,
    learned,
    losses,
    parameters_seen,
    records,
    same_tensors,
    start,
    train_here,
)
from nanofp8 import checkpoint, resuming, runlog
from nanofp8.checkpoint import ADDED_FLAGS, Checkpoints, find_checkpoint, restore
from nanofp8.checkpoint_files import (
    DamagedCheckpoint,
    complete_checkpoints,
    load_tensors,
    load_weights,
    read_checkpoint,
)
from nanofp8.config import UserError
from nanofp8.muon import TorchMuon
from nanofp8.precision import fp8_state
from nanofp8.procs import Processes, start_processes
from nanofp8.runlog import FolderLock

pytestmark = pytest.mark.usefixtures("fresh")

# Six steps, evaluated after 3 and 6, with all checkpoints
RUN = dict(eval_interval=3, ckpt_interval=1, keep_checkpoints=9)
# FSDP2 rounds the residual's scalars to bf16; at their default rate the losses would move by more than ACROSS_GAP
NORMUON_PARTS = PARTS | dict(muon_variant="normuon", learning_rate_x0=0.05)
RAMP = dict(batch_ramp="0.3", batch_size=2)  # three steps of 128 tokens, three of 256
WHOLE = {
    "fp8": RUN, "bf16": RUN | dict(USE_FP8=False, batch_size=4),
    "nvfp4": RUN | dict(USE_NVFP4=True, n_embd=128, max_iters=4),
    "parts": RUN | NORMUON_PARTS, "ramp": RUN | RAMP,
}


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, shards):
    """Train uninterrupted runs of one process: {name: run folder and saved parameters}."""
    out, patch, runs = tmp_path_factory.mktemp("whole"), pytest.MonkeyPatch(), {}
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.delenv(name, raising=False)
    for name, changes in WHOLE.items():
        with parameters_seen() as seen:
            runs[name] = SimpleNamespace(folder=train_here(out, shards, run_name=name, **changes), saved=seen.saved)
    patch.undo()
    return runs


def read_weights(folder, like):
    """Read a checkpoint by load_weights() into new tensors with the names, shapes and dtypes of `like`."""
    tensors = {name: torch.full_like(p, torch.nan) for name, p in like.items()}
    load_weights(str(folder), tensors)
    return tensors


def refused(capsys, out_dir, data_dir, code, *words, **changes):
    """Check that a run in this process exits with `code` and one line on stderr that contains all words; return the
    line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_here(out_dir, data_dir, **changes)
    result = SimpleNamespace(code=stop.value.code, err=capsys.readouterr().err)
    assert_one_error_line(result, code, *map(str, words))
    return result.err


class Killed(BaseException):
    """End a run in this process as a kill does: nothing in train.py catches this."""


def kill():
    raise Killed


# -----------------------------------------------------------------------------------------------------
# A resumed run equals the uninterrupted one, bit for bit


@pytest.mark.parametrize("name,step", [("fp8", 2), ("nvfp4", 1), ("parts", 3), ("ramp", 3), *[
    pytest.param(*case, marks=pytest.mark.slow) for case in (("fp8", 1), ("fp8", 4), ("bf16", 3), ("nvfp4", 3))]])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, shards, one_rank, name, step):
    """All of log.jsonl is equal except for times. The interrupted run had already written its `done` record and half a
    line. After one step, delayed scaling still has a calibration pass to make. NVFP4 rounds stochastically, so its
    generator must continue too."""
    want = one_rank[name]
    folder = copy_of_run(want.folder, tmp_path / "r", step)
    with parameters_seen() as seen:
        assert train_here(tmp_path, shards, resume=folder, **WHOLE[name]) == folder
    steps = WHOLE[name].get("max_iters", 6)
    assert learned(folder) == learned(want.folder)
    assert [r["step"] for r in records(folder, "train")] == list(range(steps)) and len(records(folder, "done")) == 1
    assert same_tensors(seen.restored, want.saved[step])
    assert sorted(seen.saved) == list(range(step + 1, steps + 1))
    assert all(same_tensors(seen.saved[s], want.saved[s]) for s in seen.saved)
    assert os.listdir(tmp_path) == ["r"]  # no second run folder


@pytest.mark.slow
def test_saving_does_not_touch_training(tmp_path, shards, one_rank):
    folder = train_here(tmp_path, shards, **RUN | dict(ckpt_interval=0, keep_checkpoints=0))
    assert learned(folder) == learned(one_rank["fp8"].folder) and not (folder / "ckpt").exists()


def test_a_growing_batch_in_the_log_and_in_the_checkpoint(one_rank):
    """Three steps of 128 tokens, three of 256."""
    folder = one_rank["ramp"].folder
    assert [r["tokens"] for r in records(folder, "train")] == [128, 256, 384, 640, 896, 1152]
    assert all(r["tok_per_sec"] * r["step_ms"] / 1000 == pytest.approx(128 if r["step"] < 3 else 256)
               for r in records(folder, "train"))
    assert records(folder, "done")[0]["tokens"] == records(folder, "val")[-1]["tokens"] == 1152
    metas = [read_checkpoint(str(folder / "ckpt" / f"step_{step:06d}")) for step in (2, 4)]
    assert [meta["tokens"] for meta in metas] == [256, 640]
    assert [meta["stages"] for meta in metas] == [[[0, 128], [3, 256]]] * 2


@pytest.mark.parametrize("step,length", [(2, dict(max_iters=9)), (5, dict(train_tokens=1920)), (3, dict(max_iters=4))])
def test_a_run_with_a_growing_batch_gets_another_length(tmp_path, shards, one_rank, step, length):
    """It keeps the step at which its batch grows, so that tokens stay a function of the step: nothing is read twice or
    left out, and train_tokens is what it ends with."""
    folder = copy_of_run(one_rank["ramp"].folder, tmp_path / "r", step)
    flags = {name: value for name, value in WHOLE["ramp"].items() if name != "max_iters"}
    arguments = [a for a in helpers.flag_args(**flags, **length, resume=folder, data_dir=shards, out_dir=tmp_path)
                 if "max_iters" in length or not a.startswith("--max_iters")]
    with mock.patch.object(runlog.RunLog, "plot"):
        train.main(arguments)
    tokens = [r["tokens"] for r in records(folder, "train")]
    assert tokens == [128, 256, 384, *range(640, 1921, 256)][:length.get("max_iters", 9)]
    meta = read_checkpoint(str(folder / "ckpt" / f"step_{len(tokens):06d}"))
    assert meta["tokens"] == tokens[-1] == records(folder, "done")[0]["tokens"]
    assert meta["stages"] == [[0, 128], [3, 256]]


@pytest.mark.slow
def test_a_finished_run_is_extended(tmp_path, shards):
    """With a learning rate that does not depend on max_iters, it equals the longer run. The earlier `done` record is
    removed; the evaluation at the earlier end stays."""
    flat = dict(min_lr_ratio=1, weight_decay_end=1, ckpt_interval=3)
    folder = train_here(tmp_path, shards, run_name="r", max_iters=4, **flat)
    assert len(records(folder, "done")) == 1
    assert train_here(tmp_path, shards, run_name="r", max_iters=7, resume="auto", **flat) == folder
    longer = train_here(tmp_path, shards, run_name="longer", max_iters=7, **flat)
    assert learned(folder, "train") == learned(longer, "train")
    assert [(r["kind"], r["step"]) for r in records(folder)] == [
        *[("train", s) for s in range(4)], ("val", 3), *[("train", s) for s in range(4, 7)], ("val", 6), ("done", 6)]
    assert learned(folder)[-1] == learned(longer)[-1]


@pytest.mark.slow
def test_training_seconds_continue(tmp_path, shards, one_rank):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 4)
    train_here(tmp_path, shards, resume=folder, **RUN)
    before = {r["step"]: r["step_ms"] for r in records(folder, "train")}
    (done,) = records(folder, "done")
    assert done["train_seconds"] == pytest.approx(sum(before.values()) / 1000, rel=1e-6)


def test_a_checkpoint_is_complete_and_plain(one_rank):
    """meta.json describes the checkpoint, and one process can load its weights into plain tensors."""
    run = one_rank["fp8"]
    assert in_ckpt(run.folder) == [f"step_{s:06d}" for s in range(1, 7)]
    folder = run.folder / "ckpt" / "step_000004"
    meta = read_checkpoint(str(folder))
    assert meta["step"] == 4 and meta["tokens"] == 4 * 256 and meta["world_size"] == 1
    assert meta["loader"] == {"step": 4, "micro_batch": 0} and meta["parameters"] == 164160
    assert meta["flags"]["n_embd"] == 64 and meta["muon"] == "torch"
    assert same_tensors(read_weights(folder, run.saved[4]), run.saved[4])
    with pytest.raises(UserError, match="cannot load.*no_such"):
        load_weights(str(folder), {"no_such.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="cannot load"):
        load_weights(str(folder), {"head.weight": torch.zeros(3, 3)})


# -----------------------------------------------------------------------------------------------------
# Stopped in an orderly way


@pytest.mark.slow
@pytest.mark.parametrize("number,step",
                         [(signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGHUP, 1), (signal.SIGTERM, 5)])
def test_a_signal_stops_the_run_with_a_checkpoint(tmp_path, shards, capsys, one_rank, number, step):
    """After a signal during a step, the run saves a checkpoint and ends within two steps. The resumed run equals the
    uninterrupted one, with the evaluation of the step it stopped at. A signal in the last step changes nothing."""
    before = signal.getsignal(number)
    changes = RUN | dict(run_name="r", ckpt_interval=0)
    with before_step(step, lambda: os.kill(os.getpid(), number)):
        folder = train_here(tmp_path, shards, **changes)
    assert signal.getsignal(number) is before
    out = capsys.readouterr().out
    if step < 5:
        done = len(losses(folder))
        assert step < done <= step + 2 and not records(folder, "done")
        assert in_ckpt(folder) == [f"step_{done:06d}"]
        assert f"stopped by a signal after {done} steps" in out and "--resume=auto" in out
        assert train_here(tmp_path, shards, resume="auto", **changes) == folder
        assert f"step_{done:06d}, after {done} steps" in capsys.readouterr().out
    assert learned(folder) == learned(one_rank["fp8"].folder)


@pytest.mark.slow
def test_no_semaphores_are_needed(tmp_path, shards):
    """They lie in /dev/shm, which a container may have read-only."""
    with mock.patch("multiprocessing.synchronize.SemLock.__init__", side_effect=OSError(errno.EROFS, "Read-only")):
        train_here(tmp_path, shards, max_iters=2)
        train_here(tmp_path, shards, max_iters=3, resume="auto")


@pytest.mark.slow
def test_a_signal_where_no_checkpoint_is_kept(tmp_path, shards, capsys):
    with before_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        folder = train_here(tmp_path, shards, keep_checkpoints=0)
    said = capsys.readouterr().out
    assert not (folder / "ckpt").exists() and "no checkpoint was kept" in said and "--resume" not in said


# A model that starts and steps fast, for processes that are stopped and killed
QUICK = dict(n_layer=1, block_size=16, batch_size=4, total_batch_size=64, max_iters=40, eval_interval=8, eval_tokens=64,
             FP8_AMAX_HISTORY=4)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, shards):
    """Train the uninterrupted run of QUICK; return its folder and what it saved after each step."""
    out, patch = tmp_path_factory.mktemp("quick"), pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: False)
    with parameters_seen() as seen:
        folder = train_here(out, shards, ckpt_interval=1, **QUICK)
    patch.undo()
    return SimpleNamespace(folder=folder, saved=seen.saved)


@pytest.mark.slow
def test_signals_and_broken_runs_of_the_script(forker, tmp_path, shards, quick):
    """In processes of their own: SIGTERM and SIGINT end the script with status 0. Non-finite losses end it with one
    line, even while a checkpoint is being written, and earlier checkpoints stay."""
    args = flag_args(data_dir=shards, ckpt_interval=0, **QUICK)
    (tmp_path / "train.py").write_text(  # 0.1 s a step: on a busy machine, too, the signal comes before the end
        f"import sys, time\nsys.path[0] = {str(ROOT)!r}\nimport train\nstep = train.train_step\n"
        "train.train_step = lambda *args: time.sleep(0.1) or step(*args)\ntrain.main()\n")
    runs = {number: forker.start(tmp_path / "train.py", *args, f"--run_name=s{number}", cwd=tmp_path)
            for number in (signal.SIGTERM, signal.SIGINT)}
    broken = forker.start(TRAIN, *args, "--run_name=broken", "--ckpt_interval=1", "--learning_rate=1e38",
                          "--grad_clip=0", cwd=tmp_path)
    for number, process in runs.items():
        helpers.read_until(process, lambda line: line.startswith("step "))
        process.send_signal(number)
        result = finish(process)
        assert result.code == 0, result.err
        assert "stopped by a signal after" in result.out and not result.err, result.err
        folder = tmp_path / "out" / f"s{number}"
        done = len(losses(folder))
        assert in_ckpt(folder) == [f"step_{done:06d}"]
        assert learned(folder, "train") == learned(quick.folder, "train")[:done]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert train_here("out", shards, run_name=f"s{signal.SIGTERM}", resume="auto", ckpt_interval=0, **QUICK)
    assert learned(tmp_path / "out" / f"s{signal.SIGTERM}") == learned(quick.folder)
    result = finish(broken)
    assert_one_error_line(result, 1, "10 consecutive steps were skipped", "learning rate",
                          "Newest checkpoint: out/broken/ckpt/step_")
    done = len(losses(tmp_path / "out" / "broken"))
    assert done < 40
    assert all(name <= f"step_{done:06d}" for name in in_ckpt(tmp_path / "out" / "broken") if name[0] != ".")


# -----------------------------------------------------------------------------------------------------
# Killed

# One process imports torch and train.py, and forks each attempt of the run before any thread or process group exists.
# An attempt differs from a new process in four things: it imports nothing (so it starts in 0.2 s instead of 5 s), it
# has the parent's memory and hash seed, it collects no garbage, and there is no torchrun. It makes its own process
# group and threads.
KILLER = textwrap.dedent("""
    import glob, json, os, random, signal, sys, time, traceback
    sys.path[:0] = [{root!r}, {tests!r}]
    import helpers, torch, train
    import torch.utils.serialization
    from nanofp8.checkpoint_files import load_weights, read_checkpoint
    from nanofp8.runlog import RunLog
    RunLog.plot = lambda self: None
    helpers.skip_full_collections()
    spec = json.load(open(sys.argv[1]))
    saved = torch.load(spec["saved"])
    assert len(os.listdir("/proc/self/task")) == 1, "fork() with threads around"

    def check_all(folder):
        for path in glob.glob(folder + "/ckpt/step_*"):
            if os.path.exists(path + "/meta.json"):
                step = read_checkpoint(path)["step"]
                found = {{name: torch.full_like(p, torch.nan) for name, p in saved[step].items()}}
                load_weights(path, found)
                assert helpers.same_tensors(found, saved[step]), path

    def start_attempt(name, output):
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            for fd in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            folder = os.path.join(spec["flags"]["out_dir"], name)
            check_all(folder)
            train.main(helpers.flag_args(**spec["flags"], run_name=name, resume="auto"))
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    rng, kills, attempts = random.Random(spec["seed"]), 0, []
    while kills < spec["kills"]:
        name = f"run{{len(attempts)}}"
        finished = False
        while not finished:
            output = f"{{name}}.{{len(attempts)}}.txt"
            pid, reaped, status = start_attempt(name, output), 0, None
            if kills < spec["kills"]:
                # One attempt in five may be killed while it starts. The others are killed after their run has a whole
                # checkpoint, so that the next attempt can continue from it, also on a busy machine.
                starting, in_a_write = rng.random() < 0.2, rng.random() < 0.5
                left = rng.uniform(0, 0.4 if starting else 0.5)
                whole = os.path.join(spec["flags"]["out_dir"], name) + "*/ckpt/step_*/meta.json"
                half = os.path.join(spec["flags"]["out_dir"], name) + "*/ckpt/.writing_*/*"
                while not reaped and left > 0:
                    time.sleep(0.002)
                    reaped, status = os.waitpid(pid, os.WNOHANG)
                    if starting or os.path.exists(output) and "ready after" in open(output).read() and glob.glob(whole):
                        left -= 0.002
                # Half of those kills hit a write
                while not reaped and in_a_write and not starting and not glob.glob(half):
                    time.sleep(0.0005)
                    reaped, status = os.waitpid(pid, os.WNOHANG)
                if not reaped:
                    os.kill(pid, signal.SIGKILL)
            if not reaped:
                reaped, status = os.waitpid(pid, 0)
            folder = os.path.join(spec["flags"]["out_dir"], name)
            attempt = dict(run=name, output=output, killed=os.WIFSIGNALED(status), code=status >> 8,
                           writing=bool(glob.glob(folder + "*/ckpt/.writing_*")))
            attempts.append(attempt)
            kills += attempt["killed"]
            finished = not attempt["killed"]
    json.dump(attempts, open(sys.argv[1] + ".done", "w"))
""")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path, shards, quick):
    """After 22 kills at random moments, many of them during a write, the run equals the uninterrupted one. Before each
    restart, every checkpoint that counts holds the parameters of its step."""
    torch.save(quick.saved, tmp_path / "saved.pt")
    flags = QUICK | dict(ckpt_interval=1, keep_checkpoints=2, out_dir=str(tmp_path / "out"), data_dir=str(shards))
    (tmp_path / "spec.json").write_text(json.dumps(dict(flags=flags, seed=3, kills=22,
                                                        saved=str(tmp_path / "saved.pt"))))
    (tmp_path / "killer.py").write_text(KILLER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    result = finish(start(tmp_path / "killer.py", tmp_path / "spec.json", cwd=tmp_path, OPENBLAS_NUM_THREADS="1"))
    assert result.code == 0, result.err[-4000:]
    attempts = json.loads((tmp_path / "spec.json.done").read_text())
    outputs = [(tmp_path / attempt["output"]).read_text() if (tmp_path / attempt["output"]).exists() else ""
               for attempt in attempts]
    assert sum(attempt["killed"] for attempt in attempts) == 22
    # Kills that left half a checkpoint
    assert sum(attempt["writing"] for attempt in attempts if attempt["killed"]) >= 3
    resumed = sum("resumed from" in output for output in outputs)
    assert resumed >= 15, resumed
    for attempt, output in zip(attempts, outputs, strict=True):
        # The attempt before was killed between its last output and its end
        too_late = attempt["code"] == 2 and "has 40 steps" in output
        assert attempt["killed"] or attempt["code"] == 0 or too_late, output[-3000:]
        assert "Traceback" not in output and "failed" not in output, output[-3000:]
    for run in {attempt["run"] for attempt in attempts}:
        # Without a checkpoint, an attempt starts a new run in a folder with a number: the last one is whole
        ends = [f for f in (tmp_path / "out").glob(f"{run}*") if (f / "ckpt" / "step_000040").exists()]
        (folder,) = ends
        assert learned(folder) == learned(quick.folder)
        assert in_ckpt(folder) == ["step_000039", "step_000040"]
        for step in (39, 40):
            assert same_tensors(read_weights(folder / "ckpt" / f"step_{step:06d}", quick.saved[step]),
                                quick.saved[step])


# -----------------------------------------------------------------------------------------------------
# Two ranks

TWO = RUN | dict(batch_size=4)
FSDP2, DDP = TWO | dict(USE_FSDP2=True), TWO | dict(USE_DDP=True)
ROUNDED = DDP | dict(GATHER_FP32=False, max_iters=4)
BF16, NVFP4 = dict(USE_FP8=False, vocab_size=515), dict(USE_NVFP4=True, n_embd=128, max_iters=3)  # 515: uneven shards
# {name: (flags, the run that it goes on from, after how many steps)}; "one": the run of one process, FP8
RANKS = {
    "ddp-fp8": (DDP, None, 0), "ddp-fp8-resumed": (DDP, "ddp-fp8", 2),
    "ddp-rounded": (ROUNDED, None, 0), "ddp-rounded-resumed": (ROUNDED, "ddp-rounded", 2),
    "fsdp2-fp8": (FSDP2, None, 0), "fsdp2-fp8-resumed": (FSDP2, "fsdp2-fp8", 4),
    "fsdp2-bf16": (FSDP2 | BF16, None, 0), "fsdp2-bf16-resumed": (FSDP2 | BF16, "fsdp2-bf16", 3),
    "fsdp2-nvfp4": (FSDP2 | NVFP4, None, 0), "fsdp2-nvfp4-resumed": (FSDP2 | NVFP4, "fsdp2-nvfp4", 2),
    "one-to-fsdp2": (FSDP2, "one", 3), "one-to-ddp": (DDP, "one", 3), "one-to-ddp-unscaled": (DDP, "one", 3),
    "fsdp2-to-ddp": (DDP, "fsdp2-fp8", 3),
    "ddp-parts": (DDP | NORMUON_PARTS, None, 0), "fsdp2-parts": (FSDP2 | NORMUON_PARTS, None, 0),
    "fsdp2-parts-resumed": (FSDP2 | NORMUON_PARTS, "fsdp2-parts", 3),
    "ddp-ramp": (DDP | RAMP, None, 0), "fsdp2-ramp": (FSDP2 | RAMP, None, 0),
    "fsdp2-ramp-resumed": (FSDP2 | RAMP, "fsdp2-ramp", 3),
    "fsdp2-poisoned": (FSDP2, None, 0), "ddp-poisoned": (DDP, None, 0),
    "minutes": (FSDP2 | dict(ckpt_interval=0), None, 0), "one-fails": (FSDP2 | dict(ckpt_interval=2), None, 0),
    "stopped": (FSDP2 | dict(ckpt_interval=0), None, 0), "stopped-resumed": (FSDP2, "stopped", 2),
    "damaged": (DDP | dict(resume="auto"), "ddp-fp8", (3, 5)),
    "unshared": (DDP | dict(ckpt_interval=2, max_iters=2), None, 0),
}
WORKER = textwrap.dedent("""
    import contextlib, json, os, pathlib, signal, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    from unittest import mock
    import helpers, torch, train, two_rank_faults
    from torch.distributed.checkpoint.staging import BlockingAsyncStager
    from nanofp8 import te_emulation as te
    from nanofp8.checkpoint import Checkpoints
    from nanofp8.checkpoint_files import read_checkpoint
    from nanofp8.faults import Guard
    procs = helpers.fork_ranks()
    spec = json.load(open(sys.argv[1]))
    out = pathlib.Path(spec["out"])
    for name, (changes, source, step) in spec["runs"].items():
        te._state.__init__()
        if source:
            if procs.is_main:
                helpers.copy_of_run(spec["one"] if source == "one" else out / source, out / name,
                                    *(step if isinstance(step, list) else [step]))
                if name == "damaged":  # what rank 1 has written
                    with open(out / name / "ckpt" / "step_000005" / "__1_0.distcp", "r+b") as f:
                        f.write(b"x")
            procs.broadcast(None)
            changes.setdefault("resume", str(out / name))
        cfg = helpers.make_cfg(run_name=name, out_dir=out, data_dir=spec["data"], **changes)
        stopper = contextlib.nullcontext()
        if name == "stopped" and procs.rank == 1:  # and rank 0 knows nothing of it
            stopper = helpers.before_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        if "poisoned" in name and procs.rank == 1:
            stopper = helpers.poisoned("an inf inside", 3)
        elif "poisoned" in name:
            stopper = mock.patch.object(Guard, "healthy", True)
        if name == "one-fails" and procs.rank == 1:  # once, and rank 0 knows nothing of it
            stage = mock.Mock(side_effect=[RuntimeError("no memory"), mock.DEFAULT, mock.DEFAULT],
                              wraps=BlockingAsyncStager().stage)
            stopper = mock.patch.object(BlockingAsyncStager, "stage", stage)
        if "unscaled" in name:  # what comes of gradients whose scales do not follow the world size
            stopper = mock.patch("nanofp8.checkpoint.read_checkpoint",
                                 lambda path, read=read_checkpoint: read(path) | dict(world_size=2))
        if name == "minutes":  # clocks that do not agree
            cfg.ckpt_minutes = 1e-9 if procs.is_main else 1e9
        if name == "unshared":  # rank 1 is a machine that has a folder of the same name on a disk of its own
            def make(self, folder, *rest, make=Checkpoints.__init__):
                make(self, folder if procs.is_main else str(out / "of_rank_1"), *rest)
            stopper = contextlib.ExitStack()
            stopper.enter_context(mock.patch.object(Checkpoints, "__init__", make))
            stopper.enter_context(mock.patch("nanofp8.checkpoint.is_seen", os.path.exists))  # which waits for 10 s
        error = None
        with helpers.parameters_seen() as seen, stopper:
            try:
                train.run(cfg, procs)
            except Exception as e:  # on both ranks alike, or the other one hangs
                error = repr(e)
        if procs.is_main:
            torch.save(dict(saved=seen.saved, restored=seen.restored, error=error), out / (name + ".pt"))
    procs.print("faults of two ranks")
    two_rank_faults.run_here(procs, out / "faults", helpers.flag_args(data_dir=spec["data"], batch_size=4))
    helpers.end_ranks(procs)
""")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shards, one_rank):
    """Train the runs of RANKS: {name: folder, saved and restored parameters}."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "out" / "faults").mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(dict(
        runs=RANKS, out=str(folder / "out"), data=str(shards), one=str(one_rank["fp8"].folder))))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    result = finish(start(folder / "worker.py", folder / "spec.json", cwd=folder))
    assert result.code == 0, result.err[-4000:]
    runs = {name: SimpleNamespace(folder=folder / "out" / name, **torch.load(folder / "out" / f"{name}.pt"))
            for name in RANKS}
    errors = {name: run.error for name, run in runs.items() if run.error}
    assert [*errors] == ["unshared"], errors
    text, _, of_faults = result.out.partition("faults of two ranks\n")
    runs["one-fails"].output = runs["unshared"].output = text
    runs["faults"] = two_rank_faults.read_faults(folder / "out" / "faults", of_faults)
    return runs


@pytest.mark.parametrize("name", ["ddp-fp8", "fsdp2-fp8", "fsdp2-bf16", "fsdp2-nvfp4", "fsdp2-parts", "fsdp2-ramp"])
def test_two_ranks_continue_bit_for_bit(two_ranks, name):
    """A resumed run with as many ranks and the same wrapper equals the uninterrupted one. Each rank has its own random
    state (NVFP4)."""
    want, got = two_ranks[name], two_ranks[f"{name}-resumed"]
    step = RANKS[f"{name}-resumed"][2]
    assert learned(got.folder) == learned(want.folder)
    assert same_tensors(got.restored, want.saved[step])
    assert all(same_tensors(got.saved[s], want.saved[s]) for s in got.saved)
    assert len(got.saved) == len(want.saved) - step


def test_weights_sent_in_bf16_are_saved_exactly(two_ranks):
    """GATHER_FP32=False: ranks compute with rounded weights, and a checkpoint holds the fp32 masters. So a resumed run
    equals the uninterrupted one."""
    run, resumed = two_ranks["ddp-rounded"], two_ranks["ddp-rounded-resumed"]
    assert learned(resumed.folder) == learned(run.folder)
    saved = run.saved[2]  # by rank 0: its own masters, and whole embeddings
    assert same_tensors(read_weights(run.folder / "ckpt" / "step_000002", saved), saved)
    rounded = {name for name, weight in saved.items() if not torch.equal(weight, resumed.restored[name])}
    assert {"embed.weight", "head.weight"} < rounded < set(saved)
    assert all(torch.equal(resumed.restored[name], saved[name].bfloat16().float()) for name in rounded)


def test_a_signal_to_one_rank_stops_all(two_ranks):
    stopped, resumed = two_ranks["stopped"], two_ranks["stopped-resumed"]
    assert [r["kind"] for r in records(stopped.folder, "train")] == ["train"] * 2
    assert in_ckpt(stopped.folder) == ["step_000002"]
    assert learned(resumed.folder) == learned(two_ranks["fsdp2-fp8"].folder)


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_all_ranks_skip_what_is_not_finite_on_one(two_ranks, name):
    """Both ranks skip the step and continue from the weights and scales before it."""
    whole, poisoned = two_ranks[f"{name}-fp8"], two_ranks[f"{name}-poisoned"]
    log = records(poisoned.folder, "train")
    assert [r.get("skipped") for r in log] == [None] * 3 + ["loss not finite"] + [None] * 2
    assert learned(poisoned.folder, "train")[:3] == learned(whole.folder, "train")[:3]
    assert same_tensors(poisoned.saved[4], poisoned.saved[3]) and same_tensors(poisoned.saved[3], whole.saved[3])
    assert np.isfinite(losses(poisoned.folder)[[4, 5]].astype(float)).all()


def test_two_ranks_agree_on_the_next_older_checkpoint(two_ranks):
    """They share the reading, and one of them finds the damage."""
    run = two_ranks["damaged"]
    assert learned(run.folder) == learned(two_ranks["ddp-fp8"].folder)
    assert in_ckpt(run.folder) == [f"step_{s:06d}" for s in (3, 4, 5)] + ["step_000005.damaged", "step_000006"]
    files = json.loads((run.folder / "ckpt" / "step_000006" / "meta.json").read_text())["files"]
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def test_files_that_a_machine_wrote_on_a_disk_of_its_own(two_ranks):
    """No checkpoint counts whose files rank 0 does not see, the run says so, and neither machine keeps half of one."""
    run, line = two_ranks["unshared"], "no __1_0.distcp here, though another rank has written it; all machines need the"
    assert f"checkpoint at step 2 failed, training continues: {line}" in run.output
    assert line in run.error and "Newest checkpoint: none" in run.error and records(run.folder, "done")
    assert in_ckpt(run.folder) == [] == in_ckpt(run.folder.parent / "of_rank_1")


@pytest.mark.parametrize("check", [two_rank_faults.check_full_disk, two_rank_faults.check_damaged_checkpoint])
def test_faults_of_two_ranks(two_ranks, check):
    """Afterwards, losses are those of the run that nothing happened to, bit for bit. tests/gpu does the same over
    NCCL."""
    check(two_ranks["faults"], 0.0)


def test_the_clock_of_rank_0_decides_for_all(two_ranks):
    run = two_ranks["minutes"]
    assert in_ckpt(run.folder) == [f"step_{s:06d}" for s in range(1, 7)]
    assert learned(run.folder) == learned(two_ranks["fsdp2-fp8"].folder)


def test_a_checkpoint_that_fails_on_one_rank_fails_on_all(two_ranks):
    """No rank waits for the other, and later checkpoints are complete."""
    run, whole = two_ranks["one-fails"], two_ranks["fsdp2-fp8"]
    lines = [line for line in run.output.splitlines() if "checkpoint at step" in line and "failed" in line
             and "all machines" not in line]  # of the run "unshared"
    assert len(lines) == 1, lines
    assert lines[0].startswith("checkpoint at step 2 failed, training continues: no memory (rank 1)"), lines
    assert in_ckpt(run.folder) == ["step_000004", "step_000006"] and learned(run.folder) == learned(whole.folder)
    for step in (4, 6):
        assert same_tensors(read_weights(run.folder / "ckpt" / f"step_{step:06d}", whole.saved[step]),
                            whole.saved[step])


# Largest gap of any later loss to the run that was left, in nats. FSDP2 gathers weights rounded to bf16, and FP8 rounds
# them once more; DDP differs in the order of fp32 sums. The same gaps as between whole runs under these wrappers.
ACROSS_GAP = 3e-3


def assert_continues(folder, restored, want, step):
    """Check a run that continued under another wrapper or number of ranks: exactly the saved parameters, then losses
    and gradient norms close to those of the run it continues."""
    assert same_tensors(restored, want.saved[step])
    got, expected = learned(folder, "train"), learned(want.folder, "train")
    assert got[:step] == expected[:step] and [r["step"] for r in got] == list(range(6))
    gaps = np.abs(losses(folder) - losses(want.folder))
    assert gaps.max() < ACROSS_GAP and losses(want.folder)[step] - losses(want.folder)[-1] > 0.3, gaps
    assert abs(records(folder, "val")[-1]["val_loss"] - records(want.folder, "val")[-1]["val_loss"]) < ACROSS_GAP
    # The gradients' scales fit from the first step on, though a rank's gradients grew or shrank with its share of the
    # tokens: the norm is that of the run left
    assert got[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=0.005)


@pytest.mark.parametrize("name", ["one-to-fsdp2", "one-to-ddp"])
def test_two_ranks_continue_from_one(one_rank, two_ranks, name):
    assert_continues(two_ranks[name].folder, two_ranks[name].restored, one_rank["fp8"], 3)


def test_losses_and_norms_would_notice_scales_that_do_not_follow(one_rank, two_ranks):
    """From one rank to two, gradients double. With the old scales, the largest would saturate in the first step."""
    want, got = (learned(run.folder, "train")[3] for run in (one_rank["fp8"], two_ranks["one-to-ddp-unscaled"]))
    # assert_continues() allows 0.005
    assert got["step"] == 3 and 0.02 < 1 - got["grad_norm"] / want["grad_norm"] < 0.04


def test_ddp_continues_from_fsdp2(two_ranks):
    assert_continues(two_ranks["fsdp2-to-ddp"].folder, two_ranks["fsdp2-to-ddp"].restored, two_ranks["fsdp2-fp8"], 3)


def test_two_ranks_let_the_batch_grow_like_one(one_rank, two_ranks):
    """DDP and FSDP2: the same tokens, and the losses of one process within the gap of other models."""
    folder = one_rank["ramp"].folder
    for name in ("ddp-ramp", "fsdp2-ramp"):
        other = two_ranks[name].folder
        assert [r["tokens"] for r in records(other, "train")] == [r["tokens"] for r in records(folder, "train")]
        assert np.abs(losses(other) - losses(folder)).max() < ACROSS_GAP, name


def test_two_ranks_train_the_optional_parts_like_one(one_rank, two_ranks):
    """DDP and FSDP2, with NorMuon: the losses of one process, within the gap of other models."""
    want = losses(one_rank["parts"].folder)
    for name in ("ddp-parts", "fsdp2-parts"):
        gaps = np.abs(losses(two_ranks[name].folder) - want)
        assert gaps.max() < ACROSS_GAP and want[0] - want[-1] > 1, (name, gaps)


@pytest.mark.parametrize("name", ["fsdp2-fp8", "ddp-fp8", "fsdp2-parts"])
def test_one_process_continues_from_two_ranks(tmp_path, shards, two_ranks, name):
    folder = copy_of_run(two_ranks[name].folder, tmp_path / "r", 3)
    with parameters_seen() as seen:
        train_here(tmp_path, shards, resume=folder, **RUN | (NORMUON_PARTS if "parts" in name else {}))
    assert_continues(folder, seen.restored, two_ranks[name], 3)


@pytest.mark.parametrize("name", ["fsdp2-fp8", "fsdp2-bf16", "ddp-fp8"])
def test_one_process_reads_the_weights_of_two_ranks(two_ranks, name):
    """Without a process group, as sample.py does."""
    run = two_ranks[name]
    assert not torch.distributed.is_initialized()
    for step in (2, 6):
        assert same_tensors(read_weights(run.folder / "ckpt" / f"step_{step:06d}", run.saved[step]), run.saved[step])


def test_the_gradient_scales_follow_the_world_size(tmp_path, shards, one_rank, two_ranks):
    """A rank divides its loss by its own tokens: from two ranks to one, gradients halve and their scales double."""
    folder = two_ranks["fsdp2-fp8"].folder / "ckpt" / "step_000003"
    cfg, procs = helpers.make_cfg(data_dir=str(shards)), helpers.one_process()
    model, loader = helpers.make_model(cfg), train.open_data(cfg, procs)[0]
    run = helpers.make_run(cfg, procs, model, loader)
    train.calibrate(run)
    run.optimizers.warm_up(run.parallel)
    assert restore(run, str(folder), read_checkpoint(str(folder)))
    saved = {name: torch.empty_like(t) for name, t in fp8_state(model).items()}
    load_tensors(str(folder), {"fp8": saved}, no_dist=True)
    assert len(saved) == 24
    for name, live in fp8_state(model).items():
        factor = 1.0 if "scaling_fwd" in name else 2.0 if name.endswith("scale") else 0.5
        assert torch.equal(live, saved[name] * factor), name
    assert loader.index == 3 * loader.accumulation


# -----------------------------------------------------------------------------------------------------
# Which checkpoint, and with which flags


CHANGED_PARTS = [("n_value_embed", 1), ("USE_X0", True), ("muon_variant", "normuon"), ("window_pattern", "SL"),
                 ("qk_scale", 1.2)]


@pytest.mark.parametrize("name,value", [("n_layer", 3), ("total_batch_size", 512), ("dataset", "other"), ("n_head", 4),
                                        ("rope_base", 500.0), *CHANGED_PARTS])
def test_flags_that_cannot_change_are_refused(tmp_path, shards, capsys, one_rank, name, value):
    data = tmp_path / "data"
    for dataset in ("synthetic", "other"):
        shutil.copytree(shards / "synthetic", data / dataset)
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    before = (folder / "log.jsonl").read_bytes()
    was = getattr(helpers.make_cfg(), name)
    refused(capsys, tmp_path, data, 2, f"--{name}", was, value, "step_000003", resume=folder, **RUN | {name: value})
    assert (folder / "log.jsonl").read_bytes() == before and in_ckpt(folder) == ["step_000003"]


def without_added_flags(folder, step):
    """Make a checkpoint of a run folder one from before these flags; return its meta.json's flags."""
    path = folder / "ckpt" / f"step_{step:06d}" / "meta.json"
    meta = json.loads(path.read_text())
    for name in (*ADDED_FLAGS, "window_size", "muon_beta2", "learning_rate_value", "learning_rate_x0"):
        del meta["flags"][name]
    path.write_text(json.dumps(meta))
    return meta["flags"]


def test_a_checkpoint_that_names_no_optional_parts_continues_bit_for_bit(tmp_path, shards, capsys, one_rank):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    without_added_flags(folder, 3)
    train_here(tmp_path, shards, resume=folder, **RUN)
    assert learned(folder) == learned(one_rank["fp8"].folder) and "resume: " not in capsys.readouterr().out


@pytest.mark.parametrize("name,value", CHANGED_PARTS)
def test_a_checkpoint_that_names_no_optional_parts_has_none(tmp_path, shards, capsys, one_rank, name, value):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    assert name not in without_added_flags(folder, 3)
    refused(capsys, tmp_path, shards, 2, f"{name}={ADDED_FLAGS[name]}", f"cannot change to {value};", resume=folder,
            **RUN | {name: value})


def test_weights_that_this_version_does_not_train_are_refused(tmp_path, shards, capsys, one_rank):
    """A part whose flag this version lacks. Training on without it would end in a worse model, without a word."""
    folder = copy_of_run(one_rank["parts"].folder, tmp_path / "r", 3)
    path = folder / "ckpt" / "step_000003" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | dict(flags=meta["flags"] | dict(USE_X0=False))))
    refused(capsys, tmp_path, shards, 2, "step_000003", "model.scales.x", resume=folder,
            **RUN | NORMUON_PARTS | dict(USE_X0=False))
    assert in_ckpt(folder) == ["step_000003"]


def test_added_flags_are_fixed_and_sample_py_has_the_same_values():
    assert set(ADDED_FLAGS) <= set(checkpoint.FIXED_FLAGS) and ADDED_FLAGS.items() <= train.CLASSIC.items()
    shape = sample.Shape.of({name: helpers.SMALL.get(name, 1) for name in sample.Shape.__dataclass_fields__
                             if name not in ADDED_FLAGS and name != "window_size"})
    of_the_model = ADDED_FLAGS.keys() - {"muon_variant", "batch_ramp"}
    assert {name: getattr(shape, name) for name in of_the_model} == {name: ADDED_FLAGS[name] for name in of_the_model}


def test_a_run_continues_without_its_flags(tmp_path, shards, capsys, one_rank):
    """Model, data set, batch and recipe come from the checkpoint, though preset tiny has others."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    with mock.patch.object(runlog.RunLog, "plot"):
        train.main([f"--resume={folder}", f"--data_dir={shards}", "--preset=tiny", "--muon_impl=torch",
                    "--USE_COMPILE=False", "--FP8_AMAX_HISTORY=16"])
    out = capsys.readouterr().out
    assert ("resume: taken from the checkpoint, because they cannot change: n_layer=2, n_embd=64, vocab_size=512, "
            "block_size=32, dataset=synthetic, total_batch_size=256, muon_variant=muon\n") in out
    assert re.search(r"resume: taken from the checkpoint, because they were not given: .*\blearning_rate=0.02\b", out)
    assert "resume: learning_rate was" not in out and "resume: n_layer" not in out
    assert learned(folder) == learned(one_rank["fp8"].folder)


@pytest.mark.slow
def test_flags_that_can_change_are_printed(tmp_path, shards, capsys, one_rank):
    """After changes of learning rate, micro-batch and evaluation, the run continues with finite losses."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    changes = dict(learning_rate=0.01, batch_size=4, eval_interval=2)
    train_here(tmp_path, shards, resume=folder, **RUN | changes)
    out = capsys.readouterr().out
    for name, was, now in (("learning_rate", 0.02, 0.01), ("batch_size", 8, 4), ("eval_interval", 3, 2)):
        assert f"resume: {name} was {was}, is now {now}\n" in out
    assert "resume: the run is no longer bit-exact: it had batch_size=8 on 1 rank(s), and has 4 on 1\n" in out
    assert out.count("resume: ") == 4
    assert [r["step"] for r in records(folder, "train")] == list(range(6)) and np.isfinite(losses(folder)).all()
    assert [r["step"] for r in records(folder, "val")] == [2, 3, 5]
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 0.01
    # The last checkpoint says the flags as they are now
    assert read_checkpoint(str(folder / "ckpt" / "step_000006"))["flags"]["learning_rate"] == 0.01


@pytest.mark.slow
def test_other_data_are_refused(tmp_path, shards, capsys, one_rank):
    """Other tokens under the same names are refused if they lie before the checkpoint's position. One more shard after
    the others is allowed."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    other = shutil.copytree(shards, tmp_path / "data")
    helpers.write_shard(other / "synthetic" / "s_train_000009.bin", helpers.markov_tokens(500, seed=9))
    train_here(tmp_path, other, resume=folder, **RUN | dict(max_iters=4))
    shard = min((other / "synthetic").glob("*_train_*"))
    tokens = np.fromfile(shard, dtype=np.uint16)
    tokens[512:] = tokens[512:][::-1]
    tokens.tofile(shard)
    refused(capsys, tmp_path, other, 2, "was trained on other data", other, resume=folder, **RUN)


def change_data(folder, how):
    """Change the data set of the tests, which has three train shards and one val shard."""
    first, second, third = sorted(folder.glob("s_train_*"))
    val = next(folder.glob("s_val_*"))

    def flip(path, start, stop):
        tokens = np.fromfile(path, dtype=np.uint16)
        tokens[512:][start:stop] = 511 - tokens[512:][start:stop]
        tokens.tofile(path)

    if how == "val replaced":
        helpers.write_shard(val, helpers.markov_tokens(1500, seed=3))
    elif how == "first tokens":
        flip(first, 0, 900)
    elif how == "future tokens":
        flip(third, 0, None)
    elif how == "one token":
        flip(third, -1, None)
    elif how == "last shard gone":
        third.unlink()
    elif how == "two shards swapped":
        third.rename(folder / "x")
        second.rename(third)
        (folder / "x").rename(second)
    elif how == "more shards":
        for split in ("train", "val"):
            helpers.write_shard(folder / f"s_{split}_000009.bin", helpers.markov_tokens(500, seed=9))
    elif how == "renamed":
        for path in (first, second, third, val):
            path.rename(folder / path.name.replace("s_", "t_"))


CHANGED_DATA = {"val replaced": "val shard 1 was s_val_000000.bin",
                "first tokens": "train shard 1 was s_train_000001.bin",
                "future tokens": "s_train_000003.bin is another one", "one token": "train shard 3",
                "last shard gone": "it is missing", "two shards swapped": "train shard 2",
                "more shards": "", "renamed": "", "nothing": "", "older": ""}


@pytest.mark.parametrize("how", CHANGED_DATA)
def test_all_shards_are_compared(tmp_path, shards, one_rank, how):
    """After 3 steps, 768 of 6,000 tokens were trained on. More shards after the others are allowed, and so are other
    names. Older checkpoints know only the last tokens before their position."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3) / "ckpt" / "step_000003"
    data = shutil.copytree(shards, tmp_path / "data")
    if how == "older":
        meta = json.loads((folder / "meta.json").read_text())
        del meta["data"]["shards"]
        (folder / "meta.json").write_text(json.dumps(meta))
    change_data(data / "synthetic", "future tokens" if how == "older" else how)
    cfg, procs = helpers.make_cfg(data_dir=str(data), resume=folder, **RUN), helpers.one_process()
    loader, val_ring = train.open_data(cfg, procs)
    loader.close()
    found = checkpoint.shard_fingerprints(loader.ring, val_ring, procs)
    with pytest.raises(UserError, match="was trained on other data: .*bring it back") if CHANGED_DATA[how] else \
            contextlib.nullcontext() as refusal:
        assert checkpoint.check_resume(str(folder), cfg, loader.ring, found, procs)["step"] == 3
    if CHANGED_DATA[how]:
        assert CHANGED_DATA[how] in str(refusal.value) and refusal.value.status == 2


def test_shards_added_after_the_first_pass_are_to_be_removed(tmp_path, shards, one_rank, monkeypatch):
    """All shards that were there still are: the remedy must not be to bring them back."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3) / "ckpt" / "step_000003"
    data = shutil.copytree(shards, tmp_path / "data")
    cfg, procs = helpers.make_cfg(data_dir=str(data), resume=folder, **RUN), helpers.one_process()
    rings = []
    for add in (False, True):
        if add:
            change_data(data / "synthetic", "more shards")
        loader, val_ring = train.open_data(cfg, procs)
        loader.close()
        rings.append((loader.ring, val_ring))
    old = rings[0][0]
    meta = checkpoint.read_checkpoint(str(folder)) | dict(tokens=old.total + 1024)
    meta["data"] = meta["data"] | checkpoint.data_fingerprint(old, meta["tokens"])
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda folder: meta)
    found = [checkpoint.shard_fingerprints(*pair, procs) for pair in rings]
    assert checkpoint.check_resume(str(folder), cfg, old, found[0], procs) is meta
    with pytest.raises(UserError, match="other data: .*remove the new ones") as refusal:
        checkpoint.check_resume(str(folder), cfg, rings[1][0], found[1], procs)
    assert refusal.value.status == 2


def test_a_shard_that_cannot_be_read_is_one_line(tmp_path, shards, capsys):
    with mock.patch.object(os, "pread", side_effect=OSError(errno.EIO, "Input/output error")):
        refused(capsys, tmp_path, shards, 1, ".bin cannot be read (Input/output error)", max_iters=1)
    assert not list(tmp_path.iterdir())


def test_going_back_says_what_it_deletes_and_no_half_deleted_one_counts(tmp_path, shards, capsys, one_rank):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 5)
    copy_of_run(one_rank["fp8"].folder, tmp_path / "early", 2)
    shutil.copytree(tmp_path / "early" / "ckpt" / "step_000002", folder / "ckpt" / "step_000002")
    # killed in the midst
    with mock.patch.object(shutil, "rmtree", lambda path, **_: (pathlib.Path(path) / ".metadata").unlink()):
        with mock.patch.object(dist, "barrier", side_effect=Killed), pytest.raises(Killed):
            train_here(tmp_path, shards, resume=folder / "ckpt" / "step_000002", **RUN)
    assert "continuing from step 2; deleting later checkpoints: step_000005\n" in capsys.readouterr().out
    assert find_checkpoint(str(folder)).endswith("step_000002")


@pytest.mark.slow
@pytest.mark.parametrize("gone", range(4))
def test_killed_while_it_goes_back(tmp_path, shards, one_rank, gone):
    """Whether none or all of the later checkpoints are already invalid, the next start continues from one that the log
    reaches."""
    folder, removed = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 2, 4, 5, 6), []

    def remove(path, do=os.remove):
        if len(removed) == gone:
            raise Killed
        removed.append(do(path))

    with mock.patch.object(os, "remove", remove), mock.patch.object(os, "replace", lambda *_: kill()), \
            pytest.raises(Killed), \
            mock.patch("fcntl.flock"):  # a process that is killed holds no lock
        train_here(tmp_path, shards, resume=folder / "ckpt" / "step_000002", **RUN)
    assert [os.path.basename(f)
            for f in complete_checkpoints(str(folder / "ckpt"))] == [f"step_{n:06d}" for n in (2, 4, 5, 6)][:4 - gone]
    train_here(tmp_path, shards, run_name="r", resume="auto", **RUN | dict(max_iters=7))
    steps = [r["step"] for r in records(folder, "train")]
    assert steps == list(range(7)), steps


@pytest.mark.slow
def test_a_checkpoint_that_is_on_disk_counts_before_the_evaluation_ends(tmp_path, shards):
    seen = []

    def evaluate(*args, do=train.evaluate):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not list(tmp_path.glob("r/ckpt/step_000002")):
            do(*args)
        seen.append(in_ckpt(tmp_path / "r"))
        return do(*args)

    with mock.patch.object(train, "evaluate", evaluate):
        train_here(tmp_path, shards, run_name="r", **RUN | dict(max_iters=2, ckpt_interval=0, eval_interval=0))
    assert seen[0] == ["step_000002"]


@pytest.mark.slow
def test_layers_without_scales_are_calibrated(tmp_path, shards, one_rank):
    """A layer that was in bf16 has no scales. At scale 1 its gradients would all be 0 in E5M2 for one step."""
    folder = train_here(tmp_path, shards, run_name="r", **RUN | dict(max_iters=3, HIGH_PRECISION_LAYERS="blocks.1"))
    scales = {}

    def train_step(run, do=train.train_step):
        scales.update({name: float(s.flatten()[0]) for name,
                       s in fp8_state(run.model).items() if name.endswith("scaling_bwd.scale")})
        return do(run)

    with mock.patch.object(train, "train_step", train_step):
        train_here(tmp_path, shards, resume=folder, **RUN | dict(max_iters=4))
    assert any("blocks.1" in name for name in scales) and min(scales.values()) > 1, scales


@pytest.mark.slow
def test_a_path_continues_under_its_own_name(tmp_path, shards, capsys, one_rank):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "fp8", 3)
    train_here(tmp_path, shards, resume=folder, run_name="other", **RUN | dict(max_iters=4))
    assert f"resume: continuing in {folder}; --run_name=other has no effect" in capsys.readouterr().out
    assert train_here(tmp_path, shards, resume="auto", run_name="fp8", **RUN | dict(max_iters=5)) == folder


@pytest.mark.slow
def test_two_processes_do_not_share_a_run_folder(tmp_path, shards, capsys, one_rank):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    refused(capsys, tmp_path, shards, 1, "another process is training in", resume=folder, **RUN)
    os.close(held)
    train_here(tmp_path, shards, resume=folder, **RUN | dict(max_iters=4))


@pytest.mark.parametrize("resume", ["auto", "{}/r", "{}/r/ckpt/step_000001"])
def test_a_checkpoint_that_another_process_replaces_meanwhile(tmp_path, one_rank, resume):
    """As after `kill -9` of torchrun, whose workers train on for a while: the lock is asked for before any checkpoint
    is read, and also where the one that was named is gone."""
    folder, resume = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3), resume.format(tmp_path)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    for gone in (DamagedCheckpoint("gone"), FileNotFoundError("gone")):
        with mock.patch.object(time, "sleep"), pytest.raises(UserError, match="another process is training in"), \
                mock.patch.object(resuming, "saved_at", return_value=0.0), \
                mock.patch.object(resuming, "read_checkpoint", side_effect=gone):
            chosen(tmp_path, resume=resume)
    os.close(held)
    if "step_000001" in resume:
        with pytest.raises(UserError, match="no complete checkpoint there"):
            chosen(tmp_path, resume=resume)
    else:
        assert chosen(tmp_path, resume=resume) == str(folder / "ckpt" / "step_000003")


# Trains four steps, each with a checkpoint that is on disk before the next one, and then waits in the fifth
WAITING = """
    import sys, time
    sys.path.insert(0, {root!r})
    import train
    step, train.train_step = train.train_step, lambda run: wait(run) or step(run)

    def wait(run):
        run.checkpoints.finish(wait=True)
        if run.loader.index == 4 * run.loader.accumulation:
            print("waiting", flush=True)
            time.sleep(600)

    train.main()
"""


def contents(folder):
    """Return {path: bytes} of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_left_alone(tmp_path, shards, capsys):
    """Resuming by run folder, by an earlier checkpoint or by name fails with one line and changes no file."""
    (tmp_path / "train.py").write_text(textwrap.dedent(WAITING.format(root=str(ROOT))))
    process = start("-u", tmp_path / "train.py", *flag_args(data_dir=shards, out_dir=tmp_path, run_name="r", **RUN),
                    cwd=tmp_path)
    folder = tmp_path / "r"
    try:
        helpers.read_until(process, lambda line: line == "waiting\n")
        before = contents(folder)
        assert in_ckpt(folder) == [f"step_{s:06d}" for s in (1, 2, 3, 4)] and len(records(folder, "train")) == 4
        for resume in (folder, folder / "ckpt" / "step_000002", "auto"):
            with mock.patch.object(time, "sleep"):  # which waits for a process that is ending
                refused(capsys, tmp_path, shards, 1, "another process is training in", folder, run_name="r",
                        resume=resume, **RUN)
            assert contents(folder) == before, resume
        assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "train.py"]
    finally:
        process.kill()
        process.communicate()
    train_here(tmp_path, shards, resume=folder / "ckpt" / "step_000002", **RUN)  # the lock went with the process
    assert in_ckpt(folder) == [f"step_{s:06d}" for s in range(1, 7)]


@pytest.mark.slow
def test_malformed_lines_do_not_stop_a_resume(tmp_path, shards, one_rank):
    """A crashed machine or an editor may leave malformed lines; they are skipped."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 3)
    with open(folder / "log.jsonl", "ab") as f:
        f.write(b'\0\0\0}\n{}\n{"kind": "train"}\n{"kind": "train", "step": "1"}\n{"kind": "tra')
    train_here(tmp_path, shards, resume=folder, **RUN)
    assert learned(folder) == learned(one_rank["fp8"].folder)


def test_a_damaged_checkpoint_that_was_moved_leaves_no_run_folder(tmp_path, shards, capsys, one_rank):
    moved = shutil.copytree(one_rank["fp8"].folder / "ckpt" / "step_000004", tmp_path / "moved")
    next(moved.glob("*.distcp")).write_bytes(b"")
    refused(capsys, tmp_path / "out", shards, 1, "cannot load", "moved", run_name="new", resume=moved, **RUN)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("source,changes", [
    ("bf16", dict(USE_FP8=True)), ("fp8", dict(USE_FP8=False)), ("fp8", dict(FP8_RECIPE="current")),
    ("fp8", dict(FP8_AMAX_HISTORY=4)), ("fp8", dict(FP8_AMAX_HISTORY=64)),
], ids=["bf16-to-fp8", "fp8-to-bf16", "delayed-to-current", "shorter-history", "longer-history"])
def test_the_number_format_can_change(tmp_path, shards, one_rank, source, changes):
    """Scales that the checkpoint lacks, or has in another length, are calibrated again: losses stay within 0.02
    nats."""
    folder = copy_of_run(one_rank[source].folder, tmp_path / "r", 3)
    train_here(tmp_path, shards, resume=folder, **WHOLE[source] | changes)
    assert np.abs(losses(folder) - losses(one_rank[source].folder)).max() < 0.02


def test_what_cannot_be_resumed(tmp_path, shards, capsys, one_rank):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        refused(capsys, tmp_path, shards, 2, f"--resume={tmp_path / path}", "no complete checkpoint",
                resume=tmp_path / path)
    for steps in (3, 2):
        refused(capsys, tmp_path, shards, 2, "step_000003 has 3 steps", f"max_iters is {steps}", "raise --max_iters",
                resume=one_rank["fp8"].folder / "ckpt" / "step_000003", max_iters=steps)
    assert sorted(os.listdir(tmp_path)) == ["empty"]  # no run folder was made


@pytest.mark.slow
def test_auto_starts_a_new_run_where_there_is_no_checkpoint(tmp_path, shards, capsys):
    """A run that is killed before its first checkpoint, again and again, starts again in its folder. Its logs are kept.
    A run folder that holds a finished run is left alone."""
    for kills in range(3):
        with before_step(2, kill), pytest.raises(Killed):
            train_here(tmp_path, shards, run_name="r", resume="auto", ckpt_interval=4)
        out = capsys.readouterr().out
        assert f"no complete checkpoint in {tmp_path}/r, starting a new run" in out and os.listdir(tmp_path) == ["r"]
        kept = f"starting again in {tmp_path}/r; the log of the run that was broken off is now log-{kills}.jsonl"
        assert (kept in out) == (kills > 0)
    log = (tmp_path / "r" / "log.jsonl").read_bytes()
    names = ["config.json", "log-1.jsonl", "log-2.jsonl", "log.jsonl"]
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == names
    assert train_here(tmp_path, shards, run_name="r", resume="auto", max_iters=2, keep_checkpoints=0) == tmp_path / "r"
    assert (tmp_path / "r" / "log-3.jsonl").read_bytes() == log
    assert [r["step"] for r in records(tmp_path / "r", "train")] == [0, 1]
    # That run is done
    assert train_here(tmp_path, shards, run_name="r", resume="auto", max_iters=2) == tmp_path / "r-2"
    assert train_here(tmp_path, shards, run_name="r", resume="auto", max_iters=3) == tmp_path / "r-2"
    assert [r["step"] for r in records(tmp_path / "r-2", "train")] == [0, 1, 2]


@pytest.mark.parametrize("files,alone", [
    (["config.json", "log.jsonl"], True), (["config.json", "loss.png", "ckpt/.writing_000004/x"], True), ([], True),
    (["log.jsonl", "log-7.jsonl", "ckpt/step_000004/x"], True), (["log.jsonl", "notes.txt"], False),
    (["log.jsonl", "ckpt/step_000004.damaged/meta.json"], False), (["log.jsonl", "ckpt/mine"], False)])
def test_a_run_folder_that_holds_only_a_log(tmp_path, files, alone):
    for name in files:
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / name).write_text("{}")
    (tmp_path / "r").mkdir(exist_ok=True)
    cfg, procs = helpers.make_cfg(out_dir=tmp_path, run_name="r", resume="auto"), helpers.one_process()
    for _ in range(2):
        checkpoint_, lock = resuming.lock_checkpoint(cfg, procs)
        assert checkpoint_ is None and bool(lock) == alone
        if lock:
            assert lock.folder == str(tmp_path / "r")
            lock.close()
    if alone:
        with contextlib.closing(FolderLock(str(tmp_path / "r"))), mock.patch.object(time, "sleep"), \
                pytest.raises(UserError, match="another process is training in"):
            resuming.lock_checkpoint(cfg, procs)


def test_a_run_of_another_model_does_not_start_in_the_folder_of_one_that_was_broken_off(tmp_path):
    """A resume that forgets --n_layer would overwrite config.json, the only place where that run's flags are."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(json.dumps(dict(run_name="r", n_layer=3)))
    for n_layer, alone in ((2, False), (3, True)):
        cfg = helpers.make_cfg(out_dir=tmp_path, run_name="r", resume="auto", n_layer=n_layer)
        checkpoint_, lock = resuming.lock_checkpoint(cfg, helpers.one_process())
        assert checkpoint_ is None and bool(lock) == alone
    lock.close()


def test_a_restart_before_the_first_checkpoint_starts_again_in_its_folder(tmp_path, monkeypatch):
    for name, torchrun in (("r", "other"), ("r-2", "mine"), ("r-3", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(run_name="r", torchrun=torchrun, started_at=1.0)))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    cfg = helpers.make_cfg(out_dir=tmp_path, run_name="r")
    checkpoint_, lock = resuming.lock_checkpoint(cfg, helpers.one_process())
    assert checkpoint_ is None and lock.folder == str(tmp_path / "r-2")
    lock.close()


def read_only(*folders):
    """Make folders look as on a read-only file system, also to root."""
    access = os.access
    return mock.patch.object(os, "access", lambda path, mode: access(path, mode) and not (
        mode & os.W_OK and any(str(path).startswith(str(folder)) for folder in folders)))


def test_a_read_only_run_continues_in_another_folder(tmp_path, shards, capsys, one_rank):
    """With --out_dir=elsewhere, the log goes on there. Nothing is written in the old one. Without --out_dir, one line
    says what helps."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "old" / "r", 3)
    before = contents(folder)
    with read_only(folder):
        for out_dir in (tmp_path / "old", f"{tmp_path}/old/r/.."):
            refused(capsys, out_dir, shards, 1, f"{folder} cannot be written", "--out_dir=FOLDER", resume=folder, **RUN)
        new = train_here(tmp_path / "new", shards, resume=folder, **RUN)
        out = capsys.readouterr().out
    assert new == tmp_path / "new" / "fp8" and contents(folder) == before
    assert f"resume: {folder} cannot be written; the run continues in a new folder in {tmp_path}/new\n" in out
    assert learned(new) == learned(one_rank["fp8"].folder) and in_ckpt(new) == [f"step_{s:06d}" for s in (4, 5, 6)]
    assert train_here(tmp_path / "new", shards, run_name="fp8", resume="auto", **RUN | dict(max_iters=7)) == new


@pytest.mark.slow
def test_auto_keeps_to_runs_of_its_name(tmp_path, shards):
    """A run that was named r-2 is not the second run of r. A renamed run folder is found by its new name."""
    first = train_here(tmp_path, shards, run_name="r", max_iters=2)
    other = train_here(tmp_path, shards, run_name="r-2", max_iters=3, seed=9)
    log = (other / "log.jsonl").read_bytes()
    assert train_here(tmp_path, shards, run_name="r", resume="auto", max_iters=4) == first
    assert (other / "log.jsonl").read_bytes() == log
    first.rename(tmp_path / "renamed")
    assert train_here(tmp_path, shards, run_name="renamed", resume="auto", max_iters=5) == tmp_path / "renamed"


@pytest.mark.slow
def test_going_back_to_an_earlier_checkpoint(tmp_path, shards, one_rank):
    """The run continues from there, even if it is killed before its next checkpoint and restarted with resume=auto: the
    later checkpoints belong to records that are gone."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "fp8", 2, 4)
    changes = RUN | dict(run_name="fp8", ckpt_interval=4)
    with before_step(1, kill), pytest.raises(Killed):
        train_here(tmp_path, shards, resume=folder / "ckpt" / "step_000002", **changes)
    train_here(tmp_path, shards, resume="auto", **changes)
    assert learned(folder) == learned(one_rank["fp8"].folder)


@pytest.mark.slow
def test_a_checkpoint_that_was_moved(tmp_path, shards, one_rank):
    """A checkpoint outside a run folder continues in a new run folder; nothing beside it is written or deleted."""
    moved = tmp_path / "models" / "step_000004"
    shutil.copytree(one_rank["fp8"].folder / "ckpt" / "step_000004", moved)
    (tmp_path / "ckpt" / "precious").mkdir(parents=True)
    (tmp_path / "ckpt" / "precious" / "file").touch()
    folder = train_here(tmp_path / "out", shards, run_name="r", resume=moved, **RUN)
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "models", "out"] and folder == tmp_path / "out" / "r"
    assert os.listdir(tmp_path / "models") == ["step_000004"] and os.listdir(tmp_path / "ckpt" / "precious") == ["file"]
    assert learned(folder) == [r for r in learned(one_rank["fp8"].folder) if r["step"] >= 4]


def touch_checkpoint(folder, when=None):
    """Make a folder that counts as a checkpoint saved at `when`, or (None) one that does not."""
    folder.mkdir(parents=True)
    if when is not None:
        step = int("".join(filter(str.isdigit, folder.name)) or 1)
        (folder / "meta.json").write_text(json.dumps(dict(
            step=step, tokens=step, world_size=1, train_seconds=1.0, flags={}, loader=dict(step=step, micro_batch=0),
            saved_at=when)))
    return str(folder)


def test_find_checkpoint(tmp_path):
    """Search a checkpoint, a run folder and a folder of runs. Only folders step_NNNNNN with meta.json count. In one run
    the most steps win, compared as numbers. Among runs the time in meta.json decides, not the files' time stamps."""
    assert find_checkpoint(str(tmp_path / "none")) is None and find_checkpoint(str(tmp_path)) is None
    run = tmp_path / "a [1]"
    newest = touch_checkpoint(run / "ckpt" / "step_1000000", 200)
    first = touch_checkpoint(run / "ckpt" / "step_000001", 300)  # as if the clock had been set back
    touch_checkpoint(run / "ckpt" / "step_999750", 100)
    other = touch_checkpoint(tmp_path / "b" / "ckpt" / "step_2000000", 150)
    touch_checkpoint(tmp_path / "b" / "ckpt" / "step_3000000")
    touch_checkpoint(tmp_path / "b" / "ckpt" / ".writing_3000001", 300)
    touch_checkpoint(tmp_path / "b" / "ckpt" / ".replaced_3000002", 300)
    touch_checkpoint(tmp_path / "b" / "step", 300)
    damaged = touch_checkpoint(tmp_path / "c" / "ckpt" / "step_000001", 400)
    pathlib.Path(damaged, "meta.json").write_text('{"step')
    assert find_checkpoint(first) == first and find_checkpoint(damaged) == damaged
    assert find_checkpoint(str(run)) == newest == find_checkpoint(str(run / "ckpt"))
    assert find_checkpoint(str(tmp_path / "b")) == other
    assert find_checkpoint(str(tmp_path)) == newest
    assert complete_checkpoints(str(run / "ckpt")) == [first, str(run / "ckpt" / "step_999750"), newest]


# -----------------------------------------------------------------------------------------------------
# Keeping, failing, damaged


@pytest.mark.slow
@pytest.mark.parametrize("keep,names", [(1, ["step_000006"]), (2, ["step_000005", "step_000006"]),
                                        (4, [f"step_{s:06d}" for s in (3, 4, 5, 6)])])
def test_the_newest_checkpoints_stay(tmp_path, shards, keep, names):
    folder = train_here(tmp_path, shards, ckpt_interval=1, keep_checkpoints=keep, USE_FP8=False)
    assert in_ckpt(folder) == names


@pytest.mark.slow
def test_a_resumed_run_deletes_what_is_half_written(tmp_path, shards, one_rank):
    """It deletes what a killed run left half written or half deleted, and keeps the newest complete checkpoints."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 1, 2, 3, 4)
    for name in (".writing_000005", ".replaced_000003"):
        shutil.copytree(folder / "ckpt" / "step_000004", folder / "ckpt" / name)
    (folder / "ckpt" / ".writing_000005" / "meta.json").unlink()
    (folder / "ckpt" / "step_000001" / "meta.json").unlink()
    train_here(tmp_path, shards, resume=folder, **RUN | dict(ckpt_interval=0, keep_checkpoints=3))
    assert in_ckpt(folder) == ["step_000003", "step_000004", "step_000006"]
    assert learned(folder) == learned(one_rank["fp8"].folder)


@pytest.mark.slow
def test_a_checkpoint_at_the_end_and_at_intervals(tmp_path, shards, capsys):
    folder = train_here(tmp_path, shards, ckpt_interval=4, keep_checkpoints=9, USE_FP8=False)
    assert in_ckpt(folder) == ["step_000004", "step_000006"]
    out = capsys.readouterr().out
    assert "step 4/6 | checkpoint started" in out and "step 6/6 | checkpoint started" in out
    assert out.count("checkpoint started") == 2


def failing_writes(how, patch):
    """Make the first checkpoint of a run fail; return a word of the reason."""
    save, calls = dcp.save, []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_at_first(*args, **kwargs):  # a disk that takes 50 kB of a file, and later more
        calls.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]) if len(calls) == 1 else limit)
        return save(*args, **kwargs)

    def no_thread_at_first(self, *args, submit=ThreadPoolExecutor.submit, **kwargs):
        if args[0].__name__ == "fingerprint":  # of shards, at the start
            return submit(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("can't start new thread")
        return submit(self, *args, **kwargs)

    def fsync_fails(descriptor, fsync=os.fsync):
        if descriptor not in calls:
            calls.append(descriptor)
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    def blocked(*args, make=runlog.make_run_folder):
        folder = make(*args)
        pathlib.Path(folder, "ckpt").write_text("a file where the folder should be")
        return folder

    if how == "a file in the way":
        patch.setattr(runlog, "make_run_folder", blocked)
    elif how == "meta.json":  # all but the last file could be written
        patch.setattr(json, "dump", lambda value, f, dump=json.dump, **k: dump(value, f, **k) if not f.name.endswith(
            "000002/meta.json") else f.write("{") and fsync_fails(-1))
    elif how == "no thread":
        patch.setattr(ThreadPoolExecutor, "submit", no_thread_at_first)
    else:
        patch.setattr(dcp, "save", full_at_first)
    return {"no thread": "can't start new thread", "file size": "", "a file in the way": "",
            "meta.json": "No space left"}[how]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no thread", "file size", "meta.json", "a file in the way"])
def test_a_write_that_fails_is_printed_and_training_continues(tmp_path, shards, capsys, monkeypatch, one_rank, how):
    """The checkpoint after 2 steps fails and the one after 4 works, unless a file blocks the folder: then the last one
    fails too, and so does the run. Nothing half written stays."""
    limit, blocked, folder = resource.getrlimit(resource.RLIMIT_FSIZE), how == "a file in the way", tmp_path / "gpt"
    try:
        word = failing_writes(how, monkeypatch)
        with pytest.raises(SystemExit) if blocked else contextlib.nullcontext() as stopped:
            train_here(tmp_path, shards, **RUN | dict(ckpt_interval=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    captured = capsys.readouterr()
    if blocked:
        assert stopped.value.code == 1 and captured.err.count("\n") == 1
        assert "after 6 steps" in captured.err and "could not be written" in captured.err
    lines = [line for line in captured.out.splitlines() if "checkpoint at step" in line and "failed" in line]
    steps = (2, 4, 6) if blocked else (2,)
    assert len(lines) == len(steps) and "Traceback" not in captured.out + captured.err, lines
    for line, step in zip(lines, steps, strict=True):
        assert line.startswith(f"checkpoint at step {step} failed, training continues: ") and word in line
        assert len(line.split("continues: ")[1]) > 5  # says why
    assert learned(folder) == learned(one_rank["fp8"].folder)
    if blocked:
        assert (folder / "ckpt").is_file()
    else:
        assert in_ckpt(folder) == ["step_000004", "step_000006"]
        assert same_tensors(read_weights(folder / "ckpt" / "step_000004", one_rank["fp8"].saved[4]),
                            one_rank["fp8"].saved[4])


def small_checkpoints(folder, keep=2, *steps):
    """Return Checkpoints of a run folder, and a function that saves after a step and waits; save after `steps`."""
    checkpoints = Checkpoints(str(folder), keep, start_processes())

    def save(step):
        state = dict(model=dict(weight=torch.full((1000,), float(step))))
        checkpoints.save(step, lambda: state, dict(step=step, tokens=step, world_size=1, train_seconds=1.0, flags={},
                                                   loader=dict(step=step, micro_batch=0)))
        checkpoints.finish(wait=True)

    for step in steps:
        save(step)
    return checkpoints, save


def test_saving_imports_nothing_after_the_start(tmp_path):
    """run.sh may replace the environment while a run trains. In a process of its own: here all was imported before."""
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from nanofp8.checkpoint import Checkpoints
        from nanofp8.procs import start_processes
        checkpoints = Checkpoints({str(tmp_path)!r}, 2, start_processes())
        before = set(sys.modules)
        sys.meta_path.clear()  # from here on, no module is found
        state = dict(model=dict(weight=torch.ones(1000)))
        checkpoints.save(1, lambda: state, dict(step=1))
        checkpoints.finish(wait=True)
        print(sorted(set(sys.modules) - before), checkpoints.failure, checkpoints.last)
        checkpoints.close()
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert result.stdout == f"[]  {tmp_path / 'ckpt' / 'step_000001'}\n", result.stdout + result.stderr


def test_too_little_pinned_memory_is_said_once_and_saving_goes_on(tmp_path, capsys, monkeypatch):
    """As under WSL2, where CUDA pins less than the state of the default model."""
    checkpoints, save = small_checkpoints(tmp_path)
    kinds, real = [], dcp.staging.BlockingAsyncStager

    def stager(cache_staged_state_dict):
        kinds.append(cache_staged_state_dict)
        if not cache_staged_state_dict:
            return real(cache_staged_state_dict=False)

        def fail(state):
            raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`.")
        return SimpleNamespace(stage=fail)

    monkeypatch.setattr(dcp.staging, "BlockingAsyncStager", stager)
    checkpoints.pinned = True  # as on a GPU
    save(1)
    save(2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "pinned" in line]
    assert "rank 0" in line and "CUDA error: out of memory" in line
    assert kinds == [True, False] and in_ckpt(tmp_path) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("failures,free,names", [
    (1, 1000, ["step_000003", "step_000004"]), (2, 1000, ["step_000003"]),
    (2, 1e9, ["step_000001", "step_000002", "step_000003"])])
def test_a_full_disk_costs_older_checkpoints_but_the_newest(tmp_path, capsys, failures, free, names):
    """torch's writer fails without a reason; what is free says that the disk is full. Then one more attempt is made.
    A write that fails for another reason deletes nothing."""
    checkpoints, save = small_checkpoints(tmp_path, 9, 1, 2, 3)
    real, errors = dcp.save, [RuntimeError("PytorchStreamWriter failed writing file")] * failures

    def fails(state, checkpoint_id, **options):
        assert len(in_ckpt(tmp_path)) > 2 or len(errors) < failures  # nothing is deleted before the first attempt
        if errors:
            os.makedirs(checkpoint_id)
            raise errors.pop()
        real(state, checkpoint_id=checkpoint_id, **options)

    with mock.patch.object(dcp, "save", fails), \
            mock.patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=free)):
        save(4)
    out = capsys.readouterr().out
    assert in_ckpt(tmp_path) == names and checkpoints.last.endswith(names[-1])
    full, failed = free == 1000, failures > 1
    assert ("checkpoint at step 4: the disk is too full (a checkpoint takes 0.0 MB, 0.0 MB are free); "
            "deleted step_000001, step_000002, trying once more" in out) == full
    assert ("checkpoint at step 4 failed" in out) == bool(checkpoints.failure) == failed
    assert ("too full" in checkpoints.failure) == (full and failed)
    checkpoints.close()


def test_the_writer_lets_training_run(tmp_path):
    """Python's own interval of 5 ms would hold up each operation that training launches meanwhile."""
    before, seen = sys.getswitchinterval(), []
    checkpoints, save = small_checkpoints(tmp_path, 2)
    real = dcp.save
    with mock.patch.object(dcp, "save", lambda *args, **options: (seen.append(sys.getswitchinterval()),
                                                                  real(*args, **options))):
        save(1)
    assert seen[0] < 1e-3 < before == sys.getswitchinterval()
    checkpoints.close()


def test_only_what_exceeds_keep_is_deleted_before_a_write(tmp_path):
    """keep_checkpoints was lowered: the others make room. Those to keep stay until the new one is on disk."""
    small_checkpoints(tmp_path, 9, 1, 2, 3, 4)[0].close()
    checkpoints, save = small_checkpoints(tmp_path, 2)
    with mock.patch.object(dcp, "save", side_effect=RuntimeError("broken")):
        save(5)
    assert in_ckpt(tmp_path) == ["step_000003", "step_000004"] and checkpoints.failure == "broken"
    save(6)
    assert in_ckpt(tmp_path) == ["step_000004", "step_000006"] and not checkpoints.failure
    checkpoints.close()


@pytest.mark.parametrize("failure, remedy", [("No space left on device", "--out_dir"),
                                             (checkpoint.NOT_FINITE, "learning rate")])
def test_the_remedy_for_a_last_checkpoint_that_failed_fits(failure, remedy):
    run = SimpleNamespace(
        procs=helpers.one_process(), checkpoints=SimpleNamespace(last=None, failure=failure),
        cfg=SimpleNamespace(keep_checkpoints=2, max_iters=6), progress=SimpleNamespace(done=lambda: None))
    with pytest.raises(UserError) as error:
        checkpoint.finish_run(run, run.cfg.max_iters)
    assert remedy in str(error.value) and failure in str(error.value)


def test_the_python_to_start_sample_py_with(tmp_path, monkeypatch):
    """The one that trained; it is "python" only where that is in the PATH."""
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    python = tmp_path / "my venv" / "bin" / "python"
    python.write_text("#!/bin/sh")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.python_command() == "'my venv/bin/python'"
    monkeypatch.chdir("/")
    assert checkpoint.python_command() in (f"'{python}'", f"'{str(python)[1:]}'")
    monkeypatch.setenv("PATH", str(python.parent))
    assert checkpoint.python_command() == "python"


@pytest.mark.parametrize("where", ["model", "optim"])
def test_what_is_not_finite_is_not_saved(tmp_path, capsys, where):
    """Nor does it push out a good checkpoint."""
    checkpoints, save = small_checkpoints(tmp_path, 1, 1)
    state = dict(model=dict(w=torch.ones(3)), optim=dict(w=dict(momentum=torch.ones(3), step=torch.tensor(4))))
    (state["model"]["w"] if where == "model" else state["optim"]["w"]["momentum"])[1] = torch.nan
    checkpoints.save(2, lambda: state, {})
    checkpoints.finish(wait=True)
    assert "checkpoint at step 2 failed, training continues: weights or optimizer state are not finite" in \
        capsys.readouterr().out
    assert in_ckpt(tmp_path) == ["step_000001"] and "not finite" in checkpoints.failure
    checkpoints.close()


def test_a_run_whose_last_checkpoint_finds_a_full_disk_fails(tmp_path, shards, capsys):
    with mock.patch.object(dcp, "save", side_effect=RuntimeError("PytorchStreamWriter failed writing file")), \
            mock.patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e5)):
        error = refused(capsys, tmp_path, shards, 1, "trained to the end after 1 steps", "could not be written",
                        "disk is too full", "0.1 MB are free", "Newest checkpoint: none", "--out_dir", max_iters=1)
    assert "a checkpoint takes 1.7 MB" in error and records(tmp_path / "gpt", "done")


def damage(folder, how):
    data = next(folder.glob("*.distcp"))
    if how == "truncated data":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "start of the data":
        data.write_bytes(data.read_bytes()[:1000])
    elif how == "empty data":
        data.write_bytes(b"")
    elif how == "no data":
        data.unlink()
    elif how == "truncated index":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:1000])
    elif how == "no index":
        (folder / ".metadata").unlink()
    elif how == "another index":
        (folder / ".metadata").write_bytes(pickle.dumps({"not": "ours"}))
    else:
        (folder / "meta.json").write_text({"half meta": '{"step": 4, "fla', "empty meta": "{}",
                                           "listed meta": "[]"}.get(how) or json.dumps(
            json.loads((folder / "meta.json").read_text()) | ODD_META[how]))


ODD_META = {f"meta {key} {value}": {key: value} for key, value in (
    ("step", 5), ("tokens", "9"), ("world_size", 0), ("loader", {}), ("train_seconds", None), ("stages", "often"),
    ("stages", [[0, 64], [2, 256]]), ("stages", [[1, 128], [2, 256]]), ("stages", [[0, 128], [-1, 256]]))}


@pytest.mark.parametrize("how",
                         ["truncated data", "start of the data", "empty data", "no data", "truncated index", "no index",
                          "another index",
                                 "half meta", "empty meta", "listed meta", *ODD_META])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, shards, capsys, one_rank, how):
    """The run folder stays as it was."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 4)
    damage(folder / "ckpt" / "step_000004", how)
    before = (folder / "log.jsonl").read_bytes()
    error = refused(capsys, tmp_path, shards, 1, "step_000004", resume=folder, **RUN)
    assert len(error) < 600
    assert (folder / "log.jsonl").read_bytes() == before
    if how == "truncated data":  # the model's part may lie in the half that is left: then it is whole, to the bit
        with contextlib.suppress(UserError):
            assert same_tensors(read_weights(folder / "ckpt" / "step_000004", one_rank["fp8"].saved[4]),
                                one_rank["fp8"].saved[4])
    elif "meta" not in how:
        with pytest.raises(UserError, match="cannot load.*step_000004"):
            read_weights(folder / "ckpt" / "step_000004", one_rank["fp8"].saved[4])


def flip_bit(path, position=2000):
    """Flip a bit of a file, which keeps its length."""
    with open(path, "r+b") as f:
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ 4]))


def make_weights_nan(folder, like):
    """Make a checkpoint one that older code saved: its weights are not finite, and it has no checksums."""
    weights = read_weights(folder, like)
    weights["head.weight"][7, 3] = torch.nan
    dcp.save({"model": weights}, checkpoint_id=str(folder), no_dist=True)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"]
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE = {"flipped bit": "its checksum is wrong", "truncated data": "too short", "no data": "is missing",
          "no index": "is missing", "half meta": "not a complete checkpoint", "nan": "weights that are not finite"}


def damaged_run(tmp_path, run, how):
    """Copy a run with its checkpoints after 2, 4 and 6 steps, and damage the newest."""
    folder = copy_of_run(run.folder, tmp_path / "r", 2, 4, 6)
    newest = folder / "ckpt" / "step_000006"
    if how == "flipped bit":
        flip_bit(next(newest.glob("*.distcp")))
    elif how == "nan":
        make_weights_nan(newest, run.saved[6])
    else:
        damage(newest, how)
    return folder


def chosen(tmp_path, **changes):
    """Return the checkpoint that a run would continue from."""
    checkpoint_, lock = resuming.lock_checkpoint(helpers.make_cfg(out_dir=tmp_path, run_name="r", **changes),
                                                   helpers.one_process())
    if lock:
        lock.close()
    return checkpoint_


@pytest.mark.parametrize("how", DAMAGE)
def test_auto_continues_from_the_next_older_whole_checkpoint(tmp_path, capsys, one_rank, how):
    """The damaged one is renamed, never deleted, and a line says why. A restart by torchrun does the same."""
    folder = damaged_run(tmp_path, one_rank["fp8"], how)
    assert chosen(tmp_path, resume="auto") == str(folder / "ckpt" / "step_000004")
    assert in_ckpt(folder) == ["step_000002", "step_000004", "step_000006.damaged"]
    out = capsys.readouterr().out
    verified, line = out.splitlines()
    assert line.startswith("resume: ") and "step_000006" in line and DAMAGE[how] in line
    assert line.endswith(f"kept as step_000006.damaged, continuing from {folder}/ckpt/step_000004")
    assert verified.startswith(f"checkpoint {folder}/ckpt/step_000004: 0.00 GB verified in ")
    # The one that is set aside no longer counts
    assert chosen(tmp_path, resume="auto") == str(folder / "ckpt" / "step_000004")
    assert capsys.readouterr().out.count("\n") == 1


def test_a_restart_falls_back_and_a_path_never_does(tmp_path, capsys, monkeypatch, one_rank):
    folder = damaged_run(tmp_path, one_rank["fp8"], "flipped bit")
    flip_bit(next((folder / "ckpt" / "step_000004").glob("*.distcp")))
    for path in (folder, folder / "ckpt" / "step_000006", tmp_path):
        with pytest.raises(UserError, match="step_000006.*its checksum is wrong; the next older whole one is "
                                            f"--resume={folder}/ckpt/step_000002"):
            chosen(tmp_path, resume=path)
    assert in_ckpt(folder) == ["step_000002", "step_000004", "step_000006"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(torchrun="mine")))
    assert chosen(tmp_path, resume=folder) == str(folder / "ckpt" / "step_000002")
    assert in_ckpt(folder) == ["step_000002", "step_000004.damaged", "step_000006.damaged"]


def test_a_run_without_a_whole_checkpoint_is_an_error(tmp_path, one_rank):
    """It does not start anew, and nothing is renamed: a copy may be brought back."""
    folder = damaged_run(tmp_path, one_rank["fp8"], "half meta")
    for step in (2, 4):
        damage(folder / "ckpt" / f"step_{step:06d}", "no data")
    for _ in range(2):
        with pytest.raises(UserError, match="no older one beside it is whole"):
            chosen(tmp_path, resume="auto")
    assert in_ckpt(folder) == ["step_000002", "step_000004", "step_000006"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_no_other_checkpoint_is_tried_after_an_error_that_is_not_its_fault(tmp_path, one_rank, error):
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 4, 6)
    with mock.patch.object(torch, "load", side_effect=error), \
            pytest.raises(UserError, match="Input/output error|too little memory"):
        chosen(tmp_path, resume="auto")
    assert in_ckpt(folder) == ["step_000004", "step_000006"]


@pytest.mark.parametrize("blind", [0, 1])
def test_a_machine_that_does_not_see_the_files_is_no_damage(tmp_path, one_rank, blind):
    """One rank misses what another sees: nothing is set aside, and no older checkpoint is tried."""
    folder = copy_of_run(one_rank["fp8"].folder, tmp_path / "r", 4, 6)
    newest = folder / "ckpt" / "step_000006"
    names = os.listdir(newest)
    if blind == 0:
        (newest / "__0_0.distcp").unlink()
        of_rank_1 = {tuple: ("", None), list: names}
    else:
        of_rank_1 = {tuple: (f"{newest}/meta.json is missing", None), list: []}
    with mock.patch.object(Processes, "gather", lambda self, value: [value, of_rank_1[type(value)]]), \
            pytest.raises(UserError, match="rank 0 and rank 1 do not see the same files.*all machines need the same"):
        chosen(tmp_path, resume="auto")
    assert in_ckpt(folder) == ["step_000004", "step_000006"]


def test_a_machine_that_does_not_see_the_run_folder(tmp_path):
    """It is said at the start, in one line, and the folder is removed again. Without checkpoints it does not matter."""
    def gather(self, value):
        return [value, False]

    for keep in (2, 0):
        cfg = helpers.make_cfg(out_dir=str(tmp_path), keep_checkpoints=keep)
        with contextlib.ExitStack() as cleanup, mock.patch.object(Processes, "gather", gather), \
                pytest.raises(UserError, match="rank 1 does not see .*--out_dir.*--keep_checkpoints=0") if keep else \
                contextlib.nullcontext():
            folder, _ = resuming.open_run_folder(cfg, helpers.one_process(), None, cleanup)
            assert folder == str(tmp_path / "gpt")
        assert not os.listdir(tmp_path)


def no_rename(number, where=""):
    """Let no folder below `where` be renamed that holds a file: os.rename fails with this errno."""
    def rename(source, target, rename=os.rename):
        if str(where) in str(source) and os.path.isdir(source) and os.listdir(source):
            raise OSError(number, os.strerror(number))
        rename(source, target)
    return mock.patch.object(os, "rename", rename)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EXDEV, errno.ENOSYS, errno.EPERM])
def test_a_file_system_that_cannot_rename_folders(tmp_path, number):
    """It is said at the start, in one line, and nothing is left. Without checkpoints it does not matter."""
    for keep in (2, 0):
        cfg = helpers.make_cfg(out_dir=str(tmp_path), keep_checkpoints=keep)
        with contextlib.ExitStack() as cleanup, no_rename(number), \
                pytest.raises(UserError, match=re.escape(f"cannot rename folders ({os.strerror(number)})") +
                              ".*--out_dir.*--keep_checkpoints=0") if keep else contextlib.nullcontext():
            folder, _ = resuming.open_run_folder(cfg, helpers.one_process(), None, cleanup)
            assert os.listdir(folder) == []
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [0, errno.ENOSPC, errno.ENOENT, errno.ESTALE])
def test_trying_to_rename_a_folder_leaves_nothing(tmp_path, number):
    """Also where the disk is full. Two runs in one out_dir try it at the same time."""
    cfg = helpers.make_cfg(out_dir=str(tmp_path))
    with contextlib.ExitStack() as cleanup, no_rename(number) if number else contextlib.nullcontext():
        with ThreadPoolExecutor(2) as pool:
            opened = [pool.submit(resuming.open_run_folder, cfg, helpers.one_process(), None, cleanup)
                      for _ in range(2)]
        assert {future.result()[0] for future in opened} == {str(tmp_path / "gpt"), str(tmp_path / "gpt-2")}
        assert [os.listdir(tmp_path / name) for name in os.listdir(tmp_path)] == [[], []]
        (tmp_path / "gpt" / "ckpt").write_text("")
        assert resuming.why_folders_cannot_be_renamed(str(tmp_path / "gpt")) == ""
        (tmp_path / "gpt" / "ckpt").unlink()
    assert os.listdir(tmp_path) == []


def test_a_kill_while_renaming_is_tried_leaves_what_the_next_start_deletes(tmp_path):
    with mock.patch.object(os, "rename", side_effect=Killed), pytest.raises(Killed):
        resuming.why_folders_cannot_be_renamed(str(tmp_path))
    assert len(in_ckpt(tmp_path)) == 1 and runlog.holds_only_a_log(str(tmp_path))
    Checkpoints(str(tmp_path), 2, start_processes())
    assert in_ckpt(tmp_path) == []


def test_a_run_whose_folder_cannot_rename_folders_continues_elsewhere(tmp_path, one_rank, capsys):
    """With another --out_dir. Without it, one line says so. Its checkpoints stay as they are."""
    folder = copy_of_run(one_rank["bf16"].folder, tmp_path / "old" / "r", 3)
    before = in_ckpt(folder)
    for explicit, out_dir in ((False, tmp_path / "old"), (True, tmp_path / "old"), (True, tmp_path / "new")):
        cfg = helpers.make_cfg(**dict(out_dir=str(out_dir)) if explicit else {})
        with contextlib.ExitStack() as cleanup, no_rename(errno.EMFILE, tmp_path / "old"):
            lock = cleanup.enter_context(contextlib.closing(FolderLock(str(folder))))
            if out_dir == tmp_path / "new":
                found, _ = resuming.open_run_folder(cfg, helpers.one_process(), lock, cleanup)
                assert found == str(out_dir / "gpt")
                assert "cannot rename folders (Too many open files)" in capsys.readouterr().out
            else:
                with pytest.raises(UserError, match="cannot rename folders .*continue elsewhere with --out_dir=FOLDER"):
                    resuming.open_run_folder(cfg, helpers.one_process(), lock, cleanup)
    assert in_ckpt(folder) == before


def test_a_run_continues_after_its_newest_checkpoint_was_damaged(tmp_path, shards, one_rank):
    """The whole run equals the undamaged one. What was set aside stays."""
    folder = damaged_run(tmp_path, one_rank["fp8"], "flipped bit")
    assert train_here(tmp_path, shards, run_name="r", resume="auto", **RUN) == folder
    assert learned(folder) == learned(one_rank["fp8"].folder)
    assert in_ckpt(folder) == [f"step_{s:06d}" for s in (2, 4, 5, 6)] + ["step_000006.damaged"]


# -----------------------------------------------------------------------------------------------------
# Muon's state, between TorchMuon and Dion


@pytest.mark.slow
@pytest.mark.parametrize("source,target", [("torch", "dion"), ("dion", "torch"), ("dion", "dion")])
def test_muon_state_goes_from_one_implementation_to_the_other(tmp_path, shards, one_rank, source, target):
    """Dion adds gradients up; torch averages them with weight 1 - momentum. The converted sums agree to fp32 rounding;
    embedding, head, gains and their moments are exact. Then the run continues."""
    pytest.importorskip("dion")
    run = WHOLE["bf16"] | dict(ckpt_interval=3)
    folder = copy_of_run(train_here(tmp_path, shards, run_name="a", muon_impl=source, **run), tmp_path / "r", 3)
    momenta = {}

    def seen(run):
        muon = run.optimizers.muon
        state = muon.momentum() if isinstance(muon, TorchMuon) else {p: s["momentum"] for p, s in muon.state.items()}
        return {n: helpers.whole(state[p]) for n, p in run.model.named_parameters() if p in state}

    def save(self, step, make_state, meta, save=Checkpoints.save):
        (cell,) = make_state.__closure__
        momenta[step] = seen(cell.cell_contents)
        return save(self, step, make_state, meta)

    def spied_restore(run, *rest):
        result = restore(run, *rest)
        momenta["restored"] = seen(run)
        return result

    with mock.patch.object(Checkpoints, "save", save):
        original = train_here(tmp_path, shards, run_name="b", muon_impl=source, **run)
    with mock.patch.object(checkpoint, "restore", spied_restore):
        train_here(tmp_path, shards, resume=folder, muon_impl=target, **run)
    assert momenta[3].keys() == momenta["restored"].keys() and len(momenta[3]) == 8
    for name, sum_of_gradients in momenta[3].items():
        assert helpers.relative(momenta["restored"][name],
                                sum_of_gradients) < (1e-6 if source != target else 1e-12), name
    assert losses(original).tolist()[:3] == losses(folder).tolist()[:3]
    gap = np.abs(losses(folder) - losses(original)).max()
    # Dion's singular values lie between 0.86 and 1.14, TorchMuon's at 1: other steps of nearly the same size
    assert gap < 0.05 if source != target else gap == 0, gap


@pytest.mark.parametrize("source,target", [("torch", "dion"), ("dion", "torch"), ("dion", "dion"), ("torch", "torch")])
def test_normuons_state_goes_from_one_implementation_to_the_other(tmp_path, source, target):
    """Momenta are converted; the rows' averaged squares are the same number in both, and so are AdamW's moments. The
    next step is the one that the source would take, but for Dion's other orthogonalization."""
    if "dion" in (source, target):
        pytest.importorskip("dion")

    def make(impl):
        cfg = helpers.make_cfg(muon_impl=impl, USE_FP8=False, **NORMUON_PARTS)
        loader = SimpleNamespace(start_step=lambda step: None)
        run = helpers.make_run(cfg, helpers.one_process(), helpers.make_model(cfg), loader)
        run.optimizers.warm_up(run.parallel)
        return run

    def step(run, number):
        run.optimizers.set_schedule(number)
        helpers.random_grads(run.model, 50 + number)
        run.optimizers.step()
        return {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def momenta(run):
        muon = run.optimizers.muon
        state = muon.momentum() if isinstance(muon, TorchMuon) else {p: s["momentum"] for p, s in muon.state.items()}
        return {name: state[p].clone() for name, p in run.model.named_parameters() if p in state}

    run, resumed = make(source), make(target)
    for number in range(3):
        before = step(run, number)
    state, folder = checkpoint.training_state(run), str(tmp_path / "step_000003")
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    restore(resumed, folder, dict(world_size=1, step=3, **run.optimizers.meta))
    for name, momentum in momenta(run).items():
        assert helpers.relative(momenta(resumed)[name], momentum) < (1e-6 if source != target else 1e-12), name
    got = checkpoint.training_state(resumed)["optim"]
    for name, tensors in state["optim"].items():
        others = {key: tensor for key, tensor in tensors.items() if key != "momentum"}
        assert same_tensors({key: got[name][key] for key in others}, others), name
    assert sum("variance_neuron" in tensors for tensors in state["optim"].values()) == 8
    want, after = step(run, 3), step(resumed, 3)
    for name, p in before.items():
        gap = helpers.relative(after[name] - p, want[name] - p)
        assert gap < (0.15 if source != target and "blocks" in name else 1e-12), name


def slow_write(write):
    """write_once(), but after half a second."""
    def slowly(*args):
        time.sleep(0.5)
        return write(*args)

    return slowly


def test_an_error_does_not_lose_the_checkpoint_that_is_being_written(tmp_path, shards, fresh, capsys):
    """The last evaluation fails, right after the checkpoint of the last step began."""
    with (mock.patch.object(Checkpoints, "write_once", autospec=True, side_effect=slow_write(Checkpoints.write_once)),
          mock.patch.object(train, "evaluate", side_effect=UserError("the disk is gone"))):
        with pytest.raises(SystemExit):
            train_here(tmp_path / "out", shards, max_iters=2, run_name="broken", eval_interval=0)
    assert "the disk is gone" in capsys.readouterr().err
    run = tmp_path / "out" / "broken"
    assert find_checkpoint(str(run)).endswith("step_000002")
    assert [r["step"] for r in records(run, "train")] == [0, 1]
