"""train_orig.py: its model against torch's own layers, learning, its log, ranks, accumulation, flags, errors."""

import ast
import json
import math
import os
import pathlib
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import helpers
import train
import train_orig
from nanofp8.config import script_flags
from nanofp8.schedule import lr_factor

SCRIPT = str(helpers.ROOT / "train_orig.py")
SMALL = dict(
    preset="tiny", dataset="synthetic", vocab_size=512, n_layer=2, n_embd=64, n_head=2, block_size=32, batch_size=8,
    total_batch_size=256, max_iters=4, warmup_iters=2, learning_rate=3e-3, eval_interval=0, eval_tokens=640,
    USE_COMPILE=False,
)


def flag_args(**changes):
    return [f"--{name}={value}" for name, value in (SMALL | changes).items()]


def make_cfg(**changes):
    return train_orig.read_flags(flag_args(**changes), has_gpu=False)


def run_here(out_dir, data_dir, **changes):
    """Train a whole run in this process and return its run folder. Needs the fixture `fresh`."""
    return pathlib.Path(train_orig.main(flag_args(out_dir=out_dir, data_dir=data_dir, **changes)))


def test_model_is_gpt2_of_torchs_own_layers():
    """The loss equals that of nn.TransformerEncoderLayer with norm_first, which is GPT-2's block."""
    cfg = make_cfg()
    torch.manual_seed(0)
    model = train_orig.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and gains too
    x = torch.randint(cfg.vocab_size, (3, cfg.block_size), dtype=torch.int32)
    y = torch.randint(cfg.vocab_size, (3, cfg.block_size))
    y[1, 5:] = -1

    h = F.embedding(x, model.wte.weight) + model.wpe.weight
    mask = nn.Transformer.generate_square_subsequent_mask(cfg.block_size)
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(cfg.n_embd, cfg.n_head, 4 * cfg.n_embd, dropout=0.0, batch_first=True,
                                           norm_first=True, activation=lambda z: F.gelu(z, approximate="tanh"))
        attention = {"in_proj_": block.attn.qkv, "out_proj.": block.attn.proj}
        state = {f"self_attn.{name}{kind}": getattr(part, kind) for name,
                 part in attention.items() for kind in ("weight", "bias")}
        for name, part in dict(linear1=block.mlp.fc, linear2=block.mlp.proj, norm1=block.ln_1,
                               norm2=block.ln_2).items():
            state |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
        layer.load_state_dict(state)
        h = layer(h, src_mask=mask)
    logits = F.layer_norm(h, (cfg.n_embd,), model.ln_f.weight, model.ln_f.bias) @ model.wte.weight.t()
    chosen = torch.log_softmax(logits, -1).gather(2, y.clamp(min=0)[..., None])[..., 0]
    expected = -(chosen * (y >= 0)).sum()
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-3)


def test_initialisation_and_optimizer_groups():
    cfg = make_cfg(n_layer=8, n_embd=128)
    torch.manual_seed(0)
    model = train_orig.GPT(cfg)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (p == float("ln_" in name and name.endswith("weight"))).all(), name
    decayed, kept = train_orig.make_optimizer(model, cfg).param_groups
    assert decayed["weight_decay"] == cfg.weight_decay and all(p.ndim == 2 for p in decayed["params"])
    assert kept["weight_decay"] == 0 and all(p.ndim == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_run_learns_and_keeps_the_log_contract(tmp_path, shards, fresh, capsys):
    folder = run_here(tmp_path, shards, max_iters=30, eval_interval=10)
    rows, vals, (done,) = (helpers.records(folder, kind) for kind in ("train", "val", "done"))
    assert list(rows[0]) == ["kind", "step", "tokens", "loss", "grad_norm", "lr_muon", "lr_embed", "lr_head",
                             "momentum",
                             "step_ms", "tok_per_sec", "mfu", "peak_mem_gb"]
    assert list(vals[0]) == ["kind", "step", "tokens", "val_loss", "train_seconds"]
    assert list(done) == ["kind", "step", "tokens", "val_loss", "train_seconds", "tok_per_sec_median", "peak_mem_gb",
                          "compile_seconds"]
    assert [r["step"] for r in rows] == list(range(30)) and [r["step"] for r in vals] == [9, 19, 29]
    assert [r["tokens"] for r in rows] == [256 * (i + 1) for i in range(30)]
    loss = helpers.losses(folder)
    assert loss[0] == pytest.approx(math.log(512), abs=0.1) and loss[-5:].mean() < loss[0] - 1
    assert vals[-1]["val_loss"] < vals[0]["val_loss"] and done["val_loss"] == vals[-1]["val_loss"]
    assert done["train_seconds"] == pytest.approx(sum(r["step_ms"] for r in rows) / 1000)
    for r in rows:  # one rate for all parameters, and no Muon
        assert r["lr_muon"] is None and r["momentum"] is None and r["mfu"] is None
        assert r["lr_embed"] == r["lr_head"] == pytest.approx(3e-3 * lr_factor(r["step"], 2, 30, 0.1))
    config = json.loads((folder / "config.json").read_text())
    assert set(script_flags(SCRIPT)) <= set(config) and config["precision"] == "fp32" and config["world_size"] == 1
    out = capsys.readouterr().out
    assert re.search(r"^step  1/30 \| loss +[\d.]+ \| norm [\d.e+-]+ \| lr [\d.e-]+ \| +[\d.]+ ms \| [\d,]+ tok/s \| ",
                     out, re.M)
    assert re.search(r"^step 30/30 \| val loss [\d.]+ over 640 tokens \| ", out, re.M) and "\ndone: val loss " in out


@pytest.mark.slow
def test_two_ranks_train_and_evaluate_like_one(tmp_path, shards, fresh):
    """Two ranks with two micro-batches each against one rank with one: losses, gradient norms and val loss.

    eval_tokens=640 are 20 sequences. One rank evaluates 8 in a pass, so that its last pass is not full; two ranks 4.
    """
    changes = dict(data_dir=shards, eval_interval=2)
    process = helpers.start_torchrun(2, SCRIPT, *flag_args(**changes, batch_size=2), f"--out_dir={tmp_path / 'two'}",
                                     cwd=tmp_path)
    one = run_here(tmp_path / "one", **changes)
    result = helpers.finish(process)
    assert result.code == 0, result.err
    two = tmp_path / "two" / "gpt2"
    np.testing.assert_allclose(helpers.losses(two), helpers.losses(one), rtol=2e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in helpers.records(two, "train")],
                               [r["grad_norm"] for r in helpers.records(one, "train")], rtol=1e-3)
    np.testing.assert_allclose(helpers.val_losses(two), helpers.val_losses(one), rtol=2e-5)
    assert json.loads((two / "config.json").read_text())["wrapper"] == "ddp"
    assert result.out.count("done: val loss") == 1  # one rank writes


def test_accumulation_equals_a_larger_batch(tmp_path, shards, fresh):
    whole = run_here(tmp_path, shards)
    parts = run_here(tmp_path, shards, batch_size=2)  # four micro-batches
    assert parts.name == "gpt2-2"
    np.testing.assert_allclose(helpers.losses(parts), helpers.losses(whole), rtol=2e-5)
    np.testing.assert_allclose(helpers.val_losses(parts), helpers.val_losses(whole), rtol=2e-5)


def test_released_flags_and_presets_agree():
    table = {name: flag.default for name, flag in script_flags(SCRIPT).items()}
    assert all(flag.comment for flag in script_flags(SCRIPT).values())
    assert train_orig.PRESETS["d20"].items() <= table.items()
    for preset in train_orig.PRESETS.values():
        assert set(preset) <= set(table)
    # A flag that some preset changes must be in d20, or an edit of it could not be told
    tree = ast.parse(pathlib.Path(SCRIPT).read_text(encoding="utf-8"))
    assigned = {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets
                if isinstance(t, ast.Name)}
    assert assigned == {"PRESETS"}
    assert set(train_orig.PRESETS["tiny"]) | set(train_orig.PRESETS["d12"]) <= set(train_orig.PRESETS["d20"])
    shared = {"n_layer", "n_embd", "n_head", "block_size", "total_batch_size", "max_iters", "warmup_iters",
              "eval_interval",
              "eval_tokens", "dataset"}  # what a comparison needs alike
    for name, other in (("d20", "classic"), ("tiny", "tiny")):
        for flag in shared & set(train.PRESETS[other]):
            assert train_orig.PRESETS[name][flag] == train.PRESETS[other][flag], (name, flag)
    gpu, cpu = train_orig.read_flags([], has_gpu=True), train_orig.read_flags([], has_gpu=False)
    assert gpu.preset == "d20" and cpu.preset == "tiny" and cpu.dataset == "shakespeare"


@pytest.mark.parametrize("changes, status, words", [
    (dict(batch_size=3), 2, ["--total_batch_size=288"]),
    (dict(n_head=3), 2, ["n_head=3"]),
    (dict(max_iter=3), 2, ["unknown flag --max_iter;", "--max_iters"]),
    (dict(learning_rate="fast"), 2, ["--learning_rate", "number", "'fast'"]),
    (dict(preset="d30"), 2, ["auto, d20, d12, tiny"]),
    (dict(dataset="nowhere"), 1, ["no train shards", "nowhere"]),
    (dict(vocab_size=100), 1, ["vocab_size is 100"]),
    (dict(learning_rate=1e30), 1, ["the loss at step", "learning rate"]),
])
def test_wrong_input_is_one_line(tmp_path, shards, fresh, capsys, changes, status, words):
    with pytest.raises(SystemExit) as exit:
        run_here(tmp_path, shards, **changes)
    err = capsys.readouterr().err
    assert exit.value.code == status and err.startswith("train_orig.py: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.slow
def test_script_reports_a_bad_flag_without_traceback(tmp_path):
    """In a process of its own, where only main() handles the error."""
    result = helpers.finish(helpers.start(SCRIPT, "--bath_size=3", cwd=tmp_path))
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1, result.err
    assert result.err.startswith("train_orig.py: error: ") and "--bath_size" in result.err
    assert "--batch_size" in result.err
    assert not os.listdir(tmp_path)
