"""bench.py: comparison runs, the noise and gaps it reports, and its errors."""

import json
import math

import pytest

import bench
import train
from helpers import finish, flag_args, start, start_torchrun, ROOT


def small_flags(shards, out_dir, *without):
    """The small run's flags, but for those that a mode sets itself."""
    own = ("eval_interval", "total_batch_size", "USE_COMPILE", *without)
    return [f for f in flag_args(data_dir=shards, out_dir=out_dir) if f[2:].split("=")[0] not in own]


def test_precision_writes_table_plot_and_noise(fresh, shards, tmp_path, capsys, monkeypatch):
    """Five runs in one process: noise is the gap of the two bf16 seeds; the emulated FP8 runs really differ from bf16."""
    monkeypatch.setitem(bench.COMMON, "precision", ["--total_batch_size=256", "--warmup_iters=2", "--eval_interval=0", "--keep_checkpoints=0"])
    flags = small_flags(shards, tmp_path, "warmup_iters", "max_iters")
    bench.main(["precision", f"--out={tmp_path}/t/r", "--max_iters=6", *flags, "--n_embd=128"])
    result = json.loads((tmp_path / "t" / "r.json").read_text())
    rows = {r["label"]: r for r in result["runs"]}
    assert list(rows) == list(bench.VARIANTS["precision"])
    assert [r["precision"] for r in rows.values()] == ["bf16", "bf16", "fp8-delayed", "fp8-current", "fp8-block"]
    assert all(len(r["losses"]) == 6 and r["tok_per_sec"] > 0 and math.isfinite(r["val_loss"]) for r in rows.values())
    assert result["noise"] == rows["bf16 seed 2"]["gap"] > 0
    assert rows["FP8 delayed"]["gap"] > 0 and rows["bf16 seed 1"]["gap"] is None
    text = (tmp_path / "t" / "r.md").read_text()
    assert text in capsys.readouterr().out and f"{result['noise']:.4f}" in text and "python bench.py precision" in text
    assert (tmp_path / "t" / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_speed_with_two_ranks(shards, tmp_path):
    """Every variant of `speed` runs under torchrun, the wrappers and train_orig.py among them; the ratio is to the first."""
    flags = small_flags(shards, tmp_path, "warmup_iters", "max_iters", "eval_tokens")
    result = finish(start_torchrun(2, ROOT / "bench.py", "speed", f"--out={tmp_path}/r", "--max_iters=3", "--warmup_iters=1",
                                   "--total_batch_size=1024", *flags, "--n_embd=128", "--batch_size=4", cwd=tmp_path))
    assert result.code == 0, result.err[-2000:]
    rows = {r["label"]: r for r in json.loads((tmp_path / "r.json").read_text())["runs"]}
    assert list(rows) == [label for label in bench.VARIANTS["speed"]], result.out[-2000:]
    assert rows["FP8 delayed, FSDP2"]["wrapper"] == "fsdp2" and rows["FP8 delayed, DDP"]["wrapper"] == "ddp"
    assert rows["FP8 delayed, vocab 50,304"]["vocab_size"] == 50304
    assert rows["FP8 delayed, a quarter of the batch"]["total_batch_size"] == 256
    assert rows["FP8 delayed, half the micro-batch"]["batch_size"] == 2
    assert all(r["gpus"] == 2 and r["compile_seconds"] > 0 for r in rows.values())


@pytest.mark.parametrize("arguments, text", [
    (["nonsense"], "not 'nonsense'"), (["report"], "run folders"), (["report", "/no/such/run"], "/no/such/run"),
    (["precision", "--bath_size=3"], "--batch_size"),
])
def test_wrong_input_is_one_line(fresh, arguments, text):
    with pytest.raises(train.UserError, match=text) as error:
        bench.main(arguments)
    assert error.value.status == 2 and "\n" not in str(error.value)


def test_command_line(tmp_path):
    result = finish(start(ROOT / "bench.py", "report", "nowhere", cwd=tmp_path))
    assert result.code == 2 and result.err.count("\n") == 1 and result.err.startswith("bench.py: error: nowhere"), result.err
