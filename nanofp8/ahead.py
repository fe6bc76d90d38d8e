"""Compile the kernels of QuACK and flash-attn-4 while train.py imports torch and builds its model.

Both compile a kernel at its first use, on one core, and keep it in a cache on disk. Training would compile one kernel
after another. So train.py first starts a process, which imports QuACK and forks workers; each compiles one kernel at a
time, without a GPU. Training later loads the kernels from the caches. QuACK locks a kernel that is being compiled, and
training waits for it. A kernel that is in no cache is compiled by training itself: no failure here stops it.

At the end the process writes a report of seconds and errors into QuACK's cache. Where this file exists, nothing is
started. Its name depends on the versions of all packages and on our sources, but not on flags: a kernel that a flag
changes is compiled by training itself.
"""

import fcntl
import getpass
import hashlib
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Callable

from nanofp8.host import ends_with_parent, usable_cores

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi", "flash-attn-4", "torch")
# What the two packages compile for if they see no GPU
HOPPER = dict(CUDA_VISIBLE_DEVICES="", QUACK_ARCH="90", CUTE_DSL_ARCH="sm_90a", FLASH_ATTENTION_ARCH="sm_90",
              FLASH_ATTENTION_NUM_SMS="132")
LIMIT = 50  # seconds that compiling a kernel may take; training waits for a lock of QuACK for 60


def report_file() -> pathlib.Path:
    """Return the path of the report for the installed packages and our sources."""
    versions = [[found.version for found in importlib.metadata.distributions(name=name)] for name in PACKAGES]
    sources = [(ROOT / f"nanofp8/{name}.py").read_bytes()
               for name in ("ahead", "attention", "epilogues", "epilogue_functions")]
    key = hashlib.sha256(repr((sys.version_info[:2], versions, sources)).encode()).hexdigest()
    cache = os.environ.get("QUACK_CACHE_DIR") or pathlib.Path(tempfile.gettempdir(), getpass.getuser(), "quack_cache")
    return pathlib.Path(cache, f"nanofp8-{key[:16]}.txt")


def start() -> subprocess.Popen | None:
    """Start compiling in another process if QuACK is installed, this is local rank 0, and there is no report yet.

    Call this in the main thread, before torch is imported: imports take longer than compiling. The process ends with
    this one at the latest.
    """
    try:
        importlib.metadata.version("quack-kernels")
        report = report_file()
        if os.environ.get("LOCAL_RANK", "0") != "0" or report.exists() and report.stat().st_size:
            return None
        report.parent.mkdir(parents=True, exist_ok=True)
        report.touch()
        return subprocess.Popen(
            [sys.executable, "-m", "nanofp8.ahead", report.absolute()], cwd=ROOT, env=os.environ | HOPPER,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)  # Ctrl-C is for train.py alone
    except Exception:  # QuACK is not installed, or its cache cannot be written
        return None


class Compiled(Exception):
    """The kernel is compiled and in the cache."""


def calls() -> dict[str, Callable[[], object]]:
    """Return a call of each kernel, roughly in the order in which training needs them.

    Caches tell kernels apart by formats and layouts, not by sizes, except for the size of heads: here 128.
    """
    import torch

    from nanofp8 import attention, epilogues

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def fp8(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> SimpleNamespace:
        return SimpleNamespace(data=tensor(*shape, dtype=dtype), inverse_scale=tensor(1, dtype=torch.float32))

    def scaling(dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(scale=tensor(1, dtype=torch.float32), dtype=dtype)

    def flash4(window: int | None) -> None:
        qkv, ctx = tensor(2, 2048, 3, 8, 128, dtype=torch.bfloat16), SimpleNamespace()
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        if attention.flash4()[0]:
            out = attention.FlashAttention4.forward(ctx, *qkv.unbind(2), window, 1.0)
            attention.FlashAttention4.backward(ctx, out)

    def matrices(columns: int) -> torch.Tensor:
        return tensor(2, C, columns, dtype=torch.bfloat16)

    def muon(function: str, *tensors: torch.Tensor | None, **factors: float) -> None:  # of epilogues.odd_polynomial()
        getattr(epilogues.library()[0], function)(*tensors, None, **epilogues.SQUARES, **factors)

    N, C, E5M2 = 512, 256, torch.float8_e5m2
    return {
        # OptimizerSet.warm_up() comes before the first forward pass
        "Muon's first matmul": lambda: muon("gemm_symmetric", wide := matrices(N), wide, matrices(C), None),
        "Muon's second matmul": lambda: muon(
            "gemm_symmetric", gram := matrices(C), gram, matrices(C), gram, alpha=2.0, beta=3.0),
        "Muon's third matmul": lambda: muon("gemm", matrices(C), (wide := matrices(N)).mT, matrices(N), wide, beta=2.0),
        "attention": lambda: flash4(None),
        "plain": lambda: epilogues.plain_matmul(fp8(N, C), fp8(3 * C, C)),
        "relu2": lambda: epilogues.relu2_matmul(fp8(N, C), fp8(4 * C, C), scaling(torch.float8_e4m3fn)),
        "logits": lambda: epilogues.logits_matmul(fp8(N, C), fp8(4 * C, C), 15.0),
        "relu2_backward": lambda: epilogues.relu2_backward_matmul(
            fp8(N, C, dtype=E5M2), fp8(4 * C, C), fp8(N, 4 * C), scaling(E5M2)),
        "attention with a window": lambda: flash4(512),
    }


def compile_kernel(name: str) -> str:
    """Compile the kernel of one of calls(). Returns the report's line about it."""
    from quack import gemm, gemm_symmetric
    from quack.gemm_runtime import host
    from torch._subclasses.fake_tensor import FakeTensorMode

    def stop(*_: object, **__: object) -> None:
        raise Compiled

    for module in (host, gemm, gemm_symmetric):
        module.get_max_active_clusters = stop  # it asks the GPU, and is called between compilation and launch
    signal.alarm(LIMIT)  # ends this process, and so gives its lock back
    begin, outcome = time.monotonic(), ""
    try:
        with FakeTensorMode():  # tensors without memory
            calls()[name]()
    except Compiled:
        pass
    except Exception as error:
        outcome = f": {type(error).__name__}: {error}"
    signal.alarm(0)
    return f"{name}: {time.monotonic() - begin:.1f} s{outcome}"


def main(report: str) -> None:
    """Compile all kernels for Hopper and write the report. Raises: BlockingIOError if another run is doing the same."""
    end_with_parent = ends_with_parent(signal.SIGKILL)
    end_with_parent()
    begin = time.monotonic()
    with open(report, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        from nanofp8 import epilogues

        found, text = epilogues.library()
        if not found:
            return
        workers = min(len(calls()), max(1, usable_cores() - 1))  # training needs a core
        lines = [f"{text}, imported in {time.monotonic() - begin:.1f} s; {workers} workers"]
        try:
            with ProcessPoolExecutor(workers, get_context("fork"), end_with_parent) as pool:
                lines += pool.map(compile_kernel, calls())
        except Exception as error:  # a worker died
            lines.append(f"{type(error).__name__}: {error}")
        file.write("\n".join([*lines, f"all: {time.monotonic() - begin:.1f} s\n"]))


if __name__ == "__main__":
    main(sys.argv[1])
