"""Race variants: train whole schedules of each, a child process per GPU, and compare their last val losses."""

import contextlib
import itertools
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from nanofp8.config import PositiveFloat, UserError, convert
from nanofp8.faults import StopSignal
from nanofp8.files import console
from nanofp8.host import ends_with_parent
from nanofp8.machine import describe_machine
from nanofp8.procs import Processes
from nanofp8.race_report import Race, amount, name_of, report
from nanofp8.reports import RunData, finished_run, read_run
from nanofp8.runlog import format_duration
from nanofp8.sizes import BatchPlan, ramp_shares

OPTIONS = ("out", "variants", "tokens", "minutes", "seeds", "gpus", "target")
FLAGS = dict(log_interval=1, eval_interval=0, keep_checkpoints=0)  # of every run, unless the user says otherwise
OWN = {"max_iters": "use --tokens or --minutes", "train_tokens": "use --tokens or --minutes", "seed": "use --seeds",
       "run_name": "use names of variants", "resume": "finished runs are found by themselves",
       "log_interval": "it needs every step's record"}
DEFAULTS = {  # with and without a GPU: variants, tokens
    True: ("classic: --preset=classic; d20: --preset=d20", "50e6,100e6"),
    False: ("cosine: --lr_schedule=cosine; linear: --lr_schedule=linear", "40960,81920"),
}
FIRST_LENGTH = {True: 50e6, False: 40960}  # with and without a GPU: tokens that --minutes starts its guess from
FIRST_SEED = 1337
PROBE_STEPS = 40    # of the short run that measures a variant's speed for --minutes
POLL_SECONDS = 0.1  # between looks at the children
PATIENCE = 30       # seconds that a child gets to finish its step after a signal

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_variants(text: str) -> dict[str, list[str]]:
    """Return the flags of each variant from "name; name: --flag=value ...". Raises UserError."""
    variants, slugs = {}, {}
    for part in filter(str.strip, text.split(";")):
        name, _, flags = (word.strip() for word in part.partition(":"))
        if not name or "--" in name:
            raise UserError(f"--variants: write each as 'name: --flag=value ...', separated by ';', "
                            f"got '{part.strip()}'", 2)
        try:
            words = shlex.split(flags)
        except ValueError as error:
            raise UserError(f"--variants: cannot read the flags of '{name}' ({error}); check the quotes", 2) from None
        if (other := slugs.setdefault(slug(name), name)) != name or name in variants:
            raise UserError(f"--variants: '{other}' and '{name}' would share run folders; rename one", 2)
        variants[name] = words
    if not variants:
        raise UserError("--variants names none; write it as --variants='name; name: --flag=value'", 2)
    return variants


def slug(name: str) -> str:
    """Return a variant's name as a part of folder names."""
    return "-".join(re.sub(r"[^\w .-]", "", name).split()).lower()


def parse_numbers(option: str, text: str, one: bool = False) -> list[float]:
    """Return the positive numbers of --option=a,b, in order (one: it takes only one). Raises UserError."""
    try:
        numbers = sorted(convert(PositiveFloat, part) for part in ([text] if one else text.split(",")))
    except ValueError:
        example = dict(tokens="60e6 or 60e6,100e6", minutes="3 or 3,5", target="3.5885")[option]
        raise UserError(f"--{option} must be {'a number' if one else 'numbers'} above 0, such as {example}, "
                        f"got '{text}'", 2) from None
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--{option} has the same number twice, got '{text}'; give each once", 2)
    return numbers


def parse_count(option: str, text: str) -> int:
    """Return the whole number above 0 of --option=n. Raises UserError."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1000):
        raise UserError(f"--{option} must be a whole number from 1 to 1000, got '{text}'", 2)
    return int(text)


def visible_gpus(limit: int | None) -> list[str | None]:
    """Return the GPUs that this process sees, at most `limit`, as CUDA_VISIBLE_DEVICES names them; [None] without any.

    Raises: UserError if there are fewer than `limit`, or if they differ.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if (limit or 0) > max(1, count):  # without a GPU, runs are made one at a time
        raise UserError(f"--gpus={limit}, but only {count} can be seen; lower it, or check CUDA_VISIBLE_DEVICES", 2)
    if not count:
        return [None]
    gpus = (named or [str(i) for i in range(count)])[:limit or count]
    models = sorted({torch.cuda.get_device_name(i) for i in range(len(gpus))})
    if len(models) > 1:
        raise UserError(f"the GPUs differ ({', '.join(models)}); choose equal ones with CUDA_VISIBLE_DEVICES", 2)
    return gpus


def read_options(options: Mapping[str, str]) -> Race:
    """Return what the options of `race` ask for. Raises UserError."""
    if "tokens" in options and "minutes" in options:
        raise UserError("--tokens and --minutes both set the length; give only one of them", 2)
    unit = "minutes" if "minutes" in options else "tokens"
    variants, tokens = DEFAULTS[torch.cuda.is_available()]
    seeds = parse_count("seeds", options.get("seeds", "2"))
    return Race(
        variants=parse_variants(options.get("variants", variants)),
        lengths=parse_numbers(unit, options.get(unit, tokens)), unit=unit,
        seeds=list(range(FIRST_SEED, FIRST_SEED + seeds)),
        gpus=visible_gpus(parse_count("gpus", options["gpus"]) if "gpus" in options else None),
        target=parse_numbers("target", options["target"], one=True)[0] if "target" in options else None)


def check_given(given: Sequence[str]) -> None:
    """Refuse flags that a race sets itself. Raises UserError."""
    for name in (argument[2:].split("=")[0] for argument in given):
        if name in OWN:
            raise UserError(f"race sets --{name} itself ({OWN[name]}); leave it out", 2)


# ----------------------------------------------------------------------------------------------------------------------
# Planning


@dataclass(frozen=True)
class Job:
    """One run to train."""

    key: tuple            # (variant, length, seed), or (variant, tokens per step) of a run that measures speed
    label: str            # how the console names it
    arguments: list[str]
    cfg: SimpleNamespace  # what train.py makes of the arguments

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return BatchPlan(self.cfg).total


@contextlib.contextmanager
def naming(variant: str) -> Iterator[None]:
    """Put the variant's name before the text of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"variant '{variant}': {error}", error.status) from None


def speed_of(run: RunData) -> float:
    """Return the tokens per second of a short run of PROBE_STEPS, without its first steps. Where its batch grows, each
    stage counts by its share of the tokens."""
    if not run.config.get("batch_ramp"):
        return statistics.median_high(r["tok_per_sec"] for r in run.train[PROBE_STEPS // 2:])
    cfg, late = SimpleNamespace(**run.config), run.train[PROBE_STEPS // 4:]
    plan, speeds = BatchPlan(cfg), {}
    firsts = {first for first, _ in plan.starts}  # a stage's first step captures CUDA graphs
    for record in [r for r in late if r["step"] not in firsts]:
        speeds.setdefault(plan.batch(record["step"]), []).append(record["tok_per_sec"])
    shares = [(share, statistics.median_high(speeds[batch])) for share, batch in ramp_shares(cfg) if batch in speeds]
    return sum(share for share, _ in shares) / sum(share / speed for share, speed in shares)


class Planner:
    """Makes the jobs of a race."""

    def __init__(self, race: Race, given: Sequence[str], script: ModuleType):
        """Check all flags and the data.

        Args:
            race: what is compared.
            given: flags of all variants, as arguments.
            script: train.py as a module.
        Raises: UserError.
        """
        self.race, self.script = race, script
        check_given(given)
        self.given = [f"--{name}={value}" for name, value in FLAGS.items()] + list(given)
        self.length = race.lengths[0] if race.unit == "tokens" else FIRST_LENGTH[torch.cuda.is_available()]
        # A mistake in these is no variant's
        script.read_flags([*self.given, f"--train_tokens={max(1, round(self.length))}"])
        for variant, flags in race.variants.items():
            with naming(variant):
                check_given(flags)
                cfg = self.check(self.flags(variant, self.length))
                if cfg.eval_tokens <= cfg.block_size:
                    raise UserError(f"eval_tokens={cfg.eval_tokens} is one sequence, too little for a val loss; "
                                    f"raise --eval_tokens", 2)

    def check(self, cfg: SimpleNamespace) -> SimpleNamespace:
        """Check flags and data as train.py does before it trains, and return the flags. Raises UserError."""
        self.script.check_flags(cfg, 1)
        self.script.open_data(cfg, Processes(0, 0, 1, torch.device("cpu"), None))[0].close()
        return cfg

    def job(self, key: tuple, what: str, **own: Any) -> Job:
        """Return a job with flags of its own. key[0] is the variant. what: the rest of its label. Raises UserError."""
        own = dict(run_name=f"race-{slug(key[0])}-{slug(what)}") | own
        arguments = self.given + self.race.variants[key[0]] + [f"--{name}={value}" for name, value in own.items()]
        with naming(key[0]):
            return Job(key, f"{key[0]}, {what}", arguments, self.check(self.script.read_flags(arguments)))

    def flags(self, variant: str, tokens: float) -> SimpleNamespace:
        """Return a variant's flags in a run of this many tokens."""
        length = f"--train_tokens={max(1, round(tokens))}"
        return self.script.read_flags([*self.given, *self.race.variants[variant], length])

    def by_length(self) -> list[Job]:
        """Return the jobs of a race by tokens. Raises UserError."""
        return self.schedules({(v, n): n for v in self.race.variants for n in self.race.lengths})

    def by_time(self, train: Callable[[list[Job]], Mapping[tuple, RunData]]) -> list[Job]:
        """Measure each variant's speed by a short run, and return the jobs of a race by minutes. Raises UserError.

        train: trains jobs and returns those that worked, {key: run}. A variant whose short run fails is left out.
        """
        speeds, tokens = {}, {(v, n): self.length for v in self.race.variants for n in self.race.lengths}
        for _ in range(3):  # the batch may follow from the length, and the length follows from the speed at this batch
            batches = {(v, n): self.flags(v, tokens[v, n]).total_batch_size for v, n in tokens}
            probes = [self.job((v, batch), f"speed at {batch} tokens a step", seed=FIRST_SEED, max_iters=PROBE_STEPS,
                               total_batch_size=batch, eval_tokens=1, batch_ramp=self.flags(v, self.length).batch_ramp)
                      for v, batch in dict.fromkeys((v, batch) for (v, _), batch in batches.items())
                      if (v, batch) not in speeds]
            if not probes:
                break
            for key, run in train(probes).items():
                speeds[key] = speed_of(run)
            tokens = {(v, n): 60 * n * speeds[v, batch] for (v, n), batch in batches.items() if (v, batch) in speeds}
        return self.schedules(tokens)

    def schedules(self, tokens: Mapping[tuple[str, float], float]) -> list[Job]:
        """Return the jobs of whole schedules, longest first, so that all GPUs end at about the same time.

        tokens: {(variant, length): tokens to train on}.
        Raises: UserError if that is less than a step, or if two lengths are the same number of steps.
        """
        jobs, unit, seen = [], self.race.unit, {}
        for (variant, length), wanted in tokens.items():
            cfg, what = self.flags(variant, wanted), name_of(length, unit)
            batch, steps, smallest = cfg.total_batch_size, cfg.max_iters, ramp_shares(cfg)[0][1]
            of_a_step = f"{'at most ' if smallest < batch else ''}{batch:,} tokens"
            if wanted <= smallest / 2:
                raise UserError(f"variant '{variant}': {what} is less than one step of {of_a_step}; "
                                f"raise --{unit}, or lower --total_batch_size", 2)
            if (other := seen.setdefault((variant, batch, steps), what)) != what:
                raise UserError(f"variant '{variant}': {other} and {what} are both {steps} step(s) of {of_a_step}; "
                                f"choose --{unit} farther apart", 2)
            jobs += [self.job((variant, length, seed), f"{what}, seed {seed}", seed=seed, train_tokens=round(wanted))
                     for seed in self.race.seeds]
        return sorted(jobs, key=lambda job: -job.tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Child:
    """A process that trains a job."""

    job: Job
    process: subprocess.Popen
    log: str  # path of its output


def spawn(arguments: Sequence[str], log: str, label: str, gpu: str | None, cwd: str | None = None) -> subprocess.Popen:
    """Start `python arguments` with its output in the file `log`. Raises UserError.

    gpu: the only one that it sees; None: leave that as it is. cwd: its working folder; None: this process's.
    """
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    try:
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "wb") as output:
            # A session of its own: Ctrl-C must reach the child once, from this process
            return subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True,
                                    preexec_fn=ends_with_parent(signal.SIGTERM))
    except OSError as error:
        raise UserError(f"cannot start {label} ({error.strerror}: {log}); choose another --out or --out_dir") from None


def start_child(job: Job, gpu: str | None, script: str) -> Child:
    """Start `python script` for a job; its output goes to a file beside the run folder. Raises UserError.

    gpu: the only one that the child sees. None: leave that as it is.
    """
    cfg = job.cfg
    folders = (os.path.join(cfg.out_dir, cfg.run_name + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))
    log = next(folder for folder in folders if not os.path.exists(folder)) + ".log"
    process = spawn([script, *job.arguments], log, job.label, gpu)
    console(f"started {job.label}{'' if gpu is None else f' on GPU {gpu}'}: {log}")
    return Child(job, process, log)


def failure(child: Child) -> str:
    """Return why a child that has ended did not finish its job: how it ended, and its error line, below which torchrun
    may have printed more; without one, the last line of its output."""
    code = child.process.returncode
    with open(child.log, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f if line.strip()] or ["no output"]
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}" if code else "stopped before its end"
    reason = next((line for line in reversed(lines) if re.match(r"\S+\.py: error: ", line)), lines[-1])
    return f"{child.job.label} failed ({how}): {reason[:300]} (all of it: {child.log})"


def stop_children(children: Sequence[Child]) -> None:
    """End processes: ask, wait for the step that each is in, then kill."""
    try:
        for child in children:
            child.process.terminate()
        deadline = time.monotonic() + PATIENCE
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also after a second Ctrl-C
        for child in children:
            child.process.kill()
            child.process.wait()


def train_jobs(jobs: Sequence[Job], gpus: Sequence[str | None], script: str) -> dict[tuple, RunData]:
    """Train the jobs that are not there yet, one at a time on each GPU; return those that are finished, {key: run}.

    A job that fails is reported, and the others continue. Raises: UserError after a signal.
    """
    machine = describe_machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    folders = {job.key: folder for job in jobs if (folder := finished_run(job.cfg, machine))}
    waiting, running, start = [job for job in jobs if job.key not in folders], {}, time.perf_counter()
    total, trained = sum(job.tokens for job in waiting), 0
    console(f"runs: {len(waiting)} to train, {len(folders)} are there"
            + (f"; {amount(total)} tokens in all, {len(gpus)} at a time" if waiting else ""))
    with StopSignal() as stop:
        try:
            while waiting or running:
                for gpu in gpus:
                    if waiting and gpu not in running:
                        running[gpu] = start_child(waiting.pop(0), gpu, script)
                time.sleep(POLL_SECONDS)
                if stop.requested:
                    raise UserError("stopped by a signal; the same command continues after the finished runs")
                for gpu, child in list(running.items()):
                    if child.process.poll() is None:
                        continue
                    del running[gpu]
                    job, trained = child.job, trained + child.job.tokens
                    folder = finished_run(job.cfg, machine) if child.process.returncode == 0 else None
                    if folder is None:
                        console(failure(child))
                        continue
                    folders[job.key] = folder
                    elapsed = time.perf_counter() - start
                    console(f"{outcome(job.label, read_run(folder))}; {format_duration(elapsed)} so far, "
                            f"about {format_duration(elapsed * (total / trained - 1))} left")
        finally:
            stop_children(list(running.values()))
    return {job.key: read_run(folders[job.key]) for job in jobs if job.key in folders}


def outcome(label: str, run: RunData) -> str:
    """Return a finished run's result in a line."""
    loss = "" if run.val_loss is None else f"val loss {run.val_loss:.4f}, "
    return f"finished {label}: {loss}{format_duration(run.done['train_seconds'])} of training"


# ----------------------------------------------------------------------------------------------------------------------
# All of it


def run(options: Mapping[str, str], given: Sequence[str], script: ModuleType, out: str, command: str) -> None:
    """Run a race and write its report.

    Args:
        options: those of OPTIONS that were given.
        given: flags of all variants, as arguments.
        script: train.py as a module.
        out: path of the report, without its ending.
        command: as the report quotes it.
    Raises: UserError; also after the report, if a run failed.
    """
    if "RANK" in os.environ:
        raise UserError("race starts a process for each GPU itself; start it with python, without torchrun", 2)
    race = read_options(options)
    planner, failed = Planner(race, given, script), []

    def train(jobs: Sequence[Job]) -> dict[tuple, RunData]:
        runs = train_jobs(jobs, race.gpus, os.path.abspath(script.__file__))
        failed.extend(job.label for job in jobs if job.key not in runs)
        return runs

    runs = train(planner.by_length() if race.unit == "tokens" else planner.by_time(train))
    if not runs:
        raise UserError("none of the runs could be trained (each says why above)")
    report(runs, race, out, command)
    if failed:
        raise UserError(f"not in the table, because they failed (each says why above): {'; '.join(failed)}")
