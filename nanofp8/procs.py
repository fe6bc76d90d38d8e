"""Start and end a script; give it rank, world size, device and mesh. One process works like many."""

import datetime
import errno
import glob
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanofp8.config import UserError, exit_with, print_any_text, raise_on_ctrl_c
from nanofp8.faults import Heartbeat, exit_now
from nanofp8.files import FOLDER_FAULTS, console, error_line, first_line
from nanofp8.host import interface_to, shared_memory_fault, triton_folder
from nanofp8.machine import is_out_of_memory

# What an exception's message may say, and what to do
GPU_FAULTS = {
    "uncorrectable ECC": "the GPU's memory has a fault: see `nvidia-smi -q -d ECC`, restart the machine, or choose "
                         "another GPU with CUDA_VISIBLE_DEVICES",
    "GPU is lost": "restart the machine; `dmesg` has the driver's error (Xid)",
    "SUBLIBRARY_VERSION_MISMATCH": "parts of two versions of cuDNN are loaded: unset LD_LIBRARY_PATH, CUDNN_HOME and "
                                   "CUDNN_PATH",
    "launch timed out": "a GPU that drives a display stops long kernels: use one without, or switch the display off",
}
# Words of messages in which a library of another version than torch's may speak, if LD_LIBRARY_PATH names it
LIBRARY_FAULTS = ("CUBLAS_STATUS_INVALID_VALUE", "CUBLAS_STATUS_NOT_INITIALIZED", "CUBLAS_STATUS_NOT_SUPPORTED",
                  "CUDNN_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_SUPPORTED", "NVRTC_ERROR_", "nvrtc: error")
# Of files that several processes write and delete on a network file system (triton issue 11512)
SHARED_CACHE_FAULTS = (errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY)
KERNEL_FLAGS = {"flash_attn": "--attention=cudnn", "quack": "--USE_QUACK=False"}  # by packages that a flag leaves out


@dataclass
class Processes:
    """This process among all: its rank of world_size, its device, and the 1-D mesh over all ranks."""

    rank: int
    local_rank: int  # rank on this machine
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def print(self, *args: object) -> None:
        """Print on rank 0."""
        if self.is_main:
            console(*args)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value of a small Python object on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list:
        """Return all ranks' values of a small Python object, by rank."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values


def connect_store(rank: int | None = None) -> dist.Store:
    """Connect to the ranks' common store at MASTER_ADDR:MASTER_PORT. torchrun holds it; without torchrun, rank 0 does.

    torchrun's store outlives the processes, so keys carry the number of the restart: restarted processes must not find
    the addresses of those before them.
    """
    env = os.environ
    held_by_torchrun = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=rank == 0 and not held_by_torchrun,
                          wait_for_workers=False, timeout=datetime.timedelta(minutes=10))
    return dist.PrefixStore(f"start_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def start_processes() -> Processes:
    """Join torchrun's process group, or make a group of one: the rest of a script sees no difference.

    Raises: UserError if torchrun's variables are wrong, if this machine has fewer GPUs than processes, if a GPU cannot
    be used, or if the ranks cannot connect.
    """
    rank, local_rank, world_size = read_ranks()
    use_cuda = torch.cuda.is_available()
    local_size = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun sets it
    local_size = int(local_size) if local_size.isdecimal() else 1
    if use_cuda and torch.version.hip:
        raise UserError(f"torch {torch.__version__} is built for AMD's GPUs, on which this training has never run; "
                        f"train on an NVIDIA GPU, or on the CPU: HIP_VISIBLE_DEVICES=-1 and --preset=tiny")
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                            f"set NPROC to at most that", 2, one_rank=True)
        try:
            torch.cuda.set_device(local_rank)
            first_allocation()
        except RuntimeError as error:
            remedy = "see nvidia-smi, and choose another with CUDA_VISIBLE_DEVICES"
            if "CUDA driver error" in str(error):
                remedy = "if it is a virtual GPU, export PYTORCH_ALLOC_CONF=expandable_segments:False"
            raise UserError(f"GPU {local_rank} cannot be used: {first_line(error)}; {remedy}",
                            one_rank=True) from None
        fault = shared_memory_fault(local_size)
        if fault and local_rank == 0:  # before NCCL starts: if it fails, the reason is on the screen
            console(f"warning: {fault}")
    if world_size == 1 and (tasks := tasks_of_launcher()) > 1:
        console(f"warning: one of {tasks} tasks of srun or mpirun, but this process works alone; for one training on "
                f"all their GPUs start `bash run.sh` once per machine (docs/several_gpus.md)")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if not dist.is_initialized():
        if world_size > local_size and (interface := interface_to(os.environ["MASTER_ADDR"])):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # gloo beside NCCL: objects and CPU tensors travel without touching the GPU's stream
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        try:
            store = dist.HashStore() if world_size == 1 else dist.PrefixStore("ranks", connect_store(rank))
            dist.init_process_group(backend, rank=rank, world_size=world_size, store=store,
                                    device_id=device if use_cuda and world_size > 1 else None)  # it starts NCCL now
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"rank {rank} cannot connect to the others at {where} ({error_line(error)}); "
                            f"check MASTER_ADDR, or choose another MASTER_PORT", one_rank=True) from None
        except RuntimeError as error:  # gloo's and NCCL's
            raise UserError(f"rank {rank} cannot connect to the others ({error_line(error)}); "
                            f"{connection_remedy(error, world_size > local_size)}", one_rank=True) from None
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("data",))
    return Processes(rank, local_rank, world_size, device, mesh)


def first_allocation() -> None:
    """Allocate on the current GPU: drivers of some virtual GPUs refuse expandable segments, which host.start_torch()
    has asked for."""
    torch.empty(1, device="cuda")


def tasks_of_launcher() -> int:
    """Return how many tasks srun or mpirun started, this one among them; 0 if neither did."""
    values = [os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    return max((int(value) for value in values if value.isdecimal()), default=0)


def connection_remedy(error: RuntimeError, several_machines: bool) -> str:
    """Return what to do if gloo or NCCL cannot connect the ranks."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if "Unable to find" in str(error) and named:  # gloo's words, here and below
        return f"GLOO_SOCKET_IFNAME={named}: correct it, or unset it"
    if several_machines:
        return "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface between the machines"
    if "Unable to find" in str(error):
        return "no network interface is up, not even lo, which one process needs too; run: ip link set lo up"
    return "with NCCL_DEBUG=INFO, NCCL says more"


def read_ranks() -> tuple[int, int, int]:
    """Return rank, local rank and world size from torchrun's variables (0, 0 and 1 without them). Raises UserError."""
    values = {}
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{name} must be a number, got '{text}'; start with torchrun, or unset it", 2,
                            one_rank=True)
        values[name] = int(text)
    rank, local_rank, world_size = values.values()
    if rank >= world_size:
        raise UserError(f"RANK={rank} needs a WORLD_SIZE above it, got {world_size}; start with torchrun, "
                        f"or unset both", 2, one_rank=True)
    if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"WORLD_SIZE={world_size} needs MASTER_ADDR and MASTER_PORT; start with torchrun, "
                        f"or unset WORLD_SIZE", 2)
    return rank, local_rank, world_size


def report_good_end(procs: Processes) -> None:
    """Leave the file that run.sh looks for: after a signal torchrun returns 1, whatever its workers return."""
    if procs.local_rank == 0 and "ENDED_WELL" in os.environ:
        try:
            with open(os.environ["ENDED_WELL"], "w"):
                pass
        except OSError as error:  # somebody has emptied /tmp: only the exit status after a signal depends on it
            console(f"cannot write {os.environ['ENDED_WELL']} ({error_line(error)})")


def memory_error_message(error: BaseException, procs: Processes, cfg: SimpleNamespace, flags: Sequence[str]) -> str:
    """Return the error line if this exception means too little memory, or too few threads allowed, else "".

    flags: names of those that can save memory: numbers when halved, switches when True.
    """
    if "can't start new thread" in str(error):
        return f"rank {procs.rank} cannot start a thread; raise the limits that `ulimit -u` and `ulimit -v` show"
    if not isinstance(error, MemoryError) and not is_out_of_memory(error):
        return ""
    what = "GPU memory" if procs.device.type == "cuda" else "memory"
    values = {name: getattr(cfg, name) for name in flags}
    remedies = [f"--{name}={value // 2 if value > 1 else True}" for name, value in values.items()
                if value > 1 or value is False]
    advice = f"; the same training takes less with {' or '.join(remedies)}" if remedies else ""
    return f"rank {procs.rank} has too little {what} for this model and micro-batch{advice}"


def environment_fault(error: BaseException) -> str:
    """Return the error line if an exception is the fault of the GPU, a folder or a package of kernels, else ""."""
    message, kind = error_line(error), type(error).__name__
    if remedy := next((remedy for text, remedy in GPU_FAULTS.items() if text in str(error)), ""):
        return f"{message}; {remedy}"
    if any(text in str(error) for text in LIBRARY_FAULTS) and (folder := folder_of_cuda()):
        return (f"{message}; LD_LIBRARY_PATH names {folder}, which may hold another version of CUDA's libraries than "
                f"torch's: unset it")
    inner = error  # torch.compile wraps what it meets
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno in FOLDER_FAULTS:
            return (f"{inner}; make room there, or choose another folder: --out_dir, TRITON_CACHE_DIR, "
                    f"TORCHINDUCTOR_CACHE_DIR")
        inner = inner.__cause__ or inner.__context__
    frames = list(traceback.walk_tb(error.__traceback__))
    packages = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames}
    if isinstance(error, OSError) and error.errno in SHARED_CACHE_FAULTS and in_triton_cache(error.filename):
        return (f"another process changed Triton's cache ({error}); start again, or set TRITON_CACHE_DIR to a folder "
                f"on a local disk")
    if "triton" in packages and (isinstance(error, json.JSONDecodeError) or "kernel image is invalid" in message):
        return f"a file in Triton's cache is damaged ({message}); delete the cache: rm -r {triton_folder()}"
    if flag := next((flag for package, flag in KERNEL_FLAGS.items() if package in packages), ""):
        if not message.startswith("CUDA error"):  # which may have happened in an earlier kernel
            frame, line = frames[-1]
            where = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
            return f"a kernel's package fails here ({kind}: {message}, {where}:{line}); use {flag}"
    return ""


def in_triton_cache(path: Any) -> bool:
    """Whether the file that an OSError names lies in Triton's cache."""
    folder = os.path.join(os.path.abspath(triton_folder()), "")
    return isinstance(path, (str, bytes)) and os.path.abspath(os.fsdecode(path)).startswith(folder)


def folder_of_cuda() -> str:
    """Return the first folder on LD_LIBRARY_PATH that holds one of the libraries of LIBRARY_FAULTS, or ""."""
    names = [f"lib{name}*.so*" for name in ("cublas", "cudnn", "nvrtc")]
    return next((folder for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
                 if any(glob.glob(os.path.join(glob.escape(folder), name)) for name in names)), "")


def command_line(run: Callable[[SimpleNamespace, Processes], Any],
                 read_flags: Callable[[Sequence[str]], SimpleNamespace], path: str, argv: Sequence[str] | None = None,
                 memory_flags: Sequence[str] = ()) -> Any:
    """Run a script: read its flags, join the process group, return run(cfg, procs); report a failure as one line.

    Exit status: 0, or what the UserError says (1 or 2). Of several ranks, one that fails alone exits at once, and so do
    those that it leaves behind.

    Args:
        run: the script's work.
        read_flags: turns command-line arguments into flags; the flags include rank_timeout.
        path: the script's file.
        argv: arguments (default: the program's own).
        memory_flags: names of flags that can save memory, for memory_error_message().
    """
    heartbeat, cfg, procs, script = None, None, None, os.path.basename(path)

    def leave(text: str, status: int) -> None:
        if heartbeat:
            exit_now(text, status)
        print(text, file=sys.stderr, flush=True)
        raise SystemExit(status)

    print_any_text()
    try:
        raise_on_ctrl_c()
        cfg = read_flags(sys.argv[1:] if argv is None else argv)
        procs = start_processes()
        if procs.world_size > 1:
            heartbeat = Heartbeat(connect_store(), procs.rank, procs.world_size, cfg.rank_timeout)
        return run(cfg, procs)
    except UserError as error:
        if heartbeat and error.one_rank:
            exit_now(f"{script}: error: {error}", error.status)
        try:
            exit_with(error, script)
        finally:
            if heartbeat and argv is None:  # Python's own exit may abort in gloo's threads (pytorch issue 190489)
                if procs.rank and not heartbeat.leaves_within(0, 5):  # it has not met this error, and waits
                    exit_now(f"{script}: error: rank {procs.rank}: {error}", error.status)
                heartbeat.close()
                exit_now("", error.status)
    except KeyboardInterrupt:  # before training, which takes it as a request to stop, or a second one
        leave(f"{script}: stopped by Ctrl-C", 130)
    except Exception as error:
        why = (memory_error_message(error, procs, cfg, memory_flags) if procs else "") or environment_fault(error)
        if not heartbeat and not why:
            raise
        if not why and isinstance(error, RuntimeError):
            for _ in range(10):  # a collective fails as soon as a rank dies; a little later its silence tells which
                time.sleep(1)
                if why := heartbeat.error_message(4):
                    break
        leave(f"{script}: error: {why}" if why else traceback.format_exc(), 1)
    finally:
        if heartbeat:
            heartbeat.close()
        if dist.is_initialized():
            dist.destroy_process_group()
