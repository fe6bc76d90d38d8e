"""Handle faults of a run: bad steps, signals to stop, dead ranks."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import torch.distributed as dist

from nanofp8.config import UserError


class Guard:
    """Decide before each optimizer step whether its gradients may reach the weights.

    Reject steps with a non-finite loss or gradient norm and, if skip_loss_zscore or skip_grad_zscore is set, outliers:
    a loss or norm more than that many standard deviations above the mean of the last zscore_window taken steps.
    Rejected steps do not enter the window, so one NaN or spike cannot shift it. Every rank decides from the same
    numbers.
    """

    def __init__(self, cfg: SimpleNamespace, state: dict | None = None, auto_grad_zscore: float = 0.0):
        """Start with empty windows, or continue from what state_dict() returned (`state`).

        auto_grad_zscore: what skip_grad_zscore="auto" stands for.
        """
        state = state or dict(in_a_row=0, windows={})
        gradient = auto_grad_zscore if cfg.skip_grad_zscore == "auto" else cfg.skip_grad_zscore
        limits = dict(loss=cfg.skip_loss_zscore, gradient=gradient)
        self.limits = {name: limit for name, limit in limits.items() if limit}
        self.windows = {name: deque(state["windows"].get(name, ()), cfg.zscore_window) for name in self.limits}
        self.in_a_row = state["in_a_row"]  # consecutive steps that were skipped, up to now

    def __str__(self) -> str:
        """Say which steps are skipped, for the start-up table."""
        names = dict(loss="a loss", gradient="a gradient norm")
        outliers = [f"{names[name]} {limit:g} deviations above the mean" for name, limit in self.limits.items()]
        return " or ".join(["not finite", *outliers])

    @property
    def healthy(self) -> bool:
        """Whether the last step was taken. Only then is a checkpoint worth keeping: from weights whose steps are all
        rejected, no run can continue."""
        return not self.in_a_row

    def state_dict(self) -> dict:
        """Return the state as plain numbers, for a checkpoint's meta.json."""
        return dict(in_a_row=self.in_a_row, windows={name: list(window) for name, window in self.windows.items()})

    def check(self, loss: float, norm: float) -> str:
        """Return why a step with this loss and gradient norm must be skipped, or "" to take it."""
        values = dict(loss=loss, gradient=norm)
        why = next((f"{name} not finite" for name, value in values.items() if not math.isfinite(value)), "")
        for name, window in self.windows.items():
            if not why and len(window) == window.maxlen and (spread := np.std(window)) > 0:
                zscore = (values[name] - np.mean(window)) / spread
                if zscore > self.limits[name]:
                    why = f"{name} {zscore:.1f} standard deviations above its mean"
        if not why:
            for name, window in self.windows.items():
                window.append(values[name])
        self.in_a_row = self.in_a_row + 1 if why else 0
        return why


class StopSignal:
    """On SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP, let training finish the current step, save a checkpoint and stop.

    SIGUSR1 and SIGUSR2 are what schedulers of clusters (Slurm, SGE, OAR) send before the time ends. SIGHUP (the
    terminal is gone) does not count where it was ignored at the start, as under nohup.

    A context manager. `requested` is false, or the time of the first signal (time.monotonic(), seconds).
    """

    def __init__(self):
        self.requested, self.handlers_before = False, {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signals.append(signal.SIGHUP)
            self.handlers_before = {number: signal.signal(number, self.request) for number in signals}

    def request(self, number: int, _frame: object) -> None:
        """Handle a signal. A second one more than three seconds later has its usual effect.

        Within three seconds it is the same request on another way: Slurm and torchrun both signal the process.
        """
        if not self.requested:
            self.requested = time.monotonic()
        elif time.monotonic() - self.requested > 3:
            self.close()
            signal.raise_signal(number)

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # If another rank has died, torchrun's SIGTERM must not end this one before it has reported the failure
        if kind is None or issubclass(kind, UserError):
            self.close()


SUSPENDED = 5.0  # seconds that a thread which waits for one second is late if the whole process was stopped meanwhile


class Heartbeat:
    """Exchange heartbeats among ranks, and exit when another rank stops sending them.

    Without it, the death of a rank on another machine leaves the others waiting for NCCL's timeout, and nothing names
    the rank. A thread sends one heartbeat a second, not the training loop: a rank may compile, evaluate or save for as
    long as it likes. After SIGTERM the timeout drops to 10 s: torchrun sends one when a worker has died, restarts
    nothing before the others have exited, and kills them after 30 s. A pause of all ranks together (SIGSTOP,
    `docker pause`, a scheduler that suspends jobs) is not counted.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        """Start the threads.

        Args:
            store: the ranks' common store, on a connection of its own, since others wait in theirs.
            timeout: seconds without a heartbeat before a rank is declared dead.
        """
        self.rank, self.timeout, self.closing = rank, timeout, threading.Event()
        self.signals = None
        if threading.current_thread() is threading.main_thread():
            # The main thread may be stuck in a collective, where Python runs no signal handler; this socket works there
            self.signals, wakeup = socket.socketpair()
            self.signals.setblocking(False)
            wakeup.setblocking(False)
            signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
        self.store = dist.PrefixStore("heartbeat", store)
        self.keys, now = [str(other) for other in range(world_size)], time.monotonic()
        self.store.set(self.keys[rank], "0")
        self.store.wait(self.keys)
        self.last = {other: (b"0", now) for other in range(world_size)}  # a rank's count, and when it last changed
        self.store_answered = now
        # Two threads: the store of a machine that hangs does not answer at all
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.send, self.monitor)]
        for thread in self.threads:
            thread.start()

    def send(self) -> None:
        """Count up once a second, and read the other ranks' counts (a thread)."""
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone with its process: all counts stand still
            while not self.closing.wait(1):
                count += 1
                self.store.set(self.keys[self.rank], str(count))
                for other, value in enumerate(self.store.multi_get(self.keys)):
                    if self.last[other][0] != value:
                        self.last[other] = value, time.monotonic()
                self.store_answered = time.monotonic()

    def monitor(self) -> None:
        """Exit the process when another rank has been silent for too long (a thread)."""
        timeout, before = self.timeout, time.monotonic()
        while not self.closing.wait(1):
            now = time.monotonic()
            if now - before > SUSPENDED:  # so were the others, and had no time to answer
                self.last = {other: (value, now) for other, (value, _) in self.last.items()}
                self.store_answered = now
            before = now
            with contextlib.suppress(BlockingIOError):
                if self.signals and {signal.SIGTERM, signal.SIGINT} & {*self.signals.recv(64)}:
                    timeout = min(timeout, 10.0)
            if message := self.error_message(timeout):
                exit_now(f"{os.path.basename(sys.argv[0])}: error: {message}", 1)

    def silent_ranks(self, seconds: float) -> list[int]:
        """Return the other ranks without a heartbeat for this long, except those that closed in good order."""
        now = time.monotonic()
        return [other for other, (value, since) in self.last.items()
                if value != b"left" and now - since > seconds and other != self.rank]

    def error_message(self, seconds: float) -> str:
        """Return the line that names the ranks that are silent for this long; "" if there are none."""
        silent = self.silent_ranks(seconds)
        if not silent:
            return ""
        who = f"rank {', '.join(map(str, silent))}"
        if time.monotonic() - self.store_answered > max(3, seconds / 2):
            who = ("torchrun of the first machine" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                   else "rank 0")
        return (f"{who} has not responded for {seconds:g} s; stopping rank {self.rank}. "
                f"Continue with the same command and --resume=auto")

    def leaves_within(self, rank: int, seconds: float) -> bool:
        """Wait, at most so long, until a rank has closed its heartbeat. True also if the store has gone with it."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while self.store.get(self.keys[rank]) != b"left":
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.2)
        return True

    def close(self) -> None:
        """Leave in good order. Joins the threads: one that is still in the store's C++ code when Python exits would
        abort the process."""
        self.closing.set()
        for thread in self.threads:
            thread.join(timeout=5)
        if self.signals:
            os.close(signal.set_wakeup_fd(-1))
            self.signals.close()
        if time.monotonic() - self.store_answered < 3:
            with contextlib.suppress(RuntimeError):
                self.store.set(self.keys[self.rank], "left")


def exit_now(message: str, status: int) -> NoReturn:
    """Print a message and exit one of several ranks, without any clean-up that would wait for the others.

    A console that cannot be written, or that blocks, delays the exit by a second at most.
    """
    def report() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(message, end="\n" if message else "", file=sys.stderr, flush=True)
            sys.stdout.flush()

    try:
        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(timeout=1)
    finally:
        os._exit(status)
