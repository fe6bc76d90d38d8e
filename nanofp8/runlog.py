"""The run folder: its lock, log.jsonl, config.json and pictures; the console's lines; wandb."""

import atexit
import contextlib
import errno
import fcntl
import json
import math
import os
import re
import statistics
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

from nanofp8 import host
from nanofp8.config import UserError, flag_values
from nanofp8.faults import exit_now
from nanofp8.files import console, error_line, first_line, replace_file
from nanofp8.machine import peak_flops, peak_memory_gb
from nanofp8.plots import plot_losses
from nanofp8.precision import fp8_state
from nanofp8.procs import Processes
from nanofp8.shards import NAME_PATTERN
from nanofp8.sizes import BatchPlan, parameter_table

LOCK_FILE = ".lock"  # in run folders on network file systems
WANDB_SECONDS = 120.0  # for wandb to send what it has not sent yet, at the end of a run

# ----------------------------------------------------------------------------------------------------------------------
# Folder and lock


def make_run_folder(out_dir: str, run_name: str) -> str:
    """Create out_dir/run_name, or run_name-2, -3, ... if that is taken: a run is never overwritten.

    Raises: UserError if the folder cannot be created.
    """
    for n in range(1, 100_000):
        folder = os.path.join(out_dir, run_name if n == 1 else f"{run_name}-{n}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create the run folder {folder} ({error.strerror}); "
                            f"choose another --out_dir or --run_name", one_rank=True) from None
    raise UserError(f"{out_dir} has 100,000 runs called {run_name}; choose another --run_name", one_rank=True)


def remove_if_empty(folder: str) -> None:
    """Remove the folder of a run that failed before it wrote anything."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK_FILE]:
            os.remove(os.path.join(folder, LOCK_FILE))
        os.rmdir(folder)


def holds_only_a_log(folder: str) -> bool:
    """Whether a run folder holds nothing but the log of a run that was broken off before its first checkpoint."""
    known = {"config.json", "config.json.tmp", "log.jsonl", "loss.png", "fp8_stats.png", "ckpt", "wandb", LOCK_FILE}
    half = r"(step|\.writing|\.replaced)_\d+"  # half written or half deleted
    try:
        names = [name for name in os.listdir(folder) if not re.fullmatch(r"log-\d+\.jsonl", name)]
        parts = os.listdir(os.path.join(folder, "ckpt")) if "ckpt" in names else []
        return (known.issuperset(names) and all(re.fullmatch(half, name) for name in parts)
                and not any(r["kind"] == "done" for r in read_log(folder)))
    except OSError:
        return False


def set_log_aside(folder: str) -> None:
    """Rename the log of a run that is started again in its folder: log-1.jsonl, log-2.jsonl, ... Raises UserError."""
    path = os.path.join(folder, "log.jsonl")
    if os.path.exists(path):
        name = next(name for n in range(1, 100_000)
                    if not os.path.exists(os.path.join(folder, name := f"log-{n}.jsonl")))
        try:
            os.rename(path, os.path.join(folder, name))
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --out_dir",
                            one_rank=True) from None
        console(f"resume: starting again in {folder}; the log of the run that was broken off is now {name}")


class FolderLock:
    """Keep other processes from training in a run folder, until close() or the end of this process.

    The folder itself is locked. On a network file system that counts on one machine only, and Linux sends locks of
    files alone to the server: there a file in the folder is locked as well.
    """

    def __init__(self, folder: str):
        """Take the lock. Raises UserError if another process holds it for 4 s (one that was killed may take a while to
        be gone), or if the folder cannot be opened."""
        self.folder, self.file = folder, None
        try:
            self.descriptor = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{folder} cannot be opened ({error.strerror}); choose another --out_dir or --run_name",
                            one_rank=True) from None
        for seconds_left in (4, 3, 2, 1, 0):
            try:
                return self.lock()
            except BlockingIOError:
                if seconds_left:
                    time.sleep(1)
        crashed = f"; if its machine has crashed, delete {os.path.join(folder, LOCK_FILE)}" if self.file else ""
        self.close()
        raise UserError(f"another process is training in {folder}; wait for its end, or choose another "
                        f"--run_name{crashed}", one_rank=True)

    def lock(self) -> None:
        """Take the lock, as far as the file system has locks. Raises BlockingIOError if another process holds it."""
        if self.file is None and host.file_system(self.folder).startswith(host.NETWORK):
            with contextlib.suppress(OSError):  # a folder that cannot be written
                self.file = os.open(os.path.join(self.folder, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
        for descriptor in (self.descriptor, self.file):
            try:
                if descriptor is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                pass

    def holds(self, folder: str) -> bool:
        """Whether this is the lock of the folder that has this name now, not of a deleted one."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self.descriptor), os.stat(folder))
        return False

    def close(self) -> None:
        """Release the lock; once is enough."""
        for descriptor in {self.descriptor, self.file} - {None}:
            os.close(descriptor)
        self.descriptor = self.file = None


# ----------------------------------------------------------------------------------------------------------------------
# log.jsonl


def read_log(folder: str) -> list[dict]:
    """Return the records of a run folder's log.jsonl: objects with a `kind` (text) and a `step` (integer).

    Skips malformed lines, which a killed run or a crashed machine may leave. Without a log the list is empty.
    Raises: UserError if the log cannot be read.
    """
    path, records = os.path.join(folder, "log.jsonl"), []
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.readlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its permissions, or move it away",
                        one_rank=True) from None
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line) if line.endswith("}\n") else None
            if isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def log_line(record: dict) -> str:
    """Return a record as a line of log.jsonl. JSON has no NaN: a non-finite number is written as null."""
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record)) + "\n"


def flatten(tree: dict, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts as pairs ("prefix/key/key", value)."""
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}/{key}") if isinstance(value, dict) else [(f"{prefix}/{key}", value)]


@contextlib.contextmanager
def no_stdin() -> Iterator[None]:
    """Let nothing inside ask the user: sys.stdin is no terminal, and at its end."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


class RunLog:
    """A run folder's log.jsonl, config.json and pictures, and wandb. Rank 0 alone has one.

    A failure to report never ends a run: it is printed, and the next record tries again.
    """

    def __init__(self, folder: str, lock: FolderLock, config: dict, first_step: int = 0, wandb_project: str = ""):
        """Open the files of a new run, or of one that continues.

        Args:
            folder: the run folder, which exists.
            lock: of that folder. The log takes it over and closes it.
            config: what config.json holds.
            first_step: the step that a resumed run continues with; records of that step and later ones are dropped.
            wandb_project: "" for no wandb.
        Raises: UserError if the folder cannot be written, or its log not be read.
        """
        self.folder, self.lock, self.config = folder, lock, config
        self.wandb, self.records, self.unwritten = None, [], b""
        self.is_doubtful = self.is_closed = False  # whether log.jsonl is to be opened again; whether the run is over
        path = os.path.join(folder, "log.jsonl")
        try:
            if first_step:
                self.records = [r for r in read_log(folder) if r["kind"] != "done" and r["step"] < first_step]
                lines = "".join(map(log_line, self.records))
                replace_file(path, lambda new: Path(new).write_text(lines, encoding="utf-8"))
            self.open_files()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); make room, or choose another --out_dir",
                            one_rank=True) from None
        if wandb_project:
            try:
                import wandb
                with no_stdin():  # without a login, wandb would wait for an answer for ever
                    # A run that continues goes on under its own id
                    self.wandb = wandb.init(project=wandb_project, name=os.path.basename(folder), config=config,
                                            dir=folder, id=config.get("wandb_id"), resume="allow")
                # wandb's own step never goes back, and what is logged for an earlier one is lost: a resumed run's steps
                self.wandb.define_metric("*", step_metric="step")
            except Exception as error:  # no wandb, no network, no login: the run continues
                why = first_line(error)
                if re.search("api.key (not )?configured", why, re.I):  # by newer and older versions
                    why = "not logged in; run `wandb login`, or set WANDB_MODE=offline"
                console(f"wandb is off: {why}")

    def open_files(self) -> None:
        """Write config.json, and open log.jsonl to append to."""
        replace_file(os.path.join(self.folder, "config.json"),  # half a file would hide the run from --resume=auto
                     lambda new: Path(new).write_text(json.dumps(self.config, indent=2), encoding="utf-8"))
        # Unbuffered, so that write_line() knows what was not written
        self.file = open(os.path.join(self.folder, "log.jsonl"), "ab", buffering=0)

    def write(self, record: dict) -> None:
        """Append one record (a dict with `kind` and `step`) to log.jsonl and wandb."""
        self.records.append(record)
        self.write_line(log_line(record))
        if self.wandb is not None:
            try:
                values = {k: v for k, v in record.items() if k not in ("kind", "step")}
                self.wandb.log(dict(flatten(values, record["kind"])) | dict(step=record["step"]))
            except Exception as error:
                console(f"wandb is off: {error}")
                self.wandb = None

    def write_line(self, line: str) -> None:
        """Append to log.jsonl. If that fails (a full disk), say so once and try again with the next line."""
        new, self.unwritten = not self.unwritten, self.unwritten + line.encode()
        reason = self.write_unwritten()
        if reason and new:
            console(f"log.jsonl cannot be written ({reason}); training continues")

    def write_unwritten(self) -> str:
        """Write the lines that log.jsonl lacks; return why some of them are still missing, "" if none is."""
        try:
            if self.is_doubtful:
                self.open_again()
            elif os.fstat(self.file.fileno()).st_nlink == 0:
                self.restore_deleted_folder()
            self.unwritten = self.unwritten[self.file.write(self.unwritten):]
            return "no room" if self.unwritten else ""
        except OSError as error:
            # A full disk needs room, and the file is still good. After other errors it may not be: once an NFS server
            # was restarted (ESTALE), every write to a file that was opened before it fails
            self.is_doubtful = self.is_doubtful or error.errno not in (errno.ENOSPC, errno.EDQUOT)
            return error.strerror

    def open_again(self) -> None:
        """Open log.jsonl again after an error, and find out which lines it lacks. Raises OSError.

        What was written shortly before the error may be lost too, or half a line may be there: that is cut off, and
        the line written whole.
        """
        with contextlib.suppress(OSError):
            self.file.close()
        path = os.path.join(self.folder, "log.jsonl")
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            self.restore_deleted_folder()
        else:
            self.file = open(path, "ab", buffering=0)
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                self.file.truncate(whole)
            there = {*content[:whole].splitlines(keepends=True)}
            lines = [log_line(record).encode() for record in self.records]
            self.unwritten = b"".join(line for line in lines if line not in there)
        self.is_doubtful = False

    def restore_deleted_folder(self) -> None:
        """Write config.json and log.jsonl again where somebody deleted them. Raises OSError; the next line retries."""
        os.makedirs(self.folder, exist_ok=True)
        deleted = self.file
        self.open_files()
        with contextlib.suppress(OSError):
            deleted.close()
        if not self.lock.holds(self.folder):  # not if the log alone was deleted: our own lock would be in the way
            lock = FolderLock(self.folder)
            self.lock.close()
            self.lock = lock
        self.unwritten = "".join(map(log_line, self.records)).encode()
        console("log.jsonl was deleted; it and config.json are written again")

    def plot(self) -> None:
        """Draw loss.png and, with FP8_STATS_INTERVAL, fp8_stats.png."""
        try:
            plot_losses(self.records, os.path.join(self.folder, "loss.png"), os.path.basename(self.folder))
            if any(r["kind"] == "fp8_stats" for r in self.records):
                from nanofp8 import fp8_stats
                fp8_stats.plot(self.records, os.path.join(self.folder, "fp8_stats.png"))
        except ImportError:  # no matplotlib
            pass
        except Exception as error:  # a full disk, a removed folder, a font
            console(f"cannot draw the run's pictures ({getattr(error, 'strerror', None) or error_line(error)}); "
                    f"training continues")

    def close_file(self) -> None:
        """Write what log.jsonl still lacks and close it. What goes wrong is said in one line."""
        reason = self.unwritten and self.write_unwritten()
        try:
            self.file.close()
        except OSError as error:  # NFS and quotas may report only now that earlier writes failed
            self.is_doubtful, at_close = True, error.strerror
            reason = self.write_unwritten()  # to the file opened anew
            try:
                self.file.close()
            except OSError as error:
                reason = reason or error.strerror
            if not self.unwritten:
                console(f"log.jsonl could not be closed ({at_close}); " +
                        (f"its last records may be missing ({reason})" if reason else "read again, it is complete"))
        if self.unwritten:
            lines = self.unwritten.count(b"\n")
            console(f"log.jsonl lacks the last {lines} record{'s' * (lines > 1)} of this run ({reason})")

    def close(self, failed: bool = False) -> None:
        """Close files, lock and wandb where a run ends, well or not; once is enough."""
        if self.is_closed:
            return
        self.is_closed = True
        self.close_file()
        self.lock.close()
        if self.wandb is not None:
            finish_wandb(self.wandb, failed)


def finish_wandb(run: Any, failed: bool) -> None:
    """Let wandb send the rest, for WANDB_SECONDS at most: without its server, finish() waits for ever."""
    def finish() -> None:
        try:
            run.finish(exit_code=int(failed))
        except Exception as error:  # the run's own status counts
            console(f"wandb could not finish: {error_line(error)}")

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(WANDB_SECONDS)
    if thread.is_alive():
        console(f"wandb has not finished after {WANDB_SECONDS:g} s and is left; `wandb sync` can send the rest of "
                f"{getattr(run, 'dir', 'the run')}")
        atexit.register(exit_now, "", int(failed))  # before wandb's own handler, which would wait too


def saved_config(folder: str) -> dict:
    """Return what config.json of a run folder holds; nothing if there is none that can be read."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        return {}


def open_log(run: Any, lock: FolderLock) -> RunLog:
    """Open the log of a train.Run and write config.json: all flags, the machine, and what was chosen (on rank 0)."""
    cfg, precision = run.cfg, run.precision
    config = flag_values(cfg) | run.machine | dict(
        started_at=time.time(), torchrun=os.environ.get("TORCHELASTIC_RUN_ID"), world_size=run.procs.world_size,
        wrapper=run.parallel.wrapper, precision=precision.name, emulated=precision.emulated,
        optimizers=run.optimizers.description, parameters=run.parameters)
    if cfg.USE_WANDB:
        config |= wandb_identity(run.folder, bool(run.first_step))
    return RunLog(run.folder, lock, config, run.first_step, wandb_project(cfg) if cfg.USE_WANDB else "")


def wandb_identity(folder: str, resumed: bool) -> dict[str, str]:
    """Return what config.json says of a run at wandb: its id and its folder. A copy of a run folder is another run."""
    name, before = os.path.basename(folder), saved_config(folder) if resumed else {}
    same = before.get("wandb_folder", name) == name  # older versions do not say
    return dict(wandb_id=same and before.get("wandb_id") or uuid.uuid4().hex[:12], wandb_folder=name)


def wandb_project(cfg: SimpleNamespace) -> str:
    """Return the name of the project at wandb: of the flag if it was given or edited, else of WANDB_PROJECT."""
    return "wandb_project" not in cfg.explicit and os.environ.get("WANDB_PROJECT") or cfg.wandb_project


def log_fp8_stats(run: Any, step: int) -> None:
    """Log what the format of a train.Run does to each tensor of the next micro-batch. Training is not touched."""
    from nanofp8 import fp8_stats
    from nanofp8.loss import LOGIT_GRAD_SCALE
    run.progress.flush()
    start = time.perf_counter()
    layers = fp8_stats.collect(run.model, *run.loader.peek(), run.precision.recipe, fp8_state(run.model), run.in_bf16,
                               run.loader.loss_weight, LOGIT_GRAD_SCALE if run.model.fp8_head else None)
    if run.log:
        run.log.write(dict(kind="fp8_stats", step=step, tokens=run.progress.tokens(step),
                           format=run.precision.name, seconds=time.perf_counter() - start, layers=layers))


# ----------------------------------------------------------------------------------------------------------------------
# Console


def data_rows(cfg: SimpleNamespace, procs: Processes, loader: Any, val_ring: Any) -> list[tuple[str, str]]:
    """Return the start-up table's rows on data, batch and length: [(name, text)].

    loader: train.DataLoader. val_ring: train.TokenRing of the val shards.
    """
    ring, plan = loader.ring, BatchPlan(cfg)
    tokens, stages = plan.total, plan.describe()
    micro_batches = cfg.total_batch_size // (loader.micro_tokens * procs.world_size)
    ignored, epochs = ", ".join(map(repr, ring.ignored)), tokens / ring.total
    order = "; later epochs are shuffled" if loader.shuffle else ""
    auto = ""
    if "total_batch_size" in cfg.auto and cfg.train_tokens and not 0.5 < tokens / cfg.train_tokens < 2:  # max_iters
        auto = f" (auto, for train_tokens={cfg.train_tokens:,}; this run has another length)"
    again = f": each train token is read {epochs:.2f} times{order}" if epochs > 1 else ""
    return [
        ("data", f"{cfg.dataset}: {ring.total:,} train tokens in {len(ring.paths)} shard(s), "
                 f"{cfg.eval_tokens:,} of {val_ring.total:,} val tokens per evaluation"),
        *([("  ignored", f"{ignored}: a shard is named {NAME_PATTERN}")] if ignored else []),
        ("batch", f"{cfg.total_batch_size:,} tokens = {procs.world_size} rank(s) x {micro_batches} "
                  f"micro-batch(es) x {cfg.batch_size} sequences x {cfg.block_size} tokens{auto}"),
        *([("  ramp", stages)] if stages else []),
        ("length", f"{cfg.max_iters:,} steps = {tokens:,} tokens = {epochs:.2f} epochs{again}"),
    ]


def history_in_steps(history: int, loader: Any) -> str:
    """Return how many steps a number of micro-batches is: in the first step, and where the batch grows in the last."""
    plan, micro_batch = loader.plan, loader.micro_tokens * loader.world_size
    steps = [f"{history * micro_batch / plan.batch(step):,.4g}" for step in (0, plan.steps - 1)]
    return " to ".join(dict.fromkeys(steps))


def print_table(run: Any, checkpoint: str | None) -> None:
    """Print what is about to run, on rank 0. checkpoint: that a resumed run continues from."""
    precision, model, history = run.precision, run.model, run.cfg.FP8_AMAX_HISTORY
    unused, schedule = precision.flags_without_effect(run.cfg), run.optimizers.schedule
    rows = [
        ("device", f"{run.procs.world_size} x {run.machine['device']}, torch {run.machine['versions']['torch']}"),
        ("precision", f"{precision.name} {precision.reason}"),
        ("  ingredients", precision.details),
        ("  amax history", f"{history:,} micro-batches = {history_in_steps(history, run.loader)} steps"
         if precision.format.calibrated else ""),
        ("  head", "" if not precision.recipe else "FP8 (current scaling)" if model.fp8_head else "bf16"),
        ("  in bf16", ", ".join(run.in_bf16)),
        ("  without effect", ", ".join(unused)),
        ("kernels", model.kernels_text),
        ("attention", ". WARNING: ".join(filter(None, model.attention_texts))),
        ("wrapper", f"{run.parallel.wrapper} ({run.wrapper_reason})"),
        ("optimizers", run.optimizers.description),
        ("  learning rates", schedule.rates(run.optimizers.base_lr)),
        ("  weight decay", schedule.decays([g for adam in run.optimizers.all[1:] for g in adam.param_groups])),
        ("skipped steps", f"{run.guard}"),
        ("parameters", f"{run.parameters:,}"),
        *[(f"  {part}", f"{n:,} = {how}") for part, n, how in parameter_table(run.cfg)],
        *data_rows(run.cfg, run.procs, run.loader, run.val_ring),
        ("  repeated text", schedule.repeated_text_note()),
        ("micro-batch", run.batch_choice.reason),
        ("run folder", run.folder),
        ("resumed from", f"{checkpoint}, after {run.first_step:,} steps" if checkpoint else ""),
    ]
    run.procs.print("\n".join(f"{name:<18} {text}" for name, text in rows if text) + "\n")


def is_due(step: int, interval: int) -> bool:
    """Whether something that is made every `interval` optimizer steps (0: never) is due after step `step`."""
    return interval > 0 and (step + 1) % interval == 0


def evaluation_is_missing(run: Any) -> bool:
    """Whether a resumed train.Run was killed between its last checkpoint and the evaluation after it. If not, take over
    that evaluation's val loss."""
    step, missing = run.first_step - 1, False
    if run.log and run.first_step:  # rank 0 decides
        vals = {r["step"]: r for r in run.log.records if r["kind"] == "val"}
        last = step == run.cfg.max_iters - 1
        if step in vals:
            losses = vals[step].get("val_losses") or {}
            run.progress.val_losses = {name: math.nan if loss is None else loss for name, loss in losses.items()}
            run.progress.val_loss = math.nan if vals[step]["val_loss"] is None else vals[step]["val_loss"]
        else:
            missing = last or is_due(step, run.cfg.eval_interval) and bool(run.log.records)
    return run.procs.broadcast(missing)


def format_duration(seconds: float) -> str:
    """Return seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Progress:
    """A run's training time, speeds and log lines. All ranks count; rank 0 writes.

    The line of a step is written when the next one has been launched (or by flush()): waiting for a step's end before
    that would leave the GPU idle.
    """

    def __init__(self, cfg: SimpleNamespace, procs: Processes, log: RunLog | None, flops: float,
                 train_seconds: float = 0.0):
        """Start counting.

        Args:
            cfg: max_iters, total_batch_size, log_interval, eval_tokens.
            log: of rank 0; None on others.
            flops: training FLOPs of one token, for MFU.
            train_seconds: seconds of training before a resumed run's first step.
        """
        self.plan = BatchPlan(cfg)
        self.cfg, self.procs, self.log = cfg, procs, log
        self.flops, self.peak = flops, peak_flops(procs.device)
        self.train_seconds, self.speeds, self.pending = train_seconds, [], None
        self.val_loss, self.val_losses, self.compile_seconds = float("nan"), None, None

    def tokens(self, step: int) -> int:
        """Return the tokens that the run has read after a step."""
        return self.plan.tokens(step + 1)

    @property
    def median_speed(self) -> float:
        """Median tokens per second over this process's steps; over those in the log if it made none."""
        logged = [r["tok_per_sec"] for r in self.log.records if r["kind"] == "train"] if self.log else []
        return statistics.median_high(self.speeds or logged or [float("nan")])

    def step(self, step: int, rates: dict, loss: float, norm: float, ms: Callable[[], float],
             skipped: str = "") -> None:
        """Take note of optimizer step `step`, and write the line of the step before it.

        Args:
            rates: lr_muon, lr_embed, lr_head, momentum, by log.jsonl's names.
            loss, norm: mean loss, and gradient norm before clipping.
            ms: returns the milliseconds that the step took; it may wait for the GPU.
            skipped: why the step was not taken ("": it was). The record then has this as one more field.
        Raises: UserError if the loss or norm of the step before is not finite although that step was taken.
        """
        self.flush()
        self.pending = step, rates, loss, norm, ms, skipped

    def flush(self) -> None:
        """Write the line of the last step, if it is still to be written. Raises as step() does."""
        if self.pending is None:
            return
        (step, rates, loss, norm, ms, skipped), self.pending = self.pending, None
        cfg, n, ms = self.cfg, self.cfg.max_iters, ms()
        speed = self.plan.batch(step) / ms * 1000
        self.train_seconds += ms / 1000
        self.speeds.append(speed)
        if self.procs.is_main and (step % cfg.log_interval == 0 or step == n - 1 or skipped):
            mfu = self.flops * speed / (self.peak * self.procs.world_size) if self.peak else None
            memory = peak_memory_gb(self.procs.device)
            reason = {"skipped": skipped} if skipped else {}
            self.log.write(dict(kind="train", step=step, tokens=self.tokens(step), loss=loss,
                                grad_norm=norm, **rates, step_ms=ms, tok_per_sec=speed, mfu=mfu, peak_mem_gb=memory,
                                **reason))
            rate = rates["lr_embed"] if rates["lr_muon"] is None else rates["lr_muon"]
            # Over the last 100 steps only: this is on the steps' path
            eta = (self.tokens(n - 1) - self.tokens(step)) / statistics.median(self.speeds[-100:])
            self.procs.print(f"step {step + 1:>{len(str(n))}}/{n} | loss {loss:7.4f} | norm {norm:8.2e} | "
                             f"lr {rate:.2e} | {ms:7.1f} ms | {speed:,.0f} tok/s | "
                             + (f"MFU {100 * mfu:4.1f}% | " if mfu else "")
                             + f"{memory:.1f} GB | ETA {format_duration(eta)}"
                             + (f" | SKIPPED: {skipped}" if skipped else ""))
        if not skipped and not math.isfinite(loss + norm):
            raise UserError(f"the loss at step {step + 1} is {loss}, its gradient norm {norm}; "
                            f"try a lower learning rate or a longer warm-up")

    def val(self, step: int, val_loss: float, val_losses: dict[str, float] | None = None) -> None:
        """Log an evaluation after optimizer step `step`, and draw loss.png.

        val_losses: {format: loss evaluated in it}, if there are several.
        """
        self.flush()
        self.val_loss, self.val_losses = val_loss, val_losses
        if self.procs.is_main:
            several = {"val_losses": val_losses} if len(val_losses or ()) > 1 else {}
            self.log.write(dict(kind="val", step=step, tokens=self.tokens(step), val_loss=val_loss,
                                train_seconds=self.train_seconds, **several))
            self.procs.print(f"step {step + 1}/{self.cfg.max_iters} | val loss {val_loss:.4f} over "
                             f"{self.cfg.eval_tokens:,} tokens | {format_duration(self.train_seconds)} of training")
            self.log.plot()

    def done(self) -> None:
        """Log the end of the run, and say where to look."""
        self.flush()
        if self.procs.is_main:
            tokens = self.tokens(self.cfg.max_iters - 1)
            memory, several = peak_memory_gb(self.procs.device), self.val_losses or {}
            self.log.write(dict(kind="done", step=self.cfg.max_iters - 1, tokens=tokens, val_loss=self.val_loss,
                                **({"val_losses": several} if several else {}), train_seconds=self.train_seconds,
                                tok_per_sec_median=self.median_speed, peak_mem_gb=memory,
                                compile_seconds=self.compile_seconds))
            self.log.close()
            first, *others = several or [""]
            where = f" in {first}" + "".join(f", {several[name]:.4f} in {name}" for name in others) if others else ""
            self.procs.print(f"\ndone: val loss {self.val_loss:.4f}{where} after {tokens:,} tokens in "
                             f"{format_duration(self.train_seconds)} of training "
                             f"(median {self.median_speed:,.0f} tokens/s, {memory:.1f} GB)\n"
                             f"run folder: {self.log.folder} "
                             f"(loss.png: curves; log.jsonl: every step; config.json: all flags)")
        if not math.isfinite(self.val_loss):
            raise UserError(f"the val loss is {self.val_loss}: this model is of no use; "
                            f"try lower learning rates or less weight decay")
