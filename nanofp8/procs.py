"""Processes: rank, world size, device and mesh, set the same way for one process as for many; start and end of a script."""

import os
import sys
import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nanofp8.config import UserError, parse_flags
from nanofp8.faults import Heartbeat, connect_store, end_now


@dataclass
class Processes:
    """Where this process stands: its rank of world_size, its device, and the 1-D device mesh."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: object  # DeviceMesh over all ranks

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *args):
        if self.is_main:
            print(*args, flush=True)

    def sum(self, tensor):
        """Add a tensor up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value):
        """Rank 0's value of a small Python object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def start_processes():
    """Join torchrun's process group, or make a group of one: the rest of the script sees no difference."""
    env = os.environ
    rank, local_rank = int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0))
    world_size = int(env.get("WORLD_SIZE", 1))
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                            f"set NPROC to at most that", 2)
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if not dist.is_initialized():
        # gloo beside NCCL: objects and CPU tensors travel without touching the GPU's stream
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        store = dist.HashStore() if world_size == 1 else dist.PrefixStore("ranks", connect_store(rank))
        dist.init_process_group(backend, rank=rank, world_size=world_size, store=store,
                                device_id=device if use_cuda else None)
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("data",))
    return Processes(rank, local_rank, world_size, device, mesh)


def memory_remedy(error, cfg, procs):
    """What to do about an error, if it is for want of memory; else ""."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
        return ""
    less = [f"--batch_size={cfg.batch_size // 2}"] * (cfg.batch_size > 1) + ["--USE_AC_BLOCKS=True"] * (not getattr(cfg, "USE_AC_BLOCKS", True))
    return (f"rank {procs.rank} has too little {'GPU ' if procs.device.type == 'cuda' else ''}memory for this model and batch_size={cfg.batch_size}"
            + (f"; the same training takes less with {' or '.join(less)}" if less else ""))


def command_line(run, path, argv, presets, choices):
    """What a script does when it is started: parse flags, run(cfg, processes), and end wrong input with one line.

    Exit status: 0, or what the UserError says (1 or 2). Of several ranks, one that fails alone ends at once, and so do
    those that it leaves behind.
    """
    heartbeat, script = None, os.path.basename(path)

    def leave(text, status):
        if heartbeat:
            end_now(text, status)
        print(text, file=sys.stderr, flush=True)
        raise SystemExit(status)

    try:
        cfg = parse_flags(sys.argv[1:] if argv is None else argv, os.path.abspath(path), presets, choices)
        procs = start_processes()
        heartbeat = Heartbeat(procs, getattr(cfg, "rank_timeout", 120.0)) if procs.world_size > 1 else None
        return run(cfg, procs)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.one_rank:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        if heartbeat and error.one_rank:
            end_now("", error.status)
        raise SystemExit(error.status)
    except KeyboardInterrupt:  # before training, which takes it as a wish, or a second one
        leave(f"{script}: stopped by Ctrl-C", 130)
    except Exception as error:
        why = memory_remedy(error, cfg, procs)
        if not heartbeat and not why:
            raise
        if not why and isinstance(error, RuntimeError):
            for _ in range(10):  # a collective fails at once when a rank dies: a while later its silence says which
                time.sleep(1)
                if why := heartbeat.error_message(4):
                    break
        leave(f"{script}: error: {why}" if why else traceback.format_exc(), 1)
    finally:
        if heartbeat:
            heartbeat.close()
        if dist.is_initialized():
            dist.destroy_process_group()
