"""GPU memory: how much a run needs, the micro-batch that fits (batch_size="auto"), and a trial of it before training.

predict() adds up the tensors that are alive when most memory is in use. There are three such moments:

- In the head, at the end of a forward pass: the blocks have saved what their backward passes need, and logits of a
  chunk of tokens exist.
- In the backward pass of the last block, while all blocks before it still hold what they saved.
- In the optimizers' step. CUDA graphs keep the memory of a pass to themselves meanwhile, and during evaluations too.
  (Optimizers that are graphs use that memory. This is not counted: the first three steps run without graphs.)

What the tensors are is read from fused.py, loss.py, zero.py and te_emulation.py of this project, from Transformer
Engine 2.20.2 (pytorch/module/*.py) and from Dion 0a059a4. tests/test_memory.py compares the result with measured peaks,
and with the tensors that fused blocks really make. tools/memory_model.py measures it on a GPU.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from nanofp8 import sizes
from nanofp8.checkpoint import random_state, set_random_state
from nanofp8.checkpoint_files import read_checkpoint
from nanofp8.config import UserError, may_choose
from nanofp8.epilogues import NO_QUACK, Quack, choose_quack
from nanofp8.fused import blocks_fit, kernels_fit, needs_transposes
from nanofp8.machine import gpu_memory, is_out_of_memory
from nanofp8.parts import GATE_CHANNELS
from nanofp8.precision import Precision, choose_format, fp8_state, layer_names, match_layers
from nanofp8.procs import Processes

GB = 1e9

# Memory that no tensor of predict() takes, in bytes. tools/memory_model.py measures these
WORKSPACE = 0.25 * GB      # in torch's allocator: workspaces of cuBLAS, cuDNN and Transformer Engine, small tensors
FRAGMENTATION = 0.03       # in torch's allocator: share of all that it holds and cannot use
CONTEXT = 0.6 * GB         # outside of it: kernels that are loaded after the start
COMMUNICATION = 0.6 * GB   # outside of it, with several ranks: NCCL's buffers

TRIAL_ON_CPU = False  # for tests: run the trial on a CPU too

# ----------------------------------------------------------------------------------------------------------------------
# The model of memory


class Kind(NamedTuple):
    """What decides which tensors a run makes, besides its flags."""

    format: str                 # of precision.FORMATS
    blocks: str                 # "fused": our kernels; "modules": Transformer Engine's; "emulated"
    fp8_head: bool
    wrapper: str = "none"       # "none", "ddp" or "fsdp2"
    ranks: int = 1
    rope_in_place: bool = True  # RoPE and QK norm by our kernel; False: by torch.compile
    fp8_matmuls: bool = True    # the GPU has them; False: an FP8 head is computed in fp32
    keeps_inputs: bool = False  # fused blocks in FP8 keep the inputs of matmuls (which then need no transposes)
    quack: Quack = NO_QUACK     # fused blocks in which QuACK multiplies keep relu^2's output only, not fc1's in bf16


class Block(NamedTuple):
    """Bytes of what one block of a format keeps or makes. All but `weight` are per token and value of the width C."""

    weight: float     # of each value of a weight in low precision, in all layouts that are kept
    qkv_input: float  # saved input of the matmul for q, k and v
    proj_input: float  # saved input of proj; 0: attention's output serves
    fc1_input: float
    fc2_input: float  # 4 C values
    backward: float   # what its backward pass makes before it frees what was saved, at its peak
    fc1_output: float = 8  # 4 C values in bf16


# FP8 takes one byte, bf16 two, NVFP4 a half; a block scale of 32, 128 (4 bytes) or 16 values (1 byte) comes on top.
# Fused blocks in FP8 make the inputs of their matmuls again. Transformer Engine saves fc1's input in two layouts, and
# fc2's too where scales belong to blocks. The emulation holds the values in bf16.
#
# Compared with measured peaks: fused blocks, modules in delayed, current and block scaling, the emulation. Read from
# the source alone: modules in bf16, MXFP8 and NVFP4, and `backward` of modules, on which recomputation depends.
ROW, FOUR = 1 + 1 / 32, 1 / 2 + 1 / 16
BLOCKS = {
    ("fused", "bf16"): Block(2, 2, 0, 2, 8, 16),
    ("fused", "fp8-delayed"): Block(2, 0, 0, 0, 0, 24),
    ("modules", "bf16"): Block(2, 2, 0, 2, 8, 24),
    ("modules", "fp8-delayed"): Block(2, 1, 1, 2, 4, 36),
    ("modules", "fp8-current"): Block(2, 1, 1, 2, 4, 36),
    ("modules", "fp8-block"): Block(2, ROW, ROW, 2 * ROW, 8 * ROW, 40),
    ("modules", "fp8-mxfp8"): Block(2 * ROW, ROW, ROW, 2 * ROW, 8 * ROW, 40),
    ("modules", "nvfp4"): Block(2 * FOUR, FOUR, FOUR, 2 * FOUR, 8 * FOUR, 36),
    ("emulated", "bf16"): Block(0, 2, 0, 2, 8, 24),
    ("emulated", "fp8"): Block(2, 2, 2, 2, 8, 50),
    ("emulated", "fp8-mxfp8"): Block(4, 2, 2, 2, 8, 50),
}


def block_of(kind: Kind, in_bf16: bool = False) -> Block:
    """Return the bytes of a block of this kind; in_bf16: of one that HIGH_PRECISION_LAYERS keeps in bf16."""
    name = "bf16" if in_bf16 else kind.format
    if kind.blocks == "emulated" and (kind.blocks, name) not in BLOCKS:
        name = "fp8"
    block = BLOCKS[kind.blocks, name]
    if block is BLOCKS["fused", "fp8-delayed"]:
        if kind.keeps_inputs:
            block = block._replace(qkv_input=1, proj_input=1, fc1_input=1, backward=31)
        if kind.quack.fp8:
            block = block._replace(fc1_output=0, fc2_input=4)
    if block is BLOCKS["fused", "bf16"] and kind.quack.bf16:
        block = block._replace(fc1_output=0)
    return block


def saved_bytes(cfg: SimpleNamespace, kind: Kind, block: Block, layer: int) -> float:
    """Return the bytes per token that a block saves for its backward pass, without recomputation."""
    width, heads = cfg.n_embd, cfg.n_head
    embedded = layer in sizes.value_layers(cfg)
    # Two residuals; q, k and v; attention's output
    values = 2 + 2 + 6 + 2 + block.qkv_input + block.proj_input + block.fc1_input + block.fc1_output + block.fc2_input
    if cfg.USE_AC_ATTENTION:  # q, k and v as the matmul returned them; bf16's proj still needs attention's output
        values -= 2 if block.proj_input else 0
    elif not kind.rope_in_place:
        values += 8  # q and k before and after RoPE, v twice, what torch.compile keeps between
    if kind.blocks != "fused":
        values += 2 if cfg.USE_X0 else 0       # the residual before the token embedding is mixed in
        values += 4 if embedded else 0         # the value embeddings in fp32
    # In fp32: 1 / RMS of two norms, of each head of q and k; attention's log-sum-exps; gates and their inputs
    return values * width + 8 + 12 * heads + (4 * (heads + GATE_CHANNELS) if embedded else 0)


def blocks_in_bf16(cfg: SimpleNamespace) -> list[bool]:
    """Return for each block whether HIGH_PRECISION_LAYERS keeps one of its layers in bf16: then all of it counts so.

    Raises: UserError if a pattern matches nothing.
    """
    chosen = match_layers(cfg.HIGH_PRECISION_LAYERS, layer_names(cfg.n_layer))
    return [any(name.startswith(f"blocks.{i}.") for name in chosen) for i in range(cfg.n_layer)]


def largest_share(layers: int, width: int, ranks: int) -> int:
    """Return the most values of matrices that one rank owns under "ddp", as zero.assign_owners() divides them."""
    shares = [0] * ranks
    for i, factor in enumerate(factor for factor in (4, 4, 3, 1) for _ in range(layers)):  # fc1, fc2, qkv, proj
        shares[i % ranks] += factor * width ** 2
    return max(shares)


class Prediction(NamedTuple):
    """What a run takes, in bytes. The first five are there all the time; the others are not, and not all at once."""

    weights: float     # fp32, and under FSDP2 gathered in bf16
    gradients: float
    moments: float     # of Muon and AdamW
    copies: float      # weights in low precision
    workspace: float
    passing: float     # of a micro-batch: what blocks have saved, and the larger of head and backward pass
    step: float        # scratch of the optimizers
    evaluation: float  # of an evaluation, or of the statistics of FP8_STATS_INTERVAL
    graphs: bool       # whether CUDA graphs keep the memory of a micro-batch to themselves

    @property
    def resident(self) -> float:
        """Bytes that are in use all the time."""
        return self.weights + self.gradients + self.moments + self.copies + self.workspace

    @property
    def peak(self) -> float:
        """Bytes that tensors take at most at the same time, as torch.cuda.max_memory_allocated() counts them."""
        return self.resident + max(self.passing, self.step, self.evaluation)

    @property
    def beside_graphs(self) -> float:
        """Bytes that are needed while CUDA graphs hold the memory of a micro-batch."""
        return max(self.step, self.evaluation) if self.graphs else 0.0

    @property
    def need(self) -> float:
        """Bytes that torch's allocator must be able to get from the GPU."""
        return max(self.peak, self.resident + self.passing + self.beside_graphs) * (1 + FRAGMENTATION)


def state_bytes(cfg: SimpleNamespace, kind: Kind, accumulates: bool) -> tuple[float, float, float, float]:
    """Return the bytes of weights, gradients and moments, and how many values of matrices a rank's Muon updates.

    accumulates: whether a step has several micro-batches.
    """
    width, layers, vocab, ranks = cfg.n_embd, cfg.n_layer, cfg.vocab_size, kind.ranks
    matrices, table = layers * 12 * width ** 2, vocab * width
    parameters, fsdp2 = sizes.parameter_count(cfg), kind.wrapper == "fsdp2"
    others = parameters - matrices  # embeddings, head, gains
    own = matrices / ranks if fsdp2 else matrices
    weights = gradients = 4 * parameters
    # An AdamW of 8 bits takes embedding and head
    adam = 8 * (others - 2 * table) + (2 if cfg.USE_8BIT_ADAM else 8) * 2 * table
    moments = 4 * matrices + adam
    if kind.wrapper == "ddp":  # buffers with room for the largest share on every rank
        own = largest_share(layers, width, ranks)
        weights = gradients = 4 * (ranks * own + others)
        moments = 4 * own + (adam if cfg.USE_8BIT_ADAM or vocab % ranks else adam / ranks)
        if not cfg.GATHER_FP32:  # masters of what this rank owns
            weights += 4 * own + (0 if cfg.USE_8BIT_ADAM or vocab % ranks else 4 * others / ranks)
    if fsdp2:
        gathered = 2 * (table + 2 * 12 * width ** 2) if cfg.FSDP2_RESHARD else 2 * parameters
        weights, moments = 4 * parameters / ranks + gathered, moments / ranks
        if cfg.FSDP2_RESHARD:  # whole gradients wait for a step's last micro-batch; then each rank gets its part
            gradients = (4 if cfg.REDUCE_FP32 else 2) * parameters if accumulates else 4 * parameters / ranks
    return weights, gradients, moments, own


def predict(cfg: SimpleNamespace, kind: Kind, batch_size: int) -> Prediction:
    """Return what a run with these flags takes on each rank, with micro-batches of this many sequences.

    cfg: train.py's flags. Its batch_size is not read; total_batch_size must be a number.
    """
    width, layers, vocab, ranks = cfg.n_embd, cfg.n_layer, cfg.vocab_size, kind.ranks
    tokens = batch_size * cfg.block_size
    table, fsdp2 = vocab * width, kind.wrapper == "fsdp2"
    weights, gradients, moments, own = state_bytes(cfg, kind, cfg.total_batch_size > tokens * ranks)
    in_bf16 = blocks_in_bf16(cfg)
    blocks = [block_of(kind, here) for here in in_bf16]

    # Weights in low precision. FSDP2's are bf16 already, and Transformer Engine's modules quantize one at a time there
    copied = [12 * width ** 2 * block.weight for block, here in zip(blocks, in_bf16, strict=True)
              if not (fsdp2 and (kind.format == "bf16" or here))]
    if fsdp2 and kind.blocks == "modules":
        copied = copied[:1]
    copies = sum(copied) + (0 if fsdp2 and not kind.fp8_head else 2 * table)

    # A micro-batch
    saved = [saved_bytes(cfg, kind, block, i) for i, block in enumerate(blocks)]
    recomputed = max(saved) if cfg.USE_AC_BLOCKS else 0  # of one block at a time
    kept = (layers * 2 * width if cfg.USE_AC_BLOCKS else sum(saved)) * tokens
    # Token embedding: its norm's output is the first block's residual; in fp32, its rows, or 1 / RMS and the order of
    # the tokens. Tokens and targets
    kept += tokens * ((2 * width if cfg.USE_X0 else 0) + (12 if kind.blocks == "fused" else 4 * width) + 16)
    kept += 8 * vocab if kind.blocks == "fused" else 0
    head = 6 * width * tokens + head_bytes(cfg, kind, tokens)  # the final norm's input, its output, that one's gradient
    backward = (max(block.backward for block in blocks) * width + recomputed) * tokens
    if kind.blocks != "fused":  # an embedding's gradient is a tensor of its own, of the table's size
        backward = max(backward, 4 * table + 4 * width * tokens)

    # Dion: updates, their stack, two iterates, in bf16. torch: a copy of all matrices, and some of one
    step = 4 * own + 4 * 16 * width ** 2
    if kind.wrapper == "ddp" and not cfg.REDUCE_FP32:
        step = max(step, 2 * ranks * own, 2 * table)
    if fsdp2 and not cfg.FSDP2_RESHARD and not cfg.REDUCE_FP32:  # a copy of one parameter's gradient
        step = max(step, 2 * table, 2 * 4 * width ** 2)
    if kind.wrapper == "ddp" and not cfg.GATHER_FP32:  # copies of all rows in bf16 wait for the end of Muon's step
        rows = 0 if cfg.USE_8BIT_ADAM or vocab % ranks else 2 * (2 + cfg.n_value_embed) * table
        step = max(step + rows, 2 * ranks * own + rows)
    values = 50 if kind.blocks != "fused" else 39 if cfg.USE_X0 else 37
    evaluation = max(values * width * tokens,
                     4 * width * tokens + 2 * min(cfg.loss_chunk_size, tokens) * vocab + 2 * table)
    if cfg.FP8_STATS_INTERVAL:  # counted by running it
        from nanofp8.fp8_stats import HEAD_TOKENS, TOKENS
        evaluation = max(evaluation, TOKENS * layers * 14 * width + vocab * (29 * HEAD_TOKENS + 10 * width))
    if kind.blocks == "emulated" and min(sizes.windows(cfg)) < cfg.block_size:
        kept += cfg.block_size ** 2  # the mask of a window
    graphs = cfg.USE_CUDA_GRAPHS and kind.blocks == "fused" and not (fsdp2 and cfg.FSDP2_RESHARD)
    return Prediction(weights, gradients, moments, copies, WORKSPACE, kept + max(head, backward), step, evaluation,
                      graphs)


def head_bytes(cfg: SimpleNamespace, kind: Kind, tokens: int) -> float:
    """Return what the head makes at its peak in the forward pass: logits of a chunk, their gradient, and with
    FSDP2_RESHARD the gradient of its weight, which otherwise is added in place."""
    table, chunk = cfg.vocab_size * cfg.n_embd, min(cfg.loss_chunk_size, tokens)
    logits, several = chunk * cfg.vocab_size, tokens > chunk
    d_weight = 4 * table if kind.wrapper == "fsdp2" and cfg.FSDP2_RESHARD else 0
    if not kind.fp8_head:  # bf16 logits, which their gradient overwrites; those of the chunk before are still there
        return d_weight + (4 if several else 2) * logits
    if not kind.fp8_matmuls:
        return d_weight + 24 * logits
    # Logits, then their gradient in two layouts; that of the chunk before is still there
    quantized_input = 2 * chunk * cfg.n_embd
    return quantized_input + (d_weight + 6 * logits if several else max(4 * logits, d_weight + 2 * logits))


def kind_of(cfg: SimpleNamespace, precision: Precision, wrapper: str, procs: Processes) -> Kind:
    """Return what decides which tensors a run makes. wrapper: "none", "ddp" or "fsdp2"."""
    fused = blocks_fit(cfg, precision, procs.device)
    capable = procs.device.type == "cuda" and torch.cuda.get_device_capability(procs.device) >= (8, 9)
    quack, _ = choose_quack(cfg, procs.device, precision.name if fused else "")
    return Kind(precision.name, "fused" if fused else "emulated" if precision.emulated else "modules",
                precision.fp8_head(cfg), wrapper, procs.world_size,
                kernels_fit(cfg, procs.device) and not cfg.USE_AC_ATTENTION, capable,
                fused and not needs_transposes(), quack)


# ----------------------------------------------------------------------------------------------------------------------
# The choice


class Choice(NamedTuple):
    """A micro-batch, and what it was chosen by."""

    reason: str                  # for the start-up table
    need: float = 0.0            # bytes that it needs, as predicted; 0: a CPU
    without_graphs: float = 0.0  # the same without CUDA graphs
    memory: float = 0.0          # bytes that torch can get, on the rank that has least


def batch_sizes(cfg: SimpleNamespace, ranks: int) -> list[int]:
    """Return the micro-batches up to cfg.batch_size that divide each step, largest first; [] if none does.

    Those that the format's blocks of values do not divide are left out, if others are left. cfg: flags of train.py, or
    of train_orig.py, which has no formats.
    """
    return sizes.batch_sizes(cfg, ranks, choose_format(cfg).multiple if hasattr(cfg, "USE_FP8") else 1)


def adopt_batch_size(checkpoint: str, cfg: SimpleNamespace, procs: Processes) -> None:
    """Take the micro-batch of a checkpoint that the same number of ranks saved, unless batch_size was given.

    With another one, sums have another order and delayed scaling's amax history another length in steps.
    """
    meta = read_checkpoint(checkpoint)
    saved = meta["flags"].get("batch_size")
    if may_choose(cfg, "batch_size") and meta["world_size"] == procs.world_size and type(saved) is int and saved > 0:
        cfg.batch_size = saved


def warn_if_not_bit_exact(meta: dict, cfg: SimpleNamespace, procs: Processes) -> None:
    """Print one line if a resumed run cannot repeat what its checkpoint's run would have done. meta: of meta.json."""
    was, now = (meta["flags"].get("batch_size"), meta["world_size"]), (cfg.batch_size, procs.world_size)
    if was != now:
        procs.print("resume: the run is no longer bit-exact: it had batch_size={} on {} rank(s), and has {} on {}"
                    .format(*was, *now))


def available(procs: Processes) -> float:
    """Return the bytes that torch's allocator can still get on this rank's GPU.

    That is what is free, less what CUDA and NCCL will take themselves; at most what
    torch.cuda.set_per_process_memory_fraction() leaves.
    """
    device = procs.device
    free, total = gpu_memory(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # older torch lacks it
    limit = fraction(device) * total - allocated
    return min(free + reserved - allocated - CONTEXT - (COMMUNICATION if procs.world_size > 1 else 0), limit)


def choose_batch_size(cfg: SimpleNamespace, precision: Precision, wrapper: str, procs: Processes) -> Choice:
    """Set cfg.batch_size to the largest micro-batch that is predicted to fit on every rank, unless it was given.

    Raises: UserError if not even weights and optimizer state fit.
    """
    auto = may_choose(cfg, "batch_size")
    how = "auto" if auto else "given"
    if procs.device.type != "cuda":
        weights, memory = 4 * sizes.parameter_count(cfg), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if weights > memory:
            raise UserError(f"the weights take {weights / GB:.1f} GB, and this machine has {memory / GB:.1f} GB; "
                            f"use {smaller_model(cfg)}")
        return Choice(f"{cfg.batch_size} ({how})")
    memory = min(procs.gather(available(procs)))
    kind = kind_of(cfg, precision, wrapper, procs)
    candidates = (batch_sizes(cfg, procs.world_size) if auto else []) or [cfg.batch_size]
    predictions = {size: predict(cfg, kind, size) for size in candidates}
    needs = {size: prediction.need for size, prediction in predictions.items()}
    size = next((size for size in candidates if needs[size] <= memory), candidates[-1])
    chosen = predictions[size]
    if chosen.resident > memory:
        raise UserError(f"weights, gradients and optimizer state take {chosen.resident / GB:.1f} GB, and "
                        f"{memory / GB:.1f} GB of GPU memory are free; use {smaller_model(cfg)}")
    larger = candidates[:candidates.index(size)]
    reason = (f"{size} ({how}: predicted {needs[size] / GB:.1f} of {memory / GB:.1f} GB"
              + (f"; {larger[-1]} needs {needs[larger[-1]] / GB:.1f}" if larger else "")
              + (", may not fit" if needs[size] > memory else "") + ")")
    cfg.batch_size = size
    return Choice(reason, chosen.need, chosen._replace(graphs=False).need, memory)


def smaller_model(cfg: SimpleNamespace) -> str:
    """Return the model to take where this one does not fit."""
    model = "a smaller model (--n_layer, --n_embd)" if cfg.preset in ("d12", "tiny") else "--preset=d12"
    return model + (" (only a new run can)" if cfg.resume else "")


def remedies(cfg: SimpleNamespace, choice: Choice) -> str:
    """Return what to do where not even the smallest micro-batch fits."""
    flags = [] if cfg.USE_AC_BLOCKS else ["--USE_AC_BLOCKS=True"]
    if choice.without_graphs < choice.need and choice.without_graphs <= choice.memory:
        flags.insert(0, "--USE_CUDA_GRAPHS=False")
    return "use " + " or ".join([*flags, smaller_model(cfg)])


# ----------------------------------------------------------------------------------------------------------------------
# The trial


def try_batch_size(run: Any, build: Callable[[SimpleNamespace, Processes, Any], Any]) -> None:
    """Allocate a train.Run's optimizer state, and find by trial whether its micro-batch fits; lower it until it does.

    On a GPU one forward and backward pass runs, with gradients and optimizer state allocated. It changes no weight,
    scale, random state or data position. If memory runs out on any rank, all ranks take the next smaller micro-batch
    that divides a step, at most half as large, and build everything anew: what an exception has left half done in
    FSDP2 or Transformer Engine is gone, and the run is the one that this batch_size would have had from the start.

    build: train.build(). Raises: UserError if no micro-batch fits, or if batch_size was given and does not.
    """
    cfg, procs = run.cfg, run.procs
    while True:
        run.optimizers.warm_up(run.parallel)
        if procs.device.type != "cuda" and not TRIAL_ON_CPU:
            return
        failed = [rank for rank, fits in enumerate(procs.gather(fits_in_trial(run))) if not fits]
        if not failed:
            return
        size, choice = cfg.batch_size, run.batch_choice
        smaller = [n for n in batch_sizes(cfg, procs.world_size) if n <= size // 2]
        if not smaller or not may_choose(cfg, "batch_size"):
            known = f": it needs about {choice.need / GB:.1f} of {choice.memory / GB:.1f} GB" if choice.need else ""
            remedy = f"leave out --batch_size, or use --batch_size={smaller[0]}" if smaller else remedies(cfg, choice)
            raise UserError(f"rank {failed[0]} has too little memory for batch_size={size}{known}; {remedy}")
        cfg.batch_size = smaller[0]
        procs.print(f"micro-batch: {size} sequences ran out of memory on rank {failed[0]} in a trial; "
                    f"{smaller[0]} are tried")
        # Delayed scaling's list of layers, which it updates: those of the old model must not stay in it
        run.precision.te.quantization.FP8GlobalStateManager.reset()
        # In place: nothing else may hold the old model while the new one is built
        run.precision = run.parallel = run.optimizers = None
        free_memory()
        new = build(cfg, procs, run.loader)
        for name in ("precision", "parallel", "optimizers", "loader", "guard", "in_bf16", "batch_choice"):
            setattr(run, name, getattr(new, name))


def fits_in_trial(run: Any) -> bool:
    """Return whether a forward and backward pass of a train.Run fits into this rank's memory; leave all as it was."""
    procs, te, device = run.procs, run.precision.te, run.procs.device
    generators = random_state(procs, te)
    scales = {name: tensor.clone() for name, tensor in fp8_state(run.model).items()}
    fits = True
    try:
        with alone():
            one_pass(run)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    with torch.no_grad():  # state that the pass has made starts with scales of 1 and amaxes of 0
        for name, tensor in fp8_state(run.model).items():
            tensor.copy_(scales[name]) if name in scales else tensor.fill_(float(name.endswith("scale")))
    run.parallel.buffers.zero_grad()
    set_random_state(generators, procs, te)
    if device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats(device)  # the log's peaks are those of training
    return fits


def one_pass(run: Any) -> None:
    """Run forward and backward on the next micro-batch of a train.Run, with as much memory in use as in training."""
    parallel, loader, device = run.parallel, run.loader, run.procs.device
    beside_graphs = 0
    if device.type == "cuda":
        kind = kind_of(run.cfg, run.precision, parallel.wrapper, run.procs)
        beside_graphs = int(predict(run.cfg, kind, run.cfg.batch_size).beside_graphs)
    held = torch.empty(beside_graphs, dtype=torch.uint8, device=device)  # noqa: F841 (what graphs leave no room for)
    if not parallel.by_hooks:  # gradients are there from a step's second micro-batch on
        for parameter in run.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    # FSDP2's hooks keep whole gradients from one micro-batch to the next
    several = run.cfg.total_batch_size > loader.micro_tokens * loader.world_size
    for last in (False, True) if parallel.by_hooks and several else (True,):
        run.forward_backward(*loader.peek(), m=0, last=last)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this rank run a pass by itself: collectives return at once, and what others would send stays undefined.

    A rank that runs out of memory leaves a pass early. The others would wait for it in their next collective.
    """
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single",
             "reduce_scatter_single")  # the last two: torch 2.13
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    try:
        for name in originals:
            setattr(dist, name, lambda *_, **__: None)
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def free_memory() -> None:
    """Return what nothing uses any more to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
