"""card.py: which rows a card gets, what counts as expected, and that a failed row stops nothing."""

import json
import pathlib
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import train
from helpers import flag_args
from nanofp8 import card
from nanofp8.card import Row, Runner, faults, markdown, plan
from nanofp8.config import UserError
from nanofp8.reports import RunData

MACHINE = dict(device="NVIDIA GeForce RTX 5090", versions=dict(torch="2.11.0"), git_commit="abc", code="1234")


def labels(capability, version="2.20.2"):
    return [row.label for row in plan(capability, version)]


def test_rows_of_each_card():
    """What cards.py expects in hardware, and the case of a reported fault on RTX 50; a CPU emulates all."""
    assert labels((8, 0)) == ["bf16"]
    assert labels((8, 9)) == ["bf16", "FP8 delayed", "FP8 delayed again", "FP8 current"]
    assert labels((9, 0)) == [*labels((8, 9)), "FP8 block"]
    nvfp4 = ["NVFP4", "NVFP4 without Hadamard transform", "NVFP4 without stochastic rounding",
             "NVFP4 without 2-D weights"]
    assert labels((10, 0)) == [*labels((9, 0)), "FP8 mxfp8", *nvfp4] == labels(None)
    assert labels((12, 0)) == ["bf16", "FP8 delayed", "FP8 delayed again", "FP8 delayed recomputed", "FP8 current",
                               "FP8 block", *nvfp4]
    assert labels((12, 0), "2.18.0")[-2:] == ["NVFP4", "NVFP4 without 2-D weights"]
    assert labels((11, 0)) == ["bf16"]
    for size in ({}, dict(preset=card.SMALL_PRESET), dict(batch_size=2)):
        for row in plan((12, 0), "2.20.2"):
            flags = card.FLAGS[True] | size | row.flags
            cfg = train.read_flags([f"--{name}={value}" for name, value in flags.items()], has_gpu=True)
            train.check_flags(cfg, 1)
            assert (cfg.max_iters, cfg.total_batch_size, cfg.skip_grad_zscore) == (60, 32768, 0)


def finished(label="FP8 delayed", losses=(6.0, 5.0), norms=(1.0, 1.2), skipped=(), **config):
    """Return a row with a run of these steps."""
    train_records = [dict(loss=loss, grad_norm=norm, tok_per_sec=1000.0, mfu=None, peak_mem_gb=9.0)
                     | (dict(skipped="gradient") if i in skipped else {})
                     for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))]
    config = dict(precision="bf16" if label == "bf16" else "fp8-delayed", emulated=False, device=MACHINE["device"],
                  batch_size=8, parameters=561e6, max_iters=2, total_batch_size=32768, dataset="shakespeare",
                  seed=1) | config
    return Row(label, {}, "bf16" if label == "bf16" else "fp8-delayed", RunData(config, train_records, [], {}))


@pytest.mark.parametrize("changes, words", [
    (dict(), []), (dict(losses=(6.0, 5.1)), []), (dict(losses=(6.0, 5.6)), ["+5.45%", "2%"]),
    (dict(losses=(6.0, None)), ["inf"]), (dict(norms=(1.0, 6.1)), ["5.08 times", "in step 2"]),
    (dict(norms=(0.0, 1.2)), ["zero"]), (dict(norms=(1.0, None)), ["not finite", "inf times"]),
    (dict(skipped=(1,)), ["1 step(s) skipped"]), (dict(precision="bf16"), ["ran bf16, expected fp8-delayed"]),
    (dict(emulated=True), ["EMULATED", "in hardware"]), (dict(emulated=True, device="CPU (x86_64)"), []),
])
def test_what_is_expected(changes, words):
    found = "; ".join(faults(finished(**changes), finished("bf16")))
    assert bool(found) == bool(words) and all(word in found for word in words), found


def test_the_report_has_all_of_it(tmp_path):
    """Also what failed, and the curves of what did not."""
    rows = [finished("bf16"), finished(norms=(1.0, 90.0)), Row("NVFP4", {}, "nvfp4", failed="NVFP4 failed (killed)")]
    rows[1].notes = ["Warning: FP4 cvt"]
    text = markdown(rows, MACHINE, "the doctor's screen", "1 failed, 39 passed in 60s", "python bench.py card")
    assert "**1 of 3 runs are as expected, but tests of the kernels failed.**" in text
    for word in ("torch 2.11.0", "| NVFP4 | NVFP4 failed (killed) |", "gradient norm up to 75 times bf16's in step 2",
                 "- FP8 delayed: Warning: FP4 cvt", "the doctor's screen", "39 passed", "561.0M parameters", "abc"):
        assert word in text, word
    curves = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert list(curves) == ["bf16", "FP8 delayed"]
    assert curves["FP8 delayed"] == dict(losses=[6.0, 5.0], norms=[1.0, 90.0])
    assert "0 of 1 runs" in markdown(rows[2:], MACHINE, "", "40 passed", "")


def runner(shards, tmp_path, **changes):
    flags = dict(eval_interval=0) | changes
    given = [f for f in flag_args(data_dir=shards, out_dir=tmp_path, **flags)
             if f[2:].split("=")[0] != "batch_size" or "batch_size" in changes]
    return Runner(given, train, SimpleNamespace(requested=None))


def test_a_row_that_fails_and_one_that_is_not_found_again(fresh, shards, tmp_path, monkeypatch):
    """The micro-batch is train.py's choice (batch_size=auto), unless the owner gives it."""
    sizes, answers = [], ["", "rank 0 has too little memory for batch_size=4"]

    def train_once(self, row, job):
        sizes.append((job.cfg.batch_size, "batch_size" in job.cfg.explicit))
        return answers.pop(0)

    monkeypatch.setattr(Runner, "train_once", train_once)
    monkeypatch.setitem(card.FLAGS, False, {})
    row = Row("bf16", dict(USE_FP8=False))
    runner(shards, tmp_path).train(row)
    assert "no finished run is found" in row.failed and row.run is None
    runner(shards, tmp_path, batch_size=4).train(row)
    assert "too little memory" in row.failed and sizes == [(8, False), (4, True)]


def test_wrong_input_is_one_line(fresh, monkeypatch):
    for arguments, word in ((["--rows=FP9"], "FP8 delayed"), (["--n_layers=2"], "--n_layer"),
                            (["--n_head=3"], "n_head=3")):
        with pytest.raises(UserError, match=word) as error:
            bench.main(["card", *arguments])
        assert error.value.status == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="without torchrun"):
        bench.main(["card"])


def test_commands_that_fail_or_hang(fresh, shards, tmp_path):
    checked = runner(shards, tmp_path)
    assert checked.output_of([sys.executable, "-c", "print(1); raise SystemExit(3)"], 60) == "1"
    assert "more than 0.1 seconds" in checked.output_of([sys.executable, "-c", "import time; time.sleep(60)"], 0.1)
    checked.stop.requested = 1.0
    with pytest.raises(UserError, match="stopped by a signal"):
        checked.output_of([sys.executable, "-c", "import time; time.sleep(60)"], 60)


@pytest.mark.slow
def test_a_whole_check(fresh, shards, tmp_path, capsys, monkeypatch):
    """One row fails, the others continue; a second start trains only what failed. One file is written."""
    monkeypatch.setattr(card, "plan", lambda *known: [
        Row("bf16", dict(USE_FP8=False)), Row("broken", dict(HIGH_PRECISION_LAYERS="nothing"), "fp8-current"),
        Row("FP8 current", dict(FP8_RECIPE="current"), "fp8-current")])
    out = tmp_path / "results" / "cpu" / "card"
    flags = [f for f in flag_args(data_dir=shards, out_dir=tmp_path / "out", max_iters=3) if "eval_interval" not in f]
    with pytest.raises(UserError, match="not as expected: broken") as error:
        bench.main(["card", f"--out={out}", *flags])
    assert error.value.status == 1 and [p.name for p in out.parent.iterdir()] == ["card.md"]
    printed, text = capsys.readouterr().out, pathlib.Path(f"{out}.md").read_text()
    assert "broken failed" in printed and "the others continue" in printed and str(out) in printed
    assert "2 of 3 runs are as expected" in text and "'nothing' matches no layer" in text
    assert f"torch              {torch.__version__}" in text and "Training with these flags would start." in text
    assert len(json.loads(text.split("```json\n")[1].split("\n```")[0])["FP8 current"]["losses"]) == 3
    for name in ("doctor", "kernel_tests"):
        monkeypatch.setattr(Runner, name, lambda self: "")
    with pytest.raises(UserError, match="not as expected: broken"):
        bench.main(["card", f"--out={out}", *flags])
    assert capsys.readouterr().out.count("started ") == 1
