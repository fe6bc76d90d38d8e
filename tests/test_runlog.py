"""runlog.py: run folders and their lock, log.jsonl and its failures, wandb, the console's durations."""

import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import threading
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest

from helpers import make_cfg, one_process, records
from nanofp8 import runlog
from nanofp8.config import UserError
from nanofp8.runlog import FolderLock, RunLog, format_duration, make_run_folder, read_log, saved_config


def test_a_wandb_that_fails_later_is_switched_off(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    stub = ModuleType("wandb")
    stub.init = lambda **kwargs: SimpleNamespace(log=fail, finish=fail, define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    log = RunLog(str(tmp_path), FolderLock(str(tmp_path)), {}, wandb_project="x")
    log.write(dict(kind="train", step=0, tokens=1, loss=1.0))
    log.write(dict(kind="train", step=1, tokens=2, loss=float("nan")))
    log.close()
    assert capsys.readouterr().out.count("wandb is off: no network") == 1
    assert [r["loss"] for r in records(tmp_path)] == [1.0, None]  # JSON has no NaN


@pytest.mark.parametrize("message", [
    "No API key configured. Use `wandb login` to log in.",
    "api_key not configured (no-tty). call wandb.login(key=[your_api_key])"])
def test_wandb_without_a_login_asks_nothing(tmp_path, monkeypatch, capsys, message):
    """On a terminal, it would wait for an answer for ever. stdin is put back."""
    def init(**_):
        assert not sys.stdin.isatty() and sys.stdin.read() == ""
        raise RuntimeError(message)

    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    RunLog(str(tmp_path), FolderLock(str(tmp_path)), {}, wandb_project="x").close()
    line = capsys.readouterr().out
    assert "wandb is off: not logged in" in line and "wandb login" in line and "WANDB_MODE=offline" in line
    assert sys.stdin is terminal


def test_a_log_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read \(Is a directory\)"):
        read_log(str(tmp_path))


@pytest.mark.parametrize("failed", [False, True])
def test_a_wandb_that_never_finishes_is_left(monkeypatch, capsys, failed):
    """Its server is gone. Then its handler at Python's exit would wait as well."""
    free, exits = threading.Event(), []
    monkeypatch.setattr(runlog, "WANDB_SECONDS", 0.2)
    monkeypatch.setattr(runlog.atexit, "register", lambda *call: exits.append(call))
    try:
        runlog.finish_wandb(SimpleNamespace(finish=lambda exit_code: free.wait(), dir="out/wandb/run-1"), failed)
    finally:
        free.set()
    assert exits == [(runlog.exit_now, "", int(failed))]
    line = capsys.readouterr().out
    assert "0.2 s" in line and "wandb sync" in line and "out/wandb/run-1" in line


@pytest.mark.parametrize("given, variable, project", [
    ({}, "mine", "mine"), (dict(wandb_project="ours"), "mine", "ours"), ({}, "", "nanogpt-fp8")])
def test_the_project_at_wandb(monkeypatch, given, variable, project):
    monkeypatch.setenv("WANDB_PROJECT", variable)
    assert runlog.wandb_project(make_cfg(**given)) == project


def test_wandb_gets_the_id_of_the_run_and_whether_it_failed(tmp_path, monkeypatch):
    """An error in finish() is printed and no more."""
    calls = []

    def finish(exit_code):
        calls.append(exit_code)
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **kwargs: calls.append((kwargs["id"], kwargs["resume"])) or SimpleNamespace(
            finish=finish, define_metric=lambda name, step_metric: calls.append((name, step_metric)))))
    for failed in (False, True):
        log = RunLog(str(tmp_path), FolderLock(str(tmp_path)), dict(wandb_id="abc"), wandb_project="x")
        log.close(failed)
    axis = "*", "step"  # a resumed run may go back to an earlier step, which wandb's own steps cannot
    assert calls == [("abc", "allow"), axis, 0, ("abc", "allow"), axis, 1]
    assert saved_config(str(tmp_path)) == dict(wandb_id="abc")
    (tmp_path / "config.json").write_text("[1, ")
    assert saved_config(str(tmp_path)) == {} == saved_config(str(tmp_path / "none"))


def test_a_copied_run_folder_is_another_run_at_wandb(tmp_path):
    (tmp_path / "a").mkdir()
    first = runlog.wandb_identity(str(tmp_path / "a"), False)
    (tmp_path / "a" / "config.json").write_text(json.dumps(first))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert runlog.wandb_identity(str(tmp_path / "a"), True) == first
    copy = runlog.wandb_identity(str(tmp_path / "b"), True)
    assert copy["wandb_id"] != first["wandb_id"] and copy["wandb_folder"] == "b"
    (tmp_path / "a" / "config.json").write_text('{"wandb_id": "old"}')
    assert runlog.wandb_identity(str(tmp_path / "a"), True)["wandb_id"] == "old"


@pytest.mark.parametrize("losses, val_loss", [({"bf16": 2.0, "nvfp4": None}, 2.0), (None, None)])
def test_an_evaluation_that_was_not_finite_is_taken_over(losses, val_loss):
    """log.jsonl has null for it."""
    record = dict(kind="val", step=3, val_loss=val_loss) | (dict(val_losses=losses) if losses else {})
    run = SimpleNamespace(first_step=4, cfg=make_cfg(max_iters=4), procs=one_process(), progress=SimpleNamespace(),
                          log=SimpleNamespace(records=[record]))
    assert not runlog.evaluation_is_missing(run)
    assert f"{run.progress.val_loss:.1f}" == ("nan" if val_loss is None else "2.0")
    assert all(isinstance(loss, float) for loss in run.progress.val_losses.values())


def test_run_folders_made_at_once_are_apart(tmp_path):
    assert [make_run_folder(str(tmp_path), "x") for _ in range(3)] == [str(tmp_path / n) for n in ("x", "x-2", "x-3")]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out_dir"):
        make_run_folder(str(tmp_path / "file"), "x")


@pytest.mark.parametrize("seconds,text",
                         [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"),
                          (90061, "25:01:01")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("auto, train_tokens, noted", [
    (["total_batch_size"], 25_600_000, True), (["total_batch_size"], 30_000, False), ([], 25_600_000, False),
    (["total_batch_size"], 0, False)])
def test_a_batch_for_another_length_is_noted(auto, train_tokens, noted):
    """--max_iters shortens a run, but total_batch_size=auto follows train_tokens."""
    cfg = make_cfg(max_iters=100, total_batch_size=256)
    cfg.auto, cfg.train_tokens = auto, train_tokens
    ring = SimpleNamespace(total=10 ** 6, ignored=[], paths=["a"])
    loader = SimpleNamespace(ring=ring, micro_tokens=256, shuffle=False)
    row = dict(runlog.data_rows(cfg, one_process(), loader, ring))["batch"]
    assert ("train_tokens=25,600,000" in row) == noted, row


def open_log(folder):
    """Open a run's log as rank 0 does."""
    return RunLog(str(folder), FolderLock(str(folder)), {})


def test_a_deleted_log_that_cannot_be_written_again_at_once(tmp_path, capsys):
    """While a file blocks the folder's name, the failure is printed once. After that, all records are written."""
    (tmp_path / "r").mkdir()
    log = open_log(tmp_path / "r")
    log.write(dict(kind="train", step=0))
    shutil.rmtree(tmp_path / "r")
    (tmp_path / "r").write_text("")
    log.write(dict(kind="train", step=1))
    log.write(dict(kind="train", step=2))
    (tmp_path / "r").unlink()
    log.write(dict(kind="train", step=3))
    log.close()
    assert records(tmp_path / "r") == [dict(kind="train", step=step) for step in range(4)]
    assert (tmp_path / "r" / "config.json").exists()
    out = capsys.readouterr().out
    assert out.count("log.jsonl cannot be written") == 1 and out.count("log.jsonl was deleted") == 1


def test_a_log_that_is_deleted_alone(tmp_path, capsys):
    """It is written again. The run's own lock of the folder, which is still there, must not end the run."""
    log = open_log(tmp_path)
    log.write(dict(kind="train", step=0))
    (tmp_path / "log.jsonl").unlink()
    log.write(dict(kind="train", step=1))
    with pytest.raises(UserError, match="another process is training"), mock.patch.object(runlog.time, "sleep"):
        FolderLock(str(tmp_path))
    log.close()
    assert records(tmp_path) == [dict(kind="train", step=step) for step in range(2)]
    assert capsys.readouterr().out.count("log.jsonl was deleted") == 1


def test_a_run_folder_on_nfs_is_locked(tmp_path, monkeypatch):
    """There flock() of a folder counts on one machine alone; only locks of files reach the server."""
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: stat.S_ISDIR(os.fstat(descriptor).st_mode)
                        or flock(descriptor, operation))
    monkeypatch.setattr(runlog.time, "sleep", lambda _: None)
    folder = make_run_folder(str(tmp_path), "gpt")
    for kind, locked in (("ext4", False), ("nfs4", True)):
        monkeypatch.setattr(runlog.host, "file_system", lambda _, kind=kind: kind)
        lock = FolderLock(folder)
        if locked:
            with pytest.raises(UserError, match="another process is training.* delete .*gpt/.lock"):
                FolderLock(folder)
        assert os.listdir(folder) == [".lock"] * locked
        assert lock.holds(folder) and runlog.holds_only_a_log(folder)
        lock.close()
        FolderLock(folder).close()
    runlog.remove_if_empty(folder)
    assert os.listdir(tmp_path) == []


def test_config_json_is_whole_or_the_old_one(tmp_path, monkeypatch):
    """A kill or a full disk while it is written must not hide the run from --resume=auto."""
    runlog.RunLog(str(tmp_path), runlog.FolderLock(str(tmp_path)), dict(run_name="gpt")).close()

    def half(path, text, **_):
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog.Path, "write_text", half)
    with pytest.raises(UserError, match="No space left"):
        runlog.RunLog(str(tmp_path), runlog.FolderLock(str(tmp_path)), dict(run_name="gpt"), first_step=1)
    assert runlog.saved_config(str(tmp_path)) == dict(run_name="gpt")
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".tmp", ".new")]


def test_pictures_do_not_end_a_run(tmp_path, capsys):
    """A run name that matplotlib could read as mathematics, and an error while drawing."""
    log = open_log(tmp_path)
    log.folder = str(tmp_path / "a$_$b")
    os.makedirs(log.folder)
    log.write(dict(kind="train", step=0, loss=2.0, tokens=9))
    log.plot()
    assert (tmp_path / "a$_$b" / "loss.png").stat().st_size > 999
    log.write(dict(kind="train", step=1))
    log.plot()
    (line,) = capsys.readouterr().out.splitlines()
    assert "pictures ('loss')" in line and "training continues" in line
    log.close()


class Disk:
    """Stands for log.jsonl. While `error` is set, seven bytes find room, and further writes fail with it."""

    def __init__(self, file):
        self.file, self.error, self.room = file, 0, 7

    def write(self, data):
        if not self.error:
            return self.file.write(data)
        room, self.room = self.room, 0
        if not room:
            raise OSError(self.error, os.strerror(self.error))
        return self.file.write(data[:room])

    def close(self):
        self.file.close()

    def fileno(self):
        return self.file.fileno()


def test_a_log_that_cannot_be_written_for_a_while(tmp_path, capsys):
    """The failure is printed once, no record is lost and no line is broken."""
    log = open_log(tmp_path)
    log.file = disk = Disk(log.file)
    for step in range(6):
        disk.error = errno.ENOSPC if step in (2, 3) else 0
        log.write(dict(kind="train", step=step))
    log.close()
    assert records(tmp_path) == [dict(kind="train", step=step) for step in range(6)]
    assert capsys.readouterr().out.count("log.jsonl cannot be written (") == 1


@pytest.mark.parametrize("lost", [False, True])
def test_a_log_whose_open_file_became_stale(tmp_path, capsys, lost):
    """As on NFS whose server was restarted: a new open works, the open file never again. Half a line was written; a
    line before it may be lost. Each record is there once."""
    log = open_log(tmp_path)
    log.file = disk = Disk(log.file)
    for step in range(6):
        if step == 2:
            disk.error = errno.ESTALE
        if step == 4:
            disk.file.truncate(40 if lost else disk.file.tell())
        log.write(dict(kind="train", step=step))
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(map(runlog.log_line, log.records))
    assert records(tmp_path) == [dict(kind="train", step=step) for step in range(6)]
    out = capsys.readouterr().out
    assert out.count("log.jsonl cannot be written") == 1 and "lacks" not in out


def test_a_log_that_became_stale_at_its_last_record(tmp_path, capsys):
    """The end of the run opens it once more."""
    log = open_log(tmp_path)
    log.write(dict(kind="train", step=0))
    log.file = disk = Disk(log.file)
    disk.error, disk.room = errno.ESTALE, 0
    log.write(dict(kind="done", step=0))
    log.close()
    assert records(tmp_path) == [dict(kind="train", step=0), dict(kind="done", step=0)]
    assert "Stale file handle" in capsys.readouterr().out


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.ESTALE])
def test_records_that_are_missing_at_the_end_are_said(tmp_path, capsys, error):
    log = open_log(tmp_path)
    log.write(dict(kind="train", step=0))
    log.file = disk = Disk(log.file)
    disk.error = error
    log.write(dict(kind="train", step=1))
    log.write(dict(kind="done", step=1))
    if error == errno.ESTALE:  # a new open fails too
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").mkdir()
    log.close()
    first, last = capsys.readouterr().out.splitlines()
    why = "Is a directory" if error == errno.ESTALE else "No space left on device"
    assert "log.jsonl cannot be written" in first and last == f"log.jsonl lacks the last 2 records of this run ({why})"
    FolderLock(str(tmp_path)).close()


@pytest.mark.parametrize("lost,again,line", [
    (0, False, "log.jsonl could not be closed (Disk quota exceeded); read again, it is complete"),
    (30, False, "log.jsonl could not be closed (Disk quota exceeded); read again, it is complete"),
    (0, True, "log.jsonl could not be closed (Disk quota exceeded); its last records may be missing (Is a directory)"),
])
def test_an_error_when_the_log_is_closed_is_one_line(tmp_path, capsys, lost, again, line):
    """NFS and quotas report there that earlier writes failed. What is missing then is written to the file opened
    anew; `again`: that cannot be opened. The lock is released."""
    class Closing(Disk):
        def close(self):
            if not self.file.closed:
                self.file.truncate(self.file.tell() - lost)
                self.file.close()
                if again:
                    (tmp_path / "log.jsonl").unlink()
                    (tmp_path / "log.jsonl").mkdir()
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    log = open_log(tmp_path)
    log.file = Closing(log.file)
    for step in range(3):
        log.write(dict(kind="train", step=step))
    log.close()
    log.close()
    assert capsys.readouterr().out.splitlines() == [line]
    assert again or (tmp_path / "log.jsonl").read_text() == "".join(map(runlog.log_line, log.records))
    FolderLock(str(tmp_path)).close()
