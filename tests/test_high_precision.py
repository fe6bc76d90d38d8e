"""HIGH_PRECISION_LAYERS and NVFP4's switches: which layers quantize, and how."""

import pytest
import torch

import te_emulation as te
import train
from helpers import losses, make_cfg, make_model, one_process, tokens_and_targets, train_here

LAYERS = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp")]


@pytest.mark.parametrize("patterns, expected", [
    ("", []), ("blocks.1", LAYERS[3:]), ("blocks.0.mlp", ["blocks.0.mlp"]), ("blocks.*.attn.proj", [LAYERS[1], LAYERS[4]]),
    ("blocks.1.attn.*, blocks.0.mlp", [LAYERS[2], LAYERS[3], LAYERS[4]]), ("blocks.*", LAYERS), ("*.mlp,*.mlp", [LAYERS[2], LAYERS[5]]), ("head", ["head"]),
])
def test_patterns(fresh, patterns, expected):
    assert train.keep_high_precision(make_model(), patterns, te) == expected


@pytest.mark.parametrize("patterns", ["blocks.2", "block.1", "embed", "blocks.1,heads"])
def test_a_pattern_that_matches_nothing_is_an_error(fresh, patterns):
    with pytest.raises(train.UserError, match=f"'{patterns.split(',')[-1]}' matches no layer.*blocks.0.attn.qkv") as error:
        train.keep_high_precision(make_model(), patterns, te)
    assert error.value.status == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_all_layers_in_bf16_are_the_bf16_run(fresh, shards, tmp_path, recompute):
    """To the bit, recomputed or not; one layer less differs."""
    common = dict(max_iters=3, run_name="r", USE_AC_BLOCKS=recompute)
    bf16 = losses(train_here(tmp_path / "a", shards, USE_FP8=False, **common))
    kept = losses(train_here(tmp_path / "b", shards, HIGH_PRECISION_LAYERS="blocks.*,head", **common))
    most = losses(train_here(tmp_path / "c", shards, HIGH_PRECISION_LAYERS="blocks.*.attn.*,blocks.0,head", **common))
    assert (bf16 == kept).all() and (bf16 != most).any()


def test_only_the_other_layers_have_scales(fresh):
    cfg = make_cfg(HIGH_PRECISION_LAYERS="blocks.1")
    model = make_model(cfg)
    train.keep_high_precision(model, cfg.HIGH_PRECISION_LAYERS, te)
    with train.select_precision(cfg, torch.device("cpu")).autocast(one_process()):
        model(*tokens_and_targets(cfg)).backward()
    assert {name.split(".")[1] for name in train.fp8_state(model)} == {"0"}


@pytest.mark.parametrize("flag, field", [("NVFP4_HADAMARD", "disable_rht"), ("NVFP4_2D_WEIGHTS", "disable_2d_quantization"),
                                         ("NVFP4_STOCHASTIC_ROUNDING", "disable_stochastic_rounding")])
def test_nvfp4_switches(fresh, flag, field):
    """Each reaches its field of the recipe, and nothing else does."""
    fields = ("disable_rht", "disable_2d_quantization", "disable_stochastic_rounding")
    cfg = make_cfg(USE_NVFP4=True, n_embd=128, **{flag: False})
    recipe = train.select_precision(cfg, torch.device("cpu")).recipe
    assert [getattr(recipe, f) for f in fields] == [f == field for f in fields]


def test_profile(fresh, shards, tmp_path, capsys):
    """USE_PROFILE leaves a trace in the run folder, prints the largest operators, and changes no loss."""
    plain = losses(train_here(tmp_path, shards, run_name="a", max_iters=5))
    folder = train_here(tmp_path, shards, run_name="b", max_iters=5, USE_PROFILE=True)
    assert (losses(folder) == plain).all()
    assert (folder / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("profile of one step"))
    assert len([line for line in lines[at + 1:at + 11] if " ms " in line]) == 10
