"""alternate.py: variants in turn, against a toy train.py that says how fast it is."""

import json
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from nanofp8 import alternate, race
from nanofp8.alternate import measured, read_variants
from nanofp8.config import UserError

# Writes a step of 100 tokens every 10 ms, and says that it took a second of training
TOY = """
import json, os, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
assert flags["keep_checkpoints"] == flags["eval_interval"] == flags["ckpt_interval"] == "0"
if "broken" in flags:
    sys.exit("train.py: error: --broken")
folder = os.path.join(flags["out_dir"], flags["run_name"])
os.makedirs(folder)
open(os.path.join(folder, "gpu"), "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
with open(os.path.join(folder, "log.jsonl"), "w") as log:
    slow = 0.5 if os.environ.get("CUDA_VISIBLE_DEVICES") == "1" else 1
    for step in range(100000):
        speed = float(flags["speed"]) * (2 if step <= 5 else 1 + 0.1 * (step % 2)) * slow
        record = dict(kind="train", step=step, tokens=int(flags["speed"]) * (step + 1), tok_per_sec=round(speed),
                      peak_mem_gb=3.5)
        log.write(json.dumps(record) + "\\n")
        log.flush()
        time.sleep(0.01)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(**options): alternate toy runs; returns the data that are written."""
    monkeypatch.setattr(alternate, "POLL_SECONDS", 0.02)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(TOY)

    def run(given=("--speed=100",), **options):
        options = dict(warm="10", measure="10", rounds="2") | options
        alternate.run(options, list(given), str(tmp_path / "new"), str(tmp_path / "out"), "bench.py alternate")
        return json.loads((tmp_path / "out.json").read_text())

    run.folder = tmp_path
    return run


def test_variants_in_turn(toy, capsys):
    data = toy(variants=f"base; fast: --speed=200; old: tree={toy.folder}/old")
    base, fast, old = data["variants"]
    assert old["tree"] == str(toy.folder / "old") and base["tree"] == fast["tree"] == str(toy.folder / "new")
    assert all(len(v["medians"]) == 2 and v["peak_gb"] == 3.5 and v["start_seconds"] > 0 for v in data["variants"])
    assert set(base["steps"]) == {100, 110} and set(fast["steps"]) == {200, 220}  # none of the first, which are faster
    printed = capsys.readouterr().out
    order = [line.split(",")[1].split(":")[0].strip() for line in printed.splitlines() if line.startswith("round ")]
    assert order == ["base", "fast", "old"] * 2
    table = (toy.folder / "out.md").read_text()
    assert "| fast |" in table and "2.0" in table and "100 to 110" in table and "10 s after 10 s" in table
    assert (toy.folder / "out.png").stat().st_size > 5000


def test_one_run_on_each_gpu(toy, monkeypatch):
    """The slowest counts: GPU 1 of the toy is half as fast."""
    monkeypatch.setattr(alternate, "visible_gpus", lambda limit: ["0", "1"])
    each, one = toy(variants="alone: each; one", rounds="1")["variants"]
    assert set(each["steps"]) == {50, 55} and set(one["steps"]) == {100, 110}
    places = [path.read_text() for path in toy.folder.glob("out-runs/alone-*/*/run/gpu")]
    assert sorted(places) == ["0", "1"]


def test_a_run_that_fails_is_one_line(toy):
    with pytest.raises(UserError, match="wrong failed.*exit status 1.*--broken"):
        toy(variants="wrong: --broken=1; too: --broken=1", rounds="1")


def test_the_error_line_is_found_above_what_torchrun_prints(tmp_path):
    log = tmp_path / "output.log"
    log.write_text("train.py: error: two lengths\n[rank0] exitcode: 2\n=====\n")
    child = race.Child(SimpleNamespace(label="four"), SimpleNamespace(returncode=1), str(log))
    assert "four failed (exit status 1): train.py: error: two lengths" in race.failure(child)


def test_a_variant_that_fails_does_not_take_the_others_along(toy, capsys):
    with pytest.raises(UserError, match="^wrong failed.*--broken"):
        toy(variants="wrong: --broken=1; base; fast: --speed=200")
    wrong, base, fast = json.loads((toy.folder / "out.json").read_text())["variants"]
    assert len(base["medians"]) == len(fast["medians"]) == 2 and not wrong["medians"] and "--broken" in wrong["failed"]
    table = (toy.folder / "out.md").read_text()
    assert "| fast |" in table and "| wrong |" not in table and "ratio to base" in table
    assert "Left out: wrong failed" in table
    assert capsys.readouterr().out.count("wrong failed") == 2  # when it failed, and below the table


def test_output_that_cannot_be_written_is_one_line(toy):
    (toy.folder / "out-runs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot start base.*--out"):
        toy(variants="base; other")


def test_a_signal_ends_the_runs(toy):
    def interrupt():
        while not list(toy.folder.glob("out-runs/*/*/run/log.jsonl")):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(UserError, match="stopped by a signal") as error:
        toy(variants="base; other", warm="100000")
    assert not (toy.folder / "out.json").exists()
    assert str(toy.folder / "out-runs") in str(error.value)  # what stays is named


def test_what_is_measured(tmp_path):
    def write(steps, speed=100):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(dict(
            kind="train", step=i, tokens=100 * (i + 1), tok_per_sec=speed)) + "\n" for i in range(steps)))

    write(11)
    assert measured(str(tmp_path), 5, 6) is None  # ten seconds: the first step's start is not known
    write(12)
    assert [record["step"] for record in measured(str(tmp_path), 5, 6)] == list(range(6, 12))
    assert measured(str(tmp_path / "missing"), 5, 6) is None


@pytest.mark.parametrize("text, message", [
    ("a: ranks=9", "ranks=9.*2 GPUs"), ("a: ranks=x", "ranks"), ("a: tree=/nowhere", "tree=/nowhere.*train.py"),
    ("a: quick", "quick"), ("a: each ranks=2", "each.*ranks"), ("", "--variants"),
])
def test_wrong_variants_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        read_variants(text, 2, "tree")
    assert error.value.status == 2


@pytest.mark.parametrize("options, given, message", [
    (dict(rounds="0"), [], "--rounds"), (dict(warm="-1"), [], "--warm"), (dict(measure="soon"), [], "--measure.*soon"),
    ({}, ["--run_name=x"], "run_name"), ({}, ["--max_iters=9"], "max_iters.*--measure"),
    (dict(variants="a: --train_tokens=1e6"), [], "train_tokens.*--total_batch_size"),
    (dict(variants="a"), [], "2 variants or more.*--variants"),
])
def test_wrong_options_are_one_line(toy, options, given, message):
    with pytest.raises(UserError, match=message) as error:
        toy(given, **options)
    assert error.value.status == 2
