"""train.py on a GPU with Transformer Engine: precisions, recomputation, wrappers, compilation, evaluation, causality.

A small model (2 layers, width 256, 2 heads of 128), steps of 4,096 Shakespeare tokens in two micro-batches. Most runs
happen in this process, through train.run(), one after another and each once; what starts processes of its own
(the command line; two GPUs) says so.

Two runs that should be equal are not equal bit for bit on a GPU: cuDNN's attention adds up gradients in no fixed
order, and both optimizers divide by the size of the gradients, so that small noisy entries count as much as others.
SAME is what is allowed between them, 0.02 of a loss that falls from 10.83 to below 10 and 5% of the gradient norm; a
missing or doubled gradient moves either by far more.
"""

import contextlib
import gc
import io
import json
import math
import pathlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from nanofp8 import attention, breakdown, epilogues  # noqa: E402
from nanofp8.config import UserError  # noqa: E402
from nanofp8.machine import peak_flops  # noqa: E402
from nanofp8.precision import fp8_state, preserved_scales  # noqa: E402
from nanofp8.procs import start_processes  # noqa: E402

FLAGS = dict(
    preset="tiny", dataset="shakespeare", n_layer=2, n_embd=256, n_head=2, vocab_size=50304, block_size=256,
    batch_size=8,
    total_batch_size=4096, loss_chunk_size=2048, max_iters=8, warmup_iters=4, eval_interval=0, eval_tokens=8192,
    muon_impl="torch", USE_COMPILE=False, warmup_ratio=0.0, muon_momentum_ratio=0.0, muon_variant="muon",
    learning_rate=0.02, learning_rate_embed=0.3, learning_rate_head=0.01, learning_rate_gain=0.004,
)
# All parts of the model that preset speedrun adds; x0's scalars move less than there, because eight steps amplify them
PARTS = dict(n_value_embed=1, USE_X0=True, qk_scale=1.2, window_pattern="SL", window_size=64,
             learning_rate_x0=0.05, muon_variant="normuon")
RAMP = dict(batch_ramp="0.2,0.55", batch_size=4)  # 3 steps of one micro-batch, 3 of two, 2 of four
# Momentum, weight decay and rates change in every step; a graph that kept those of its capture would go astray
CHANGING = dict(muon_impl="dion", muon_momentum_start=0.5, muon_momentum_iters=8, weight_decay=0.5,
                weight_decay_end=0.0)
SAME = dict(loss=0.02, norm=0.05)
MULTI_GPU = pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")


def arguments(flags):
    return [f"--{name}={value}" for name, value in (FLAGS | flags).items()]


def read_run(folder, text=""):
    """A finished run: what it printed, config.json, and the records of log.jsonl by kind."""
    folder = pathlib.Path(folder)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    return SimpleNamespace(
        text=text, config=json.loads((folder / "config.json").read_text()), steps=steps,
        losses=[r["loss"] for r in steps],
        norms=[r["grad_norm"] for r in steps], vals=[r for r in records if r["kind"] == "val"],
        stats=[r for r in records if r["kind"] == "fp8_stats"], folder=folder, done=records[-1])


@pytest.fixture(scope="module")
def procs():
    """One process group for all runs of this file."""
    yield start_processes()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(te, procs, tmp_path_factory):
    """run(**flags): train with these flags beside FLAGS, in this process, and read the run; the same flags run once."""
    out, done = tmp_path_factory.mktemp("out"), {}

    def run(**flags):
        key = tuple(sorted(flags.items()))
        if key not in done:
            cfg = train.read_flags(arguments(flags | dict(out_dir=str(out))))
            text = io.StringIO()
            try:
                with contextlib.redirect_stdout(text):
                    folder = train.run(cfg, procs)
            finally:
                gc.enable()  # a run that was broken off leaves the collector off
                gc.unfreeze()
                gc.collect()
            done[key] = read_run(folder, text.getvalue())
            if done[key].done["kind"] != "done":  # what compares it later would fail for a reason that misleads
                pytest.exit("a signal stopped a run", returncode=1)
        return done[key]

    return run


def check_same(a, b, loss=SAME["loss"], norm=SAME["norm"]):
    """Losses and gradient norms of two runs agree step by step."""
    assert len(a.losses) == len(b.losses) == FLAGS["max_iters"]
    gaps = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    norms = [abs(x / y - 1) for x, y in zip(a.norms, b.norms, strict=True)]
    print("loss gaps", [f"{g:.5f}" for g in gaps], "norm gaps", [f"{g:.4f}" for g in norms])
    assert max(gaps) < loss, (a.losses, b.losses)
    assert max(norms) < norm, (a.norms, b.norms)


def check_trains(result):
    """The loss starts at ln(vocabulary), since the head starts at zero, and falls."""
    assert all(map(math.isfinite, result.losses + result.norms))
    assert abs(result.losses[0] - math.log(FLAGS["vocab_size"])) < 0.01
    assert result.losses[-1] < result.losses[0] - 0.2, result.losses


# ------------------------------------------------------------------------------------- precisions

BF16 = dict(USE_FP8=False)
DELAYED = dict(USE_FP8=True, FP8_RECIPE="delayed")
PRECISIONS = {
    "bf16": BF16, "fp8-delayed": DELAYED, "fp8-current": dict(USE_FP8=True, FP8_RECIPE="current"),
    "fp8-block": dict(USE_FP8=True, FP8_RECIPE="block"), "fp8-mxfp8": dict(USE_FP8=True, FP8_RECIPE="mxfp8"),
    "nvfp4": dict(USE_NVFP4=True),
}


def has_hardware(te, name):
    """Whether TE runs this format on this GPU: on Hopper all but MXFP8 and NVFP4."""
    ask = {"fp8-mxfp8": te.is_mxfp8_available, "nvfp4": te.is_nvfp4_available,
           "fp8-block": te.is_fp8_block_scaling_available}.get(name)
    return ask is None or ask(return_reason=True)[0]


@pytest.mark.parametrize("precision", [BF16, DELAYED], ids=["bf16", "delayed"])
def test_parts_in_fused_blocks_against_te_modules(run, precision):
    """As below, with all optional parts of the model."""
    modules = run(**precision, **PARTS, USE_TRITON=False, USE_FP8_HEAD=False)
    check_trains(modules)
    check_same(run(**precision, **PARTS, USE_FP8_HEAD=False, USE_CUDA_GRAPHS=False), modules)
    check_same(run(**precision, **PARTS), run(**precision, **PARTS, USE_CUDA_GRAPHS=False))


@pytest.mark.parametrize("precision", [BF16, DELAYED], ids=["bf16", "delayed"])
def test_fused_blocks_against_te_modules(run, precision):
    """Eight steps of two micro-batches in our own kernels, launched one by one and as CUDA graphs, against TE's modules
    with the same head, bf16 or FP8. Weights are quantized in a step's first micro-batch and used in the second, when
    delayed scaling has moved on. An FP8 head rounds what a bf16 head does not: 0.05 in loss."""
    modules = run(**precision, USE_TRITON=False, USE_FP8_HEAD=False)
    check_same(run(**precision, USE_FP8_HEAD=False, USE_CUDA_GRAPHS=False), modules)
    fused = run(**precision, USE_CUDA_GRAPHS=False)
    check_same(fused, run(**precision, USE_TRITON=False))
    assert max(abs(x - y) for x, y in zip(fused.losses, modules.losses, strict=True)) < 0.05
    check_same(run(**precision), fused)


@pytest.mark.parametrize("precision", [BF16, DELAYED, DELAYED | CHANGING], ids=["bf16", "delayed", "dion"])
def test_a_growing_batch(run, precision):
    """The graphs are captured at step 3, and anew at step 6, when the batch has grown; Dion's updates too."""
    graphs = run(**precision, **RAMP)
    assert [r["tokens"] for r in graphs.steps] == [1024, 2048, 3072, 5120, 7168, 9216, 13312, 17408]
    assert graphs.losses[-1] < graphs.losses[0] - 0.1
    check_same(run(**precision, **RAMP, USE_CUDA_GRAPHS=False), graphs)


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["plain", "parts"])
def test_flash_attention_4(run, parts):
    found, why = attention.flash4()
    if not found:
        pytest.skip(why)
    cudnn = run(**DELAYED, **parts, attention="cudnn", USE_QUACK=False)
    flash = run(**DELAYED, **parts, attention="flash4", USE_QUACK=False)
    assert "flash-attn-4" in flash.text and "flash-attn-4" not in cudnn.text
    check_same(flash, cudnn)


@pytest.mark.parametrize("precision", [BF16, DELAYED], ids=["bf16", "delayed"])
def test_attention_whose_gradients_lie_heads_first_in_memory(run, precision):
    """torch's plain matmuls, and Transformer Engine's where nothing faster runs, return them as (B, H, T, D)."""
    flags = precision | PARTS | dict(window_pattern="L", USE_QUACK=False)
    cudnn = run(**flags, attention="cudnn")
    with sdpa_kernel(SDPBackend.MATH):
        plain = run(**flags, attention="torch")
    check_same(plain, cudnn)


@pytest.mark.parametrize("precision, loss", [(DELAYED, 0.05), (BF16, SAME["loss"])], ids=["delayed", "bf16"])
def test_quack(run, precision, loss):
    """Backward takes relu(u) from relu(u)^2. In FP8 this adds 1.3% to the error of the gradient of u. In bf16 that
    error falls from 0.29% to 0.19%."""
    found, why = epilogues.library()
    if not found or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(why)
    plain = run(**precision, attention="cudnn", USE_QUACK=False)
    quack = run(**precision, attention="cudnn", USE_QUACK=True)
    assert "matmuls by QuACK" in quack.text and "matmuls by QuACK" not in plain.text
    check_trains(quack)
    check_same(quack, plain, loss=loss)


def test_quack_in_layers_that_stay_in_bf16(run):
    """One block in FP8 and one in bf16, both by QuACK."""
    found, why = epilogues.library()
    if not found or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(why)
    flags = DELAYED | dict(attention="cudnn", HIGH_PRECISION_LAYERS="blocks.1")
    check_same(run(**flags, USE_QUACK=True), run(**flags, USE_QUACK=False), loss=0.05)


def test_checkpoints_of_one_process(run):
    """Three checkpoints of one run (torch 2.11's DefaultStager copies aside only once): all there, and a resumed run
    goes on the same."""
    flags = DELAYED | dict(ckpt_interval=3, keep_checkpoints=3)
    saved = run(**flags)
    assert "failed" not in saved.text and saved.text.count("checkpoint started") == 3
    assert sorted(p.name for p in (saved.folder / "ckpt").iterdir()) == ["step_000003", "step_000006", "step_000008"]
    resumed = run(**flags, resume=str(saved.folder / "ckpt" / "step_000006"))
    gaps = [abs(a - b) for a, b in zip(saved.losses[6:], resumed.losses[-2:], strict=True)]
    assert "resumed from" in resumed.text and max(gaps) < SAME["loss"], gaps


@pytest.mark.parametrize("emulated_first", [True, False], ids=["emulation-to-te", "te-to-emulation"])
def test_resumed_by_the_other_library(run, emulated_first):
    """Four steps by one, four more by the other from its checkpoint: the losses of eight by the other, within the noise
    of both."""
    def flags(emulated):
        return DELAYED | dict(USE_EMULATION=emulated or "auto", USE_FP8_HEAD=False, USE_TRITON=False)

    saved = run(**flags(emulated_first), ckpt_interval=4, keep_checkpoints=3)
    resumed = run(**flags(not emulated_first), resume=str(saved.folder / "ckpt" / "step_000004"))
    gaps = [abs(a - b) for a, b in zip(saved.losses[4:], resumed.losses[-4:], strict=True)]
    assert "resumed from" in resumed.text and max(gaps) < 2 * SAME["loss"], gaps


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_run_and_say_by_whom(te, run, name):
    """Formats of this GPU run with TE, others are EMULATED, and the table at the start says which."""
    result = run(**PRECISIONS[name])
    line = next(line for line in result.text.splitlines() if line.startswith("precision"))
    emulated = not has_hardware(te, name)
    assert f"{name} " in line and ("EMULATED by nanofp8/te_emulation.py" if emulated
                                   else "by Transformer Engine") in line, line
    assert ("EMULATED" in result.text) == emulated
    assert result.config["precision"] == name and result.config["emulated"] == emulated
    check_trains(result)


@pytest.mark.parametrize("name", [n for n in PRECISIONS if n != "bf16"])
def test_precisions_stay_near_bf16(run, name):
    """Quantization costs little in so few steps: 0.1 for FP8, 0.2 for NVFP4."""
    a, b = run(**BF16), run(**PRECISIONS[name])
    gaps = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    print(name, [f"{g:.4f}" for g in gaps])
    assert max(gaps) < (0.2 if name == "nvfp4" else 0.1), (a.losses, b.losses)


@pytest.mark.parametrize("name", ["bf16", "fp8-delayed", "fp8-current", "fp8-block"])
def test_emulation_on_the_gpu_follows_te(run, name):
    """USE_EMULATION=True trains like TE: 0.03 in loss. Its FP8 errors are TE's, but not every one of them."""
    result = run(**PRECISIONS[name], USE_EMULATION=True)
    assert "by nanofp8/te_emulation.py (USE_EMULATION=True)" in result.text and result.config["emulated"]
    check_same(run(**PRECISIONS[name]), result, loss=0.03, norm=0.1)


def test_log_has_speed_and_memory(te, run):
    """Each training record has mfu (where the GPU's peak is known) and peak memory; the last record sums up."""
    result = run(**DELAYED)
    assert [r["step"] for r in result.steps] == list(range(FLAGS["max_iters"]))
    known = peak_flops(torch.device("cuda", 0)) is not None
    for r in result.steps:
        assert 0 < r["mfu"] < 1 if known else r["mfu"] is None
        assert 0.1 < r["peak_mem_gb"] < torch.cuda.get_device_properties(0).total_memory / 1e9
        assert r["tok_per_sec"] > 0 and r["tokens"] == (r["step"] + 1) * FLAGS["total_batch_size"]
    assert result.done["kind"] == "done" and result.done["peak_mem_gb"] >= result.steps[-1]["peak_mem_gb"]


# ---------------------------------------------------------------------- recomputation, wrappers, compilation


@pytest.mark.parametrize("precision", [BF16, DELAYED], ids=["bf16", "fp8-delayed"])
@pytest.mark.parametrize("flag", ["USE_AC_LM_HEAD", "USE_AC_BLOCKS", "USE_AC_ATTENTION"])
def test_recomputation_changes_nothing(run, flag, precision):
    """USE_AC_ATTENTION also takes the plain RoPE + QK norm in place of the Triton kernel, which rounds less often."""
    check_same(run(**precision), run(**precision, **{flag: True}))


@pytest.mark.parametrize("name", ["bf16", "fp8-delayed"])
def test_fsdp2_with_one_rank(run, name):
    """FSDP2 hands the layers bf16 weights, which FP8 then quantizes (without it, the fp32 ones): 0.03 in loss."""
    result = run(**PRECISIONS[name], USE_FSDP2=True)
    assert result.config["wrapper"] == "fsdp2" and "USE_FSDP2=True" in result.text
    check_same(run(**PRECISIONS[name]), result, loss=0.03, norm=0.1)


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["plain", "parts"])
def test_ddp_with_one_rank(run, parts):
    result = run(**DELAYED, **parts, USE_DDP=True)
    assert result.config["wrapper"] == "ddp"
    check_same(run(**DELAYED, **parts), result)


def test_dions_normuon_follows_torchs(run):
    """Polar Express leaves singular values between 0.86 and 1.14, TorchMuon's lie within 0.01 of 1: 0.1 in loss."""
    pytest.importorskip("dion")
    check_same(run(**DELAYED, **PARTS), run(**DELAYED, **PARTS | dict(muon_impl="dion")), loss=0.1, norm=0.2)


@pytest.fixture
def optimizers(te, procs):
    """A function that builds a small model's optimizers, with all of train.build(), from flags."""
    pytest.importorskip("dion")
    loaders = []

    def build(**flags):
        cfg = train.read_flags(arguments(CHANGING | flags))
        loaders.append(train.open_data(cfg, procs)[0])
        with contextlib.redirect_stdout(io.StringIO()):
            state = train.build(cfg, procs, loaders[-1])
        for p in state.model.parameters():
            p.grad = torch.zeros_like(p)
        return state.optimizers

    yield build
    for loader in loaders:
        loader.close()


def update(optimizers, seed):
    """Take the step of number `seed` with random gradients."""
    generator = torch.Generator("cuda").manual_seed(seed)
    optimizers.set_schedule(seed)
    for p in optimizers.parameters():
        p.grad.normal_(generator=generator)
    optimizers.step()


@pytest.mark.parametrize("flags", [BF16, DELAYED | PARTS, DELAYED | PARTS | dict(USE_DDP=True),
                                   DELAYED | dict(USE_DDP=True, GATHER_FP32=False)],
                         ids=["muon", "normuon", "normuon-ddp", "masters"])
def test_replayed_updates_equal_launched_ones(optimizers, flags):
    """To the last bit, over eight steps, five of them as graphs, which are captured twice."""
    launched, replayed = optimizers(**flags), optimizers(**flags)
    for step in range(8):
        if step in (3, 6):
            replayed.graphs = ()
            replayed.capture(torch.cuda.graph_pool_handle())
            assert len(replayed.graphs) == 2
        for one in (launched, replayed):
            update(one, step)
        for a, b in zip(launched.parameters(), replayed.parameters(), strict=True):
            assert torch.equal(a, b), (step, a.shape)


@pytest.mark.parametrize("flags", [dict(muon_impl="torch"), dict(USE_FSDP2=True), dict(USE_COMPILE=True)])
def test_updates_that_cannot_be_captured(optimizers, flags):
    one = optimizers(**BF16, **flags)
    one.capture(torch.cuda.graph_pool_handle())
    assert not one.graphs


def test_a_capture_that_fails(optimizers, monkeypatch):
    """Not a real failure: after one torch refuses random numbers on the GPU."""
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    one = optimizers(**BF16)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    with pytest.raises(UserError, match="operation not permitted.*--USE_CUDA_GRAPHS=False"):
        one.capture(torch.cuda.graph_pool_handle())
    assert not one.graphs


@pytest.mark.parametrize("precision", [BF16, DELAYED], ids=["bf16", "delayed"])
def test_training_with_updates_in_graphs(run, precision):
    """The updates' graphs share memory with those of the micro-batches, which must not show."""
    flags = precision | PARTS | CHANGING
    check_same(run(**flags), run(**flags, USE_CUDA_GRAPHS=False))


def test_command_line_compiled(te, run, tmp_path):
    """`python train.py ...` with the kernels compiled, in a process of its own: as the plain run in this one.

    Compiled kernels skip some roundings to bf16 between operations, so the usual tolerance holds.
    """
    argv = arguments(DELAYED | dict(USE_COMPILE=True, out_dir=str(tmp_path), run_name="cli"))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], cwd=tmp_path, capture_output=True, text=True,
                          timeout=140)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "fp8-delayed by Transformer Engine" in done.stdout and "done: val loss" in done.stdout
    check_same(run(**DELAYED), read_run(tmp_path / "cli", done.stdout))


# ------------------------------------------------------------------------------------- evaluation


def test_evaluation_changes_no_training_loss(run):
    """Delayed scaling with and without evaluations in between; the last val loss is the same too."""
    plain, evaluated = run(**DELAYED), run(**DELAYED, eval_interval=2)
    assert len(plain.vals) == 1 and len(evaluated.vals) == FLAGS["max_iters"] // 2
    check_same(plain, evaluated)
    assert abs(plain.done["val_loss"] - evaluated.done["val_loss"]) < SAME["loss"]


@pytest.mark.parametrize("name", ["fp8-delayed", "fp8-block", "nvfp4"])
def test_evaluation_in_the_format_of_training(run, name):
    """EVAL_PRECISION=training: TE's amax history stays out of it, and both losses are reported."""
    plain, evaluated = run(**PRECISIONS[name]), run(**PRECISIONS[name], eval_interval=2, EVAL_PRECISION="training")
    check_same(plain, evaluated)
    assert list(evaluated.done["val_losses"]) == [name, "bf16"] and list(plain.done["val_losses"]) == ["bf16", name]
    assert 0 < abs(evaluated.done["val_losses"][name] - evaluated.done["val_losses"]["bf16"]) < 0.1


def test_an_evaluation_restores_te_scales(te, procs):
    """preserved_scales() around a pass of TE's layers without gradients: history and scales are those of before, to the
    bit."""
    parts = build(procs, **DELAYED)
    batch = parts.loader.peek()
    with parts.precision.autocast(procs):
        parts.model(*batch).backward()
    before = {k: v.clone() for k, v in fp8_state(parts.model).items()}
    with torch.no_grad(), preserved_scales(parts.model), parts.precision.autocast(procs):
        parts.model(*batch)
    after = fp8_state(parts.model)
    assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", ["fp8-delayed", "fp8-current", "fp8-block", "nvfp4"])
def test_statistics(run, name):
    """FP8_STATS_INTERVAL trains the same; with TE's recipes and scales every layer's numbers are in range; the picture
    is there."""
    plain, watched = run(**PRECISIONS[name]), run(**PRECISIONS[name], FP8_STATS_INTERVAL=4)
    check_same(plain, watched)
    assert [r["step"] for r in watched.stats] == [3, 7] and (watched.folder / "fp8_stats.png").stat().st_size > 10_000
    for layer, kinds in watched.stats[-1]["layers"].items():
        for kind, numbers in kinds.items():
            assert numbers["amax"] > 0 and numbers["scale"] > 0, (layer, kind)
            # Of 16 values in an NVFP4 block one may be above its scale, which is rounded; zeros are not counted
            saturated, error = (0.1, 0.3) if name == "nvfp4" else (0.05, 0.15)
            assert numbers["saturated"] < saturated and 0.005 < numbers["error"] < error, (layer, kind, numbers)
    assert len(watched.stats[-1]["layers"]) == 4 * FLAGS["n_layer"] + 1
    assert bool(watched.stats[-1]["layers"]["head"]) == (name != "nvfp4")


def build(procs, **flags):
    """A train.Run of these flags, as train.set_up() builds it, without log and checkpoints."""
    cfg = train.read_flags(arguments(flags))
    torch.manual_seed(cfg.seed)
    loader, val_ring = train.open_data(cfg, procs)
    run = train.build(cfg, procs, loader)
    run.val_ring = val_ring
    return run


def test_evaluation_leaves_the_amax_history_alone(te, procs):
    """TE's scales and histories are the same in every bit after an evaluation, and move on with the next step."""
    p = build(procs, **DELAYED)

    def train_steps(n):
        for step in range(n):
            p.optimizers.set_schedule(step)
            train.train_step(p)
        return {name: t.clone() for name, t in fp8_state(p.model).items()}

    train.calibrate(p)
    before = train_steps(3)
    # scale and history, forward and backward, of qkv, proj and MLP. TE's attention, where it is used, has some too
    ours = [name for name in before if ".core." not in name]
    assert len(ours) == 3 * 4 * p.cfg.n_layer
    train.evaluate(p.model, p.val_ring, p.cfg, procs, lambda: p.precision.autocast(procs, quantized=False))
    after = fp8_state(p.model)
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    later = train_steps(1)
    p.loader.close()
    assert [name for name in before if name.endswith("amax_history") and not torch.equal(before[name], later[name])]


# ------------------------------------------------------------------------------------- causality


def test_causality(te, procs):
    """bf16 with TE: a changed token changes no logits before it (at most one part in 1000), and all after it."""
    p = build(procs, **BF16)
    with torch.no_grad():
        for weight in p.model.parameters():  # output projections and head start at zero
            if weight.ndim == 2 and not weight.any():
                weight.normal_(std=weight.shape[1] ** -0.5)
    x = torch.randint(0, 50257, (2, p.cfg.block_size), dtype=torch.int32, device=procs.device)
    p.model.eval()
    for position in (1, 100, 255):
        changed = x.clone()
        changed[:, position:] = (changed[:, position:] + 1234) % 50257
        with torch.no_grad(), p.precision.autocast(procs, quantized=False):
            a, b = p.model(x), p.model(changed)
        gap = (a - b).abs().amax(dim=(0, 2))  # of each position
        assert gap[:position].max() < 1e-3, (position, gap[:position].max())
        assert gap[position:].min() > 0.05, (position, gap[position:].min())


# ------------------------------------------------------------------------------------- profile


@pytest.mark.parametrize("precision", [BF16, DELAYED], ids=["bf16", "delayed"])
def test_profile_finds_the_label_of_most_kernels(te, procs, tmp_path, precision):
    """bench.py profile: all matmuls and the functions that every step calls have kernels, by whatever library.

    A larger model than elsewhere, so that the matmuls take most of the time. At most 30% belongs to no label: clipping,
    zeroing gradients and small kernels of the loss. Where kernels of Triton and Transformer Engine were not found, it
    was 78% of preset classic's step.
    """
    flags = precision | dict(n_layer=4, n_embd=1024, n_head=8, batch_size=64, total_batch_size=32768,
                             loss_chunk_size=8192, out_dir=str(tmp_path), keep_checkpoints=0)
    found = breakdown.measure(train, train.read_flags(arguments(flags)), procs, 5)
    rows = {row["label"]: row for row in found["rows"]}
    print("\n".join(f"{row['ms']:8.3f} ms  x{row['calls']}  {row['label']}" for row in found["rows"]))
    matmuls = [row for row in found["rows"] if row["flops"]]
    assert matmuls and any("E4M3" in row["label"] for row in matmuls) == (precision == DELAYED)
    always = ("attention, forward", "attention, backward", "optimizers", "RoPE and QK norm, forward", "norm, backward",
              "residual, norm and quantization, forward", "RoPE and QK norm with quantization, backward")
    for row in [*matmuls, *(rows[label] for label in always)]:
        assert row["calls"] > 0 and row["ms"] > 0, row
    unknown = sum(row["ms"] for label, row in rows.items() if label.startswith(("other: ", "everything else")))
    assert unknown < 0.3 * found["total"], unknown
    assert sum(row["ms"] for row in found["rows"]) == pytest.approx(found["total"])


# ------------------------------------------------------------------------------------- two GPUs

WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import train
from nanofp8.procs import start_processes
procs = start_processes()
for argv in json.load(open(sys.argv[2])):
    train.run(train.read_flags(argv), procs)
# Checkpoints, which a thread writes, must not take memory of the other rank's GPU
assert not torch._C._cuda_hasPrimaryContext(1 - procs.device.index), "a context on the other rank's GPU"
dist.destroy_process_group()
"""


# Each rank's share of a step in two micro-batches: graphs that overwrite gradients, and graphs that add to them
SEVERAL = {"-several": dict(batch_size=4), "-no-graphs": dict(batch_size=4, USE_CUDA_GRAPHS=False)}


@pytest.fixture(scope="module")
def two_gpus(te, tmp_path_factory):
    """All runs on two GPUs, by torchrun, in one pair of processes: {(wrapper, precision): run}."""
    out = tmp_path_factory.mktemp("two_gpus")
    runs = {f"{wrapper}-{name}{'-parts' if parts else ''}": PRECISIONS[name] | parts | {f"USE_{wrapper}": True}
            for wrapper in ("DDP", "FSDP2") for name in ("bf16", "fp8-delayed") for parts in ({}, PARTS)}
    runs |= {f"{wrapper}-{name}{how}": PRECISIONS[name] | {f"USE_{wrapper}": True} | changes
             for wrapper in ("DDP", "FSDP2") for name in ("bf16", "fp8-delayed") for how, changes in SEVERAL.items()}
    runs |= {f"{wrapper}-{name}-ramp": PRECISIONS[name] | RAMP | {f"USE_{wrapper}": True, "batch_size": 2}
             for wrapper in ("DDP", "FSDP2") for name in ("bf16", "fp8-delayed")}
    runs |= {f"{wrapper}-fp8-delayed-dion": DELAYED | PARTS | CHANGING | {f"USE_{wrapper}": True}
             for wrapper in ("DDP", "FSDP2")}
    (out / "worker.py").write_text(textwrap.dedent(WORKER))
    (out / "argv.json").write_text(json.dumps([arguments(f | dict(out_dir=str(out), run_name=n)) for n,
                                               f in runs.items()]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(out / "worker.py"),
               str(ROOT), str(out / "argv.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: read_run(out / name) for name in runs}


@MULTI_GPU
@pytest.mark.parametrize("parts", ["", "-parts"])
@pytest.mark.parametrize("name", ["bf16", "fp8-delayed"])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_gpus_match_one(two_gpus, run, wrapper, name, parts):
    """The same tokens a step on two GPUs (one micro-batch each) as on one (two): 0.03 in loss.

    Gradients are added up in another order; FSDP2 rounds weights to bf16 before FP8; delayed scaling sees the
    amaxes of both halves of a step at once, and not one after the other.
    """
    result = two_gpus[f"{wrapper}-{name}{parts}"]
    assert result.config["world_size"] == 2 and result.config["wrapper"] == wrapper.lower()
    check_trains(result)
    check_same(run(**PRECISIONS[name], **(PARTS if parts else {})), result, loss=0.03, norm=0.1)


@MULTI_GPU
@pytest.mark.parametrize("name", ["bf16", "fp8-delayed"])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_a_growing_batch_on_two_gpus(two_gpus, run, wrapper, name):
    """The same tokens a step as on one GPU, in micro-batches of half the size."""
    result = two_gpus[f"{wrapper}-{name}-ramp"]
    check_same(run(**PRECISIONS[name], **RAMP), result, loss=0.03, norm=0.1)


@MULTI_GPU
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_dion_on_two_gpus(two_gpus, run, wrapper):
    """Dion's NorMuon with a schedule that changes in every step. Under FSDP2 it normalizes each shard by itself."""
    result = two_gpus[f"{wrapper}-fp8-delayed-dion"]
    check_trains(result)
    limits = dict(loss=0.03, norm=0.1) if wrapper == "DDP" else dict(loss=0.1, norm=0.3)
    check_same(run(**DELAYED | PARTS | CHANGING), result, **limits)


@MULTI_GPU
@pytest.mark.parametrize("name", ["bf16", "fp8-delayed"])
def test_fsdp2_matches_ddp(two_gpus, name):
    """Several micro-batches a step, as CUDA graphs from step 4 on and without. FSDP2 rounds weights to bf16: 0.03."""
    ddp, fsdp2, launched = (two_gpus[f"{wrapper}-{name}{how}"] for wrapper, how in (
        ("DDP", "-several"), ("FSDP2", "-several"), ("FSDP2", "-no-graphs")))
    check_trains(fsdp2)
    check_same(fsdp2, launched)
    check_same(fsdp2, ddp, loss=0.03, norm=0.1)
