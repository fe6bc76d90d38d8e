"""
Train a GPT in FP8 (or NVFP4) with NVIDIA Transformer Engine. One file, read it top to bottom.

    bash run.sh                                   # set up, then train: d20 with a GPU, tiny without
    bash run.sh --USE_FP8=False                   # any flag below can be set as --name=value
    python train.py --preset=tiny --max_iters=20  # one process, the python you are in
    torchrun --standalone --nproc_per_node=8 train.py --total_batch_size=524288
    python train.py --help                        # all flags with their defaults

The model is nanochat's d20 shape: 561M parameters, RoPE, RMSNorm, QK norm, relu^2, logit softcap.
Hidden weights learn by Muon (Microsoft's Dion library), embedding, head and gains by AdamW.
"""

import ast
import contextlib
import datetime
import difflib
import fcntl
import fnmatch
import functools
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch starts

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException  # DCP's own, which is no Exception
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: the plain versions serve
    triton = None

# =====================================================================================================
# Flags. Edit here, or give --name=value. Values here are those of preset "d20"; a flag that is edited
# or given on the command line beats the preset.

# The run
preset = "auto"                  # "auto" (d20 with a GPU, tiny without), "d20", "d12", "tiny"
run_name = "gpt"                 # the run folder is out_dir/run_name; a name already taken gets a number
out_dir = "out"                  # where run folders go
resume = ""                      # "auto": go on from this run_name's newest checkpoint, if any; or the path of a checkpoint or run
seed = 1337                      # initialisation (and stochastic rounding); the data order has no seed

# Data
dataset = "fineweb10B"           # folder below data_dir: fineweb10B, openwebtext-100k, openwebtext-1M, shakespeare
data_dir = "data"                # relative to this file unless absolute

# Model
n_layer = 20                     # transformer blocks
n_embd = 1280                    # width
n_head = 10                      # attention heads; n_embd / n_head is the head size
vocab_size = 65536               # rows of embedding and head; GPT-2's BPE uses the first 50,257
block_size = 2048                # tokens per sequence
rope_base = 10000.0              # base of the rotary frequencies
norm_eps = 1e-6                  # epsilon of every RMSNorm
logit_softcap = 15.0             # logits = softcap * tanh(logits / softcap); 0 switches it off

# Batch and schedule, in optimizer steps
total_batch_size = 524288        # tokens per optimizer step, over all ranks and micro-batches
batch_size = 16                  # sequences per micro-batch and rank
max_iters = 1700                 # optimizer steps; 1700 x 524,288 tokens are 9 FineWeb shards once
warmup_iters = 100               # linear warm-up of all learning rates
min_lr_ratio = 0.1               # the cosine ends at this fraction of each learning rate

# Optimizers: Muon for the matrices in the blocks, AdamW for the rest
learning_rate = 0.02             # Muon; each update is also scaled by sqrt(fan_out / fan_in)
learning_rate_embed = 0.3        # AdamW, token embedding
learning_rate_head = 0.004       # AdamW, output head
learning_rate_gain = 0.004       # AdamW, RMSNorm gains
weight_decay = 0.1               # Muon; decoupled, times the learning rate
weight_decay_embed = 0.0         # AdamW, token embedding
weight_decay_head = 0.0          # AdamW, output head
weight_decay_gain = 0.0          # AdamW, RMSNorm gains
adam_beta1 = 0.8                 # AdamW
adam_beta2 = 0.95                # AdamW
adam_eps = 1e-10                 # AdamW
muon_momentum_start = 0.85       # Muon momentum at step 0 ...
muon_momentum = 0.95             # ... and from step muon_momentum_iters on
muon_momentum_iters = 300        # steps of the linear momentum warm-up
muon_impl = "auto"               # "auto" (dion where it can run, else torch), "dion", "torch"
grad_clip = 1.0                  # largest global gradient norm; 0 only measures it
USE_8BIT_ADAM = False            # bitsandbytes AdamW8bit for embedding and head (one GPU, unsharded)

# Precision
USE_FP8 = True                   # matmuls of blocks (and head, below) in FP8; False: bf16
FP8_RECIPE = "delayed"           # "delayed", "current", "block", "mxfp8"
FP8_MARGIN = 0                   # delayed: scale = fp8_max / amax / 2^margin
FP8_AMAX_HISTORY = 1024          # delayed: micro-batches over which the largest amax counts
FP8_CALIBRATION_STEPS = 3        # delayed: first steps preceded by a pass that only fills the amax history; at least 1
USE_FP8_HEAD = True              # with USE_FP8, the output head's matmuls in FP8 too, by current scaling whatever the recipe
USE_NVFP4 = False                # block matmuls in NVFP4 (takes the place of FP8)
NVFP4_HADAMARD = True            # NVFP4: random Hadamard transform of what goes into weight gradients
NVFP4_STOCHASTIC_ROUNDING = True # NVFP4: round gradients up or down at random, without bias
NVFP4_2D_WEIGHTS = True          # NVFP4: one scale for each 16 x 16 of a weight; False: each 1 x 16
HIGH_PRECISION_LAYERS = ""       # layers that stay in bf16: names or patterns, with commas: "blocks.0,blocks.*.attn.proj"
EVAL_PRECISION = "bf16"          # matmuls of evaluations: "bf16", or "training": in the format of training; at the end both are made
FP8_STATS_INTERVAL = 0           # steps between statistics of what quantizing does to each tensor; 0: none (fp8_stats.py)
USE_EMULATION = "auto"           # "auto" (only where TE or the hardware is missing), True: te_emulation.py always (not for the head)

# Parallelism
USE_FSDP2 = "auto"               # shard parameters, gradients and optimizer state over the ranks
USE_DDP = "auto"                 # replicate them; "auto" for both: none on one rank, DDP where it fits, else FSDP2
FSDP2_RESHARD = False            # FSDP2: free a block's gathered weights after its forward pass (saves memory)
REDUCE_FP32 = True               # add gradients up over ranks in fp32; False: bf16

# Speed and memory
USE_TRITON = True                # on a GPU, blocks in bf16 or delayed FP8 run as our own Triton kernels around the matmuls (the loss does always)
USE_CUDA_GRAPHS = True           # on one GPU, launch these kernels' micro-batches as CUDA graphs, from the fourth step on
USE_COMPILE = "auto"             # torch.compile for emulated formats, and norms and RoPE without those kernels; "auto": with a GPU; True: Dion's update too
USE_AC_LM_HEAD = False           # recompute logits in the backward pass; False: form their gradients in the forward pass
USE_AC_BLOCKS = False            # recompute each block in the backward pass
USE_AC_ATTENTION = False         # recompute RoPE, QK norm and attention in the backward pass
loss_chunk_size = 8192           # tokens whose logits exist at once
USE_PROFILE = False              # profile the sixth step: trace and memory snapshot to the run folder, largest kernels printed

# Evaluation, logging, checkpoints
eval_interval = 125              # steps between evaluations; 0: only at the end
eval_tokens = 10485760           # tokens of the val shards per evaluation (all of them where there are fewer)
log_interval = 1                 # steps between log lines
ckpt_interval = 250              # steps between checkpoints; 0: only at the end (and on SIGTERM or SIGINT)
ckpt_minutes = 0.0               # another whenever the last one is so many minutes old; 0: never for that
keep_checkpoints = 2             # the newest so many stay; 0: none is written
USE_WANDB = False                # log to Weights & Biases too
wandb_project = "nanogpt-fp8"    # its project name

# Faults. A step whose loss or gradient is not finite is always skipped
max_bad_steps = 10               # so many skipped steps in a row end the run
skip_loss_zscore = 0.0           # skip steps whose loss lies so many standard deviations above the recent mean; 0: off
skip_grad_zscore = 0.0           # the same for the gradient's norm
zscore_window = 128              # recent: over the last so many steps that were taken (none is judged before there are so many)
rank_timeout = 120.0             # seconds without a sign of life after which a rank counts as dead, and the others end

# End of flags
# =====================================================================================================

# Preset d20 repeats the defaults above: by them an edited flag is told from an untouched one.
PRESETS = {
    "d20": dict(
        dataset="fineweb10B", n_layer=20, n_embd=1280, n_head=10, vocab_size=65536, block_size=2048,
        total_batch_size=524288, batch_size=16, max_iters=1700, warmup_iters=100, loss_chunk_size=8192,
        muon_momentum_iters=300, eval_interval=125, eval_tokens=10485760, learning_rate_head=0.004,
    ),
    "d12": dict(n_layer=12, n_embd=768, n_head=6, batch_size=32),
    "tiny": dict(
        dataset="shakespeare", n_layer=4, n_embd=128, n_head=2, vocab_size=50304, block_size=128,
        total_batch_size=2048, batch_size=8, max_iters=60, warmup_iters=5, loss_chunk_size=64,
        muon_momentum_iters=60, eval_interval=20, eval_tokens=16384, learning_rate_head=0.01,
    ),
}

CHOICES = {
    "preset": ("auto", *PRESETS),
    "FP8_RECIPE": ("delayed", "current", "block", "mxfp8"),
    "muon_impl": ("auto", "dion", "torch"),
    "EVAL_PRECISION": ("bf16", "training"),
    "USE_EMULATION": ("auto", True),
}

EOT = 50256  # GPT-2's <|endoftext|>, put before each document


class UserError(Exception):
    """Wrong input: command_line() prints its one line and exits with `status`, without a traceback."""

    def __init__(self, message, status=1, one_rank=False):
        super().__init__(message)
        self.status, self.one_rank = status, one_rank  # one_rank: the other ranks may not have met it


# -----------------------------------------------------------------------------------------------------
# Reading the flags


WHOLE_NUMBERS = set("""seed n_layer n_embd n_head vocab_size block_size total_batch_size batch_size max_iters warmup_iters
    muon_momentum_iters FP8_MARGIN FP8_AMAX_HISTORY FP8_CALIBRATION_STEPS FP8_STATS_INTERVAL loss_chunk_size eval_interval eval_tokens
    log_interval ckpt_interval keep_checkpoints max_bad_steps zscore_window""".split())
TEXTS = set("preset run_name out_dir resume dataset data_dir muon_impl FP8_RECIPE EVAL_PRECISION HIGH_PRECISION_LAYERS wandb_project".split())
OR_AUTO = set("USE_FSDP2 USE_DDP USE_COMPILE USE_EMULATION".split())
SWITCHES = re.compile(r"USE_|FSDP2_|REDUCE_|NVFP4_")  # True or False; the other flags of this file take any number


def read_flag_table(path):
    """The flags of a script: {name: (default, comment, group)}, read from its source text.

    A flag is a line `name = value  # comment` between the headings "# Flags" and "# End of flags";
    a comment line on its own opens a group. Raises UserError if a value is none.
    """
    table, group, inside = {}, "", False
    for line in open(path, encoding="utf-8"):
        if line.startswith("# End of flags"):
            break
        if line.startswith("# Flags"):
            inside = True
        elif inside and (m := re.match(r"(\w+) = (.+?)(?:\s+# (.*))?$", line)):
            try:
                value = eval(m[2], {"__builtins__": {}})  # this file's own text: 2**19 or 2 * 1700 may stand there
            except Exception:
                raise UserError(f"{os.path.basename(path)}: the value of flag {m[1]} cannot be read: {m[2]}", 2)
            table[m[1]] = (parse_value(m[1], repr(value) if not isinstance(value, str) else value, value), m[3] or "", group)
        elif inside and (m := re.match(r"# (\w.*)", line)):
            group = m[1]
    return table


def parse_value(name, text, default):
    """Turn the text of --name=text into a value of the flag's type; raises UserError.

    The type goes by the name, since defaults are edited (USE_FSDP2 = True still takes "auto"); that of a flag which is in none of
    the lists above goes by its default.
    """
    try:
        value = ast.literal_eval(text)
        float(value) if isinstance(value, int) else 0  # a number of 400 digits is none
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name in OR_AUTO:
        kind, ok = "auto, True or False", value == "auto" or isinstance(value, bool)
    elif name in TEXTS or isinstance(default, str) and not (SWITCHES.match(name) or name in WHOLE_NUMBERS):
        kind, ok, value = "text", True, text
    elif SWITCHES.match(name) or isinstance(default, bool):
        kind, ok = "True or False", isinstance(value, bool)
    elif name in WHOLE_NUMBERS:
        kind, ok = "a whole number", number and isinstance(value, int)
    else:
        kind, ok, value = "a number", number, float(value) if number and isinstance(default, float) else value
    if not ok:
        raise UserError(f"--{name} takes {kind}, not '{text}'", 2)
    return value


def parse_flags(argv, path, presets=PRESETS, choices=CHOICES, has_gpu=None):
    """Resolve defaults, preset and command line into one namespace of flags.

    Args:
        argv: command line without the program name, `--name=value` each.
        path: script whose flag section holds names, defaults and comments.
        presets: {preset: {flag: value}}; a flag set on the command line or edited in the file beats it.
        choices: {flag: allowed values}.
        has_gpu: what preset "auto" goes by (default: torch.cuda.is_available()).
    Returns: SimpleNamespace with one attribute per flag, and `explicit`, the names that were given.
    Raises: UserError (status 2) naming the nearest flag, or what the value should be.
    """
    table = read_flag_table(path)
    if any(a in ("--help", "-h") for a in argv):
        print(format_help(path, table))
        raise SystemExit(0)
    given = {}
    for arg in argv:
        m = re.fullmatch(r"--([\w-]+)=(.*)", arg, re.S)
        if not m:
            hint = f"--{arg.lstrip('-').split('=')[0]}=value" if arg.startswith("-") else "--name=value"
            raise UserError(f"'{arg}' is no flag; flags are written {hint} (--help lists them)", 2)
        name, text = m.groups()
        if name not in table:
            by_lower = {n.lower(): n for n in table}
            near = difflib.get_close_matches(name.lower().replace("-", "_"), by_lower, 1, 0.0)[0]
            raise UserError(f"no flag --{name}; the nearest is --{by_lower[near]} (--help lists all)", 2)
        given[name] = parse_value(name, text, table[name][0])
    flags = {name: default for name, (default, _, _) in table.items()}
    if presets:
        chosen = given.get("preset", flags["preset"])
        if chosen == "auto":
            has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
            chosen = "d20" if has_gpu else "tiny"
        if chosen not in presets:
            raise UserError(f"--preset is one of {', '.join(choices['preset'])}, not '{chosen}'", 2)
        edited = {name for name, released in presets["d20"].items() if flags[name] != released}
        flags.update({k: v for k, v in presets[chosen].items() if k not in edited})
        flags["preset"] = given["preset"] = chosen
    flags.update(given)
    for name, allowed in choices.items():
        if name in flags and flags[name] not in allowed:
            raise UserError(f"--{name} is one of {', '.join(map(str, allowed))}, not '{flags[name]}'", 2)
    return SimpleNamespace(**flags, explicit=sorted(given))


def format_help(path, table):
    """The text of --help: the script's docstring, then every flag with default and comment."""
    lines = [ast.get_docstring(ast.parse(open(path, encoding="utf-8").read())), ""]
    last = None
    for name, (default, comment, group) in table.items():
        if group != last:
            lines += ["", group]
            last = group
        lines.append(f"  {f'--{name}={default}':<34} {comment}")
    return "\n".join(lines)


def check_flags(cfg, world_size):
    """Refuse values that cannot work, each in one line with the remedy. Raises UserError (status 2)."""
    positive = ("n_layer n_embd n_head vocab_size block_size total_batch_size batch_size max_iters "
                "loss_chunk_size eval_tokens log_interval FP8_AMAX_HISTORY norm_eps rope_base adam_eps max_bad_steps zscore_window "
                "rank_timeout FP8_CALIBRATION_STEPS").split()
    not_negative = ("warmup_iters ckpt_interval ckpt_minutes keep_checkpoints skip_loss_zscore skip_grad_zscore eval_interval grad_clip "
                    "logit_softcap min_lr_ratio muon_momentum_iters FP8_STATS_INTERVAL "
                    "learning_rate learning_rate_embed learning_rate_head "
                    "learning_rate_gain weight_decay weight_decay_embed weight_decay_head weight_decay_gain").split()
    for name in positive + not_negative:
        if isinstance(getattr(cfg, name, 0), str):  # edited in the file
            raise UserError(f"--{name} takes a number, not '{getattr(cfg, name)}'", 2)
    for name in positive:
        if hasattr(cfg, name) and getattr(cfg, name) <= 0:
            raise UserError(f"--{name} must be above 0, not {getattr(cfg, name)}", 2)
    for name in not_negative:
        if hasattr(cfg, name) and getattr(cfg, name) < 0:
            raise UserError(f"--{name} must not be negative, but is {getattr(cfg, name)}", 2)
    if getattr(cfg, "zscore_window", 1) > 1_000_000:
        raise UserError(f"--zscore_window must be at most 1,000,000 steps, not {cfg.zscore_window}", 2)
    if getattr(cfg, "rank_timeout", 5) < 5:
        raise UserError(f"--rank_timeout must be at least 5 (signs of life come every second), not {cfg.rank_timeout}", 2)
    for name in ("muon_momentum_start", "muon_momentum", "adam_beta1", "adam_beta2"):
        if hasattr(cfg, name) and not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, not {getattr(cfg, name)}", 2)
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"--seed must be from 0 to 2^32 - 1, not {cfg.seed}", 2)
    if cfg.n_embd % cfg.n_head or cfg.n_embd // cfg.n_head % 2:
        raise UserError(f"n_embd={cfg.n_embd} over n_head={cfg.n_head} heads must give an even head size: "
                        f"use --n_head={max(1, cfg.n_embd // 128)}", 2)
    micro = world_size * cfg.batch_size * cfg.block_size
    if cfg.total_batch_size % micro:
        nearest = max(1, round(cfg.total_batch_size / micro)) * micro
        raise UserError(
            f"total_batch_size={cfg.total_batch_size} is no multiple of ranks x batch_size x block_size = "
            f"{world_size} x {cfg.batch_size} x {cfg.block_size} = {micro}; the nearest is --total_batch_size={nearest}", 2)
    if os.path.basename(cfg.run_name) != cfg.run_name or cfg.run_name in ("", ".", ".."):
        raise UserError(f"--run_name is a folder name without slashes, not '{cfg.run_name}'", 2)
    if getattr(cfg, "FP8_STATS_INTERVAL", 0) and not (cfg.USE_FP8 or cfg.USE_NVFP4):
        raise UserError("FP8_STATS_INTERVAL has nothing to look at in a bf16 run: set USE_FP8 or USE_NVFP4, or leave it at 0", 2)


# =====================================================================================================
# Processes: rank, world size, device and mesh, set the same way for one process as for many


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


def connect_store(rank=None):
    """A connection to the ranks' common store at MASTER_ADDR:MASTER_PORT, which torchrun holds, or rank 0 where there is none.

    torchrun's outlives the processes: after a restart they must not find the addresses of those before.
    """
    env = os.environ
    held = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=rank == 0 and not held, wait_for_workers=False,
                          timeout=datetime.timedelta(minutes=10))
    return dist.PrefixStore(f"start_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


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


# =====================================================================================================
# Data: token shards, read as one ring

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256


def open_shard(path):
    """Memory-map the tokens of one shard (256 int32 of header, then uint16 tokens).

    Returns: np.memmap of uint16, shape (tokens,).
    Raises: UserError naming the file and the remedy if it is empty, truncated or of another format.
    """
    remedy = "delete it and fetch or build it again (data/README.md)"
    try:
        with open(path, "rb"):
            size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}")
    if size < 4 * HEADER_INTS:
        raise UserError(f"{path} holds {size} bytes, less than a shard's header of {4 * HEADER_INTS}: {remedy}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header[0] != SHARD_MAGIC:
        raise UserError(f"{path} is no token shard (magic number {header[0]}, not {SHARD_MAGIC}): {remedy}")
    if header[1] != SHARD_VERSION:
        raise UserError(f"{path} is a shard of version {header[1]}, this script reads version {SHARD_VERSION}: {remedy}")
    tokens, expected = int(header[2]), 4 * HEADER_INTS + 2 * int(header[2])
    if size != expected:
        raise UserError(f"{path} holds {size} bytes where its header's {tokens} tokens take {expected}: {remedy}")
    if tokens == 0:
        raise UserError(f"{path} holds no tokens: {remedy}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(tokens,))


class TokenRing:
    """All shards of a split end to end, read as a ring: position p is token p modulo the total."""

    def __init__(self, data_dir, dataset, split, vocab_size, need_tokens):
        folder = os.path.join(data_dir, dataset)
        self.paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.bin")))
        if not self.paths:
            bring = {"fineweb10B": "python data/cachedfineweb10b.py 9",
                     "shakespeare": "python data/shakespeare/prepare.py"}.get(dataset, f"python data/{dataset}/prepare.py")
            raise UserError(f"no {split} shards ({folder}/*_{split}_*.bin): bring them with `{bring}`, "
                            f"or name another --dataset or --data_dir")
        self.shards = [open_shard(p) for p in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self.total, self.vocab_size = int(self.starts[-1]), vocab_size
        if self.total < need_tokens:
            raise UserError(f"the {split} shards {folder}/*_{split}_*.bin hold {self.total} tokens, fewer than the "
                            f"{need_tokens} wanted at once: lower --total_batch_size or --block_size, or bring more shards")

    def read(self, start, count):
        """Tokens start ... start+count-1 of the ring as int32, shape (count,).

        Raises UserError naming the shard if a token id is not below vocab_size.
        """
        out, filled = np.empty(count, dtype=np.int32), 0
        while filled < count:
            position = (start + filled) % self.total
            i = int(np.searchsorted(self.starts, position, side="right")) - 1
            offset = position - int(self.starts[i])
            piece = self.shards[i][offset:offset + count - filled]
            if int(piece.max()) >= self.vocab_size:
                raise UserError(f"{self.paths[i]} holds token id {int(piece.max())}, but vocab_size is {self.vocab_size}: "
                                f"raise --vocab_size, or tokenize again with GPT-2's BPE", one_rank=True)
            out[filled:filled + len(piece)] = piece
            filled += len(piece)
        return out


class DataLoader:
    """Micro-batches of this rank in the order of the ring, made ahead of time by a thread.

    Optimizer step k reads tokens k*G to (k+1)*G of the ring, and one more as the last target, with
    G = total_batch_size. Micro-batch m of rank r starts at k*G + (m*world_size + r)*B*T, so a step reads
    the same tokens for any number of ranks and any micro-batch size.
    """

    def __init__(self, ring, cfg, procs, depth=4):
        self.ring, self.batch_size, self.block_size, self.device = ring, cfg.batch_size, cfg.block_size, procs.device
        self.rank, self.world_size, self.step_tokens = procs.rank, procs.world_size, cfg.total_batch_size
        self.micro_tokens = self.batch_size * self.block_size
        self.accumulation = self.step_tokens // (self.micro_tokens * self.world_size)
        # Turns a micro-batch's summed loss into its share of the step's mean: DDP and FSDP2 average over ranks themselves
        self.loss_scale = 1.0 / (self.accumulation * self.micro_tokens)
        self.depth, self.thread, self.index = depth, None, 0  # index counts this rank's micro-batches

    def state_dict(self):
        """Position as plain numbers: the next optimizer step, and the micro-batch within it."""
        return {"step": self.index // self.accumulation, "micro_batch": self.index % self.accumulation}

    def load_state_dict(self, state):
        """Go on exactly where state_dict() was taken, whatever was prefetched since."""
        self.close()
        self.index = state["step"] * self.accumulation + state["micro_batch"]

    def micro_batch(self, index):
        """Inputs and targets of one micro-batch as CPU tensors: (B, T) int32 and (B, T) int64."""
        step, m = divmod(index, self.accumulation)
        start = step * self.step_tokens + (m * self.world_size + self.rank) * self.micro_tokens
        tokens = torch.from_numpy(self.ring.read(start, self.micro_tokens + 1))
        x = tokens[:-1].view(self.batch_size, self.block_size).contiguous()
        y = tokens[1:].view(self.batch_size, self.block_size).long()
        return (x.pin_memory(), y.pin_memory()) if self.device.type == "cuda" else (x, y)

    def _fill(self, index, batches, stop):
        while not stop.is_set():
            try:
                item = self.micro_batch(index)
            except Exception as error:  # raised again in the training thread by next()
                item = error
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            index += 1

    def next(self):
        """The next micro-batch on the device: inputs (B, T) int32, targets (B, T) int64."""
        if self.thread is None:
            self.batches, self.stop = queue.Queue(self.depth), threading.Event()
            self.thread = threading.Thread(target=self._fill, args=(self.index, self.batches, self.stop), daemon=True)
            self.thread.start()
        item = self.batches.get()
        if isinstance(item, Exception):
            self.close()  # a next() after this one tries again
            raise item
        self.index += 1
        x, y = item
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def peek(self):
        """The micro-batch that next() would give, without moving on."""
        x, y = self.micro_batch(self.index)
        return x.to(self.device), y.to(self.device)

    def close(self):
        if self.thread is not None:
            self.stop.set()
            self.thread.join()
            self.thread = None


def open_data(cfg, procs):
    """The train ring's loader and the val ring; rounds cfg.eval_tokens to whole sequences of the val shards."""
    # os.path.join drops the first part where data_dir is absolute
    data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), cfg.data_dir)
    train_ring = TokenRing(data_dir, cfg.dataset, "train", cfg.vocab_size, cfg.total_batch_size + 1)
    val_ring = TokenRing(data_dir, cfg.dataset, "val", cfg.vocab_size, cfg.block_size + 1)
    cfg.eval_tokens = max(1, min(cfg.eval_tokens, val_ring.total - 1) // cfg.block_size) * cfg.block_size
    return DataLoader(train_ring, cfg, procs), val_ring


# =====================================================================================================
# Precision: which Transformer Engine, which recipe


@dataclass
class Precision:
    """The layers' library (TE or its emulation), the recipe of block matmuls, and why."""

    te: object
    recipe: object  # None: bf16
    name: str       # "bf16", "fp8-delayed", ..., "nvfp4"
    emulated: bool
    reason: str

    @contextlib.contextmanager
    def autocast(self, procs, quantized=True):
        """The context of a forward pass: bf16 by torch.autocast, FP8 or NVFP4 by te.autocast.

        Delayed scaling reduces its amaxes over all ranks, so that every rank scales alike.
        """
        enabled = quantized and self.recipe is not None
        group = procs.mesh.get_group() if procs.world_size > 1 else None
        with torch.autocast(procs.device.type, dtype=torch.bfloat16), \
                self.te.autocast(enabled=enabled, recipe=self.recipe if enabled else None, amax_reduction_group=group):
            yield


def idle_flags(cfg, name):
    """["NVFP4_HADAMARD=False", ...]: flags that were set for another format than this run's, "fp8-delayed" or another."""
    of_format = {"fp8-": ("FP8_RECIPE", "USE_FP8_HEAD"), "fp8-delayed": ("FP8_MARGIN", "FP8_AMAX_HISTORY", "FP8_CALIBRATION_STEPS"),
                 "nvfp4": ("NVFP4_HADAMARD", "NVFP4_STOCHASTIC_ROUNDING", "NVFP4_2D_WEIGHTS")}
    return [f"{flag}={getattr(cfg, flag)}" for format_, flags in of_format.items() if not name.startswith(format_)
            for flag in flags if flag in cfg.explicit]


def select_precision(cfg, device):
    """Choose TE or te_emulation.py and build the recipe, by asking TE what the device can do.

    Raises: UserError where the layers' shapes do not fit the format.
    """
    name = "nvfp4" if cfg.USE_NVFP4 else f"fp8-{cfg.FP8_RECIPE}" if cfg.USE_FP8 else "bf16"
    te, recipes, missing = None, None, ""
    if cfg.USE_EMULATION is True:
        missing = "USE_EMULATION=True"
    elif device.type != "cuda":
        missing = "no GPU"
    else:
        try:
            import transformer_engine.pytorch as te
            from transformer_engine.common import recipe as recipes
        except ImportError as error:
            missing = f"Transformer Engine cannot be imported: {error}"
    if not missing and name != "bf16":
        ask = {"nvfp4": te.is_nvfp4_available, "fp8-mxfp8": te.is_mxfp8_available,
               "fp8-block": te.is_fp8_block_scaling_available}.get(name, te.is_fp8_available)
        available, why = ask(return_reason=True)
        missing = "" if available else why.rstrip(".")
    if missing:
        import te_emulation as te
        recipes = te.recipe

    if name == "bf16":
        recipe = None
    elif name == "nvfp4":
        # sm_120 (RTX 5090, RTX Pro 6000) has NVFP4 without the random Hadamard transform and stochastic rounding.
        sm_120 = not missing and torch.cuda.get_device_capability(device)[0] == 12
        recipe = recipes.NVFP4BlockScaling(disable_rht=sm_120 or not cfg.NVFP4_HADAMARD,
                                           disable_stochastic_rounding=sm_120 or not cfg.NVFP4_STOCHASTIC_ROUNDING,
                                           disable_2d_quantization=not cfg.NVFP4_2D_WEIGHTS)
    elif cfg.FP8_RECIPE == "delayed":
        recipe = recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID, margin=cfg.FP8_MARGIN,
                                        amax_history_len=cfg.FP8_AMAX_HISTORY, amax_compute_algo="max")
    else:
        recipe = {"current": recipes.Float8CurrentScaling, "block": recipes.Float8BlockScaling,
                  "mxfp8": recipes.MXFP8BlockScaling}[cfg.FP8_RECIPE]()

    multiple = {"bf16": 1, "fp8-block": 128, "fp8-mxfp8": 32, "nvfp4": 128}.get(name, 16)
    if cfg.n_embd % multiple or cfg.batch_size * cfg.block_size % multiple:
        raise UserError(f"{name} wants n_embd and batch_size x block_size divisible by {multiple}, not {cfg.n_embd} and "
                        f"{cfg.batch_size * cfg.block_size}: choose others, or --USE_FP8=False", 2)
    if name.startswith("fp8") and cfg.USE_FP8_HEAD and (cfg.vocab_size % 16 or cfg.loss_chunk_size % 16):
        raise UserError(f"an FP8 head wants vocab_size and loss_chunk_size divisible by 16, not {cfg.vocab_size} and "
                        f"{cfg.loss_chunk_size}: choose others, or --USE_FP8_HEAD=False", 2)
    if not missing:
        reason = "by Transformer Engine"
    elif name == "bf16":
        reason = f"by te_emulation.py ({missing})"
    else:
        reason = f"EMULATED by te_emulation.py ({missing})"
    return Precision(te, recipe, name, bool(missing), reason)


def keep_high_precision(model, patterns, te):
    """Make the layers whose names match one of the patterns (with commas between) run in bf16; returns their names.

    A pattern is a name (blocks.19 means all inside it) or has wildcards (blocks.*.attn.proj). NVFP4 is usually trained
    with the last blocks in bf16 (arXiv 2509.25149). Raises UserError if a pattern matches nothing.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, (te.Linear, te.LayerNormLinear, te.LayerNormMLP))]
    layers.append("head")
    chosen = set()
    for pattern in filter(None, (p.strip() for p in patterns.split(","))):
        matched = [n for n in layers if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, pattern + ".*")]
        if not matched:
            raise UserError(f"HIGH_PRECISION_LAYERS: '{pattern}' matches no layer; there are {', '.join(layers[:3])}, "
                            f"... {layers[-1]}", 2)
        chosen.update(matched)

    def in_bf16(forward):
        def wrapped(*args, **kwargs):
            with te.autocast(enabled=False):
                return forward(*args, **kwargs)
        return wrapped

    model.fp8_head = model.fp8_head and "head" not in chosen
    for name in chosen - {"head"}:
        layer = model.get_submodule(name)
        layer.in_bf16, layer.forward = True, in_bf16(layer.forward)
    return sorted(chosen, key=layers.index)


def fp8_state(model):
    """The delayed-scaling state as plain tensors: {"<module>.<scaling_fwd|scaling_bwd>.<scale|amax_history>": tensor}.

    Empty under recipes that have no state. The tensors are the live ones: clone() them to keep them.
    """
    state = {}
    for name, module in model.named_modules():
        for key in ("scaling_fwd", "scaling_bwd"):
            held = getattr(module, "fp8_meta", {}).get(key)
            if hasattr(held, "amax_history"):
                state[f"{name}.{key}.scale"] = held.scale
                state[f"{name}.{key}.amax_history"] = held.amax_history
    return state


def keep_scales(model):
    """Copies the delayed-scaling state; returns a function that puts it back.

    An inf in the amax history would freeze a scale, and a huge amax flush gradients to zero, until it leaves the history:
    for FP8_AMAX_HISTORY micro-batches. So a step that is skipped must leave the history as it was.
    """
    live = list(fp8_state(model).values())
    kept = torch._foreach_mul(live, 1) if live else []  # one kernel for many, where clone() is one for each
    return lambda: torch._foreach_copy_(live, kept) if live else None


@contextlib.contextmanager
def scales_kept(model):
    """Whatever quantizes inside leaves the delayed-scaling state as it was: Transformer Engine notes amaxes even without
    gradients, and the next training step would count them."""
    put_back = keep_scales(model)
    try:
        yield
    finally:
        put_back()


# =====================================================================================================
# Model


def rms_norm(x, eps):
    """RMSNorm without gain over the last dimension, computed in fp32, returned in bf16 (arXiv 1910.07467)."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).bfloat16()


def rope_qk_norm(qkv, cos, sin, n_head, eps):
    """Rotary position embedding (half-split) of q and k, then RMSNorm of each head without gain.

    Args:
        qkv: (B, T, 3*C) bf16, rows of q, then k, then v.
        cos, sin: (T, D/2) fp32 with D = C / n_head.
    Returns: q, k, v, each (B, T, n_head, D) bf16 and contiguous.
    Sources: RoPE arXiv 2104.09864; QK norm arXiv 2302.05442 (as RMSNorm: plain L2 norm slows convergence).
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).unbind(2)
    cos, sin = cos[None, :T, None, :], sin[None, :T, None, :]

    def rotate_and_norm(x):
        x1, x2 = x.float().chunk(2, dim=-1)
        return rms_norm(torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1), eps)

    return rotate_and_norm(q), rotate_and_norm(k), v.contiguous()


def kernels_fit(cfg, device):
    """Whether our own Triton kernels can run the blocks: on a GPU, for head sizes that are powers of two."""
    head = cfg.n_embd // cfg.n_head
    return cfg.USE_TRITON and triton is not None and device.type == "cuda" and head & (head - 1) == 0


def spectral_init(weight):
    """Normal with std = 1/sqrt(fan_in) * min(1, sqrt(fan_out/fan_in)) (arXiv 2310.17813)."""
    fan_out, fan_in = weight.shape
    return nn.init.normal_(weight, std=fan_in ** -0.5 * min(1.0, math.sqrt(fan_out / fan_in)))


class Attention(nn.Module):
    """RMSNorm -> q, k, v -> RoPE and QK norm -> causal attention -> output projection."""

    def __init__(self, cfg, te, compiled, device):
        super().__init__()
        self.n_head, self.eps, self.recompute, self.te = cfg.n_head, cfg.norm_eps, cfg.USE_AC_ATTENTION, te
        # The kernel works in place, which recomputation from the same qkv rules out
        self.rope_qk_norm = RopeQKNorm.apply if kernels_fit(cfg, device) and not self.recompute else compiled(rope_qk_norm)
        # One fused q/k/v matrix makes one wide matmul; Muon orthogonalises its three parts apart.
        self.qkv = te.LayerNormLinear(cfg.n_embd, 3 * cfg.n_embd, eps=cfg.norm_eps, bias=False, normalization="RMSNorm",
                                      init_method=init_qkv, params_dtype=torch.float32, device=device)
        self.core = te.DotProductAttention(cfg.n_head, cfg.n_embd // cfg.n_head, attention_dropout=0.0,
                                           qkv_format="bshd", attn_mask_type="causal")
        self.proj = te.Linear(cfg.n_embd, cfg.n_embd, bias=False, init_method=nn.init.zeros_,
                              params_dtype=torch.float32, device=device)

    def attend(self, qkv, cos, sin):
        q, k, v = self.rope_qk_norm(qkv, cos, sin, self.n_head, self.eps)  # (B, T, H, D) each
        return self.core(q, k, v)                                          # (B, T, C)

    def forward(self, x, cos, sin, first):
        qkv = self.qkv(x, is_first_microbatch=first)                       # (B, T, 3C)
        if self.recompute and self.training:
            y = self.te.checkpoint(self.attend, qkv, cos, sin, use_reentrant=False)
        else:
            y = self.attend(qkv, cos, sin)
        return self.proj(y, is_first_microbatch=first)                     # (B, T, C)


def init_qkv(weight):
    """spectral_init of q, k and v each, as if they were three matrices."""
    for part in weight.chunk(3, dim=0):
        spectral_init(part)
    return weight


class Block(nn.Module):
    """One transformer block: x + attention(x), then x + MLP(x); each half begins with RMSNorm with gain."""

    def __init__(self, cfg, te, compiled, device):
        super().__init__()
        self.attn = Attention(cfg, te, compiled, device)
        self.mlp = te.LayerNormMLP(cfg.n_embd, 4 * cfg.n_embd, eps=cfg.norm_eps, bias=False, normalization="RMSNorm",
                                   activation="srelu", init_method=spectral_init, output_layer_init_method=nn.init.zeros_,
                                   params_dtype=torch.float32, device=device)

    def forward(self, x, cos, sin, first, delta=None, fused=None):
        """x (B, T, C) bf16 to the same. With `fused`, from FusedBlocks.register(), in our own kernels: then from the stream x
        and `delta`, what the block before adds to it (None: nothing), to the next such pair."""
        attn, mlp = self.attn, self.mlp
        if fused is None:
            x = x + attn(x, cos, sin, first)
            return x + mlp(x, is_first_microbatch=first)
        x, q, k, v = FusedQKV.apply(x, delta, attn.qkv.layer_norm_weight, attn.qkv.weight, fused[0])
        return FusedMLP.apply(attn.core(q, k, v), x, attn.proj.weight, mlp.layer_norm_weight, mlp.fc1_weight, mlp.fc2_weight,
                              fused[1])


class LMHead(nn.Module):
    """Output projection with logit softcap, and the loss over it in chunks of tokens."""

    def __init__(self, cfg, device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cfg.vocab_size, cfg.n_embd, device=device))
        self.softcap, self.chunk, self.recompute = cfg.logit_softcap, cfg.loss_chunk_size, cfg.USE_AC_LM_HEAD
        self.cache = {}

    def forward(self, h, targets=None, first=None, fp8=False, in_place=""):
        """h: (B, T, C) bf16. With targets (B, T) int64 (-1: no target): the summed loss, a scalar fp32.
        Without: logits (B, T, V) fp32 after the softcap.

        first: as in GPT.forward(). fp8: matmuls in FP8. in_place: as in weight_gradient().
        """
        if targets is None:
            logits = matmul(h.flatten(0, 1), self.weight.to(h.dtype)).float()
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits.view(*h.shape[:2], -1)
        operand = weight_operand(self.weight, lambda w: current_scaling(w, torch.float8_e4m3fn) if fp8 else None, first, self.cache)
        return ChunkedCrossEntropy.apply(h.flatten(0, 1), self.weight, targets.flatten(), operand, self.softcap, self.chunk,
                                         self.recompute or not torch.is_grad_enabled(), in_place)


class GPT(nn.Module):
    """Token embedding -> RMSNorm -> blocks -> RMSNorm with gain -> head with softcap.

    Parameters are fp32 (the master weights); matmuls run in bf16, FP8 or NVFP4 by the context of the call.
    """

    def __init__(self, cfg, te, compiled, device):
        super().__init__()
        self.cfg, self.te = cfg, te
        # Our own kernels know bf16 and delayed scaling; recomputation is left to TE's modules
        formats = not cfg.USE_NVFP4 and (not cfg.USE_FP8 or cfg.FP8_RECIPE == "delayed")
        fused = (kernels_fit(cfg, device) and formats and te.__name__ != "te_emulation"
                 and not cfg.USE_AC_BLOCKS and not cfg.USE_AC_ATTENTION)
        self.fused = FusedBlocks(self) if fused else None
        self.fp8_head = cfg.USE_FP8 and cfg.USE_FP8_HEAD and not cfg.USE_NVFP4
        self.in_place = ""  # "add", "write": a backward pass may add weight gradients onto .grad itself, or put them there
        self.embed_norm = compiled(rms_norm)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd, device=device)
        self.blocks = nn.ModuleList(Block(cfg, te, compiled, device) for _ in range(cfg.n_layer))
        self.norm = te.RMSNorm(cfg.n_embd, eps=cfg.norm_eps, dtype=torch.float32, device=device)
        self.head = LMHead(cfg, device)
        # arXiv 2310.17813 for one-hot inputs: entries of order 1 (the RMSNorm after it takes any scale)
        nn.init.normal_(self.embed.weight, std=1.0)
        half = cfg.n_embd // cfg.n_head // 2
        angle = torch.outer(torch.arange(cfg.block_size, dtype=torch.float64),
                            cfg.rope_base ** (-torch.arange(half, dtype=torch.float64) / half))
        # Plain attributes: nothing to save, and never cast to bf16 (bf16 cannot tell position 2047 from 2048)
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)  # (T, D/2)
        self.ones = torch.ones(cfg.n_embd, device=device)

    def forward(self, idx, targets=None, first=None):
        """Summed loss over the targets (scalar fp32), or logits (B, T, V) fp32 if there are none.

        Args:
            idx: (B, T) int32 token ids.
            targets: (B, T) int64, -1 where there is nothing to predict.
            first: True in a step's first micro-batch, False in the others, so that each weight is quantized
                once a step; None: quantize anew.
        """
        fp8_head = self.fp8_head and self.te.quantization.FP8GlobalStateManager.is_fp8_enabled()
        if self.fused is not None:
            h = self.fused_blocks(idx, first)
        else:
            x = self.embed_norm(self.embed(idx), self.cfg.norm_eps)        # (B, T, C) bf16
            for block in self.blocks:
                if self.cfg.USE_AC_BLOCKS and self.training:
                    x = self.te.checkpoint(block, x, self.cos, self.sin, first, use_reentrant=False)
                else:
                    x = block(x, self.cos, self.sin, first)
            h = self.norm(x)
        return self.head(h, targets, first, fp8_head, self.in_place)

    def fused_blocks(self, idx, first):
        """From token ids to the final norm's output (B, T, C) bf16 in our own kernels."""
        x, delta = AddNorm.apply(self.embed(idx), None, self.ones, self.cfg.norm_eps), None
        self.fused.begin(x, first, self.in_place)
        for block, parts in zip(self.blocks, self.fused.blocks):
            x, delta = block(x, self.cos, self.sin, first, delta, parts)
        return AddNorm.apply(x, delta, self.norm.weight, self.cfg.norm_eps)

    def parameter_table(self):
        """[(part, parameters, explanation)], adding up to all parameters."""
        c = self.cfg
        return [
            ("token embedding", self.embed.weight.numel(), f"{c.vocab_size} x {c.n_embd}"),
            ("attention", c.n_layer * 4 * c.n_embd ** 2, f"{c.n_layer} x (q, k, v, proj: 4 x {c.n_embd}^2)"),
            ("MLP", c.n_layer * 8 * c.n_embd ** 2, f"{c.n_layer} x (fc1, fc2: 2 x {c.n_embd} x {4 * c.n_embd})"),
            ("RMSNorm gains", (2 * c.n_layer + 1) * c.n_embd, f"(2 x {c.n_layer} + 1) x {c.n_embd}"),
            ("output head", self.head.weight.numel(), f"{c.vocab_size} x {c.n_embd}"),
        ]


def flops_per_token(cfg):
    """Training FLOPs of one token: 6 x matmul parameters + causal attention, which counts half."""
    matmul_parameters = cfg.n_layer * 12 * cfg.n_embd ** 2 + cfg.vocab_size * cfg.n_embd
    return 6 * matmul_parameters + 6 * cfg.n_layer * cfg.block_size * cfg.n_embd


# -----------------------------------------------------------------------------------------------------
# Kernels in Triton, which a first reading may skip: Block.forward without `fused` is the same mathematics, and "Fused blocks" below
# puts these together. All that lies between the matmuls of a block, each in one pass over memory.
# N = B * T tokens ("rows"), C = n_embd. Where FP8 is true they write E4M3 or E5M2 (by the type of the output), values times
# `scale`, and raise `amax`, the largest |value| so far, for delayed scaling's next scale. *_cols is the transpose, which
# Hopper's FP8 matmuls want when they sum over tokens.

if triton is not None:
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # by Triton's interpreter, for tests on CPUs

    @triton.jit
    def as_fp8(x, scale, pointer, MAX: tl.constexpr):
        """x * scale rounded to what `pointer` points to, saturating at MAX; NaN stays NaN."""
        return tl.clamp(x * scale, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL).to(pointer.dtype.element_ty)

    @triton.jit
    def as_word(x0, x1, x2, x3, scale, E5M2: tl.constexpr):
        """Four fp32 tensors times scale as the bytes of one tensor of 32-bit words, lowest first, in E5M2 or E4M3.

        Transposes are written in words, four tokens each. Taking FP8 values apart into bytes is left to no compiler:
        ptxas of CUDA 13.0 gets every fourth wrong (a 16-bit shift of a register that holds two pairs, seen on an H100).
        """
        x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
        if INTERPRETED:
            word = tl.zeros(x0.shape, tl.uint32)
            for x, shift in ((x0, 0), (x1, 8), (x2, 16), (x3, 24)):
                if E5M2:
                    q = tl.clamp(x, -57344.0, 57344.0).to(tl.float8e5)
                else:
                    q = tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv)
                word |= q.to(tl.uint8, bitcast=True).to(tl.uint32) << shift
            return word
        kind: tl.constexpr = "e5m2x2" if E5M2 else "e4m3x2"
        return tl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; cvt.rn.satfinite." + kind + ".f32 lo, $2, $1; "
            "cvt.rn.satfinite." + kind + ".f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
            "=r,f,f,f,f", [x0, x1, x2, x3], dtype=tl.uint32, is_pure=True, pack=1)

    @triton.jit
    def raise_amax(amax, largest):
        """One atomic for a whole program, and none where it would change nothing: they all go to one address."""
        if largest > tl.load(amax):
            tl.atomic_max(amax, largest)

    @triton.jit
    def add_norm_forward(x, delta, gain, stream, y, rstd, scale, amax, N, C, eps,
                         ADD: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """stream = x + delta (if ADD), then y = RMSNorm(stream) * gain. x, delta, stream (N, C), gain (C,), rstd (N,) fp32."""
        c = tl.arange(0, BLOCK)
        g = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
        largest = 0.0
        for i in range(ROWS):
            row = tl.program_id(0) * ROWS + i
            at, mask = row.to(tl.int64) * C + c, (c < C) & (row < N)
            v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            if ADD:
                v += tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
                v = v.to(tl.bfloat16).to(tl.float32)  # the norm is of what the stream holds
                tl.store(stream + at, v.to(tl.bfloat16), mask=mask)
            r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / C + eps)
            v = v * r * g
            tl.store(rstd + row, r, mask=row < N)
            if FP8:
                largest = tl.maximum(largest, tl.max(tl.abs(v), axis=0))
                tl.store(y + at, as_fp8(v, tl.load(scale), y, 448.0), mask=mask)
            else:
                tl.store(y + at, v.to(tl.bfloat16), mask=mask)
        if FP8:
            raise_amax(amax, largest)

    @triton.jit
    def add_norm_backward(dy, stream, gain, rstd, residual, dx, dgain, N, C, ADD: tl.constexpr, ROWS: tl.constexpr,
                          BLOCK: tl.constexpr):
        """dx = RMSNorm's gradient + residual (the stream's own, if ADD); dgain (programs, C) fp32, to be added up."""
        c = tl.arange(0, BLOCK)
        g = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(ROWS):
            row = tl.program_id(0) * ROWS + i
            at, mask = row.to(tl.int64) * C + c, (c < C) & (row < N)
            d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            r = tl.load(rstd + row, mask=row < N, other=0.0)
            v = tl.load(stream + at, mask=mask, other=0.0).to(tl.float32) * r
            grad = (d * g - v * (tl.sum(d * g * v, axis=0) / C)) * r
            if ADD:
                grad += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=mask)
            total += d * v
        tl.store(dgain + tl.program_id(0) * C + c, total, mask=c < C)

    @triton.jit
    def relu2_forward(u, a, scale, amax, n, FP8: tl.constexpr, BLOCK: tl.constexpr):
        """a = relu(u)^2, elementwise over n values."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.maximum(tl.load(u + at, mask=at < n, other=0.0).to(tl.float32), 0.0)
        v *= v
        if FP8:
            tl.store(a + at, as_fp8(v, tl.load(scale), a, 448.0), mask=at < n)
            raise_amax(amax, tl.max(v, axis=0))
        else:
            tl.store(a + at, v.to(tl.bfloat16), mask=at < n)

    # The *_row functions take every fourth token of a program, as as_word() wants them, write the gradient and return it
    @triton.jit
    def relu2_backward_row(da, u, du, scale, m, k, M, K, FP8: tl.constexpr):
        at, mask = m.to(tl.int64)[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :]
        v = tl.maximum(tl.load(u + at, mask=mask, other=0.0).to(tl.float32), 0.0)
        d = tl.load(da + at, mask=mask, other=0.0).to(tl.float32) * 2.0 * v
        if FP8:
            tl.store(du + at, as_fp8(d, tl.load(scale), du, 57344.0), mask=mask)
        else:
            tl.store(du + at, d.to(tl.bfloat16), mask=mask)
        return d, v * v

    @triton.jit
    def relu2_backward(da, u, du, du_cols, a_cols, scale, amax, a_scale, M, K, FP8: tl.constexpr,
                       QUADS: tl.constexpr, BLOCK: tl.constexpr):
        """du = da * 2 relu(u); in FP8 also its transpose, and that of relu(u)^2 for the weight gradient. da, u (M, K) bf16."""
        quad, k = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d0, a0 = relu2_backward_row(da, u, du, scale, 4 * quad, k, M, K, FP8)
        d1, a1 = relu2_backward_row(da, u, du, scale, 4 * quad + 1, k, M, K, FP8)
        d2, a2 = relu2_backward_row(da, u, du, scale, 4 * quad + 2, k, M, K, FP8)
        d3, a3 = relu2_backward_row(da, u, du, scale, 4 * quad + 3, k, M, K, FP8)
        if FP8:
            across, mask = k.to(tl.int64)[:, None] * (M // 4) + quad[None, :], (k < K)[:, None] & (4 * quad < M)[None, :]
            tl.store(du_cols + across, tl.trans(as_word(d0, d1, d2, d3, tl.load(scale), True)), mask=mask)
            tl.store(a_cols + across, tl.trans(as_word(a0, a1, a2, a3, tl.load(a_scale), False)), mask=mask)
            raise_amax(amax, tl.max(tl.maximum(tl.maximum(tl.abs(d0), tl.abs(d1)), tl.maximum(tl.abs(d2), tl.abs(d3)))))

    @triton.jit
    def rope_qk_norm_forward(qkv, cos, sin, rstd, n_rows, T, heads, C3, eps, HALF: tl.constexpr, ROWS: tl.constexpr):
        """rope_qk_norm of q and k in place. A row is one head of q or k of one token, `heads` = 2 * n_head of them.

        qkv (B*T, C3) bf16; cos, sin (T, HALF) fp32; rstd (n_rows,) fp32, written: 1 / RMS of each row.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token, d, mask = row // heads, tl.arange(0, HALF)[None, :], (row < n_rows)[:, None]
        at = token.to(tl.int64)[:, None] * C3 + (row % heads)[:, None] * (2 * HALF) + d
        angle = (token % T)[:, None] * HALF + d
        c, s = tl.load(cos + angle, mask=mask), tl.load(sin + angle, mask=mask)
        x1 = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)  # a rotation keeps the norm
        tl.store(qkv + at, ((x1 * c - x2 * s) * r[:, None]).to(tl.bfloat16), mask=mask)
        tl.store(qkv + at + HALF, ((x1 * s + x2 * c) * r[:, None]).to(tl.bfloat16), mask=mask)
        tl.store(rstd + row, r, mask=row < n_rows)

    @triton.jit
    def rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, n, head, N, T, heads, C3, FP8: tl.constexpr,
                                  HALF: tl.constexpr):
        d, mask = tl.arange(0, HALF), (n < N)[:, None]
        at = n.to(tl.int64)[:, None] * C3 + head * (2 * HALF) + d[None, :]
        g1 = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(grad + at + HALF, mask=mask, other=0.0).to(tl.float32)
        if head < heads:
            angle = (n % T)[:, None] * HALF + d[None, :]
            c, s = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
            y1 = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
            y2 = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
            r = tl.load(rstd + n * heads + head, mask=n < N, other=0.0)[:, None]
            dot = (tl.sum(g1 * y1 + g2 * y2, axis=1) / (2 * HALF))[:, None]
            h1, h2 = r * (g1 - y1 * dot), r * (g2 - y2 * dot)
            g1, g2 = h1 * c + h2 * s, h2 * c - h1 * s
        if FP8:
            tl.store(out + at, as_fp8(g1, tl.load(scale), out, 57344.0), mask=mask)
            tl.store(out + at + HALF, as_fp8(g2, tl.load(scale), out, 57344.0), mask=mask)
        else:
            tl.store(out + at, g1.to(tl.bfloat16), mask=mask)
            tl.store(out + at + HALF, g2.to(tl.bfloat16), mask=mask)
        return g1, g2

    @triton.jit
    def rope_qk_norm_backward(grad, qkv, cos, sin, rstd, out, cols, scale, amax, N, T, heads, C3, FP8: tl.constexpr,
                              HALF: tl.constexpr, QUADS: tl.constexpr):
        """The gradient from the forward pass's outputs y: rstd * (dy - y * mean(dy * y)), rotated back; v's stays as it is.

        A program takes one head (of q, k or v) of 4 * QUADS tokens. grad, out (N, C3), cols (C3, N / 4); in bf16 out is grad.
        """
        quad, head = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1)
        p0, q0 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad, head, N, T, heads, C3, FP8, HALF)
        p1, q1 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad + 1, head, N, T, heads, C3, FP8, HALF)
        p2, q2 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad + 2, head, N, T, heads, C3, FP8, HALF)
        p3, q3 = rope_qk_norm_backward_row(grad, qkv, cos, sin, rstd, out, scale, 4 * quad + 3, head, N, T, heads, C3, FP8, HALF)
        if FP8:
            across = (head * (2 * HALF) + tl.arange(0, HALF)).to(tl.int64)[:, None] * (N // 4) + quad[None, :]
            mask = (4 * quad < N)[None, :]
            tl.store(cols + across, tl.trans(as_word(p0, p1, p2, p3, tl.load(scale), True)), mask=mask)
            tl.store(cols + across + HALF * (N // 4), tl.trans(as_word(q0, q1, q2, q3, tl.load(scale), True)), mask=mask)
            p = tl.maximum(tl.maximum(tl.abs(p0), tl.abs(p1)), tl.maximum(tl.abs(p2), tl.abs(p3)))
            q = tl.maximum(tl.maximum(tl.abs(q0), tl.abs(q1)), tl.maximum(tl.abs(q2), tl.abs(q3)))
            raise_amax(amax, tl.max(tl.maximum(p, q)))

    @triton.jit
    def softcapped(logits, softcap, CAP: tl.constexpr):
        """softcap * tanh(logits / softcap), and tanh; by exp, which a GPU has in hardware."""
        t = 1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0)
        if CAP:
            logits = t * softcap
        return logits, t

    @triton.jit
    def cross_entropy_loss(logits, targets, loss, lse, V, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
        """loss, lse (N,) fp32: cross-entropy and log-sum-exp of softcapped logits (N, V) bf16, one row a program.

        Each lane keeps its own sum, and its own maximum unless the softcap bounds it.
        """
        row = tl.program_id(0)
        at = logits + row.to(tl.int64) * V
        highest = tl.full((BLOCK,), softcap if CAP else -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z, _ = softcapped(tl.load(at + c, mask=c < V, other=0.0).to(tl.float32), softcap, CAP)
            if not CAP:
                higher = tl.maximum(highest, tl.where(c < V, z, -1e30))
                total *= tl.exp(highest - higher)
                highest = higher
            total += tl.where(c < V, tl.exp(z - highest), 0.0)
        top = tl.max(highest, axis=0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
        target = tl.load(targets + row)
        z, _ = softcapped(tl.load(at + tl.maximum(target, 0)).to(tl.float32), softcap, CAP)
        tl.store(lse + row, log_sum)
        tl.store(loss + row, tl.where(target >= 0, log_sum - z, 0.0))

    @triton.jit
    def cross_entropy_gradient_row(logits, targets, lse, out, n, c, N, V, softcap, scale, CAP: tl.constexpr, FP8: tl.constexpr):
        at, mask = n.to(tl.int64)[:, None] * V + c[None, :], (n < N)[:, None] & (c < V)[None, :]
        z, t = softcapped(tl.load(logits + at, mask=mask, other=0.0).to(tl.float32), softcap, CAP)
        target = tl.load(targets + n, mask=n < N, other=-1)[:, None]
        g = tl.exp(z - tl.load(lse + n, mask=n < N, other=0.0)[:, None]) - tl.where(c[None, :] == target, 1.0, 0.0)
        if CAP:
            g *= 1.0 - t * t
        g = tl.where(target >= 0, g, 0.0)
        if FP8:
            tl.store(out + at, as_fp8(g, scale, out, 57344.0), mask=mask)
        else:
            tl.store(out + at, g.to(tl.bfloat16), mask=mask)
        return g

    @triton.jit
    def cross_entropy_gradient(logits, targets, lse, out, cols, N, V, softcap, scale, CAP: tl.constexpr, FP8: tl.constexpr,
                               QUADS: tl.constexpr, BLOCK: tl.constexpr):
        """Gradient of the summed loss for the logits before the softcap, (N, V); out may be logits itself in bf16."""
        quad, c = tl.program_id(0) * QUADS + tl.arange(0, QUADS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        g0 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad, c, N, V, softcap, scale, CAP, FP8)
        g1 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad + 1, c, N, V, softcap, scale, CAP, FP8)
        g2 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad + 2, c, N, V, softcap, scale, CAP, FP8)
        g3 = cross_entropy_gradient_row(logits, targets, lse, out, 4 * quad + 3, c, N, V, softcap, scale, CAP, FP8)
        if FP8:
            across, mask = c.to(tl.int64)[:, None] * (N // 4) + quad[None, :], (c < V)[:, None] & (4 * quad < N)[None, :]
            tl.store(cols + across, tl.trans(as_word(g0, g1, g2, g3, scale, True)), mask=mask)


# -----------------------------------------------------------------------------------------------------
# Fused blocks: the block's two halves as autograd functions, cuBLAS's matmuls with these kernels between them


def use_kernels(x):
    """Whether a tensor is one for the kernels: on a GPU, or anywhere in Triton's interpreter, for tests."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


class Fp8(NamedTuple):
    """An FP8 matrix (its values in fp32 where it is emulated) and the factor, one fp32 element, that they must be multiplied by."""

    data: torch.Tensor
    inverse_scale: torch.Tensor


class Scaling(NamedTuple):
    """How one tensor is quantized: one-element fp32 tensors scale, 1 / scale, amax (raised in place; None: not wanted)."""

    scale: torch.Tensor
    inverse: torch.Tensor
    amax: torch.Tensor
    dtype: torch.dtype
    quantizer: object = None  # TE's, where it is kept


@functools.cache
def te_gemm():
    """TE's FP8 matmul as function(a, b, dtype, out, add, fast), see matmul(); None where it cannot run: then it is emulated."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return None
    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    except ImportError:
        return None

    def operand(x):
        return Float8TensorStorage(data=x.data.view(torch.uint8), fp8_scale_inv=x.inverse_scale,
                                   fp8_dtype=te_types()[0][x.data.dtype], fake_dtype=torch.bfloat16)

    # BLAS counts columns where torch counts rows: its first operand is our second
    return lambda a, b, dtype, out, add, fast: general_gemm(operand(b), operand(a), dtype, out=out, accumulate=add, layout="TN",
                                                            use_split_accumulator=not fast)[0]


def matmul(a, b, dtype=torch.bfloat16, out=None, add=True, fast=False):
    """a @ b.T with fp32 accumulation, (M, K) and (N, K): both Fp8 (K contiguous), or both bf16 (transposed views too).

    Args:
        dtype: of the result, unless `out`, fp32 (M, N), takes it: added to what is there, or in its place (add=False).
        fast: FP8 sums stay in the tensor cores, as TE has it for forward passes; else they are carried on in fp32.
    A CPU multiplies in fp32, which holds the same products exactly, and returns fp32: its caller rounds, if at all.
    """
    scale = None
    if isinstance(a, Fp8):
        if a.data.is_cuda and te_gemm():
            return te_gemm()(a, b, dtype if out is None else out.dtype, out, add and out is not None, fast)
        # Emulated: exact products of the values, scaled after the sum
        scale, a, b = a.inverse_scale * b.inverse_scale, a.data.float(), b.data.float()
    if a.is_cuda and scale is None:
        if out is not None:
            return torch.addmm(out, a, b.t(), beta=float(add), out_dtype=torch.float32, out=out)
        return a @ b.t() if dtype == a.dtype else torch.mm(a, b.t(), out_dtype=dtype)
    with torch.autocast(a.device.type, enabled=False):  # which would make the matmul bf16 again
        product = a.float() @ b.float().t() if scale is None else (a @ b.t()) * scale
        return product if out is None else out.add_(product) if add else out.copy_(product)


@functools.cache
def te_types():
    """TE's enumeration of number formats by torch's dtype, and its module of kernels."""
    import transformer_engine_torch
    from transformer_engine.pytorch.constants import DType
    return {torch.float8_e4m3fn: DType.kFloat8E4M3, torch.float8_e5m2: DType.kFloat8E5M2}, transformer_engine_torch


def te_quantizer(s, colwise=True):
    """TE's quantizer for Scaling s; its results are bare storages rather than tensors that autograd would follow."""
    from transformer_engine.pytorch import Float8Quantizer
    amax = torch.empty_like(s.scale) if s.amax is None else s.amax
    quantizer = Float8Quantizer(s.scale, amax, te_types()[0][s.dtype], columnwise=colwise)
    quantizer.internal = True
    return quantizer


def quantize(x, s, colwise=True):
    """x (M, K) as matmul operands (rows, cols): itself and its transpose, in FP8 by Scaling s, or bf16 views (s None)."""
    if s is None:
        return x, x.t()
    if x.is_cuda and te_gemm():
        q = (s.quantizer or te_quantizer(s, colwise))(x)
        rows = Fp8(q._data.view(s.dtype), s.inverse)
        if not colwise:
            return rows, None
        # Where matmuls take any layout (B200), TE makes no transpose
        return rows, transposed(rows) if q._transpose is None else Fp8(q._transpose.view(s.dtype), s.inverse)
    top = torch.finfo(s.dtype).max
    q = (x.float() * s.scale).clamp_(-top, top).to(s.dtype)
    if s.amax is not None:
        s.amax.copy_(torch.maximum(s.amax, x.detach().abs().max().float()))
    q = q.float()  # which is what is multiplied where there is no FP8
    return Fp8(q, s.inverse), Fp8(q.t(), s.inverse) if colwise else None


def transposed(y):
    """A row-wise operand as the operand of a sum over its rows."""
    if not isinstance(y, Fp8):
        return y.t()
    if not y.data.is_cuda or not te_gemm():
        return Fp8(y.data.t(), y.inverse_scale)
    kinds, tex = te_types()
    return Fp8(tex.fp8_transpose(y.data.view(torch.uint8), kinds[y.data.dtype], out=None).view(y.data.dtype), y.inverse_scale)


def weight_operand(weight, scaling, first, cache):
    """A weight as matmul operands (rows, cols), by scaling(weight) in FP8, or in bf16 where that is None.

    first: True in a step's first micro-batch, which fills the cache, False in the others, which use it; None: made anew.
    """
    if first is False and weight in cache:
        return cache[weight]
    w = weight.detach()
    s = scaling(w)
    if s is not None:
        # Delayed scaling's scale moves on between micro-batches, while these values stay
        made = quantize(w, s._replace(inverse=s.inverse.clone()))
    else:
        w = w.bfloat16() if w.is_cuda else w.bfloat16().float()  # a CPU multiplies these values in fp32
        made = w, w.t()
    if first is not None:
        cache[weight] = made
    return made


def current_scaling(x, dtype):
    """Scaling by the tensor's own amax, so that its largest value becomes the format's; 1 for a tensor of zeros."""
    amax = torch.linalg.vector_norm(x.detach(), math.inf, dtype=torch.float32).reshape(1)
    scale = torch.where(amax > 0, torch.finfo(dtype).max / amax, torch.ones_like(amax))
    return Scaling(scale, 1.0 / scale, None, dtype)


class AddNorm(torch.autograd.Function):
    """RMSNorm(x + delta) * gain in bf16, and nothing else in between (delta may be None)."""

    @staticmethod
    def forward(ctx, x, delta, gain, eps):
        stream, y, rstd = add_norm(x, delta, gain, eps, None)
        ctx.save_for_backward(stream, gain, rstd)
        ctx.add = delta is not None
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        stream, gain, rstd = ctx.saved_tensors
        dx, dgain = add_norm_grad(dy.flatten(0, -2), stream, gain, rstd, None)
        dx = dx.view(dy.shape)
        return dx, dx if ctx.add else None, dgain, None


def add_norm(x, delta, gain, eps, s):
    """stream (N, C) = x + delta, y = RMSNorm(stream) * gain (bf16, or FP8 by Scaling s), rstd (N,) fp32."""
    x = x.flatten(0, -2)
    N, C = x.shape
    stream = x if delta is None else torch.empty(N, C, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(N, C, dtype=torch.bfloat16 if s is None else s.dtype, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    rows = 4
    add_norm_forward[(triton.cdiv(N, rows),)](x, x if delta is None else delta, gain, stream, y, rstd, s and s.scale, s and s.amax,
                                              N, C, eps, delta is not None, s is not None, rows, triton.next_power_of_2(C))
    return stream, y if s is None else Fp8(y, s.inverse), rstd


def add_norm_grad(dy, stream, gain, rstd, residual):
    """Gradients of stream (N, C) and gain (C,)."""
    N, C = stream.shape
    rows = 16
    dx, partial = torch.empty_like(stream), torch.empty(triton.cdiv(N, rows), C, dtype=torch.float32, device=dy.device)
    add_norm_backward[(len(partial),)](dy, stream, gain, rstd, dx if residual is None else residual, dx, partial, N, C,
                                       residual is not None, rows, triton.next_power_of_2(C), num_warps=8)
    return dx, partial.sum(0).to(gain.dtype)


def words(cols):
    """An FP8 matrix (K, M) as the kernels write it, (K, M / 4) words; None for None."""
    return None if cols is None else cols.view(torch.int32)


def weight_gradient(dy_cols, x_cols, weight, in_place):
    """dy.T @ x for a weight, from both operands' transposes.

    in_place: "" returns it; "add" adds it onto weight.grad where there is one, and "write" puts it there, and return None.
    """
    if in_place and weight.grad is not None:
        matmul(dy_cols, x_cols, out=weight.grad, add=in_place == "add")
        return None
    return matmul(dy_cols, x_cols, weight.dtype)


class FusedQKV(torch.autograd.Function):
    """The block's first part: x + delta -> RMSNorm -> q, k, v -> RoPE and QK norm.

    Arguments: x, delta (B, T, C) bf16 (delta, the block before's MLP, may be None), gain (C,), weight (3C, C), and `p`,
    from FusedBlocks.register(). Returns the stream x + delta, and q, k, v, each (B, T, H, D), parts of one tensor, which attention
    takes as it is (TE's layout bs3hd).
    """

    @staticmethod
    def forward(ctx, x, delta, gain, weight, p):
        B, T, C = x.shape
        stream, y, rstd = add_norm(x, delta, gain, p.eps, p.input)
        w, ctx.w_cols = p.fused.operand(weight, p.weight)
        qkv = matmul(y, w, fast=True)                                                  # (N, 3C)
        rope_rstd = rope_qk_norm_in_place(qkv, p.cos, p.sin, T, p.n_head, p.eps)
        ctx.p, ctx.add, ctx.in_place = p, delta is not None, p.fused.in_place
        ctx.save_for_backward(stream, gain, rstd, weight, qkv, rope_rstd, y if p.input is None else y.data)
        return stream.view(B, T, C), *qkv.view(B, T, 3, p.n_head, C // p.n_head).unbind(2)

    @staticmethod
    def backward(ctx, d_stream, dq, dk, dv):
        stream, gain, rstd, weight, qkv, rope_rstd, y = ctx.saved_tensors
        p, (N, C3) = ctx.p, qkv.shape
        d_rows, d_cols = rope_qk_norm_grad(dq, dk, dv, qkv, rope_rstd, p)
        dy = matmul(d_rows, ctx.w_cols)
        dx, dgain = add_norm_grad(dy, stream, gain, rstd, d_stream)
        dw = weight_gradient(d_cols, transposed(y if p.input is None else Fp8(y, p.input.inverse)), weight, ctx.in_place)
        if p.last:  # every gradient of this pass is quantized
            p.last()
        dx = dx.view(d_stream.shape)
        return dx, dx if ctx.add else None, dgain, dw, None


def rope_qk_norm_in_place(qkv, cos, sin, T, n_head, eps):
    """rope_qk_norm of qkv (N, 3C) bf16 in place; returns 1 / RMS of each head of q and k, (N * 2 * n_head,) fp32."""
    N, C3 = qkv.shape
    rstd = torch.empty(N * 2 * n_head, dtype=torch.float32, device=qkv.device)
    rope_qk_norm_forward[(triton.cdiv(len(rstd), 16),)](qkv, cos, sin, rstd, len(rstd), T, 2 * n_head, C3, eps, C3 // 6 // n_head, 16)
    return rstd


def rope_qk_norm_grad(dq, dk, dv, qkv, rstd, p):
    """The gradient of what went into RoPE and QK norm, from their outputs qkv (N, 3C): operands (rows, cols).

    p: cos, sin, and grad, the Scaling of the result or None for bf16, which takes the place of dq, dk, dv where they are parts of
    one tensor, as attention returns them.
    """
    B, T, H, D = dq.shape
    N, C3 = qkv.shape
    packed = qkv.view(B, T, 3, H, D)
    together = all(g.stride() == packed.stride()[:2] + packed.stride()[3:] and g.data_ptr() == dq.data_ptr() + i * H * D * 2
                   and g.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr() for i, g in enumerate((dq, dk, dv)))
    grad = (dq.as_strided(packed.shape, packed.stride()) if together else torch.stack((dq, dk, dv), dim=2)).view(N, C3)
    fp8 = p.grad is not None
    rows = torch.empty(N, C3, dtype=p.grad.dtype, device=grad.device) if fp8 else grad
    cols = torch.empty(C3, N, dtype=p.grad.dtype, device=grad.device) if fp8 else None
    rope_qk_norm_backward[(triton.cdiv(N, 128), (3 if fp8 else 2) * H)](
        grad, qkv, p.cos, p.sin, rstd, rows, words(cols), p.grad and p.grad.scale, p.grad and p.grad.amax, N, T, 2 * H, C3, fp8,
        D // 2, 32)
    return (Fp8(rows, p.grad.inverse), Fp8(cols, p.grad.inverse)) if fp8 else (grad, grad.t())


class RopeQKNorm(torch.autograd.Function):
    """rope_qk_norm in place of qkv (B, T, 3C), whose own values nothing needs any more, for blocks of TE's modules."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, eps):
        B, T, C3 = qkv.shape
        qkv = qkv.detach().view(B * T, C3)
        ctx.save_for_backward(qkv, rope_qk_norm_in_place(qkv, cos, sin, T, n_head, eps), cos, sin)
        return qkv.view(B, T, 3, n_head, C3 // 3 // n_head).unbind(2)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, rstd, cos, sin = ctx.saved_tensors
        rows, _ = rope_qk_norm_grad(dq, dk, dv, qkv, rstd, SimpleNamespace(cos=cos, sin=sin, grad=None))
        return rows.view(*dq.shape[:2], -1), None, None, None, None


class FusedMLP(torch.autograd.Function):
    """The block's second part: attention's output -> projection, residual -> RMSNorm -> MLP with relu^2.

    Arguments: o (B, T, C) attention's output, x (B, T, C) the stream, both bf16; proj (C, C), gain (C,), fc1 (4C, C), fc2 (C, 4C),
    and `p`, from FusedBlocks.register(). Returns the stream x + proj(o), and the MLP's output, which the next part adds.
    Kept for the backward pass: o and the norm's output (in FP8 as quantized), the stream, and relu^2's input; in FP8 relu^2 is
    quantized once more for the weight gradient, by the same scale, rather than kept.
    """

    @staticmethod
    def forward(ctx, o, x, proj, gain, fc1, fc2, p):
        B, T, C = x.shape
        o = o.view(B * T, C)
        w_proj, w_fc1, w_fc2 = p.fused.operand(proj, p.proj), p.fused.operand(fc1, p.fc1), p.fused.operand(fc2, p.fc2)
        o_rows, _ = quantize(o, p.o, colwise=False)
        stream, y, rstd = add_norm(x, matmul(o_rows, w_proj[0], fast=True), gain, p.eps, p.input)
        u = matmul(y, w_fc1[0], fast=True)                                             # (N, 4C)
        a = torch.empty(u.shape, dtype=u.dtype if p.a is None else p.a.dtype, device=u.device)
        relu2_forward[(triton.cdiv(u.numel(), 8192),)](u, a, p.a and p.a.scale, p.a and p.a.amax, u.numel(), p.a is not None,
                                                       8192, num_warps=8)
        out = matmul(a if p.a is None else Fp8(a, p.a.inverse), w_fc2[0], fast=True)
        ctx.p, ctx.in_place, ctx.w_cols = p, p.fused.in_place, (w_proj[1], w_fc1[1], w_fc2[1])
        ctx.save_for_backward(o if p.o is None else o_rows.data, stream, gain, rstd, u, proj, fc1, fc2,
                              *((y, a) if p.a is None else (y.data, None)))
        return stream.view(B, T, C), out.view(B, T, C)

    @staticmethod
    def backward(ctx, d_stream, d_out):
        o, stream, gain, rstd, u, proj, fc1, fc2, y, a = ctx.saved_tensors
        p, shape, (w_proj, w_fc1, w_fc2) = ctx.p, d_out.shape, ctx.w_cols
        M, K = u.shape
        d_rows, d_cols = quantize(d_out.flatten(0, 1), p.d_out)
        da = matmul(d_rows, w_fc2)
        fp8 = p.d_u is not None
        du = torch.empty(M, K, dtype=p.d_u.dtype, device=u.device) if fp8 else da
        du_cols = torch.empty(K, M, dtype=p.d_u.dtype, device=u.device) if fp8 else None
        a_cols = torch.empty(K, M, dtype=p.a.dtype, device=u.device) if fp8 else None
        relu2_backward[(triton.cdiv(M, 128), triton.cdiv(K, 64))](
            da, u, du, words(du_cols), words(a_cols), p.d_u and p.d_u.scale, p.d_u and p.d_u.amax, p.a and p.a.scale, M, K, fp8,
            32, 64)
        if fp8:
            du, du_cols, a_cols = Fp8(du, p.d_u.inverse), Fp8(du_cols, p.d_u.inverse), Fp8(a_cols, p.a.inverse)
        else:
            du_cols, a_cols = du.t(), a.t()
        dw2 = weight_gradient(d_cols, a_cols, fc2, ctx.in_place)
        dy = matmul(du, w_fc1)
        dx, dgain = add_norm_grad(dy, stream, gain, rstd, d_stream.flatten(0, 1))
        dw1 = weight_gradient(du_cols, transposed(Fp8(y, p.input.inverse) if fp8 else y), fc1, ctx.in_place)
        d_rows, d_cols = quantize(dx, p.d_proj)
        do = matmul(d_rows, w_proj)
        dwp = weight_gradient(d_cols, transposed(o if p.o is None else Fp8(o, p.o.inverse)), proj, ctx.in_place)
        return do.view(shape), dx.view(shape), dwp, dgain, dw1, dw2, None


class FusedBlocks:
    """What the fused blocks need beside their tensors: which layers run in FP8, by which scales, with which weights.

    Delayed scaling's state is TE's own, held by the layers: their scales are copied when a pass begins, since TE updates
    them in place when its forward half ends, and the kernels raise the live amaxes. One pass at a time: a backward pass must be
    over before the next forward pass begins. Buffers stay where they are, so that CUDA graphs may hold on to them.
    """

    def __init__(self, model):
        self.model, self.cache = model, {}
        self.formats = {}  # {whether FP8 is on: (blocks, live scales, their copy, its inverse)}

    def begin(self, x, first, in_place):
        """Start a pass; x: any tensor on the model's device, first and in_place: as GPT.forward() has them."""
        state = self.model.te.quantization.FP8GlobalStateManager
        enabled = state.is_fp8_enabled()
        if enabled not in self.formats:
            self.formats[enabled] = self.register(x, state)
        self.first, self.in_place = first, in_place
        self.blocks, live, scale, inverse = self.formats[enabled]
        if live:
            torch.cat(live, out=scale)
            torch.reciprocal(scale[:, None], out=inverse[:, :1])

    def register(self, x, state):
        """Let TE set its layers up for the present format, and lay out what each block needs."""
        te, held = self.model.te, []
        for block in self.model.blocks:
            for layer, gemms in ((block.attn.qkv, 1), (block.attn.proj, 1), (block.mlp, 2)):
                with te.autocast(enabled=False) if getattr(layer, "in_bf16", False) else contextlib.nullcontext():
                    layer.prepare_forward(x, num_gemms=gemms)
                    layer.end_forward()
                if layer.fp8:
                    held += [(layer, key, layer.fp8_meta[key]) for key in ("scaling_fwd", "scaling_bwd")]
        total = sum(len(meta.scale) for *_, meta in held)
        scale = torch.ones(total, device=x.device)
        inverse = torch.ones(total, 4, device=x.device)  # 16 bytes apart: cuBLAS wants them so aligned
        offsets = dict(zip(((layer, key) for layer, key, _ in held), itertools.accumulate((len(m.scale) for *_, m in held), initial=0)))

        def scaling(layer, key, i, colwise=True):
            """Of a layer's i-th tensor, by TE's numbers: input 0, weight 1, a second matmul's 3 and 4; gradients 0 and 2."""
            if (layer, key) not in offsets:
                return None
            at, dtype = offsets[layer, key] + i, torch.float8_e4m3fn if key == "scaling_fwd" else torch.float8_e5m2
            s = Scaling(scale[at:at + 1], inverse[at, :1], layer.fp8_meta[key].amax_history[0, i:i + 1], dtype)
            return s._replace(quantizer=te_quantizer(s, colwise))

        blocks, forward, backward = [], "scaling_fwd", "scaling_bwd"
        for i, block in enumerate(self.model.blocks):
            attn, qkv, proj, mlp = block.attn, block.attn.qkv, block.attn.proj, block.mlp
            shared = dict(fused=self, eps=attn.eps)
            # TE's own modules do the same when the backward pass leaves the first of them
            last = functools.partial(state.reduce_and_update_fp8_tensors, forward=False) if i == 0 and held else None
            blocks.append((
                SimpleNamespace(**shared, n_head=attn.n_head, cos=self.model.cos, sin=self.model.sin, last=last,
                                input=scaling(qkv, forward, 0), weight=scaling(qkv, forward, 1), grad=scaling(qkv, backward, 0)),
                SimpleNamespace(**shared, o=scaling(proj, forward, 0, colwise=False), proj=scaling(proj, forward, 1),
                                d_proj=scaling(proj, backward, 0), input=scaling(mlp, forward, 0), fc1=scaling(mlp, forward, 1),
                                d_u=scaling(mlp, backward, 0), a=scaling(mlp, forward, 3), fc2=scaling(mlp, forward, 4),
                                d_out=scaling(mlp, backward, 2))))
        return blocks, [meta.scale for *_, meta in held], scale, inverse

    def operand(self, weight, s):
        """A weight as matmul operands, by Scaling s or in bf16."""
        return weight_operand(weight, lambda w: s, self.first, self.cache)


# -----------------------------------------------------------------------------------------------------
# Loss: head, softcap and cross-entropy in chunks, so that all logits never exist at once


def softcap_cross_entropy(logits, targets, softcap):
    """Summed cross-entropy of softcapped logits. logits (N, V), targets (N,) int64, -1 ignored. Scalar fp32."""
    if use_kernels(logits):
        return cross_entropy_kernels(logits, targets, softcap)[0]
    z = logits.float()
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    picked = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return ((torch.logsumexp(z, dim=1) - picked) * (targets >= 0)).sum()


LOGIT_GRAD_SCALE = 2.0 ** 15  # gradients of logits are within [-1, 1] by nature: a fixed power of two serves E5M2


def softcap_cross_entropy_and_grad(logits, targets, softcap, s=None):
    """The summed loss as above, and its gradient for the logits before the softcap as matmul operands, (N, V) and (V, N).

    The gradient is in the logits' dtype (in their place), or in FP8 by Scaling s.
    """
    if use_kernels(logits) and (s is None or te_gemm() or not logits.is_cuda):  # GPUs without FP8 cannot round to it either
        loss, lse = cross_entropy_kernels(logits, targets, softcap)
        N, V = logits.shape
        rows = logits if s is None else torch.empty(N, V, dtype=s.dtype, device=logits.device)
        cols = None if s is None else torch.empty(V, N, dtype=s.dtype, device=logits.device)
        cross_entropy_gradient[(triton.cdiv(N, 64), triton.cdiv(V, 64))](
            logits, targets, lse, rows, words(cols), N, V, softcap or 1.0, LOGIT_GRAD_SCALE, softcap > 0, s is not None, 16, 64)
        return loss, (rows, rows.t()) if s is None else (Fp8(rows, s.inverse), Fp8(cols, s.inverse))
    z = logits.float()
    if softcap:
        t = z.div_(softcap).tanh_()
        z = t * softcap
    valid, index = targets >= 0, targets.clamp(min=0)[:, None]
    lse = torch.logsumexp(z, dim=1)
    loss = ((lse - z.gather(1, index)[:, 0]) * valid).sum()
    # d loss / d z = softmax(z) - onehot(target);  d z / d logits = 1 - tanh^2
    grad = z.sub_(lse[:, None]).exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    if softcap:
        grad = grad.mul_(t.square_().neg_().add_(1))
    return loss, quantize(grad.mul_(valid[:, None]).to(logits.dtype), s)


def cross_entropy_kernels(logits, targets, softcap):
    """Summed loss (scalar fp32) and the log-sum-exp of each row (N,) fp32."""
    N, V = logits.shape
    loss, lse = torch.empty(2, N, dtype=torch.float32, device=logits.device)
    cross_entropy_loss[(N,)](logits, targets, loss, lse, V, softcap or 1.0, softcap > 0, 2048, num_warps=8)
    return loss.sum(), lse


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of softcap(h @ weight.T) against targets, `chunk` tokens at a time.

    With recompute=False the gradients of h and weight are formed chunk by chunk in the forward pass, while the
    logits are there anyway; with True the forward pass keeps nothing and the backward pass makes the logits again.

    forward arguments: h (N, C) bf16, weight (V, C), targets (N,) int64 with -1 ignored, operand: the weight's matmul
    operands, Fp8 for FP8 matmuls (h by its amax, gradients of logits by LOGIT_GRAD_SCALE), softcap (0: none).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, operand, softcap, chunk, recompute, in_place):
        ctx.arguments, ctx.in_place = (operand, softcap, chunk), in_place
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needs_grad and not recompute:
            loss, *ctx.grads = ChunkedCrossEntropy.loss_and_grads(h, targets, operand, softcap, chunk)
            ctx.save_for_backward(weight)
            return loss
        if needs_grad:
            ctx.save_for_backward(weight, h, targets)
        s = current_scaling(h, torch.float8_e4m3fn) if isinstance(operand[0], Fp8) else None
        return sum(softcap_cross_entropy(matmul(quantize(hc, s, colwise=False)[0], operand[0]), tc, softcap)
                   for hc, tc in zip(h.split(chunk), targets.split(chunk)))

    @staticmethod
    def loss_and_grads(h, targets, operand, softcap, chunk):
        """Loss, its gradient for h (N, C) bf16, and for the weight (V, C) fp32."""
        s = current_scaling(h, torch.float8_e4m3fn) if isinstance(operand[0], Fp8) else None
        g = s and Scaling(torch.full_like(s.scale, LOGIT_GRAD_SCALE), torch.full_like(s.scale, 1 / LOGIT_GRAD_SCALE), None,
                          torch.float8_e5m2)
        loss, dh, dw = torch.zeros((), device=h.device), torch.empty_like(h), None
        for hc, tc, dhc in zip(h.split(chunk), targets.split(chunk), dh.split(chunk)):
            h_rows, h_cols = quantize(hc, s)
            loss_c, (g_rows, g_cols) = softcap_cross_entropy_and_grad(matmul(h_rows, operand[0]), tc, softcap, g)
            loss += loss_c
            dhc.copy_(matmul(g_rows, operand[1]))
            dw = matmul(g_cols, h_cols, torch.float32) if dw is None else matmul(g_cols, h_cols, out=dw)
        return loss, dh, dw

    @staticmethod
    def backward(ctx, grad_loss):
        weight, *rest = ctx.saved_tensors
        dh, dw = ChunkedCrossEntropy.loss_and_grads(*rest, *ctx.arguments)[1:] if rest else ctx.grads
        ctx.grads = None
        dh.mul_(grad_loss)
        if ctx.in_place == "write":
            torch.mul(dw, grad_loss, out=weight.grad)
            dw = None
        elif ctx.in_place and weight.grad is not None:
            weight.grad.addcmul_(dw, grad_loss)
            dw = None
        else:
            dw = dw.mul_(grad_loss).to(weight.dtype)
        return dh, dw, None, None, None, None, None, None


# =====================================================================================================
# Optimizers and schedules


def lr_factor(step, warmup_iters, max_iters, min_lr_ratio):
    """Learning-rate factor of optimizer step `step` (from 0): linear warm-up, then cosine to min_lr_ratio.

    1/warmup_iters at step 0, 1 at steps warmup_iters - 1 and warmup_iters, min_lr_ratio at step max_iters - 1 if
    that comes later.
    """
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def momentum_at(step, start, end, iters):
    """Muon momentum of a step: linear from `start` at step 0 to `end` at step `iters`, then constant."""
    return end if step >= iters else start + (end - start) * step / iters


class TorchMuon(torch.optim.Muon):
    """torch.optim.Muon made to do what Dion's Muon does, for where Dion cannot run.

    - Each matrix of a fused weight (split_sizes: rows of q, k, v) is orthogonalised apart.
    - The update is scaled by sqrt(fan_out / fan_in), as Dion's adjust_lr="spectral_norm".
    - Orthogonalisation runs to convergence with the classical quintic (15, -10, 3)/8: singular values within 0.01 of 1.
      Dion's Polar Express leaves them between 0.86 and 1.14, torch's own constants between 0.7 and 1.2.
    - torch averages gradients into its momentum buffer with weight 1 - momentum where Dion adds them up. The update
      has no scale, so only the ratio matters: when the momentum changes, buffers are rescaled to keep it.
    - Sharded parameters (DTensor) are gathered, updated alike on every rank, and cut again.

    torch.optim.Muon holds one stand-in tensor for each matrix; the model's own parameters are in `groups`.
    """

    def __init__(self, groups, nesterov=True):
        self.groups, self.parts = groups, {}
        stand_ins = []
        for group in groups:
            for p in group["params"]:
                # Whole matrices of this parameter; views of it where it is not sharded
                full = p.detach() if not isinstance(p, DTensor) else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                parts = [part for part in full.split(list(group.get("split_sizes", full.shape[:1])))]
                self.parts[p] = (full, parts)
                for part in parts:
                    ratio = math.sqrt(part.shape[0] / part.shape[1])
                    # torch's "original" scales by sqrt(max(1, fan_out/fan_in)): make up what is below 1
                    stand_ins.append(dict(params=[part], source=group, lr_scale=min(1.0, ratio)))
        super().__init__(stand_ins, momentum=groups[0]["mu"], nesterov=nesterov, adjust_lr_fn="original",
                         ns_coefficients=(15 / 8, -10 / 8, 3 / 8), ns_steps=14)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for p, (full, parts) in self.parts.items():
            if p.grad is None:
                continue
            grad = p.grad
            if isinstance(p, DTensor):
                full.copy_(p.full_tensor())
                grad = grad.full_tensor()
            for part, part_grad in zip(parts, grad.split([len(part) for part in parts])):
                part.grad = part_grad
        for group in self.param_groups:
            source, (part,) = group["source"], group["params"]
            group["lr"] = source["lr"] * group["lr_scale"]
            group["weight_decay"] = source["weight_decay"] / group["lr_scale"]  # torch multiplies it by the scaled lr
            if source["mu"] != group["momentum"] and part in self.state:
                self.state[part]["momentum_buffer"].mul_((1 - source["mu"]) / (1 - group["momentum"]))
            group["momentum"] = source["mu"]
        super().step()
        for p, (full, parts) in self.parts.items():
            for part in parts:
                part.grad = None
            if isinstance(p, DTensor) and p.grad is not None:
                p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None).to_local())

    def zero_grad(self, set_to_none=True):
        for p in self.parts:
            p.grad = None

    def buffers(self):
        """torch's momentum buffers by parameter, {parameter: whole matrix}; zero before the first step."""
        return {p: torch.cat([self.state[x]["momentum_buffer"] if x in self.state else torch.zeros_like(x) for x in parts])
                for p, (_, parts) in self.parts.items()}

    def load_buffers(self, buffers, momentum):
        """Take over what buffers() gave, at the momentum it was at."""
        for p, whole in buffers.items():
            parts = self.parts[p][1]
            for x, piece in zip(parts, whole.split([len(x) for x in parts])):
                self.state[x]["momentum_buffer"] = piece.to(x.device, x.dtype).clone()
        for group in self.param_groups:
            group["momentum"] = momentum

    def momentum(self):
        """Dion's state by parameter: the sum of gradients, where torch keeps the average."""
        return {p: b / (1 - self.param_groups[0]["momentum"]) for p, b in self.buffers().items()}

    def load_momentum(self, momenta, momentum=None):
        """Take over Dion's state, {parameter: whole momentum}, at `momentum` (default: the one it is at)."""
        momentum = self.param_groups[0]["momentum"] if momentum is None else momentum
        self.load_buffers({p: m * (1 - momentum) for p, m in momenta.items()}, momentum)


def dion_muon(choice, device, compiled=True):
    """Dion's Muon class, or None and the reason why torch.optim.Muon takes its place. compiled: whether its update is to be."""
    if choice == "torch":
        return None, "muon_impl=torch"
    why = ""
    try:
        from dion import Muon
    except ImportError as error:
        why = f"Dion cannot be imported ({error})"
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if not why and compiled and device.type == "cpu" and not any(map(shutil.which, compilers)):
        why = "Dion compiles its kernels and there is no C++ compiler"
    if why and choice == "dion":
        raise UserError(f"muon_impl=dion, but {why}: install requirements.txt, or --muon_impl=auto")
    return (None, why) if why else (Muon, "")


def polar_express(G, epsilon=1e-6):
    """Dion's orthogonalisation of the same name (arXiv 2505.16932), of matrices (..., m, n), with nothing to compile.

    Each polynomial's sums are part of its matmuls. Dion's Triton kernels for it autotune for minutes (results/NOTES.md).
    """
    from dion.polar_express import _POLAR_EXPRESS_COEFFS
    X = G.bfloat16().reshape(-1, *G.shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + epsilon)
    wide = X.mT if X.shape[-2] > X.shape[-1] else X
    for a, b, c in _POLAR_EXPRESS_COEFFS:
        A = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(A, A, A, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if X.shape[-2] > X.shape[-1] else wide).reshape(G.shape)


class Optimizers:
    """Muon for the matrices in the blocks, AdamW for embedding, head and gains, stepped as one."""

    def __init__(self, model, cfg, procs, sharded):
        blocks = list(model.blocks.named_parameters())
        C = cfg.n_embd
        muon_groups = [
            dict(name="qkv", params=[p for n, p in blocks if n.endswith("qkv.weight")], split_sizes=(C, C, C)),
            dict(name="matrices", params=[p for n, p in blocks if p.ndim == 2 and not n.endswith("qkv.weight")]),
        ]
        for group in muon_groups:
            group.update(lr=cfg.learning_rate, weight_decay=cfg.weight_decay, mu=cfg.muon_momentum_start)
        gains = [p for p in model.parameters() if p.ndim == 1]
        adam_groups = [
            dict(name="embed", params=[model.embed.weight], lr=cfg.learning_rate_embed, weight_decay=cfg.weight_decay_embed),
            dict(name="head", params=[model.head.weight], lr=cfg.learning_rate_head, weight_decay=cfg.weight_decay_head),
            dict(name="gains", params=gains, lr=cfg.learning_rate_gain, weight_decay=cfg.weight_decay_gain),
        ]

        # Taken before Dion turns its groups' "lr" into device tensors
        self.base_lr = {g["name"]: g["lr"] for g in muon_groups + adam_groups}
        # Dion compiles its update: half a minute of a first start, to save milliseconds a step (results/NOTES.md)
        self.compiled = cfg.USE_COMPILE is True

        Muon, why = dion_muon(cfg.muon_impl, procs.device, self.compiled)
        if Muon is not None:
            if self.compiled:
                torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # Dion's many shapes
            # Dion shares the work out: by the mesh where parameters are sharded, by the group where they are whole.
            mesh = procs.mesh if sharded else procs.mesh.get_group() if procs.world_size > 1 else None
            self.muon = Muon(muon_groups, mesh, nesterov=True, adjust_lr="spectral_norm", newton_schulz_func=polar_express)
            self.description = "Muon by Dion"
        else:
            self.muon = TorchMuon(muon_groups)
            self.description = f"Muon by torch.optim.Muon: {why}"

        adam = dict(betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_eps)
        self.all = [self.muon]
        if cfg.USE_8BIT_ADAM:
            bnb = import_bitsandbytes(procs, sharded)
            self.all.append(bnb.optim.AdamW8bit(adam_groups[:2], **adam))
            adam_groups = adam_groups[2:]
            self.description += "; AdamW8bit by bitsandbytes for embedding and head, AdamW for gains"
        else:
            self.description += "; AdamW for embedding, head and gains"
        self.all.append(torch.optim.AdamW(adam_groups, fused=True, **adam))
        self.muon_groups = self.muon.groups if Muon is None else self.muon.param_groups
        self.groups = {g["name"]: g for g in self.muon_groups}
        self.groups.update({g["name"]: g for opt in self.all[1:] for g in opt.param_groups})
        self.schedule = lambda step: lr_factor(step, cfg.warmup_iters, cfg.max_iters, cfg.min_lr_ratio)
        self.momentum_schedule = lambda step: momentum_at(step, cfg.muon_momentum_start, cfg.muon_momentum,
                                                          cfg.muon_momentum_iters)

    def set_schedule(self, step):
        """Learning rates and Muon momentum of an optimizer step; returns them by log.jsonl's names."""
        factor, momentum = self.schedule(step), self.momentum_schedule(step)
        for name, group in self.groups.items():
            group["lr"] = self.base_lr[name] * factor
        for group in self.muon_groups:
            group["mu"] = momentum
        lr = {name: self.base_lr[name] * factor for name in self.groups}
        return dict(lr_muon=lr["qkv"], lr_embed=lr["embed"], lr_head=lr["head"], momentum=momentum)

    def step(self):
        with torch.compiler.set_stance("default" if self.compiled else "force_eager"):
            for optimizer in self.all:
                optimizer.step()

    def zero_grad(self):
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    @property
    def meta(self):
        """What a checkpoint must know of Muon to read its buffers: whose they are, and their momentum."""
        if isinstance(self.muon, TorchMuon):  # its buffers are at the momentum of the last step that was taken
            return dict(muon="torch", muon_momentum=float(self.muon.param_groups[0]["momentum"]))
        return dict(muon="dion", muon_momentum=float(self.muon_groups[0]["mu"]))

    def state_of(self, optimizer):
        """State of one of the optimizers, {parameter: {name: tensor or number}}; Muon's buffers as `momentum`."""
        if isinstance(optimizer, TorchMuon):
            return {p: dict(momentum=b) for p, b in optimizer.buffers().items()}
        return optimizer.state

    def load_state(self, saved, parameters, meta):
        """Take over a checkpoint's state, {parameter name: {name: tensor}}; tensors of ours in it were filled in place.

        Between torch.optim.Muon and Dion the buffers are converted.
        """
        if isinstance(self.muon, TorchMuon):
            buffers = {p: saved[n]["momentum"] for n, p in parameters.items() if p in self.muon.parts}
            load = self.muon.load_momentum if meta["muon"] == "dion" else self.muon.load_buffers
            load(buffers, meta["muon_momentum"])
        elif meta["muon"] == "torch":
            for state in self.muon.state.values():
                state["momentum"] /= 1 - meta["muon_momentum"]
        for optimizer in self.all[1:]:
            for p, state in optimizer.state.items():
                name = next(n for n, q in parameters.items() if q is p)
                for key, value in state.items():
                    if not torch.is_tensor(value):  # bitsandbytes counts steps in a plain number
                        state[key] = type(value)(saved[name][key].item())

    def warm_up(self, model):
        """Compile the optimizers' kernels by a step with zero gradients and learning rate 0: nothing changes."""
        for group in self.groups.values():
            group["lr"] = 0.0
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        self.step()
        self.zero_grad()
        for optimizer in self.all:  # the zero gradients left zero moments; only the step counts must go back
            for group in optimizer.param_groups:
                if "step" in group:
                    group["step"] = 0
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"] * 0


def import_bitsandbytes(procs, sharded):
    """bitsandbytes, or a UserError that says why its AdamW8bit cannot run here."""
    if sharded:
        raise UserError("USE_8BIT_ADAM cannot update sharded parameters: use --USE_FSDP2=False, or --USE_8BIT_ADAM=False", 2)
    if procs.device.type != "cuda":
        raise UserError("USE_8BIT_ADAM needs a GPU: use --USE_8BIT_ADAM=False", 2)
    try:
        import bitsandbytes
    except Exception as error:
        raise UserError(f"USE_8BIT_ADAM needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes")
    return bitsandbytes


# =====================================================================================================
# Parallelism


def choose_wrapper(cfg, procs, parameters):
    """"none", "ddp" or "fsdp2", and the reason, from the flags, the number of ranks and the GPU's memory.

    Raises: UserError if the flags contradict each other.
    """
    fsdp2, ddp, n = cfg.USE_FSDP2, cfg.USE_DDP, procs.world_size
    if fsdp2 is True and ddp is True:
        raise UserError("USE_FSDP2 and USE_DDP exclude each other: set one of them to True", 2)
    if fsdp2 is True:
        return "fsdp2", "USE_FSDP2=True"
    if ddp is True:
        return "ddp", "USE_DDP=True"
    if n == 1:
        return "none", "one rank"
    if fsdp2 is False and ddp is False:
        raise UserError(f"{n} ranks need a wrapper: leave USE_FSDP2 or USE_DDP at auto, or set one to True", 2)
    if fsdp2 is False:
        return "ddp", f"{n} ranks, USE_FSDP2=False"
    if ddp is False:
        return "fsdp2", f"{n} ranks, USE_DDP=False"
    # fp32 weight, fp32 gradient (DDP's buckets are views of it), up to two fp32 moments: 16 bytes a parameter
    state_gb = 16 * parameters / 1e9
    if procs.device.type != "cuda":
        return "ddp", f"{n} ranks on CPUs"
    memory_gb = torch.cuda.get_device_properties(procs.device).total_memory / 1e9
    if state_gb < memory_gb / 4:
        return "ddp", f"{n} ranks, and {state_gb:.1f} GB of state fit a {memory_gb:.0f} GB GPU with room for activations"
    return "fsdp2", f"{n} ranks, and {state_gb:.1f} GB of state are more than a quarter of a {memory_gb:.0f} GB GPU"


class Parallel:
    """The model under the chosen wrapper. `module` is what to call; `model` keeps the plain names."""

    def __init__(self, model, wrapper, cfg, procs):
        self.model, self.module, self.wrapper, self.reshard = model, model, wrapper, cfg.FSDP2_RESHARD
        if wrapper == "ddp":
            # Buckets are views of the gradients: no second copy of them
            self.module = DistributedDataParallel(model, process_group=procs.mesh.get_group(), gradient_as_bucket_view=True,
                                                  device_ids=[procs.device] if procs.device.type == "cuda" else None)
            if not cfg.REDUCE_FP32:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
                # DDP knows torch's own hook by its name and refuses it without NCCL; gloo takes bf16 as well
                self.module.register_comm_hook(procs.mesh.get_group(), lambda group, bucket: bf16_compress_hook(group, bucket))
        elif wrapper == "fsdp2":
            # Inputs stay as they are: RoPE's tables are fp32, all else is bf16 or whole numbers
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False,
                                          reduce_dtype=torch.float32 if cfg.REDUCE_FP32 else torch.bfloat16)
            for part in (model.embed, *model.blocks, model.head):
                fully_shard(part, mesh=procs.mesh, mp_policy=policy, reshard_after_forward=cfg.FSDP2_RESHARD)
            fully_shard(model, mesh=procs.mesh, mp_policy=policy, reshard_after_forward=False)

    def first_micro_batch(self, m):
        """Whether micro-batch m is the step's first, which quantizes the weights for the others too.
        None for TE's modules under FSDP2, which keep no quantized weights there: each micro-batch makes its own."""
        return None if self.wrapper == "fsdp2" and self.model.fused is None else m == 0

    @contextlib.contextmanager
    def micro_batch(self, last):
        """Forward and backward of one micro-batch; gradients go over the ranks in the step's last one only."""
        if self.wrapper == "fsdp2":
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
            # Gathered weights serve all micro-batches of a step
            self.model.set_reshard_after_backward(last or self.reshard)
        # Where nothing waits for a gradient, matmuls may add it onto .grad themselves
        self.model.in_place = "add" if self.wrapper == "none" or self.wrapper == "ddp" and not last else ""
        with self.module.no_sync() if self.wrapper == "ddp" and not last else contextlib.nullcontext():
            yield


def gradient_norm(parameters):
    """Global norm of the gradients over all ranks, a scalar tensor on the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters, max_norm, norm=None):
    """Scale the gradients to at most max_norm (0: leave them); returns their global norm (which may be given)."""
    norm = gradient_norm(parameters) if norm is None else norm
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


# =====================================================================================================
# Checkpoints: parameters by the model's own names, the same for TE and emulation, DDP, FSDP2 and any world size

# A run cannot go on with another value of these
FIXED_FLAGS = ("n_layer n_embd n_head vocab_size block_size rope_base norm_eps logit_softcap dataset total_batch_size "
               "USE_8BIT_ADAM").split()


def random_state(procs, te):
    """State of every random generator of this rank, as tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, gauss_next = random.getstate()
    state = dict(torch=torch.get_rng_state(), numpy=torch.from_numpy(np.append(keys.astype(np.int64), position)),
                 python=torch.tensor(numbers))
    if procs.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(procs.device)
    if hasattr(te, "get_rng_state"):
        state["te_emulation"] = {str(d): g for d, g in te.get_rng_state()["generators"].items()}
    return state


def set_random_state(state, procs, te):
    """Put back what random_state() took."""
    torch.set_rng_state(state["torch"])
    numbers = state["numpy"].numpy()
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1])))
    random.setstate((3, tuple(state["python"].tolist()), None))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], procs.device)
    if "te_emulation" in state:
        te.set_rng_state(te.get_rng_state() | {"generators": state["te_emulation"]})


def training_state(model, optimizers, procs, te):
    """What a checkpoint holds, as nested dicts of live tensors: model, optim (by parameter name), fp8, rng (by rank)."""
    names = {p: name for name, p in model.named_parameters()}
    optim = {}
    for optimizer in optimizers.all:
        for p, held in optimizers.state_of(optimizer).items():
            optim[names[p]] = {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in held.items()}
    return dict(model={name: p.detach() for p, name in names.items()}, optim=optim, fp8=fp8_state(model),
                rng={str(procs.rank): random_state(procs, te)})


def steps_of(checkpoint):
    """The number in a checkpoint's name: step_1000000 comes after step_999750, whatever text or mtime say."""
    return int(re.search(r"(\d+)/*$", checkpoint)[1])


def complete_checkpoints(folder):
    """The complete checkpoints in a folder, by steps. Complete is what has meta.json, written last, before the folder gets its name."""
    found = [os.path.dirname(f) for f in glob.glob(os.path.join(glob.escape(folder), "step_*", "meta.json"))]
    return sorted((f for f in found if re.fullmatch(r"step_\d+", os.path.basename(f))), key=steps_of)


def give_up_later_checkpoints(run_folder, first_step):
    """Where a run goes back to an earlier step: no checkpoint after it counts any more. The newest is the first, so that a kill in
    between leaves one whose log lines are there up to it."""
    later = [f for f in complete_checkpoints(os.path.join(run_folder, "ckpt")) if steps_of(f) > first_step]
    if later:
        print(f"resume: goes on from step {first_step}; what came after it is deleted: {', '.join(map(os.path.basename, later))}", flush=True)
    for folder in reversed(later):
        os.remove(os.path.join(folder, "meta.json"))


def saved_at(checkpoint):
    """When a checkpoint was saved, as it says itself (copying it changes every time stamp): seconds; 0 if it is damaged."""
    try:
        return float(read_checkpoint(checkpoint)["saved_at"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0.0


def find_checkpoint(path):
    """The newest complete checkpoint at or below `path`, or None.

    A checkpoint stands for itself, a run folder for the one with most steps (what comes after it is deleted when a run is
    resumed at an earlier one), and a folder of runs for the newest of its runs, by the time each last saved.
    """
    if os.path.isfile(os.path.join(path, "meta.json")):
        return path
    folders = [path, os.path.join(path, "ckpt"), *glob.glob(os.path.join(glob.escape(path), "*", "ckpt"))]
    return max((found[-1] for found in map(complete_checkpoints, folders) if found), key=saved_at, default=None)


def run_folder_of(checkpoint):
    """The run folder that a checkpoint lies in, or None for one that was moved out of it."""
    folder, name = os.path.split(os.path.dirname(os.path.abspath(checkpoint)))
    return folder if name == "ckpt" and os.path.isfile(os.path.join(folder, "config.json")) else None


def read_checkpoint(folder):
    """meta.json of a checkpoint: step (optimizer steps done), tokens, flags, loader, ... Raises UserError if it is none."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
            named = re.fullmatch(r"step_(\d+)", os.path.basename(os.path.abspath(folder)))
            for key, fits in (("flags", lambda v: isinstance(v, dict)), ("tokens", lambda v: isinstance(v, int) and v > 0),
                              ("step", lambda v: isinstance(v, int) and v > 0 and (not named or v == int(named[1]))),
                              ("world_size", lambda v: isinstance(v, int) and v > 0), ("train_seconds", lambda v: isinstance(v, (int, float))),
                              ("loader", lambda v: all(isinstance(v[k], int) for k in ("step", "micro_batch")))):
                if not fits(meta[key]):
                    raise ValueError(f"its {key} is {meta[key]!r}")
            return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no complete checkpoint ({error!r}): name a folder step_NNNNNN, a run folder, or leave it out")


def load_tensors(folder, state, no_dist=False):
    """Fill the tensors of a nested dict from a checkpoint, in place; raises UserError if one is missing or has another shape."""
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        raise UserError(f"checkpoint {folder} cannot be loaded: {last_line(error)}", one_rank=True)


def last_line(error):
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def load_weights(folder, tensors):
    """Fill {parameter name: tensor} from a checkpoint, in this process alone; it may have been saved by any number."""
    load_tensors(folder, {"model": tensors}, no_dist=True)


class Checkpoints:
    """Saves to <run folder>/ckpt/step_NNNNNN while training goes on, and keeps the newest few.

    The tensors are copied aside (to pinned memory on a GPU), and a thread writes them by torch.distributed.checkpoint, over
    a gloo group of its own. The folder has a temporary name until everything is on disk, meta.json last. A write that
    fails is reported, and training goes on.
    """

    def __init__(self, folder, cfg, procs):
        self.folder, self.keep, self.procs = os.path.join(folder, "ckpt"), cfg.keep_checkpoints, procs
        self.group, self.writer, self.pending = dist.new_group(backend="gloo"), ThreadPoolExecutor(1), None
        if procs.is_main:  # what is half written or half deleted; what else lies there is none of ours
            for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
                path = os.path.join(self.folder, name)
                whole = name.startswith("step_") and os.path.isfile(os.path.join(path, "meta.json"))
                if re.fullmatch(r"(step|\.writing|\.replaced)_\d+", name) and not whole:
                    self.delete(path)
        dist.barrier(self.group)
        self.last = find_checkpoint(self.folder)

    @functools.cached_property
    def stager(self):
        """What copies the state aside. On a GPU it keeps its pinned memory for the next time (DefaultStager of torch 2.11 works but once)."""
        return dcp.staging.BlockingAsyncStager(cache_staged_state_dict=self.procs.device.type == "cuda")

    def prepare(self, make_state):
        """Copy the state aside once before training is on the clock: on a GPU that allocates the pinned memory, which the stager keeps,
        without which a first save of 561M parameters held training up for 1.6 s on an H100."""
        if self.keep and self.procs.device.type == "cuda":
            try:
                self.stager.stage(make_state())
            except RuntimeError as error:  # too little memory: each save will say so, training goes on
                self.procs.print(f"checkpoints: no pinned memory ({last_line(error)})")

    def save(self, step, make_state, meta):
        """Start a checkpoint of make_state() after `step` optimizer steps; returns the seconds that training stood still.

        Weights that are not finite are no checkpoint: nothing could go on from it, and it would drive out one that is good.
        """
        if not self.keep:
            return 0.0
        start = time.perf_counter()
        self.finish(wait=True)  # of the checkpoint before, should it still be under way
        temporary = os.path.join(self.folder, f".writing_{step:06d}")
        state, error, errors = None, None, [None] * self.procs.world_size
        try:
            self.writer.submit(int).result()  # its thread, which may not start
            state = make_state()
            weights = [p.to_local() if isinstance(p, DTensor) else p for p in state["model"].values()]
            largest = torch.stack([torch.linalg.vector_norm(p, ord=math.inf) for p in weights if p.numel()] or [torch.zeros(())])
            if not largest.isfinite().all():
                raise ValueError("the weights are not finite")
            state = self.stager.stage(state)
        except Exception as e:
            vars(self).pop("stager", None)  # it may hold half a copy
            error = last_line(e)
        # A rank that fails alone must not leave the others waiting for it in their write
        dist.all_gather_object(errors, error, self.group)
        if any(errors):
            rank = next(i for i, text in enumerate(errors) if text)
            self.failed(step, temporary, errors[rank] + (f" (rank {rank})" if len(errors) > 1 else ""))
        else:
            self.pending = step, meta, temporary, self.writer.submit(dcp.save, state, checkpoint_id=temporary, process_group=self.group)
        return time.perf_counter() - start

    def finish(self, wait=False):
        """Give a checkpoint that is all on disk its name, if there is one (wait: as soon as it is)."""
        if not self.pending or not (wait or self.pending[3].done()):
            return
        (step, meta, temporary, future), self.pending = self.pending, None
        try:
            future.result()
            if self.procs.is_main:
                with open(os.path.join(temporary, "meta.json"), "w", encoding="utf-8") as f:
                    json.dump(meta, f, indent=1)
                    f.flush()
                    os.fsync(f.fileno())
                final = os.path.join(self.folder, f"step_{step:06d}")
                if os.path.exists(final):  # from before the run was resumed at an earlier step
                    os.rename(final, os.path.join(self.folder, f".replaced_{step:06d}"))
                os.rename(temporary, final)
                ckpt = os.open(self.folder, os.O_RDONLY)
                os.fsync(ckpt)  # the name is on disk before an older checkpoint goes
                os.close(ckpt)
                self.last = final
                self.delete(os.path.join(self.folder, f".replaced_{step:06d}"))
                for old in [f for f in complete_checkpoints(self.folder) if f != final][:-self.keep + 1 or None]:
                    self.delete(old)
        except (Exception, CheckpointException) as error:
            text = last_line(error)
            with contextlib.suppress(OSError):  # torch's writer does not say that a disk is full
                text += f" ({shutil.disk_usage(os.path.dirname(self.folder)).free / 1e9:.2f} GB free)"
            self.failed(step, temporary, text)

    def delete(self, folder):
        """meta.json first: half deleted, a checkpoint must not count."""
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, "meta.json"))
        shutil.rmtree(folder, ignore_errors=True)

    def failed(self, step, temporary, text):
        self.procs.print(f"checkpoint at step {step} failed, training goes on: {text}")
        if self.procs.is_main:
            shutil.rmtree(temporary, ignore_errors=True)

    def close(self):
        self.finish(wait=True)
        self.writer.shutdown()
        dist.barrier(self.group)  # ranks leave together, after rank 0 has named the last one


def folder_before_restart(cfg):
    """The run folder that these processes had before torchrun started them again (--max-restarts), or None.

    config.json names the torchrun that a run belongs to; of several, the last one that was started.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "none", "nanogpt-fp8"):  # torchrun's and run.sh's defaults, which other runs have too
        return None
    folders = glob.glob(os.path.join(glob.escape(cfg.out_dir), "*"))
    folders += filter(None, [run_folder_of(find_checkpoint(cfg.resume) or "")] if cfg.resume not in ("", "auto") else [])
    found = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
            if config["torchrun"] == name:
                found.append((float(config["started_at"]), folder))
    return max(found)[1] if found else None


def checkpoint_to_resume(cfg, procs):
    """(checkpoint folder, its meta) by the flag `resume`, or (None, None) for a fresh start; refuses flags that differ.

    Processes that torchrun started again go on in the run folder they had, whatever `resume` says. The harmless
    differences are printed.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not cfg.resume and not restarted:
        return None, None
    before = folder_before_restart(cfg) if restarted else None
    folder = find_checkpoint(before) if before else None
    if folder is None and cfg.resume == "auto":
        runs = [os.path.join(cfg.out_dir, cfg.run_name)]
        runs += [f for f in glob.glob(glob.escape(runs[0]) + "-*") if re.fullmatch(re.escape(runs[0]) + r"-\d+", f)]
        found = [f for f in map(find_checkpoint, runs) if f]
        # gpt-2 may be the second run called gpt, or one that was called gpt-2
        found = [f for f in found if run_folder_of(f) == os.path.abspath(runs[0])
                 or read_checkpoint(f)["flags"]["run_name"] == cfg.run_name]
        folder = max(found, key=saved_at, default=None)
    elif folder is None and cfg.resume:
        folder = find_checkpoint(cfg.resume)
    folder = procs.broadcast(folder)
    if folder is None and cfg.resume not in ("", "auto"):
        raise UserError(f"--resume={cfg.resume}: there is no complete checkpoint at or below it", 2)
    if folder is None:
        procs.print(f"resume={cfg.resume or 'auto (after a restart)'}: {before or os.path.join(cfg.out_dir, cfg.run_name)} has no "
                    f"complete checkpoint, starting afresh")
        return None, None
    meta = read_checkpoint(folder)
    changed = {k: (v, getattr(cfg, k)) for k, v in meta["flags"].items() if hasattr(cfg, k) and getattr(cfg, k) != v}
    for name in FIXED_FLAGS:
        if name in changed:
            was, now = changed[name]
            raise UserError(f"{folder} was trained with {name}={was}, which cannot become {now}: leave --{name} as it was", 2)
    run_folder = run_folder_of(folder)
    # A run that was killed after its last checkpoint only lacks its last line; as a restart, it may even have that
    ended = run_folder is None or any(r["kind"] == "done" for r in read_log(run_folder)) and not restarted
    if meta["step"] > cfg.max_iters or meta["step"] == cfg.max_iters and ended:
        raise UserError(f"{folder} has done {meta['step']} steps, and max_iters is {cfg.max_iters}: raise --max_iters", 2)
    for name, (was, now) in changed.items():
        if name not in ("resume", "out_dir", "run_name"):
            procs.print(f"resume: {name} was {was}, is now {now}")
    if run_folder and "run_name" in changed:  # it goes on in its own folder, where --resume=auto will look for its own name
        cfg.run_name = changed["run_name"][0]
        if "run_name" in cfg.explicit:
            procs.print(f"resume: goes on in {run_folder}; --run_name={changed['run_name'][1]} has no effect")
    return folder, meta


def data_mark(ring, tokens):
    """What tells whether a checkpoint's data are still there: the size of the shards, and a checksum of the last 4,096 tokens
    of the first `tokens` of the ring."""
    first = max(0, tokens - 4096)
    return dict(tokens=ring.total, crc32=zlib.crc32(ring.read(first, tokens - first).tobytes()))


def check_data(folder, meta, ring):
    """Refuse shards that are not those of a checkpoint. More of them are fine until a run has come round to the first again.
    Raises UserError."""
    was, now = meta.get("data"), data_mark(ring, meta["tokens"])
    if was and was["crc32"] != now["crc32"]:
        raise UserError(f"{folder} was trained on other data: {was['tokens']:,} tokens with checksum {was['crc32']:08x} before its position, where "
                        f"{os.path.dirname(ring.paths[0])} has {now['tokens']:,} with {now['crc32']:08x}: bring those shards back", 2)


def restore(folder, meta, model, optimizers, loader, procs, te):
    """Put a checkpoint's state back into model, optimizers, loader, scales and generators.

    Scales come back if the checkpoint has them, generators if the world size is the same; returns whether all scales did.
    """
    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"checkpoint {folder} cannot be loaded: {error!r}")
    state = training_state(model, optimizers, procs, te)

    def known(tree, prefix):
        """The part of a nested dict that the checkpoint has, in the same shapes."""
        if not isinstance(tree, dict):
            return tree if prefix in saved and saved[prefix].size == tree.shape else None
        kept = {k: known(v, f"{prefix}.{k}") for k, v in tree.items()}
        return {k: v for k, v in kept.items() if v is not None} or None

    rng, fp8 = known(state.pop("rng"), "rng"), known(state.pop("fp8"), "fp8")
    load_tensors(folder, state)  # all of model and optim must be there
    scales = {k: v.clone() for k, v in (fp8 or {}).items()}
    if not any(k.endswith("amax_history") for k in scales):  # another FP8_AMAX_HISTORY: scales without it would not last
        scales = {}
    own = {"rng": rng or {}, "fp8": scales}
    if meta["world_size"] != procs.world_size:
        own.pop("rng")
    load_tensors(folder, own)
    # A rank's loss is divided by its own tokens of a step, so with more ranks its gradients are larger by as much:
    # unless their scales know, they saturate in the first step.
    factor, live = procs.world_size / meta["world_size"], fp8_state(model)
    for name, tensor in scales.items():
        if "scaling_bwd" in name:
            tensor = tensor / factor if name.endswith("scale") else tensor * factor
        live[name].copy_(tensor)
    optimizers.load_state(state["optim"], {name: p for name, p in model.named_parameters()}, meta)
    if own.get("rng"):
        set_random_state(own["rng"][str(procs.rank)], procs, te)
    loader.load_state_dict(meta["loader"])
    return scales.keys() == live.keys()


# =====================================================================================================
# Evaluation


@torch.no_grad()
def evaluate(model, ring, cfg, procs, autocast, meanwhile=lambda: None):
    """Mean loss of `model` over the first eval_tokens of the val shards, all ranks taking part.

    Sequence s is tokens s*T ... s*T + T of the ring. Rank r takes sequences r, r + world_size, ...; where they do
    not fill a batch, rows without targets do, so that the result is the same for any world and batch size, and all
    ranks make the same number of passes. `autocast()` is the context of a pass: bf16 or the format of training.
    `model` is the plain one: DDP has nothing to do without gradients. meanwhile() is called after each pass.
    """
    T, sequences = cfg.block_size, cfg.eval_tokens // cfg.block_size
    per_pass = procs.world_size * cfg.batch_size
    total = torch.zeros(2, dtype=torch.float64, device=procs.device)
    model.eval()
    for first in range(0, sequences, per_pass):
        x = torch.zeros(cfg.batch_size, T, dtype=torch.int32)
        y = torch.full((cfg.batch_size, T), -1, dtype=torch.int64)
        for row in range(cfg.batch_size):
            s = first + row * procs.world_size + procs.rank
            if s < sequences:
                tokens = torch.from_numpy(ring.read(s * T, T + 1))
                x[row], y[row] = tokens[:-1], tokens[1:]
        with autocast():
            loss = model(x.to(procs.device), y.to(procs.device))
        total += torch.tensor([0.0, float((y >= 0).sum())], dtype=torch.float64).to(procs.device)
        total[0] += loss.double()
        meanwhile()
    model.train()
    procs.sum(total)
    return (total[0] / total[1]).item()


# =====================================================================================================
# Logging

# Dense bf16 tensor-core peaks in FLOP/s, first match by device name (NVIDIA data sheets)
PEAK_BF16 = [
    ("GB200", 2.5e15), ("B200", 2.25e15), ("B100", 1.8e15), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12),
    ("H100", 989e12), ("H800", 989e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("RTX PRO 6000", 503.8e12),
    ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
]


def peak_flops(device):
    """Dense bf16 peak of a GPU in FLOP/s, or None where it is not in the table (then there is no MFU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_BF16 if key.lower() in name.lower()), None)


def peak_memory_gb(device):
    """Largest memory in use so far: on a GPU as torch allocated it, on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def describe_machine(device):
    """What config.json keeps of machine and code: device, versions, git commit, a hash of the source (commits do not see edits)."""
    from importlib.metadata import PackageNotFoundError, version
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformer-engine", "dion", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                         cwd=os.path.dirname(os.path.abspath(__file__)) or ".") if shutil.which("git") else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    sources = [os.path.abspath(__file__), os.path.join(os.path.dirname(os.path.abspath(__file__)), "te_emulation.py")]
    code = hashlib.sha256(b"".join(open(f, "rb").read() for f in sources if os.path.exists(f))).hexdigest()
    return dict(device=name, versions=versions, git_commit=git.stdout.strip() or None if git else None, code=code[:16])


def make_run_folder(out_dir, run_name):
    """Create out_dir/run_name, or run_name-2, -3, ... where that is taken: a run is never overwritten."""
    for n in range(1, 100_000):
        folder = os.path.join(out_dir, run_name if n == 1 else f"{run_name}-{n}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder} ({error.strerror}): choose another --out_dir or --run_name", one_rank=True)


def remove_if_empty(folder):
    """Of a run that failed before it wrote anything."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def data_rows(cfg, procs, loader, val_ring):
    """Rows of the start-up table on data, batch and length: [(name, text)]."""
    ring, tokens = loader.ring, cfg.max_iters * cfg.total_batch_size
    return [
        ("data", f"{cfg.dataset}: {ring.total:,} train tokens in {len(ring.paths)} shard(s), "
                 f"{cfg.eval_tokens:,} of {val_ring.total:,} val tokens per evaluation"),
        ("batch", f"{cfg.total_batch_size:,} tokens = {procs.world_size} rank(s) x {loader.accumulation} micro-batch(es) x "
                  f"{cfg.batch_size} sequences x {cfg.block_size} tokens"),
        ("length", f"{cfg.max_iters:,} steps = {tokens:,} tokens = {tokens / ring.total:.2f} epochs"),
    ]


def format_duration(seconds):
    """Seconds as 1:02:03 or 2:03."""
    m, s = divmod(int(seconds + 0.5), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def read_log(folder):
    """The records of a run folder's log.jsonl, without lines that are none: a killed run or a crashed machine may have left some.
    A record has a kind and a step."""
    path, records = os.path.join(folder, "log.jsonl"), []
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                record = json.loads(line) if line.endswith("}\n") else None
                if isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def lock_folder(folder):
    """Keep other processes from training in a run folder until this one ends, however it does, or closes what is returned."""
    lock = os.open(folder, os.O_RDONLY)
    for seconds_left in (4, 3, 2, 1, 0):  # one that was killed just now may take a while to be gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if seconds_left:
                time.sleep(1)
                continue
            os.close(lock)
            raise UserError(f"another process is training in {folder}: wait for its end, or choose another --run_name", one_rank=True)
        except OSError:
            pass  # a file system without locks
        return lock


class RunLog:
    """The run folder's log.jsonl, config.json and loss.png, the console, and wandb. Only rank 0 has one that writes."""

    def __init__(self, folder, cfg, extra, first_step=0):
        """first_step: the step a resumed run goes on with; records of that step and later ones are dropped."""
        self.folder, self.wandb, self.records, self.unwritten = folder, None, [], b""
        path = os.path.join(folder, "log.jsonl")
        config = {k: v for k, v in vars(cfg).items() if k != "explicit"} | extra
        self.lock, self.config = lock_folder(folder), config
        try:
            if first_step:
                give_up_later_checkpoints(folder, first_step)
                self.records = [r for r in read_log(folder) if r["kind"] != "done" and r["step"] < first_step]
                with open(path + ".new", "w", encoding="utf-8") as f:
                    f.writelines(map(self.line, self.records))
                os.replace(path + ".new", path)
            self.open_files()
        except OSError as error:
            os.close(self.lock)
            raise UserError(f"{folder} cannot be written ({error.strerror}): make room, or choose another --out_dir", one_rank=True)
        if cfg.USE_WANDB:
            try:
                import wandb
                self.wandb = wandb.init(project=cfg.wandb_project, name=os.path.basename(folder), config=config, dir=folder)
            except Exception as error:  # no wandb, no network, no login: the run goes on
                print(f"wandb is off: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)

    def open_files(self):
        """Write config.json, and open log.jsonl to append to."""
        with open(os.path.join(self.folder, "config.json"), "w") as f:
            json.dump(self.config, f, indent=2)
        self.file = open(os.path.join(self.folder, "log.jsonl"), "ab", buffering=0)  # unbuffered: what write() did not take is known

    @staticmethod
    def line(record):
        """A record as a line of log.jsonl. JSON has no NaN: a loss that is none is written as null."""
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + "\n"

    def write(self, record):
        """Append one record (a dict with `kind`) to log.jsonl and wandb."""
        self.records.append(record)
        self.write_line(self.line(record))
        if self.wandb is not None:
            try:
                values = {k: v for k, v in record.items() if k not in ("kind", "step")}
                self.wandb.log(dict(paths_of(values, record["kind"])), step=record["step"])
            except Exception as error:
                print(f"wandb is off: {error}", flush=True)
                self.wandb = None

    def write_line(self, line):
        """Append to log.jsonl; where that fails (a full disk), say so and try again with the next line."""
        new, self.unwritten = not self.unwritten, self.unwritten + line.encode()
        try:
            if os.fstat(self.file.fileno()).st_nlink == 0:  # deleted while we wrote to it
                os.makedirs(self.folder, exist_ok=True)
                deleted = self.file
                self.open_files()  # may fail: then the next line tries again
                deleted.close()
                lock = lock_folder(self.folder)
                os.close(self.lock)
                self.lock = lock
                self.unwritten = "".join(map(self.line, self.records)).encode()
                print("log.jsonl was deleted: it and config.json are written anew", flush=True)
            self.unwritten = self.unwritten[self.file.write(self.unwritten):]
            if not self.unwritten:
                return
            reason = "no room"
        except OSError as error:
            reason = error.strerror
        if new:
            print(f"log.jsonl cannot be written, training goes on: {reason}", flush=True)

    def plot(self):
        """Draw loss.png and, with FP8_STATS_INTERVAL, fp8_stats.png. No picture is worth a run."""
        try:
            self.draw()
        except ImportError:
            pass
        except Exception as error:  # a full disk, a removed folder, a font
            print(f"the run's pictures cannot be drawn: {getattr(error, 'strerror', None) or last_line(error)}", flush=True)

    def draw(self):
        """loss.png: training loss (thin, and smoothed) and val loss over tokens."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        train = [r for r in self.records if r["kind"] == "train" and r["loss"] is not None and math.isfinite(r["loss"])]
        val = [r for r in self.records if r["kind"] == "val" and r["val_loss"] is not None]
        fig, ax = plt.subplots(figsize=(8, 4.5))
        unit, label = (1e6, "million tokens") if (train or val)[-1]["tokens"] >= 2e6 else (1e3, "thousand tokens")
        if train:
            x, loss = [r["tokens"] / unit for r in train], [r["loss"] for r in train]
            ax.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="train loss")
            # A short run is smoothed less: an average over 10 steps would lag behind 40
            curve = smooth(loss, beta=min(0.9, len(loss) / (len(loss) + 20)))
            ax.plot(x, curve, color="tab:blue", linewidth=1.5, label="train loss, smoothed")
        if val:
            ax.plot([r["tokens"] / unit for r in val], [r["val_loss"] for r in val], "o-", color="tab:orange",
                    markersize=4, label="val loss")
            ax.annotate(f"{val[-1]['val_loss']:.3f}", (val[-1]["tokens"] / unit, val[-1]["val_loss"]),
                        textcoords="offset points", xytext=(0, 8), ha="center", color="tab:orange")
        ax.set(xlabel=label, ylabel="cross-entropy (nats per token)")
        ax.set_title(os.path.basename(self.folder), parse_math=False)
        ax.grid(alpha=0.3)
        ax.legend()
        fig.tight_layout()
        temporary = os.path.join(self.folder, ".loss.png")
        fig.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, os.path.join(self.folder, "loss.png"))
        plt.close(fig)
        if any(r["kind"] == "fp8_stats" for r in self.records):
            import fp8_stats
            fp8_stats.plot(self.records, os.path.join(self.folder, "fp8_stats.png"))

    def close(self):
        """Where a run ends, well or not: once is enough."""
        if self.lock is not None:
            self.file.close()
            os.close(self.lock)
            self.lock = None
            if self.wandb is not None:
                self.wandb.finish()


def paths_of(tree, prefix):
    """The leaves of nested dicts as pairs ("prefix/key/key", value)."""
    for key, value in tree.items():
        yield from paths_of(value, f"{prefix}/{key}") if isinstance(value, dict) else [(f"{prefix}/{key}", value)]


def smooth(values, beta=0.9):
    """Exponential moving average with bias correction: a list as long as `values`; skipped steps' (None, not finite) do not count."""
    out, average, weight = [], 0.0, 0.0
    for value in values:
        if value is not None and math.isfinite(value):
            average, weight = beta * average + (1 - beta) * value, beta * weight + (1 - beta)
        out.append(average / weight if weight else math.nan)
    return out


class Progress:
    """A run's training time, speeds and log lines. All ranks count; rank 0 writes."""

    def __init__(self, cfg, procs, log, train_seconds=0.0):
        """train_seconds: of training before a resumed run's first step."""
        self.cfg, self.procs, self.log = cfg, procs, log
        self.flops, self.peak = flops_per_token(cfg), peak_flops(procs.device)
        self.train_seconds, self.speeds, self.val_loss, self.val_losses = train_seconds, [], float("nan"), None
        self.compile_seconds = None

    @property
    def speed(self):
        """Median tokens per second over all steps so far; over those in the log where there was none."""
        logged = [] if self.speeds or not self.log else [r["tok_per_sec"] for r in self.log.records if r["kind"] == "train"]
        return statistics.median_high(self.speeds or logged or [float("nan")])

    def step(self, step, loss, norm, rates, ms, skipped=""):
        """Log optimizer step `step`; raises UserError if its loss is not finite and it was not skipped.

        rates: lr_muon, lr_embed, lr_head, momentum by log.jsonl's names. ms: milliseconds the step took. skipped: why
        the step was not taken; such a record has this as one more field.
        """
        cfg, n = self.cfg, self.cfg.max_iters
        speed = cfg.total_batch_size / ms * 1000
        self.train_seconds += ms / 1000
        self.speeds.append(speed)
        if self.procs.is_main and (step % cfg.log_interval == 0 or step == n - 1 or skipped):
            mfu = self.flops * speed / (self.peak * self.procs.world_size) if self.peak else None
            memory = peak_memory_gb(self.procs.device)
            self.log.write(dict(kind="train", step=step, tokens=(step + 1) * cfg.total_batch_size, loss=loss, grad_norm=norm,
                                **rates, step_ms=ms, tok_per_sec=speed, mfu=mfu, peak_mem_gb=memory,
                                **({"skipped": skipped} if skipped else {})))
            lr = rates["lr_embed"] if rates["lr_muon"] is None else rates["lr_muon"]
            eta = (n - 1 - step) * cfg.total_batch_size / statistics.median(self.speeds[-100:])  # not all: this is on the steps' path
            self.procs.print(f"step {step + 1:>{len(str(n))}}/{n} | loss {loss:7.4f} | norm {norm:8.2e} | lr {lr:.2e} | "
                             f"{ms:7.1f} ms | {speed:,.0f} tok/s | " + (f"MFU {100 * mfu:4.1f}% | " if mfu else "")
                             + f"{memory:.1f} GB | ETA {format_duration(eta)}" + (f" | SKIPPED: {skipped}" if skipped else ""))
        if not skipped and not math.isfinite(loss + norm):
            raise UserError(f"the loss at step {step} is {loss}, its gradient's norm {norm}: try a lower learning rate or a longer warm-up")

    def val(self, step, val_loss, val_losses=None):
        """Log an evaluation after optimizer step `step`, and draw loss.png. val_losses: {name of each format: loss in it}."""
        self.val_loss, self.val_losses = val_loss, val_losses
        if self.procs.is_main:
            self.log.write(dict(kind="val", step=step, tokens=(step + 1) * self.cfg.total_batch_size, val_loss=val_loss,
                                train_seconds=self.train_seconds, **({"val_losses": val_losses} if len(val_losses or ()) > 1 else {})))
            self.procs.print(f"step {step + 1}/{self.cfg.max_iters} | val loss {val_loss:.4f} over {self.cfg.eval_tokens:,} tokens | "
                             f"{format_duration(self.train_seconds)} of training")
            self.log.plot()

    def done(self):
        """Log the end of the run and say where to look."""
        if self.procs.is_main:
            tokens, memory = self.cfg.max_iters * self.cfg.total_batch_size, peak_memory_gb(self.procs.device)
            self.log.write(dict(kind="done", step=self.cfg.max_iters - 1, tokens=tokens, val_loss=self.val_loss,
                                **({"val_losses": self.val_losses} if self.val_losses else {}),
                                train_seconds=self.train_seconds, tok_per_sec_median=self.speed, peak_mem_gb=memory,
                                compile_seconds=self.compile_seconds))
            self.log.close()
            others = "".join(f", {loss:.4f} in {name}" for name, loss in list((self.val_losses or {}).items())[1:])
            where = f" in {next(iter(self.val_losses))}{others}" if others else ""
            self.procs.print(f"\ndone: val loss {self.val_loss:.4f}{where} after {tokens:,} tokens in {format_duration(self.train_seconds)} "
                             f"of training ({self.speed:,.0f} tokens/s, {memory:.1f} GB)\n"
                             f"run folder: {self.log.folder}  (loss.png: curves; log.jsonl: every step; config.json: all flags)\n"
                             f"next: bash run.sh --help lists the flags; python train_orig.py trains the plain reference")


@contextlib.contextmanager
def profiling(folder, procs):
    """Profile what runs inside: trace.json.gz and, on a GPU, memory.pickle (pytorch.org/memory_viz) to the run folder."""
    cuda = procs.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with torch.profiler.profile(activities=activities) as profile:
        yield
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        if procs.is_main:
            torch.cuda.memory._dump_snapshot(os.path.join(folder, "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    if procs.is_main:
        profile.export_chrome_trace(os.path.join(folder, "trace.json.gz"))
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        # Ranges that optimizers and modules put around their kernels would count them twice
        events = [e for e in profile.key_averages() if e.device_type == kind and "#" not in e.key]
        took = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
        total, counts = sum(took.values()), {e.key: e.count for e in events}
        print(f"profile of one step: {total / 1000:.1f} ms of {'kernels' if cuda else 'operators'}; the ten largest:")
        for key in sorted(took, key=took.get, reverse=True)[:10]:
            print(f"  {took[key] / 1000:9.2f} ms {100 * took[key] / total:5.1f}%  x{counts[key]:<5} {key[:110]}")
        print(f"profile: {os.path.join(folder, 'trace.json.gz')} (ui.perfetto.dev opens it)", flush=True)


class Clock:
    """Marks in time that do not stall the GPU: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start, end):
        if not self.cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)


# =====================================================================================================
# The run


class MicroBatchGraphs:
    """Forward and backward pass of a micro-batch as CUDA graphs: one for a step's first, which writes its gradients and quantizes
    the weights, and one for the others, which add to them. Python is then out of the way between kernels.

    Everything that a graph reads or writes keeps its place: inputs, loss, gradients, scales, quantized weights.
    """

    def __init__(self, parallel, loader, precision, procs):
        self.model, self.loader, self.precision, self.procs = parallel.model, loader, precision, procs
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        self.batch, self.loss = list(loader.peek()), torch.zeros((), device=procs.device)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        # Gradients that autograd adds up: all but the matmuls' own
        self.summed = [p.grad for n, p in self.model.named_parameters() if p.ndim == 1 or n.startswith("embed")]
        for first in (True, False)[:loader.accumulation]:
            self.capture(first)

    def __call__(self, x, y, first):
        """Run one micro-batch, x (B, T) int32, y (B, T) int64; returns its share of the step's loss, a scalar that the next overwrites."""
        self.batch[0].copy_(x)
        self.batch[1].copy_(y)
        self.graphs[first].replay()
        return self.loss

    def capture(self, first):
        self.model.in_place = "write" if first else "add"
        self.graphs[first] = torch.cuda.CUDAGraph()
        # The loader's thread allocates pinned memory meanwhile, which only this thread must not
        with torch.cuda.graph(self.graphs[first], pool=self.pool, capture_error_mode="thread_local"):
            if first:
                torch._foreach_zero_(self.summed)
            with self.precision.autocast(self.procs):
                loss = self.model(*self.batch, first=first) * self.loader.loss_scale
            loss.backward()
            self.loss.copy_(loss.detach())


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
    def content(self):
        """Whether the last step was taken. Only then is a checkpoint due: from weights that no step fits, none could go on."""
        return not self.in_a_row

    def state_dict(self):
        return dict(in_a_row=self.in_a_row, windows={name: list(window) for name, window in self.windows.items()})

    def judge(self, loss, norm):
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


def train_step(parallel, loader, optimizers, cfg, procs, precision, guard=None, tell=tuple, graphs=None):
    """One optimizer step over accumulation x world_size micro-batches; left out where `guard` refuses the gradients.

    tell: gives numbers of this rank that all should know, asked for once the gradients are on their way.
    graphs: MicroBatchGraphs, to run the micro-batches by.
    Returns: mean loss over the step's whole global batch, gradient norm before clipping (floats), why the step was skipped
    ("": it was taken), and the list of told numbers summed over the ranks.

    The host waits for the GPU once, for loss and norm before the optimizer, as nothing else keeps a NaN from all of the
    optimizers: Dion's and bitsandbytes' take no flag from the device, and gradients set to zero would still decay momenta.
    Clipping is launched before the wait and runs meanwhile: about 1.5 ms at 561M parameters on an H100 (it reads and writes
    2.2 GB), longer than the wait's round trip. What may be lost is where the optimizer's first launches take longer
    than their kernels. Predicted below 1% of a step of 65,536 tokens on one GPU, not measured.
    """
    guard, cuda = guard or Guard(cfg), procs.device.type == "cuda"
    restore_scales = keep_scales(parallel.model)
    loss_sum = torch.zeros((), device=procs.device)
    for m in range(loader.accumulation):
        x, y = loader.next()
        if graphs is not None:
            loss_sum += graphs(x, y, m == 0)
            continue
        with parallel.micro_batch(last=m == loader.accumulation - 1):
            with precision.autocast(procs):
                loss = parallel.module(x, y, first=parallel.first_micro_batch(m)) * loader.loss_scale
            loss.backward()
        loss_sum += loss.detach()
    parameters = list(parallel.model.parameters())
    norm = gradient_norm(parameters)
    # torch.full(), as torch.tensor() would wait. One sum for all, so that every rank decides by the same numbers
    told = [torch.full((), float(number), device=procs.device) for number in tell()]
    told = procs.sum(torch.stack([loss_sum / procs.world_size, norm / procs.world_size, *told])).to("cpu", non_blocking=True)
    if cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    clip_gradients(parameters, cfg.grad_clip, norm)
    if cuda:
        arrived.synchronize()
    loss, norm, *told = told.tolist()
    skipped = guard.judge(loss, norm)
    if skipped:
        restore_scales()
    else:
        optimizers.step()
    if graphs is None:
        optimizers.zero_grad()
    return loss, norm, skipped, told


def calibrate(parallel, loader, optimizers, procs, precision):
    """A forward and backward pass on the next micro-batch, whose gradients are thrown away.

    It compiles what is to be compiled, and fills the amax history of delayed scaling, which starts with scale 1:
    gradients of order 1e-7 would all round to zero in E5M2. The loss is scaled as in training, since the largest amax of
    the history counts for FP8_AMAX_HISTORY micro-batches. Weights, optimizers and data position stay as they are; so do the
    scales where loss or gradients are not finite.
    """
    restore_scales = keep_scales(parallel.model)
    x, y = loader.peek()
    with parallel.micro_batch(last=True):
        with precision.autocast(procs):
            loss = parallel.module(x, y, first=parallel.first_micro_batch(0)) * loader.loss_scale
        loss.backward()
    if not math.isfinite(procs.sum(loss.detach() + gradient_norm(parallel.model.parameters()))):
        restore_scales()
    optimizers.zero_grad()


def run(cfg, procs):
    """Train by the flags from start to end; returns the run folder."""
    with contextlib.ExitStack() as leaving:  # undoes what must be undone however the run ends: others may follow in this process
        return run_within(cfg, procs, leaving)


def run_within(cfg, procs, leaving):
    """run(); `leaving` takes what must be undone."""
    check_flags(cfg, procs.world_size)
    device = procs.device
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed)
    random.seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # Data and checkpoint first: what is missing should be known before anything is built
    loader, val_ring = open_data(cfg, procs)
    leaving.callback(loader.close)
    checkpoint, meta = checkpoint_to_resume(cfg, procs)
    first_step = meta["step"] if meta else 0
    if meta:
        check_data(checkpoint, meta, loader.ring)

    # Model
    precision = select_precision(cfg, device)
    use_compile = device.type == "cuda" if cfg.USE_COMPILE == "auto" else cfg.USE_COMPILE
    compiled = functools.cache(lambda f: torch.compile(f, dynamic=False)) if use_compile else (lambda f: f)
    if precision.emulated:
        precision.te.compile_kernels(use_compile)
        precision.te.manual_seed(cfg.seed + procs.rank)  # stochastic rounding
    model = GPT(cfg, precision.te, compiled, device)
    in_bf16 = keep_high_precision(model, cfg.HIGH_PRECISION_LAYERS, precision.te)
    n_params = sum(p.numel() for p in model.parameters())
    wrapper, why_wrapper = choose_wrapper(cfg, procs, n_params)
    if cfg.USE_8BIT_ADAM:
        import_bitsandbytes(procs, wrapper == "fsdp2")
    parallel = Parallel(model, wrapper, cfg, procs)
    optimizers = Optimizers(model, cfg, procs, sharded=wrapper == "fsdp2")

    # What is about to run, in one table
    folder = run_folder_of(checkpoint) if checkpoint else None
    if not folder:
        folder = procs.broadcast(make_run_folder(cfg.out_dir, cfg.run_name) if procs.is_main else None)
        leaving.callback(remove_if_empty, folder)
    machine = describe_machine(device)
    rows = [
        ("device", f"{procs.world_size} x {machine['device']}, torch {torch.__version__}"),
        ("precision", f"{precision.name} {precision.reason}"),
        *([("  head", "FP8 by current scaling" if model.fp8_head else "bf16")] if precision.recipe else []),
        *([("  in bf16", ", ".join(in_bf16))] if in_bf16 else []),
        *([("  without effect", ", ".join(idle))] if (idle := idle_flags(cfg, precision.name)) else []),
        ("wrapper", f"{wrapper} ({why_wrapper})"),
        ("optimizers", optimizers.description),
        ("parameters", f"{n_params:,}"),
        *[(f"  {part}", f"{n:,} = {how}") for part, n, how in model.parameter_table()],
        *data_rows(cfg, procs, loader, val_ring),
        ("run folder", folder),
        *([("resumed from", f"{checkpoint}, after {first_step:,} steps")] if checkpoint else []),
    ]
    procs.print("\n".join(f"{name:<18} {text}" for name, text in rows) + "\n")

    # Compile and calibrate off the clock
    start = time.perf_counter()
    calibrate(parallel, loader, optimizers, procs, precision)
    optimizers.warm_up(model)
    calibrations = cfg.FP8_CALIBRATION_STEPS if precision.name == "fp8-delayed" else 0
    if checkpoint:
        scales = restore(checkpoint, meta, model, optimizers, loader, procs, precision.te)
        for _ in range(0 if scales else calibrations):  # no scales to go on with: as many passes as a fresh run makes
            calibrate(parallel, loader, optimizers, procs, precision)
    log = RunLog(folder, cfg, dict(machine, started_at=time.time(), torchrun=os.environ.get("TORCHELASTIC_RUN_ID"),
                                   world_size=procs.world_size, wrapper=wrapper, precision=precision.name,
                                   emulated=precision.emulated, optimizers=optimizers.description,
                                   parameters=n_params), first_step) if procs.is_main else None
    if log:
        leaving.callback(log.close)
    checkpoints, stop = Checkpoints(folder, cfg, procs), leaving.enter_context(StopSignal())
    checkpoints.prepare(lambda: training_state(model, optimizers, procs, precision.te))
    clock, progress = Clock(device), Progress(cfg, procs, log, meta["train_seconds"] if meta else 0.0)
    clock.ms(clock.mark(), clock.mark())  # waits for the GPU
    progress.compile_seconds = time.perf_counter() - start
    procs.print(f"ready after {progress.compile_seconds:.1f} s of compiling and calibration\n")
    gc.collect()
    gc.freeze()
    gc.disable()  # collections would stall ranks at different times; below they run together
    leaving.callback(gc.unfreeze)
    leaving.callback(gc.enable)

    def finish(step, rates, loss, norm, skipped, begin, end):
        """Log a step that was launched before; waits until the GPU is done with it, not with what came after."""
        progress.step(step, loss, norm, rates, clock.ms(begin, end), skipped)

    def save(steps):
        """Start a checkpoint after so many optimizer steps."""
        pause = checkpoints.save(steps, lambda: training_state(model, optimizers, procs, precision.te), dict(
            step=steps, tokens=steps * cfg.total_batch_size, world_size=procs.world_size, loader=loader.state_dict(),
            data=data_mark(loader.ring, steps * cfg.total_batch_size),
            train_seconds=progress.train_seconds, parameters=n_params, versions=machine["versions"], **optimizers.meta,
            guard=guard.state_dict(), saved_at=time.time(), flags={k: v for k, v in vars(cfg).items() if k != "explicit"}))
        if cfg.keep_checkpoints:
            procs.print(f"step {steps}/{cfg.max_iters} | checkpoint: training stood still for {pause:.2f} s")

    def tell():
        """Whether this rank was told to stop, and, by the clock of rank 0 alone, whether a checkpoint is due."""
        return bool(stop.requested), procs.is_main and 0 < 60 * cfg.ckpt_minutes <= time.monotonic() - last_save

    formats = ["bf16"] if precision.recipe is None else ["bf16", precision.name][::1 if cfg.EVAL_PRECISION == "bf16" else -1]

    def watch_quantization(step):
        """Log what the format does to each tensor of the next micro-batch (FP8_STATS_INTERVAL); training is not touched."""
        import fp8_stats
        start = time.perf_counter()
        layers = fp8_stats.collect(model, *loader.peek(), precision.recipe, fp8_state(model), in_bf16, loader.loss_scale,
                                   LOGIT_GRAD_SCALE if model.fp8_head else None)
        if log:
            log.write(dict(kind="fp8_stats", step=step, tokens=(step + 1) * cfg.total_batch_size, format=precision.name,
                           seconds=time.perf_counter() - start, layers=layers))

    def evaluate_after(step):
        """Val loss with the matmuls in one format, after the last step in both; delayed scaling's state stays as it is."""
        with scales_kept(model):
            val_losses = {name: evaluate(model, val_ring, cfg, procs, lambda: precision.autocast(procs, quantized=name != "bf16"), checkpoints.finish)
                          for name in formats[:2 if step == cfg.max_iters - 1 else 1]}
        progress.val(step, val_losses[formats[0]], val_losses)
        gc.collect()

    def evaluation_due(step):
        return step == cfg.max_iters - 1 or bool(cfg.eval_interval) and (step + 1) % cfg.eval_interval == 0

    # A run that was killed after a checkpoint may lack the evaluation that follows it
    vals = {r["step"]: r for r in log.records if r["kind"] == "val"} if log else {}  # rank 0 decides
    if first_step - 1 in vals:
        progress.val_loss, progress.val_losses = vals[first_step - 1]["val_loss"], vals[first_step - 1].get("val_losses")
    lacking = evaluation_due(first_step - 1) and first_step - 1 not in vals and (first_step == cfg.max_iters or log and log.records)
    if procs.broadcast(bool(first_step and lacking)):
        evaluate_after(first_step - 1)

    guard, last_save = Guard(cfg, meta and meta.get("guard")), time.monotonic()
    pending, graphs, told_to_stop = None, None, 0
    for step in range(first_step, cfg.max_iters):
        rates = optimizers.set_schedule(step)
        if 0 < step < calibrations:
            # Head and output projections start at zero, so deeper gradients only appear step by step
            calibrate(parallel, loader, optimizers, procs, precision)
        if cfg.USE_CUDA_GRAPHS and model.fused is not None and wrapper == "none" and step == max(first_step + 3, calibrations):
            graphs = MicroBatchGraphs(parallel, loader, precision, procs)
        begin = clock.mark()
        profiled = cfg.USE_PROFILE and step == min(first_step + 5, cfg.max_iters - 1)
        with profiling(folder, procs) if profiled else contextlib.nullcontext():
            loss, norm, skipped, (told_to_stop, save_due) = train_step(
                parallel, loader, optimizers, cfg, procs, precision, guard, tell, graphs)
        end = clock.mark()
        if pending:
            finish(*pending)
        pending = step, rates, loss, norm, skipped, begin, end
        given_up = guard.in_a_row >= cfg.max_bad_steps
        evaluating = evaluation_due(step)
        due = save_due or cfg.ckpt_interval and (step + 1) % cfg.ckpt_interval == 0
        saving = step == cfg.max_iters - 1 or told_to_stop or due and guard.content
        watching = cfg.FP8_STATS_INTERVAL and (step + 1) % cfg.FP8_STATS_INTERVAL == 0
        if evaluating or saving or watching or given_up:
            finish(*pending)
            pending = None
        if given_up:
            checkpoints.finish(wait=True)  # one that is being written would be lost
            raise UserError(f"{guard.in_a_row} steps in a row were skipped, the last at step {step} ({skipped}): try a lower learning "
                            f"rate, a longer warm-up, other data; the newest checkpoint: {checkpoints.last or 'none'}")
        if watching:
            watch_quantization(step)
        if saving:  # first: an evaluation leaves FSDP2's weights gathered, in bf16
            save(step + 1)
            last_save = time.monotonic()
        if evaluating:
            if told_to_stop:
                checkpoints.finish(wait=True)  # first things first
            evaluate_after(step)
        checkpoints.finish()
        if told_to_stop:
            break
    checkpoints.close()
    if not told_to_stop or step == cfg.max_iters - 1:
        progress.done()
    else:
        newest = procs.broadcast(checkpoints.last)
        if cfg.keep_checkpoints and (newest is None or steps_of(newest) != step + 1):
            raise UserError(f"stopped by a signal after {step + 1} steps, but their checkpoint could not be written; "
                            f"the newest: {newest or 'none'}")
        procs.print(f"\nstopped by a signal after {step + 1} steps; the same command with --resume=auto goes on from "
                    f"{newest or 'the start: no checkpoint was kept'}")
    if procs.local_rank == 0 and "ENDED_WELL" in os.environ:  # torchrun returns 1 where it was signalled: run.sh looks here
        open(os.environ["ENDED_WELL"], "w").close()
    return folder


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


class Watch:
    """Signs of life among ranks: each counts in a store every second, and ends, naming it, when another's count stands still.

    Without it, a rank that died on another machine leaves the others waiting for NCCL's timeout, and unnamed. A thread
    counts, not the training loop: ranks may compile, evaluate or save for as long as they like. After SIGTERM the wait is
    short: torchrun sends one when a worker has died, and restarts nothing before the others are gone, or killed after 30 s.
    """

    def __init__(self, procs, timeout):
        """timeout: seconds without a sign after which a rank is taken for dead."""
        self.procs, self.timeout, self.leaving = procs, timeout, threading.Event()
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
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.count, self.judge)]
        for thread in self.threads:
            thread.start()

    def count(self):
        number = 0
        with contextlib.suppress(RuntimeError):  # the store went with whoever held it: now all counts stand still
            while not self.leaving.wait(1):
                number += 1
                self.store.set(self.keys[self.procs.rank], str(number))
                for rank, value in enumerate(self.store.multi_get(self.keys)):
                    if self.last[rank][0] != value:
                        self.last[rank] = value, time.monotonic()
                self.heard = time.monotonic()

    def judge(self):
        timeout = self.timeout
        while not self.leaving.wait(1):
            with contextlib.suppress(BlockingIOError):
                if self.signals and {signal.SIGTERM, signal.SIGINT} & {*self.signals.recv(64)}:
                    timeout = min(timeout, 10.0)
            if self.silent(timeout):
                end_now(f"{os.path.basename(sys.argv[0])}: error: {self.obituary(timeout)}", 1)

    def silent(self, seconds):
        """The ranks that gave no sign for so long, but for those that left in good order."""
        now = time.monotonic()
        return [rank for rank, (value, since) in self.last.items()
                if value != b"left" and now - since > seconds and rank != self.procs.rank]

    def obituary(self, seconds):
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
        self.leaving.set()
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


def too_little_memory(error, cfg, procs):
    """What to do about an error, if it is for want of memory; else ""."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
        return ""
    less = [f"--batch_size={cfg.batch_size // 2}"] * (cfg.batch_size > 1) + ["--USE_AC_BLOCKS=True"] * (not getattr(cfg, "USE_AC_BLOCKS", True))
    return (f"rank {procs.rank} has too little {'GPU ' if procs.device.type == 'cuda' else ''}memory for this model and batch_size={cfg.batch_size}"
            + (f"; the same training takes less with {' or '.join(less)}" if less else ""))


def command_line(run, path, argv=None, presets=PRESETS, choices=CHOICES):
    """What a script does when it is started: parse flags, run(cfg, processes), and end wrong input with one line.

    Exit status: 0, or what the UserError says (1 or 2). Of several ranks, one that fails alone ends at once, and so do
    those that it leaves behind.
    """
    watch, script = None, os.path.basename(path)

    def leave(text, status):
        if watch:
            end_now(text, status)
        print(text, file=sys.stderr, flush=True)
        raise SystemExit(status)

    try:
        cfg = parse_flags(sys.argv[1:] if argv is None else argv, os.path.abspath(path), presets, choices)
        procs = start_processes()
        watch = Watch(procs, getattr(cfg, "rank_timeout", 120.0)) if procs.world_size > 1 else None
        return run(cfg, procs)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.one_rank:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        if watch and error.one_rank:
            end_now("", error.status)
        raise SystemExit(error.status)
    except KeyboardInterrupt:  # before training, which takes it as a wish, or a second one
        leave(f"{script}: stopped by Ctrl-C", 130)
    except Exception as error:
        why = too_little_memory(error, cfg, procs)
        if not watch and not why:
            raise
        if not why and isinstance(error, RuntimeError):
            for _ in range(10):  # a collective fails at once when a rank dies: a while later its silence says which
                time.sleep(1)
                if why := watch.obituary(4):
                    break
        leave(f"{script}: error: {why}" if why else traceback.format_exc(), 1)
    finally:
        if watch:
            watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    """Train by command-line flags (default: the program's own); returns the run folder."""
    return command_line(run, __file__, argv)


if __name__ == "__main__":
    main()
