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

import contextlib
import functools
import gc
import glob
import math
import os
import queue
import random
import threading
import time

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch starts

import numpy as np
import torch
import torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nanofp8.checkpoint import (
    Checkpoints, check_data, checkpoint_to_resume, data_fingerprint, restore, run_folder_of, steps_of, training_state,
)
from nanofp8.config import UserError, parse_flags
from nanofp8.faults import Guard, StopSignal
from nanofp8.fused import (
    AddNorm, FusedBlocks, FusedMLP, FusedQKV, MicroBatchGraphs, RopeQKNorm, current_scaling, kernels_fit, matmul, weight_operand,
)
from nanofp8.loss import LOGIT_GRAD_SCALE, ChunkedCrossEntropy
from nanofp8.machine import Clock, describe_machine, profiling
from nanofp8.muon import TorchMuon, dion_muon, import_bitsandbytes, polar_express
from nanofp8.plain import rms_norm, rope_qk_norm
from nanofp8.precision import Precision, fp8_state, flags_without_effect, keep_high_precision, snapshot_scales, preserved_scales
from nanofp8.procs import command_line
from nanofp8.runlog import Progress, RunLog, make_run_folder, remove_if_empty
from nanofp8.shards import ShardError, open_shard

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


# -----------------------------------------------------------------------------------------------------
# Reading the flags


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
# Data: token shards, read as one ring


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
        try:
            self.shards = [open_shard(p) for p in self.paths]
        except ShardError as error:
            raise UserError(str(error))
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
        from nanofp8 import te_emulation as te
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


# =====================================================================================================
# Model


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
        fused = (kernels_fit(cfg, device) and formats and te.__name__ != "nanofp8.te_emulation"
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
# Evaluation


@torch.no_grad()
def evaluate(model, ring, cfg, procs, autocast, after_batch=lambda: None):
    """Mean loss of `model` over the first eval_tokens of the val shards, all ranks taking part.

    Sequence s is tokens s*T ... s*T + T of the ring. Rank r takes sequences r, r + world_size, ...; where they do
    not fill a batch, rows without targets do, so that the result is the same for any world and batch size, and all
    ranks make the same number of passes. `autocast()` is the context of a pass: bf16 or the format of training.
    `model` is the plain one: DDP has nothing to do without gradients. after_batch() is called after each pass.
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
        after_batch()
    model.train()
    procs.sum(total)
    return (total[0] / total[1]).item()


# =====================================================================================================
# Logging


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


# =====================================================================================================
# The run


def train_step(parallel, loader, optimizers, cfg, procs, precision, guard=None, shared=tuple, graphs=None):
    """One optimizer step over accumulation x world_size micro-batches; left out where `guard` refuses the gradients.

    shared: gives numbers of this rank that all should know, asked for once the gradients are on their way.
    graphs: MicroBatchGraphs, to run the micro-batches by.
    Returns: mean loss over the step's whole global batch, gradient norm before clipping (floats), why the step was skipped
    ("": it was taken), and the list of told numbers summed over the ranks.

    The host waits for the GPU once, for loss and norm before the optimizer, as nothing else keeps a NaN from all of the
    optimizers: Dion's and bitsandbytes' take no flag from the device, and gradients set to zero would still decay momenta.
    Clipping is launched before the wait and runs after_batch: about 1.5 ms at 561M parameters on an H100 (it reads and writes
    2.2 GB), longer than the wait's round trip. What may be lost is where the optimizer's first launches take longer
    than their kernels. Predicted below 1% of a step of 65,536 tokens on one GPU, not measured.
    """
    guard, cuda = guard or Guard(cfg), procs.device.type == "cuda"
    restore_scales = snapshot_scales(parallel.model)
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
    told = [torch.full((), float(number), device=procs.device) for number in shared()]
    told = procs.sum(torch.stack([loss_sum / procs.world_size, norm / procs.world_size, *told])).to("cpu", non_blocking=True)
    if cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    clip_gradients(parameters, cfg.grad_clip, norm)
    if cuda:
        arrived.synchronize()
    loss, norm, *told = told.tolist()
    skipped = guard.check(loss, norm)
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
    restore_scales = snapshot_scales(parallel.model)
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
    with contextlib.ExitStack() as cleanup:  # undoes what must be undone however the run ends: others may follow in this process
        return run_within(cfg, procs, cleanup)


def run_within(cfg, procs, cleanup):
    """run(); `cleanup` takes what must be undone."""
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
    cleanup.callback(loader.close)
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
        cleanup.callback(remove_if_empty, folder)
    machine = describe_machine(device)
    rows = [
        ("device", f"{procs.world_size} x {machine['device']}, torch {torch.__version__}"),
        ("precision", f"{precision.name} {precision.reason}"),
        *([("  head", "FP8 by current scaling" if model.fp8_head else "bf16")] if precision.recipe else []),
        *([("  in bf16", ", ".join(in_bf16))] if in_bf16 else []),
        *([("  without effect", ", ".join(idle))] if (idle := flags_without_effect(cfg, precision.name)) else []),
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
        cleanup.callback(log.close)
    checkpoints, stop = Checkpoints(folder, cfg, procs), cleanup.enter_context(StopSignal())
    checkpoints.prepare(lambda: training_state(model, optimizers, procs, precision.te))
    clock, progress = Clock(device), Progress(cfg, procs, log, flops_per_token(cfg), meta["train_seconds"] if meta else 0.0)
    clock.ms(clock.mark(), clock.mark())  # waits for the GPU
    progress.compile_seconds = time.perf_counter() - start
    procs.print(f"ready after {progress.compile_seconds:.1f} s of compiling and calibration\n")
    gc.collect()
    gc.freeze()
    gc.disable()  # collections would stall ranks at different times; below they run together
    cleanup.callback(gc.unfreeze)
    cleanup.callback(gc.enable)

    def finish(step, rates, loss, norm, skipped, begin, end):
        """Log a step that was launched before; waits until the GPU is done with it, not with what came after."""
        progress.step(step, loss, norm, rates, clock.ms(begin, end), skipped)

    def save(steps):
        """Start a checkpoint after so many optimizer steps."""
        pause = checkpoints.save(steps, lambda: training_state(model, optimizers, procs, precision.te), dict(
            step=steps, tokens=steps * cfg.total_batch_size, world_size=procs.world_size, loader=loader.state_dict(),
            data=data_fingerprint(loader.ring, steps * cfg.total_batch_size),
            train_seconds=progress.train_seconds, parameters=n_params, versions=machine["versions"], **optimizers.meta,
            guard=guard.state_dict(), saved_at=time.time(), flags={k: v for k, v in vars(cfg).items() if k != "explicit"}))
        if cfg.keep_checkpoints:
            procs.print(f"step {steps}/{cfg.max_iters} | checkpoint: training stood still for {pause:.2f} s")

    def shared():
        """Whether this rank was told to stop, and, by the clock of rank 0 alone, whether a checkpoint is due."""
        return bool(stop.requested), procs.is_main and 0 < 60 * cfg.ckpt_minutes <= time.monotonic() - last_save

    formats = ["bf16"] if precision.recipe is None else ["bf16", precision.name][::1 if cfg.EVAL_PRECISION == "bf16" else -1]

    def watch_quantization(step):
        """Log what the format does to each tensor of the next micro-batch (FP8_STATS_INTERVAL); training is not touched."""
        from nanofp8 import fp8_stats
        start = time.perf_counter()
        layers = fp8_stats.collect(model, *loader.peek(), precision.recipe, fp8_state(model), in_bf16, loader.loss_scale,
                                   LOGIT_GRAD_SCALE if model.fp8_head else None)
        if log:
            log.write(dict(kind="fp8_stats", step=step, tokens=(step + 1) * cfg.total_batch_size, format=precision.name,
                           seconds=time.perf_counter() - start, layers=layers))

    def evaluate_after(step):
        """Val loss with the matmuls in one format, after the last step in both; delayed scaling's state stays as it is."""
        with preserved_scales(model):
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
                parallel, loader, optimizers, cfg, procs, precision, guard, shared, graphs)
        end = clock.mark()
        if pending:
            finish(*pending)
        pending = step, rates, loss, norm, skipped, begin, end
        given_up = guard.in_a_row >= cfg.max_bad_steps
        evaluating = evaluation_due(step)
        due = save_due or cfg.ckpt_interval and (step + 1) % cfg.ckpt_interval == 0
        saving = step == cfg.max_iters - 1 or told_to_stop or due and guard.healthy
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


def read_flags(argv, has_gpu=None):
    """This script's flags from a command line; has_gpu: what preset "auto" goes by."""
    return parse_flags(argv, os.path.abspath(__file__), PRESETS, CHOICES, has_gpu)


def main(argv=None):
    """Train by command-line flags (default: the program's own); returns the run folder."""
    return command_line(run, __file__, argv, PRESETS, CHOICES)


if __name__ == "__main__":
    main()
