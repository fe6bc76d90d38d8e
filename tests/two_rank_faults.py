"""Faults of two ranks, on CPUs or on two GPUs: a killed rank under torchrun, a full disk, a damaged checkpoint.

tests/test_checkpoint.py, tests/test_faults.py and tests/gpu/test_faults_gpu.py run them with flags of their own. All
runs take STEPS steps with a checkpoint every second one, and are compared with one that nothing happens to ("whole").
"""

import contextlib
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import textwrap
import time
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import pytest
import torch.distributed.checkpoint as dcp

import train
from helpers import ROOT, copy_of_run, finish, in_ckpt, records, start
from nanofp8.config import UserError
from nanofp8.procs import Processes
from nanofp8.runlog import RunLog

STEPS = 8
FLAGS = dict(max_iters=STEPS, ckpt_interval=2, eval_interval=0, rank_timeout=30)

# Does run_here() in processes of its own
WORKER = """
    import json, pathlib, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import train, two_rank_faults
    import torch.distributed as dist
    from nanofp8.procs import start_processes
    spec = json.load(open(sys.argv[1]))
    two_rank_faults.run_here(start_processes(), pathlib.Path(spec["out"]), spec["arguments"])
    dist.destroy_process_group()
"""

# train.py, whose rank 1 waits before its fifth step to be killed, while rank 0 waits for it in a collective
WAITING = """
    import os, pathlib, sys, time
    sys.path.insert(0, {root!r})
    import train
    from nanofp8.runlog import RunLog
    RunLog.plot = lambda self: None

    def train_step(run, step=train.train_step):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.loader.index == 4 * run.loader.accumulation:
            run.checkpoints.finish(wait=True)
            if os.environ["RANK"] == "1":
                time.sleep(2)  # rank 0 is in the collective
                pathlib.Path({pid!r} + ".new").write_text(str(os.getpid()))
                os.rename({pid!r} + ".new", {pid!r})
                time.sleep(600)
        return step(run)

    train.train_step = train_step
    train.main()
"""


def damage_newest(run: pathlib.Path, to: pathlib.Path) -> None:
    """Copy a run with its checkpoints after 4 and 6 steps, and change a byte that rank 1 has written in the newer."""
    copy_of_run(run, to, 4, 6)
    with open(to / "ckpt" / "step_000006" / "__1_0.distcp", "r+b") as f:
        f.seek(2000)
        byte = f.read(1)[0]
        f.seek(2000)
        f.write(bytes([byte ^ 4]))


def save_on_a_full_disk(*args: Any, checkpoint_id: str, save: Callable = dcp.save, **options: Any) -> Any:
    """Stand for dcp.save() on a disk that has no room for the checkpoints after 6 and 8 steps."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(checkpoint_id[-6:]) >= 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        return save(*args, checkpoint_id=checkpoint_id, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run_here(procs: Processes, out: pathlib.Path, arguments: list[str]) -> None:
    """Run all but the killed rank in this process, one of two, and write how each run ended to out/ends.json."""
    ends = {}
    for name, run_name, more in (("whole", "whole", ["--keep_checkpoints=9"]), ("full", "full", []),
                                 ("full, resumed", "full", ["--resume=auto"]),
                                 ("damaged", "damaged", ["--resume=auto", "--keep_checkpoints=2"])):
        argv = [*arguments, *flag_list(FLAGS), f"--out_dir={out}", f"--run_name={run_name}", *more]
        if name == "damaged":
            if procs.is_main:
                damage_newest(out / "whole", out / "damaged")
            procs.broadcast(None)
        ends[name] = dict(error="", status=0)
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(RunLog, "plot", lambda self: None))
            if name == "full":
                patches.enter_context(mock.patch.object(dcp, "save", save_on_a_full_disk))
                patches.enter_context(mock.patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000)))
            try:
                train.run(train.read_flags(argv), procs)
            except UserError as error:  # on both ranks alike
                ends[name] = dict(error=str(error), status=error.status)
        gc.enable()
        gc.unfreeze()
        gc.collect()
    if procs.is_main:
        (out / "ends.json").write_text(json.dumps(ends))


def flag_list(flags: dict) -> list[str]:
    """Return flags as a command line."""
    return [f"--{name}={value}" for name, value in flags.items()]


def start_faults(folder: pathlib.Path, arguments: list[str], **env: str) -> list:
    """Start WORKER on two ranks. arguments: of train.py. env: variables, such as CUDA_VISIBLE_DEVICES."""
    (folder / "spec.json").write_text(json.dumps(dict(out=str(folder / "out"), arguments=arguments)))
    (folder / "worker.py").write_text(textwrap.dedent(WORKER).format(root=str(ROOT), tests=str(ROOT / "tests")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start("-u", folder / "worker.py", folder / "spec.json", cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank),
                  WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env) for rank in range(2)]


def kill_a_rank(folder: pathlib.Path, arguments: list[str], **env: str) -> SimpleNamespace:
    """Start a run under torchrun with one restart, kill rank 1 by SIGKILL, and wait for the end of the run."""
    pid = folder / "pid"
    (folder / "train.py").write_text(textwrap.dedent(WAITING).format(root=str(ROOT), pid=str(pid)))
    process = start("-u", "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--max_restarts=1",
                    "--nproc_per_node=2", folder / "train.py", *arguments, *flag_list(FLAGS),
                    f"--out_dir={folder / 'out'}", "--run_name=killed", cwd=folder, **env)
    try:
        deadline = time.monotonic() + 180
        while not pid.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                pytest.fail(f"rank 1 did not reach its fifth step: {process.communicate()}")
            time.sleep(0.05)
        os.kill(int(pid.read_text()), signal.SIGKILL)
        return finish(process, timeout=180)
    finally:
        process.terminate()  # torchrun ends its workers


def run_faults(folder: pathlib.Path, arguments: list[str], **env: str) -> SimpleNamespace:
    """Run all faults in an empty folder: the killed rank, and at the same time the others.

    Args: arguments: of train.py, beside FLAGS. env: variables, such as CUDA_VISIBLE_DEVICES.
    Returns: what read_faults() returns, and killed (code, out, err).
    """
    (folder / "out").mkdir()
    ranks = start_faults(folder, arguments, **env)
    try:
        killed = kill_a_rank(folder, arguments, **env)
        results = [finish(process, timeout=180) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [result.code for result in results] == [0, 0], [r.out[-2000:] + r.err[-2000:] for r in results]
    return SimpleNamespace(killed=killed, **vars(read_faults(folder / "out", results[0].out)))


def read_faults(out: pathlib.Path, text: str) -> SimpleNamespace:
    """Return what the checks below need of run_here().

    Returns: out (folder of runs), text (what rank 0 printed), ends ({name: error and status}).
    """
    return SimpleNamespace(out=out, text=text, ends=json.loads((out / "ends.json").read_text()))


def check_same_losses(a: pathlib.Path, b: pathlib.Path, tolerance: float) -> None:
    """Check that two run folders have the same steps once each, and the same losses."""
    for kind, key, count in (("train", "loss", STEPS), ("val", "val_loss", 1), ("done", "val_loss", 1)):
        found = [records(folder, kind) for folder in (a, b)]
        assert [r["step"] for r in found[0]] == [r["step"] for r in found[1]] and len(found[0]) == count, (kind, found)
        gaps = [abs(x[key] - y[key]) for x, y in zip(*found, strict=True)]
        assert max(gaps) <= tolerance, (kind, gaps)


def check_killed_rank(faults: SimpleNamespace, tolerance: float) -> None:
    """Rank 0 names the rank that was killed; both start again and end with the losses of the whole run."""
    result = faults.killed
    assert result.code == 0, result.out[-3000:] + result.err[-3000:]
    assert "rank 1 has not responded" in result.err and "stopping rank 0" in result.err, result.err[-3000:]
    assert f"resumed from       {faults.out}/killed/ckpt/step_000004, after 4 steps" in result.out, result.out[-3000:]
    check_same_losses(faults.out / "killed", faults.out / "whole", tolerance)


def check_full_disk(faults: SimpleNamespace, tolerance: float) -> None:
    """The older checkpoint makes room, the newest whole one stays and can be continued from; status 1 says why."""
    end, folder, out = faults.ends["full"], faults.out / "full", faults.text
    assert "checkpoint at step 6: the disk is too full (a checkpoint takes " in out, out[-3000:]
    assert "0.0 MB are free); deleted step_000002, trying once more" in out
    assert all(f"checkpoint at step {step} failed, training continues: the disk is too full" in out for step in (6, 8))
    words = "trained to the end after 8 steps", "could not be written", f"Newest checkpoint: {folder}/ckpt/step_000004"
    assert end["status"] == 1 and all(part in end["error"] for part in words), end
    assert faults.ends["full, resumed"] == dict(error="", status=0)
    assert f"resumed from       {folder}/ckpt/step_000004, after 4 steps" in out
    assert in_ckpt(folder) == ["step_000006", "step_000008"]
    check_same_losses(folder, faults.out / "whole", tolerance)


def check_damaged_checkpoint(faults: SimpleNamespace, tolerance: float) -> None:
    """The run goes on from the next older whole checkpoint; the damaged one is kept."""
    folder, out = faults.out / "damaged", faults.text
    assert faults.ends["damaged"] == dict(error="", status=0)
    assert "__1_0.distcp is damaged: its checksum is wrong; kept as step_000006.damaged, continuing from " in out
    assert f"resumed from       {folder}/ckpt/step_000004, after 4 steps" in out
    assert in_ckpt(folder) == ["step_000006", "step_000006.damaged", "step_000008"]
    check_same_losses(folder, faults.out / "whole", tolerance)
