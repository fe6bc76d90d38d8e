"""What commit 1ea897b wrote is still read: its default flags as preset "classic", its checkpoints and its logs.

tests/data/flags_of_1ea897b.json holds the flags that its preset d20 resolves to. tests/data/run_of_1ea897b holds a run
of it: 8 steps of a model of one layer with vocabulary 256 on generated tokens, its checkpoint after 4 steps, and its
data.
"""

import json
import pathlib
import shutil

import pytest
import torch

import helpers
import sample
import train
from nanofp8.checkpoint_files import read_checkpoint
from nanofp8.runlog import read_log

DATA = pathlib.Path(__file__).resolve().parent / "data"
OLD = DATA / "run_of_1ea897b"
CHECKPOINT = OLD / "gpt" / "ckpt" / "step_000004"
FLAGS = dict(
    preset="tiny", n_layer=1, n_embd=32, n_head=2, block_size=32, batch_size=2, total_batch_size=64, loss_chunk_size=64,
    vocab_size=256, dataset="generated", data_dir=OLD / "data", max_iters=8, ckpt_interval=4, eval_interval=4,
    eval_tokens=512, muon_impl="torch", warmup_iters=2, FP8_AMAX_HISTORY=16, FP8_STATS_INTERVAL=8, USE_COMPILE=False,
)


def test_classic_is_the_default_flags_of_then():
    """Every flag has the value and the type that it had there."""
    then = json.loads((DATA / "flags_of_1ea897b.json").read_text())
    now = vars(train.read_flags(["--preset=classic"], has_gpu=True))
    assert len(then) == 75 and {name: now.get(name) for name in then} == then
    assert all(type(now[name]) is type(value) for name, value in then.items())


def test_its_run_continues_to_the_same_losses(fresh, tmp_path):
    """From the checkpoint after 4 steps, whose weights, momenta and scales are restored: the losses that it recorded.

    The last step's limit is wider: bf16 products are rounded in another order on a CPU with AMX, which moved its loss
    by 3.7e-4. Momenta set to 0 move the second step's loss by 4e-4, and the last val loss by 1.5e-4."""
    folder = shutil.copytree(OLD / "gpt", tmp_path / "gpt")
    recorded = read_log(folder)
    arguments = [f"--{name}={value}" for name, value in FLAGS.items()]
    assert train.main([*arguments, f"--out_dir={tmp_path}", "--resume=auto"]) == str(folder)
    for kind, field, steps in (("train", "loss", [*range(8)]), ("train", "grad_norm", [*range(8)]),
                               ("val", "val_loss", [3, 7])):
        then, now = ({r["step"]: r[field] for r in log if r["kind"] == kind} for log in (recorded, read_log(folder)))
        assert [*now] == steps
        for step in steps:
            limit = 1e-3 if (kind, step) == ("train", 7) else 1e-4
            assert now[step] == pytest.approx(then[step], abs=limit), (kind, field, step)
    kept = [r for r in recorded if r["step"] < 4]
    assert helpers.records(folder)[:len(kept)] == kept  # what lies before the checkpoint stays as it was written
    assert helpers.in_ckpt(folder) == ["step_000004", "step_000008"]


def test_its_log_is_read():
    records = read_log(OLD / "gpt")
    assert [(r["kind"], r["step"]) for r in records] == [
        *[("train", step) for step in range(4)], ("val", 3), *[("train", step) for step in range(4, 8)],
        ("fp8_stats", 7),
        ("val", 7), ("done", 7)]
    assert len(records) == len((OLD / "gpt" / "log.jsonl").read_text().splitlines())


def test_its_checkpoint_is_read_by_sample_py(fresh, capsys):
    """The model is the one whose val loss the log has (there in bf16, here in fp32), and it continues a sequence."""
    shape, weights, meta, folder = sample.load_checkpoint(str(CHECKPOINT))
    assert meta == read_checkpoint(str(CHECKPOINT)) and meta["step"] == 4
    sampler = sample.Sampler(shape, weights, torch.device("cpu"), torch.float32)
    tokens = torch.from_numpy(train.TokenRing(str(OLD / "data"), "generated", "val", 256, 513).read(0, 513)).long()
    logits = sampler.forward(tokens[:512].view(16, 32)).flatten(0, 1)
    recorded = next(r["val_loss"] for r in read_log(OLD / "gpt") if r["kind"] == "val")
    assert torch.nn.functional.cross_entropy(logits, tokens[1:]).item() == pytest.approx(recorded, abs=2e-3)
    assert all(0 <= row[0] < 256 for row in sampler.generate(tokens[:3].tolist(), 5))
    # Its vocabulary is smaller than GPT-2's, so that the program can only say so
    with pytest.raises(SystemExit):
        sample.main([f"--ckpt={CHECKPOINT}", "--device=cpu"])
    assert f"checkpoint: {CHECKPOINT}, step 4, 256 tokens" in capsys.readouterr().err
