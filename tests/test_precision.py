"""precision.py: layers kept in bf16, the recipes' flags, FP8's scaling state, the format of evaluations."""

import contextlib
import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import helpers
import train
from helpers import (
    forward,
    losses,
    make_cfg,
    make_model,
    one_process,
    precision_of,
    records,
    tokens_and_targets,
    train_here,
)
from nanofp8 import te_emulation as te
from nanofp8.config import UserError
from nanofp8.precision import (
    NVFP4_INGREDIENTS,
    TE_PARTS,
    check_one_format,
    fp8_state,
    keep_high_precision,
    layer_names,
    preserved_scales,
)

LAYERS = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp")]


@pytest.mark.parametrize("patterns, expected", [
    ("", []), ("blocks.1", LAYERS[3:]), ("blocks.0.mlp", ["blocks.0.mlp"]),
    ("blocks.*.attn.proj", [LAYERS[1], LAYERS[4]]),
    ("blocks.1.attn.*, blocks.0.mlp", [LAYERS[2], LAYERS[3], LAYERS[4]]), ("blocks.*", LAYERS),
    ("*.mlp,*.mlp", [LAYERS[2], LAYERS[5]]), ("head", ["head"]),
])
def test_patterns(fresh, patterns, expected):
    assert keep_high_precision(make_model(), patterns, te) == expected
    assert layer_names(2) == [*LAYERS, "head"]


def test_a_head_that_is_in_bf16_anyway_may_be_named(fresh):
    """So that one list of patterns serves all formats of a comparison."""
    for flags in (dict(USE_FP8_HEAD=False), dict(USE_NVFP4=True)):
        model = make_model(make_cfg(**flags))
        assert keep_high_precision(model, "head", te) == ["head"] and not model.fp8_head
    assert make_model(make_cfg()).fp8_head
    model = make_model(make_cfg(HIGH_PRECISION_LAYERS="head"))
    assert keep_high_precision(model, "head", te) == ["head"] and not model.fp8_head


def test_a_head_in_bf16_counts_as_one(fresh):
    """Before the model is there, too: it may have any vocabulary, and memory is predicted for it."""
    cfg = make_cfg(HIGH_PRECISION_LAYERS="head", vocab_size=509)
    assert not train.select_precision(cfg, helpers.CPU).fp8_head(cfg)
    with pytest.raises(UserError, match="vocab_size"):
        train.select_precision(make_cfg(vocab_size=509), helpers.CPU)


@pytest.mark.parametrize("patterns", ["blocks.2", "block.1", "embed", "blocks.1,heads"])
def test_a_pattern_that_matches_nothing_is_an_error(fresh, patterns):
    with pytest.raises(UserError, match=f"'{patterns.split(',')[-1]}' matches no layer.*blocks.0.attn.qkv") as error:
        keep_high_precision(make_model(), patterns, te)
    assert error.value.status == 2


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_all_layers_in_bf16_are_the_bf16_run(fresh, shards, tmp_path, recompute):
    """Bit for bit, with and without recomputation. With one layer less, the losses differ."""
    common = dict(max_iters=3, run_name="r", USE_AC_BLOCKS=recompute)
    bf16 = losses(train_here(tmp_path / "a", shards, USE_FP8=False, **common))
    kept = losses(train_here(tmp_path / "b", shards, HIGH_PRECISION_LAYERS="blocks.*,head", **common))
    most = losses(train_here(tmp_path / "c", shards, HIGH_PRECISION_LAYERS="blocks.*.attn.*,blocks.0,head", **common))
    assert (bf16 == kept).all() and (bf16 != most).any()


def test_only_the_other_layers_have_scales(fresh):
    cfg = make_cfg(HIGH_PRECISION_LAYERS="blocks.1")
    model = make_model(cfg)
    keep_high_precision(model, cfg.HIGH_PRECISION_LAYERS, te)
    with train.select_precision(cfg, torch.device("cpu")).autocast(one_process()):
        model(*tokens_and_targets(cfg)).backward()
    assert {name.split(".")[1] for name in fp8_state(model)} == {"0"}


NVFP4 = dict(USE_NVFP4=True, n_embd=128)


def nvfp4_switches(precision):
    """Return whether the recipe has Hadamard transform, stochastic rounding and 2-D weights."""
    return [not getattr(precision.recipe, field) for field, _ in NVFP4_INGREDIENTS.values()]


@pytest.mark.parametrize("flag", NVFP4_INGREDIENTS)
def test_nvfp4_switches(fresh, flag):
    """Each flag changes its own field of the recipe and no other. What is said of them is what the recipe has."""
    precision = train.select_precision(make_cfg(**NVFP4, **{flag: False}), helpers.CPU)
    assert nvfp4_switches(precision) == [other != flag for other in NVFP4_INGREDIENTS]
    said_with, said_without = precision.details.split(", without ")
    for other, (_, name) in NVFP4_INGREDIENTS.items():
        assert (name in said_without) == (other == flag) == (name not in said_with)


@pytest.mark.parametrize("version, capability, complete", [
    ("2.17.1", (12, 0), False), ("2.18.0", (12, 0), False), ("2.18.0+a1b2c3", (12, 1), False),
    ("2.19.0", (12, 0), True), ("2.20.2", (12, 0), True), ("2.20.2", (12, 1), True), ("3.0", (12, 0), True),
    ("2.17.1", (10, 0), True), ("2.20.2", (10, 0), True),
])
def test_nvfp4_on_each_gpu(monkeypatch, version, capability, complete):
    """Two ingredients need Transformer Engine 2.19 on RTX 50 and RTX PRO. Without it they are off, which is said, and
    a flag that asks for one is refused."""
    helpers.fake_transformer_engine(monkeypatch, version, capability)
    precision = train.select_precision(make_cfg(**NVFP4), helpers.GPU)
    assert not precision.emulated and nvfp4_switches(precision) == [complete, complete, True]
    assert ("without" not in precision.details) == complete
    if not complete:
        assert "without Hadamard transform and stochastic rounding" in precision.details
        assert all(word in precision.details for word in (version, "2.19", f"{capability[0]}.{capability[1]}"))
    for flag in ("NVFP4_HADAMARD", "NVFP4_STOCHASTIC_ROUNDING"):
        assert nvfp4_switches(train.select_precision(make_cfg(**NVFP4, **{flag: False}), helpers.GPU))[2]
        if complete:
            train.select_precision(make_cfg(**NVFP4, **{flag: True}), helpers.GPU)
            continue
        with pytest.raises(UserError, match=f"{flag}=True.*2.19.*") as error:
            train.select_precision(make_cfg(**NVFP4, **{flag: True}), helpers.GPU)
        assert error.value.status == 2 and version in str(error.value)
    assert nvfp4_switches(train.select_precision(make_cfg(**NVFP4, NVFP4_2D_WEIGHTS=True), helpers.GPU))[2]


@pytest.mark.parametrize("cublaslt, refused", [(130400, True), (130401, False), (130100, False), (130302, False)])
def test_a_cublas_that_ignores_scales_of_nvfp4_is_refused(monkeypatch, cublaslt, refused):
    """In hardware only: the emulation and other formats do not use it."""
    helpers.fake_transformer_engine(monkeypatch, capability=(10, 0), cublaslt=cublaslt)
    train.select_precision(make_cfg(), helpers.GPU)
    train.select_precision(make_cfg(**NVFP4, USE_EMULATION=True), helpers.GPU)
    if not refused:
        assert not train.select_precision(make_cfg(**NVFP4), helpers.GPU).emulated
        return
    with pytest.raises(UserError, match="13.4.0.*13.4.1.*--USE_NVFP4=False") as error:
        train.select_precision(make_cfg(**NVFP4), helpers.GPU)
    assert error.value.status == 1


# -----------------------------------------------------------------------------------------------------
# Recipes' switches, each through a whole run


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(FP8_MARGIN=6), dict(FP8_AMAX_HISTORY=1), dict(USE_NVFP4=True, NVFP4_HADAMARD=False),
    dict(USE_NVFP4=True, NVFP4_STOCHASTIC_ROUNDING=False), dict(USE_NVFP4=True, NVFP4_2D_WEIGHTS=False)], ids=str)
def test_every_switch_changes_the_run(fresh, shards, tmp_path, changes):
    common = dict(max_iters=4, n_embd=128)
    base = {k: v for k, v in changes.items() if k == "USE_NVFP4"}
    assert (losses(train_here(tmp_path / "a", shards, **common,
                              **base)) != losses(train_here(tmp_path / "b", shards, **common, **changes))).any()


def test_margin_and_history_reach_the_scales(fresh, shards, tmp_path):
    """A margin of 2 divides every scale by 4; a history of one step forgets the larger amaxes before it."""
    cfg = make_cfg(FP8_MARGIN=2, FP8_AMAX_HISTORY=3)
    model, precision = make_model(cfg), train.select_precision(cfg, torch.device("cpu"))
    with precision.autocast(one_process()):
        model(*tokens_and_targets(cfg)).backward()
    state = fp8_state(model)
    history, scale = state["blocks.0.mlp.scaling_fwd.amax_history"], state["blocks.0.mlp.scaling_fwd.scale"]
    assert len(history) == 3
    used = history[-1] > 0
    torch.testing.assert_close(scale[used], 448 / 4 / history[-1][used])


# -----------------------------------------------------------------------------------------------------
# Evaluation in bf16 or in the format of training


@pytest.mark.slow
@pytest.mark.parametrize("changes, name", [(dict(), "fp8-delayed"), (dict(FP8_RECIPE="current"), "fp8-current"),
                                           (dict(USE_NVFP4=True, n_embd=128), "nvfp4")])
def test_eval_precision(fresh, shards, tmp_path, capsys, changes, name):
    """The flag chooses the format of the evaluations during training. The last one is made in both formats, and
    training is equal bit for bit."""
    runs = {p: train_here(tmp_path / p, shards, max_iters=4, eval_interval=2, EVAL_PRECISION=p, **changes)
            for p in ("bf16", "training")}
    assert (losses(runs["bf16"]) == losses(runs["training"])).all()
    printed = capsys.readouterr().out
    for p, folder in runs.items():
        vals, (done,) = records(folder, "val"), records(folder, "done")
        first, other = ("bf16", name) if p == "bf16" else (name, "bf16")
        assert list(done["val_losses"]) == [first, other]
        assert done["val_loss"] == done["val_losses"][first] == vals[-1]["val_loss"]
        assert 0 < abs(done["val_losses"]["bf16"] - done["val_losses"][name]) < 0.1
        last = f"done: val loss {done['val_loss']:.4f} in {first}, {done['val_losses'][other]:.4f} in {other} after"
        assert last in printed
    a, b = (records(runs[p], "val")[0]["val_loss"] for p in ("bf16", "training"))
    assert a != b


def test_a_bf16_run_has_one_val_loss(fresh, shards, tmp_path):
    (done,) = records(train_here(tmp_path, shards, max_iters=2, USE_FP8=False, EVAL_PRECISION="training"), "done")
    assert done["val_losses"] == {"bf16": done["val_loss"]}


def test_evaluation_in_the_format_of_training_leaves_the_scales_alone(fresh, shards):
    """Without preserved_scales() the amaxes of an evaluation would be counted by the next step."""
    cfg = make_cfg()
    model, precision = make_model(cfg), train.select_precision(cfg, torch.device("cpu"))
    x, y = tokens_and_targets(cfg)
    with precision.autocast(one_process()):
        model(x, y).backward()
    before = {k: v.clone() for k, v in fp8_state(model).items()}
    for kept in (True, False):
        with torch.no_grad(), preserved_scales(model) if kept else contextlib.nullcontext(), \
                precision.autocast(one_process()):
            model(x, y)
        assert all(torch.equal(v, before[k]) for k, v in fp8_state(model).items()) == kept


def test_bf16_says_no_emulation_of_numbers():
    precision = precision_of(make_cfg(USE_FP8=False))
    assert precision.name == "bf16" and precision.recipe is None and "EMULATED" not in precision.reason


def test_nvfp4_takes_the_place_of_fp8():
    assert precision_of(make_cfg(n_embd=128, USE_NVFP4=True, USE_FP8=True)).name == "nvfp4"
    assert precision_of(make_cfg(n_embd=128, USE_NVFP4=True, USE_FP8=False)).name == "nvfp4"


def test_delayed_scaling_takes_its_flags():
    recipe = precision_of(make_cfg(FP8_MARGIN=2, FP8_AMAX_HISTORY=5)).recipe
    assert recipe.margin == 2 and recipe.amax_history_len == 5 and recipe.amax_compute_algo == "max"


def test_fp8_state_names_live_tensors():
    cfg = make_cfg()
    model, (x, y) = make_model(cfg), tokens_and_targets(cfg)
    forward(model, cfg, x, y).backward()
    state = fp8_state(model)
    modules = [f"blocks.{i}.{m}" for i in range(2) for m in ("attn.qkv", "attn.proj", "mlp")]
    assert set(state) == {f"{m}.{d}.{t}" for m in modules for d in ("scaling_fwd", "scaling_bwd")
                          for t in ("scale", "amax_history")}
    before = {k: v.clone() for k, v in state.items()}
    forward(model, cfg, x, y, quantized=False)
    assert all(torch.equal(v, before[k]) for k, v in state.items())  # bf16 feeds nothing
    forward(model, cfg, x, y).backward()
    assert not all(torch.equal(v, before[k]) for k, v in state.items())
    assert fp8_state(make_model(make_cfg(USE_FP8=False))) == {}


# -----------------------------------------------------------------------------------------------------
# Transformer Engine's version and parts


@pytest.mark.parametrize("version, tried", [("2.20.2", True), ("2.20.0+1a2b", True), ("2.17.1", False),
                                            ("2.21.0.dev0+1a2b3c", False), ("of unknown version", False)])
def test_the_version_is_printed(monkeypatch, version, tried):
    helpers.fake_transformer_engine(monkeypatch, version)
    precision = train.select_precision(make_cfg(), helpers.GPU)
    assert not precision.emulated and precision.reason.startswith(f"by Transformer Engine {version}")
    assert all((word in precision.reason) != tried for word in ("not tried", "2.17 and newer"))


def broken_library(monkeypatch, library, error):
    """Let an import of this library fail in this process, as if it was not imported before."""
    class Broken:
        def find_spec(self, name, *_):
            if name == library:
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


BROKEN = [OSError("libcudart.so.13: cannot open shared object file"), RuntimeError("no driver\nno GPU"),
          AssertionError("unknown CUDA"), ImportError("no module")]


@pytest.mark.parametrize("error", BROKEN)
def test_a_transformer_engine_that_cannot_be_imported_is_emulated(monkeypatch, capsys, error):
    """Whatever the import raises; the reason is its last line. A warning says it, since it is slow."""
    helpers.fake_transformer_engine(monkeypatch)
    broken_library(monkeypatch, "transformer_engine", error)
    precision = train.select_precision(make_cfg(), helpers.GPU)
    assert precision.emulated and precision.te is te
    assert f"Transformer Engine cannot be imported: {str(error).splitlines()[-1]}" in precision.reason
    line = capsys.readouterr().out
    assert "slower than bf16" in line and "--USE_FP8=False" in line and str(error).splitlines()[-1] in line
    train.select_precision(make_cfg(USE_FP8=False), helpers.GPU)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("error", BROKEN)
@pytest.mark.parametrize("module", ["fused", "loss", "muon", "parts"])
def test_a_triton_that_cannot_be_imported_leaves_plain_pytorch(monkeypatch, module, error):
    """Checked on a second copy of each module that uses Triton."""
    broken_library(monkeypatch, "triton", error)
    for name, known_as in (("optional_triton", "nanofp8.optional_triton"), (module, f"nanofp8.copy_of_{module}")):
        spec = importlib.util.spec_from_file_location(known_as, helpers.ROOT / "nanofp8" / f"{name}.py")
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, known_as, copy)
        spec.loader.exec_module(copy)
    assert copy.triton is None and copy.kernels is None
    if module == "fused":
        assert not copy.kernels_fit(make_cfg(), helpers.GPU) and not copy.use_kernels(torch.zeros(1))


@pytest.mark.parametrize("version", ["2.8.0", "2.16.1", "1.13", "2.14.0+a1b2c3"])
@pytest.mark.parametrize("changes", [dict(), dict(USE_FP8=False)])
def test_a_transformer_engine_that_is_too_old_is_one_line(monkeypatch, version, changes):
    helpers.fake_transformer_engine(monkeypatch, version)
    with pytest.raises(UserError) as error:
        train.select_precision(make_cfg(**changes), helpers.GPU)
    assert all(word in str(error.value) for word in (version, "2.17", "2.20.2", "--USE_EMULATION=True"))
    assert "\n" not in str(error.value) and error.value.status == 1
    assert train.select_precision(make_cfg(**changes, USE_EMULATION=True), helpers.GPU).emulated


@pytest.mark.parametrize("module, names, arguments", TE_PARTS)
def test_every_part_of_transformer_engine_is_checked(monkeypatch, module, names, arguments):
    """Without it, or with an argument renamed, there is one line that names it."""
    helpers.fake_transformer_engine(monkeypatch)
    owner, name = sys.modules[module], names.split()[-1]
    *steps, name = name.split(".")
    for step in steps:
        owner = getattr(owner, step)
    if arguments:
        monkeypatch.setattr(owner, name, lambda other: None)
        with pytest.raises(UserError, match=rf"{name}\({arguments.split()[0]}\)"):
            train.select_precision(make_cfg(), helpers.GPU)
    monkeypatch.delattr(owner, name)
    with pytest.raises(UserError, match=f"2.20.2 lacks .*{name}.*--USE_EMULATION") as error:
        train.select_precision(make_cfg(), helpers.GPU)
    assert error.value.status == 1


@pytest.mark.parametrize("changes", [dict(), dict(USE_EMULATION=True), dict(USE_FP8=False)])
def test_triton_needs_a_compiler_and_headers(monkeypatch, changes):
    """On a GPU that is one line before anything is built; without a GPU nothing needs them."""
    pytest.importorskip("triton")
    helpers.fake_transformer_engine(monkeypatch)
    helpers.fake_compilers(monkeypatch, "no Python.h; apt install python3-dev")
    with pytest.raises(UserError, match="python3-dev") as error:
        train.select_precision(make_cfg(**changes), helpers.GPU)
    assert error.value.status == 1
    train.select_precision(make_cfg(**changes), helpers.CPU)


# -----------------------------------------------------------------------------------------------------
# GPUs without the default format

NO_FP8 = "Device compute capability 8.9 or higher required for FP8 execution."


@pytest.mark.parametrize("changes, name, emulated", [
    (dict(), "bf16", False), (dict(FP8_MARGIN=1), "bf16", False), (dict(USE_FP8=False), "bf16", False),
    (dict(USE_FP8=True), "fp8-delayed", True), (dict(FP8_RECIPE="delayed"), "fp8-delayed", True),
    (dict(FP8_RECIPE="block", n_embd=128), "fp8-block", True), (NVFP4, "nvfp4", True),
    (dict(USE_EMULATION=True), "fp8-delayed", True),
])
def test_an_a100_trains_in_bf16_unless_a_format_is_asked_for(monkeypatch, changes, name, emulated):
    helpers.fake_transformer_engine(monkeypatch, capability=(8, 0), available=lambda question: (False, NO_FP8))
    precision = train.select_precision(make_cfg(**changes), helpers.GPU)
    assert (precision.name, precision.emulated) == (name, emulated)
    assert ("EMULATED" in precision.reason) == emulated and (precision.recipe is None) == (name == "bf16")
    if name == "bf16" and "USE_FP8" not in changes:
        assert "--USE_FP8=True" in precision.reason and "8.9" in precision.reason
    assert ("FP8_MARGIN=1" in precision.flags_without_effect(make_cfg(FP8_MARGIN=1))) == (name != "fp8-delayed")
    assert precision.calibration_steps(make_cfg()) == (3 if name == "fp8-delayed" else 0)


def test_statistics_of_fp8_on_an_a100_need_fp8_to_be_asked_for(monkeypatch):
    helpers.fake_transformer_engine(monkeypatch, capability=(8, 0), available=lambda question: (False, NO_FP8))
    with pytest.raises(UserError, match="FP8_STATS_INTERVAL.*USE_FP8"):
        train.select_precision(make_cfg(FP8_STATS_INTERVAL=2), helpers.GPU)
    assert train.select_precision(make_cfg(FP8_STATS_INTERVAL=2, USE_FP8=True), helpers.GPU).emulated


@pytest.mark.parametrize("capability, changes, zscore", [
    ((12, 0), dict(), 8.0), ((12, 1), dict(FP8_RECIPE="current"), 8.0), ((9, 0), dict(), 0.0), ((10, 0), dict(), 0.0),
    ((12, 0), dict(USE_FP8=False), 0.0), ((12, 0), NVFP4, 0.0), ((12, 0), dict(USE_EMULATION=True), 0.0),
])
def test_outliers_are_skipped_in_fp8_on_an_rtx_50(monkeypatch, capability, changes, zscore):
    helpers.fake_transformer_engine(monkeypatch, capability=capability)
    assert train.select_precision(make_cfg(**changes), helpers.GPU).grad_zscore == zscore


def test_gpus_of_several_kinds_must_train_in_one_format():
    """A 4090 beside a 3090: each rank would choose alone, and their collectives would not match."""
    precision = SimpleNamespace(name="fp8-delayed", emulated=False)
    check_one_format(precision, SimpleNamespace(gather=lambda chosen: [chosen] * 2))
    for other in ("bf16", "emulated fp8-delayed"):
        with pytest.raises(UserError, match=f"rank 1 would train in {other}, rank 0 in fp8-delayed.*USE_FP8=False"):
            check_one_format(precision, SimpleNamespace(gather=lambda chosen, other=other: [chosen, other]))


def test_ranks_share_amaxes(monkeypatch):
    """All ranks get the larger histories and the scales that follow, in place; where amaxes are zero or infinite, the
    smaller scale. A run in one process, or without delayed scaling, has nothing to share."""
    device, inf = torch.device("cpu"), math.inf
    modules = [torch.nn.Module(), torch.nn.Module(), torch.nn.Module()]
    for module in modules[:2]:
        module.fp8_meta = {"scaling_fwd": te.DelayedScalingState(3, 3, device),
                           "scaling_bwd": te.DelayedScalingState(3, 2, device)}
    model, precision = torch.nn.ModuleList(modules), train.select_precision(make_cfg(FP8_MARGIN=1), device)
    first, second = (module.fp8_meta for module in modules[:2])
    first["scaling_fwd"].amax_history[:] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 3.0, 0.0], [2.0, 0.5, 0.0]])
    second["scaling_bwd"].amax_history[:] = torch.tensor([[0.0, 0.0], [7.0, inf], [0.0, 1.0]])
    theirs = torch.zeros(4, 10)  # 3 forward columns of the first and the second module, then 2 backward of each
    theirs[3] = -1.0  # the last row: minus the scales
    theirs[3, 9] = -0.25  # of an infinite amax: the smaller scale, if they differ
    theirs[1, 0], theirs[2, 1], theirs[2, 8] = 4.0, 1.0, 14.0
    calls = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op: (calls.append(op), x.copy_(x.maximum(theirs))))
    precision.share_amaxes(model, one_process())
    assert not calls and (first["scaling_fwd"].scale == 1).all()
    addresses = [tensor.data_ptr() for tensor in fp8_state(model).values()]
    precision.share_amaxes(model, one_process(world_size=2))
    assert calls == [torch.distributed.ReduceOp.MAX]
    assert addresses == [tensor.data_ptr() for tensor in fp8_state(model).values()]
    assert first["scaling_fwd"].amax_history.tolist() == [[0.0, 0.0, 0.0], [4.0, 3.0, 0.0], [2.0, 1.0, 0.0]]
    assert first["scaling_fwd"].scale.tolist() == pytest.approx([448 / 2 / 4, 448 / 2 / 3, 1.0])
    assert second["scaling_bwd"].scale.tolist() == [57344 / 2 / 14, 0.25]
    assert second["scaling_fwd"].scale.tolist() == [1.0] * 3 and first["scaling_bwd"].scale.tolist() == [1.0] * 2
    bf16 = train.select_precision(make_cfg(USE_FP8=False), device)
    bf16.share_amaxes(torch.nn.Linear(2, 2), one_process(world_size=2))
    assert len(calls) == 1
