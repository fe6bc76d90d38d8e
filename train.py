"""
Train a GPT in FP8 (or NVFP4) with NVIDIA Transformer Engine. Read it top to bottom; what is in nanofp8/ can wait.

    bash run.sh                                   # set up, then train: d20 with a GPU, tiny without
    bash run.sh --USE_FP8=False                   # any flag below can be set as --name=value
    python train.py --preset=tiny --max_iters=20  # one process, with the active Python
    torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node=8 train.py --total_batch_size=524288
    python train.py --help                        # all flags with their defaults
    python train.py --doctor --preset=d12         # would training with these flags start here?

The model is nanochat's d20 shape: 561M parameters, RoPE, RMSNorm, QK norm, relu^2, logit softcap.
Muon (Microsoft's Dion library) trains the matrices in the blocks, AdamW trains the rest: embeddings, head, gains.

main() reads the flags, joins the other ranks and calls run(). run() first calls set_up(), which builds a Run (data,
model, optimizers, the state of a checkpoint). Then it calls train(): train_step() for each step, saving, evaluating.
If you read one function, read train_step().
"""

from typing import Literal

from nanofp8 import ahead  # compiles QuACK's and flash-attn-4's kernels while torch is imported
from nanofp8.config import (  # types of flags, and what reads them
    AutoBool,
    AutoNonNegativeFloat,
    AutoPositive,
    Exponent,
    FolderName,
    Fraction,
    Layers,
    Letters,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Ramp,
    Seed,
    Softcap,
    Timeout,
    UserError,
    Window,
    check_command_line,
    may_choose,
    parse_flags,
    precedence,
)

if __name__ == "__main__":
    check_command_line(__file__, doctor="nanofp8.doctor")  # answers --help, --doctor and wrong flags, without torch
    ahead.start()

import contextlib
import functools
import gc
import math
import os
import random
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

from nanofp8 import host

host.start_torch()  # before torch is imported: it sets torch's allocator, and refuses a torch that is too old

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nanofp8 import checkpoint, memory, resuming, runlog  # checkpoints; batch_size=auto; --resume; log.jsonl, wandb
from nanofp8.attention import choose_attention, make_attention  # Transformer Engine's, flash-attn-4's or torch's
from nanofp8.epilogues import choose_quack  # matmuls by QuACK
from nanofp8.faults import Guard, StopSignal  # bad steps; SIGTERM and SIGINT
from nanofp8.fused import (  # blocks and embedding by Triton kernels, CUDA graphs
    AddNorm,
    FusedBlocks,
    FusedMLP,
    FusedQKV,
    MicroBatchGraphs,
    RopeQKNorm,
    TokenEmbedding,
    blocks_fit,
    kernels_fit,
)
from nanofp8.host import compiled_at_first_call  # torch.compile, but later
from nanofp8.loss import LMHead  # output projection and softcapped cross-entropy, without all logits at once
from nanofp8.machine import Clock, check_gpus, describe_machine, pause_garbage_collection, profiling
from nanofp8.muon import OptimizerSet, import_bitsandbytes, make_adam, make_muon, muon_groups, set_value
from nanofp8.parts import (  # what presets "speedrun" and "d12" add; tokens in order
    ResidualScalars,
    ValueEmbedding,
    mix_residual,
    token_order,
)
from nanofp8.plain import MATRICES, rms_norm, rope_qk_norm, rope_tables, spectral_init  # in plain PyTorch
from nanofp8.precision import (  # number formats and FP8's scaling state
    Precision,
    check_one_format,
    keep_high_precision,
    preserved_scales,
    select_precision,
    snapshot_scales,
)
from nanofp8.prefetch import Prefetcher, pinned  # items made ahead of time by a thread
from nanofp8.procs import Processes, command_line  # rank, device, mesh; start and end of a script
from nanofp8.schedule import Schedule  # learning rates, weight decay and momentum at each step
from nanofp8.shards import Shard, ShardError, epoch_order, find_shards  # the token shard format
from nanofp8.sizes import (  # what follows from the flags alone
    BatchPlan,
    auto_batch,
    batch_error,
    flops_per_token,
    parameter_count,
    steps_for,
    value_embed_error,
    value_layers,
    windows,
)
from nanofp8.zero import Gathered, Local, Zero2, gradient_norm  # gradients and weights: FSDP2's, one rank's, DDP's

# ======================================================================================================================
# Flags. Edit a value here, or give --name=value. The values below are those of preset "d20".
# A flag that is edited here or given on the command line beats the preset.

# The run
preset: Literal["auto", "d20", "speedrun", "d12", "tiny", "classic"] = "auto"  # "auto": d20 with a GPU, tiny without
run_name: FolderName = "gpt"                  # the run folder is out_dir/run_name; a taken name gets a number
out_dir: NonEmpty = "out"                     # folder for run folders
resume: str = ""                              # "auto": from this run_name's newest checkpoint; or a path to one
seed: Seed = 1337                             # seed of initialisation and stochastic rounding; data order is fixed

# Data
dataset: NonEmpty = "fineweb10B"              # folder below data_dir: fineweb10B, openwebtext-100k, shakespeare, ...
data_dir: NonEmpty = "data"                   # relative to this file unless absolute
USE_SHUFFLE: bool = True                      # epochs after the first read the sequences in random order

# Model
n_layer: Layers = 20                          # transformer blocks
n_embd: Positive = 1280                       # width of the residual stream
n_head: Positive = 10                         # attention heads; the head size is n_embd / n_head
vocab_size: Positive = 65536                  # rows of embedding and head; GPT-2's BPE uses the first 50,257
block_size: Positive = 2048                   # tokens per sequence
rope_base: PositiveFloat = 10000.0            # base of the rotary frequencies
norm_eps: PositiveFloat = 1e-6                # epsilon of every RMSNorm
logit_softcap: Softcap = 15.0                 # logits = softcap * tanh(logits / softcap); 0: off
qk_scale: PositiveFloat = 1.0                 # q and k are each multiplied by it after QK norm; > 1: sharper attention
window_pattern: Letters = "L"                 # repeated over the blocks: S attends to window_size tokens, L to all
window_size: Positive = 512                   # tokens that S attends to, its own included; the last block is always L
n_value_embed: NonNegative = 0                # blocks that add a vector per token to v: the last, the third last, ...
USE_X0: bool = False                          # each block reads a * x + b * token embedding, a and b learned

# Length, batch and schedule
train_tokens: NonNegative = 891289600         # tokens to train on: 9 FineWeb shards, once; 0: use max_iters
total_batch_size: AutoPositive = "auto"       # tokens a step, all ranks (batch_ramp: the last); "auto": by train_tokens
batch_ramp: Ramp = ""                         # "0.25,0.6": the batch doubles after these fractions of the tokens
batch_size: AutoPositive = "auto"             # sequences of a micro-batch; "auto": what fits, up to 16 (d12 32, tiny 8)
max_iters: Positive = 1700                    # optimizer steps; used if given or edited, or if train_tokens is 0
warmup_iters: NonNegative = 100               # steps of linear warm-up; used if given alone, or if warmup_ratio is 0
warmup_ratio: Fraction = 0.02                 # warm-up of all rates, as a fraction of the run's tokens; 0: by steps
lr_schedule: Literal["cosine", "linear"] = "linear"  # after the warm-up; "linear": constant, then a linear warm-down
warmdown_ratio: Fraction = 0.75               # linear: fraction of the run's tokens that the warm-down takes
min_lr_ratio: NonNegativeFloat = 0.03         # the schedule ends at this fraction of each learning rate
lr_scaling: Literal["none", "sqrt", "length"] = "length"  # "sqrt": rates x sqrt(batch); "length": also x length^-0.32

# Optimizers: Muon for matrices in the blocks, AdamW for the rest. Rates are for 891M tokens, 524,288 a step
learning_rate: NonNegativeFloat = 0.04        # Muon; each update is also scaled by sqrt(fan_out / fan_in)
learning_rate_embed: NonNegativeFloat = 0.6   # AdamW, token embedding
learning_rate_head: NonNegativeFloat = 0.008  # AdamW, output head
learning_rate_gain: NonNegativeFloat = 0.016  # AdamW, RMSNorm gains, and gates of value embeddings
learning_rate_value: NonNegativeFloat = 0.3   # AdamW, value embeddings
learning_rate_x0: NonNegativeFloat = 0.5      # AdamW, scalars on the token embedding; those on x: 1% of it
lr_ratio_fc2: PositiveFloat = 1.0             # Muon; factor on the learning rate of the MLP's second matrix
weight_decay: NonNegativeFloat = 0.17         # Muon; decoupled, multiplied by the learning rate
weight_decay_end: NonNegativeFloat = 0.0      # Muon; the decay falls linearly to this fraction at the last step
USE_CAUTIOUS_WD: bool = True                  # Muon; decay only where update and weight have the same sign
weight_decay_embed: AutoNonNegativeFloat = "auto"  # AdamW, all embeddings; "auto": by epochs, 0 for one
weight_decay_head: AutoNonNegativeFloat = "auto"  # AdamW, output head; "auto": by epochs, 0 for one
weight_decay_gain: NonNegativeFloat = 0.0     # AdamW, RMSNorm gains, and gates of value embeddings
adam_beta1: Fraction = 0.8                    # AdamW, average of gradients
adam_beta2: Fraction = 0.99                   # AdamW, average of squared gradients
adam_beta2_embed: Fraction = 0.99             # the same for token and value embeddings
adam_eps: PositiveFloat = 1e-10               # AdamW, added to the square root of that average
muon_momentum_start: Fraction = 0.85          # Muon momentum at step 0 ...
muon_momentum: Fraction = 0.92                # ... and from step muon_momentum_iters on
muon_momentum_iters: NonNegative = 300        # steps of its warm-up; used if given alone, or if the ratio is 0
muon_momentum_ratio: Fraction = 0.15          # warm-up of the momentum, as a fraction of the run's tokens; 0: by steps
muon_momentum_end: Fraction = 0.0             # Muon momentum at the last step, reached as the rates fall; 0: it stays
muon_variant: Literal["muon", "normuon"] = "normuon"  # normuon: each row of an update is divided by its usual size
muon_beta2: Fraction = 0.95                   # normuon, average of squared updates
muon_impl: Literal["auto", "dion", "torch"] = "auto"  # "auto": dion where it can run, else torch
grad_clip: NonNegativeFloat = 1.0             # largest global gradient norm; 0: measure it only
USE_8BIT_ADAM: bool = False                   # bitsandbytes AdamW8bit for embedding and head (not with USE_FSDP2)

# Precision
USE_FP8: bool = True                          # matmuls in FP8; on a GPU without FP8 only if given; False: bf16
FP8_RECIPE: Literal["delayed", "current", "block", "mxfp8"] = "delayed"  # how FP8 scales are chosen (docs/precision.md)
FP8_MARGIN: Exponent = 0                      # delayed: scale = fp8_max / amax / 2^margin
FP8_AMAX_HISTORY: Window = 1024               # delayed: the scale follows the largest amax of this many micro-batches
FP8_CALIBRATION_STEPS: Positive = 3           # delayed: number of first steps with a calibration pass before them
USE_FP8_HEAD: bool = True                     # with USE_FP8: the head's matmuls in FP8 too, for every recipe
USE_NVFP4: bool = False                       # matmuls of blocks in NVFP4, the head in bf16; replaces FP8
NVFP4_HADAMARD: bool = True                   # NVFP4: random Hadamard transform of the operands of weight gradients
NVFP4_STOCHASTIC_ROUNDING: bool = True        # NVFP4: round gradients stochastically, without bias
NVFP4_2D_WEIGHTS: bool = True                 # NVFP4: one scale per 16 x 16 weights; False: one per 1 x 16
HIGH_PRECISION_LAYERS: str = ""               # layers kept in bf16: "blocks.0,blocks.*.attn.proj"
EVAL_PRECISION: Literal["bf16", "training"] = "bf16"  # format of evaluations; the last one runs in both
FP8_STATS_INTERVAL: NonNegative = 0           # steps between statistics of what quantizing does to each tensor; 0: off
USE_EMULATION: Literal["auto", True] = "auto"  # emulate the blocks' matmuls; "auto": where TE or hardware is missing

# Parallelism. Both "auto": DDP if its state fits in a quarter of a GPU, else FSDP2
USE_FSDP2: AutoBool = "auto"                  # shard fp32 weights and optimizer state; gather weights in bf16
USE_DDP: AutoBool = "auto"                    # ZeRO-2: each rank holds all weights and updates a part of them
FSDP2_RESHARD: bool = False                   # FSDP2: gather weights for each use; shard gradients after the last
REDUCE_FP32: bool = True                      # add gradients over ranks in fp32; False: bf16
GATHER_FP32: bool = True                      # USE_DDP: send updated weights to the other ranks in fp32; False: bf16

# Speed and memory
USE_TRITON: bool = True                       # Triton: blocks in bf16 and delayed FP8; RoPE and QK norm in all formats
USE_QUACK: AutoBool = "auto"                  # Hopper: QuACK for some matmuls; "auto": with delayed FP8 and bf16
attention: Literal["auto", "cudnn", "flash4", "torch"] = "auto"  # "auto": flash-attn-4 where it was tried, else cuDNN
USE_CUDA_GRAPHS: bool = True                  # micro-batches (not FSDP2_RESHARD) and updates (not FSDP2) as graphs
USE_COMPILE: AutoBool = "auto"                # torch.compile what is not fused; "auto": on a GPU; True: also Dion
USE_AC_LM_HEAD: bool = False                  # recompute logits in the backward pass instead of keeping gradients
USE_AC_BLOCKS: bool = False                   # recompute each block in the backward pass
USE_AC_ATTENTION: bool = False                # recompute RoPE, QK norm and attention in the backward pass
loss_chunk_size: Positive = 8192              # tokens whose logits exist at the same time
USE_PROFILE: bool = False                     # profile the sixth step into the run folder, print its top kernels

# Evaluation, logging, checkpoints
eval_interval: NonNegative = 500              # steps between evaluations; 0: only at the end
eval_tokens: Positive = 10485760              # tokens of the val shards per evaluation (all of them if there are fewer)
log_interval: Positive = 1                    # steps between log lines
ckpt_interval: NonNegative = 1000             # steps between checkpoints; 0: off. Also saved at the end and on signals
ckpt_minutes: NonNegativeFloat = 0.0          # also save every this many minutes; 0: off
keep_checkpoints: NonNegative = 2             # number of newest checkpoints to keep; 0: write none
USE_WANDB: bool = False                       # also log to Weights & Biases
wandb_project: NonEmpty = "nanogpt-fp8"       # wandb: name of the project; WANDB_PROJECT sets it too

# Faults: a step with a non-finite loss or gradient is always skipped
max_bad_steps: Positive = 10                  # stop after this many consecutive skipped steps
skip_loss_zscore: NonNegativeFloat = 0.0      # skip losses this many standard deviations above the mean; 0: off
skip_grad_zscore: AutoNonNegativeFloat = "auto"  # the same for the gradient norm; "auto": 8 or 0, by the GPU
zscore_window: Window = 128                   # number of latest steps that were not skipped, for mean and deviation
rank_timeout: Timeout = 120.0                 # seconds without a heartbeat before a rank is declared dead

# End of flags
# ======================================================================================================================

# The default flags of commit 1ea897b, to compare later recipes with; checkpoints of that time are resumed with them
CLASSIC = dict(
    dataset="fineweb10B", n_layer=20, n_embd=1280, n_head=10, vocab_size=65536, block_size=2048, rope_base=10000.0,
    norm_eps=1e-6, logit_softcap=15.0, qk_scale=1.0, window_pattern="L", n_value_embed=0, USE_X0=False, train_tokens=0,
    total_batch_size=524288, batch_ramp="", batch_size=16, max_iters=1700, warmup_iters=100, warmup_ratio=0.0,
    lr_schedule="cosine", warmdown_ratio=0.65, min_lr_ratio=0.1, lr_scaling="none", learning_rate=0.02,
    learning_rate_embed=0.3, learning_rate_head=0.004, learning_rate_gain=0.004, lr_ratio_fc2=1.0, weight_decay=0.1,
    weight_decay_end=1.0, USE_CAUTIOUS_WD=False, weight_decay_embed=0.0, weight_decay_head=0.0, weight_decay_gain=0.0,
    adam_beta1=0.8, adam_beta2=0.95, adam_beta2_embed=0.95, adam_eps=1e-10, muon_momentum_start=0.85,
    muon_momentum=0.95, muon_momentum_iters=300, muon_momentum_ratio=0.0, muon_momentum_end=0.0, muon_variant="muon",
    grad_clip=1.0, loss_chunk_size=8192, eval_interval=125, eval_tokens=10485760, ckpt_interval=250, ckpt_minutes=0.0,
    keep_checkpoints=2, skip_loss_zscore=0.0, skip_grad_zscore=0.0, zscore_window=128, window_size=512,
    FP8_CALIBRATION_STEPS=3, USE_8BIT_ADAM=False, muon_beta2=0.95, learning_rate_value=0.3, learning_rate_x0=0.5,
    USE_SHUFFLE=False,
)
PARTS = dict(window_pattern="SSSL", USE_X0=True, vocab_size=50304)  # the first two prevent export
PRESETS = {  # --doctor reads these and the functions up to check_flags() without torch
    # A flag that a preset leaves out has its value above. "d20" repeats all flags that presets set: a value above that
    # differs from "d20" is one that you have edited, and it wins over all presets
    "d20": CLASSIC | dict(
        train_tokens=891289600, total_batch_size="auto", batch_size="auto", warmup_ratio=0.02, lr_schedule="linear",
        warmdown_ratio=0.75, min_lr_ratio=0.03, lr_scaling="length", learning_rate=0.04, learning_rate_embed=0.6,
        learning_rate_head=0.008, learning_rate_gain=0.016, weight_decay=0.17, weight_decay_end=0.0,
        USE_CAUTIOUS_WD=True, muon_momentum_ratio=0.15, muon_variant="normuon", eval_interval=500, ckpt_interval=1000,
        skip_grad_zscore="auto", USE_SHUFFLE=True, weight_decay_embed="auto", weight_decay_head="auto", adam_beta2=0.99,
        adam_beta2_embed=0.99, muon_momentum=0.92,
    ),
    "speedrun": PARTS | dict(n_value_embed=5),
    "d12": PARTS | dict(n_layer=12, n_embd=768, n_head=6, n_value_embed=3, batch_ramp="0.25,0.6"),
    "tiny": dict(
        dataset="shakespeare", n_layer=4, n_embd=128, n_head=2, vocab_size=50304, block_size=128, lr_scaling="none",
        total_batch_size=2048, max_iters=60, loss_chunk_size=64, eval_interval=20, eval_tokens=16384, ckpt_interval=20,
        train_tokens=0, learning_rate=0.03, learning_rate_embed=0.5, learning_rate_head=0.015, learning_rate_gain=0.01,
        adam_beta2=0.95, adam_beta2_embed=0.95, muon_momentum=0.95,
    ),
    "classic": CLASSIC,
}
LARGEST_BATCH = {"d12": 32, "tiny": 8}  # of batch_size="auto"; 16 in other presets


def resolve_length(cfg: SimpleNamespace, saved: dict | None = None) -> None:
    """Set batch_size and total_batch_size if they are "auto", and max_iters by train_tokens, in place.

    A total_batch_size that is given without batch_ramp is that of all steps, also where the preset has a ramp. A
    warm-up that is given in steps alone sets its fraction to 0.
    saved: flags of the checkpoint that is resumed, whose total_batch_size stays if the flag is "auto"; {}: there is
    none; None: not known yet.
    """
    if cfg.batch_size == "auto":  # memory.choose_batch_size() lowers it
        cfg.batch_size = LARGEST_BATCH.get(cfg.preset, 16)
    by_steps, by_tokens = precedence(cfg, "max_iters"), precedence(cfg, "train_tokens")
    if by_steps == by_tokens and "max_iters" in cfg.explicit and cfg.train_tokens:
        raise UserError("train_tokens and max_iters both set the length; give only one of them", 2)
    if "total_batch_size" in cfg.auto:
        if not cfg.train_tokens and not saved:
            if cfg.resume and saved is None:
                return
            raise UserError("total_batch_size=auto needs --train_tokens; or give --total_batch_size=65536", 2)
        grows = 2 if cfg.batch_ramp else 1  # "auto" is the batch before the last doubling
        cfg.total_batch_size = saved["total_batch_size"] if saved else grows * auto_batch(cfg.train_tokens)
    elif "total_batch_size" in cfg.explicit and "batch_ramp" not in cfg.explicit and not saved:
        cfg.batch_ramp = ""
    for steps, ratio in (("warmup_iters", "warmup_ratio"), ("muon_momentum_iters", "muon_momentum_ratio")):
        if precedence(cfg, steps) > precedence(cfg, ratio):
            setattr(cfg, ratio, 0.0)
    if cfg.train_tokens and by_steps <= by_tokens:
        cfg.max_iters = steps_for(cfg.train_tokens, cfg)


def check_flags(cfg: SimpleNamespace, world_size: int, resumed: bool = False) -> None:
    """Refuse combinations of flags that cannot work: UserError. Types and ranges were checked by parse_flags().

    A micro-batch that was not given is lowered until it divides a step.
    """
    if cfg.n_embd % cfg.n_head or cfg.n_embd // cfg.n_head % 2:
        fit = [n for n in range(1, min(cfg.n_embd, 4096)) if cfg.n_embd % (2 * n) == 0]
        remedy = f"--n_head={min(fit, key=lambda n: abs(n - cfg.n_embd / 128))}" if fit else "an even --n_embd"
        raise UserError(f"n_embd={cfg.n_embd} over n_head={cfg.n_head} heads must give an even head size; "
                        f"try {remedy}", 2)
    if may_choose(cfg, "batch_size"):  # memory.choose_batch_size() lowers it further
        cfg.batch_size = next(iter(memory.batch_sizes(cfg, world_size)), cfg.batch_size)
    if error := value_embed_error(cfg) or batch_error(cfg, world_size, resumed, not may_choose(cfg, "batch_size")):
        raise UserError(error, 2)


# ======================================================================================================================
# Data: token shards, read as one ring


class TokenRing:
    """All shards of a split end to end, read as a ring: position p is token p modulo the total."""

    def __init__(self, data_dir: str, dataset: str, split: str, vocab_size: int, need_tokens: int):
        """Open the shards of a split in data_dir/dataset, in the order of their numbers.

        Raises: UserError if there are none, if one is damaged, or if they hold fewer than need_tokens tokens.
        """
        self.folder = os.path.join(data_dir, dataset)
        try:
            self.paths, self.ignored = find_shards(self.folder, split)
            self.shards = [Shard(path) for path in self.paths]
        except ShardError as error:
            raise UserError(str(error)) from None
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.total, self.vocab_size = int(self.starts[-1]), vocab_size
        if self.total < need_tokens:
            remedy = ("lower --total_batch_size (only a new run can), or add shards" if split == "train" else
                      "lower --block_size (only a new run can), or make a larger val split (data/README.md)")
            raise UserError(f"the {split} shards in {self.folder} hold {self.total} tokens, but {need_tokens} are "
                            f"needed at once; {remedy}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start ... start+count-1 of the ring: int32, shape (count,).

        Raises: UserError naming the shard if it cannot be read, or if a token id is not below vocab_size.
        """
        tokens, filled = np.empty(count, dtype=np.int32), 0
        while filled < count:
            position = (start + filled) % self.total
            i = int(np.searchsorted(self.starts, position, side="right")) - 1
            try:
                piece = self.shards[i].read(position - int(self.starts[i]), count - filled)
            except ShardError as error:
                raise UserError(str(error), one_rank=True) from None
            if int(piece.max()) >= self.vocab_size:
                raise UserError(f"{self.paths[i]} holds token id {int(piece.max())}, but vocab_size is "
                                f"{self.vocab_size}; raise --vocab_size (only a new run can), or tokenize with GPT-2's "
                                f"BPE", one_rank=True)
            tokens[filled:filled + len(piece)] = piece
            filled += len(piece)
        return tokens


class DataLoader:
    """Micro-batches of this rank in the order of the ring, prepared ahead of time by a thread.

    Optimizer step k reads the plan.batch(k) tokens of the run that begin at S = plan.tokens(k). Micro-batch m of rank r
    begins at S + (m*world_size + r)*B*T. So a step reads the same tokens for any number of ranks and any micro-batch
    size. position() says where in the ring they lie. With USE_SHUFFLE, each epoch after the first reads the ring's
    sequences in a random order of its own, the same in all runs.
    """

    def __init__(self, ring: TokenRing, cfg: SimpleNamespace, procs: Processes):
        self.ring, self.batch_size, self.block_size, self.device = ring, cfg.batch_size, cfg.block_size, procs.device
        self.rank, self.world_size, self.plan = procs.rank, procs.world_size, BatchPlan(cfg)
        self.micro_tokens, self.shuffle = self.batch_size * self.block_size, cfg.USE_SHUFFLE
        self.index, self.prefetcher = 0, Prefetcher(self.micro_batch)  # index counts this rank's micro-batches
        self.start_step(0)

    def start_step(self, step: int) -> None:
        """Let next() return the micro-batches of this optimizer step, from the first on."""
        index = self.plan.tokens(step) // (self.micro_tokens * self.world_size)
        if index != self.index:  # the thread has prepared others
            self.prefetcher.close()
            self.index = index
        self.accumulation = self.plan.batch(step) // (self.micro_tokens * self.world_size)  # micro-batches of the step
        # Factor on a micro-batch's summed loss. Over a step they add up to the mean over this rank's tokens
        self.loss_weight = 1.0 / (self.accumulation * self.micro_tokens)

    def micro_batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs (B, T) int32 and targets (B, T) int64 of one micro-batch, on the CPU."""
        start = (index * self.world_size + self.rank) * self.micro_tokens
        positions = map(self.position, range(start, start + self.micro_tokens, self.block_size))
        tokens = torch.from_numpy(np.stack([self.ring.read(at, self.block_size + 1) for at in positions]))
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].long()
        return (pinned(x), pinned(y)) if self.device.type == "cuda" else (x, y)

    def position(self, start: int) -> int:
        """Return the ring position of the sequence that begins at token `start` of the run."""
        whole = (self.ring.total - 1) // self.block_size  # sequences of an epoch; the tokens after them are left out
        epoch, i = divmod(start // self.block_size, whole)
        return int(epoch_order(epoch, whole)[i]) * self.block_size if self.shuffle and epoch else start

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next micro-batch on the device: inputs (B, T) int32, targets (B, T) int64."""
        x, y = self.prefetcher.next(self.index)
        self.index += 1
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def peek(self) -> tuple[Tensor, Tensor]:
        """Return the micro-batch that next() would return, without moving on."""
        x, y = self.micro_batch(self.index)
        return x.to(self.device), y.to(self.device)

    def close(self) -> None:
        """Stop preparing micro-batches."""
        self.prefetcher.close()


def open_data(cfg: SimpleNamespace, procs: Processes) -> tuple[DataLoader, TokenRing]:
    """Return the train shards' loader and the val ring. Rounds cfg.eval_tokens to whole sequences of the val shards."""
    data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), cfg.data_dir)  # an absolute one stays
    train_ring = TokenRing(data_dir, cfg.dataset, "train", cfg.vocab_size, cfg.total_batch_size + 1)
    val_ring = TokenRing(data_dir, cfg.dataset, "val", cfg.vocab_size, cfg.block_size + 1)
    cfg.eval_tokens = max(1, min(cfg.eval_tokens, val_ring.total - 1) // cfg.block_size) * cfg.block_size
    val_ring.read(0, cfg.eval_tokens + 1)  # a token id that is too large ends the run now, not at an evaluation
    return DataLoader(train_ring, cfg, procs), val_ring


# ======================================================================================================================
# Model


class Attention(nn.Module):
    """RMSNorm -> q, k, v -> RoPE and QK norm -> causal attention -> output projection.

    te: Transformer Engine or its emulation. compiled: as in GPT. first: as in GPT.forward()."""

    def __init__(self, cfg: SimpleNamespace, layer: int, te: ModuleType, attention: str, compiled: Callable,
                 device: torch.device):
        super().__init__()
        self.value_embed = None
        if layer in value_layers(cfg):
            self.value_embed = ValueEmbedding(cfg, device)
        self.n_head, self.eps, self.recompute, self.te = cfg.n_head, cfg.norm_eps, cfg.USE_AC_ATTENTION, te
        # The Triton kernel works in place, which rules out recomputing from the same qkv
        in_place = kernels_fit(cfg, device) and not self.recompute
        self.rope_qk_norm = RopeQKNorm.apply if in_place else compiled(rope_qk_norm)
        # One fused q, k, v matrix makes one wide matmul; Muon orthogonalises its three parts separately
        self.qkv = te.LayerNormLinear(cfg.n_embd, 3 * cfg.n_embd, eps=cfg.norm_eps, bias=False, normalization="RMSNorm",
                                      init_method=lambda qkv: [spectral_init(part) for part in qkv.chunk(3)],
                                      params_dtype=torch.float32, device=device)
        self.core = make_attention(cfg, attention, windows(cfg)[layer], te)
        self.proj = te.Linear(cfg.n_embd, cfg.n_embd, bias=False, init_method=nn.init.zeros_,
                              params_dtype=torch.float32, device=device)

    def attend(self, qkv: Tensor, x: Tensor, cos: Tensor, sin: Tensor, idx: Tensor) -> Tensor:
        q, k, v = self.rope_qk_norm(qkv, cos, sin, self.n_head, self.eps)  # (B, T, H, D) each
        if self.value_embed is not None:
            v = self.value_embed(v, x, self.qkv.layer_norm_weight, self.eps, idx)
        return self.core(q, k, v)                                          # (B, T, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, idx: Tensor, first: bool | None) -> Tensor:
        qkv = self.qkv(x, is_first_microbatch=first)                       # (B, T, 3C)
        if self.recompute and self.training:
            y = self.te.checkpoint(self.attend, qkv, x, cos, sin, idx, use_reentrant=False)
        else:
            y = self.attend(qkv, x, cos, sin, idx)
        return self.proj(y, is_first_microbatch=first)                     # (B, T, C)


class Block(nn.Module):
    """One transformer block: x + attention(x), then x + MLP(x). Each half begins with an RMSNorm with gain."""

    def __init__(self, cfg: SimpleNamespace, layer: int, te: ModuleType, attention: str, compiled: Callable,
                 device: torch.device):
        super().__init__()
        self.attn, self.mix = Attention(cfg, layer, te, attention, compiled, device), compiled(mix_residual)
        self.mlp = te.LayerNormMLP(cfg.n_embd, 4 * cfg.n_embd, eps=cfg.norm_eps, bias=False, normalization="RMSNorm",
                                   activation="srelu", init_method=spectral_init,
                                   output_layer_init_method=nn.init.zeros_, params_dtype=torch.float32, device=device)

    def forward(self, *inputs: Any, fused: tuple | None = None) -> Any:
        """Run by_kernels() if `fused` (QKVLayer, MLPLayer) is given, else by_modules(). FSDP2 hooks only forward()."""
        return self.by_modules(*inputs) if fused is None else self.by_kernels(*inputs, *fused)

    def by_modules(self, x: Tensor, cos: Tensor, sin: Tensor, idx: Tensor, first: bool | None, x0: Tensor | None,
                   x_scale: Tensor | None, x0_scale: Tensor | None) -> Tensor:
        """Return the block's output (B, T, C) bf16, by Transformer Engine's modules or their emulation."""
        if x0 is not None:
            x = self.mix(x, x0, x_scale, x0_scale)
        x = x + self.attn(x, cos, sin, idx, first)
        return x + self.mlp(x, is_first_microbatch=first)

    def by_kernels(self, x: Tensor, delta: Tensor | None, x0: Tensor | None, x_scale: Tensor | None,
                   x0_scale: Tensor | None, qkv_layer: tuple, mlp_layer: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, delta and x0. The block's output is x + delta (the residual after attention, the MLP's output): the
        next block's first kernel adds them. x0 is passed on so that kernels sum its gradient."""
        attn, mlp, values = self.attn, self.mlp, self.attn.value_embed
        table, gate = (None, None) if values is None else (values.table, values.gate)
        x, q, k, v, x0 = FusedQKV.apply(x, delta, attn.qkv.layer_norm_weight, attn.qkv.weight, qkv_layer,
                                        x0, x_scale, x0_scale, table, gate)
        x, delta = FusedMLP.apply(attn.core(q, k, v), x, attn.proj.weight, mlp.layer_norm_weight, mlp.fc1_weight,
                                  mlp.fc2_weight, mlp_layer)
        return x, delta, x0


class GPT(nn.Module):
    """Token embedding -> RMSNorm -> blocks -> RMSNorm with gain -> head with softcap.

    Parameters are fp32 (the master weights). Matmuls run in bf16, FP8 or NVFP4 by the context of the call.
    """

    def __init__(self, cfg: SimpleNamespace, precision: Precision, compiled: Callable, device: torch.device):
        """Build the model on `device`. compiled: applied to plain functions; torch.compile or the identity."""
        super().__init__()
        self.cfg, self.te = cfg, precision.te
        fused = blocks_fit(cfg, precision, device)
        quack, self.kernels_text = choose_quack(cfg, device, precision.name if fused else "")
        self.fused = FusedBlocks(self, quack) if fused else None
        self.fp8_head = precision.fp8_head(cfg)
        self.embed = TokenEmbedding(cfg, compiled(rms_norm), device)
        attention, *self.attention_texts = choose_attention(cfg, device, precision.emulated)
        self.blocks = nn.ModuleList(Block(cfg, i, self.te, attention, compiled, device) for i in range(cfg.n_layer))
        self.scales = ResidualScalars(cfg.n_layer, device) if cfg.USE_X0 else None  # of the residual; not FP8's scales
        self.norm = self.te.RMSNorm(cfg.n_embd, eps=cfg.norm_eps, dtype=torch.float32, device=device)
        self.head = LMHead(cfg, device, quack.fp8)
        # arXiv 2310.17813 for one-hot inputs: entries of order 1 (the RMSNorm after it takes any scale)
        nn.init.normal_(self.embed.weight, std=1.0)
        # (T, D/2) each. Not buffers: so not saved, and model.to(bfloat16) does not round them
        self.cos, self.sin = rope_tables(cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_base, device)

    def forward(self, idx: Tensor, targets: Tensor | None = None, first: bool | None = None, loss_weight: float = 1.0,
                in_place: str = "") -> Tensor:
        """Return loss_weight x the summed loss over the targets (scalar fp32); without targets, logits (B, T, V) fp32.

        Args:
            idx: (B, T) int32 token ids.
            targets: (B, T) int64, -1 where there is nothing to predict.
            first: True in a step's first micro-batch, False in the others, so that each weight is quantized once a
                step; None: quantize anew.
            in_place: backward adds ("add") or writes ("write") weight gradients in place; "": it returns them.
        """
        fp8_head = self.fp8_head and self.te.quantization.FP8GlobalStateManager.is_fp8_enabled()
        h = self.hidden(idx, first, in_place)
        return self.head(h, targets, first, fp8_head, in_place, loss_weight)

    def hidden(self, idx: Tensor, first: bool | None, in_place: str) -> Tensor:
        """Return the final norm's output (B, T, C) bf16 for token ids (B, T)."""
        scalars = self.scales() if self.scales else [(None, None)] * len(self.blocks)
        if self.fused is not None:
            return self.hidden_by_kernels(idx, first, in_place, scalars)
        x = self.embed(idx)                                                # (B, T, C) bf16
        x0, recompute = x if self.cfg.USE_X0 else None, self.cfg.USE_AC_BLOCKS and self.training
        for block, (x_scale, x0_scale) in zip(self.blocks, scalars, strict=True):
            call = functools.partial(self.te.checkpoint, block, use_reentrant=False) if recompute else block
            x = call(x, self.cos, self.sin, idx, first, x0, x_scale, x0_scale)
        return self.norm(x)

    def hidden_by_kernels(self, idx: Tensor, first: bool | None, in_place: str, scalars: list[tuple]) -> Tensor:
        """Return what hidden() returns, by our Triton kernels."""
        order = token_order(idx, self.cfg.vocab_size)
        x, delta = self.embed(idx, order, in_place), None
        x0 = x if self.cfg.USE_X0 else None
        self.fused.begin(x, first, in_place, order)
        for block, (x_scale, x0_scale), layers in zip(self.blocks, scalars, self.fused.blocks, strict=True):
            x, delta, x0 = block(x, delta, x0, x_scale, x0_scale, fused=layers)
        return AddNorm.apply(x, delta, self.norm.weight, self.cfg.norm_eps)

    def matrices(self) -> list[Tensor]:
        """Return the weights that Muon trains."""
        return [p for name, p in self.blocks.named_parameters() if name.endswith(tuple(MATRICES.values()))]


# ======================================================================================================================
# Optimizers


class Optimizers(OptimizerSet):
    """Muon for the matrices in the blocks, AdamW for the rest, stepped as one."""

    def __init__(self, model: GPT, cfg: SimpleNamespace, procs: Processes, parallel: "Parallel", data_tokens: int):
        """Sort the parameters into groups. data_tokens: tokens of the train shards. Raises: UserError if an optimizer
        cannot run here."""
        self.schedule = Schedule(cfg, data_tokens)
        sharded, self.buffers = parallel.wrapper == "fsdp2", parallel.buffers
        blocks = list(model.blocks.named_parameters())
        muon = dict(lr=cfg.learning_rate, weight_decay=cfg.weight_decay, mu=cfg.muon_momentum_start,
                    cautious_wd=cfg.USE_CAUTIOUS_WD)
        if cfg.muon_variant == "normuon":
            muon["muon_beta2"] = cfg.muon_beta2
        matrix_groups = [
            dict(name="qkv", params=[p for n, p in blocks if n.endswith("qkv.weight")],
                 split_sizes=(cfg.n_embd, cfg.n_embd, cfg.n_embd), **muon),
            dict(name="matrices", params=[p for n, p in blocks if n.endswith(("proj.weight", "fc1_weight"))], **muon),
            dict(name="fc2", **muon | dict(lr=cfg.learning_rate * cfg.lr_ratio_fc2),
                 params=[p for n, p in blocks if n.endswith("fc2_weight")]),
        ]
        adam_groups = self.adam_groups(model, cfg)
        for group in matrix_groups + adam_groups:
            group["params"] = self.buffers.own(group["params"])
        # Before Dion turns its groups' "lr" into tensors on the device
        self.base_lr = {g["name"]: g["lr"] for g in matrix_groups + adam_groups}

        # Compiling Dion's update adds half a minute to a first start, and saves milliseconds a step (results/NOTES.md)
        self.compiled = cfg.USE_COMPILE is True
        mesh, obstacle = procs.mesh if sharded else None, ""
        if sharded and 3 * cfg.n_embd % procs.world_size:
            obstacle = f"Dion cannot divide 3 x n_embd = {3 * cfg.n_embd} rows among {procs.world_size} ranks"
        quack = model.fused is not None and any(model.fused.quack)
        self.muon, self.description = make_muon(matrix_groups, cfg.muon_impl, procs.device, mesh, self.compiled,
                                                obstacle, quack)
        adam = dict(betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_eps)
        self.all = [self.muon]
        if cfg.USE_8BIT_ADAM:
            bitsandbytes = import_bitsandbytes(procs.device, sharded)
            self.all.append(bitsandbytes.optim.AdamW8bit(adam_groups[:2], **adam))  # embed and head
            adam_groups = adam_groups[2:]
            self.description += "; AdamW8bit by bitsandbytes for embedding and head, AdamW for the rest"
        else:
            self.description += "; AdamW for the rest"
        self.all.append(make_adam(adam_groups, procs.device, sharded, **adam))
        self.groups = {g["name"]: g for g in muon_groups(self.muon)}
        self.groups.update({g["name"]: g for optimizer in self.all[1:] for g in optimizer.param_groups})

    def adam_groups(self, model: GPT, cfg: SimpleNamespace) -> list[dict]:
        """Return AdamW's groups: all parameters but the matrices in the blocks."""
        blocks, decay = list(model.blocks.named_parameters()), self.schedule.table_decay
        table_betas = (cfg.adam_beta1, cfg.adam_beta2_embed)
        gains = [p for n, p in model.named_parameters()
                 if (p.ndim == 1 and not n.startswith("scales.")) or n.endswith("value_embed.gate")]
        groups = [
            dict(name="embed", params=[model.embed.weight], lr=cfg.learning_rate_embed, betas=table_betas,
                 weight_decay=decay(cfg.weight_decay_embed, cfg.learning_rate_embed)),
            dict(name="head", params=[model.head.weight], lr=cfg.learning_rate_head,
                 weight_decay=decay(cfg.weight_decay_head, cfg.learning_rate_head)),
            dict(name="gains", params=gains, lr=cfg.learning_rate_gain, weight_decay=cfg.weight_decay_gain),
        ]
        if cfg.n_value_embed:
            tables = [p for n, p in blocks if n.endswith("value_embed.table")]
            groups.append(dict(name="values", params=tables, lr=cfg.learning_rate_value, betas=table_betas,
                               weight_decay=decay(cfg.weight_decay_embed, cfg.learning_rate_value)))
        if cfg.USE_X0:
            groups += [dict(name="x0", params=[model.scales.x0], lr=cfg.learning_rate_x0, betas=(0.96, 0.95),
                            weight_decay=0.0),  # betas and the factor 1/100: nanochat's
                       dict(name="x", params=[model.scales.x], lr=cfg.learning_rate_x0 / 100, weight_decay=0.0)]
        return groups

    def set_schedule(self, step: int) -> dict[str, float]:
        """Set learning rates, Muon's momentum and weight decay for a step; return them by log.jsonl's names."""
        factor, momentum = self.schedule.factor(step), self.schedule.momentum(step)
        lr = {name: self.base_lr[name] * factor for name in self.groups}
        for name, group in self.groups.items():
            set_value(group, "lr", lr[name])
        for group in muon_groups(self.muon):
            set_value(group, "mu", momentum)
            set_value(group, "weight_decay", self.schedule.weight_decay(step))
        return dict(lr_muon=lr["qkv"], lr_embed=lr["embed"], lr_head=lr["head"], momentum=momentum)


# ======================================================================================================================
# Parallelism


def choose_wrapper(cfg: SimpleNamespace, procs: Processes, parameters: int) -> tuple[str, str]:
    """Return "none", "ddp" or "fsdp2", and the reason, from the flags, the number of ranks and the GPU's memory."""
    fsdp2, ddp, ranks = cfg.USE_FSDP2, cfg.USE_DDP, procs.world_size
    if fsdp2 is True and ddp is True:
        raise UserError("USE_FSDP2 and USE_DDP exclude each other; set only one of them to True", 2)
    if fsdp2 is True or ddp is True:
        return ("fsdp2", "USE_FSDP2=True") if fsdp2 is True else ("ddp", "USE_DDP=True")
    if ranks == 1:
        return "none", "one rank"
    if fsdp2 is False and ddp is False:
        raise UserError(f"{ranks} ranks need a wrapper; leave USE_FSDP2 or USE_DDP at auto, or set one to True", 2)
    if fsdp2 is False:
        return "ddp", f"{ranks} ranks, USE_FSDP2=False"
    if ddp is False:
        return "fsdp2", f"{ranks} ranks, USE_DDP=False"
    if procs.device.type != "cuda":
        return "ddp", f"{ranks} ranks on CPUs"
    # fp32 weight and gradient on every rank; at most two fp32 moments (Muon has one) divided among them
    state_gb = (8 + 8 / ranks) * parameters / 1e9
    memory_gb = min(procs.gather(torch.cuda.get_device_properties(procs.device).total_memory)) / 1e9
    if state_gb < memory_gb / 4:
        return "ddp", f"{ranks} ranks; {state_gb:.1f} GB of state are under a quarter of a {memory_gb:.0f} GB GPU"
    return "fsdp2", f"{ranks} ranks; {state_gb:.1f} GB of state are over a quarter of a {memory_gb:.0f} GB GPU"


class Parallel:
    """The model, and how its gradients and updates are shared out over the ranks."""

    def __init__(self, model: GPT, wrapper: str, cfg: SimpleNamespace, procs: Processes):
        """Prepare the model in place. wrapper: "none", "ddp" (every rank holds all weights) or "fsdp2"."""
        self.model, self.wrapper, self.world_size = model, wrapper, procs.world_size
        self.by_hooks = wrapper == "fsdp2" and cfg.FSDP2_RESHARD  # FSDP2 gathers weights and reduces gradients itself
        self.in_place = "" if self.by_hooks else "add"  # hooks must see the gradients
        self.buffers = Local(model, procs.world_size)  # where gradients and weights lie, and how ranks exchange them
        reduce, gather = (torch.float32 if on else torch.bfloat16 for on in (cfg.REDUCE_FP32, cfg.GATHER_FP32))
        if wrapper == "ddp":
            self.buffers = Zero2(model, model.matrices(), procs, reduce, gather, not cfg.USE_8BIT_ADAM)
        elif wrapper == "fsdp2":
            # Inputs are not cast: RoPE's tables must stay fp32; the rest is bf16 or integers
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False, reduce_dtype=reduce)
            if model.scales:  # in fp32: a few learned scalars, which bf16 would move in steps of 1%
                fully_shard(model.scales, mesh=procs.mesh, reshard_after_forward=False)
            for part in (model.embed, *model.blocks, model.head):
                fully_shard(part, mesh=procs.mesh, mp_policy=policy, reshard_after_forward=True)
            fully_shard(model, mesh=procs.mesh, mp_policy=policy, reshard_after_forward=False)
            if not self.by_hooks:
                self.buffers = Gathered(model, model.matrices(), procs, reduce, exact=model.scales)

    def is_first(self, m: int) -> bool | None:
        """Return GPT.forward()'s `first` for a step's micro-batch m: True for the first, which quantizes the weights;
        False for the others, which reuse them. None for TE's modules under FSDP2: they quantize in each micro-batch."""
        return None if self.wrapper == "fsdp2" and self.model.fused is None else m == 0

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Enter the context of one micro-batch. FSDP2's hooks reduce gradients over the ranks in a step's last one."""
        if self.by_hooks:
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        with self.buffers.in_model():
            yield

    def reduce_gradients(self) -> Tensor:
        """Average the gradients over the ranks; return this rank's share of the sum of their squares, on the device."""
        self.buffers.reduce()
        return self.buffers.squared_norm()


# ======================================================================================================================
# Evaluation


@torch.no_grad()
def evaluate(model: nn.Module, ring: TokenRing, cfg: SimpleNamespace, procs: Processes, autocast: Callable,
             after_batch: Callable[[], None] = lambda: None) -> float:
    """Return the mean loss over the first eval_tokens of the val shards (nats per token), with all ranks taking part.

    Sequence s is tokens s*T ... s*T + T of the ring. Rank r takes sequences r, r + world_size, ...; rows without
    targets fill the last batch. So in bf16 the result is the same for any number of ranks and any batch size; an FP8
    head has a scale for each micro-batch.

    autocast: returns the context of a batch (bf16, or the format of training). after_batch: called after each batch.
    """
    T, sequences = cfg.block_size, cfg.eval_tokens // cfg.block_size
    per_batch = procs.world_size * cfg.batch_size
    loss_sum = torch.zeros((), dtype=torch.float64, device=procs.device)
    model.eval()
    for start in range(0, sequences, per_batch):
        x = torch.zeros(cfg.batch_size, T, dtype=torch.int32)
        y = torch.full((cfg.batch_size, T), -1, dtype=torch.int64)
        for row in range(cfg.batch_size):
            s = start + row * procs.world_size + procs.rank
            if s < sequences:
                tokens = torch.from_numpy(ring.read(s * T, T + 1))
                x[row], y[row] = tokens[:-1], tokens[1:]
        with autocast():
            loss_sum += model(x.to(procs.device), y.to(procs.device)).double()
        after_batch()
    model.train()
    return procs.sum(loss_sum).item() / (sequences * T)


# ======================================================================================================================
# The step


@dataclass
class Run:
    """What a step, an evaluation and a checkpoint need. build() makes the part that a step needs, set_up() the rest."""

    cfg: SimpleNamespace
    procs: Processes
    precision: Precision
    parallel: Parallel
    optimizers: Optimizers
    loader: DataLoader
    guard: Guard
    wrapper_reason: str = ""                  # why this wrapper was chosen
    batch_choice: memory.Choice | None = None  # why this batch_size was chosen
    parameters: int = 0                       # of the whole model
    graphs: MicroBatchGraphs | None = None    # micro-batches as CUDA graphs, once they are captured
    stop: StopSignal | None = None
    val_ring: TokenRing | None = None
    fingerprints: dict = field(default_factory=dict)  # of all shards
    folder: str = ""
    first_step: int = 0                       # steps that a resumed run has already taken
    in_bf16: list[str] = field(default_factory=list)  # layers that HIGH_PRECISION_LAYERS keeps in bf16
    machine: dict = field(default_factory=dict)
    log: runlog.RunLog | None = None                 # on rank 0
    progress: runlog.Progress | None = None
    checkpoints: checkpoint.Checkpoints | None = None
    last_save: float = 0.0                    # time.monotonic() of the last checkpoint

    @property
    def model(self) -> GPT:
        """The model, as Parallel prepared it."""
        return self.parallel.model

    def forward_backward(self, x: Tensor, y: Tensor, m: int, last: bool) -> Tensor:
        """Add up the gradients of one micro-batch; return its share of the loss, a scalar on the device.

        m: its number in the step. last: whether it is the step's last.
        """
        with self.parallel.micro_batch(last):
            with self.precision.autocast(self.procs):
                loss = self.model(x, y, first=self.parallel.is_first(m), loss_weight=self.loader.loss_weight,
                                  in_place=self.parallel.in_place)
            loss.backward()
        return loss.detach()


@dataclass
class StepResult:
    """Outcome of one optimizer step, the same on every rank."""

    loss: float      # mean over the step's tokens, in nats
    norm: float      # gradient norm before clipping
    skipped: str     # why the guard rejected the step; "": it was taken
    stop: bool       # some rank was asked to stop
    save_due: bool   # ckpt_minutes have passed since the last checkpoint, by the clock of rank 0


def train_step(run: Run) -> StepResult:
    """Take one optimizer step over accumulation x world_size micro-batches, unless run.guard rejects its gradients.

    The host waits for the GPU once: it must know loss and norm before the optimizers run. Dion and bitsandbytes cannot
    skip a step by a flag on the GPU, and zero gradients would still decay momenta. Clipping needs the norm, too.
    """
    parallel, loader, procs, device = run.parallel, run.loader, run.procs, run.procs.device
    restore_scales = snapshot_scales(run.model)
    loss_sum = torch.zeros((), device=device)
    for m in range(loader.accumulation):
        x, y = loader.next()
        if run.graphs is not None:
            loss_sum += run.graphs(x, y, m == 0)
        else:
            loss_sum += run.forward_backward(x, y, m, last=m == loader.accumulation - 1)
    run.precision.share_amaxes(run.model, procs)
    norm_squared = parallel.reduce_gradients()

    # One reduction for all that the ranks must agree on (torch.full() does not wait for the GPU; torch.tensor() does)
    stop = run.stop is not None and bool(run.stop.requested)
    save_due = procs.is_main and 0 < 60 * run.cfg.ckpt_minutes <= time.monotonic() - run.last_save
    requests = [torch.full((), float(request), device=device) for request in (stop, save_due)]
    shared = procs.sum(torch.stack([loss_sum / procs.world_size, norm_squared, *requests]))
    shared[1].sqrt_()
    loss, norm, stop, save_due = shared.tolist()  # the host waits here

    skipped = run.guard.check(loss, norm)
    if skipped:
        restore_scales()
    else:
        if 0 < run.cfg.grad_clip < norm:
            nn.utils.clip_grads_with_norm_(run.optimizers.parameters(), run.cfg.grad_clip, shared[1], foreach=True)
        run.optimizers.step()
        parallel.buffers.gather()
    if run.graphs is None:  # with graphs, a step's first micro-batch overwrites the gradients
        parallel.buffers.zero_grad()
    return StepResult(loss, norm, skipped, bool(stop), bool(save_due))


def calibrate(run: Run) -> None:
    """Make a forward and backward pass on the next micro-batch and throw its gradients away.

    It compiles kernels and fills delayed scaling's amax history: at the first scale, 1, gradients of order 1e-7 round
    to zero in E5M2. The loss is scaled as in training: a larger amax would stay in the history. Weights, optimizers and
    data position do not change; nor do the scales if loss or gradients are not finite.
    """
    restore_scales = snapshot_scales(run.model)
    loss = run.forward_backward(*run.loader.peek(), m=0, last=True)
    with run.parallel.buffers.in_model():
        norm = gradient_norm(run.model.parameters())
    run.precision.share_amaxes(run.model, run.procs)
    if not math.isfinite(run.procs.sum(loss + norm)):
        restore_scales()
    run.parallel.buffers.zero_grad()


# ======================================================================================================================
# The loop


def train(run: Run) -> int:
    """Train to the last step, or until a signal; return the number of steps that the run has taken, from its start.
    Raises UserError after max_bad_steps consecutive skipped steps."""
    cfg, progress, checkpoints, clock = run.cfg, run.progress, run.checkpoints, Clock(run.procs.device)
    steps, run.last_save = run.first_step, time.monotonic()
    for step in range(run.first_step, cfg.max_iters):
        steps, last = step + 1, step == cfg.max_iters - 1
        rates = run.optimizers.set_schedule(step)
        begin = clock.mark()
        prepare_step(run, step)
        with profiling(run.folder, run.procs, cfg.USE_PROFILE and step == min(run.first_step + 5, cfg.max_iters - 1)):
            result = train_step(run)
        end = clock.mark()
        progress.step(step, rates, result.loss, result.norm, functools.partial(clock.ms, begin, end), result.skipped)
        if run.guard.in_a_row >= cfg.max_bad_steps:
            progress.flush()
            checkpoints.finish(wait=True)  # else a checkpoint still being written is lost
            raise UserError(f"{run.guard.in_a_row} consecutive steps were skipped, the last at step {step + 1} "
                            f"({result.skipped}); try a lower learning rate, a longer warm-up or other data. "
                            f"Newest checkpoint: {checkpoints.last or 'none'}")
        if runlog.is_due(step, cfg.FP8_STATS_INTERVAL):
            runlog.log_fp8_stats(run, step)  # does not change the training
        due = result.save_due or runlog.is_due(step, cfg.ckpt_interval)
        if last or result.stop or (due and run.guard.healthy):
            checkpoint.save_checkpoint(run, step + 1)  # first: an evaluation leaves FSDP2's weights gathered
        if last or runlog.is_due(step, cfg.eval_interval):
            if result.stop:
                checkpoints.finish(wait=True)  # the sender may kill this process during the evaluation
            evaluate_and_log(run, step)
        checkpoints.finish()
        if result.stop:
            break
    checkpoints.close()
    return steps


def prepare_step(run: Run, step: int) -> None:
    """Calibrate before the first steps (set_up() does it for step 0); then capture the CUDA graphs, anew when the batch
    grows: loss_weight is a constant in a graph. The graphs of the updates share the memory of the micro-batches'."""
    run.loader.start_step(step)
    calibrations = run.precision.calibration_steps(run.cfg)
    if 0 < step < calibrations:
        calibrate(run)  # head and output projections start at zero: layers below get their first gradients later
    use_graphs = run.cfg.USE_CUDA_GRAPHS and run.model.fused is not None and not run.parallel.by_hooks
    outdated = run.graphs is not None and run.graphs.loss_weight != run.loader.loss_weight
    if use_graphs and (step == max(run.first_step + 3, calibrations) or outdated):
        run.graphs, run.optimizers.graphs = None, ()
        for cache in (run.model.fused.cache, run.model.head.cache):
            cache.clear()  # weights in the old graphs' memory
        run.graphs = MicroBatchGraphs(run.parallel, run.loader, run.precision, run.procs)
        run.optimizers.capture(run.graphs.pool)


def evaluate_and_log(run: Run, step: int) -> None:
    """Evaluate in one format (after the last step: in both) and log it; delayed scaling's state is kept."""
    run.progress.flush()  # an evaluation that fails must not lose the step before it
    formats = run.precision.evaluation_formats(run.cfg)
    formats = formats if step == run.cfg.max_iters - 1 else formats[:1]
    with preserved_scales(run.model), run.parallel.buffers.in_model():
        val_losses = {
            name: evaluate(run.model, run.val_ring, run.cfg, run.procs,
                           functools.partial(run.precision.autocast, run.procs, quantized=name != "bf16"),
                           run.checkpoints.finish)
            for name in formats}
    run.progress.val(step, val_losses[formats[0]], val_losses)
    gc.collect()  # automatic collection is off (pause_garbage_collection)


# ======================================================================================================================
# Set-up


def set_up(cfg: SimpleNamespace, procs: Processes, cleanup: contextlib.ExitStack) -> Run:
    """Build everything that training needs, and report it in one table.

    Data and checkpoint are checked first, before anything is built. `cleanup` gets what must be undone at the end, also
    after an error: other runs may follow in this process.
    """
    resumed, lock = resuming.lock_checkpoint(cfg, procs)
    if lock:
        cleanup.callback(lock.close)
    resolve_length(cfg, checkpoint.adopt_flags(resumed, cfg, CLASSIC, procs) if resumed else {})
    if resumed:
        checkpoint.check_fixed_flags(resumed, cfg)  # before the remedies of other checks name a flag that cannot change
        memory.adopt_batch_size(resumed, cfg, procs)
    check_flags(cfg, procs.world_size, bool(resumed))
    torch.set_float32_matmul_precision("high")
    if procs.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(procs.device)
    loader, val_ring = open_data(cfg, procs)
    fingerprints = checkpoint.shard_fingerprints(loader.ring, val_ring, procs)
    meta = checkpoint.check_resume(resumed, cfg, loader.ring, fingerprints, procs) if resumed else None

    run = build(cfg, procs, loader)
    run.val_ring, run.fingerprints, run.first_step = val_ring, fingerprints, meta["step"] if meta else 0
    run.machine = describe_machine(procs.device)
    run.folder, lock = resuming.open_run_folder(cfg, procs, lock, cleanup)
    runlog.print_table(run, resumed)

    start = time.perf_counter()
    memory.try_batch_size(run, build)  # a trial pass; if it runs out of memory, all in `run` is built anew
    cleanup.callback(run.loader.close)
    run.loader.start_step(run.first_step)
    calibrate(run)  # and compile, before training is timed
    if resumed:
        memory.warn_if_not_bit_exact(meta, cfg, procs)
        run.guard = Guard(cfg, meta.get("guard"), run.precision.grad_zscore)
        if not checkpoint.restore(run, resumed, meta):  # scales missing: calibrate as often as a new run
            for _ in range(run.precision.calibration_steps(cfg)):
                calibrate(run)
    if procs.is_main:
        resuming.enter_run_folder(run, resumed)
        run.log = runlog.open_log(run, lock)
        cleanup.push(lambda kind, *_: run.log.close(failed=kind is not None))
    run.checkpoints = checkpoint.Checkpoints(run.folder, cfg.keep_checkpoints, procs)
    cleanup.push(run.checkpoints.finish_after_error)
    run.stop = cleanup.enter_context(StopSignal())
    run.checkpoints.prepare(lambda: checkpoint.training_state(run))
    run.progress = runlog.Progress(cfg, procs, run.log, flops_per_token(cfg), meta["train_seconds"] if meta else 0.0)
    Clock(procs.device).wait()
    run.progress.compile_seconds = time.perf_counter() - start
    procs.print(f"ready after {run.progress.compile_seconds:.1f} s of compiling and calibration\n")
    pause_garbage_collection(cleanup)
    return run


def build(cfg: SimpleNamespace, procs: Processes, loader: DataLoader) -> Run:
    """Build precision, model, wrapper and optimizers, from the flag `seed`, for the micro-batch that fits."""
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed)
    random.seed(cfg.seed)
    precision = select_precision(cfg, procs.device)
    check_one_format(precision, procs)
    parameters = parameter_count(cfg)
    wrapper, reason = choose_wrapper(cfg, procs, parameters)
    batch_choice = memory.choose_batch_size(cfg, precision, wrapper, procs)
    if cfg.batch_size != loader.batch_size:
        loader = DataLoader(loader.ring, cfg, procs)
    use_compile = procs.device.type == "cuda" if cfg.USE_COMPILE == "auto" else cfg.USE_COMPILE
    compiled = functools.cache(lambda f: compiled_at_first_call(f, dynamic=False)) if use_compile else (lambda f: f)
    if precision.emulated:
        precision.te.compile_kernels(use_compile)
        precision.te.forget_modules()  # of runs before this one in this process
        precision.te.manual_seed(cfg.seed + procs.rank)  # stochastic rounding
    model = GPT(cfg, precision, compiled, procs.device)
    in_bf16 = keep_high_precision(model, cfg.HIGH_PRECISION_LAYERS, precision.te)
    parallel = Parallel(model, wrapper, cfg, procs)
    optimizers = Optimizers(model, cfg, procs, parallel, loader.ring.total)
    torch.cuda.manual_seed(cfg.seed + procs.rank)  # Transformer Engine's stochastic rounding; nothing without a GPU
    guard = Guard(cfg, auto_grad_zscore=precision.grad_zscore)
    return Run(cfg, procs, precision, parallel, optimizers, loader, guard, reason, batch_choice, parameters,
               in_bf16=in_bf16)


def run(cfg: SimpleNamespace, procs: Processes) -> str:
    """Train by the flags from start to end; return the run folder. Raises UserError."""
    with contextlib.ExitStack() as cleanup:
        state = set_up(cfg, procs, cleanup)
        if runlog.evaluation_is_missing(state):
            evaluate_and_log(state, state.first_step - 1)
        checkpoint.finish_run(state, train(state))
        return state.folder


def read_flags(argv: Sequence[str], has_gpu: bool | None = None) -> SimpleNamespace:
    """Resolve this script's flags from command-line arguments (has_gpu: default torch.cuda.is_available())."""
    found = torch.cuda.is_available() if has_gpu is None else has_gpu
    cfg = parse_flags(argv, os.path.abspath(__file__), PRESETS, found)
    if has_gpu is None and not found and "preset" in cfg.auto:
        check_gpus()  # rather than train a tiny model on the CPU by surprise
    resolve_length(cfg)
    return cfg


def main(argv: Sequence[str] | None = None) -> str:
    """Train by command-line arguments (default: the program's own); return the run folder."""
    return command_line(run, read_flags, __file__, argv, memory_flags=("batch_size", "USE_AC_BLOCKS"))


if __name__ == "__main__":
    main()
