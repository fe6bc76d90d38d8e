"""Which checkpoint a run continues from, and in which run folder: choose, lock, check."""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanofp8 import runlog
from nanofp8.checkpoint_files import (
    complete_checkpoints,
    find_damage,
    is_complete,
    older_checkpoints,
    read_checkpoint,
    set_aside,
    steps_of,
)
from nanofp8.config import UserError
from nanofp8.files import console, is_seen
from nanofp8.procs import Processes
from nanofp8.runlog import FolderLock, saved_config

NO_RENAME = "is on a file system that cannot rename folders ({}), as saving checkpoints needs"

# ----------------------------------------------------------------------------------------------------------------------
# Finding checkpoints


def saved_at(checkpoint: str) -> float:
    """Return when a checkpoint was saved, in seconds, from its own meta.json; 0 if it is damaged.

    Copying a checkpoint changes the time stamps of its files.
    """
    try:
        return float(read_checkpoint(checkpoint)["saved_at"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0.0


def last_saved(checkpoint: str) -> float:
    """Return when a run saved last, in seconds. checkpoint: its newest, whose own meta.json may be damaged."""
    return max(map(saved_at, [checkpoint, *older_checkpoints(checkpoint)]))


def find_checkpoint(path: str) -> str | None:
    """Return the newest complete checkpoint at or below `path`, or None.

    `path` is a checkpoint, or a run folder (its checkpoint with most steps: later ones are deleted when a run is
    resumed at an earlier step), or a folder of runs (the run that saved last).
    """
    if is_complete(path):
        return path
    folders = [path, os.path.join(path, "ckpt"), *glob.glob(os.path.join(glob.escape(path), "*", "ckpt"))]
    return max((found[-1] for found in map(complete_checkpoints, folders) if found), key=last_saved, default=None)


def run_folder_of(checkpoint: str) -> str | None:
    """Return the run folder that a checkpoint lies in, or None for one that was moved out of it."""
    folder, name = os.path.split(os.path.dirname(os.path.abspath(checkpoint)))
    return folder if name == "ckpt" and os.path.isfile(os.path.join(folder, "config.json")) else None


# ----------------------------------------------------------------------------------------------------------------------
# Choosing a checkpoint


def run_folder_before_restart(cfg: SimpleNamespace) -> str | None:
    """Return the run folder that these processes had before torchrun restarted them (--max-restarts), or None.

    config.json names the torchrun that a run belongs to. If several do, the run that was started last counts.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "none", "nanogpt-fp8"):  # torchrun's and run.sh's defaults, which other runs have too
        return None
    folders = glob.glob(os.path.join(glob.escape(cfg.out_dir), "*"))
    if cfg.resume not in ("", "auto"):
        folders += filter(None, [run_folder_of(find_checkpoint(cfg.resume) or "")])
    found = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), \
                open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
            if config["torchrun"] == name:
                found.append((float(config["started_at"]), folder))
    return max(found)[1] if found else None


def choose_checkpoint(cfg: SimpleNamespace) -> tuple[str | None, str | None]:
    """Return the checkpoint that the flag `resume` asks for, and the run folder to continue in; None where there is
    none. Of the checkpoints, no more is read than when they were saved.

    Processes that torchrun restarted continue in the run folder they had, whatever `resume` says. A run that was broken
    off before its first checkpoint starts again in its folder, if it is the same model.
    """
    before = run_folder_before_restart(cfg) if was_restarted() else None
    checkpoint = find_checkpoint(before) if before else None
    if checkpoint is None and cfg.resume == "auto":
        checkpoint = max(filter(None, map(find_checkpoint, own_run_folders(cfg))), key=last_saved, default=None)
    elif checkpoint is None and cfg.resume:
        checkpoint = find_checkpoint(cfg.resume)
        if checkpoint is None:
            raise UserError(f"--resume={cfg.resume}: no complete checkpoint there; "
                            f"name a checkpoint or a run folder", 2)
    if checkpoint:
        return checkpoint, run_folder_of(checkpoint)
    folders = [before] if before else own_run_folders(cfg) if cfg.resume == "auto" else []
    newest = max(filter(os.path.isdir, folders), key=started_at, default=None)
    was = saved_config(newest) if newest else {}
    # The flags of a run of another model are not to be overwritten: a resume may have been meant to give them again
    same = all(was.get(name, getattr(cfg, name)) == getattr(cfg, name) for name in ("dataset", "n_layer", "n_embd"))
    return None, newest if newest and same and runlog.holds_only_a_log(newest) else None


def started_at(folder: str) -> float:
    """Return when the run of a run folder was last started, in seconds; 0 if config.json does not say it."""
    when = saved_config(folder).get("started_at")
    return float(when) if isinstance(when, (int, float)) else 0.0


def own_run_folders(cfg: SimpleNamespace) -> list[str]:
    """Return the run folders of this run_name. gpt-2 may be the second run called gpt, or one that was called gpt-2."""
    first = os.path.join(cfg.out_dir, cfg.run_name)
    numbered = [f for f in glob.glob(glob.escape(first) + "-*") if re.fullmatch(re.escape(first) + r"-\d+", f)]
    return [first, *(f for f in numbered if saved_config(f).get("run_name") == cfg.run_name)]


def is_own_run(checkpoint: str, cfg: SimpleNamespace) -> bool:
    """Whether a checkpoint lies in the run folder that these processes had before torchrun restarted them."""
    before, folder = run_folder_before_restart(cfg), run_folder_of(checkpoint)
    return bool(before and folder) and os.path.samefile(before, folder)


def was_restarted() -> bool:
    """Whether torchrun restarted these processes after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def lock_checkpoint(cfg: SimpleNamespace, procs: Processes) -> tuple[str | None, FolderLock | None]:
    """Choose the checkpoint to resume, lock its run folder before anything of it is read, and check its files.

    Returns: the checkpoint (on every rank; None for a fresh start), and the lock of the run folder to continue in (on
        rank 0; None for a new one).
    Raises: UserError if another process is training there, or if the checkpoint is damaged (see whole_checkpoint()).
    """
    outcome, lock = (None, None), None
    if procs.is_main and (cfg.resume or was_restarted()):
        try:
            checkpoint, lock = choose_and_lock(cfg)
            outcome = checkpoint, None
        except UserError as error:  # the other ranks wait for rank 0's answer
            if error.one_rank:
                raise
            outcome = None, (str(error), error.status)
    checkpoint, failure = procs.broadcast(outcome)
    if failure:
        raise UserError(*failure)
    try:
        return checkpoint and whole_checkpoint(checkpoint, cfg, procs), lock
    except BaseException:
        if lock:
            lock.close()
        raise


def choose_and_lock(cfg: SimpleNamespace) -> tuple[str | None, FolderLock | None]:
    """Return the checkpoint to resume and the lock of its run folder; None where there is none. Raises UserError."""
    try:
        checkpoint, folder = choose_checkpoint(cfg)
    except UserError:  # the process that trains there may just have replaced it
        if folder := run_folder_of(cfg.resume):
            FolderLock(folder).close()  # raises UserError
        raise
    if checkpoint is None:
        console(f"resume={cfg.resume or 'auto (after a restart)'}: no complete checkpoint in "
                f"{folder or os.path.join(cfg.out_dir, cfg.run_name)}, starting a new run")
    if folder is None:
        return checkpoint, None
    lock = FolderLock(folder)
    try:
        again = choose_checkpoint(cfg)  # the process that held the lock until now may have saved another one
        if again[1] != folder:
            raise UserError(f"{folder} has just been changed by another process; start again")
        return again[0], lock
    except BaseException:
        lock.close()
        raise


def whole_checkpoint(checkpoint: str, cfg: SimpleNamespace, procs: Processes) -> str:
    """Return this checkpoint if it is whole, else the next older one that is: with --resume=auto and after a restart.

    Damaged ones are set aside as step_N.damaged. A checkpoint that was named in --resume is never replaced.
    Raises: UserError.
    """
    fault, older = check_whole(checkpoint, procs), ""
    if not fault:
        return checkpoint
    damaged = [checkpoint]
    for older in procs.broadcast(older_checkpoints(checkpoint) if procs.is_main else None):
        if not check_whole(older, procs):
            break
        damaged.append(older)
    else:
        raise UserError(f"cannot load checkpoint {checkpoint}: {fault}; no older one beside it is whole, so bring back "
                        f"a copy, or start anew without --resume")
    if cfg.resume != "auto" and not procs.broadcast(was_restarted() and is_own_run(checkpoint, cfg)):
        raise UserError(f"cannot load checkpoint {checkpoint}: {fault}; the next older whole one is --resume={older}")
    if procs.is_main:
        try:
            names = [os.path.basename(set_aside(folder)) for folder in damaged]
        except OSError as error:
            raise UserError(f"{fault}, and it cannot be renamed ({error.strerror}); use --resume={older}",
                            one_rank=True) from None
        console(f"resume: {fault}; kept as {', '.join(names)}, continuing from {older}")
    return older


def check_whole(checkpoint: str, procs: Processes) -> str:
    """Return what is damaged in a checkpoint, "" if nothing: the same on all ranks, which share the reading.

    Raises: UserError if a file cannot be read, or if memory is too little.
    """
    start = time.perf_counter()
    try:
        outcome = find_damage(checkpoint, procs.rank, procs.world_size), None
    except UserError as error:
        outcome = "", (str(error), error.status)
    outcomes = procs.gather(outcome)
    for _, failure in outcomes:
        if failure:
            raise UserError(*failure)
    fault = next((fault for fault, _ in outcomes if fault), "")
    if fault:
        check_same_files(checkpoint, procs)
    if not fault and procs.is_main:
        files = read_checkpoint(checkpoint).get("files")
        size = sum(of_file["bytes"] for of_file in files.values()) / 1e9 if files else 0
        seconds = time.perf_counter() - start
        console(f"checkpoint {checkpoint}: " + (f"{size:.2f} GB verified in {seconds:.1f} s" if files else
                "older code wrote it, without checksums; only its weights were verified"))
    return fault


def check_same_files(checkpoint: str, procs: Processes) -> None:
    """Check that all ranks see the same files in a checkpoint: else it may be whole for one of them. Raises
    UserError."""
    try:
        names = sorted(os.listdir(checkpoint))
    except OSError:
        names = []
    for rank, others in enumerate(procs.gather(names)):
        if differing := {*names} ^ {*others}:
            raise UserError(f"rank {procs.rank} and rank {rank} do not see the same files in {checkpoint} (one lacks "
                            f"{min(differing)}); all machines need the same folder")


# ----------------------------------------------------------------------------------------------------------------------
# The run folder


def open_run_folder(cfg: SimpleNamespace, procs: Processes, lock: FolderLock | None,
                    cleanup: contextlib.ExitStack) -> tuple[str, FolderLock | None]:
    """Return the run folder, on all ranks, and its lock, on rank 0: the one that is locked, or a new one.

    A run folder that cannot hold the run is left for a new one in --out_dir. `cleanup` gets what undoes this at the
    end.
    Raises: UserError.
    """
    folder = lock.folder if lock else None
    if folder and (fault := folder_fault(folder, cfg.keep_checkpoints)):
        if "out_dir" not in cfg.explicit or os.path.realpath(cfg.out_dir) == os.path.realpath(os.path.dirname(folder)):
            raise UserError(f"{folder} {fault}; continue elsewhere with --out_dir=FOLDER", one_rank=True)
        console(f"resume: {folder} {fault}; the run continues in a new folder in {cfg.out_dir}")
        folder = None
    if procs.is_main and folder is None:
        folder = runlog.make_run_folder(cfg.out_dir, cfg.run_name)
        cleanup.callback(runlog.remove_if_empty, folder)
        lock = FolderLock(folder)
        cleanup.callback(lock.close)
        if cfg.keep_checkpoints and (reason := why_folders_cannot_be_renamed(folder)):
            raise UserError(f"{cfg.out_dir} {NO_RENAME.format(reason)}; choose another --out_dir (a local disk), or "
                            f"--keep_checkpoints=0 to train without checkpoints", one_rank=True)
    folder = procs.broadcast(folder)
    blind = [rank for rank, sees in enumerate(procs.gather(is_seen(folder))) if not sees]
    if blind and cfg.keep_checkpoints:
        raise UserError(f"rank {blind[0]} does not see the run folder {folder}; choose an --out_dir that all machines "
                        f"share, or --keep_checkpoints=0 to train without checkpoints")
    return folder, lock


def folder_fault(folder: str, keep: int) -> str:
    """Return why a run cannot continue in its folder, "" if it can. keep: the flag keep_checkpoints."""
    if not is_writable(folder):
        return "cannot be written"
    reason = keep and why_folders_cannot_be_renamed(folder)
    return NO_RENAME.format(reason) if reason else ""


def is_writable(folder: str) -> bool:
    """Whether this process may write into a run folder and what it continues there."""
    paths = [folder, *(os.path.join(folder, name) for name in ("ckpt", "log.jsonl", "config.json"))]
    return all(os.access(path, os.W_OK) for path in paths if os.path.exists(path))


def why_folders_cannot_be_renamed(run_folder: str) -> str:
    """Try to rename a folder with a file in it, as saving a checkpoint does; return why that fails, "" if it works.

    Some FUSE file systems cannot. Without this, a user would learn of it at the first checkpoint, and none could be
    saved. The names are those of half-written checkpoints: what a kill leaves here is deleted when the run continues.
    """
    parent, number, reason = os.path.join(run_folder, "ckpt"), time.time_ns(), ""
    before, after = (os.path.join(parent, f".{name}_{number}") for name in ("writing", "replaced"))
    with contextlib.suppress(OSError):  # what cannot be written is said where it is to be written
        os.makedirs(before)
        Path(before, "file").write_text("content")
        try:
            os.rename(before, after)
        except OSError as error:  # a full disk, or a folder that was deleted meanwhile, says nothing about renaming
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ESTALE):
                reason = error.strerror
    for path in (before, after):
        with contextlib.suppress(OSError):
            Path(path, "file").unlink()
        runlog.remove_if_empty(path)
    runlog.remove_if_empty(parent)
    return reason


def enter_run_folder(run: Any, checkpoint: str | None) -> None:
    """Prepare a train.Run's folder for it, as the last thing before training (rank 0).

    checkpoint: that is resumed. The log of its run folder is copied to a new one, and later checkpoints are deleted.
    Raises: UserError.
    """
    source = run_folder_of(checkpoint) if checkpoint else None
    if checkpoint is None:
        runlog.set_log_aside(run.folder)
    elif source and not os.path.samefile(source, run.folder):
        try:
            shutil.copyfile(os.path.join(source, "log.jsonl"), os.path.join(run.folder, "log.jsonl"))
        except OSError as error:
            run.procs.print(f"resume: the log of {source} cannot be copied ({error.strerror})")
    else:
        invalidate_later_checkpoints(run.folder, run.first_step)


def invalidate_later_checkpoints(run_folder: str, first_step: int) -> None:
    """Invalidate checkpoints after `first_step`, newest first, so that an interruption leaves a consistent log and
    checkpoint. Raises UserError if the folder cannot be written."""
    later = [f for f in complete_checkpoints(os.path.join(run_folder, "ckpt")) if steps_of(f) > first_step]
    if later:
        console(f"resume: continuing from step {first_step}; deleting later checkpoints: "
                f"{', '.join(map(os.path.basename, later))}")
    try:
        for folder in reversed(later):
            os.remove(os.path.join(folder, "meta.json"))
    except OSError as error:
        raise UserError(f"{run_folder} cannot be written ({error.strerror}); choose another --out_dir",
                        one_rank=True) from None
