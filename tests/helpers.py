"""Helpers of the tests of train.py: small flags, synthetic shards, models, subprocesses, torchrun, checkpoints."""

import contextlib
import gc
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import train
from nanofp8 import checkpoint, host, machine
from nanofp8 import te_emulation as te
from nanofp8.checkpoint import Checkpoints
from nanofp8.faults import Guard
from nanofp8.precision import FORMATS, TE_PARTS, Precision
from nanofp8.procs import Processes, start_processes
from nanofp8.runlog import RunLog

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "train.py")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VOCAB = 512

# A model of 0.2M parameters: every test starts from these flags and says what it changes.
SMALL = dict(
    preset="tiny", dataset="synthetic", vocab_size=VOCAB, n_layer=2, n_embd=64, n_head=2, block_size=32, batch_size=8,
    total_batch_size=256, max_iters=6, warmup_iters=2, muon_momentum_iters=4, loss_chunk_size=64, eval_interval=0,
    warmup_ratio=0.0, muon_momentum_ratio=0.0, muon_variant="muon", learning_rate=0.02,
    eval_tokens=640, learning_rate_head=0.02, muon_impl="torch", USE_COMPILE=False, FP8_AMAX_HISTORY=16,
)


# All optional parts of the model; a window that is shorter than block_size
PARTS = dict(n_value_embed=1, USE_X0=True, qk_scale=1.2, window_pattern="SL", window_size=8)


def flag_args(**changes):
    """Return SMALL with changes as a command line."""
    return [f"--{name}={value}" for name, value in (SMALL | changes).items()]


def make_cfg(**changes):
    """Return SMALL with changes as train.py resolves it."""
    return train.read_flags(flag_args(**changes), has_gpu=False)


def one_process(rank=0, world_size=1):
    """Return a Processes without a process group."""
    return Processes(rank, rank, world_size, CPU, None)


def emulated_precision(cfg):
    """Return the flags' format, emulated, whether or not the model's shapes fit it."""
    chosen = FORMATS["nvfp4" if cfg.USE_NVFP4 else f"fp8-{cfg.FP8_RECIPE}" if cfg.USE_FP8 else "bf16"]
    return Precision(te, chosen, chosen.recipe and chosen.recipe(te.recipe, cfg, ()), True, "a test")


def make_run(cfg, procs, model, loader=None, wrapper="none"):
    """Build a train.Run with what a step needs."""
    parallel = train.Parallel(model, wrapper, cfg, procs)
    optimizers = train.Optimizers(model, cfg, procs, parallel, 10**12)
    return train.Run(cfg, procs, train.select_precision(cfg, procs.device), parallel, optimizers, loader, Guard(cfg))


def make_model(cfg=None, zeros=False, seed=0, **changes):
    """Build a model of SMALL. train.py's head and output projections start at zero, which hides most of what a test
    looks for, and value embeddings start small with gates that are all alike; zeros=False replaces these by random
    values."""
    cfg = cfg or make_cfg(**changes)
    torch.manual_seed(seed)
    model = train.GPT(cfg, emulated_precision(cfg), lambda f: f, CPU)
    if not zeros:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("proj.weight", "fc2_weight", "head.weight")):
                    p.normal_(std=0.5 * p.shape[1] ** -0.5)
                elif "value_embed" in name:
                    p.normal_(std=0.5)
                elif p.ndim == 1:
                    p.add_(0.1 * torch.randn_like(p))
    return model


def tokens_and_targets(cfg, seed=0):
    """Return one random batch."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size + 1), generator=g)
    return x[:, :-1].int().contiguous(), x[:, 1:].contiguous()


def relative(a, b):
    """Return |a - b| / |b| in the Frobenius norm."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


# -----------------------------------------------------------------------------------------------------
# Shards


def markov_tokens(count, seed, vocab=VOCAB):
    """Return tokens that a model can learn something about: each follows from the token before by one of four steps."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 2, 3, 7], size=count, p=[0.7, 0.1, 0.1, 0.1])
    return (np.cumsum(steps) % vocab).astype(np.uint16)


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


def write_shard(path, tokens, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard_bytes(tokens, **header))
    return path


# -----------------------------------------------------------------------------------------------------
# Running train.py


def script_env(**extra):
    """Return the environment of a run on a CPU: one thread, no GPU, no torchrun."""
    of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in of_torchrun}
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **extra}


def marked_processes(mark):
    """Yield (pid, environment, command line), bytes, of the living processes that have `mark`, "NAME=value", in their
    environment. Reads /proc."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            entries = (path / "environ").read_bytes().split(b"\0")
            if mark.encode() in entries:
                environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
                yield int(path.name), environment, (path / "cmdline").read_bytes()
        except OSError:  # it has just ended, or is another user's
            continue


def start(*command, cwd, **env):
    """Start `python command...` and return the process. finish() waits for its end. Several can run side by side."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=script_env(**env), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def read_until(process, found, timeout=180):
    """Read a process's output up to the first line for which found(line) is true, and return that line.

    The process is killed after `timeout` seconds. A process that ends without such a line fails the test.
    """
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if found(line):
                return line
    finally:
        timer.cancel()
    pytest.fail(f"the process ended without the expected line: {process.communicate()[1]}")


def finish(process, timeout=180):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def start_torchrun(nproc, *command, cwd, **env):
    """Start `torchrun --nproc_per_node=nproc command...` with gloo."""
    return start("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", *command, cwd=cwd, **env)


def skip_full_collections(patch=setattr):
    """Let runs in this process do without the garbage collections at their start and after evaluations: with many
    modules, each takes 0.2 s."""
    for module in (machine, train):
        patch(module, "gc", SimpleNamespace(collect=lambda: 0, freeze=gc.freeze, unfreeze=gc.unfreeze, enable=gc.enable,
                                            disable=gc.disable))


# Reads a command as a line of JSON, and runs it in a fork of this process, which has imported train.py and done nothing
# else. Answers with the pid; the parent of each process writes its exit status into a file.
FORKER = """
import json, os, runpy, sys
sys.path[:0] = [{root!r}]
import train
assert not os.path.exists("/proc/self/task") or len(os.listdir("/proc/self/task")) == 1, "fork() with threads around"
for line in sys.stdin:
    command = json.loads(line)
    parent = os.fork()
    if parent:
        os.waitpid(parent, 0)
        continue
    if os.fork():
        os._exit(0)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(command["files"] + ".new", "w") as f:
            f.write(str(status))
        os.rename(command["files"] + ".new", command["files"] + ".status")
        os._exit(0)
    for fd, name in enumerate((os.devnull, command["files"] + ".out", command["files"] + ".err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), fd)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(command["cwd"])
    os.environ.update(command["env"])
    sys.argv = command["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
    break
"""


class Forked:
    """A process that a Forker has started, with what finish() and read_until() need of subprocess.Popen."""

    def __init__(self, pid, files):
        self.pid, self.files, self.returncode = pid, files, None

    def text(self, of):
        return pathlib.Path(f"{self.files}.{of}").read_text()

    @property
    def ended(self):
        """When it ended, as time.time() says it."""
        return os.stat(f"{self.files}.status").st_mtime

    @property
    def stdout(self):
        """Its lines as they come."""
        seen = 0
        while True:
            alive = self.poll() is None
            lines = self.text("out").splitlines(keepends=True) if os.path.exists(f"{self.files}.out") else []
            for line in lines[seen:]:
                if line.endswith("\n") or not alive:
                    seen += 1
                    yield line
            if not alive:
                return
            time.sleep(0.02)

    def poll(self):
        if self.returncode is None and os.path.exists(f"{self.files}.status"):
            self.returncode = int(self.text("status"))
        return self.returncode

    def communicate(self, timeout=None):
        deadline = time.monotonic() + (timeout or 600)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.files, timeout)
            time.sleep(0.02)
        return self.text("out"), self.text("err")

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Forker:
    """Starts scripts that import train.py in 0.2 s, where a process of its own takes 5 s of computing for its imports.

    For tests that need a process, but not its start. A script finds train.py imported, and is otherwise run as Python
    runs it: with its own arguments, environment, output and exit.
    """

    def __init__(self, folder):
        self.folder, self.count = folder, itertools.count()
        (folder / "forker.py").write_text(FORKER.format(root=str(ROOT)))
        self.process = subprocess.Popen([sys.executable, folder / "forker.py"], env=script_env(), text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, *command, cwd, **env):
        """Start `python command...`, as start() does, and return a Forked."""
        files = str(self.folder / f"process{next(self.count)}")
        print(json.dumps(dict(argv=[str(part) for part in command], cwd=str(cwd), env=env, files=files)), flush=True,
              file=self.process.stdin)
        return Forked(int(self.process.stdout.readline()), files)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def fork_ranks():
    """Make this process, which has imported what it needs and done nothing else, rank 0 of two; return its Processes.

    Rank 1 is forked, which saves its imports and torchrun's, 7 s of computing. Runs draw no pictures and collect no
    garbage. end_ranks() ends both.
    """
    skip_full_collections()
    RunLog.plot = lambda self: None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    other = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(other == 0))
    return start_processes()


def end_ranks(procs):
    """End the two ranks: rank 0 with the status of rank 1, if that has failed."""
    dist.destroy_process_group()
    if procs.is_main:
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))


def train_here(out_dir, data_dir, **changes):
    """Train a whole run in this process and return its run folder. loss.png is not drawn, because that takes longer
    than the training. Needs the fixture `fresh`."""
    te._state.__init__()
    with mock.patch.object(RunLog, "plot", lambda self: None):
        return pathlib.Path(train.main(flag_args(out_dir=out_dir, data_dir=data_dir, **changes)))


def records(folder, kind=None):
    """Return the records of a run's log.jsonl in order: all, or those of one kind."""
    lines = [json.loads(line) for line in (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()]
    return [r for r in lines if kind in (None, r["kind"])]


def losses(folder):
    return np.array([r["loss"] for r in records(folder, "train")])


def val_losses(folder):
    return np.array([r["val_loss"] for r in records(folder, "val")])


def assert_one_error_line(result, code, *words):
    """Check that train.py exited with `code` and one line on stderr that contains all words."""
    assert result.code == code, result.err
    assert result.err.startswith("train.py: error: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err


def edited_copy(folder, **edits):
    """Edit flags in a copy of train.py as a user would, and import it. edits: {flag: source text}. Returns: module,
    path."""
    text = pathlib.Path(TRAIN).read_text(encoding="utf-8")
    for name, value in edits.items():
        line = re.search(rf"^{name}: .+? = (.+?)\s+# ", text, re.M)
        assert line, name
        text = text[:line.start(1)] + value + text[line.end(1):]
    path = folder / "train_edited.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("train_edited", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_edited"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module, str(path)


# -----------------------------------------------------------------------------------------------------
# A GPU and Transformer Engine that are not there


def fake_transformer_engine(monkeypatch, version="2.20.2", capability=(9, 0), available=lambda question: (True, ""),
                            cublaslt=130100):
    """Let this process import a Transformer Engine of this version, and see a GPU of this compute capability.

    The library has the names of precision.TE_PARTS. available: answers is_fp8_available and the other questions by
    (bool, reason). Recipes are the emulation's.
    """
    def put(path, value):
        """Put a value at a dotted name below its module, and make the modules on the way."""
        module, _, rest = path.partition(":")
        for i in range(1, module.count(".") + 2):
            name = ".".join(module.split(".")[:i])
            if name not in sys.modules or not hasattr(sys.modules[name], "fake"):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
                sys.modules[name].fake = True
                if i > 1:
                    setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], sys.modules[name])
        owner, steps = sys.modules[module], rest.split(".")
        for step in steps[:-1]:
            if not hasattr(owner, step):
                setattr(owner, step, type(step, (), {}))
            owner = getattr(owner, step)
        setattr(owner, steps[-1], value)

    for module, names, arguments in TE_PARTS:
        for name in names.split():
            def part(*args, **kwargs):
                raise AssertionError("a fake")

            part.__signature__ = inspect.Signature(
                [inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY) for argument in arguments.split()])
            put(f"{module}:{name}", part)
    for name in vars(te.recipe):
        put(f"transformer_engine.common.recipe:{name}", getattr(te.recipe, name))
    for question in {chosen.question for chosen in FORMATS.values()} - {""}:
        put(f"transformer_engine.pytorch:{question}",
            lambda return_reason=False, question=question: available(question) if return_reason
            else available(question)[0])
    put("transformer_engine:__version__", version)
    put("transformer_engine_torch:get_cublasLt_version", lambda: cublaslt)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    fake_compilers(monkeypatch)


def fake_compilers(monkeypatch, fault=""):
    """Let Triton find what it needs on a GPU: a compiler (unless `fault`), the driver's library, a folder."""
    monkeypatch.setattr(host, "compiler_fault", lambda: fault)
    monkeypatch.setattr(host, "libcuda_fault", lambda: "")
    monkeypatch.setattr(host, "triton_cache", lambda: ("", ""))


# -----------------------------------------------------------------------------------------------------
# Checkpoints

CLOCK_KEYS = {"step_ms", "compile_seconds", "tok_per_sec", "tok_per_sec_median", "train_seconds", "peak_mem_gb"}


def learned(folder, *kinds):
    """Return log.jsonl without times and memory: runs that learned the same have equal records, bit for bit."""
    return [{k: v for k, v in r.items() if k not in CLOCK_KEYS}
            for r in records(folder) if not kinds or r["kind"] in kinds]


def in_ckpt(folder):
    """Return the names of everything in a run's checkpoint folder."""
    return sorted(p.name for p in (pathlib.Path(folder) / "ckpt").iterdir())


def copy_of_run(folder, to, *steps):
    """Copy a run folder: its whole log with half a line after it, and only its checkpoints after `steps`."""
    to = shutil.copytree(folder, to)
    for path in (to / "ckpt").iterdir():
        if int(path.name.removeprefix("step_")) not in steps:
            shutil.rmtree(path)
    with open(to / "log.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 6, "lo')
    return to


def whole(tensor):
    """Copy a tensor, gathered if it is sharded (then all ranks must call this)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@contextlib.contextmanager
def parameters_seen():
    """Record whole parameters: .saved = {step: {name: tensor}} as checkpoints get them, .restored = {name: tensor} as a
    resumed run has them after restore()."""
    seen, save, restore = SimpleNamespace(saved={}, restored={}), Checkpoints.save, checkpoint.restore

    def spied_save(self, step, make_state, meta):
        state = make_state()
        seen.saved[step] = {name: whole(p) for name, p in state["model"].items()}
        return save(self, step, lambda: state, meta)

    def spied_restore(run, *rest):
        result = restore(run, *rest)
        seen.restored = {name: whole(p) for name, p in run.model.named_parameters()}
        return result

    with mock.patch.object(Checkpoints, "save", spied_save), mock.patch.object(checkpoint, "restore", spied_restore):
        yield seen


@contextlib.contextmanager
def before_step(step, do):
    """Call do() before the training step number `step`, counted from where the run starts."""
    count, train_step = itertools.count(), train.train_step

    def spied(*args):
        if next(count) == step:
            do()
        return train_step(*args)

    with mock.patch.object(train, "train_step", spied):
        yield


POISONS = ("a loss of nan", "an inf inside", "a gradient of inf")


@contextlib.contextmanager
def poisoned(how, *steps, factor=float("nan")):
    """Make something non-finite in the training steps of these numbers, counted from where the run starts: the loss
    (times `factor`), the activations after the first block, or one gradient.

    Checkpoints are saved after such steps too, so that a test sees the state that they leave.
    """
    count, train_step = itertools.count(), train.train_step

    def spied(run):
        if next(count) not in steps:
            return train_step(run)
        loader, model = run.loader, run.model
        scale = loader.loss_weight
        if how == "a loss of nan":
            loader.loss_weight *= factor
            hook = None
        elif how == "an inf inside":
            hook = model.blocks[0].register_forward_hook(lambda block, args,
                                                         out: out * torch.where(out > 1, torch.inf, 1.0))
        else:
            hook = model.head.weight.register_hook(lambda grad: grad * torch.inf)
        try:
            return train_step(run)
        finally:
            loader.loss_weight = scale
            if hook:
                hook.remove()

    with mock.patch.object(train, "train_step", spied), mock.patch.object(Guard, "healthy", True):
        yield


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fails_in_one_line(capsys, code, *words, **changes):
    """Check that a run in this process exits with `code` and one line on stderr that contains all words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_here(**changes)
    result = SimpleNamespace(code=stop.value.code, err=capsys.readouterr().err)
    assert_one_error_line(result, code, *map(str, words))


def make_optimizers(model, cfg=None, data_tokens=10**12, **changes):
    """Build train.py's optimizers for one process."""
    cfg = cfg or make_cfg(**changes)
    parallel = train.Parallel(model, "none", cfg, one_process())
    return train.Optimizers(model, cfg, one_process(), parallel, data_tokens)


def random_grads(model, seed):
    """Fill in small random gradients."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g) * 1e-2


def precision_of(cfg):
    """Return the Precision that train.py chooses on a CPU."""
    return train.select_precision(cfg, CPU)


def forward(model, cfg, x, y=None, quantized=True, **kwargs):
    """Run the model in the flags' format, or in bf16 (quantized=False)."""
    with precision_of(cfg).autocast(one_process(), quantized=quantized):
        return model(x, y, **kwargs)


def check_it_ends(pid):
    """Fail unless a process that is no child of this one ends within 10 seconds."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":  # nobody has asked for its exit status yet
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process is still there")
