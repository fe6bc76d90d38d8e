"""race.py and race_report.py: planning, child processes, noise, fits, the table and the picture."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import bench
import train
from helpers import ROOT, check_it_ends, edited_copy, flag_args
from nanofp8 import race, race_report
from nanofp8.config import UserError, flag_values
from nanofp8.race_report import Race, amount, fit, markdown, name_of, plot, reach, round_ticks, summarize, worth
from nanofp8.reports import RunData
from nanofp8.sizes import BatchPlan

LOSS_AT_1, SLOPE = 10.0, -0.4  # val loss of the first variant: LOSS_AT_1 + SLOPE x ln(tokens)


def make_race(variants="base; other: --learning_rate=0.03", lengths=(60e6, 100e6), unit="tokens", seeds=2, target=None,
              gpus=(None,)):
    """Return a Race with few words."""
    return Race(race.parse_variants(variants), sorted(lengths), unit, list(range(1337, 1337 + seeds)), list(gpus),
                target)


def make_run(tokens, val_loss, minutes=5.0, steps=80, speed=2000.0, **config):
    """Return the data of a finished run. Its first 60 steps are said to be twice as fast as `speed`."""
    records = [dict(kind="train", step=i, tokens=tokens * (i + 1) // steps, loss=val_loss + 3 / (i + 1),
                    tok_per_sec=speed * (2 if i < 60 else 1), peak_mem_gb=29.5) for i in range(steps)]
    config = dict(
        device="a toy", versions=dict(torch="2.11.0"), max_iters=steps, total_batch_size=tokens // steps,
        parameters=561_000_000, warmup_iters=2, dataset="fineweb10B", eval_tokens=1 << 20, world_size=1,
        block_size=2048) | config
    done = dict(tokens=tokens, train_seconds=60 * minutes, val_losses=dict(bf16=val_loss))
    return RunData(config, records, [dict(val_loss=val_loss)], done)


def make_runs(contest, better=dict(other=-0.02), spread=0.001, pace=dict(other=1.1)):  # noqa: B006
    """Return runs on the line LOSS_AT_1 + SLOPE x ln(tokens). Seeds lie `spread` above and below it in turn.

    better: what is added to a variant's losses. pace: factor on its minutes; the first takes 5 for 60M tokens.
    """
    runs = {}
    for name in contest.variants:
        for length in contest.lengths:
            for i, seed in enumerate(contest.seeds):
                loss = LOSS_AT_1 + SLOPE * math.log(length) + better.get(name, 0) + spread * (-1) ** i
                runs[name, length, seed] = make_run(int(length), loss, 5 * length / 60e6 * pace.get(name, 1))
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Options and planning


def test_variants_are_read():
    assert race.parse_variants("base; normuon: --muon_variant=normuon ;small batch:--a=1 --b='x y'") == {
        "base": [], "normuon": ["--muon_variant=normuon"], "small batch": ["--a=1", "--b=x y"]}
    assert race.parse_variants("ratio: --dataset=a:b;") == {"ratio": ["--dataset=a:b"]}


def test_defaults_run_at_once(fresh):
    contest = race.read_options({})
    assert len(contest.variants) == 2 and contest.unit == "tokens" and len(contest.lengths) == 2
    assert contest.seeds == [1337, 1338] and contest.gpus == [None] and contest.target is None
    jobs = race.Planner(contest, [], train).by_length()
    assert len(jobs) == 8 and all(job.cfg.preset == "tiny" for job in jobs)
    assert {job.cfg.lr_schedule for job in jobs} == {"cosine", "linear"}
    on_a_gpu = [train.read_flags(flags, has_gpu=True) for flags in race.parse_variants(race.DEFAULTS[True][0]).values()]
    assert [cfg.preset for cfg in on_a_gpu] == ["classic", "d20"]


def test_options_are_read(fresh):
    contest = race.read_options(dict(variants="a", minutes="5,3", seeds="3", target="3.5885"))
    assert contest == Race({"a": []}, [3.0, 5.0], "minutes", [1337, 1338, 1339], [None], 3.5885)


@pytest.mark.parametrize("visible, limit, gpus", [
    (None, None, ["0", "1", "2"]), ("4,6,GPU-7", None, ["4", "6", "GPU-7"]), ("4,6,7", 2, ["4", "6"])])
def test_each_child_gets_one_of_the_visible_gpus(monkeypatch, visible, limit, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert race.visible_gpus(limit) == gpus
    with pytest.raises(UserError, match="--gpus=4, but only 3"):
        race.visible_gpus(4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i % 2}")
    with pytest.raises(UserError, match="card 0, card 1"):
        race.visible_gpus(None)


@pytest.mark.parametrize("arguments, text", [
    (["--variants=a: 3"], "variant 'a': unknown argument '3'"), (["--variants=a --seed=3"], "'name: --flag=value"),
    (["--variants=: --seed=3"], "'name: --flag=value"), (["--variants=;"], "names none"),
    (["--variants=a;A"], "rename one"), (["--variants=a: --b='"], "'a'.*quotes"),
    (["--variants=a;b: --bath_size=3"], "variant 'b': .*--batch_size"),
    (["--bath_size=3"], "^unknown flag --bath_size"), (["--variants=a: --max_iters=3"], "variant 'a': .*--tokens"),
    (["--seed=1"], "--seeds"), (["--resume=auto"], "resume"), (["--log_interval=5"], "--log_interval"),
    (["--n_head=3"], "variant 'cosine': .*n_head"), (["--n_value_embed=9"], "variant 'cosine': .*n_value_embed"),
    (["--tokens=many"], "--tokens.*60e6.*'many'"), (["--tokens=0"], "--tokens"), (["--tokens=60e6,60e6"], "twice"),
    (["--minutes=-3"], "--minutes"), (["--tokens=1e6", "--minutes=3"], "only one"),
    (["--tokens=100"], "variant 'cosine': 0.1k tokens is less than one step of 2,048"),
    (["--tokens=40960,40961"], "both 20 step.*farther apart"),
    (["--seeds=0"], "--seeds"), (["--seeds=2,1"], "--seeds"), (["--gpus=all"], "--gpus"),
    (["--gpus=2"], "--gpus=2, but"),
    (["--target=low"], "--target"), (["--eval_tokens=1"], "--eval_tokens"),
])
def test_wrong_input_is_one_line_before_anything_is_trained(fresh, monkeypatch, arguments, text):
    monkeypatch.setattr(race, "train_jobs", None)
    with pytest.raises(UserError, match=text) as error:
        bench.main(["race", *arguments])
    assert error.value.status == 2 and "\n" not in str(error.value)


def test_torchrun_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="without torchrun"):
        bench.main(["race"])


def fake_script(tmp_path):
    """Return a script whose batch follows from the length: 100 tokens a step for up to 5,000 tokens, else 200."""
    path = tmp_path / "fake.py"
    path.write_text("# Flags\ntrain_tokens: int = 10000  # length\n# End of flags\n")

    def read_flags(argv):
        given = {name: int(value) for name, value in (a[2:].split("=") for a in argv) if value.isdigit()}
        tokens = given.get("train_tokens", 10000)
        batch = given.get("total_batch_size", 100 if tokens <= 5000 else 200)
        return SimpleNamespace(total_batch_size=batch, max_iters=given.get("max_iters", round(tokens / batch)),
                               eval_tokens=1000, block_size=10, n_layer=1, n_value_embed=0, batch_ramp="")

    return SimpleNamespace(__file__=str(path), read_flags=read_flags, check_flags=lambda cfg, ranks: None,
                           open_data=lambda cfg, procs: (SimpleNamespace(close=lambda: None), None))


def test_a_length_becomes_steps_of_the_variants_own_batch(fresh):
    contest = make_race("base; big: --total_batch_size=4096", lengths=(61e3, 123e3))
    jobs = race.Planner(contest, ["--preset=tiny", "--eval_interval=7"], train).by_length()
    steps = {job.key: job.cfg.max_iters for job in jobs}
    assert steps == {(v, n, s): round(n / b) for v, b in (("base", 2048), ("big", 4096)) for n in (61e3, 123e3)
                     for s in (1337, 1338)}
    assert [job.tokens for job in jobs] == sorted((job.tokens for job in jobs), reverse=True)
    cfg = jobs[0].cfg
    assert (cfg.keep_checkpoints, cfg.eval_interval) == (0, 7), "the user's flag beats the race's"
    assert len({job.cfg.run_name for job in jobs}) == 8 and {job.cfg.seed for job in jobs} == {1337, 1338}


def test_a_batch_that_follows_from_the_length_where_the_preset_counts_steps(fresh):
    given = ["--preset=tiny", "--total_batch_size=auto"]
    (job,) = race.Planner(make_race("base", (50e3,), seeds=1), given, train).by_length()
    assert (job.cfg.total_batch_size, job.cfg.max_iters) == (4096, 12)
    trained = []

    def speeds(jobs):
        trained.extend(jobs)
        return {job.key: SimpleNamespace(config={}, train=[dict(tok_per_sec=1000)] * 40) for job in jobs}

    (job,) = race.Planner(make_race("base", (1,), "minutes", seeds=1), given, train).by_time(speeds)
    assert [probe.cfg.total_batch_size for probe in trained] == [4096]
    assert (job.cfg.total_batch_size, job.cfg.max_iters) == (4096, 15)


def test_edited_flags_of_train_py(tmp_path, fresh):
    """A race needs every step's record, and sets the length itself."""
    module, _ = edited_copy(tmp_path, log_interval="10", train_tokens="100_000", preset='"tiny"')
    planner = race.Planner(make_race("base", (1,), "minutes", seeds=1), [f"--data_dir={ROOT / 'data'}"], module)
    jobs = []
    planner.by_time(lambda probes: jobs.extend(probes) or {
        job.key: SimpleNamespace(config={}, train=[dict(tok_per_sec=1000)] * 40) for job in probes})
    assert [(job.cfg.log_interval, job.cfg.max_iters) for job in jobs] == [(1, race.PROBE_STEPS)]


def test_a_batch_that_follows_from_the_length_gets_the_length(tmp_path):
    jobs = race.Planner(make_race("base", (4000, 20000), seeds=1), [], fake_script(tmp_path)).by_length()
    assert [(job.cfg.total_batch_size, job.cfg.max_iters) for job in jobs] == [(200, 100), (100, 40)]
    assert not any(a.startswith("--max_iters") for job in jobs for a in job.arguments)


def test_lengths_of_a_growing_batch_are_told_apart_by_their_steps(fresh):
    """Steps of 1,024 and 2,048 tokens: 4,500 tokens are three, 4,600 too, 200 are none. 700 are one, though they are
    less than half of the largest."""
    def steps(*lengths):
        contest = make_race("ramp: --total_batch_size=2048 --batch_ramp=0.5", lengths=lengths, seeds=1)
        return [job.cfg.max_iters for job in race.Planner(contest, [], train).by_length()]

    assert steps(700.0) == [1] and steps(4500.0) == [3] and sorted(steps(3000.0, 4500.0)) == [2, 3]
    with pytest.raises(UserError, match=r"both 3 step\(s\) of at most 2,048 tokens; choose --tokens"):
        steps(4500.0, 4600.0)
    with pytest.raises(UserError, match="less than one step of at most 2,048 tokens; raise --tokens"):
        steps(200.0)


def test_the_speed_of_a_growing_batch():
    """Half of the tokens at 100, half at 400 tokens/s: 160. The first steps, which compile, do not count."""
    config = dict(max_iters=race.PROBE_STEPS, total_batch_size=64, batch_ramp="0.5")
    stages = BatchPlan(SimpleNamespace(**config))
    steps = [dict(step=k, tok_per_sec=1 if k < 5 else 100 if stages.batch(k) == 32 else 400) for k in range(40)]
    assert race.speed_of(RunData(config, steps, [], None)) == pytest.approx(160)


def test_equal_time_by_measured_speeds(tmp_path):
    """A short run of each variant and batch gives the speed; its first half does not count. One variant fails."""
    probed = []

    def measure(jobs):
        probed.extend(job.key for job in jobs)
        assert all(job.cfg.max_iters == race.PROBE_STEPS for job in jobs)
        slow = [dict(tok_per_sec=1.0)] * (race.PROBE_STEPS // 2)
        return {job.key: RunData({}, slow + [dict(tok_per_sec=job.key[1] / 2)] * (race.PROBE_STEPS // 2), [], None)
                for job in jobs if job.key[0] != "broken"}

    contest = make_race("base; broken", (1, 5), "minutes", seeds=1)
    jobs = race.Planner(contest, [], fake_script(tmp_path)).by_time(measure)
    # at 200 tokens a step: 100 tokens/s, 6,000 and 30,000 tokens: it stays at this batch
    assert probed == [("base", 200), ("broken", 200)]
    assert {job.key: job.tokens for job in jobs} == {("base", 1, 1337): 6000, ("base", 5, 1337): 30000}
    probed.clear()
    contest = make_race("base", (0.5,), "minutes", seeds=1)
    (job,) = race.Planner(contest, [], fake_script(tmp_path)).by_time(measure)
    # 3,000 tokens take 100 a step, at which there are 50 tokens/s
    assert probed == [("base", 200), ("base", 100)] and (job.tokens, job.cfg.total_batch_size) == (1500, 100)


# ----------------------------------------------------------------------------------------------------------------------
# Child processes

CHILD = '''
import json, math, os, sys, time
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
folder = os.path.join(flags["out_dir"], flags["run_name"])
with open(os.path.join(flags["out_dir"], "planned", flags["run_name"])) as f:
    config = json.load(f)
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "process", os.getpid(), flush=True)
if flags.get("weight_decay") == "9":
    sys.exit("train.py: error: the loss is nan; try a lower learning rate")
if flags.get("weight_decay") == "8" and flags["seed"] == "1338":
    time.sleep(60)
if flags.get("weight_decay") == "7":
    sys.exit(0)
os.makedirs(folder)
with open(os.path.join(folder, "config.json"), "w") as f:
    json.dump(config, f)
tokens, steps = config["max_iters"] * config["total_batch_size"], config["max_iters"]
loss = 10 - 0.4 * math.log(tokens) + 0.001 * (config["seed"] % 2) + config["learning_rate"]
done = dict(tokens=tokens, val_loss=loss, train_seconds=tokens / 100, val_losses=dict(bf16=loss))
with open(os.path.join(folder, "log.jsonl"), "w") as f:
    for i in range(steps):
        print(json.dumps(dict(kind="train", step=i, tokens=(i + 1) * config["total_batch_size"], loss=loss,
                              tok_per_sec=100, peak_mem_gb=1.0)), file=f)
    print(json.dumps(dict(kind="val", step=steps - 1, val_loss=loss)), file=f)
    print(json.dumps(dict(kind="done", step=steps - 1, **done)), file=f)
'''


@pytest.fixture
def toy(fresh, shards, tmp_path, monkeypatch):
    """A function toy(*arguments) that races with a script which only pretends to train; its .out is out_dir."""
    machine, out = dict(device="a toy", code="1"), tmp_path / "runs"
    (tmp_path / "child.py").write_text(CHILD)
    (out / "planned").mkdir(parents=True)
    extra = machine | dict(versions=dict(torch="2.11.0"), world_size=1, parameters=200_000)

    def open_data(cfg, procs):
        result = train.open_data(cfg, procs)
        (out / "planned" / cfg.run_name).write_text(json.dumps(flag_values(cfg) | extra))
        return result

    script = SimpleNamespace(__file__=str(tmp_path / "child.py"), read_flags=train.read_flags,
                             check_flags=train.check_flags, open_data=open_data)
    monkeypatch.setattr(race, "describe_machine", lambda device: machine)
    monkeypatch.setattr(race, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(race_report, "plot", lambda rows, contest, path: None)
    given = [f for f in flag_args(out_dir=out, data_dir=shards, learning_rate=0.02) if not f.startswith("--max_iters")]

    def start(*arguments):
        options, flags = bench.take_options(arguments, *race.OPTIONS)
        race.run(options, given + flags, script, str(tmp_path / "r"), "bench.py race")
        return json.loads((tmp_path / "r.json").read_text())

    start.out = out
    return start


@pytest.mark.slow
def test_gpus_share_the_queue_and_finished_runs_are_reused(toy, monkeypatch, capsys):
    monkeypatch.setattr(race, "visible_gpus", lambda limit: ["4", "GPU-b"])
    arguments = "--variants=base;other: --learning_rate=0.01", "--tokens=2560,5120"
    result = toy(*arguments)
    printed, logs = capsys.readouterr().out, sorted(toy.out.glob("*.log"))
    assert "8 to train, 0 are there; 30.72k tokens in all, 2 at a time" in printed
    assert printed.count("started") == printed.count("finished") == 8 and "val loss" in printed
    seen = [path.read_text().split() for path in logs]
    assert {words[1] for words in seen} == {"4", "GPU-b"} and len({words[3] for words in seen}) == 8
    assert all((toy.out / path.stem / "log.jsonl").exists() for path in logs), "each log is next to its run folder"
    assert [(r["label"], r["length"], r["tokens"], r["steps"]) for r in result["rows"]] == [
        (v, n, n, n / 256) for n in (2560, 5120) for v in ("base", "other")]
    assert result["rows"][1]["difference"] == pytest.approx(-0.01) and result["rows"][1]["clear"]
    assert toy(*arguments)["rows"] == result["rows"] and "0 to train, 8 are there\n" in capsys.readouterr().out
    toy(*arguments, "--seeds=3")
    assert "4 to train, 8 are there" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failing_child_is_one_line_and_the_others_continue(toy, capsys):
    with pytest.raises(UserError, match="broken, 2.56k tokens, seed 1337; .*lost, 2.56k tokens, seed 1338") as error:
        toy("--variants=base; broken: --weight_decay=9; lost: --weight_decay=7", "--tokens=2560")
    assert error.value.status == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " failed " in line]
    assert len(lines) == 4
    assert re.match(r"broken, 2.56k tokens, seed 1337 failed \(exit status 1\): train.py: error: the loss is nan; "
                    r".*\.log", lines[0])
    assert "stopped before its end" in lines[2]
    table = (toy.out.parent / "r.md").read_text()
    assert "| base |" in table and "| broken |" not in table
    with pytest.raises(UserError, match="none of the runs"):
        toy("--variants=broken: --weight_decay=9", "--tokens=2560")


def process_of(log):
    return int(log.read_text().split()[3])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children_and_the_next_start_continues(toy, monkeypatch, capsys, number):
    monkeypatch.setattr(race, "visible_gpus", lambda limit: ["0", "1"])
    arguments = ["--variants=base;hangs: --weight_decay=8", "--tokens=2560"]

    def interrupt():
        (log,) = toy.out.glob("race-hangs*1338.log")
        while not log.read_text() or not (toy.out / "race-base-2.56k-tokens-seed-1338" / "log.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    started = race.start_child

    def start_child(job, gpu, script):
        child = started(job, gpu, script)
        if job.key == ("hangs", 2560, 1338):
            threading.Thread(target=interrupt).start()
        return child

    monkeypatch.setattr(race, "start_child", start_child)
    with pytest.raises(UserError, match="stopped by a signal.*continues"):
        toy(*arguments)
    (log,) = toy.out.glob("race-hangs*1338.log")
    with pytest.raises(ProcessLookupError):
        os.kill(process_of(log), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (toy.out.parent / "child.py").write_text(CHILD.replace("time.sleep(60)", "pass"))
    monkeypatch.setattr(race, "start_child", started)
    capsys.readouterr()
    assert len(toy(*arguments)["rows"]) == 2
    assert re.search(r"runs: [12] to train, [23] are there", capsys.readouterr().out)


@pytest.mark.slow
def test_a_child_that_ignores_the_signal_is_killed(monkeypatch):
    monkeypatch.setattr(race, "PATIENCE", 0.1)
    command = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = race.subprocess.Popen([race.sys.executable, "-c", command], stdout=race.subprocess.PIPE)
    process.stdout.readline()
    race.stop_children([race.Child(None, process, "")])
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has ended")
def test_children_end_with_a_race_that_is_killed(tmp_path):
    code = f"""
from nanofp8 import race
child = race.spawn(["-c", "import time; time.sleep(60)"], {str(tmp_path / "log")!r}, "a", None)
print(child.pid, flush=True)
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    check_it_ends(pid)


@pytest.mark.slow
def test_a_race_by_minutes(toy, capsys):
    """The toy makes 100 tokens a second: half a minute is 3,000 tokens, 12 steps of 256."""
    result = toy("--variants=base;other: --learning_rate=0.01 --total_batch_size=512", "--minutes=0.5,1")
    printed = capsys.readouterr().out
    assert "2 to train" in printed and "8 to train" in printed
    assert printed.index("started base, speed at 256 tokens a step") < printed.index("started base, 1 minute, seed")
    assert [(r["label"], r["length"], r["steps"]) for r in result["rows"]] == [
        ("base", 0.5, 12), ("other", 0.5, 6), ("base", 1.0, 23), ("other", 1.0, 12)]
    assert "| 0.5 minutes |" in (toy.out.parent / "r.md").read_text()
    toy("--variants=base;other: --learning_rate=0.01 --total_batch_size=512", "--minutes=0.5,1")
    assert "8 to train" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Results


def test_noise_is_pooled_and_differences_are_held_against_it():
    contest = make_race()
    rows, noise, freedom = summarize(make_runs(contest, spread=0.001), contest)
    # two seeds 0.001 above and below their mean: a standard deviation of sqrt(2) x 0.001 in each of four rows
    assert noise == pytest.approx(0.001 * math.sqrt(2)) and freedom == 4
    assert [(r["length"], r["label"]) for r in rows] == [(60e6, "base"), (60e6, "other"), (100e6, "base"),
                                                         (100e6, "other")]
    assert rows[0]["difference"] is rows[0]["clear"] is None
    for row in (rows[1], rows[3]):
        assert row["difference"] == pytest.approx(-0.02) and row["difference_noise"] == pytest.approx(noise)
        assert row["mean_noise"] == pytest.approx(noise / math.sqrt(2)) and row["clear"]
    assert rows[1]["minutes"] == pytest.approx(5.5) and rows[1]["tok_per_sec"] == 2000, "after 60 steps"
    rows, noise, _ = summarize(make_runs(contest, spread=0.005), contest)
    assert not rows[1]["clear"] and 3 * noise > 0.02
    contest = make_race(seeds=1)
    rows, noise, freedom = summarize(make_runs(contest), contest)
    assert noise is None and freedom == 0 and rows[1]["difference"] == pytest.approx(-0.02)
    assert rows[1]["clear"] is None and rows[1]["difference_noise"] is None


def test_short_runs_count_from_the_warm_up_on():
    contest = make_race("base", (1000,), seeds=1)
    (row,), _, _ = summarize({("base", 1000, 1337): make_run(1000, 4.0, steps=10)}, contest)
    assert row["tok_per_sec"] == 4000 and row["steps"] == 10


def test_the_fit_finds_the_line():
    contest = make_race(lengths=(30e6, 60e6, 100e6))
    fits = fit(summarize(make_runs(contest), contest)[0])
    assert fits["base"] == pytest.approx(dict(a=LOSS_AT_1, b=SLOPE))
    assert fits["other"] == pytest.approx(dict(a=LOSS_AT_1 - 0.02, b=SLOPE))
    assert fit(summarize(make_runs(make_race(lengths=(60e6,))), make_race(lengths=(60e6,)))[0]) == {}


def test_what_a_difference_is_worth():
    """0.02 less loss at a slope of -0.4 is 5% fewer tokens in the logarithm; each takes 1.1 times as long."""
    contest = make_race()
    rows, noise, _ = summarize(make_runs(contest), contest)
    short, long = worth(rows, "base", fit(rows))
    for result, length in ((short, 60e6), (long, 100e6)):
        assert result["tokens"] == pytest.approx(length * math.exp(-0.05)) and result["slope_of"] == "other"
        assert result["of_tokens"] == pytest.approx(math.exp(-0.05))
        assert result["of_time"] == pytest.approx(1.1 * math.exp(-0.05))
        assert result["of_tokens_noise"] == pytest.approx(math.exp(-0.05) * noise / 0.4)
    assert long["measured"] and not short["measured"], "57M tokens are less than the shortest run"


def test_what_a_difference_is_worth_with_the_slope_of_another_variant():
    contest = make_race()
    runs = {key: run for key, run in make_runs(contest).items() if key[:2] != ("other", 100e6)}
    rows, _, _ = summarize(runs, contest)
    (result,) = worth(rows, "base", fit(rows))
    assert result["slope_of"] == "base" and result["of_tokens"] == pytest.approx(math.exp(-0.05))
    assert "with the slope of base" in markdown(rows, contest, 0.001, 3, "")
    contest = make_race(lengths=(60e6,))
    rows, noise, freedom = summarize(make_runs(contest), contest)
    assert worth(rows, "base", fit(rows)) == []
    assert "left out: no variant has val losses of two lengths" in markdown(rows, contest, noise, freedom, "")


def test_a_loss_that_does_not_fall_gives_no_estimates():
    contest = make_race()
    rising = {key: make_run(int(key[1]), 3.0 + key[1] / 1e9) for key in make_runs(contest)}
    rows, noise, freedom = summarize(rising, contest)
    assert worth(rows, "base", fit(rows)) == []
    assert {r["how"] for r in reach(rows, 3.05, "base", fit(rows))} == {"its loss does not fall with the tokens"}
    assert "no variant's loss falls" in markdown(rows, contest, noise, freedom, "")
    far = make_runs(contest, better=dict(other=-2.0))
    rows, noise, freedom = summarize(far, contest)
    assert worth(rows, "base", fit(rows))[0]["tokens"] is None
    assert "no figure" in markdown(rows, contest, noise, freedom, "")


def test_tokens_and_minutes_to_a_target():
    contest = make_race("base; other; short: --seed=3", (30e6, 60e6, 100e6))
    runs = {key: run for key, run in make_runs(contest).items() if key[0] != "short" or key[1] == 60e6}
    rows, noise, _ = summarize(runs, contest)

    def at(tokens):
        return {r["label"]: r for r in reach(rows, LOSS_AT_1 + SLOPE * math.log(tokens), "base", fit(rows))}

    reached = at(80e6)
    assert reached["base"]["tokens"] == pytest.approx(80e6) and reached["base"]["minutes"] == pytest.approx(80 / 12)
    assert reached["base"]["how"] == "between two lengths"
    assert reached["other"]["tokens"] == pytest.approx(80e6 * math.exp(-0.05))
    assert reached["other"]["minutes"] == pytest.approx(1.1 * reached["other"]["tokens"] / 12e6)
    assert 0.5 < reached["base"]["noise"] / (80e6 * noise / math.sqrt(2) / 0.4) < 1, "both ends share in the noise"
    assert reached["short"]["tokens"] == pytest.approx(80e6)
    assert reached["short"]["how"] == "extrapolated with the slope of base"
    assert at(120e6)["base"]["how"] == at(25e6)["base"]["how"] == "extrapolated"
    assert at(120e6)["base"]["tokens"] == pytest.approx(120e6) and at(25e6)["base"]["tokens"] == pytest.approx(25e6)
    assert at(60e6)["base"]["tokens"] == pytest.approx(60e6) and at(60e6)["base"]["how"] == "between two lengths"
    for tokens in (1e6, 9e9):
        assert at(tokens)["base"]["tokens"] is None and "more than 10 times" in at(tokens)["base"]["how"]
    contest = make_race("base", (60e6,))
    rows, _, _ = summarize(make_runs(contest), contest)
    assert reach(rows, 3.0, "base", {})[0]["how"] == "needs a second length"


def test_the_table():
    contest = make_race(target=3.0)
    rows, noise, freedom = summarize(make_runs(contest), contest)
    text = markdown(rows, contest, noise, freedom, "python bench.py race --tokens=60e6,100e6")
    lines = text.splitlines()
    assert lines[0].endswith(", a toy, torch 2.11.0") and lines[2] == "    python bench.py race --tokens=60e6,100e6"
    assert "- base: the flags of all" in lines and "- other: --learning_rate=0.03" in lines
    head = next(i for i, line in enumerate(lines) if line.startswith("| variant"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[head], *lines[head + 2:head + 6]]]
    assert cells[0] == ["variant", "tokens", "steps", "tokens a step", "val loss", "each seed", "minus base",
                        "more than 3 x noise", "tokens/s", "minutes", "peak GB"]
    assert cells[1] == ["base", "60.00M", "80", "750,000", "2.8361", "2.8371, 2.8351", "", "", "2,000", "5.00", "29.5"]
    assert cells[2][6:8] == ["-0.0200 ± 0.0014", "yes"]
    assert "0.0014" in text and "4 degrees of freedom" in text and "uncertain by 35%" in text
    assert "other at 60M tokens (-0.0200); other at 100M tokens (-0.0200)" in text
    assert "base: val loss = 10.000 - 0.4000 x ln(tokens)" in text
    assert ("- other reaches base's val loss at 100M tokens (2.6317) with 0.951 ± 0.003 of the tokens and 1.046 of "
            "the time.") in lines
    assert "Val loss 3 is reached after:" in lines and "| base | 39.82 ± 0.20M | 3.32 | extrapolated |" in text
    one = make_race(seeds=1)
    rows, noise, freedom = summarize(make_runs(one), one)
    text = markdown(rows, one, noise, freedom, "")
    assert "noise is not known" in text and "each seed" not in text and "more than 3" not in text
    by_time = make_race(lengths=(3, 5), unit="minutes")
    runs = {key: make_run(int(key[1] * 12e6), 4 - key[1] / 10, key[1]) for key in make_runs(by_time)}
    assert "| asked for |" in markdown(*[summarize(runs, by_time)[0], by_time, None, 0, ""])


def test_amounts_in_words():
    assert [amount(60.03e6), amount(81920), amount(60.03e6, 12e4)] == ["60.03M", "81.92k", "60.03 ± 0.12M"]
    assert [name_of(60e6, "tokens"), name_of(40960, "tokens"), name_of(1, "minutes"), name_of(2.5, "minutes")] == [
        "60M tokens", "40.96k tokens", "1 minute", "2.5 minutes"]


def test_round_ticks():
    assert round_ticks(58, 103) == [60, 70, 80, 90, 100] and round_ticks(24, 66) == [25, 30, 40, 50, 60]
    assert all(2 <= len(round_ticks(low, 3e4)) <= 8 for low in (1, 13, 200, 4000, 12000))


@pytest.mark.parametrize("lengths, unit, seeds", [((60e6, 100e6), "tokens", 2), ((60e6,), "tokens", 2),
                                                  ((40960, 81920), "tokens", 1), ((3, 5), "minutes", 2)])
def test_the_picture(tmp_path, monkeypatch, lengths, unit, seeds):
    """Two panels: a point for each seed, a line for each variant, the target; with one length, train losses."""
    import matplotlib.pyplot as plt
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    contest = make_race("base; other; third", lengths, unit, seeds, target=3.0)
    runs = make_runs(contest)
    if unit == "minutes":
        runs = {key: make_run(int(key[1] * 12e6), 4 - key[1] / 10, key[1]) for key in runs}
    plot(summarize(runs, contest)[0], contest, str(tmp_path / "r.png"))
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    (fig,) = drawn
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == ["base", "other", "third", "target 3"]
    assert len(fig.axes) == 2 and [ax.get_xscale() for ax in fig.axes] == ["log", "linear"]
    for ax in fig.axes:
        long = [line for line in ax.lines if len(line.get_xdata()) > seeds and line.get_linestyle() == "-"]
        assert len(long) == 3
        points = [line for line in ax.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == seeds
                  and line.get_marker() in "osD"]
        assert len(points) == 3 * len(lengths) and ax.get_xlabel() and ax.get_title()
        assert any(line.get_linestyle() == "--" for line in ax.lines)
    fig.clear()


def test_a_picture_without_val_losses_is_left_out(tmp_path):
    contest = make_race("base", (60e6,))
    rows, _, _ = summarize({("base", 60e6, 1337): make_run(1000, 4.0, eval_tokens=1)}, contest)
    assert rows[0]["val_loss"] is None
    plot(rows, contest, str(tmp_path / "r.png"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_race_from_start_to_end(fresh, shards, tmp_path, monkeypatch, capsys):
    """Two variants by two lengths, trained by train.py in processes of their own. A second start trains nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    own = ("max_iters", "eval_interval")
    given = [f for f in flag_args(out_dir=tmp_path, data_dir=shards) if f[2:].split("=")[0] not in own]
    arguments = ["race", f"--out={tmp_path}/t/r", *given, "--variants=base;big step: --total_batch_size=512",
                 "--tokens=2560,5120", "--seeds=1", "--target=2.5"]
    bench.main(arguments)
    result, printed = json.loads((tmp_path / "t" / "r.json").read_text()), capsys.readouterr().out
    rows = {(r["label"], r["length"]): r for r in result["rows"]}
    assert {key: r["steps"] for key, r in rows.items()} == {
        ("base", 2560): 10, ("big step", 2560): 5, ("base", 5120): 20, ("big step", 5120): 10}
    assert all(1 < r["val_loss"] < math.log(512) and r["minutes"] > 0 for r in rows.values())
    assert rows["base", 5120]["val_loss"] < rows["base", 2560]["val_loss"]
    assert result["fits"]["base"]["b"] < 0 and len(result["worth"]) == 2 and len(result["reached"]) == 2
    assert (tmp_path / "t" / "r.md").read_text() in printed and (tmp_path / "t" / "r.png").exists()
    assert not list(tmp_path.glob("race-*/ckpt/step_*")) and len(list(tmp_path.glob("race-*.log"))) == 4
    bench.main(arguments)
    assert "runs: 0 to train, 4 are there" in capsys.readouterr().out
    assert json.loads((tmp_path / "t" / "r.json").read_text())["rows"] == result["rows"]
