"""bench.py: comparison runs, the noise and gaps it reports, and its errors."""

import contextlib
import json
import math
import os
import pathlib
import signal

import pytest
import torch

import bench
import helpers
import train
from helpers import ROOT, finish, flag_args, start, start_torchrun
from nanofp8.config import UserError
from nanofp8.plots import smooth
from nanofp8.reports import NEEDED, RunData, write_report
from nanofp8.runlog import RunLog


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    """Runs draw no loss.png, which takes 0.2 s and which test_training.py looks for."""
    monkeypatch.setattr(RunLog, "plot", lambda self: None)


def small_flags(shards, out_dir, *without):
    """Return the small run's flags, except those that a mode sets itself."""
    own = ("eval_interval", "total_batch_size", "USE_COMPILE", *without)
    return [f for f in flag_args(data_dir=shards, out_dir=out_dir) if f[2:].split("=")[0] not in own]


def study(mode, shards, tmp_path, monkeypatch, *flags):
    """Run a study with the small run's flags; return what it wrote as JSON."""
    monkeypatch.setattr(bench, "STUDY_ON_A_CPU", bench.STUDY_ON_A_CPU | dict(total_batch_size=128, warmup_iters=2))
    given = small_flags(shards, tmp_path, "warmup_iters", "max_iters", "batch_size")
    bench.main([mode, f"--out={tmp_path}/t/r", "--max_iters=6", *given, "--n_embd=128", "--batch_size=4", *flags])
    return json.loads((tmp_path / "t" / "r.json").read_text())


@pytest.mark.slow
def test_precision_study(fresh, shards, tmp_path, capsys, monkeypatch):
    """All formats start from the same weights as bf16, with two seeds. Noise is the gap between the two bf16 runs. A
    second start trains nothing."""
    four = "--max_iters=4"
    result = study("precision", shards, tmp_path, monkeypatch, four)
    rows = {r["label"]: r for r in result["rows"]}
    assert list(rows) == list(bench.MODES["precision"].variants)
    assert [r["precision"] for r in rows.values()] == ["bf16", "fp8-delayed", "fp8-current", "fp8-block", "fp8-mxfp8",
                                                       "nvfp4"]
    assert all(len(r["losses"]["1"]) == len(r["losses"]["2"]) == 4 and math.isfinite(r["val_loss"])
               for r in rows.values())
    first = {seed: {r["losses"][seed][0] for r in rows.values()} for seed in "12"}
    assert all(len(losses) == 1
               for losses in first.values()), "the head starts at zero: the first loss is that of the same tokens"
    smoothed = {seed: smooth(rows["bf16"]["losses"][seed])[2:] for seed in "12"}
    noise = max(abs(a - b) for a, b in zip(smoothed["1"], smoothed["2"], strict=True))
    assert result["noise"] == pytest.approx(noise, abs=1e-4) and noise > 0
    for label, row in rows.items():
        assert row["gaps"] == [] if label == "bf16" else len(row["gaps"]) == 2
        assert row["emulated"] == (label != "bf16") and row["in_bf16"] == ("blocks.1" if label == "NVFP4" else "")
        if label != "bf16":
            assert row["gaps"] == pytest.approx([row["val_losses"][s] - rows["bf16"]["val_losses"][s] for s in "12"])
            assert 0 < row["largest_gap"] < 0.5
            assert all(abs(row["val_in_format"][s] - row["val_losses"][s]) < 0.1 for s in "12")
    text, printed = (tmp_path / "t" / "r.md").read_text(), capsys.readouterr().out
    assert text in printed and f"{result['noise']:.4f}" in text and "python bench.py precision" in text
    assert printed.index("12 runs to train (0 are there)") < printed.index("===== bf16, seed 1 =====")
    assert "GFLOP a token: about" in printed
    assert (tmp_path / "t" / "r.png").read_bytes()[:4] == b"\x89PNG"

    again = study("precision", shards, tmp_path, monkeypatch, four)
    assert "=====" not in capsys.readouterr().out and again["rows"] == result["rows"]
    # other flags: another run
    study("precision", shards, tmp_path, monkeypatch, four, "--formats=bf16", "--learning_rate=0.03")
    assert "2 runs to train (0 are there)" in capsys.readouterr().out


@pytest.mark.slow
def test_ablation(fresh, shards, tmp_path, monkeypatch):
    """Each row lacks one of NVFP4's four ingredients: its flags say so, and its losses differ."""
    result = study("ablation", shards, tmp_path, monkeypatch, "--seeds=2,1", "--max_iters=3")
    rows = {r["label"]: r for r in result["rows"]}
    assert list(rows) == list(bench.MODES["ablation"].variants)
    assert [len(r["seeds"]) for r in rows.values()] == [2] + [1] * 6
    names = ("NVFP4_HADAMARD", "NVFP4_STOCHASTIC_ROUNDING", "NVFP4_2D_WEIGHTS")
    has = {label: [r["config"][n] for n in names] + [r["in_bf16"] != ""] for label, r in rows.items()}
    assert has["NVFP4"] == [True] * 4 and has["none of the four"] == [False] * 4
    for i, label in enumerate(list(rows)[2:6]):
        assert has[label] == [j != i for j in range(4)]
        assert rows[label]["losses"]["1"] != rows["NVFP4"]["losses"]["1"]


@pytest.mark.parametrize("version, left_out", [
    ("2.18.0", ["no Hadamard", "no stochastic rounding"]), ("2.19.0", []), ("2.20.2", [])])
def test_the_ablation_has_no_row_twice_on_an_rtx_50(monkeypatch, capsys, version, left_out):
    """Before 2.19 Transformer Engine lacks two of NVFP4's ingredients there."""
    plan = bench.plan_study("ablation", [], (2, 1), list(bench.MODES["ablation"].variants))
    helpers.fake_transformer_engine(monkeypatch, version, (12, 0))
    procs = helpers.one_process()
    procs.device = helpers.GPU
    kept = bench.drop_repeats(plan, procs)
    assert [key for key in plan if key not in kept] == [(label, 1) for label in left_out]
    printed = capsys.readouterr().out
    assert printed.count("left out: it would repeat NVFP4,") == len(left_out)
    recipes = [str(vars(train.select_precision(cfg, helpers.GPU).recipe)) + cfg.HIGH_PRECISION_LAYERS
               for (label, _), cfg in kept.items() if label != "bf16"]
    assert len(recipes) == len(set(recipes)) == 6 - len(left_out)


def test_rows_named_fp8_ask_for_it(fresh):
    """Otherwise an A100 would train them in bf16."""
    for mode in bench.MODES.values():
        for label, variant in mode.variants.items():
            if label.startswith(("FP8", "MXFP8")):
                assert {"USE_FP8", "FP8_RECIPE"} & {*variant.flags}, label


@pytest.mark.slow
def test_emulation_compares_speeds(fresh, shards, tmp_path):
    """The picked rows are trained in the mode's own order, and the table has the ratio to bf16."""
    bench.main(["emulation", f"--out={tmp_path}/r", "--rows=NVFP4; bf16;FP8 current", "--max_iters=3",
                "--warmup_iters=1", "--total_batch_size=256",
                *small_flags(shards, tmp_path, "warmup_iters", "max_iters", "batch_size", "eval_tokens"),
                "--n_embd=128", "--batch_size=4"])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [r["precision"] for r in rows] == ["bf16", "fp8-current", "nvfp4"]
    assert all(r["tok_per_sec"] > 0 for r in rows) and "| NVFP4 |" in (tmp_path / "r.md").read_text()


# bench.py, whose runs draw no pictures and collect no garbage
BENCH = """
import runpy, sys
sys.path[:0] = [{root!r}, {tests!r}]
import helpers
from nanofp8.runlog import RunLog
RunLog.plot = lambda self: None
helpers.skip_full_collections()
runpy.run_path({root!r} + "/bench.py", run_name="__main__")
"""


@pytest.mark.slow
def test_speed_with_two_ranks(shards, tmp_path):
    """Every row of `speed` runs under torchrun, including the wrappers and train_orig.py."""
    flags = small_flags(shards, tmp_path, "warmup_iters", "max_iters", "eval_tokens")
    (tmp_path / "bench.py").write_text(BENCH.format(root=str(ROOT), tests=str(ROOT / "tests")))
    result = finish(start_torchrun(2, tmp_path / "bench.py", "speed", f"--out={tmp_path}/r", "--max_iters=2",
                                   "--warmup_iters=1", "--total_batch_size=1024", *flags, "--n_embd=128",
                                   "--batch_size=4", cwd=tmp_path))
    assert result.code == 0, result.err[-2000:]
    rows = {r["label"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert list(rows) == list(bench.MODES["speed"].variants), result.out[-2000:]
    assert rows["FP8 delayed, FSDP2"]["wrapper"] == "fsdp2" and rows["FP8 delayed, DDP"]["wrapper"] == "ddp"
    assert rows["FP8 delayed, vocab 50,304"]["vocab_size"] == 50304
    quarters = [rows[f"{name}, vocab 50,304, a quarter of the batch"] for name in ("FP8 delayed", "bf16")]
    assert all((r["total_batch_size"], r["vocab_size"]) == (256, 50304) for r in quarters)
    assert rows["FP8 delayed, half the micro-batch"]["batch_size"] == 2
    assert all(r["gpus"] == 2 and r["compile_seconds"] > 0 for r in rows.values())


@pytest.mark.slow
def test_what_is_left_out_and_what_ends_all(fresh, shards, tmp_path, monkeypatch, capsys):
    """A run with too little memory is left out. A signal ends the study with one line, and the next start continues
    after the finished runs."""
    trained, real = [], train.run

    def run(cfg, procs):
        trained.append(cfg.run_name)
        if "current" in cfg.run_name and trained.count(cfg.run_name) == 1:
            raise torch.OutOfMemoryError("none left")
        stopper = helpers.before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with stopper if "block" in cfg.run_name else contextlib.nullcontext():
            return real(cfg, procs)

    monkeypatch.setattr(train, "run", run)
    flags = ["--seeds=1", "--formats=bf16,FP8 current,FP8 block"]
    with pytest.raises(UserError, match="stopped by a signal in FP8 block, seed 1"):
        study("precision", shards, tmp_path, monkeypatch, *flags)
    assert "FP8 current, seed 1 left out" in capsys.readouterr().out
    result = study("precision", shards, tmp_path, monkeypatch, "--seeds=1", "--formats=bf16,FP8 current")
    assert [r["label"] for r in result["rows"]] == ["bf16", "FP8 current"]
    (tmp_path / "t" / "r.png").unlink()
    # a part, for another start to finish
    (row,) = study("precision", shards, tmp_path, monkeypatch, "--seeds=1", "--formats=FP8 current")["rows"]
    assert row["gaps"] == [] and row["largest_gap"] is None and (tmp_path / "t" / "r.png").exists()
    assert [name.split("-")[1] for name in trained] == ["bf16", "fp8", "fp8", "fp8"]  # each once, but for what failed


@pytest.mark.parametrize("arguments, text", [
    (["speed", "--log_interval=2"], "--log_interval"), (["nonsense"], "'nonsense'.*speed, precision"),
    (["report"], "run folders"), (["report", "/no/such/run"], "/no/such/run"),
    (["report", "/a/gpt", "/b/gpt"], "same name.*LABEL=FOLDER"), (["precision", "--seeds=²"], "--seeds"),
    (["precision", "--bath_size=3"], "--batch_size"), (["precision", "--seeds=0"], "--seeds"),
    (["ablation", "--seeds=1,2,3"], "--seeds"),
    (["precision", "--formats=FP9"], "FP8 delayed"),
    (["speed", "--rows=bf16; FP9"], "--rows: speed has FP8 delayed; .*, not 'FP9'"),
    (["ablation", "--total_batch_size=100"], "total_batch_size=100"),
    (["speed", "--train_tokens=8192"], "--max_iters.*--train_tokens"),
    (["profile", "--train_tokens=8192"], "--max_iters.*--train_tokens"),
    (["profile", "--rows=x"], "--rows"), (["report", "a", "--rows=x"], "run folders"),
    (["speed", "--out=/dev/null/x"], "/dev/null/x.*another --out"), (["race", "--out=/dev/null/x"], "another --out"),
    (["report", "a", f"--out={'x' * 300}"], "too long.*another --out"),
    (["card", "--log_interval=5"], "--log_interval"),
])
def test_wrong_input_is_one_line(fresh, arguments, text):
    with pytest.raises(UserError, match=text) as error:
        bench.main(arguments)
    assert error.value.status == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["race", "--help"], ["speed", "--rows=bf16", "-h"]])
def test_help(arguments, capsys):
    bench.main(arguments)
    out = capsys.readouterr().out
    assert all(f"bench.py {mode}" in out for mode in ("speed", "race", "alternate", "card", "profile", "report"))


@pytest.mark.slow
def test_a_table_that_cannot_be_written_is_printed(tmp_path, capsys):
    """Measuring again would take as long as the first time."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x.*--out"):
        write_report(str(tmp_path / "file" / "x"), "bench.py", {}, "the table", lambda path: None)
    assert "the table" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", '{"seed": 1}', "{", "null"])
def test_a_damaged_run_folder_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not a run folder of train.py") as error:
        bench.main(["report", str(tmp_path)])
    assert error.value.status == 2 and "\n" not in str(error.value)


def test_a_run_without_every_steps_record_is_refused(tmp_path):
    config = dict.fromkeys(NEEDED, 1) | dict(log_interval=5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(kind="train", step=4, loss=1.0)) + "\n")
    with pytest.raises(UserError, match="every 5 steps.*log_interval=5.*leave it out") as error:
        bench.main(["report", str(tmp_path), f"--out={tmp_path / 'r'}"])
    assert error.value.status == 2


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    out = str(tmp_path / "r")
    write_report(out, "bench.py", dict(a=1), "old", lambda path: None)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(out, "bench.py", dict(a=2), "new", lambda path: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]
    assert '"a": 1' in (tmp_path / "r.json").read_text() and (tmp_path / "r.md").read_text() == "old"


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    write_report(str(tmp_path / "r"), "bench.py report caf\udce9", {}, "caf\udce9", lambda path: None)
    assert (tmp_path / "r.md").read_text() == r"caf\udce9"


def test_the_table_tells_how_the_batch_grows_and_counts_from_the_warm_up_on():
    config = dict(total_batch_size=1024, batch_ramp="0.25,0.6", max_iters=100, warmup_ratio=0.1, warmup_iters=90)
    assert bench.batch_text(config).startswith("256 tokens a step, 512 from step ")
    assert bench.batch_text(config | dict(batch_ramp="")) == "1,024 tokens a step"
    run = RunData(config | dict(batch_ramp=""), [dict(step=i) for i in range(100)], [], None)
    assert run.warmup == 10 and len(run.timed) == 90
    assert RunData(config | dict(warmup_ratio=0.0), run.train, [], None).warmup == 90


def test_command_line(tmp_path):
    result = finish(start(ROOT / "bench.py", "report", "nowhere", cwd=tmp_path))
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert result.err.startswith("bench.py: error: nowhere")


@pytest.mark.parametrize("given, written", [
    ("~/tables/mine", "home/tables/mine"), ("~", "home/report"), ("~/", "home/report"), ("new/", "new/report"),
    (".", "report"), ("new/mine", "new/mine"),
])
def test_where_a_report_goes(tmp_path, monkeypatch, given, written):
    """No shell expands --out=~/x; a path that ends in a slash is a folder, not the start of a hidden file's name."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "read_run", lambda folder: RunData(dict(seed=1), [dict(step=0)], [], None))
    monkeypatch.setattr(bench, "report", lambda runs, out, command: write_report(out, command, {}, "table", print))
    bench.main(["report", f"--out={given}", "run"])
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"{written}.json", f"{written}.md"]
