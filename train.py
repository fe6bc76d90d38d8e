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
import difflib
import fnmatch
import functools
import gc
import glob
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

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
USE_FP8 = True                   # block matmuls in FP8; False: bf16
FP8_RECIPE = "delayed"           # "delayed", "current", "block", "mxfp8"
FP8_MARGIN = 0                   # delayed: scale = fp8_max / amax / 2^margin
FP8_AMAX_HISTORY = 1024          # delayed: micro-batches over which the largest amax counts
FP8_CALIBRATION_STEPS = 3        # delayed: first steps preceded by a pass that only fills the amax history
USE_NVFP4 = False                # block matmuls in NVFP4 (takes the place of FP8)
NVFP4_HADAMARD = True            # NVFP4: random Hadamard transform of what goes into weight gradients
NVFP4_STOCHASTIC_ROUNDING = True # NVFP4: round gradients up or down at random, without bias
NVFP4_2D_WEIGHTS = True          # NVFP4: one scale for each 16 x 16 of a weight; False: each 1 x 16
HIGH_PRECISION_LAYERS = ""       # layers that stay in bf16: names or patterns, with commas: "blocks.0,blocks.*.attn.proj"
EVAL_PRECISION = "bf16"          # matmuls of evaluations: "bf16", or "training": in the format of training; at the end both are made
FP8_STATS_INTERVAL = 0           # steps between statistics of what quantizing does to each tensor; 0: none (fp8_stats.py)
USE_EMULATION = "auto"           # "auto" (only where TE or the hardware is missing), True: te_emulation.py always

# Parallelism
USE_FSDP2 = "auto"               # shard parameters, gradients and optimizer state over the ranks
USE_DDP = "auto"                 # replicate them; "auto" for both: none on one rank, DDP where it fits, else FSDP2
FSDP2_RESHARD = False            # FSDP2: free a block's gathered weights after its forward pass (saves memory)
REDUCE_FP32 = True               # add gradients up over ranks in fp32; False: bf16

# Speed and memory
USE_COMPILE = "auto"             # torch.compile for loss, embedding norm, RoPE + QK norm, emulated formats; "auto": with a GPU
USE_TRITON = True                # our own Triton kernel for RoPE + QK norm, on a GPU
USE_AC_LM_HEAD = False           # recompute logits in the backward pass; False: form their gradients in the forward pass
USE_AC_BLOCKS = False            # recompute each block in the backward pass
USE_AC_ATTENTION = False         # recompute RoPE, QK norm and attention in the backward pass
loss_chunk_size = 8192           # tokens whose logits exist at once
USE_PROFILE = False              # profile the fourth step: trace and memory snapshot to the run folder, largest kernels printed

# Evaluation, logging, checkpoints
eval_interval = 125              # steps between evaluations; 0: only at the end
eval_tokens = 10485760           # tokens of the val shards per evaluation (all of them where there are fewer)
log_interval = 1                 # steps between log lines
ckpt_interval = 250              # steps between checkpoints; 0: only at the end (and on SIGTERM or SIGINT)
keep_checkpoints = 2             # the newest so many stay; 0: none is written
USE_WANDB = False                # log to Weights & Biases too
wandb_project = "nanogpt-fp8"    # its project name

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


WHOLE_NUMBERS = set("""FP8_STATS_INTERVAL seed n_layer n_embd n_head vocab_size block_size total_batch_size batch_size max_iters warmup_iters
    muon_momentum_iters FP8_MARGIN FP8_AMAX_HISTORY FP8_CALIBRATION_STEPS loss_chunk_size eval_interval eval_tokens
    log_interval ckpt_interval keep_checkpoints""".split())
TEXTS = set("preset run_name out_dir resume dataset data_dir muon_impl FP8_RECIPE EVAL_PRECISION HIGH_PRECISION_LAYERS wandb_project".split())
OR_AUTO = set("USE_FSDP2 USE_DDP USE_COMPILE USE_EMULATION".split())
SWITCHES = re.compile(r"USE_|FSDP2_|REDUCE_|NVFP4_")  # True or False; what is left takes any number


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
            table[m[1]] = (parse_value(m[1], repr(value) if not isinstance(value, str) else value), m[3] or "", group)
        elif inside and (m := re.match(r"# (\w.*)", line)):
            group = m[1]
    return table


def parse_value(name, text):
    """Turn the text of --name=text into a value of the flag's type; raises UserError."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name in TEXTS:
        kind, ok, value = "text", True, text
    elif name in OR_AUTO:
        kind, ok = "auto, True or False", value == "auto" or isinstance(value, bool)
    elif SWITCHES.match(name):
        kind, ok = "True or False", isinstance(value, bool)
    elif name in WHOLE_NUMBERS:
        kind, ok = "a whole number", number and isinstance(value, int)
    else:
        kind, ok, value = "a number", number, float(value) if number else value
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
        given[name] = parse_value(name, text)
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
                "loss_chunk_size eval_tokens log_interval FP8_AMAX_HISTORY norm_eps rope_base adam_eps").split()
    not_negative = ("warmup_iters ckpt_interval keep_checkpoints eval_interval grad_clip logit_softcap min_lr_ratio muon_momentum_iters "
                    "FP8_CALIBRATION_STEPS FP8_STATS_INTERVAL learning_rate learning_rate_embed learning_rate_head "
                    "learning_rate_gain weight_decay weight_decay_embed weight_decay_head weight_decay_gain").split()
    for name in positive:
        if hasattr(cfg, name) and getattr(cfg, name) <= 0:
            raise UserError(f"--{name} must be above 0, not {getattr(cfg, name)}", 2)
    for name in not_negative:
        if hasattr(cfg, name) and getattr(cfg, name) < 0:
            raise UserError(f"--{name} must not be negative, but is {getattr(cfg, name)}", 2)
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
        store = dist.HashStore() if world_size == 1 else None
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

    for name in chosen:
        layer = model.get_submodule(name)
        layer.forward = in_bf16(layer.forward)
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


@contextlib.contextmanager
def scales_kept(model):
    """Whatever quantizes inside leaves the delayed-scaling state as it was: Transformer Engine notes amaxes even without
    gradients, and the next training step would count them."""
    kept = {name: tensor.clone() for name, tensor in fp8_state(model).items()}
    try:
        yield
    finally:
        for name, tensor in fp8_state(model).items():
            if name in kept:
                tensor.copy_(kept[name])


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


if triton is not None:

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
    def rope_qk_norm_backward(grad, qkv, cos, sin, rstd, n_rows, T, heads, C3, HALF: tl.constexpr, ROWS: tl.constexpr):
        """The gradient in place, from the forward pass's outputs y: rstd * (dy - y * mean(dy * y)), rotated back."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token, d, mask = row // heads, tl.arange(0, HALF)[None, :], (row < n_rows)[:, None]
        at = token.to(tl.int64)[:, None] * C3 + (row % heads)[:, None] * (2 * HALF) + d
        angle = (token % T)[:, None] * HALF + d
        c, s = tl.load(cos + angle, mask=mask), tl.load(sin + angle, mask=mask)
        y1 = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
        y2 = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
        g1 = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(grad + at + HALF, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < n_rows, other=0.0)[:, None]
        dot = (tl.sum(g1 * y1 + g2 * y2, axis=1) / (2 * HALF))[:, None]
        g1, g2 = r * (g1 - y1 * dot), r * (g2 - y2 * dot)
        tl.store(grad + at, (g1 * c + g2 * s).to(tl.bfloat16), mask=mask)
        tl.store(grad + at + HALF, (g2 * c - g1 * s).to(tl.bfloat16), mask=mask)


class FusedRopeQKNorm(torch.autograd.Function):
    """rope_qk_norm in one pass over memory each way, in place of qkv, whose own values nothing needs any more.

    q, k and v stay parts of one (B, T, 3, H, D) tensor, which attention takes as it is (TE's layout bs3hd); the
    backward pass needs only that tensor and the norms. Against the compiled version it keeps 8 C bytes a token and layer
    less: qkv itself, and a copy of v.
    """

    ROWS = 16

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, eps):
        B, T, C3 = qkv.shape
        rows, half = B * T * 2 * n_head, C3 // 3 // n_head // 2
        rstd = torch.empty(rows, dtype=torch.float32, device=qkv.device)
        grid = (triton.cdiv(rows, FusedRopeQKNorm.ROWS),)
        rope_qk_norm_forward[grid](qkv, cos, sin, rstd, rows, T, 2 * n_head, C3, eps, half, FusedRopeQKNorm.ROWS)
        packed = qkv.detach().view(B, T, 3, n_head, 2 * half)
        ctx.save_for_backward(packed, rstd, cos, sin)
        return packed.unbind(2)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        packed, rstd, cos, sin = ctx.saved_tensors
        B, T, _, n_head, D = packed.shape
        parts, C = (dq, dk, dv), n_head * D
        together = all(g.stride() == packed.stride()[:2] + packed.stride()[3:] and g.data_ptr() == dq.data_ptr() + i * C * 2
                       and g.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr() for i, g in enumerate(parts))
        grad = dq.as_strided(packed.shape, packed.stride()) if together else torch.stack(parts, dim=2)
        grid = (triton.cdiv(len(rstd), FusedRopeQKNorm.ROWS),)
        rope_qk_norm_backward[grid](grad, packed, cos, sin, rstd, len(rstd), T, 2 * n_head, 3 * C, D // 2, FusedRopeQKNorm.ROWS)
        return grad.view(B, T, 3 * C), None, None, None, None


def choose_rope_qk_norm(cfg, compiled, device):
    """FusedRopeQKNorm on a GPU where its shapes fit, else rope_qk_norm through torch.compile.

    Not with USE_AC_ATTENTION, which computes twice from the same qkv.
    """
    half = cfg.n_embd // cfg.n_head // 2
    fits = half & (half - 1) == 0 and not cfg.USE_AC_ATTENTION and triton is not None and device.type == "cuda"
    return FusedRopeQKNorm.apply if cfg.USE_TRITON and fits else compiled(rope_qk_norm)


def spectral_init(weight):
    """Normal with std = 1/sqrt(fan_in) * min(1, sqrt(fan_out/fan_in)) (arXiv 2310.17813)."""
    fan_out, fan_in = weight.shape
    return nn.init.normal_(weight, std=fan_in ** -0.5 * min(1.0, math.sqrt(fan_out / fan_in)))


class Attention(nn.Module):
    """RMSNorm -> q, k, v -> RoPE and QK norm -> causal attention -> output projection."""

    def __init__(self, cfg, te, compiled, device):
        super().__init__()
        self.n_head, self.eps, self.recompute, self.te = cfg.n_head, cfg.norm_eps, cfg.USE_AC_ATTENTION, te
        self.rope_qk_norm = choose_rope_qk_norm(cfg, compiled, device)
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

    def forward(self, x, cos, sin, first):
        x = x + self.attn(x, cos, sin, first)
        return x + self.mlp(x, is_first_microbatch=first)


class LMHead(nn.Module):
    """Output projection with logit softcap, and the loss over it in chunks of tokens."""

    def __init__(self, cfg, compiled, device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cfg.vocab_size, cfg.n_embd, device=device))
        self.softcap, self.chunk, self.recompute = cfg.logit_softcap, cfg.loss_chunk_size, cfg.USE_AC_LM_HEAD
        self.kernels = SimpleNamespace(loss=compiled(softcap_cross_entropy), both=compiled(softcap_cross_entropy_and_grad))

    def forward(self, h, targets=None):
        """h: (B, T, C) bf16. With targets (B, T) int64 (-1: no target): the summed loss, a scalar fp32.
        Without: logits (B, T, V) fp32 after the softcap."""
        if targets is None:
            logits = matmul(h.flatten(0, 1), self.weight.to(h.dtype).t()).float()
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits.view(*h.shape[:2], -1)
        return ChunkedCrossEntropy.apply(h.flatten(0, 1), self.weight, targets.flatten(), self.softcap, self.chunk,
                                         self.recompute or not torch.is_grad_enabled(), self.kernels)


class GPT(nn.Module):
    """Token embedding -> RMSNorm -> blocks -> RMSNorm with gain -> head with softcap.

    Parameters are fp32 (the master weights); matmuls run in bf16, FP8 or NVFP4 by the context of the call.
    """

    def __init__(self, cfg, te, compiled, device):
        super().__init__()
        self.cfg, self.te = cfg, te
        self.embed_norm = compiled(rms_norm)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd, device=device)
        self.blocks = nn.ModuleList(Block(cfg, te, compiled, device) for _ in range(cfg.n_layer))
        self.norm = te.RMSNorm(cfg.n_embd, eps=cfg.norm_eps, dtype=torch.float32, device=device)
        self.head = LMHead(cfg, compiled, device)
        # arXiv 2310.17813 for one-hot inputs: entries of order 1 (the RMSNorm after it takes any scale)
        nn.init.normal_(self.embed.weight, std=1.0)
        half = cfg.n_embd // cfg.n_head // 2
        angle = torch.outer(torch.arange(cfg.block_size, dtype=torch.float64),
                            cfg.rope_base ** (-torch.arange(half, dtype=torch.float64) / half))
        # Plain attributes: nothing to save, and never cast to bf16 (bf16 cannot tell position 2047 from 2048)
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)  # (T, D/2)

    def forward(self, idx, targets=None, first=None):
        """Summed loss over the targets (scalar fp32), or logits (B, T, V) fp32 if there are none.

        Args:
            idx: (B, T) int32 token ids.
            targets: (B, T) int64, -1 where there is nothing to predict.
            first: True in a step's first micro-batch, False in the others, so that TE quantizes each weight
                once a step; None: quantize anew.
        """
        x = self.embed_norm(self.embed(idx), self.cfg.norm_eps)            # (B, T, C) bf16
        for block in self.blocks:
            if self.cfg.USE_AC_BLOCKS and self.training:
                x = self.te.checkpoint(block, x, self.cos, self.sin, first, use_reentrant=False)
            else:
                x = block(x, self.cos, self.sin, first)
        return self.head(self.norm(x), targets)

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
# Loss: head, softcap and cross-entropy in chunks, so that all logits never exist at once


def matmul_operand(x, dtype):
    """x rounded to `dtype`; a CPU keeps those values in fp32, once for all the matmuls they go into."""
    return x.to(dtype) if x.is_cuda else x.to(dtype).float()


def matmul(a, b, out=None):
    """a @ b of bf16 matrices with fp32 accumulation, in bf16; or added onto `out` (fp32).

    A CPU multiplies in fp32, which holds the same products exactly and is fast on every CPU.
    """
    if a.is_cuda:
        return a @ b if out is None else torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    with torch.autocast("cpu", enabled=False):  # which would make the matmul bf16 again
        return a.float() @ b.float() if out is None else out.addmm_(a.float(), b.float())


def softcap_cross_entropy(logits, targets, softcap):
    """Summed cross-entropy of softcapped logits. logits (N, V), targets (N,) int64, -1 ignored. Scalar fp32."""
    z = logits.float()
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    picked = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return ((torch.logsumexp(z, dim=1) - picked) * (targets >= 0)).sum()


def softcap_cross_entropy_and_grad(logits, targets, softcap):
    """The summed loss as above, and its gradient for the logits before the softcap, (N, V) in the logits' dtype.

    Overwrites fp32 logits: in-place operations halve the time of the eager version, and cost the compiled one nothing.
    """
    z = logits.float()
    if softcap:
        t = z.div_(softcap).tanh_()
        z = t * softcap
    valid, index = targets >= 0, targets.clamp(min=0)[:, None]
    lse = torch.logsumexp(z, dim=1)
    loss = ((lse - z.gather(1, index)[:, 0]) * valid).sum()
    # d loss / d z = softmax(z) - onehot(target);  d z / d logits = 1 - tanh^2
    grad = z.sub_(lse[:, None]).exp_()
    if torch.compiler.is_compiling():  # fuses into one kernel, where scatter would not
        grad = grad - (torch.arange(grad.shape[1], device=grad.device) == index).float()
    else:
        grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    if softcap:
        grad = grad.mul_(t.square_().neg_().add_(1))
    return loss, grad.mul_(valid[:, None]).to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of softcap(h @ weight.T) against targets, `chunk` tokens at a time.

    With recompute=False the gradients of h and weight are formed chunk by chunk in the forward pass, while the
    logits are there anyway; with True the forward pass keeps nothing and the backward pass makes the logits again.

    forward arguments: h (N, C) bf16, weight (V, C), targets (N,) int64 with -1 ignored, softcap (0: none).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, softcap, chunk, recompute, kernels):
        w = matmul_operand(weight, h.dtype)
        ctx.arguments = softcap, chunk, kernels
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needs_grad and not recompute:
            loss, dh, dw = ChunkedCrossEntropy.loss_and_grads(h, w, targets, softcap, chunk, kernels)
            ctx.grads = dh, dw.to(weight.dtype)
            return loss
        if needs_grad:
            ctx.save_for_backward(h, weight, targets)
        return sum(kernels.loss(matmul(hc, w.t()), tc, softcap) for hc, tc in zip(h.split(chunk), targets.split(chunk)))

    @staticmethod
    def loss_and_grads(h, w, targets, softcap, chunk, kernels):
        """Loss, its gradient for h (N, C) bf16, and for the weight (V, C) fp32."""
        loss = torch.zeros((), device=h.device)
        dh, dw = torch.empty_like(h), torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        for hc, tc, dhc in zip(h.split(chunk), targets.split(chunk), dh.split(chunk)):
            loss_c, dlogits = kernels.both(matmul(hc, w.t()), tc, softcap)
            loss += loss_c
            dhc.copy_(matmul(dlogits, w))
            matmul(dlogits.t(), hc, out=dw)
        return loss, dh, dw

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.saved_tensors:
            h, weight, targets = ctx.saved_tensors
            _, dh, dw = ChunkedCrossEntropy.loss_and_grads(h, matmul_operand(weight, h.dtype), targets, *ctx.arguments)
            dw = dw.to(weight.dtype)
        else:
            (dh, dw), ctx.grads = ctx.grads, None
        return dh.mul_(grad_loss), dw.mul_(grad_loss), None, None, None, None, None


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


def dion_muon(choice, device):
    """Dion's Muon class, or None and the reason why torch.optim.Muon takes its place."""
    if choice == "torch":
        return None, "muon_impl=torch"
    why = ""
    try:
        from dion import Muon
    except ImportError as error:
        why = f"Dion cannot be imported ({error})"
    if not why and device.type == "cpu" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        why = "Dion compiles its kernels and there is no C++ compiler"
    if why and choice == "dion":
        raise UserError(f"muon_impl=dion, but {why}: install requirements.txt, or --muon_impl=auto")
    return (None, why) if why else (Muon, "")


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

        Muon, why = dion_muon(cfg.muon_impl, procs.device)
        if Muon is not None:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # Dion's many shapes
            # Dion shares the work out: by the mesh where parameters are sharded, by the group where they are whole.
            # Without its Triton kernels (use_triton): with them the first start took minutes (results/NOTES.md).
            mesh = procs.mesh if sharded else procs.mesh.get_group() if procs.world_size > 1 else None
            self.muon = Muon(muon_groups, mesh, nesterov=True, adjust_lr="spectral_norm")
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
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    @property
    def meta(self):
        """What a checkpoint must know of Muon to read its buffers: whose they are, and their momentum."""
        return dict(muon="torch" if isinstance(self.muon, TorchMuon) else "dion", muon_momentum=float(self.muon_groups[0]["mu"]))

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
    # fp32 weights, gradients, DDP's buckets share the gradients, up to two moments: 16 bytes a parameter
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
        self.model, self.module, self.wrapper = model, model, wrapper
        if wrapper == "ddp":
            # Buckets are views of the gradients: no second copy of them
            self.module = DistributedDataParallel(model, process_group=procs.mesh.get_group(), gradient_as_bucket_view=True,
                                                  device_ids=[procs.device] if procs.device.type == "cuda" else None)
            if not cfg.REDUCE_FP32:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
                # DDP knows torch's own hook by its name and refuses it without NCCL; gloo takes bf16 as well
                self.module.register_comm_hook(procs.mesh.get_group(), lambda group, bucket: bf16_compress_hook(group, bucket))
        elif wrapper == "fsdp2":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16,
                                          reduce_dtype=torch.float32 if cfg.REDUCE_FP32 else torch.bfloat16)
            for part in (model.embed, *model.blocks, model.head):
                fully_shard(part, mesh=procs.mesh, mp_policy=policy, reshard_after_forward=cfg.FSDP2_RESHARD)
            fully_shard(model, mesh=procs.mesh, mp_policy=policy, reshard_after_forward=False)

    def first_micro_batch(self, m):
        """What TE is told of micro-batch m: it quantizes weights in a step's first one and keeps them for the others.
        Not under FSDP2, where the whole weights come and go."""
        return None if self.wrapper == "fsdp2" else m == 0

    @contextlib.contextmanager
    def micro_batch(self, last):
        """Forward and backward of one micro-batch; gradients go over the ranks in the step's last one only."""
        if self.wrapper == "fsdp2":
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        with self.module.no_sync() if self.wrapper == "ddp" and not last else contextlib.nullcontext():
            yield


def clip_gradients(parameters, max_norm):
    """Scale the gradients to at most max_norm (0: leave them); returns their global norm, a scalar tensor."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
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


def find_checkpoint(path):
    """The newest complete checkpoint at or below `path` (a checkpoint, a run folder, or a folder of runs), or None.

    Only a folder with meta.json counts: it is written last, before the folder gets its name.
    """
    if os.path.isfile(os.path.join(path, "meta.json")):
        return path
    patterns = [os.path.join(glob.escape(path), *middle, "step_*", "meta.json") for middle in ((), ("ckpt",), ("*", "ckpt"))]
    found = [f for pattern in patterns for f in glob.glob(pattern)]
    return os.path.dirname(max(found, key=lambda f: (os.path.getmtime(f), f))) if found else None


def run_folder_of(checkpoint):
    """The run folder that a checkpoint lies in, or None for one that was moved out of it."""
    folder, name = os.path.split(os.path.dirname(os.path.abspath(checkpoint)))
    return folder if name == "ckpt" and os.path.isfile(os.path.join(folder, "config.json")) else None


def read_checkpoint(folder):
    """meta.json of a checkpoint: step (optimizer steps done), tokens, flags, loader, ... Raises UserError if it is none."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
            meta["step"], meta["flags"].items(), meta["loader"]  # what another file would not have
            return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no complete checkpoint ({error!r}): name a folder step_NNNNNN, a run folder, or leave it out")


def load_tensors(folder, state, no_dist=False):
    """Fill the tensors of a nested dict from a checkpoint, in place; raises UserError if one is missing or has another shape."""
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"checkpoint {folder} cannot be loaded: {text[-1]}", one_rank=True)


def load_weights(folder, tensors):
    """Fill {parameter name: tensor} from a checkpoint, in this process alone; it may have been saved by any number."""
    load_tensors(folder, {"model": tensors}, no_dist=True)


class Checkpoints:
    """Saves to <run folder>/ckpt/step_NNNNNN while training goes on, and keeps the newest few.

    torch.distributed.checkpoint copies the tensors aside (to pinned memory on a GPU), and a thread writes them over a
    gloo group of its own. The folder has a temporary name until everything is on disk, meta.json last. A write that
    fails is reported, and training goes on.
    """

    def __init__(self, folder, cfg, procs, first_step=0):
        """first_step: what a resumed run goes on from; later checkpoints of its folder go, as their log lines did."""
        self.folder, self.keep, self.procs = os.path.join(folder, "ckpt"), cfg.keep_checkpoints, procs
        self.group = dist.new_group(backend="gloo")
        self.pending = self.stager = None
        if procs.is_main:  # what a killed run left half written or half deleted; what else lies there is none of ours
            for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
                path = os.path.join(self.folder, name)
                m = re.fullmatch(r"(step|\.writing|\.replaced)_(\d+)", name)
                whole = m and m[1] == "step" and os.path.isfile(os.path.join(path, "meta.json"))
                if m and (not whole or 0 < first_step < int(m[2])):
                    shutil.rmtree(path, ignore_errors=True)
        dist.barrier(self.group)
        self.last = find_checkpoint(self.folder)

    def save(self, step, make_state, meta):
        """Start a checkpoint of make_state() after `step` optimizer steps; returns the seconds that training stood still."""
        if not self.keep:
            return 0.0
        start = time.perf_counter()
        self.finish(wait=True)  # of the checkpoint before, should it still be under way
        temporary = os.path.join(self.folder, f".writing_{step:06d}")
        cuda = self.procs.device.type == "cuda"
        try:
            self.stager = self.stager or dcp.staging.DefaultStager(dcp.staging.StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda))
            future = dcp.async_save(make_state(), checkpoint_id=temporary, process_group=self.group, async_stager=self.stager)
            self.pending = step, meta, temporary, future
        except (Exception, CheckpointException) as error:
            self.failed(step, temporary, error)
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
                shutil.rmtree(os.path.join(self.folder, f".replaced_{step:06d}"), ignore_errors=True)
                self.last = final
                complete = [os.path.dirname(f) for f in glob.glob(os.path.join(glob.escape(self.folder), "step_*", "meta.json"))]
                complete.sort(key=lambda f: int(f.rsplit("_", 1)[1]))
                for old in [f for f in complete if f != final][:-self.keep + 1 or None]:
                    os.remove(os.path.join(old, "meta.json"))  # half deleted, it must not count
                    shutil.rmtree(old, ignore_errors=True)
        except (Exception, CheckpointException) as error:
            self.failed(step, temporary, error)

    def failed(self, step, temporary, error):
        text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        self.procs.print(f"checkpoint at step {step} failed, training goes on: {text}")
        if self.procs.is_main:
            shutil.rmtree(temporary, ignore_errors=True)

    def close(self):
        self.finish(wait=True)
        if self.stager is not None:
            self.stager.close()
        dist.barrier(self.group)  # ranks leave together, after rank 0 has named the last one


def checkpoint_to_resume(cfg, procs):
    """(checkpoint folder, its meta) by the flag `resume`, or (None, None) for a fresh start; refuses flags that differ.

    The harmless differences are printed.
    """
    if not cfg.resume:
        return None, None
    if cfg.resume == "auto":
        runs = [os.path.join(cfg.out_dir, cfg.run_name)]
        runs += [f for f in glob.glob(glob.escape(runs[0]) + "-*") if re.fullmatch(re.escape(runs[0]) + r"-\d+", f)]
        found = [f for f in map(find_checkpoint, runs) if f]
        # gpt-2 may be the second run called gpt, or one that was called gpt-2
        found = [f for f in found if run_folder_of(f) == os.path.abspath(runs[0]) or read_checkpoint(f)["flags"]["run_name"] == cfg.run_name]
        folder = max(found, key=lambda f: os.path.getmtime(os.path.join(f, "meta.json"))) if found else None
    else:
        folder = find_checkpoint(cfg.resume)
        if folder is None:
            raise UserError(f"--resume={cfg.resume}: there is no complete checkpoint at or below it", 2)
    folder = procs.broadcast(folder)
    if folder is None:
        procs.print(f"resume=auto: {os.path.join(cfg.out_dir, cfg.run_name)} has no complete checkpoint, starting afresh")
        return None, None
    meta = read_checkpoint(folder)
    changed = {k: (v, getattr(cfg, k)) for k, v in meta["flags"].items() if hasattr(cfg, k) and getattr(cfg, k) != v}
    for name in FIXED_FLAGS:
        if name in changed:
            was, now = changed[name]
            raise UserError(f"{folder} was trained with {name}={was}, which cannot become {now}: leave --{name} as it was", 2)
    if meta["step"] >= cfg.max_iters:
        raise UserError(f"{folder} has done {meta['step']} steps, and max_iters is {cfg.max_iters}: raise --max_iters", 2)
    for name, (was, now) in changed.items():
        if name not in ("resume", "out_dir", "run_name"):
            procs.print(f"resume: {name} was {was}, is now {now}")
    return folder, meta


def restore(folder, meta, model, optimizers, loader, procs, te):
    """Put a checkpoint's state back into model, optimizers, loader, scales and generators.

    Scales come back if the checkpoint has them, generators if the world size is the same; returns whether scales did.
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
    return bool(scales)


# =====================================================================================================
# Evaluation


@torch.no_grad()
def evaluate(model, ring, cfg, procs, autocast):
    """Mean loss of `model` over the first eval_tokens of the val shards, all ranks taking part.

    Sequence s is tokens s*T ... s*T + T of the ring. Rank r takes sequences r, r + world_size, ...; where they do
    not fill a batch, rows without targets do, so that the result is the same for any world and batch size, and all
    ranks make the same number of passes. `autocast()` is the context of a pass: bf16 or the format of training.
    `model` is the plain one: DDP has nothing to do without gradients.
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
    """What config.json keeps of the machine: device, versions, git commit."""
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
    return dict(device=name, versions=versions, git_commit=git.stdout.strip() or None if git else None)


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
            raise UserError(f"cannot make the run folder {folder} ({error.strerror}): choose another --out_dir")


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


class RunLog:
    """The run folder's log.jsonl, config.json and loss.png, the console, and wandb. Only rank 0 has one that writes."""

    def __init__(self, folder, cfg, extra, first_step=0):
        """first_step: the step a resumed run goes on with; records of that step and later ones are dropped."""
        self.folder, self.wandb, self.records = folder, None, []
        path = os.path.join(folder, "log.jsonl")
        if first_step and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("}\n")]  # a killed run may have left half a line
            self.records = [r for r in map(json.loads, lines) if r["kind"] != "done" and r["step"] < first_step]
            with open(path + ".new", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(r) + "\n" for r in self.records)
            os.replace(path + ".new", path)
        config = {k: v for k, v in vars(cfg).items() if k != "explicit"} | extra
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(config, f, indent=2)
        self.file = open(path, "a", buffering=1)
        if cfg.USE_WANDB:
            try:
                import wandb
                self.wandb = wandb.init(project=cfg.wandb_project, name=os.path.basename(folder), config=config, dir=folder)
            except Exception as error:  # no wandb, no network, no login: the run goes on
                print(f"wandb is off: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)

    def write(self, record):
        """Append one record (a dict with `kind`) to log.jsonl and wandb."""
        self.records.append(record)
        # JSON has no NaN: a loss that is none is written as null
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(clean) + "\n")
        if self.wandb is not None:
            try:
                values = {k: v for k, v in record.items() if k not in ("kind", "step")}
                self.wandb.log(dict(paths_of(values, record["kind"])), step=record["step"])
            except Exception as error:
                print(f"wandb is off: {error}", flush=True)
                self.wandb = None

    def plot(self):
        """Draw loss.png: training loss (thin, and smoothed) and val loss over tokens."""
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            return
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
        ax.set(xlabel=label, ylabel="cross-entropy (nats per token)", title=os.path.basename(self.folder))
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
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def paths_of(tree, prefix):
    """The leaves of nested dicts as pairs ("prefix/key/key", value)."""
    for key, value in tree.items():
        yield from paths_of(value, f"{prefix}/{key}") if isinstance(value, dict) else [(f"{prefix}/{key}", value)]


def smooth(values, beta=0.9):
    """Exponential moving average with bias correction: a list as long as `values`."""
    out, average = [], 0.0
    for i, value in enumerate(values):
        average = beta * average + (1 - beta) * value
        out.append(average / (1 - beta ** (i + 1)))
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
        """Median tokens per second over all steps so far."""
        return statistics.median_high(self.speeds)

    def step(self, step, loss, norm, rates, ms):
        """Log optimizer step `step`; raises UserError if its loss is not finite.

        rates: lr_muon, lr_embed, lr_head, momentum by log.jsonl's names. ms: milliseconds the step took.
        """
        cfg, n = self.cfg, self.cfg.max_iters
        speed = cfg.total_batch_size / ms * 1000
        self.train_seconds += ms / 1000
        self.speeds.append(speed)
        if self.procs.is_main and (step % cfg.log_interval == 0 or step == n - 1):
            mfu = self.flops * speed / (self.peak * self.procs.world_size) if self.peak else None
            memory = peak_memory_gb(self.procs.device)
            self.log.write(dict(kind="train", step=step, tokens=(step + 1) * cfg.total_batch_size, loss=loss, grad_norm=norm,
                                **rates, step_ms=ms, tok_per_sec=speed, mfu=mfu, peak_mem_gb=memory))
            lr = rates["lr_embed"] if rates["lr_muon"] is None else rates["lr_muon"]
            eta = (n - 1 - step) * cfg.total_batch_size / self.speed
            self.procs.print(f"step {step + 1:>{len(str(n))}}/{n} | loss {loss:7.4f} | norm {norm:8.2e} | lr {lr:.2e} | "
                             f"{ms:7.1f} ms | {speed:,.0f} tok/s | " + (f"MFU {100 * mfu:4.1f}% | " if mfu else "")
                             + f"{memory:.1f} GB | ETA {format_duration(eta)}")
        if not math.isfinite(loss + norm):
            raise UserError(f"the loss at step {step} is {loss}, its gradient's norm {norm}: try a lower learning rate or a longer warm-up")

    def val(self, step, val_loss, val_losses=None):
        """Log an evaluation after optimizer step `step`, and draw loss.png. val_losses: {name of each format: loss in it}."""
        self.val_loss, self.val_losses = val_loss, val_losses
        if self.procs.is_main:
            self.log.write(dict(kind="val", step=step, tokens=(step + 1) * self.cfg.total_batch_size, val_loss=val_loss,
                                train_seconds=self.train_seconds))
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


def train_step(parallel, loader, optimizers, cfg, procs, precision):
    """One optimizer step over accumulation x world_size micro-batches.

    Returns the mean loss over the step's whole global batch and the gradient norm before clipping, both scalar
    tensors on the device: nothing here waits for the GPU.
    """
    loss_sum = torch.zeros((), device=procs.device)
    for m in range(loader.accumulation):
        x, y = loader.next()
        with parallel.micro_batch(last=m == loader.accumulation - 1):
            with precision.autocast(procs):
                loss = parallel.module(x, y, first=parallel.first_micro_batch(m)) * loader.loss_scale
            loss.backward()
        loss_sum += loss.detach()
    norm = clip_gradients(list(parallel.model.parameters()), cfg.grad_clip)
    optimizers.step()
    optimizers.zero_grad()
    return procs.sum(loss_sum) / procs.world_size, norm


def calibrate(parallel, loader, optimizers, procs, precision):
    """A forward and backward pass on the next micro-batch, whose gradients are thrown away.

    It compiles what is to be compiled, and fills the amax history of delayed scaling, which starts with scale 1:
    gradients of order 1e-7 would all round to zero in E5M2. The loss is scaled as in training, since the largest amax of
    the history counts for FP8_AMAX_HISTORY micro-batches. Weights, optimizers and data position stay as they are.
    """
    x, y = loader.peek()
    with parallel.micro_batch(last=True):
        with precision.autocast(procs):
            loss = parallel.module(x, y, first=parallel.first_micro_batch(0)) * loader.loss_scale
        loss.backward()
    optimizers.zero_grad()


def run(cfg, procs):
    """Train by the flags from start to end; returns the run folder."""
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
    checkpoint, meta = checkpoint_to_resume(cfg, procs)
    first_step = meta["step"] if meta else 0

    # Model. The wrapper is chosen by the parameter count, which the flags give.
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
    folder = folder or procs.broadcast(make_run_folder(cfg.out_dir, cfg.run_name) if procs.is_main else None)
    machine = describe_machine(device)
    rows = [
        ("device", f"{procs.world_size} x {machine['device']}, torch {torch.__version__}"),
        ("precision", f"{precision.name} {precision.reason}"),
        *([("  in bf16", ", ".join(in_bf16))] if in_bf16 else []),
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
    log = RunLog(folder, cfg, dict(machine, world_size=procs.world_size, wrapper=wrapper, precision=precision.name,
                                   emulated=precision.emulated, optimizers=optimizers.description,
                                   parameters=n_params), first_step) if procs.is_main else None
    checkpoints, stop = Checkpoints(folder, cfg, procs, first_step), StopSignal()
    clock, progress = Clock(device), Progress(cfg, procs, log, meta["train_seconds"] if meta else 0.0)
    clock.ms(clock.mark(), clock.mark())  # waits for the GPU
    progress.compile_seconds = time.perf_counter() - start
    procs.print(f"ready after {progress.compile_seconds:.1f} s of compiling and calibration\n")
    gc.collect()
    gc.freeze()
    gc.disable()  # collections would stall ranks at different times; below they run together

    def finish(step, rates, loss, norm, stopping, begin, end):
        """Log a step that was launched before; waits until the GPU is done with it, not with what came after.

        Returns whether any rank had been told to stop by then: the same answer on all.
        """
        ms = clock.ms(begin, end)
        try:
            progress.step(step, float(loss), float(norm), rates, ms)
        except UserError:
            checkpoints.finish(wait=True)  # one that is being written would be lost
            raise
        return float(stopping) > 0

    def save(steps):
        """Start a checkpoint after so many optimizer steps."""
        pause = checkpoints.save(steps, lambda: training_state(model, optimizers, procs, precision.te), dict(
            step=steps, tokens=steps * cfg.total_batch_size, world_size=procs.world_size, loader=loader.state_dict(),
            train_seconds=progress.train_seconds, parameters=n_params, versions=machine["versions"], **optimizers.meta,
            flags={k: v for k, v in vars(cfg).items() if k != "explicit"}))
        if cfg.keep_checkpoints:
            procs.print(f"step {steps}/{cfg.max_iters} | checkpoint: training stood still for {pause:.2f} s")

    formats = ["bf16"] if precision.recipe is None else ["bf16", precision.name][::1 if cfg.EVAL_PRECISION == "bf16" else -1]

    def evaluate_in(names):
        """{name: val loss} with the block matmuls in each of these formats; delayed scaling's state stays as it is."""
        with scales_kept(model):
            return {name: evaluate(model, val_ring, cfg, procs, lambda: precision.autocast(procs, quantized=name != "bf16"))
                    for name in names}

    def watch_quantization(step):
        """Log what the format does to each tensor of the next micro-batch (FP8_STATS_INTERVAL); training is not touched."""
        import fp8_stats
        start = time.perf_counter()
        layers = fp8_stats.collect(model, *loader.peek(), precision.recipe, fp8_state(model), in_bf16, loader.loss_scale)
        if log:
            log.write(dict(kind="fp8_stats", step=step, tokens=(step + 1) * cfg.total_batch_size, format=precision.name,
                           seconds=time.perf_counter() - start, layers=layers))

    pending = None
    for step in range(first_step, cfg.max_iters):
        rates = optimizers.set_schedule(step)
        if 0 < step < calibrations:
            # Head and output projections start at zero, so deeper gradients only appear step by step
            calibrate(parallel, loader, optimizers, procs, precision)
        begin = clock.mark()
        profiled = cfg.USE_PROFILE and step == min(first_step + 3, cfg.max_iters - 1)
        with profiling(folder, procs) if profiled else contextlib.nullcontext():
            results = train_step(parallel, loader, optimizers, cfg, procs, precision)
        stopping = procs.sum(torch.full((), float(stop.requested), device=device))  # torch.tensor() would wait for the GPU
        # Copied while the next step runs; read by finish()
        results = [r.to("cpu", non_blocking=True) for r in (*results, stopping)]
        end = clock.mark()
        told_to_stop = finish(*pending) if pending else False
        pending = step, rates, *results, begin, end
        last = step == cfg.max_iters - 1
        evaluating = last or (cfg.eval_interval and (step + 1) % cfg.eval_interval == 0)
        saving = last or told_to_stop or (cfg.ckpt_interval and (step + 1) % cfg.ckpt_interval == 0)
        watching = cfg.FP8_STATS_INTERVAL and (step + 1) % cfg.FP8_STATS_INTERVAL == 0
        if evaluating or saving or watching:
            told_to_stop = finish(*pending) or told_to_stop
            pending = None
        if watching:
            watch_quantization(step)
        if saving or told_to_stop:
            save(step + 1)
        if evaluating:
            if told_to_stop:
                checkpoints.finish(wait=True)  # first things first
            val_losses = evaluate_in(formats[:2 if last else 1])
            progress.val(step, val_losses[formats[0]], val_losses)
            gc.collect()
        checkpoints.finish()
        if told_to_stop:
            break
    loader.close()
    checkpoints.close()
    stop.close()
    gc.unfreeze()
    gc.enable()
    if last:
        progress.done()
    else:
        procs.print(f"\nstopped by a signal after {step + 1} steps; the same command with --resume=auto goes on from "
                    f"{checkpoints.last or 'the start: no checkpoint was kept'}")
    return folder


class StopSignal:
    """Turns SIGTERM and SIGINT into a wish: training ends after the step in hand, with a checkpoint."""

    def __init__(self):
        self.requested, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT)}

    def request(self, *_):
        self.requested = True
        self.close()  # a second signal ends the process as ever

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def command_line(run, path, argv=None, presets=PRESETS, choices=CHOICES):
    """What a script does when it is started: parse flags, run(cfg, processes), and end wrong input with one line.

    Exit status: 0, or what the UserError says (1 or 2).
    """
    try:
        cfg = parse_flags(sys.argv[1:] if argv is None else argv, os.path.abspath(path), presets, choices)
        return run(cfg, start_processes())
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.one_rank:
            print(f"{os.path.basename(path)}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.status)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    """Train by command-line flags (default: the program's own); returns the run folder."""
    return command_line(run, __file__, argv)


if __name__ == "__main__":
    main()
