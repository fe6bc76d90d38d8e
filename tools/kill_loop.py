"""
Kill a training run at random moments, start it again until it is done, and compare it with a run that was never killed.

    python tools/kill_loop.py                               # one process, 30 times SIGKILL
    python tools/kill_loop.py --nproc=2 --steps=150         # run.sh with two processes: a worker, torchrun or all die
    python tools/kill_loop.py --USE_FP8=False               # other arguments go to train.py

Needs no GPU (the model is tiny) and pytest. Weights, optimizer state, FP8 scales, random generators and the records of
log.jsonl must be equal bit for bit. Prints a table; the exit status is 1 if anything differs or if an attempt ends in
an unexpected way. If a run is done before all kills were made, another one is started.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

import torch

from helpers import learned, marked_processes, script_env
from nanofp8.checkpoint_files import complete_checkpoints, load_tensors, read_checkpoint, read_index
from nanofp8.config import OneLineParser, UserError, exit_with
from nanofp8.resuming import find_checkpoint

# Steps of 0.1 to 0.2 s on one core; warm_up and evaluations are part of what must continue
SMALL = ("--preset=tiny --n_layer=1 --n_embd=32 --n_head=2 --block_size=32 --batch_size=2 --loss_chunk_size=64 "
         "--eval_tokens=256 --vocab_size=50304 --eval_interval=10 --ckpt_interval=3 --rank_timeout=5").split()
START, EMPTY, TRAINING, SAVING, END = ("start-up, before the first step", "before the first checkpoint", "training",
                                       "while a checkpoint is written", "after the last step")
PHASES = (START, EMPTY, TRAINING, SAVING, END)


@dataclasses.dataclass
class Attempt:
    """One start of a run: its output, what was killed in which phase ("" if nothing), and its exit status."""

    run: str
    output: pathlib.Path
    victim: str = ""
    phase: str = ""
    status: int | None = None

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def ended(self) -> str:
        """Return how an attempt ended, in words; "unexpected" if none of the expected ways fits."""
        text = self.text
        if "Traceback" in text or ".damaged" in text:
            return "unexpected"
        if self.victim:
            return "killed"
        if re.search(r"checkpoint at step \d+ failed", text):  # as the other rank may say while one is killed
            return "unexpected"
        if self.status == 0 and "done: val loss" in text:
            return "done"
        if self.status == 1 and "another process is training in" in text:
            return "refused, because workers of the killed torchrun still trained"
        if self.status == 2 and "raise --max_iters" in text:
            return "refused, because the killed processes had just finished the run"
        return "unexpected"


def processes(marker: str) -> dict[str, int]:
    """Return the living processes of an attempt: {"torchrun", "worker 0", ... or "process <pid>": pid}."""
    found = {}
    for pid, environment, command in marked_processes(f"KILL_LOOP={marker}"):
        if b"train.py\0" in command and b"RANK" in environment:
            found[f"worker {int(environment[b'RANK'])}"] = pid
        elif b"torch.distributed.run" in command:
            found["torchrun"] = pid
        else:
            found[f"process {pid}"] = pid
    return found


class Loop:
    """Runs that are killed again and again."""

    def __init__(self, args: SimpleNamespace, flags: list[str], folder: pathlib.Path):
        """Args: flags: of train.py. folder: for run folders and output."""
        self.args, self.flags, self.folder, self.rng = args, flags, folder, random.Random(args.seed)
        self.attempts: list[Attempt] = []
        self.seconds_to_start = 5.0  # until the first step; measured on the run that is not killed

    def start(self, run: str, *flags: str) -> tuple[Attempt, subprocess.Popen]:
        """Start or continue a run."""
        attempt = Attempt(run, self.folder / f"{len(self.attempts):03d}.{run}.txt")
        self.attempts.append(attempt)
        flags = [*self.flags, f"--out_dir={self.folder}", f"--run_name={run}", *flags]
        command = [sys.executable, "-u", "train.py", *flags]
        if self.args.nproc > 1:
            command = ["bash", "run.sh", *flags]
        env = script_env(NPROC=str(self.args.nproc), PYTHON=sys.executable, PYTHONUNBUFFERED="1",
                         KILL_LOOP=self.marker())
        with open(attempt.output, "wb") as f:
            return attempt, subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                             start_new_session=True)

    def marker(self) -> str:
        """Return what tells the newest attempt's processes from all others."""
        return f"{os.getpid()}.{len(self.attempts)}"

    def whole(self) -> None:
        """Train the run that is not killed."""
        attempt, process = self.start("whole")
        begin = time.monotonic()
        self.wait(process, lambda: "\nstep " in attempt.text)
        self.seconds_to_start = time.monotonic() - begin
        attempt.status = process.wait()
        if attempt.ended() != "done":
            raise UserError(f"the run that was not killed failed:\n{attempt.text}")

    def wait(self, process: subprocess.Popen, condition: Callable[[], bool], limit: float = 300.0) -> bool:
        """Wait until a condition holds; return false if the process ended before, or after `limit` seconds."""
        deadline = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.003)
        return False

    def wait_for_moment(self, attempt: Attempt, process: subprocess.Popen) -> None:
        """Wait for a random moment of an attempt; return earlier if it ends.

        One attempt in six is killed before its first step, the others after up to `apart` steps, one in three of them
        during a write. The first two attempts of a run are killed after up to two steps, before its first checkpoint.
        Later ones wait for a checkpoint: on a busy machine, too, the run must get on.
        """
        rng, steps, new = self.rng, self.rng.randrange(self.args.apart), self.is_new(attempt.run)
        starting, saving, moment = rng.random() < 1 / 6, rng.random() < 1 / 3, rng.random()
        if starting:
            self.wait(process, lambda: False, moment * self.seconds_to_start)
            return
        if new and sum(other.run == attempt.run for other in self.attempts) <= 2:
            steps, saving = steps % 3, False
        elif new:
            self.wait(process, lambda: not self.is_new(attempt.run))
        self.wait(process, lambda: attempt.text.count("| loss ") > steps or self.is_at_its_end(attempt))
        if saving:
            self.wait(process, lambda: self.half_written(attempt.run))
        self.wait(process, lambda: False, moment * (0.1 if saving else 0.2))

    def is_at_its_end(self, attempt: Attempt) -> bool:
        """Whether an attempt has made the last step."""
        return f"\nstep {self.args.steps}/{self.args.steps} | loss " in attempt.text

    def is_new(self, run: str) -> bool:
        """Whether a run has no complete checkpoint yet."""
        return not complete_checkpoints(str(self.folder / run / "ckpt"))

    def half_written(self, run: str) -> bool:
        """Whether a checkpoint of a run is being written, or was when it was killed."""
        return any((self.folder / run).glob("ckpt/.writing_*"))

    def kill(self, attempt: Attempt, process: subprocess.Popen) -> None:
        """Send SIGKILL to an attempt: with several processes to a worker (three of five), torchrun, or all."""
        draw, choice = self.rng.random(), self.rng.random()
        if self.args.nproc == 1:
            victim, pids = "train.py", [process.pid]
        else:
            alive = processes(self.marker())
            workers = sorted(name for name in alive if name.startswith("worker"))
            victim, pids = "all", [*alive.values()]
            if draw < 0.6 and workers:
                victim = workers[int(choice * len(workers))]
                pids = [alive[victim]]
            elif 0.6 <= draw < 0.8 and "torchrun" in alive:
                victim, pids = "torchrun", [alive["torchrun"]]
        if process.poll() is not None:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        attempt.victim, attempt.phase = victim, self.phase(attempt)

    def phase(self, attempt: Attempt) -> str:
        """Return the phase in which an attempt has just been killed."""
        if "\nstep " not in attempt.text:
            return START
        if self.is_at_its_end(attempt):
            return END
        if self.half_written(attempt.run):
            return SAVING
        return EMPTY if self.is_new(attempt.run) else TRAINING

    def kill_and_continue(self) -> list[str]:
        """Make all kills; return the names of the runs, each of which is done."""
        kills, runs = 0, []
        while kills < self.args.kills:
            runs.append(f"run{len(runs) + 1}")
            while True:
                attempt, process = self.start(runs[-1], "--resume=auto")
                if kills < self.args.kills:
                    self.wait_for_moment(attempt, process)
                    self.kill(attempt, process)
                    kills += bool(attempt.victim)
                try:
                    attempt.status = process.wait(timeout=300)
                except subprocess.TimeoutExpired:
                    raise UserError(f"{attempt.output}: did not end within 300 s") from None
                ended = attempt.ended()
                print(f"{runs[-1]}: {ended} {attempt.victim} {attempt.phase}".rstrip(), flush=True)
                if ended == "unexpected":
                    print(attempt.text[-2000:], flush=True)
                if ended in ("done", "unexpected") or "just finished" in ended:
                    break
        return runs

    def close(self) -> None:
        """End what an error left running."""
        for number in range(1, len(self.attempts) + 1):
            for pid in processes(f"{os.getpid()}.{number}").values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def saved_tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint: weights, optimizer state, FP8 scales, random generators."""
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype)
               for name, entry in read_index(checkpoint).state_dict_metadata.items()}
    load_tensors(checkpoint, tensors, no_dist=True)
    return tensors


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """Return what differs between two run folders, bit for bit, but for times."""
    found = []
    if learned(whole) != learned(killed):
        found.append("log.jsonl")
    folders = [find_checkpoint(str(folder)) for folder in (whole, killed)]
    if None in folders:
        return [*found, "no checkpoint"]
    metas = [{key: value for key, value in read_checkpoint(folder).items() if key in ("step", "tokens", "loader",
             "data", "guard", "muon_momentum")} for folder in folders]
    if metas[0] != metas[1]:
        found.append("meta.json")
    a, b = map(saved_tensors, folders)
    if a.keys() != b.keys():
        found.append("names of tensors")
    found += [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    if sorted(p.name for p in (killed / "ckpt").iterdir()) != sorted(p.name for p in (whole / "ckpt").iterdir()):
        found.append("names of checkpoints")
    return found


def report(loop: Loop, runs: list[str], seconds: float) -> bool:
    """Print the tables; return whether all is as it should be."""
    killed = [attempt for attempt in loop.attempts if attempt.victim]
    victims = sorted({attempt.victim for attempt in killed})
    count = collections.Counter((attempt.phase, attempt.victim) for attempt in killed)
    rows = [[phase, *(count[phase, victim] for victim in victims), sum(count[phase, victim] for victim in victims)]
            for phase in PHASES]
    print("\n| SIGKILL | " + " | ".join([*victims, "sum"]) + " |")
    print("|---|" + "---|" * (len(victims) + 1))
    for row in [*rows, ["sum", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))]]:
        print("| " + " | ".join(map(str, row)) + " |")
    ends = collections.Counter(attempt.ended() for attempt in loop.attempts[1:])
    resumed = sum("resumed from" in attempt.text for attempt in loop.attempts)
    print(f"\n{len(loop.attempts) - 1} starts in {seconds:.0f} s; {resumed} continued from a checkpoint. "
          + "; ".join(f"{number} {how}" for how, number in ends.items()) + "\n")
    whole, well = loop.folder / "whole", not ends["unexpected"]
    tensors = collections.Counter(name.split(".")[0] for name in saved_tensors(find_checkpoint(str(whole))))
    print("compared: " + ", ".join(f"{number} tensors of {name}" for name, number in tensors.items())
          + f", {len(learned(whole))} records of log.jsonl")
    for run in runs:
        differ = differences(whole, loop.folder / run)
        kills = sum(attempt.run == run for attempt in killed)
        print(f"{run}, killed {kills} times: " + ("equal, bit for bit" if not differ else
              f"{len(differ)} differences: {', '.join(differ[:8])}"))
        well &= not differ
    return well


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--nproc", type=int, default=1, help="processes; more than one: by run.sh and torchrun")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--apart", type=int, default=8, help="an attempt is killed after fewer than this many steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", metavar="DIR", help="keep run folders and output there (default: delete them)")
    args, flags = parser.parse_known_args()
    flags = [*SMALL, f"--total_batch_size={64 * args.nproc}", f"--max_iters={args.steps}", *flags]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.out or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--out={args.out}: the folder is not empty; give a new one", 2)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started
        print(f"train.py {shlex.join(flags)}", flush=True)
        begin, loop = time.monotonic(), Loop(args, flags, folder)
        try:
            loop.whole()
            runs = loop.kill_and_continue()
            return 0 if report(loop, runs, time.monotonic() - begin) else 1
        finally:
            loop.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        exit_with(error, "kill_loop.py")
