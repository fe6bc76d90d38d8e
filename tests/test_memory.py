"""memory.py: predictions against measured peaks and against the tensors that are really made; choice and trial."""

import contextlib
import importlib.util
import json
import sys
import textwrap
from types import SimpleNamespace
from unittest import mock

import allocations
import numpy as np
import pytest
import torch

import helpers
import train
from helpers import fails_in_one_line, losses, make_cfg, one_process, records, train_here
from nanofp8 import epilogues, fused, host, machine, memory
from nanofp8 import te_emulation as te
from nanofp8.checkpoint_files import read_checkpoint
from nanofp8.config import UserError
from nanofp8.epilogues import NO_QUACK, Quack
from nanofp8.memory import GB, Kind, predict
from nanofp8.precision import Precision, choose_format, fp8_state
from nanofp8.procs import Processes

# -----------------------------------------------------------------------------------------------------
# Predictions


def parse(**flags):
    return train.read_flags([f"--{name}={value}" for name, value in flags.items()], has_gpu=True)


SMALLER = dict(vocab_size=50304)
RACE = dict(total_batch_size=65536, batch_size=8)
EMULATION = dict(total_batch_size=65536)
DDP4 = dict(wrapper="ddp", ranks=4)
BF16_HEAD = dict(fp8_head=False)
# (run, peak in GB by torch.cuda.max_memory_allocated(), flags besides preset classic, format, blocks, what else differs
# from Kind's defaults and an FP8 head). All of d20's shape. From results/: h100/speed.json, h100/four_gpus.json,
# h200/speed.json, h200/speed_all.json, h200/emulation.json, h200/race_four_gpus.json; the last two rows from NOTES.md
# ("Parts of the model at d20").
#
# All are older than changes that take less memory. predicted() counts two of them: matmuls' inputs were kept in FP8,
# and the gradient of the head's weight was a tensor of its own. The other two: token embeddings in one kernel keep no
# fp32 rows, which are 0.08 GB for each 8 sequences of a micro-batch in fused blocks. Muon's elementwise work in one
# kernel is not at any row's peak.
MEASURED = [
    ("FP8 delayed", 31.808, {}, "fp8-delayed", "fused", {}),
    ("FP8 delayed, half the micro-batch", 22.009, dict(batch_size=8), "fp8-delayed", "fused", {}),
    ("FP8 delayed, vocabulary 50,304", 30.318, SMALLER, "fp8-delayed", "fused", {}),
    ("FP8 delayed, head in bf16", 30.744, {}, "fp8-delayed", "fused", BF16_HEAD),
    ("FP8 delayed, head in bf16, vocabulary 50,304", 29.504, SMALLER, "fp8-delayed", "fused", BF16_HEAD),
    ("bf16", 38.357, {}, "bf16", "fused", BF16_HEAD),
    ("bf16, vocabulary 50,304", 37.117, SMALLER, "bf16", "fused", BF16_HEAD),
    ("FP8 current", 35.996, {}, "fp8-current", "modules", {}),
    ("FP8 current, vocabulary 50,304", 34.507, SMALLER, "fp8-current", "modules", {}),
    ("FP8 block", 39.666, {}, "fp8-block", "modules", {}),
    ("FP8 block, vocabulary 50,304", 38.177, SMALLER, "fp8-block", "modules", {}),
    ("FP8 delayed, TE's modules", 41.652, {}, "fp8-delayed", "modules", BF16_HEAD | dict(rope_in_place=False)),
    ("FP8 delayed, TE's modules, vocabulary 50,304", 40.479, SMALLER, "fp8-delayed", "modules",
     BF16_HEAD | dict(rope_in_place=False)),
    ("FSDP2, one GPU", 32.879, {}, "fp8-delayed", "fused", dict(wrapper="fsdp2")),
    ("FSDP2, two GPUs", 30.266, {}, "fp8-delayed", "fused", dict(wrapper="fsdp2", ranks=2)),
    ("FSDP2, four GPUs", 28.976, {}, "fp8-delayed", "fused", dict(wrapper="fsdp2", ranks=4)),
    ("emulated FP8 delayed", 41.133, EMULATION, "fp8-delayed", "emulated", {}),
    ("emulated FP8 block", 41.130, EMULATION, "fp8-block", "emulated", {}),
    ("emulated MXFP8", 41.916, EMULATION, "fp8-mxfp8", "emulated", {}),
    ("emulated NVFP4", 40.035, EMULATION, "nvfp4", "emulated", BF16_HEAD),
    ("preset d20, four GPUs", 19.723, RACE | dict(preset="d20"), "fp8-delayed", "fused", DDP4),
    ("preset speedrun, four GPUs", 21.770, RACE | dict(preset="speedrun"), "fp8-delayed", "fused", DDP4),
    ("speedrun, one GPU", 35.6, dict(preset="speedrun", total_batch_size=65536), "fp8-delayed", "fused", {}),
    ("speedrun with 10 value embeddings", 40.8, dict(preset="speedrun", total_batch_size=65536, n_value_embed=10),
     "fp8-delayed", "fused", {}),
]


def predicted(flags, format, blocks, kind):
    """By the code that was measured, in which no head added its weight's gradient in place."""
    cfg = parse(**dict(preset="classic") | flags)
    kind = Kind(**dict(format=format, blocks=blocks, fp8_head=True, keeps_inputs=True) | kind)
    head_bytes = memory.head_bytes
    with mock.patch.object(memory, "head_bytes", lambda cfg, kind, tokens: head_bytes(
            SimpleNamespace(**vars(cfg) | dict(FSDP2_RESHARD=True)), kind._replace(wrapper="fsdp2"), tokens)):
        return predict(cfg, kind, cfg.batch_size)


@pytest.mark.parametrize("name,measured,flags,format,blocks,kind", MEASURED, ids=[row[0] for row in MEASURED])
def test_predictions_against_measured_peaks(name, measured, flags, format, blocks, kind):
    """Within 1% of every measured peak; with the allowance for torch's allocator never below it."""
    prediction = predicted(flags, format, blocks, kind)
    print(f"{name}: predicted {prediction.peak / GB:.2f}, measured {measured:.2f}, needs {prediction.need / GB:.2f} GB")
    assert prediction.peak / GB == pytest.approx(measured, rel=0.01)
    assert prediction.need / GB >= measured


COUNTED = [
    dict(batch_size=2), dict(batch_size=2, USE_FP8=False), dict(batch_size=1), dict(batch_size=8, USE_FP8_HEAD=False),
    dict(batch_size=4, preset="speedrun", n_value_embed=2), dict(batch_size=4, preset="speedrun", USE_FP8=False),
    dict(batch_size=16, loss_chunk_size=1024), dict(batch_size=16, loss_chunk_size=1024, USE_FP8=False),
    dict(batch_size=32, preset="d12"), dict(preset="tiny"),
]
QUACK = Quack(fp8=True, bf16=True)


@pytest.mark.parametrize("changes, quack", [(changes, NO_QUACK) for changes in COUNTED] + [
    (dict(batch_size=8), QUACK), (dict(batch_size=8, USE_FP8=False), QUACK),
    (dict(batch_size=16, preset="speedrun", USE_FP8=False), QUACK),
], ids=str)
def test_predictions_against_the_tensors_of_fused_blocks(changes, quack):
    """The model of four blocks runs on the meta device, and every tensor counts as long as it is alive. 1%: small
    tensors are left out, and the backward pass of the last block frees the final norm's input first."""
    n_value_embed = changes.get("n_value_embed", 1)
    flags = dict(preset="d20", n_layer=4, train_tokens=0, total_batch_size=2 ** 17, max_iters=1) | changes
    flags |= dict(n_value_embed=n_value_embed) if flags["preset"] in ("speedrun", "d12") else {}
    cfg = parse(**flags)
    peak, evaluation = allocations.count(cfg, quack)
    kind = Kind("fp8-delayed" if cfg.USE_FP8 else "bf16", "fused", cfg.USE_FP8 and cfg.USE_FP8_HEAD, quack=quack)
    prediction = predict(cfg, kind, cfg.batch_size)
    of_a_pass = prediction.weights + prediction.gradients + prediction.copies + prediction.passing
    assert of_a_pass == pytest.approx(peak, rel=0.01)
    assert evaluation <= prediction.evaluation * 1.01


def test_what_takes_less_memory():
    """Each remedy that the documents name takes less, and each value embedding more."""
    def need(kind=None, batch_size=16, **flags):
        return predict(parse(preset="d20", **flags), kind or Kind("fp8-delayed", "fused", True), batch_size).need

    tokens, width, blocks = 16 * 2048, 1280, 20
    fp8, bf16 = Kind("fp8-delayed", "fused", True), Kind("bf16", "fused", False)
    for kind, changes, values in ((fp8, dict(keeps_inputs=True), 3), (fp8, dict(quack=QUACK), -4),
                                  (bf16, dict(quack=QUACK), -8)):
        changed = need(kind._replace(**changes))
        assert changed - need(kind) == pytest.approx(1.03 * values * tokens * width * blocks, rel=0.02)
    high = dict(HIGH_PRECISION_LAYERS="blocks.19")
    some, all_by_quack = fp8._replace(quack=Quack(fp8=True)), fp8._replace(quack=QUACK)
    assert need(some, **high) - need(all_by_quack, **high) == pytest.approx(1.03 * 8 * tokens * width, rel=0.02)
    ddp = Kind("fp8-delayed", "fused", True, **DDP4)
    assert need(ddp, 1, GATHER_FP32=False, n_value_embed=5) > need(ddp, 1, n_value_embed=5)
    modules = Kind("fp8-delayed", "modules", True)
    sizes = [need(batch_size=n) for n in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes)
    assert need(modules, USE_AC_BLOCKS=True) < need(modules, USE_AC_ATTENTION=True) < need(modules)
    assert need(loss_chunk_size=4096) < need() and need(USE_8BIT_ADAM=True) < need() < need(n_value_embed=1)
    assert need(USE_CUDA_GRAPHS=False) < need() < need(FP8_STATS_INTERVAL=10)
    assert need() < need(HIGH_PRECISION_LAYERS="blocks.19") < need(HIGH_PRECISION_LAYERS="blocks.1*.attn.proj")
    ddp, fsdp2 = (Kind("fp8-delayed", "fused", True, wrapper, 8) for wrapper in ("ddp", "fsdp2"))
    assert need(fsdp2) < need(ddp) < need()
    assert need(fsdp2, FSDP2_RESHARD=True) < need(fsdp2) and need(ddp) <= need(ddp, REDUCE_FP32=False)
    assert need(Kind("nvfp4", "modules", False)) < need(Kind("bf16", "modules", False))


@pytest.mark.parametrize("emulated,changes,want", [
    (False, {}, Kind("fp8-delayed", "fused", True, "ddp", 2)),
    (False, dict(USE_AC_BLOCKS=True), Kind("fp8-delayed", "modules", True, "ddp", 2)),
    (False, dict(USE_AC_ATTENTION=True), Kind("fp8-delayed", "modules", True, "ddp", 2, rope_in_place=False)),
    (False, dict(FP8_RECIPE="block", USE_FP8_HEAD=False), Kind("fp8-block", "modules", False, "ddp", 2)),
    (False, dict(USE_FP8=False), Kind("bf16", "fused", False, "ddp", 2)),
    (False, dict(USE_FP8=False, USE_QUACK=True), Kind("bf16", "fused", False, "ddp", 2, quack=Quack(bf16=True))),
    (False, dict(USE_QUACK=True), Kind("fp8-delayed", "fused", True, "ddp", 2, quack=QUACK)),
    (True, dict(USE_NVFP4=True), Kind("nvfp4", "emulated", False, "ddp", 2)),
])
def test_which_tensors_a_run_makes(monkeypatch, emulated, changes, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in (memory, fused):
        monkeypatch.setattr(module, "kernels_fit", lambda cfg, device: cfg.USE_TRITON)
    monkeypatch.setattr(memory, "needs_transposes", lambda: True)  # a Hopper GPU
    found = (epilogues, "QuACK") if "USE_QUACK" in changes else (None, "not installed")
    monkeypatch.setattr(epilogues, "library", lambda: found)
    cfg = parse(preset="d20", **changes)
    precision = Precision(te, choose_format(cfg), None, emulated, "")
    assert memory.kind_of(cfg, precision, "ddp", Processes(0, 0, 2, torch.device("cuda", 0), None)) == want


def test_the_largest_share_is_that_of_the_divided_updates():
    from nanofp8.zero import assign_owners
    for layers, ranks in ((20, 4), (12, 8), (5, 3), (3, 7)):
        shapes = (24, 8), (8, 8), (32, 8), (8, 32)  # qkv, proj, fc1, fc2
        matrices = [torch.empty(shape, device="meta") for shape in shapes for _ in range(layers)]
        owners = assign_owners(matrices, ranks)
        shares = [sum(p.numel() for p, owner in zip(matrices, owners, strict=True) if owner == rank)
                  for rank in range(ranks)]
        assert memory.largest_share(layers, 8, ranks) == max(shares)


# -----------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize("flags,ranks,want", [
    (dict(preset="d20"), 1, [16, 8, 4, 2, 1]), (dict(preset="d12"), 1, [32, 16, 8, 4, 2, 1]),
    (dict(preset="classic"), 3, []), (dict(preset="d20", total_batch_size=2048 * 24), 2, [12, 6, 4, 3, 2, 1]),
    (dict(preset="d20", total_batch_size=2048 * 7), 1, [7, 1]),
    (dict(preset="d20", total_batch_size=2048 * 17), 1, [1]),
    # 8 tokens a sequence: FP8 needs multiples of 16 tokens
    (dict(preset="tiny", block_size=8, total_batch_size=96), 1, [6, 4, 2]),
    (dict(preset="tiny", block_size=8, total_batch_size=96, USE_FP8=False), 1, [6, 4, 3, 2, 1]),
    (dict(preset="tiny", block_size=8, total_batch_size=24), 1, [3, 1]),  # none fits the format: its own error follows
])
def test_micro_batches_divide_a_step(flags, ranks, want):
    assert memory.batch_sizes(parse(**flags), ranks) == want


def test_the_largest_micro_batch_of_each_preset():
    assert {preset: parse(preset=preset).batch_size for preset in ("d20", "speedrun", "d12", "tiny", "classic")} == {
        "d20": 16, "speedrun": 16, "d12": 32, "tiny": 8, "classic": 16}
    assert parse(preset="d12", batch_size="auto").batch_size == 32
    assert parse(preset="d12", batch_size=5).batch_size == 5


class Gpu(Processes):
    """A rank with a GPU whose ranks have this much memory for torch."""

    memory = (79 * GB,)

    def gather(self, value):
        return list(self.memory)


@pytest.fixture
def gpu(monkeypatch):
    """choose(memories, **flags): what a run takes on ranks with these GB of memory. Returns flags and Choice."""
    monkeypatch.setattr(memory, "available", lambda procs: 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in (memory, fused):
        monkeypatch.setattr(module, "kernels_fit", lambda cfg, device: not cfg.USE_AC_ATTENTION)
    monkeypatch.setattr(memory, "needs_transposes", lambda: True)  # a Hopper GPU
    monkeypatch.setattr(epilogues, "library", lambda: (None, "not installed"))
    precision = SimpleNamespace(name="fp8-delayed", fused=True, emulated=False, recipe=None,
                                fp8_head=lambda cfg: True)

    def choose(memories, wrapper="none", **flags):
        cfg = parse(**dict(preset="d20") | flags)
        procs = Gpu(0, 0, len(memories), torch.device("cuda", 0), None)
        procs.memory = [gigabytes * GB for gigabytes in memories]
        train.check_flags(cfg, procs.world_size)
        return cfg, memory.choose_batch_size(cfg, precision, wrapper, procs)

    return choose


def test_the_largest_micro_batch_that_fits_is_taken_and_explained(gpu):
    want = {79: 16, 31: 8, 24.5: 8, 22: 4, 16: 2}
    for gigabytes, size in want.items():
        cfg, choice = gpu([gigabytes])
        assert cfg.batch_size == size, choice.reason
        assert choice.need <= choice.memory == gigabytes * GB
        start = f"{size} (auto: predicted {choice.need / GB:.1f} of {gigabytes:.1f} GB"
        assert choice.reason.startswith(start + (")" if size == 16 else f"; {2 * size} needs "))


def test_all_ranks_take_the_smallest_of_their_answers(gpu):
    cfg, choice = gpu([79, 17, 79, 33], wrapper="ddp")
    assert cfg.batch_size == 4 and "of 17.0 GB; 8 needs" in choice.reason


def test_a_micro_batch_that_was_given_is_only_checked(gpu):
    cfg, choice = gpu([31], batch_size=16)
    assert cfg.batch_size == 16 and choice.reason.startswith("16 (given: predicted 31.6")
    assert choice.reason.endswith("of 31.0 GB, may not fit)")
    assert gpu([79], batch_size=4)[1].reason.startswith("4 (given: predicted 17.")
    assert gpu([31], batch_size="auto")[0].batch_size == 8


def test_where_not_even_the_weights_fit(gpu):
    with pytest.raises(UserError, match=r"take 8\.\d GB, and 6\.0 GB .* free; use --preset=d12$"):
        gpu([6])
    with pytest.raises(UserError, match=r"use a smaller model \(--n_layer, --n_embd\)"):
        gpu([1], preset="d12", USE_AC_BLOCKS=True)


def test_where_one_sequence_is_not_predicted_to_fit(gpu):
    """The trial decides; if it fails too, the line names what would fit."""
    cfg, choice = gpu([11])
    assert cfg.batch_size == 1 and choice.reason.startswith("1 (auto: predicted 12.") and "may not fit" in choice.reason
    assert memory.remedies(cfg, choice) == "use --USE_CUDA_GRAPHS=False or --USE_AC_BLOCKS=True or --preset=d12"
    assert memory.remedies(*gpu([9])) == "use --USE_AC_BLOCKS=True or --preset=d12"
    assert memory.remedies(*gpu([5], preset="d12", USE_AC_BLOCKS=True)) == "use a smaller model (--n_layer, --n_embd)"


def test_the_memory_that_torch_can_get(monkeypatch):
    """What is free, and what torch's pool holds without using it, less what CUDA and NCCL take; at most torch's
    limit."""
    state = dict(mem_get_info=(30 * GB, 80 * GB), memory_allocated=10 * GB, memory_reserved=14 * GB,
                 get_per_process_memory_fraction=1.0)
    for name in state:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: state[name], raising=False)
    shared = SimpleNamespace(is_integrated=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: shared)
    monkeypatch.setattr(host, "free_memory", lambda: 50 * GB)
    procs = Processes(0, 0, 1, torch.device("cuda", 0), None)
    assert memory.available(procs) == pytest.approx(34 * GB - memory.CONTEXT)
    shared.is_integrated = 1  # a GPU that shares the machine's memory, of which the page cache is free, too
    assert memory.available(procs) == pytest.approx(54 * GB - machine.SHARED_RESERVE - memory.CONTEXT)
    shared.is_integrated = 0
    procs.world_size = 2
    assert memory.available(procs) == pytest.approx(34 * GB - memory.CONTEXT - memory.COMMUNICATION)
    state["get_per_process_memory_fraction"] = 0.3
    assert memory.available(procs) == pytest.approx(0.3 * 80 * GB - 10 * GB)


# -----------------------------------------------------------------------------------------------------
# The trial


@pytest.fixture
def trial(monkeypatch, fresh):
    monkeypatch.setattr(memory, "TRIAL_ON_CPU", True)


@contextlib.contextmanager
def too_large(*sizes, where="forward"):
    """Let memory run out in passes with micro-batches of these sizes while gradients are computed: after the first
    block's forward pass, or in its backward pass."""
    forward = train.Block.forward

    def limited(self, x, *args, **kwargs):
        result = forward(self, x, *args, **kwargs)
        if x.shape[0] in sizes and torch.is_grad_enabled():
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            result.register_hook(run_out)
        return result

    def run_out(grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    train.Block.forward = limited
    try:
        yield
    finally:
        train.Block.forward = forward


FORMATS = {"fp8": {}, "bf16": dict(USE_FP8=False), "nvfp4": dict(USE_NVFP4=True, n_embd=128),
           "parts": helpers.PARTS, "recomputation": dict(USE_AC_BLOCKS=True)}


def test_a_trial_leaves_everything_as_it_was(trial, shards):
    """Weights, gradients, scales, amax history, random states and the data position: before any pass, and after
    steps."""
    cfg = make_cfg(data_dir=str(shards), batch_size=4)
    procs, model = one_process(), helpers.make_model(cfg)
    loader = train.DataLoader(train.TokenRing(str(shards), "synthetic", "train", 512, 1), cfg, procs)
    run = helpers.make_run(cfg, procs, model, loader)

    def state():
        return dict(weights={n: p.detach().clone() for n, p in model.named_parameters()}, position=loader.index,
                    random=torch.get_rng_state().clone(), numpy=np.random.get_state()[1].copy(),
                    stochastic=te.get_rng_state())

    before = state()
    assert memory.fits_in_trial(run) and not any(p.grad is not None for p in model.parameters())
    assert str(before) == str(state())
    scales = fp8_state(model)
    assert scales and all((t == (1 if n.endswith("scale") else 0)).all() for n, t in scales.items())
    train.calibrate(run)
    train.train_step(run)
    before, scales = state(), {n: t.clone() for n, t in fp8_state(model).items()}
    with too_large(4, where="backward"):
        assert not memory.fits_in_trial(run)
    assert memory.fits_in_trial(run) and str(before) == str(state())
    assert helpers.same_tensors(scales, fp8_state(model)) and any((t != 1).any() for t in scales.values())
    loader.close()


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_with_a_trial_is_the_same_run(trial, tmp_path, shards, monkeypatch, name):
    """Losses, gradient norms and val losses, bit for bit."""
    flags = FORMATS[name] | dict(max_iters=2, eval_tokens=64, keep_checkpoints=0)
    tried = train_here(tmp_path, shards, run_name="tried", **flags)
    monkeypatch.setattr(memory, "TRIAL_ON_CPU", False)
    assert helpers.learned(tried) == helpers.learned(train_here(tmp_path, shards, run_name="plain", **flags))


@pytest.mark.parametrize("name,sizes,where", [("fp8", (8, 4), "forward"), ("fp8", (8,), "backward"),
                                              ("nvfp4", (8,), "backward"), ("recomputation", (8,), "backward")])
def test_a_micro_batch_that_runs_out_of_memory_is_halved(trial, tmp_path, shards, capsys, name, sizes, where):
    """The run is the one that the smaller batch_size gives from the start, bit for bit; config.json and meta.json have
    the number that was used."""
    flags, used = FORMATS[name] | dict(max_iters=2, eval_tokens=64), sizes[-1] // 2
    with too_large(*sizes, where=where):
        halved = train_here(tmp_path, shards, run_name="halved", **flags | dict(batch_size="auto"))
    printed = capsys.readouterr().out
    for size in sizes:
        assert f"micro-batch: {size} sequences ran out of memory on rank 0 in a trial; {size // 2} are tried" in printed
    given = train_here(tmp_path, shards, run_name="given", **flags | dict(batch_size=used))
    assert helpers.learned(halved) == helpers.learned(given)
    assert json.loads((halved / "config.json").read_text())["batch_size"] == used
    meta = read_checkpoint(str(halved / "ckpt" / "step_000002"))
    assert meta["flags"]["batch_size"] == used and meta["loader"] == dict(step=2, micro_batch=0)


def test_where_one_sequence_does_not_fit(trial, tmp_path, shards, capsys):
    with too_large(8, 4, 2, 1):
        fails_in_one_line(capsys, 1, "batch_size=1", "--USE_AC_BLOCKS=True or a smaller model", out_dir=tmp_path,
                          data_dir=shards, batch_size="auto")


def test_a_micro_batch_that_was_given_and_does_not_fit_is_an_error(trial, tmp_path, shards, capsys):
    with too_large(8):
        fails_in_one_line(capsys, 1, "batch_size=8", "leave out --batch_size, or use --batch_size=4", out_dir=tmp_path,
                          data_dir=shards)


def test_other_errors_of_a_trial_are_not_taken_for_too_little_memory(trial, tmp_path, shards, monkeypatch):
    monkeypatch.setattr(memory, "one_pass", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_here(tmp_path, shards)


def test_what_counts_as_too_little_memory():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert memory.is_out_of_memory(RuntimeError("CUDA driver error: out of memory"))
    assert memory.is_out_of_memory(RuntimeError("CUDA driver error: device not ready"))  # WSL2
    assert memory.is_out_of_memory(RuntimeError(  # MIG
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016, please report'))
    assert memory.is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"))
    assert not memory.is_out_of_memory(RuntimeError("a shape does not fit"))


def test_the_table_says_which_micro_batch_runs_and_how_long_the_amax_history_is(fresh, tmp_path, shards, capsys):
    train_here(tmp_path, shards, max_iters=1, eval_tokens=64, batch_size="auto", total_batch_size=512)
    printed = capsys.readouterr().out
    assert "micro-batch        8 (auto)\n" in printed and "  amax history     16 micro-batches = 8 steps\n" in printed
    train_here(tmp_path, shards, max_iters=1, eval_tokens=64, batch_size=4, USE_FP8=False)
    printed = capsys.readouterr().out
    assert "micro-batch        4 (given)\n" in printed and "amax history" not in printed


# -----------------------------------------------------------------------------------------------------
# Resuming


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, shards):
    """A run of 4 steps with micro-batches of 2 and a checkpoint after 2 of them, and how it went on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return train_here(tmp_path_factory.mktemp("stopped"), shards, max_iters=4, ckpt_interval=2, eval_tokens=64,
                          batch_size=2)


def resume(stopped, tmp_path, shards, **flags):
    folder = helpers.copy_of_run(stopped, tmp_path / "run", 2)
    return train_here(tmp_path, shards, resume=folder, max_iters=4, eval_tokens=64, **flags)


def test_a_resume_takes_the_micro_batch_of_its_checkpoint(fresh, stopped, tmp_path, shards, capsys, monkeypatch):
    """... and continues bit for bit, with a trial too; nothing is printed of it."""
    monkeypatch.setattr(memory, "TRIAL_ON_CPU", True)
    folder = resume(stopped, tmp_path, shards, batch_size="auto")
    assert helpers.learned(folder, "train", "val") == helpers.learned(stopped, "train", "val")
    assert "batch_size" not in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 2


@pytest.mark.parametrize("flags,sizes,now", [(dict(batch_size=4), (), 4), (dict(batch_size="auto"), (2,), 1)])
def test_a_resume_with_another_micro_batch_says_so(trial, stopped, tmp_path, shards, capsys, flags, sizes, now):
    """Given, or because the checkpoint's does not fit here: the run is not bit-exact. Losses agree within the rounding
    of another order of sums."""
    with too_large(*sizes):
        folder = resume(stopped, tmp_path, shards, **flags)
    printed = capsys.readouterr().out
    assert printed.count("resume: the run is no longer bit-exact: it had batch_size=2 on 1 rank(s), and has "
                         f"{now} on 1\n") == 1
    assert np.abs(losses(folder) - losses(stopped)).max() < 5e-3


def test_a_resume_on_another_number_of_ranks_chooses_anew(monkeypatch):
    meta = dict(world_size=4, flags=dict(batch_size=2))
    monkeypatch.setattr(memory, "read_checkpoint", lambda folder: meta)
    for ranks, flags, want in ((4, {}, 2), (2, {}, 16), (4, dict(batch_size=8), 8), (4, dict(batch_size="auto"), 2)):
        cfg = parse(preset="d20", **flags)
        memory.adopt_batch_size("folder", cfg, one_process(world_size=ranks))
        assert cfg.batch_size == want
    meta["flags"] = dict(batch_size="2")
    cfg = parse(preset="d20")
    memory.adopt_batch_size("folder", cfg, one_process(world_size=4))
    assert cfg.batch_size == 16


# -----------------------------------------------------------------------------------------------------
# Two ranks

TWO = dict(batch_size=2, max_iters=2, eval_tokens=64, keep_checkpoints=0)
PAIRS = {  # each with a trial, and without
    "ddp-fp8": dict(USE_DDP=True), "ddp-bf16": dict(USE_DDP=True, USE_FP8=False), "fsdp2-fp8": dict(USE_FSDP2=True),
}
HALVED = {"ddp-fp8": (), "fsdp2-fp8": ()}  # memory runs out at 4 sequences, on rank 1 alone: compared with PAIRS
WORKER = textwrap.dedent("""
    import contextlib, json, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import helpers, train, test_memory
    from nanofp8 import memory, te_emulation as te
    procs, folders = helpers.fork_ranks(), {{}}
    for name, flags in json.load(open(sys.argv[1])).items():
        te._state.__init__()
        memory.TRIAL_ON_CPU = not name.endswith("plain")
        fails = name.endswith("halved") and procs.rank == 1
        with test_memory.too_large(4) if fails else contextlib.nullcontext():
            folders[name] = train.run(train.read_flags(helpers.flag_args(**flags), has_gpu=False), procs)
    if procs.is_main:
        json.dump(folders, open(sys.argv[1] + ".done", "w"))
    helpers.end_ranks(procs)
""")


@pytest.mark.slow
def test_trials_of_two_ranks(tmp_path, shards):
    """Under each wrapper a run with a trial is the same run, bit for bit; and where memory runs out on one rank alone,
    both take the smaller micro-batch and train as if it had been given."""
    common = TWO | dict(out_dir=str(tmp_path / "out"), data_dir=str(shards))
    cases = {f"{name}-{how}": common | flags | dict(run_name=f"{name}-{how}") for name, flags in PAIRS.items()
             for how in ("tried", "plain")}
    cases |= {f"{name}-halved": common | PAIRS[name] | dict(run_name=f"{name}-halved", batch_size="auto")
              for name in HALVED}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(helpers.ROOT), tests=str(helpers.ROOT / "tests")))
    result = helpers.finish(helpers.start(tmp_path / "worker.py", tmp_path / "cases.json", cwd=tmp_path))
    assert result.code == 0, result.err[-4000:]
    folders = json.loads((tmp_path / "cases.json.done").read_text())
    for name in PAIRS:
        assert helpers.learned(folders[f"{name}-tried"]) == helpers.learned(folders[f"{name}-plain"]), name
    for name in HALVED:
        assert helpers.learned(folders[f"{name}-halved"]) == helpers.learned(folders[f"{name}-plain"]), name
        assert len(records(folders[f"{name}-halved"], "train")) == 2
    assert result.out.count("4 sequences ran out of memory on rank 1 in a trial; 2 are tried") == len(HALVED)


# -----------------------------------------------------------------------------------------------------
# tools/memory_model.py


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("memory_model", helpers.ROOT / "tools" / "memory_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_predictions(tool):
    """If not, run `python tools/memory_model.py --table --write`."""
    page = (helpers.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert tool.BEGIN + "\n".join(tool.predicted_table()) + "\n" + tool.END in page
    assert f"{len(MEASURED)} peaks measured" in page


def test_a_report_of_measurements_compares_and_calibrates(tool):
    prediction = predicted({}, "fp8-delayed", "fused", {})
    row = dict(case="d20", limit=0, batch_size=16, outcome="trained", tried=[], blocks="fused", peak=prediction.peak,
               prediction=prediction._asdict(), need=prediction.need, allocated=prediction.peak + 0.1 * GB,
               reserved=prediction.need + 0.335 * GB, context=0.7 * GB)
    failed = dict(case="d20 bf16", limit=12.0, batch_size=1, outcome="too little", tried=["micro-batch: 2 ran out"])
    config = dict(device="NVIDIA H100", versions=dict(torch="2.11.0"))
    text = tool.report([row, failed], config, "python tools/memory_model.py")
    assert "| d20 | all | 16 | fused | 31.82 | 31.92 | -0.3% |" in text
    assert "| d20 bf16 | 12 | 1 |" in text and "too little; micro-batch: 2 ran out |" in text
    assert "WORKSPACE 0.35 GB (now 0.25), FRAGMENTATION 0.040 (now 0.03), CONTEXT 0.70 GB (now 0.60" in text
    assert tool.calibration([failed]) == []


def test_the_cases_are_runs_that_can_be_made(tool, tmp_path):
    """Their flags are known and divide a step, and the random data are shards."""
    for name, (flags, batch_size) in tool.CASES.items():
        cfg = parse(**flags, total_batch_size=tool.TOKENS, **(dict(batch_size=batch_size) if batch_size else {}))
        train.check_flags(cfg, 1)
        assert cfg.batch_size == (batch_size or cfg.batch_size), name
    assert set(tool.UNDER_LIMITS) <= set(tool.CASES)
    tool.random_data(str(tmp_path))
    train.open_data(make_cfg(data_dir=str(tmp_path), dataset="random", vocab_size=50304), one_process())


@pytest.mark.parametrize("arguments,words",
                         [(["--cases=d21"], "not 'd21'"), (["--limits=a"], "got 'a'"), ([], "needs a GPU")])
def test_wrong_arguments_of_the_tool_are_one_line(tool, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["memory_model.py", *arguments])
    with pytest.raises(UserError, match=words) as caught:
        tool.main()
    assert caught.value.status == 2 and "\n" not in str(caught.value)
