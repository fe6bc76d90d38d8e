"""Whole runs of train.py: log, run folder, evaluation, accumulation, ranks and wrappers, number formats.

Runs of one process happen in this process. Runs of two ranks (RANKS) happen one after another in one pair of
processes.
"""

import functools
import json
import math
import pathlib
import re
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import helpers
import train
from helpers import (
    ROOT,
    SMALL,
    TRAIN,
    finish,
    flag_args,
    losses,
    markov_tokens,
    records,
    start,
    start_torchrun,
    train_here,
    val_losses,
    write_shard,
)
from nanofp8.config import script_flags
from nanofp8.precision import fp8_state
from nanofp8.procs import Processes
from nanofp8.schedule import lr_factor, momentum_at
from train_orig import clip_gradients

pytestmark = pytest.mark.usefixtures("fresh")

TRAIN_KEYS = {"kind", "step", "tokens", "loss", "grad_norm", "lr_muon", "lr_embed", "lr_head", "momentum", "step_ms",
              "tok_per_sec", "mfu", "peak_mem_gb"}
VAL_KEYS = {"kind", "step", "tokens", "val_loss", "train_seconds"}
DONE_KEYS = {"kind", "step", "compile_seconds", "tokens", "val_loss", "val_losses", "train_seconds",
             "tok_per_sec_median", "peak_mem_gb"}

# The runs of two ranks: micro-batches of 4 sequences each, where the run of one process takes 8.
TWO = dict(batch_size=4)
RANKS = {
    "ddp-bf16": TWO | dict(USE_FP8=False, USE_DDP=True, eval_interval=3),
    "ddp-fp8": TWO | dict(USE_DDP=True),
    "ddp-fp8-watched": TWO | dict(USE_DDP=True, eval_interval=1, FP8_STATS_INTERVAL=3),
    "fsdp2-bf16": TWO | dict(USE_FP8=False, USE_FSDP2=True, eval_interval=3),
    "fsdp2-fp8": TWO | dict(USE_FSDP2=True),
    "fsdp2-fp8-watched": TWO | dict(USE_FSDP2=True, eval_interval=1, FP8_STATS_INTERVAL=3),
    "fsdp2-reshard-bf16": TWO | dict(USE_FP8=False, USE_FSDP2=True, FSDP2_RESHARD=True, eval_interval=3),
    "fsdp2-reshard-fp8": TWO | dict(USE_FSDP2=True, FSDP2_RESHARD=True),
    "ddp-bf16-accumulate": dict(USE_FP8=False, USE_DDP=True, batch_size=2),
    "fsdp2-bf16-accumulate": dict(USE_FP8=False, USE_FSDP2=True, batch_size=2),
    "ddp-bf16-reduce": TWO | dict(USE_FP8=False, USE_DDP=True, REDUCE_FP32=False),
    "fsdp2-bf16-reduce": TWO | dict(USE_FP8=False, USE_FSDP2=True, REDUCE_FP32=False),
    "fsdp2-bf16-uneven": TWO | dict(USE_FP8=False, USE_FSDP2=True, vocab_size=515),
    "fsdp2-recompute-fp8": TWO | dict(USE_FSDP2=True, USE_AC_BLOCKS=True, USE_AC_LM_HEAD=True),
    "auto-nvfp4": TWO | dict(USE_NVFP4=True, n_embd=128, max_iters=2),
}
WORKER = textwrap.dedent("""
    import json, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import helpers, train
    from nanofp8 import te_emulation as te
    procs = helpers.fork_ranks()
    folders = {{}}
    for name, changes in json.load(open(sys.argv[1])).items():
        te._state.__init__()
        cfg = train.read_flags(helpers.flag_args(**changes), has_gpu=False)
        try:
            folders[name] = train.run(cfg, procs)
        except Exception as error:  # on both ranks alike, or the other one hangs
            folders[name] = f"failed: {{error!r}}"
    if procs.is_main:
        json.dump(folders, open(sys.argv[1] + ".done", "w"))
    helpers.end_ranks(procs)
""")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shards):
    """Train the runs of RANKS: {name: run folder}."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: dict(changes, run_name=name, out_dir=str(folder / "out"), data_dir=str(shards))
             for name, changes in RANKS.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    result = finish(start(folder / "worker.py", folder / "cases.json", cwd=folder))
    assert result.code == 0, result.err[-4000:]
    folders = json.loads((folder / "cases.json.done").read_text())
    folders["output"] = result.out
    return folders


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, shards):
    """Train the runs of one process that others are compared with: {name: run folder}."""
    out, patch = tmp_path_factory.mktemp("one"), pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.delenv(name, raising=False)
    cases = {"bf16": dict(USE_FP8=False, eval_interval=3), "fp8": dict(), "uneven": dict(USE_FP8=False, vocab_size=515),
             "wide-bf16": dict(USE_FP8=False, n_embd=128, max_iters=3)}
    folders = {name: train_here(out, shards, run_name=name, **changes) for name, changes in cases.items()}
    patch.undo()
    return folders


# -----------------------------------------------------------------------------------------------------
# The run folder


@pytest.fixture(scope="module")
def script_run(tmp_path_factory, shards):
    """Run the script for 5 steps with wandb switched on but not importable, and evaluations after steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "stub").mkdir()
    (folder / "stub" / "wandb.py").write_text("raise ImportError('no wandb here')\n")
    args = flag_args(data_dir=shards, max_iters=5, eval_interval=2, total_batch_size=512, USE_WANDB=True,
                     run_name="first")
    result = finish(start(TRAIN, *args, cwd=folder, PYTHONPATH=str(folder / "stub")))
    assert result.code == 0, result.err
    result.folder = folder / "out" / "first"
    return result


def test_the_run_folder_is_complete(script_run):
    assert {p.name for p in script_run.folder.iterdir()} - {"ckpt"} == {"log.jsonl", "config.json", "loss.png"}
    png = (script_run.folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.rstrip().endswith(b"IEND\xaeB`\x82")


def test_log_jsonl_follows_the_contract(script_run):
    log = records(script_run.folder)
    assert [(r["kind"], r["step"]) for r in log] == [
        ("train", 0), ("train", 1), ("val", 1), ("train", 2), ("train", 3), ("val", 3), ("train", 4), ("val", 4),
        ("done", 4)]
    keys = {"train": TRAIN_KEYS, "val": VAL_KEYS, "done": DONE_KEYS}
    for r in log:
        # the last evaluation's, in two formats
        assert set(r) - ({"val_losses"} if r["step"] == 4 else set()) == keys[r["kind"]] - {"val_losses"}
        assert r["tokens"] == (r["step"] + 1) * 512
    for r in records(script_run.folder, "train"):
        assert r["tok_per_sec"] == pytest.approx(512 / r["step_ms"] * 1000)
        assert r["mfu"] is None  # no peak for a CPU
        assert all(r[k] > 0
                   for k in ("loss", "step_ms", "tok_per_sec", "peak_mem_gb", "lr_muon", "lr_embed", "lr_head"))
    norms = [r["grad_norm"] for r in records(script_run.folder, "train")]
    assert all(math.isfinite(n) and n > 0 for n in norms)
    vals, (done,) = records(script_run.folder, "val"), records(script_run.folder, "done")
    seconds = [r["train_seconds"] for r in (*vals, done)]
    steps_ms = [r["step_ms"] for r in records(script_run.folder, "train")]
    assert seconds == pytest.approx([sum(steps_ms[:n]) / 1000 for n in (2, 4, 5, 5)])  # training alone
    assert done["val_loss"] == vals[-1]["val_loss"]
    assert done["tok_per_sec_median"] == pytest.approx(512 / sorted(steps_ms)[2] * 1000)


def test_the_logged_rates_are_the_schedule(script_run):
    cfg = helpers.make_cfg(max_iters=5)
    for r in records(script_run.folder, "train"):
        factor = lr_factor(r["step"], cfg.warmup_iters, 5, cfg.min_lr_ratio, cfg.warmdown_ratio)
        assert (r["lr_muon"], r["lr_embed"], r["lr_head"]) == pytest.approx(
            (cfg.learning_rate * factor, cfg.learning_rate_embed * factor, cfg.learning_rate_head * factor))
        assert r["momentum"] == momentum_at(r["step"], cfg.muon_momentum_start, cfg.muon_momentum,
                                                  cfg.muon_momentum_iters)


def test_the_loss_starts_at_ln_vocab_and_falls(script_run):
    assert losses(script_run.folder)[0] == pytest.approx(math.log(512), rel=1e-6)
    assert losses(script_run.folder)[-1] < math.log(512) - 0.3


def test_config_json_holds_every_flag_and_the_machine(script_run):
    config = json.loads((script_run.folder / "config.json").read_text())
    cfg = vars(helpers.make_cfg(max_iters=5, eval_interval=2, total_batch_size=512, USE_WANDB=True, run_name="first"))
    for name in script_flags(TRAIN):
        assert name in config
        if name != "data_dir":
            assert config[name] == cfg[name]
    assert "explicit" not in config
    for name in ("device", "versions", "git_commit", "world_size", "wrapper", "precision", "emulated", "optimizers",
                 "parameters"):
        assert name in config
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (config["world_size"], config["wrapper"], config["precision"],
            config["emulated"]) == (1, "none", "fp8-delayed", True)


def test_the_console_says_what_runs(script_run):
    out = script_run.out
    for word in ("fp8-delayed EMULATED by nanofp8/te_emulation.py (no GPU)", "none (one rank)", "Muon in plain PyTorch",
                 "muon_impl=torch",
                 "skipped steps      not finite\n", "640 of 1,500 val tokens", "6,000 train tokens in 3 shard(s)",
                 "1 rank(s) x 2 micro-batch(es) x 8 sequences x 32 tokens", "run folder", "done: val loss"):
        assert word in out, word
    steps = re.findall(r"^step (\d)/5 \| loss +([\d.]+) \| norm .* \| lr .* ms \| [\d,]+ tok/s \| .* GB \| ETA", out,
                       re.M)
    assert [int(s) for s, _ in steps] == [1, 2, 3, 4, 5]
    assert [float(x) for _, x in steps] == pytest.approx(losses(script_run.folder), abs=1e-4)
    assert "MFU" not in out
    model = helpers.make_model()
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out


def test_without_wandb_the_run_continues(script_run):
    assert script_run.out.count("wandb is off: no wandb here") == 1


@pytest.mark.slow
def test_a_run_folder_is_never_overwritten(tmp_path, shards):
    first = train_here(tmp_path, shards, max_iters=2, run_name="r", eval_tokens=64)
    before = {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()}
    folders = [train_here(tmp_path, shards, max_iters=1, run_name="r", seed=s, eval_tokens=64) for s in (2, 3)]
    assert first == tmp_path / "r" and folders == [tmp_path / "r-2", tmp_path / "r-3"]
    assert {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()} == before
    assert json.loads((folders[1] / "config.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_log_interval_and_only_a_last_evaluation(tmp_path, shards):
    folder = train_here(tmp_path, shards, max_iters=6, log_interval=4, USE_FP8=False, eval_tokens=64)
    assert [(r["kind"], r["step"]) for r in records(folder)] == [("train", 0), ("train", 4), ("train", 5), ("val", 5),
                                                                 ("done", 5)]
    seconds = records(folder, "done")[0]["train_seconds"]
    assert seconds > sum(r["step_ms"] for r in records(folder, "train")) / 1000  # steps that were not logged count too


def test_non_finite_losses_end_the_run_in_one_line(tmp_path, shards, capsys):
    """The line names the step and a remedy. The log keeps earlier records, as JSON."""
    changes = dict(USE_FP8=False, learning_rate_embed=1e38, learning_rate=1e38, learning_rate_head=1e38, grad_clip=0)
    with pytest.raises(SystemExit) as caught:
        train_here(tmp_path, shards, run_name="nan", max_bad_steps=2, **changes)
    result = SimpleNamespace(code=caught.value.code, err=capsys.readouterr().err)
    helpers.assert_one_error_line(result, 1, "2 consecutive steps were skipped", "the last at step",
                                  "lower learning rate")
    log = records(tmp_path / "nan", "train")
    assert log[-1]["loss"] is None and log[-1]["skipped"] == "loss not finite"
    assert log[0]["loss"] == pytest.approx(math.log(512))


# -----------------------------------------------------------------------------------------------------
# Data, batches and evaluation


def test_the_first_losses_are_those_of_a_plain_loop(tmp_path, shards, one_rank):
    """In bf16 on one process, a loop of loader, loss mean, schedule, clipping and both optimizers gives the same
    numbers, bit for bit."""
    cfg = helpers.make_cfg(USE_FP8=False, data_dir=str(shards))
    procs = helpers.one_process()
    ring = train.TokenRing(str(shards), "synthetic", "train", 512, 1)
    model = helpers.make_model(cfg, zeros=True, seed=cfg.seed)
    parallel = train.Parallel(model, "none", cfg, procs)
    optimizers = train.Optimizers(model, cfg, procs, parallel, 10**12)
    precision = train.select_precision(cfg, helpers.CPU)
    for step, expected in enumerate(records(one_rank["bf16"], "train")):
        tokens = torch.from_numpy(ring.read(step * 256, 257))
        optimizers.set_schedule(step)
        with precision.autocast(procs):
            loss = model(tokens[:-1].view(8, 32), tokens[1:].view(8, 32).long()) / 256
        loss.backward()
        norm = clip_gradients(list(model.parameters()), cfg.grad_clip)
        optimizers.step()
        parallel.buffers.zero_grad()
        assert loss.item() == expected["loss"] and norm.item() == expected["grad_norm"], step


@pytest.mark.slow
def test_the_same_flags_give_the_same_losses(tmp_path, shards, one_rank):
    again = train_here(tmp_path, shards)
    assert np.array_equal(losses(again), losses(one_rank["fp8"]))
    other = train_here(tmp_path, shards, seed=7)
    assert not np.array_equal(losses(other)[1:], losses(again)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("name,gap", [("bf16", 1e-3), ("fp8", 1e-2)])
def test_gradient_accumulation_equals_a_larger_batch(tmp_path, shards, one_rank, name, gap, batch_size):
    """The same tokens in more micro-batches. Sums in fp32 have another order, and Adam's and Muon's normalised steps
    carry that into single bf16 roundings: 1e-3 nats after six steps, while the loss falls by more than 1. Delayed
    scaling's amax history counts micro-batches, so scales move at other times: another FP8 rounding."""
    got = losses(train_here(tmp_path, shards, USE_FP8=name == "fp8", batch_size=batch_size))
    assert np.abs(got - losses(one_rank[name])).max() < gap
    assert got[0] - got[-1] > 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(batch_size=2, max_iters=4)], ids=["whole", "accumulate"])
def test_evaluation_does_not_touch_training(tmp_path, shards, changes):
    """With an evaluation after every step, delayed scaling gives the same losses, bit for bit: the amax history and the
    data position do not change."""
    without = train_here(tmp_path, shards, **changes)
    with_eval = train_here(tmp_path, shards, eval_interval=1, **changes)
    assert len(val_losses(with_eval)) == len(losses(without)) and len(val_losses(without)) == 1
    assert np.array_equal(losses(with_eval), losses(without))
    assert val_losses(with_eval)[-1] == val_losses(without)[-1]


def evaluate_small(shards, eval_tokens, batch_size, world_size=1):
    """Evaluate one seeded model on the ranks one after another, and add their sums."""
    cfg = helpers.make_cfg(eval_tokens=eval_tokens, batch_size=batch_size, total_batch_size=32 * batch_size)
    model = helpers.make_model(cfg)
    ring = train.TokenRing(str(shards), "synthetic", "val", 512, 33)
    totals = []

    class Rank(Processes):
        def sum(self, tensor):
            totals.append(tensor.clone())
            return tensor

    for rank in range(world_size):
        procs = Rank(rank, rank, world_size, helpers.CPU, SimpleNamespace(get_group=lambda: None))
        autocast = functools.partial(train.select_precision(cfg, helpers.CPU).autocast, procs, quantized=False)
        train.evaluate(model, ring, cfg, procs, autocast)
        assert model.training
    total = sum(totals)
    return total.item() / eval_tokens


def test_val_loss_is_the_same_for_any_ranks_and_batch_size(shards):
    """46 sequences do not fill a whole number of passes. Sums in fp32 have another order: 1e-6."""
    want = evaluate_small(shards, 46 * 32, 1)
    for batch_size, world_size in ((2, 1), (5, 1), (64, 1), (1, 2), (3, 2), (4, 3), (8, 5)):
        assert evaluate_small(shards, 46 * 32, batch_size, world_size) == pytest.approx(want, rel=1e-6)


def test_val_loss_is_the_cross_entropy_of_the_first_sequences(shards):
    """Each sequence has its own context. 1e-5 for bf16 logits summed in fp32."""
    cfg = helpers.make_cfg(batch_size=20, total_batch_size=640)
    model = helpers.make_model(cfg)
    tokens = torch.from_numpy(markov_tokens(1500, seed=2).astype(np.int32))
    with torch.no_grad(), train.select_precision(cfg, helpers.CPU).autocast(helpers.one_process(), quantized=False):
        logits = model(tokens[:640].view(20, 32))
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[1:641].long()).item()
    assert evaluate_small(shards, 640, 8) == pytest.approx(want, rel=1e-5)


def test_a_val_token_beyond_the_vocabulary_ends_the_run_before_its_first_step(tmp_path, shards, capsys):
    folder = tmp_path / "data" / "synthetic"
    tokens = markov_tokens(2000, seed=2)
    tokens[20] = 600
    bad = write_shard(folder / "s_val_000000.bin", tokens)
    (folder / "s_train_000001.bin").write_bytes((shards / "synthetic" / "s_train_000001.bin").read_bytes())
    with pytest.raises(SystemExit):
        train_here(tmp_path / "out", tmp_path / "data")
    assert f"{bad} holds token id 600" in capsys.readouterr().err
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_eval_tokens_are_cut_to_what_there_is(tmp_path, shards):
    """1500 val tokens hold 46 sequences of 32 with a last target. Less than one sequence is rounded up to one."""
    for given, used in ((10**9, 46 * 32), (100, 96), (5, 32)):
        folder = train_here(tmp_path, shards, max_iters=1, eval_tokens=given, USE_FP8=False)
        assert json.loads((folder / "config.json").read_text())["eval_tokens"] == used
        assert math.isfinite(val_losses(folder)[0])


def test_training_goes_around_the_ring(tmp_path):
    """Train more than two epochs of a shard that holds one step and one token."""
    write_shard(tmp_path / "d" / "synthetic" / "s_train_000001.bin", markov_tokens(257, seed=3))
    write_shard(tmp_path / "d" / "synthetic" / "s_val_000000.bin", markov_tokens(33, seed=4))
    folder = train_here(tmp_path / "out", tmp_path / "d", max_iters=3)
    assert len(losses(folder)) == 3 and np.isfinite(losses(folder)).all() and np.isfinite(val_losses(folder)).all()


# -----------------------------------------------------------------------------------------------------
# Number formats and flags that change the path, not the result


@pytest.mark.slow
@pytest.mark.parametrize("name,changes", [
    ("fp8-current", dict(FP8_RECIPE="current")), ("fp8-block", dict(FP8_RECIPE="block")),
    ("fp8-mxfp8", dict(FP8_RECIPE="mxfp8")),
    ("nvfp4", dict(USE_NVFP4=True)),
])
def test_every_number_format_trains(tmp_path, shards, capsys, one_rank, name, changes):
    """Three steps have finite, falling losses within 0.1 nats of bf16, and the start-up table says that the format is
    emulated."""
    got = train_here(tmp_path, shards, n_embd=128, max_iters=3, **changes)
    assert re.search(rf"precision +{name} EMULATED by nanofp8/te_emulation.py \(no GPU\)", capsys.readouterr().out)
    config = json.loads((got / "config.json").read_text())
    assert config["precision"] == name and config["emulated"] is True
    assert np.isfinite(losses(got)).all() and losses(got)[-1] < losses(got)[0]
    assert 0 < np.abs(losses(got) - losses(one_rank["wide-bf16"])).max() < 0.1


def test_calibration_fills_the_amax_history_and_nothing_else(shards):
    """After a forward and backward pass, every scale that has seen values differs from 1. Weights, gradients and data
    position stay."""
    cfg = helpers.make_cfg()
    procs, model = helpers.one_process(), helpers.make_model(cfg)
    loader = train.DataLoader(train.TokenRing(str(shards), "synthetic", "train", 512, 1), cfg, procs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.calibrate(helpers.make_run(cfg, procs, model, loader))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert loader.index == 0
    state = fp8_state(model)
    assert len(state) == 2 * 3 * 2 * 2
    for name, value in state.items():
        if name.endswith("scaling_fwd.scale"):  # input and weight of each matmul (its output is not quantized)
            assert (value.view(-1, 3)[:, :2] != 1).all(), name
        elif name.endswith("scaling_bwd.scale"):  # the gradient of each output
            assert (value.view(-1, 2)[:, 0] != 1).all(), name
        else:
            assert value[-1].any() and value[0].eq(0).all(), name  # the newest row, and the row being collected


def test_delayed_scaling_is_calibrated_from_the_first_step(tmp_path, shards, one_rank):
    """At scale 1, E5M2 flushes small gradients to zero. After the calibration passes, losses stay within 0.01 nats of
    bf16 from the start. Data order and learning rates do not change."""
    assert np.abs(losses(one_rank["fp8"]) - losses(one_rank["bf16"])).max() < 0.01
    for a, b in zip(records(one_rank["fp8"], "train"), records(one_rank["bf16"], "train"), strict=True):
        assert all(a[k] == b[k] for k in ("tokens", "lr_muon", "lr_embed", "lr_head", "momentum"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(USE_AC_BLOCKS=True, USE_AC_ATTENTION=True)])
def test_recomputation_gives_the_same_run(tmp_path, shards, one_rank, flags):
    assert np.array_equal(losses(train_here(tmp_path, shards, **flags)), losses(one_rank["fp8"]))


@pytest.mark.slow
def test_recomputing_the_head_gives_the_same_run(tmp_path, shards, one_rank):
    """The logits are computed twice from the same operands, so the gradients and losses are equal."""
    assert np.array_equal(losses(train_here(tmp_path, shards, USE_AC_LM_HEAD=True)), losses(one_rank["fp8"]))


# -----------------------------------------------------------------------------------------------------
# Ranks

# Largest gap of any loss over six steps, in nats; the losses fall by more than one.
#   DDP: the same numbers but for the order of fp32 sums.
#   FSDP2: weights and gains are rounded to bf16 when gathered, and most gradients before they are added up (here, where
#   no fused blocks run); under FP8 the weights are rounded twice.
GAPS = {
    "ddp-bf16": 1e-3, "ddp-fp8": 3e-3, "fsdp2-bf16": 2e-3, "fsdp2-fp8": 3e-3, "fsdp2-reshard-bf16": 2e-3,
    "fsdp2-reshard-fp8": 3e-3, "ddp-bf16-accumulate": 1e-3, "fsdp2-bf16-accumulate": 2e-3, "ddp-bf16-reduce": 5e-3,
    "fsdp2-bf16-reduce": 5e-3, "fsdp2-recompute-fp8": 3e-3, "fsdp2-bf16-uneven": 2e-3,
}


@pytest.mark.parametrize("name", GAPS)
def test_two_ranks_train_like_one(one_rank, two_ranks, name):
    want = losses(one_rank["fp8" if "fp8" in name else "uneven" if "uneven" in name else "bf16"])
    assert not two_ranks[name].startswith("failed"), two_ranks[name]
    got = losses(two_ranks[name])
    assert len(got) == len(want) == 6 and want[0] - want[-1] > 1
    assert np.abs(got - want).max() < GAPS[name], np.abs(got - want)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["USE_DDP", "USE_FSDP2"])
def test_a_wrapper_around_one_rank(tmp_path, shards, one_rank, flag):
    """DDP: equal bit for bit. FSDP2: weights in bf16, as in GAPS."""
    got = losses(train_here(tmp_path, shards, USE_FP8=False, **{flag: True}))
    assert np.abs(got - losses(one_rank["bf16"])).max() <= (0 if flag == "USE_DDP" else GAPS["fsdp2-bf16"])


def test_gradient_norms_agree(one_rank, two_ranks):
    """Under every wrapper the norm is that of the whole gradient, not of a shard. 1% for gradients through bf16
    weights."""
    want = [r["grad_norm"] for r in records(one_rank["bf16"], "train")]
    for name in ("ddp-bf16", "fsdp2-bf16", "fsdp2-reshard-bf16", "fsdp2-bf16-accumulate"):
        assert [r["grad_norm"] for r in records(two_ranks[name], "train")] == pytest.approx(want, rel=0.01), name


def test_resharding_changes_little(two_ranks):
    """FSDP2 by its own hooks rounds the gradient of the head to bf16. Otherwise it adds the head's chunks in fp32."""
    for name, gap in (("bf16", 2e-4), ("fp8", 2e-3)):
        got, want = (losses(two_ranks[f"fsdp2-{how}"]) for how in (f"reshard-{name}", name))
        assert got[0] == want[0] and np.abs(got - want).max() < gap, np.abs(got - want)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_evaluation_does_not_touch_the_training_of_two_ranks(two_ranks, wrapper):
    """... and statistics do not touch it either: the run "watched" has both."""
    assert np.array_equal(losses(two_ranks[f"{wrapper}-fp8-watched"]), losses(two_ranks[f"{wrapper}-fp8"]))
    assert val_losses(two_ranks[f"{wrapper}-fp8-watched"])[-1] == val_losses(two_ranks[f"{wrapper}-fp8"])[-1]
    assert len(val_losses(two_ranks[f"{wrapper}-fp8-watched"])) == 6


def test_statistics_of_two_ranks(two_ranks):
    """FP8_STATS_INTERVAL changes no loss. Sharded or not, rank 0's micro-batch gives nearly the same numbers."""
    found = {}
    for wrapper in ("ddp", "fsdp2"):
        assert (losses(two_ranks[f"{wrapper}-fp8"]) == losses(two_ranks[f"{wrapper}-fp8-watched"])).all()
        found[wrapper] = records(two_ranks[f"{wrapper}-fp8-watched"], "fp8_stats")
        assert [r["step"] for r in found[wrapper]] == [2, 5]
    for a, b in zip(found["ddp"][0]["layers"].values(), found["fsdp2"][0]["layers"].values(), strict=True):
        for kind in a:
            assert a[kind]["amax"] == pytest.approx(b[kind]["amax"], rel=0.1)
            assert a[kind]["error"] == pytest.approx(b[kind]["error"], rel=0.3)


def test_val_losses_of_two_ranks(one_rank, two_ranks):
    for name in ("ddp-bf16", "fsdp2-bf16", "fsdp2-reshard-bf16"):
        assert np.abs(val_losses(two_ranks[name]) - val_losses(one_rank["bf16"])).max() < GAPS[name], name


def test_only_rank_0_writes_and_speaks(two_ranks):
    ran = {name: folder for name, folder in two_ranks.items() if name != "output" and not folder.startswith("failed")}
    for name, folder in ran.items():
        steps = RANKS[name].get("max_iters", SMALL["max_iters"])
        assert [r["step"] for r in records(folder, "train")] == list(range(steps))
        assert folder.endswith(name)  # no numbered second folder
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        assert config["world_size"] == 2 and config["wrapper"] == ("fsdp2" if name.startswith("fsdp2") else "ddp")
    assert two_ranks["output"].count("done: val loss") == len(ran)
    assert np.isfinite(losses(two_ranks["auto-nvfp4"])).all()


@pytest.mark.slow
def test_torchrun_of_the_script(tmp_path, shards, one_rank):
    """Two ranks train from start to end. If only rank 1 reads a bad token, its shard is named once, although rank 0
    does not know of it."""
    (tmp_path / "synthetic").mkdir()
    for path in (shards / "synthetic").iterdir():
        (tmp_path / "synthetic" / path.name).write_bytes(path.read_bytes())
    tokens = markov_tokens(6000, seed=1)[:1000].copy()
    tokens[200] = 600  # in the second half of step 0
    bad = write_shard(tmp_path / "synthetic" / "s_train_000001.bin", tokens)
    good, broken = (start_torchrun(2, TRAIN,
                                   *flag_args(batch_size=4, max_iters=2, USE_FP8=False, data_dir=d, run_name=name),
                                   cwd=tmp_path)
                    for name, d in (("good", shards), ("broken", tmp_path)))
    good, broken = finish(good), finish(broken)
    assert good.code == 0, good.err[:2000]
    assert "ddp (2 ranks on CPUs)" in good.out
    assert good.out.count("done: val loss") == 1
    assert broken.code != 0
    assert broken.err.count(f"train.py: error: {bad} holds token id 600") == 1, broken.err[-2000:]


def test_graphs_are_captured_after_three_steps_and_anew_when_the_batch_grows(monkeypatch):
    """With stand-ins for the graphs. The optimizers' use the memory pool of the micro-batches'."""
    def micro_batches(parallel, loader, precision, procs):
        return SimpleNamespace(loss_weight=loader.loss_weight, pool=len(pools))

    pools, states, loader = [], [], SimpleNamespace()
    loader.start_step = lambda step: setattr(loader, "loss_weight", 1.0 if step < 5 else 0.5)
    monkeypatch.setattr(train, "MicroBatchGraphs", micro_batches)
    part = SimpleNamespace(cache={})
    run = SimpleNamespace(
        cfg=helpers.make_cfg(), first_step=0, graphs=None, procs=None, loader=loader,
        model=SimpleNamespace(fused=part, head=part), parallel=SimpleNamespace(by_hooks=False),
        precision=SimpleNamespace(calibration_steps=lambda cfg: 1),
        optimizers=SimpleNamespace(graphs=(), capture=pools.append))
    for step in range(8):
        run.optimizers.graphs = ("those of the step before",)
        train.prepare_step(run, step)
        states.append((run.graphs and run.graphs.loss_weight, bool(run.optimizers.graphs)))
    assert states == [(None, True)] * 3 + [(1.0, False), (1.0, True), (0.5, False)] + [(0.5, True)] * 2
    assert pools == [0, 1]
