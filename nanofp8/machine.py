"""The machine: device, versions, peak rates, memory, clock, profiler."""

import contextlib
import gc
import glob
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from typing import Any, Iterator

import torch

from nanofp8 import cards, host
from nanofp8.config import PROJECT, UserError
from nanofp8.files import console, error_line

# Modules that do not train: an edit to a report must not make finished runs count as old
REPORTS = ("alternate.py", "breakdown.py", "card.py", "doctor.py", "race.py", "race_report.py", "reports.py")

# Dense bf16 tensor-core peaks in FLOP/s, with sums in fp32; the first entry found in the device's name counts. Half of
# what data sheets give "with sparsity"; where they give none, multiprocessors x FLOP per clock x boost clock
PEAK_BF16 = [
    ("GB300", 2.5e15), ("B300", 2.25e15), ("GB200", 2.5e15), ("B200", 2.25e15),  # glennklockwood.com/garden/processors
    ("GH200", 989e12), ("H200 NVL", 835e12), ("H200", 989e12),  # nvidia.com/en-us/data-center/h200
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800 PCIe", None), ("H800", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12),
    # NVIDIA's RTX PRO whitepaper: 188 x 1024 x 2.617 GHz. Max-Q: its data sheet's 3,511 AI TOPS (sparse FP4) / 8.
    # Server Edition: its sheets differ, so it has no entry
    ("RTX PRO 6000 Blackwell Workstation Edition", 503.8e12), ("RTX PRO 6000 Blackwell Max-Q", 438.9e12),
    # 170 and 84 x 512 x 2.407 and 2.617 GHz, which are also NVIDIA's 3,352 and 1,801 AI TOPS / 16
    ("RTX 5090", 209.5e12), ("RTX 5080", 112.6e12),
    ("RTX 6000 Ada", 364.2e12),  # its data sheet: 1,457 TFLOPS in sparse FP8, / 4
    ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
]
# Words that make another card of it, or a part of one, unless the entry has them too
OTHER_CARDS = {"laptop", "mobile", "max-q", "server", "d", "ti", "super", "mig"}


# What messages say where memory has run out
OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "can't allocate memory",
                 "CUDA driver error: device not ready",  # WSL2, pytorch issue 192330
                 "NVML_SUCCESS == ")  # an assertion of torch on parts of GPUs (MIG), pytorch issue 197312
# What torch's message says where CUDA cannot start though nvidia-smi lists GPUs, and what to do
CUDA_FAULTS = {
    "Error 802": "start the service that joins the GPUs: systemctl start nvidia-fabricmanager",
    "Error 803": "the driver was updated: restart the machine; if that changes nothing, unset LD_LIBRARY_PATH",
    "Error 804": "a container's CUDA libraries need a newer driver: update it, or unset LD_LIBRARY_PATH",
    "Error 999": "load the driver's module again: modprobe -r nvidia_uvm; modprobe nvidia_uvm; or restart the machine",
    "not compiled with CUDA": "start with bash run.sh, which makes an environment whose torch has CUDA",
}
GPU_DEVICE = "/dev/nvidia0"  # of NVIDIA's driver on Linux


def check_gpus() -> None:
    """Raise UserError if nvidia-smi lists GPUs, or fails, although torch sees none and CUDA_VISIBLE_DEVICES hides none.

    nvidia-smi that finds no devices is all right: a login node. A driver that is too old is named.
    """
    visible, why = os.environ.get("CUDA_VISIBLE_DEVICES"), ""
    hidden = visible is not None and re.match(r"\s*($|-|none|void|NoDevFiles)", visible, re.IGNORECASE)
    if hidden:
        return
    if not shutil.which("nvidia-smi"):
        if os.path.exists(GPU_DEVICE):
            raise UserError(f"there is a GPU ({GPU_DEVICE}), but torch {torch.__version__} finds none, and nvidia-smi "
                            f"is missing; repair driver or torch, or train on the CPU: --preset=tiny")
        return
    try:
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        listed = next((line for line in smi.stdout.splitlines() if line.startswith("GPU ")), "")
        failed = smi.returncode != 0 and "No devices" not in smi.stdout + smi.stderr
        if listed and (drivers := host.ask_nvidia_smi("driver_version")[0]):
            if fault := cards.driver_fault(drivers[0][0], torch.version.cuda or ""):
                raise UserError(f"{fault}, or train on the CPU: --preset=tiny")
        reason = listed and f"nvidia-smi lists {listed.split(' (')[0]}, but torch {torch.__version__} finds no GPU"
        if reason and visible:
            reason += f" with CUDA_VISIBLE_DEVICES={visible}"
            if not re.match(r"\s*(\d|GPU-|MIG-)", visible):
                raise UserError(f"{reason}, which names none; unset it, or give numbers such as 0,1")
        if failed:
            lines = [line for line in (smi.stdout + smi.stderr).splitlines() if not re.match(r"GPU |\s|$", line)]
            reason = f"the GPU does not answer (nvidia-smi: {(lines or [f'status {smi.returncode}'])[0]})"
        elif listed:
            why = cuda_fault()
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"the GPU does not answer (nvidia-smi: {error_line(error)})"
    if reason:
        raise UserError(f"{reason}{why or '; repair driver or torch'}, or train on the CPU: --preset=tiny")


def cuda_fault() -> str:
    """Return what torch says as CUDA does not start, and a remedy; "" where none is known."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        known = next((text for text in CUDA_FAULTS if text in str(error)), None)
        if known:
            line = error_line(error)
            return f" ({line[max(line.find('Error '), 0):]}); {CUDA_FAULTS[known]}"
    return ""


def check_capability(capability: tuple[int, int]) -> None:
    """Raise UserError if a GPU is too old to train."""
    if fault := cards.age_fault(capability):
        raise UserError(f"{fault}, or train on the CPU: CUDA_VISIBLE_DEVICES= and --preset=tiny")


def check_triton(capability: tuple[int, int]) -> None:
    """Raise UserError if Triton cannot compile for a GPU: neither our kernels nor torch.compile's would run.

    Its assembler is asked only about GPUs that were not known when this was written.
    """
    arch, known = 10 * capability[0] + capability[1], [card.capability for card in cards.CARDS]
    if capability in known and capability not in cards.NO_TRITON:
        return
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
        listed = subprocess.run([get_ptxas(arch).path, "--help"], capture_output=True, text=True, timeout=60).stdout
        fits = f"'{sm_arch_from_capability(arch)}'" in listed
    except Exception:  # no Triton, or another one than 3.6: nothing is known
        return
    if not fits:
        variable = "TRITON_PTXAS_BLACKWELL_PATH" if arch >= 100 else "TRITON_PTXAS_PATH"
        raise UserError(f"Triton {triton.__version__} cannot compile for this GPU's compute capability "
                        f"{cards.dotted(capability)}; set {variable} to the ptxas of a CUDA toolkit that knows it "
                        f"(CUDA 13 for 11.0), or train on another GPU")


def check_compiler() -> None:
    """Raise UserError if Triton cannot build C code for this Python, or not keep it: it would fail at our first kernel.

    run.sh sees to the compiler in the environment that it makes, but takes another Python as it is. Where Triton's
    usual cache cannot be used, it gets another one.
    """
    if not importlib.util.find_spec("triton"):
        return
    if fault := host.compiler_fault() or host.libcuda_fault():
        raise UserError(fault)
    if folder := host.triton_cache()[0]:
        os.environ["TRITON_CACHE_DIR"] = folder


# Bytes that stay free where GPU and host share their memory (DGX Spark): the machine freezes when all of it is in use.
# Copies of checkpoints that are being written (5 GB in d20) and all other programs need theirs from it too
SHARED_RESERVE = 8 * 10 ** 9


def gpu_memory(device: torch.device | int) -> tuple[int, int]:
    """Return the free and all bytes of a GPU's memory."""
    free, total = torch.cuda.mem_get_info(device)
    if getattr(torch.cuda.get_device_properties(device), "is_integrated", 0):  # newer versions of torch say
        free = max(free, min(host.free_memory() - SHARED_RESERVE, total))
    return free, total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means too little memory: torch's own, or that of a library which allocates by itself."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in OUT_OF_MEMORY)


def peak_of(name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a GPU of this name, or None if PEAK_BF16 has none for it."""
    name = name.lower()
    for key, flops in PEAK_BF16:
        key = key.lower()
        if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", name):
            return None if OTHER_CARDS & {*name.split()} - {*key.split()} else flops
    return None


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s, or None if it is not in the table (then no MFU is reported)."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory_gb(device: torch.device) -> float:
    """Return the largest memory in use so far, in GB: on a GPU as torch allocated it, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def card_name() -> str:
    """Return a short name of the first GPU for folders of results, such as h100 or rtx-5090; "cpu" without a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name(0).lower().replace("nvidia", "").replace("geforce", "").split()
    known = [word for word in words if re.fullmatch(r"(gb|[habl])\d+\w*", word)]
    return known[0] if known else "-".join(words)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what config.json says of machine and code: device, versions, git_commit, and `code`.

    `code` is a hash of train.py and nanofp8/*.py without REPORTS: a git commit does not show edits.
    """
    from importlib.metadata import PackageNotFoundError, version
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformer-engine", "dion", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = ""
    if shutil.which("git") and os.path.exists(os.path.join(PROJECT, ".git")):  # not a repository around this folder
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True,
                                    text=True, errors="replace", cwd=PROJECT, timeout=20).stdout.strip()
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"CPU ({platform.machine()}, {os.cpu_count()} cores)")
    code = hashlib.sha256()
    package = glob.glob(os.path.join(glob.escape(PROJECT), "nanofp8", "*.py"))
    package = [path for path in package if os.path.basename(path) not in REPORTS]
    for path in [os.path.join(PROJECT, "train.py"), *sorted(package)]:
        with open(path, "rb") as f:
            code.update(f.read())
    return dict(device=name, versions=versions, git_commit=commit or None, code=code.hexdigest()[:16])


class Clock:
    """Marks in time that do not stall the GPU: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return a mark of this moment in the GPU's queue of work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks. Waits until the GPU has reached the second one."""
        if not self.cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)

    def wait(self) -> None:
        """Wait until the GPU has done everything that was launched so far."""
        self.ms(self.mark(), self.mark())


def pause_garbage_collection(cleanup: contextlib.ExitStack) -> None:
    """Switch automatic garbage collection off until `cleanup` runs: it would delay ranks at different times."""
    gc.collect()
    gc.freeze()
    gc.disable()
    cleanup.callback(gc.unfreeze)
    cleanup.callback(gc.enable)


@contextlib.contextmanager
def profiling(folder: str, procs: Any, enabled: bool = True) -> Iterator[None]:
    """Profile what runs inside, and print its ten largest kernels; do nothing unless enabled.

    Rank 0 writes trace.json.gz and, on a GPU, memory.pickle (pytorch.org/memory_viz) to `folder`.
    """
    if not enabled:
        yield
        return
    cuda = procs.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    # acc_events: without it torch 2.11 warns of events that later profiles would clear
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        yield
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        if procs.is_main:
            torch.cuda.memory._dump_snapshot(os.path.join(folder, "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    if procs.is_main:
        trace = os.path.join(folder, "trace.json.gz")
        profile.export_chrome_trace(trace)
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        # Ranges that optimizers and modules put around their kernels ("#" in the name) would count them twice
        events = [e for e in profile.key_averages() if e.device_type == kind and "#" not in e.key]
        took = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}  # microseconds
        total, counts = sum(took.values()), {e.key: e.count for e in events}
        console(f"profile of one step: {total / 1000:.1f} ms of {'kernels' if cuda else 'operators'}; the ten largest:")
        for key in sorted(took, key=took.__getitem__, reverse=True)[:10]:
            console(f"  {took[key] / 1000:9.2f} ms {100 * took[key] / total:5.1f}%  x{counts[key]:<5} {key[:110]}")
        console(f"profile: {trace} (open it in ui.perfetto.dev)")
