"""
The plain reference that train.py is measured against: a GPT-2-style model in torch alone, AdamW, bf16 autocast, DDP.

    python train_orig.py                                # d20 with a GPU, tiny without
    python train_orig.py --preset=tiny --max_iters=20   # any flag below can be set as --name=value
    torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node=8 train_orig.py
    python train_orig.py --help                         # all flags with their defaults

It reads the same shards in the same order as train.py and writes the same log. Model, loss, optimizer, precision and
loop are its own. What has nothing to do with how a model learns (flags, processes, data, logging, the passes over the
val shards) comes from train.py and nanofp8.
"""

from typing import Literal

from nanofp8.config import (  # types of flags, and what reads them
    AutoBool,
    FolderName,
    Fraction,
    Layers,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Timeout,
    check_command_line,
    flag_values,
    parse_flags,
)

if __name__ == "__main__":
    check_command_line(__file__)  # --help and wrong flags are answered here, before torch is imported

import contextlib
import math
import os
import time
from types import SimpleNamespace
from typing import Sequence

from nanofp8 import host

host.start_torch()  # before all that needs it: it sets the allocator, and refuses a torch that is too old

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from nanofp8.machine import describe_machine
from nanofp8.procs import Processes, command_line
from nanofp8.runlog import FolderLock, Progress, RunLog, data_rows, is_due, make_run_folder
from nanofp8.schedule import lr_factor
from train import DataLoader, TokenRing, check_flags, evaluate, flops_per_token, gradient_norm, open_data

# ======================================================================================================================
# Flags. Edit a value here, or give --name=value. The values below are those of preset "d20".
# A flag that is edited here or given on the command line beats the preset.

# The run
preset: Literal["auto", "d20", "d12", "tiny"] = "auto"  # "auto": d20 with a GPU, tiny without
run_name: FolderName = "gpt2"             # the run folder is out_dir/run_name; a name that is taken gets a number
out_dir: NonEmpty = "out"                 # folder for run folders
seed: Seed = 1337                         # seed of initialisation; data order is fixed

# Data
dataset: NonEmpty = "fineweb10B"          # folder below data_dir: fineweb10B, openwebtext-100k, shakespeare, ...
data_dir: NonEmpty = "data"               # relative to this file unless absolute
USE_SHUFFLE: bool = True                  # passes over the data after the first take its sequences in random order

# Model
n_layer: Layers = 20                      # transformer blocks
n_embd: Positive = 1280                   # width of the residual stream
n_head: Positive = 10                     # attention heads; the head size is n_embd / n_head
vocab_size: Positive = 50304              # rows of the embedding, also the head; 50,257 rounded up to 128s
block_size: Positive = 2048               # tokens per sequence

# Batch and schedule, in optimizer steps
total_batch_size: Positive = 524288       # tokens per optimizer step, over all ranks and micro-batches
batch_size: Positive = 8                  # sequences per micro-batch and rank; its logits take 3.3 GB in fp32
max_iters: Positive = 1700                # optimizer steps; 1700 x 524,288 tokens = 9 FineWeb shards, once
warmup_iters: NonNegative = 100           # steps of linear warm-up of the learning rate
min_lr_ratio: NonNegativeFloat = 0.1      # the cosine ends at this fraction of the learning rate

# Optimizer: AdamW for everything
learning_rate: NonNegativeFloat = 6e-4    # after the warm-up
weight_decay: NonNegativeFloat = 0.1      # matrices and embeddings; multiplied by the learning rate
adam_beta1: Fraction = 0.9                # average of gradients
adam_beta2: Fraction = 0.95               # average of squared gradients
adam_eps: PositiveFloat = 1e-8            # added to the square root of that average
grad_clip: NonNegativeFloat = 1.0         # largest global gradient norm; 0: measure it only

# Speed
USE_COMPILE: AutoBool = "auto"            # torch.compile for the whole model; "auto": on a GPU

# Evaluation and logging
eval_interval: NonNegative = 125          # steps between evaluations; 0: only at the end
eval_tokens: Positive = 10485760          # tokens of the val shards per evaluation (all of them if there are fewer)
log_interval: Positive = 1                # steps between log lines
USE_WANDB: bool = False                   # also log to Weights & Biases
wandb_project: str = "nanogpt-fp8"        # wandb: name of the project
rank_timeout: Timeout = 120.0             # seconds without a heartbeat before a rank is declared dead

# End of flags
# ======================================================================================================================

# Preset d20 repeats the defaults above: a flag that differs from it was edited.
PRESETS = {
    "d20": dict(
        dataset="fineweb10B", n_layer=20, n_embd=1280, n_head=10, block_size=2048, total_batch_size=524288,
        batch_size=8, max_iters=1700, warmup_iters=100, learning_rate=6e-4, eval_interval=125, eval_tokens=10485760,
    ),
    "d12": dict(n_layer=12, n_embd=768, n_head=6, batch_size=16),
    "tiny": dict(
        dataset="shakespeare", n_layer=4, n_embd=128, n_head=2, block_size=128, total_batch_size=2048, batch_size=8,
        max_iters=60, warmup_iters=5, learning_rate=3e-3, eval_interval=20, eval_tokens=16384,
    ),
}


# ======================================================================================================================
# Model and loss


class Attention(nn.Module):
    """Causal self-attention, with biases."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                                # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """C -> 4C, GELU in its tanh form, 4C -> C, with biases."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """One transformer block: x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), Attention(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token + position embedding -> blocks -> LayerNorm -> head, which is the token embedding again."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("proj.weight"):  # 2 x n_layer of them add up in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, a scalar fp32, for idx (B, T) int32 and targets (B, T) int64 (-1: no target)."""
        x = self.wte(idx) + self.wpe.weight[:idx.shape[1]]                   # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)                     # (B, T, V), bf16 under autocast
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum")


# ======================================================================================================================
# Optimizer, step and loop


def make_optimizer(model: GPT, cfg: SimpleNamespace) -> torch.optim.AdamW:
    """Build AdamW. Matrices and embeddings decay; biases and LayerNorms do not."""
    parameters = list(model.parameters())
    groups = [dict(params=[p for p in parameters if p.ndim == 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_eps,
                             fused=parameters[0].is_cuda)


def autocast(device: torch.device) -> torch.autocast:
    """Return the context of a pass: bf16 on a GPU; fp32 on a CPU, where it is as fast at preset tiny."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def train_step(module: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, cfg: SimpleNamespace,
               procs: Processes) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one optimizer step over accumulation x world_size micro-batches.

    Returns: mean loss over the step's whole batch, and gradient norm before clipping, scalar tensors on the device.
    """
    loss_sum = torch.zeros((), device=procs.device)
    for m in range(loader.accumulation):
        x, y = loader.next()
        wait = procs.world_size > 1 and m < loader.accumulation - 1  # the last micro-batch reduces all gradients
        with module.no_sync() if wait else contextlib.nullcontext():
            with autocast(procs.device):
                loss = module(x, y) * loader.loss_weight
            loss.backward()
        loss_sum += loss.detach()
    norm = clip_gradients(list(module.parameters()), cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return procs.sum(loss_sum) / procs.world_size, norm


def clip_gradients(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a global norm of at most max_norm (0: leave them). Return the norm before that."""
    norm = gradient_norm(parameters)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def set_up(cfg: SimpleNamespace, procs: Processes, loader: DataLoader,
           val_ring: TokenRing) -> tuple[GPT, nn.Module, torch.optim.Optimizer, Progress, str]:
    """Build model, wrapper, optimizer and log, and compile.

    Returns: the model, the module to call, the optimizer, the progress, the run folder.
    """
    with procs.device:
        model = GPT(cfg)
    on_gpu = procs.device.type == "cuda"
    if on_gpu if cfg.USE_COMPILE == "auto" else cfg.USE_COMPILE:
        model.compile(dynamic=False)  # in place, so that parameters keep their names
    wrapper, module = "none", model
    if procs.world_size > 1:
        wrapper, module = "ddp", DistributedDataParallel(model, gradient_as_bucket_view=True,
                                                         device_ids=[procs.device] if on_gpu else None)
    optimizer = make_optimizer(model, cfg)
    parameters, precision = sum(p.numel() for p in model.parameters()), "bf16" if on_gpu else "fp32"

    folder = procs.broadcast(make_run_folder(cfg.out_dir, cfg.run_name) if procs.is_main else None)
    machine, log = describe_machine(procs.device), None
    rows = [
        ("device", f"{procs.world_size} x {machine['device']}, torch {torch.__version__}"),
        ("setup", f"{precision}, wrapper {wrapper}, AdamW, {parameters:,} parameters"),
        *data_rows(cfg, procs, loader, val_ring),
        ("run folder", folder),
    ]
    procs.print("\n".join(f"{name:<18} {text}" for name, text in rows) + "\n")
    if procs.is_main:
        config = flag_values(cfg) | machine | dict(world_size=procs.world_size, wrapper=wrapper, precision=precision,
                                                   emulated=False, optimizers="AdamW", parameters=parameters)
        log = RunLog(folder, FolderLock(folder), config, wandb_project=cfg.wandb_project if cfg.USE_WANDB else "")

    # Compile before training is timed: a forward and backward pass whose gradients are thrown away
    start = time.perf_counter()
    x, y = loader.peek()
    with autocast(procs.device):
        loss = module(x, y)
    loss.backward()
    optimizer.zero_grad(set_to_none=True)
    loss.item()  # waits for the GPU
    progress = Progress(cfg, procs, log, flops_per_token(SimpleNamespace(**vars(cfg), window_pattern="L")))
    progress.compile_seconds = time.perf_counter() - start
    procs.print(f"ready after {progress.compile_seconds:.1f} s of compiling\n")
    return model, module, optimizer, progress, folder


def run(cfg: SimpleNamespace, procs: Processes) -> str:
    """Train by the flags from start to end; return the run folder. Raises UserError."""
    check_flags(cfg, procs.world_size)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    loader, val_ring = open_data(cfg, procs)  # first: a missing shard should be known before anything is built
    model, module, optimizer, progress, folder = set_up(cfg, procs, loader, val_ring)
    for step in range(cfg.max_iters):
        start = time.perf_counter()
        lr = cfg.learning_rate * lr_factor(step, cfg.warmup_iters, cfg.max_iters, cfg.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, norm = map(float, train_step(module, loader, optimizer, cfg, procs))  # waits for the GPU
        ms = 1000 * (time.perf_counter() - start)
        # One learning rate for all parameters; there is no Muon, so neither its rate nor its momentum
        rates = dict(lr_muon=None, lr_embed=lr, lr_head=lr, momentum=None)
        progress.step(step, rates, loss, norm, lambda ms=ms: ms)
        progress.flush()  # the step has ended: its line need not wait for the next one
        if step == cfg.max_iters - 1 or is_due(step, cfg.eval_interval):
            progress.val(step, evaluate(model, val_ring, cfg, procs, lambda: autocast(procs.device)))
    loader.close()
    progress.done()
    return folder


def read_flags(argv: Sequence[str], has_gpu: bool | None = None) -> SimpleNamespace:
    """Resolve this script's flags from command-line arguments (has_gpu: default torch.cuda.is_available())."""
    has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
    return parse_flags(argv, os.path.abspath(__file__), PRESETS, has_gpu)


def main(argv: Sequence[str] | None = None) -> str:
    """Train by command-line arguments (default: the program's own); return the run folder."""
    return command_line(run, read_flags, __file__, argv, memory_flags=("batch_size",))


if __name__ == "__main__":
    main()
