"""breakdown.py: labels of what a step launches, and the table of a small run."""

import json
import math

import pytest
import torch

import bench
from helpers import flag_args
from nanofp8 import fused, loss
from nanofp8.breakdown import PREFIX, Labels, collect
from nanofp8.config import UserError
from nanofp8.fused import Fp8


def profiled(work):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return profile


def test_labels_of_matmuls_and_their_flops():
    labels, one = Labels(), torch.ones(1)
    a, b = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    fp8 = [Fp8(x.to(dtype), one) for x, dtype in ((a, torch.float8_e5m2), (b, torch.float8_e4m3fn))]
    before = fused.matmul
    with labels.applied():
        assert loss.matmul is fused.matmul is not before
        fused.matmul(a, b)
        fused.matmul(*fp8)
        loss.matmul(*fp8, out=torch.zeros(6, 4))
    assert loss.matmul is fused.matmul is before
    assert labels.flops == {f"matmul 6 x 4, sums of 8, {name}": 2 * 6 * 4 * 8
                            for name in ("bf16", "E5M2 x E4M3", "E5M2 x E4M3, added to fp32")}


def test_a_label_within_another_does_not_count_twice():
    labels, x = Labels(), torch.randn(300, 300)
    inner = labels.named(lambda: x @ x, "inner")
    outer = labels.named(lambda: (inner(), inner()), "outer")
    profile = profiled(lambda: (outer(), inner(), x.exp()))
    found = collect(profile, False, {"inner": 2 * 300 ** 3})
    rows = {row["label"]: row for row in found["rows"]}
    assert set(rows) == {"inner", "outer", "everything else"} and rows["inner"]["calls"] == rows["outer"]["calls"] == 1
    assert rows["inner"]["flops"] == 2 * 300 ** 3 and rows["outer"]["flops"] == 0
    assert found["rows"] == sorted(found["rows"], key=lambda row: -row["ms"])
    assert not any(key.startswith(PREFIX) for key in rows)


def test_profile_of_a_small_run(fresh, shards, tmp_path, capsys):
    without = ("eval_interval", "max_iters")
    given = [f for f in flag_args(data_dir=shards, out_dir=tmp_path) if f[2:].split("=")[0] not in without]
    bench.main(["profile", f"--out={tmp_path}/p", *given])
    found = json.loads((tmp_path / "p.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert {"cross-entropy", "attention, forward", "attention, backward", "optimizers", "everything else"} <= set(rows)
    matmuls = [row for row in found["rows"] if row["flops"]]
    assert matmuls and all(row["label"].startswith("matmul") and row["calls"] > 0 for row in matmuls)
    assert all(math.isfinite(row["ms"]) and row["ms"] >= 0 for row in found["rows"]) and found["step_ms"] > 0
    assert sum(row["ms"] for row in found["rows"]) == pytest.approx(found["total"], rel=0.2)
    text = (tmp_path / "p.md").read_text()
    assert text in capsys.readouterr().out and "TFLOP/s" in text and "bench.py profile" in text
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_too_few_steps(fresh):
    with pytest.raises(UserError, match="--max_iters=5"):
        bench.main(["profile", "--max_iters=4", "--preset=tiny"])
