"""Compiling ahead, with a stand-in for QuACK: what is started when, what is compiled, and what a failure does."""

import fcntl
import functools
import importlib.metadata
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import ROOT, check_it_ends
from nanofp8 import ahead, attention, epilogues

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="QuACK is for Linux")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Pretend that QuACK is installed, with a cache below tmp_path. Returns the list of processes that were started."""
    calls = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: calls.append((args, options)) or "process")
    monkeypatch.setenv("QUACK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return calls


def test_started_until_there_is_a_report(started, monkeypatch):
    assert ahead.start() == "process"
    (arguments,), options = started.pop()
    assert arguments[:3] == [sys.executable, "-m", "nanofp8.ahead"] and arguments[3] == ahead.report_file().absolute()
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "" and options["start_new_session"]
    assert ahead.start() == "process"  # the report is empty: that process was killed
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ahead.start() is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    ahead.report_file().write_text("relu2: 4.0 s\n")
    assert ahead.start() is None
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [SimpleNamespace(version="0.7")])
    assert ahead.start() == "process"  # another version of the packages


def test_nothing_is_started(started, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUACK_CACHE_DIR", str(tmp_path / "file" / "cache"))  # cannot be made
    assert ahead.start() is None

    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setenv("QUACK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert ahead.start() is None and not started


def described(x):
    """What QuACK's keys take from an operand: format, number of dimensions, and which one is contiguous."""
    return (x.dtype, x.numel() if x.numel() == 1 else (x.ndim, x.stride(-1) == 1)) if torch.is_tensor(x) else type(x)


@pytest.fixture
def keys(monkeypatch):
    """Stand in for QuACK and flash-attn-4. Returns {kernel: set of keys it was called with}."""
    found = {}

    def module(name):
        def gemm(a, b, out, c, epi_args, **options):
            key = [described(x) for x in (a, b, out, c)], {k: described(x) for k, x in epi_args.items()}, options
            found.setdefault(name, set()).add(repr(key))
            raise ahead.Compiled
        return SimpleNamespace(gemm=gemm)

    def forward(q, k, v, **options):
        found.setdefault("attention", set()).add(repr((q.dtype, q.shape[-1], sorted(options))))
        return torch.empty_like(q), q.new_empty(1), None

    def plain(name, A, B, D, C, semaphore, alpha=1.0, beta=1.0, **options):
        key = [described(x) for x in (A, B, D, C, semaphore)], alpha != 1, beta != 1, options
        found.setdefault(name, set()).add(repr(key))

    names = "relu2 relu2_backward plain logits".split()
    quack = {n: module(n) for n in names} | {n: functools.partial(plain, n) for n in ("gemm", "gemm_symmetric")}
    monkeypatch.setattr(epilogues, "library", lambda: (SimpleNamespace(**quack), "QuACK 0.6"))
    monkeypatch.setattr(attention, "flash4", lambda: (
        SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=lambda *args, dq, dk, dv, **options: None), "flash"))
    return found


def compile_all():
    for call in ahead.calls().values():
        with FakeTensorMode():
            try:
                call()
            except ahead.Compiled:
                pass


def test_the_kernels_that_training_needs(keys):
    """Those of training, whose sizes are others: a key with a size, or another format, would be a second one."""
    compile_all()
    assert set(keys) == {"relu2", "relu2_backward", "plain", "logits", "attention", "gemm", "gemm_symmetric"}
    assert len(keys["attention"]) == 2 and all("torch.bfloat16, 128" in key for key in keys.pop("attention"))

    def fp8(*shape, dtype=torch.float8_e4m3fn):
        return SimpleNamespace(data=torch.empty(*shape, dtype=dtype), inverse_scale=torch.ones(()))

    def scaling(dtype):
        return SimpleNamespace(scale=torch.ones(1), dtype=dtype)

    for call in (
        lambda: epilogues.plain_matmul(fp8(96, 64), fp8(192, 64)),
        lambda: epilogues.logits_matmul(fp8(96, 64), fp8(500, 64), 30.0),
        lambda: epilogues.relu2_matmul(fp8(96, 64), fp8(256, 64), scaling(torch.float8_e4m3fn)),
        lambda: epilogues.relu2_backward_matmul(fp8(96, 64, dtype=torch.float8_e5m2), fp8(256, 64), fp8(96, 256),
                                                scaling(torch.float8_e5m2)),
    ):
        with pytest.raises(ahead.Compiled):
            call()
    epilogues.odd_polynomial(torch.empty(3, 64, 96, dtype=torch.bfloat16), 1.5, -2.5, 3.5)
    assert len(keys.pop("gemm_symmetric")) == 2
    assert all(len(variants) == 1 for variants in keys.values()), keys


@LINUX
@pytest.mark.slow
def test_the_report(tmp_path):
    """relu2 and gemm are compiled, relu2_backward raises an error; then its worker dies, as after LIMIT."""
    script = textwrap.dedent("""
        import sys, time, types
        from nanofp8 import ahead, attention, epilogues

        def relu2(*args, **options):
            host.get_max_active_clusters(2)

        def matmul(*args, **options):
            gemm.get_max_active_clusters(2, device_capacity=90)

        def relu2_backward(*args, **options):
            time.sleep(float(sys.argv[2]))
            raise ValueError("no ptxas")

        host = types.ModuleType("host")
        gemm = types.ModuleType("gemm")
        sys.modules["quack"] = types.SimpleNamespace(gemm=gemm, gemm_symmetric=types.ModuleType("b"))
        sys.modules["quack.gemm_runtime"] = types.SimpleNamespace(host=host)
        kernels = types.SimpleNamespace(gemm=matmul, relu2=types.SimpleNamespace(gemm=relu2),
                                        relu2_backward=types.SimpleNamespace(gemm=relu2_backward))
        epilogues.library = lambda: (kernels, "QuACK 0.6")
        attention.flash4 = lambda: (None, "missing")
        ahead.LIMIT = 12 if float(sys.argv[2]) else 100  # a busy machine needs seconds to start a worker
        ahead.main(sys.argv[1])
    """)
    for seconds, expected in ((0, " s: ValueError: no ptxas"), (60, "BrokenProcessPool")):
        report = tmp_path / f"{seconds}.txt"
        done = subprocess.run([sys.executable, "-c", script, report, str(seconds)], cwd=ROOT, capture_output=True,
                              text=True, timeout=120)
        lines = report.read_text().splitlines()
        assert done.returncode == 0, done.stderr
        assert lines[0].startswith("QuACK 0.6, imported in") and lines[-1].startswith("all: ")
        assert any(line.startswith("relu2: ") and line.endswith(" s") for line in lines), lines
        if not seconds:
            assert any(line.startswith("Muon's third matmul: ") and line.endswith(" s") for line in lines), lines
        assert any(expected in line for line in lines), lines


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "ends_with_parent", lambda number: lambda: None)
    with open(tmp_path / "report", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            ahead.main(str(tmp_path / "report"))


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_with_training(number):
    child = "from nanofp8 import ahead; import time; ahead.ends_with_parent(9)(); print(1, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
        print(child.pid, flush=True)
        child.wait()
    """)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.communicate()
    check_it_ends(pid)
