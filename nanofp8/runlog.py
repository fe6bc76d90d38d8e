"""The run folder: log.jsonl, config.json, pictures; the console; wandb."""

import contextlib
import fcntl
import json
import math
import os
import statistics
import time

from nanofp8.config import UserError, last_line
from nanofp8.machine import peak_flops, peak_memory_gb


def make_run_folder(out_dir, run_name):
    """Create out_dir/run_name, or run_name-2, -3, ... where that is taken: a run is never overwritten."""
    for n in range(1, 100_000):
        folder = os.path.join(out_dir, run_name if n == 1 else f"{run_name}-{n}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder} ({error.strerror}): choose another --out_dir or --run_name", one_rank=True)


def remove_if_empty(folder):
    """Of a run that failed before it wrote anything."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def format_duration(seconds):
    """Seconds as 1:02:03 or 2:03."""
    m, s = divmod(int(seconds + 0.5), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def read_log(folder):
    """The records of a run folder's log.jsonl, without lines that are none: a killed run or a crashed machine may have left some.
    A record has a kind and a step."""
    path, records = os.path.join(folder, "log.jsonl"), []
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                record = json.loads(line) if line.endswith("}\n") else None
                if isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def lock_folder(folder):
    """Keep other processes from training in a run folder until this one ends, however it does, or closes what is returned."""
    lock = os.open(folder, os.O_RDONLY)
    for seconds_left in (4, 3, 2, 1, 0):  # one that was killed just now may take a while to be gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if seconds_left:
                time.sleep(1)
                continue
            os.close(lock)
            raise UserError(f"another process is training in {folder}: wait for its end, or choose another --run_name", one_rank=True)
        except OSError:
            pass  # a file system without locks
        return lock


class RunLog:
    """The run folder's log.jsonl, config.json and loss.png, the console, and wandb. Only rank 0 has one that writes."""

    def __init__(self, folder, cfg, extra, first_step=0):
        """first_step: the step a resumed run goes on with; records of that step and later ones are dropped."""
        self.folder, self.wandb, self.records, self.unwritten = folder, None, [], b""
        path = os.path.join(folder, "log.jsonl")
        config = {k: v for k, v in vars(cfg).items() if k != "explicit"} | extra
        self.lock, self.config = lock_folder(folder), config
        try:
            if first_step:
                from nanofp8.checkpoint import invalidate_later_checkpoints  # which imports this module
                invalidate_later_checkpoints(folder, first_step)
                self.records = [r for r in read_log(folder) if r["kind"] != "done" and r["step"] < first_step]
                with open(path + ".new", "w", encoding="utf-8") as f:
                    f.writelines(map(self.line, self.records))
                os.replace(path + ".new", path)
            self.open_files()
        except OSError as error:
            os.close(self.lock)
            raise UserError(f"{folder} cannot be written ({error.strerror}): make room, or choose another --out_dir", one_rank=True)
        if cfg.USE_WANDB:
            try:
                import wandb
                self.wandb = wandb.init(project=cfg.wandb_project, name=os.path.basename(folder), config=config, dir=folder)
            except Exception as error:  # no wandb, no network, no login: the run goes on
                print(f"wandb is off: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)

    def open_files(self):
        """Write config.json, and open log.jsonl to append to."""
        with open(os.path.join(self.folder, "config.json"), "w") as f:
            json.dump(self.config, f, indent=2)
        self.file = open(os.path.join(self.folder, "log.jsonl"), "ab", buffering=0)  # unbuffered: what write() did not take is known

    @staticmethod
    def line(record):
        """A record as a line of log.jsonl. JSON has no NaN: a loss that is none is written as null."""
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + "\n"

    def write(self, record):
        """Append one record (a dict with `kind`) to log.jsonl and wandb."""
        self.records.append(record)
        self.write_line(self.line(record))
        if self.wandb is not None:
            try:
                values = {k: v for k, v in record.items() if k not in ("kind", "step")}
                self.wandb.log(dict(flatten(values, record["kind"])), step=record["step"])
            except Exception as error:
                print(f"wandb is off: {error}", flush=True)
                self.wandb = None

    def write_line(self, line):
        """Append to log.jsonl; where that fails (a full disk), say so and try again with the next line."""
        new, self.unwritten = not self.unwritten, self.unwritten + line.encode()
        try:
            if os.fstat(self.file.fileno()).st_nlink == 0:  # deleted while we wrote to it
                os.makedirs(self.folder, exist_ok=True)
                deleted = self.file
                self.open_files()  # may fail: then the next line tries again
                deleted.close()
                lock = lock_folder(self.folder)
                os.close(self.lock)
                self.lock = lock
                self.unwritten = "".join(map(self.line, self.records)).encode()
                print("log.jsonl was deleted: it and config.json are written anew", flush=True)
            self.unwritten = self.unwritten[self.file.write(self.unwritten):]
            if not self.unwritten:
                return
            reason = "no room"
        except OSError as error:
            reason = error.strerror
        if new:
            print(f"log.jsonl cannot be written, training goes on: {reason}", flush=True)

    def plot(self):
        """Draw loss.png and, with FP8_STATS_INTERVAL, fp8_stats.png. No picture is worth a run."""
        try:
            self.draw()
        except ImportError:
            pass
        except Exception as error:  # a full disk, a removed folder, a font
            print(f"the run's pictures cannot be drawn: {getattr(error, 'strerror', None) or last_line(error)}", flush=True)

    def draw(self):
        """loss.png: training loss (thin, and smoothed) and val loss over tokens."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        train = [r for r in self.records if r["kind"] == "train" and r["loss"] is not None and math.isfinite(r["loss"])]
        val = [r for r in self.records if r["kind"] == "val" and r["val_loss"] is not None]
        fig, ax = plt.subplots(figsize=(8, 4.5))
        unit, label = (1e6, "million tokens") if (train or val)[-1]["tokens"] >= 2e6 else (1e3, "thousand tokens")
        if train:
            x, loss = [r["tokens"] / unit for r in train], [r["loss"] for r in train]
            ax.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="train loss")
            # A short run is smoothed less: an average over 10 steps would lag behind 40
            curve = smooth(loss, beta=min(0.9, len(loss) / (len(loss) + 20)))
            ax.plot(x, curve, color="tab:blue", linewidth=1.5, label="train loss, smoothed")
        if val:
            ax.plot([r["tokens"] / unit for r in val], [r["val_loss"] for r in val], "o-", color="tab:orange",
                    markersize=4, label="val loss")
            ax.annotate(f"{val[-1]['val_loss']:.3f}", (val[-1]["tokens"] / unit, val[-1]["val_loss"]),
                        textcoords="offset points", xytext=(0, 8), ha="center", color="tab:orange")
        ax.set(xlabel=label, ylabel="cross-entropy (nats per token)")
        ax.set_title(os.path.basename(self.folder), parse_math=False)
        ax.grid(alpha=0.3)
        ax.legend()
        fig.tight_layout()
        temporary = os.path.join(self.folder, ".loss.png")
        fig.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, os.path.join(self.folder, "loss.png"))
        plt.close(fig)
        if any(r["kind"] == "fp8_stats" for r in self.records):
            from nanofp8 import fp8_stats
            fp8_stats.plot(self.records, os.path.join(self.folder, "fp8_stats.png"))

    def close(self):
        """Where a run ends, well or not: once is enough."""
        if self.lock is not None:
            self.file.close()
            os.close(self.lock)
            self.lock = None
            if self.wandb is not None:
                self.wandb.finish()


def flatten(tree, prefix):
    """The leaves of nested dicts as pairs ("prefix/key/key", value)."""
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}/{key}") if isinstance(value, dict) else [(f"{prefix}/{key}", value)]


def smooth(values, beta=0.9):
    """Exponential moving average with bias correction: a list as long as `values`; skipped steps' (None, not finite) do not count."""
    out, average, weight = [], 0.0, 0.0
    for value in values:
        if value is not None and math.isfinite(value):
            average, weight = beta * average + (1 - beta) * value, beta * weight + (1 - beta)
        out.append(average / weight if weight else math.nan)
    return out


class Progress:
    """A run's training time, speeds and log lines. All ranks count; rank 0 writes."""

    def __init__(self, cfg, procs, log, flops, train_seconds=0.0):
        """flops: training FLOPs of one token. train_seconds: of training before a resumed run's first step."""
        self.cfg, self.procs, self.log = cfg, procs, log
        self.flops, self.peak = flops, peak_flops(procs.device)
        self.train_seconds, self.speeds, self.val_loss, self.val_losses = train_seconds, [], float("nan"), None
        self.compile_seconds = None

    @property
    def speed(self):
        """Median tokens per second over all steps so far; over those in the log where there was none."""
        logged = [] if self.speeds or not self.log else [r["tok_per_sec"] for r in self.log.records if r["kind"] == "train"]
        return statistics.median_high(self.speeds or logged or [float("nan")])

    def step(self, step, loss, norm, rates, ms, skipped=""):
        """Log optimizer step `step`; raises UserError if its loss is not finite and it was not skipped.

        rates: lr_muon, lr_embed, lr_head, momentum by log.jsonl's names. ms: milliseconds the step took. skipped: why
        the step was not taken; such a record has this as one more field.
        """
        cfg, n = self.cfg, self.cfg.max_iters
        speed = cfg.total_batch_size / ms * 1000
        self.train_seconds += ms / 1000
        self.speeds.append(speed)
        if self.procs.is_main and (step % cfg.log_interval == 0 or step == n - 1 or skipped):
            mfu = self.flops * speed / (self.peak * self.procs.world_size) if self.peak else None
            memory = peak_memory_gb(self.procs.device)
            self.log.write(dict(kind="train", step=step, tokens=(step + 1) * cfg.total_batch_size, loss=loss, grad_norm=norm,
                                **rates, step_ms=ms, tok_per_sec=speed, mfu=mfu, peak_mem_gb=memory,
                                **({"skipped": skipped} if skipped else {})))
            lr = rates["lr_embed"] if rates["lr_muon"] is None else rates["lr_muon"]
            eta = (n - 1 - step) * cfg.total_batch_size / statistics.median(self.speeds[-100:])  # not all: this is on the steps' path
            self.procs.print(f"step {step + 1:>{len(str(n))}}/{n} | loss {loss:7.4f} | norm {norm:8.2e} | lr {lr:.2e} | "
                             f"{ms:7.1f} ms | {speed:,.0f} tok/s | " + (f"MFU {100 * mfu:4.1f}% | " if mfu else "")
                             + f"{memory:.1f} GB | ETA {format_duration(eta)}" + (f" | SKIPPED: {skipped}" if skipped else ""))
        if not skipped and not math.isfinite(loss + norm):
            raise UserError(f"the loss at step {step} is {loss}, its gradient's norm {norm}: try a lower learning rate or a longer warm-up")

    def val(self, step, val_loss, val_losses=None):
        """Log an evaluation after optimizer step `step`, and draw loss.png. val_losses: {name of each format: loss in it}."""
        self.val_loss, self.val_losses = val_loss, val_losses
        if self.procs.is_main:
            self.log.write(dict(kind="val", step=step, tokens=(step + 1) * self.cfg.total_batch_size, val_loss=val_loss,
                                train_seconds=self.train_seconds, **({"val_losses": val_losses} if len(val_losses or ()) > 1 else {})))
            self.procs.print(f"step {step + 1}/{self.cfg.max_iters} | val loss {val_loss:.4f} over {self.cfg.eval_tokens:,} tokens | "
                             f"{format_duration(self.train_seconds)} of training")
            self.log.plot()

    def done(self):
        """Log the end of the run and say where to look."""
        if self.procs.is_main:
            tokens, memory = self.cfg.max_iters * self.cfg.total_batch_size, peak_memory_gb(self.procs.device)
            self.log.write(dict(kind="done", step=self.cfg.max_iters - 1, tokens=tokens, val_loss=self.val_loss,
                                **({"val_losses": self.val_losses} if self.val_losses else {}),
                                train_seconds=self.train_seconds, tok_per_sec_median=self.speed, peak_mem_gb=memory,
                                compile_seconds=self.compile_seconds))
            self.log.close()
            others = "".join(f", {loss:.4f} in {name}" for name, loss in list((self.val_losses or {}).items())[1:])
            where = f" in {next(iter(self.val_losses))}{others}" if others else ""
            self.procs.print(f"\ndone: val loss {self.val_loss:.4f}{where} after {tokens:,} tokens in {format_duration(self.train_seconds)} "
                             f"of training ({self.speed:,.0f} tokens/s, {memory:.1f} GB)\n"
                             f"run folder: {self.log.folder}  (loss.png: curves; log.jsonl: every step; config.json: all flags)\n"
                             f"next: bash run.sh --help lists the flags; python train_orig.py trains the plain reference")
