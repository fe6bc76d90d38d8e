"""Faults: bad steps, signals to stop, ranks that died."""

import contextlib
import datetime
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque

import numpy as np
import torch.distributed as dist

from nanofp8.config import UserError


def connect_store(rank=None):
    """A connection to the ranks' common store at MASTER_ADDR:MASTER_PORT, which torchrun holds, or rank 0 where there is none.

    torchrun's outlives the processes: after a restart they must not find the addresses of those before.
    """
    env = os.environ
    held = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=rank == 0 and not held, wait_for_workers=False,
                          timeout=datetime.timedelta(minutes=10))
    return dist.PrefixStore(f"start_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


class Guard:
    """Decides before each optimizer step whether it may reach the weights, by values that are the same on all ranks.

    A loss or gradient that is not finite never may. With skip_loss_zscore or skip_grad_zscore nor may one that lies so many
    standard deviations above the mean of the last zscore_window steps. Skipped steps do not enter the window, so that no NaN
    and no spike can shift it.
    """

    def __init__(self, cfg, state=None):
        """state: what state_dict() gave, to go on from."""
        state = state or dict(in_a_row=0, windows={})
        self.limits = {name: limit for name, limit in (("loss", cfg.skip_loss_zscore), ("gradient", cfg.skip_grad_zscore)) if limit}
        self.windows = {name: deque(state["windows"].get(name, ()), cfg.zscore_window) for name in self.limits}
        self.in_a_row = state["in_a_row"]  # skipped steps up to now

    @property
    def healthy(self):
        """Whether the last step was taken. Only then is a checkpoint due: from weights that no step fits, none could go on."""
        return not self.in_a_row

    def state_dict(self):
        return dict(in_a_row=self.in_a_row, windows={name: list(window) for name, window in self.windows.items()})

    def check(self, loss, norm):
        """Why a step of this loss and gradient norm (floats) must be skipped, or ""."""
        values = dict(loss=loss, gradient=norm)
        why = next((f"{name} not finite" for name, value in values.items() if not math.isfinite(value)), "")
        for name, window in self.windows.items():
            if not why and len(window) == window.maxlen and (spread := np.std(window)) > 0:
                z = (values[name] - np.mean(window)) / spread
                why = f"{name} {z:.1f} standard deviations above its mean" if z > self.limits[name] else ""
        if not why:
            for name, window in self.windows.items():
                window.append(values[name])
        self.in_a_row = self.in_a_row + 1 if why else 0
        return why


class StopSignal:
    """Turns SIGTERM and SIGINT into a wish: training ends after the step in hand, with a checkpoint."""

    def __init__(self):
        self.requested, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT)}

    def request(self, number, _):
        """The first signal is a wish. One that comes within three seconds of it is the same, on another way (from Slurm
        and from torchrun); after that, a second one ends the process as ever."""
        if not self.requested:
            self.requested = time.monotonic()
        elif time.monotonic() - self.requested > 3:
            self.close()
            signal.raise_signal(number)

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Where another rank has died, torchrun's SIGTERM must not end this one before it has said so
        if kind is None or issubclass(kind, UserError):
            self.close()


class Heartbeat:
    """Signs of life among ranks: each counts in a store every second, and ends, naming it, when another's count stands still.

    Without it, a rank that died on another machine leaves the others waiting for NCCL's timeout, and unnamed. A thread
    counts, not the training loop: ranks may compile, evaluate or save for as long as they like. After SIGTERM the wait is
    short: torchrun sends one when a worker has died, and restarts nothing before the others are gone, or killed after 30 s.
    """

    def __init__(self, procs, timeout):
        """timeout: seconds without a sign after which a rank is taken for dead."""
        self.procs, self.timeout, self.closing = procs, timeout, threading.Event()
        self.signals = None
        if threading.current_thread() is threading.main_thread():  # which may be stuck in a collective: Python's handlers wait, this does not
            self.signals, wakeup = socket.socketpair()
            self.signals.setblocking(False)
            wakeup.setblocking(False)
            signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
        self.store = dist.PrefixStore("watch", connect_store())  # a connection of its own: others wait in theirs
        self.keys, now = [str(rank) for rank in range(procs.world_size)], time.monotonic()
        self.store.set(self.keys[procs.rank], "0")
        self.store.wait(self.keys)
        self.last = {rank: (b"0", now) for rank in range(procs.world_size)}  # a rank's count, and since when
        self.heard = now  # when the store last answered
        # Two threads: a store on a machine that hangs does not answer at all
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.count, self.monitor)]
        for thread in self.threads:
            thread.start()

    def count(self):
        number = 0
        with contextlib.suppress(RuntimeError):  # the store went with whoever held it: now all counts stand still
            while not self.closing.wait(1):
                number += 1
                self.store.set(self.keys[self.procs.rank], str(number))
                for rank, value in enumerate(self.store.multi_get(self.keys)):
                    if self.last[rank][0] != value:
                        self.last[rank] = value, time.monotonic()
                self.heard = time.monotonic()

    def monitor(self):
        timeout = self.timeout
        while not self.closing.wait(1):
            with contextlib.suppress(BlockingIOError):
                if self.signals and {signal.SIGTERM, signal.SIGINT} & {*self.signals.recv(64)}:
                    timeout = min(timeout, 10.0)
            if self.silent(timeout):
                end_now(f"{os.path.basename(sys.argv[0])}: error: {self.error_message(timeout)}", 1)

    def silent(self, seconds):
        """The ranks that gave no sign for so long, but for those that left in good order."""
        now = time.monotonic()
        return [rank for rank, (value, since) in self.last.items()
                if value != b"left" and now - since > seconds and rank != self.procs.rank]

    def error_message(self, seconds):
        """The line that names them; "" where nobody died."""
        dead = self.silent(seconds)
        if not dead:
            return ""
        who = f"rank {', '.join(map(str, dead))}"
        if time.monotonic() - self.heard > max(3, seconds / 2):  # it is the store that is silent
            who = "torchrun of the first machine" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        return (f"no sign of life from {who} for {seconds:g} s: rank {self.procs.rank} ends too; the same command with "
                f"--resume=auto goes on from the newest checkpoint")

    def close(self):
        """Leave in good order. A thread that is still inside the store's C++ when Python ends would abort the process."""
        self.closing.set()
        for thread in self.threads:
            thread.join(timeout=5)
        if self.signals:
            os.close(signal.set_wakeup_fd(-1))
            self.signals.close()
        if time.monotonic() - self.heard < 3:
            with contextlib.suppress(RuntimeError):
                self.store.set(self.keys[self.procs.rank], "left")


def end_now(message, status):
    """End one of several ranks, which may never hear of each other again: no clean-up that waits for the others."""
    print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
