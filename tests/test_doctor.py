"""doctor.py: what it says of a machine and of flags, with GPUs and modules that are faked, missing or broken."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import helpers
import train
from helpers import TRAIN, flag_args, make_cfg, train_here
from nanofp8 import cards, config, doctor, host, machine, memory, sizes
from nanofp8.config import UserError


@pytest.fixture(autouse=True)
def alone(fresh, monkeypatch):
    """No GPU, no nvidia-smi, no torchrun, 500 GB of free disk; bytecode caches stay as they are."""
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(host, "ask_nvidia_smi", lambda fields: ([], "nvidia-smi is not here"))
    monkeypatch.setattr(host, "SHARED_MEMORY", 0)
    free_disk(monkeypatch, 5e11)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def free_disk(monkeypatch, free):
    """Let every disk have this many bytes free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def report(capsys, *flags):
    """Return the exit status, the lines and the whole text of a report."""
    status = doctor.run(TRAIN, list(flags))
    text = capsys.readouterr().out
    _, below = text.split("machine:\n", 1)  # a command with many flags takes some lines
    assert len(below.splitlines()) <= 30 and max(map(len, text.splitlines())) <= doctor.WIDTH, text
    return status, lines_of(text), text


def lines_of(text):
    """Return [(mark, name, text)] of a report's lines, with those that were wrapped put together."""
    lines = []
    for line in text.splitlines()[:-1]:
        if line.startswith(" "):
            lines[-1][2] += " " + line.strip()
        elif line[:5].strip() in (doctor.OK, doctor.NOTE, doctor.WARN, doctor.FAIL):
            lines.append([line[:5].strip(), line[6:doctor.INDENT].strip(), line[doctor.INDENT:]])
    return [tuple(line) for line in lines]


def of(lines, name, mark=None):
    """Return the texts of the lines of this name, and of this mark."""
    return " | ".join(text for m, n, text in lines if n == name and mark in (None, m))


def faults(lines):
    return [(name, text) for mark, name, text in lines if mark == doctor.FAIL]


def small(shards, tmp_path, **changes):
    return flag_args(data_dir=shards, out_dir=tmp_path / "out", **changes)


def fake_gpus(monkeypatch, *names, capability=(9, 0), free=70e9, version="2.20.2", cudnn=91900, engine=True, fault="",
              cublaslt=130100):
    """Let torch see these GPUs, and Transformer Engine answer by the table of cards.py."""
    if engine:
        helpers.fake_transformer_engine(monkeypatch, version, capability, lambda question: (
            cards.supports(question, capability), "" if cards.supports(question, capability) else "no hardware."),
            cublaslt)
    else:
        monkeypatch.setitem(sys.modules, "transformer_engine", None)
    for name, value in dict(
            is_available=lambda: True, device_count=lambda: len(names), get_device_name=lambda i=0: names[i],
            get_device_capability=lambda device=None: capability,
            mem_get_info=lambda i: (free - getattr(i, "index", i) * 1e9, 80e9),
            memory_allocated=lambda device: 0, memory_reserved=lambda device: 0,
            get_per_process_memory_fraction=lambda device: 1.0,
            get_device_properties=lambda device: SimpleNamespace(total_memory=80e9)).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(memory, "needs_transposes", lambda: True)  # itself, it would remember this GPU
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    helpers.fake_compilers(monkeypatch, fault)
    answers = {"driver_version": [["580.82.07"] for _ in names]}
    monkeypatch.setattr(host, "ask_nvidia_smi", lambda fields: (answers[fields], ""))


# -----------------------------------------------------------------------------------------------------
# Machines


def test_a_cpu(shards, tmp_path, capsys):
    status, lines, text = report(capsys, *small(shards, tmp_path, preset="tiny"))
    assert status == 0 and not faults(lines) and "would start" in text.splitlines()[-1] and "\033" not in text
    assert torch.__version__ in of(lines, "torch") and sys.executable in of(lines, "Python")
    assert "EMULATED" in of(lines, "precision") and "not used" in of(lines, "Transformer Engine")
    assert "256 tokens a step = 1 rank(s) x 1 micro-batch(es) x 8 sequences x 32 tokens" in of(lines, "batch")
    data = of(lines, "data")
    assert data.startswith("synthetic: 6,000 train tokens in 3 shard(s) (the run reads 1,536: 0.26 epochs)")
    assert not (tmp_path / "out").exists()


def test_hopper(shards, tmp_path, capsys, monkeypatch):
    fake_gpus(monkeypatch, "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA H200")
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == 0 and not faults(lines)
    assert "2 x NVIDIA H100 80GB HBM3, compute capability 9.0, 69.0 to 70.0 of 80.0 GB free" in of(lines, "GPU")
    assert "1 x NVIDIA H200" in of(lines, "GPU") and of(lines, "driver") == "580.82.07"
    assert of(lines, "formats") == ("native: bf16, fp8-delayed, fp8-current, fp8-block; "
                                    "emulated: fp8-mxfp8, nvfp4")
    assert of(lines, "Transformer Engine") == "2.20.2" and of(lines, "libraries") == "cuDNN 9.19.0, cuBLASLt 13.1.0"
    assert of(lines, "precision", doctor.OK) == "fp8-delayed by Transformer Engine 2.20.2"


@pytest.mark.parametrize("capability, changes, mark, words", [
    ((8, 0), dict(), doctor.OK, ["bf16", "--USE_FP8=True emulates"]),
    ((8, 0), dict(USE_FP8=True), doctor.WARN, ["EMULATED", "--USE_FP8=False"]),
    ((9, 0), dict(USE_NVFP4=True), doctor.WARN, ["nvfp4 EMULATED"]),
    ((9, 0), dict(USE_NVFP4=True, USE_EMULATION=True), doctor.OK, ["nvfp4 EMULATED"]),
    ((12, 0), dict(USE_NVFP4=True), doctor.OK, ["nvfp4 by Transformer Engine", "with Hadamard"]),
    ((12, 0), dict(FP8_RECIPE="mxfp8"), doctor.WARN, ["EMULATED"]),
])
def test_what_the_flags_choose_on_each_card(shards, tmp_path, capsys, monkeypatch, capability, changes, mark, words):
    """select_precision()'s own answer; emulation on a GPU is a warning unless it was asked for."""
    fake_gpus(monkeypatch, "Some GPU", capability=capability)
    status, lines, text = report(capsys, *small(shards, tmp_path, n_embd=128, **changes))
    assert status == 0 and all(word in of(lines, "precision", mark) for word in words), lines
    assert ("read from source" in of(lines, "formats")) == (capability not in cards.HAS_RUN)
    assert "given: predicted" in of(lines, "memory", doctor.OK)
    assert ("1 warning" in text.splitlines()[-1]) == (mark == doctor.WARN)


def test_a_torch_that_is_too_old(shards, tmp_path, capsys, monkeypatch):
    """It is one fault, and no module of ours is imported with it."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    status, lines, _ = report(capsys, *small(shards, tmp_path))
    ((name, text),) = faults(lines)
    assert status == 1 and name == "torch" and all(word in text for word in ("2.9.1", "2.10", "bash run.sh"))
    assert not of(lines, "optimizers") and of(lines, "data", doctor.OK) and not of(lines, "precision", doctor.WARN)


def test_transformer_engine_is_missing_too_old_or_broken(shards, tmp_path, capsys, monkeypatch):
    """Without it a GPU emulates, which is a warning; one that is too old ends training, and is one line."""
    flags = small(shards, tmp_path, n_embd=128)
    fake_gpus(monkeypatch, "NVIDIA H100", version="2.14.0")
    status, lines, _ = report(capsys, *flags)
    ((_, text),) = faults(lines)
    assert status == 1 and all(word in text for word in ("2.14.0", "2.17", "--USE_EMULATION=True"))
    assert report(capsys, *flags, "--USE_EMULATION=True")[0] == 0
    fake_gpus(monkeypatch, "NVIDIA H100", engine=False)
    status, lines, _ = report(capsys, *flags)
    assert status == 0 and "run.sh setup" in of(lines, "Transformer Engine", doctor.WARN)
    assert "install Transformer Engine" in of(lines, "precision", doctor.WARN)


def test_a_cublas_that_computes_nvfp4_wrongly(shards, tmp_path, capsys, monkeypatch):
    fake_gpus(monkeypatch, "NVIDIA B200", capability=(10, 0), cublaslt=130400)
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128, USE_NVFP4=True))
    assert status == 1 and "13.4.1" in of(lines, "precision", doctor.FAIL) and "13.4.0" in of(lines, "libraries")
    assert report(capsys, *small(shards, tmp_path, n_embd=128))[0] == 0


def test_a_cudnn_that_torch_refuses(shards, tmp_path, capsys, monkeypatch):
    """torch raises when first asked for its version, if LD_LIBRARY_PATH has another cuDNN than torch's own."""
    answers = [RuntimeError("compiled against (9, 19, 0) but found runtime version (9, 14, 0)"), 91400]

    def version():
        if isinstance(answers[0], RuntimeError):
            raise answers.pop(0)
        return answers[0]

    fake_gpus(monkeypatch, "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == 0 and of(lines, "libraries", doctor.OK) == "cuDNN 9.14.0, cuBLASLt 13.1.0"
    assert "(9, 19, 0)" in of(lines, "libraries", doctor.WARN)


@pytest.mark.parametrize("changes, cudnn, warned", [
    (dict(), 91500, True), (dict(), 91900, False), (dict(n_head=1, n_embd=144, FP8_RECIPE="current"), 91900, True),
    (dict(attention="torch"), 91500, False), (dict(USE_EMULATION=True), 91500, False),
])
def test_attention_that_is_not_fused(shards, tmp_path, capsys, monkeypatch, changes, cudnn, warned):
    fake_gpus(monkeypatch, "NVIDIA GeForce RTX 5090", capability=(12, 0), cudnn=cudnn)
    status, lines, _ = report(capsys, *small(shards, tmp_path, **dict(n_embd=128) | changes))
    assert status == 0 and ("--attention=torch" in of(lines, "kernels", doctor.WARN)) == warned
    assert "attention: " in of(lines, "kernels", doctor.OK)


def test_without_python_headers(shards, tmp_path, capsys, monkeypatch):
    """Training on a GPU would fail: one line. Without a GPU nothing needs them."""
    fake_gpus(monkeypatch, "NVIDIA H100", fault="no Python.h; apt install python3-dev")
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == 1 and faults(lines) == [("compilers", "no Python.h; apt install python3-dev")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, lines, _ = report(capsys, *small(shards, tmp_path))
    assert status == 0 and of(lines, "compilers", doctor.NOTE).startswith("no Python.h; without a GPU")


def test_transformer_engine_that_differs_from_the_table(shards, tmp_path, capsys, monkeypatch):
    fake_gpus(monkeypatch, "NVIDIA GeForce RTX 5090", capability=(12, 0))
    engine = sys.modules["transformer_engine.pytorch"]
    monkeypatch.setattr(engine, "is_mxfp8_available", lambda return_reason=False: (True, "") if return_reason else True)
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == 0 and "is_mxfp8_available() is True" in of(lines, "Transformer Engine", doctor.WARN)


def test_a_gpu_that_is_taken_and_too_many_processes(shards, tmp_path, capsys, monkeypatch):
    fake_gpus(monkeypatch, "NVIDIA H100", "NVIDIA H100")

    def taken(i):
        if i:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")
        return 70e9, 80e9

    monkeypatch.setattr(torch.cuda, "mem_get_info", taken)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(host, "SHARED_MEMORY", 2 ** 60)
    status, lines, _ = report(capsys, *small(shards, tmp_path, total_batch_size=512))
    assert status == 1 and "GPU 1 cannot be used (CUDA error: all CUDA-capable" in of(lines, "GPU", doctor.FAIL)
    assert "2 processes, but 1 GPU(s); set NPROC" in of(lines, "GPU", doctor.FAIL)
    assert "--shm-size" in of(lines, "GPU", doctor.WARN)
    assert "2 rank(s) x" in of(lines, "batch") and "wrapper: ddp" in of(lines, "optimizers")


# -----------------------------------------------------------------------------------------------------
# Modules that are missing or broken


def test_without_torch_and_numpy(shards, tmp_path, capsys, monkeypatch):
    """The rest is judged all the same: a GPU by nvidia-smi, preset, batch, data, disk."""
    for name in ("torch", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    answers = {"driver_version": [["575.57.08"]],
               "name,compute_cap,memory.free,memory.total": [["NVIDIA GeForce RTX 5090", "12.0", "31500", "32607"]]}
    monkeypatch.setattr(host, "ask_nvidia_smi", lambda fields: (answers[fields], ""))
    helpers.fake_compilers(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, lines, _ = report(capsys, f"--data_dir={shards}", "--dataset=synthetic", f"--out_dir={tmp_path}")
    assert status == 1 and [name for name, _ in faults(lines)] == ["torch", "numpy", "driver", "data"]
    assert "575.57.08, but CUDA 13.0 needs 580" in of(lines, "driver", doctor.FAIL)
    assert all("run.sh setup" in text for name, text in faults(lines) if name in ("torch", "numpy"))
    assert "RTX 5090, compute capability 12.0, 33.0 of 34.2 GB free" in of(lines, "GPU")
    assert "native: fp8, nvfp4, fp8_block_scaling; emulated: mxfp8" in of(lines, "formats")
    assert "preset d20: 561,040,640 parameters" in of(lines, "flags") and "16 sequences" in of(lines, "batch")
    assert "checkpoints of 5.16 GB" in of(lines, "disk") and "131,072" in of(lines, "data", doctor.FAIL)


def test_an_out_dir_below_a_file_and_no_stdout(shards, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    status, lines, _ = report(capsys, *small(shards, tmp_path / "file" / "out", preset="tiny"))
    assert status == 1 and "file is not a folder" in of(lines, "disk", doctor.FAIL)
    monkeypatch.setattr(sys, "stdout", None)  # closed before the start
    assert doctor.run(TRAIN, small(shards, tmp_path, preset="tiny")) == 0


@pytest.mark.parametrize("row, words", [
    (["NVIDIA GB10", "12.1", "[N/A]", "[N/A]"], ["100.0 of 100.0 GB free", "native: fp8"]),
    (["Tesla T4", "7.5", "15000", "15360"], ["7.5, but training needs 8.0", "use another"])])
def test_gpus_before_anything_is_installed(shards, tmp_path, capsys, monkeypatch, row, words):
    """GB10 shares the machine's memory; nvidia-smi names none of its own."""
    for name in ("torch", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    answers = {"driver_version": [["580.95.05"]], "name,compute_cap,memory.free,memory.total": [row]}
    monkeypatch.setattr(host, "ask_nvidia_smi", lambda fields: (answers[fields], ""))
    monkeypatch.setattr(host, "free_memory", lambda: 100 * 10 ** 9)
    helpers.fake_compilers(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, lines, text = report(capsys, f"--data_dir={shards}", "--dataset=synthetic", f"--out_dir={tmp_path}")
    text = " ".join(text.split())
    assert all(word in text for word in words) and "could not be checked" not in text
    assert ("8.0" in str(faults(lines))) == (row[1] == "7.5")


@pytest.mark.parametrize("module, error, mark", [
    ("torch", 'OSError("libcudart.so.13: cannot open shared object file")', doctor.FAIL),
    ("torch", 'SystemError("bad")', doctor.FAIL), ("numpy", 'ImportError("a\\nb")', doctor.FAIL),
    ("dion", 'RuntimeError("no kernel")', doctor.WARN), ("triton", "ValueError()", doctor.WARN),
])
def test_a_broken_import_is_a_line_that_names_the_exception(shards, tmp_path, capsys, monkeypatch, module, error, mark):
    (tmp_path / f"{module}.py").write_text(f'print("noise")\nraise {error}\n')
    for name in [name for name in sys.modules if name == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    status, lines, text = report(capsys, *small(shards, tmp_path, muon_impl="auto"))
    assert status == (mark == doctor.FAIL) and "noise" not in text
    (line,) = [text for m, _, text in lines if m == mark and error.split("(")[0] in text]
    assert "cannot be imported" in line and ";" in line


@pytest.mark.parametrize("dion, begins", [
    ("import triton", ["Triton and Dion cannot be imported (ValueError: no driver); install Triton anew"]),
    ("raise OSError(2)", ["Triton cannot be imported (ValueError: no driver); install Triton anew",
                          "Dion cannot be imported (OSError: 2); install Dion anew"]),
    ("", ["Triton cannot be imported (ValueError: no driver); install Triton anew"]),
])
def test_packages_that_fail_alike_share_a_line(shards, tmp_path, capsys, monkeypatch, dion, begins):
    """Dion fails where Triton does, unless this process has imported it already."""
    for module, code in (("triton", 'raise ValueError("no driver")'), ("dion", dion)):
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.setitem(sys.modules, module, None)  # so that what is imported here does not stay
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    status, lines, _ = report(capsys, *small(shards, tmp_path, muon_impl="auto"))
    texts = [text for mark, name, text in lines if mark == doctor.WARN and name == "packages"]
    assert status == 0 and [text[:len(begin)] for text, begin in zip(texts, begins, strict=True)] == begins


def test_a_check_that_fails_is_a_line(shards, tmp_path, capsys, monkeypatch):
    def broken(exam):
        yield doctor.OK, "so far"
        raise ZeroDivisionError("division by zero")

    checks = tuple((name, broken if name == "disk" else check) for name, check in doctor.CHECKS)
    monkeypatch.setattr(doctor, "CHECKS", checks)
    status, lines, _ = report(capsys, *small(shards, tmp_path))
    assert status == 0 and of(lines, "disk", doctor.OK) == "so far"
    assert "ZeroDivisionError: division by zero" in of(lines, "disk", doctor.WARN)


# -----------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("changes, name, words", [
    (dict(n_head=3), "batch", ["n_head=3", "--n_head="]),
    (dict(total_batch_size=100), "batch", ["total_batch_size=100", "--total_batch_size=256"]),
    (dict(n_value_embed=2), "batch", ["--n_value_embed=1"]),
    (dict(FP8_RECIPE="block"), "precision", ["divisible by 128", "--USE_FP8=False"]),
    (dict(HIGH_PRECISION_LAYERS="blocks.9"), "precision", ["'blocks.9'", "blocks.0.attn.qkv"]),
    (dict(attention="torch", window_pattern="SL", window_size=4), "kernels", ["--window_pattern=L"]),
    (dict(USE_QUACK=True), "kernels", ["--USE_QUACK=auto"]),
    (dict(USE_8BIT_ADAM=True), "optimizers", ["--USE_8BIT_ADAM=False"]),
    (dict(USE_DDP=True, USE_FSDP2=True), "optimizers", ["exclude each other"]),
    (dict(dataset="nothing"), "data", ["no train shards", "data/README.md"]),
    (dict(total_batch_size=8192), "data", ["6,000", "total_batch_size=8,192"]),
    (dict(resume="nowhere"), "flags", ["--resume=nowhere"]),
    (dict(train_tokens=1000), "flags", ["train_tokens and max_iters"]),
])
def test_flags_that_training_would_refuse(shards, tmp_path, capsys, changes, name, words):
    """The same line as training gives, and status 1."""
    status, lines, text = report(capsys, *small(shards, tmp_path, **changes))
    ((where, line),) = faults(lines)
    assert status == 1 and where == name and all(word in line for word in words), lines
    assert "would fail: 1 line" in text.splitlines()[-1]


@pytest.mark.parametrize("free, keep, mark, words", [
    (1e12, 2, doctor.OK, ["at most 3 checkpoints of"]), (1e12, 0, doctor.OK, ["no checkpoints"]),
    (2e6, 2, doctor.WARN, ["3 checkpoints", "make room"]), (1e5, 2, doctor.FAIL, ["a checkpoint takes", "--out_dir"]),
])
def test_disk(shards, tmp_path, capsys, monkeypatch, free, keep, mark, words):
    free_disk(monkeypatch, free)
    status, lines, _ = report(capsys, *small(shards, tmp_path, keep_checkpoints=keep))
    assert status == (mark == doctor.FAIL) and all(word in of(lines, "disk", mark) for word in words), lines


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_dir_that_cannot_be_written(shards, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "--out_dir" in of(report(capsys, *small(shards, tmp_path))[1], "disk", doctor.FAIL)


@pytest.mark.parametrize("argv", [[], ["--preset=d20"], ["--preset=speedrun", "--train_tokens=100000000"],
                                  ["--preset=classic", "--batch_size=4"], ["--max_iters=7", "--total_batch_size=4096"]])
def test_flags_are_resolved_as_train_py_does(argv):
    exam = doctor.Examination(TRAIN, argv, 1, 1, torch)
    list(doctor.check_flags(exam))
    cfg = train.read_flags(argv, has_gpu=False)
    assert vars(exam.cfg) == vars(cfg)
    list(doctor.check_batch(exam))
    train.check_flags(cfg, 1)
    assert vars(exam.cfg) == vars(cfg)


def test_a_resumed_run(shards, tmp_path, capsys):
    """It is judged with the checkpoint's flags, which a test on the size of a checkpoint also needs."""
    flags = dict(max_iters=2, n_layer=1, keep_checkpoints=1)
    folder = train_here(tmp_path / "out", shards, **flags)
    capsys.readouterr()
    status, lines, _ = report(capsys, *small(shards, tmp_path, **flags | dict(max_iters=3), resume="auto"))
    assert status == 0 and "step_000002 (not verified)" in of(lines, "flags", doctor.NOTE)
    status, lines, _ = report(capsys, *small(shards, tmp_path, **flags, resume="auto"))
    assert status == 1 and "raise --max_iters" in of(lines, "flags", doctor.FAIL)
    status, lines, _ = report(capsys, *small(shards, tmp_path, **flags | dict(n_layer=2), resume="auto"))
    assert status == 1 and "n_layer=1" in of(lines, "flags", doctor.FAIL)
    tensors = sum(path.stat().st_size for path in (folder / "ckpt" / "step_000002").glob("*.distcp"))
    # RNG states, amax histories and headers come on top, which are small only beside a larger model
    assert sizes.checkpoint_bytes(make_cfg(**flags)) == pytest.approx(tensors, rel=0.25)


# -----------------------------------------------------------------------------------------------------
# The command line


def test_doctor_is_answered_like_help(capsys, monkeypatch):
    asked = []

    def ask(path, given):
        asked.append(list(given))
        return 1

    monkeypatch.setattr(doctor, "run", ask)

    def status_of(*argv):
        with pytest.raises(SystemExit) as caught:
            config.check_command_line(TRAIN, argv, "nanofp8.doctor")
        return caught.value.code

    assert status_of("--doctor", "--n_layer=3") == 1 and status_of("--n_layer=3", "--doctor", "--doctor") == 1
    assert asked == [["--n_layer=3"]] * 2
    assert status_of("--doctor", "--n_layers=3") == 2 and "--n_layer" in capsys.readouterr().err
    assert status_of("--doctor", "--help") == 0 and "--n_layer=20" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert status_of("--doctor") == 0 and len(asked) == 2
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit) as caught:  # a script that has none
        config.check_command_line(TRAIN, ["--doctor"])
    assert caught.value.code == 2 and "'--doctor'" in capsys.readouterr().err
    assert config.check_command_line(TRAIN, ["--n_layer=3"], "nanofp8.doctor") is None


def test_colors_only_on_a_terminal(monkeypatch, capsys, shards, tmp_path):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags = small(shards, tmp_path, n_head=3)
    doctor.run(TRAIN, flags)
    text = capsys.readouterr().out
    assert "\033[32mok   \033[0m" in text and "\033[31mFAIL " in text
    monkeypatch.setenv("NO_COLOR", "1")
    doctor.run(TRAIN, flags)
    assert "\033" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_python_without_any_package(tmp_path):
    """-S: without site-packages. Any other Python on this machine too. Nothing is written."""
    for python in {sys.executable, shutil.which("python3", path="/usr/bin")} - {None}:
        done = subprocess.run([python, "-S", "-B", TRAIN, "--doctor", "--preset=tiny"], cwd=tmp_path,
                              capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
        if "requires Python" in done.stderr or done.returncode == 2:
            continue
        lines = lines_of(done.stdout)
        assert done.returncode == 1 and done.stderr == "" and [n for n, _ in faults(lines)] == ["torch", "numpy"]
        assert "shakespeare" in of(lines, "data", doctor.OK) and not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------------------------------
# host.py


def test_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi = tmp_path / "nvidia-smi"
    for script, rows, why in (('echo "NVIDIA L4, 8.9"; echo "NVIDIA L4, 8.9"', [["NVIDIA L4", "8.9"]] * 2, ""),
                              ("echo No devices were found; exit 6", [], "No devices"), ("exit 9", [], "status 9")):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        found, reason = host.ask_nvidia_smi("name,compute_cap")
        assert found == rows and why in reason
    smi.unlink()
    if not shutil.which("nvidia-smi"):
        assert host.ask_nvidia_smi("name") == ([], "nvidia-smi is not here")


@pytest.mark.parametrize("megabytes, processes, fault", [(64, 2, True), (64, 1, False), (1024, 8, False),
                                                         (1023, 4, True)])
def test_shared_memory(monkeypatch, megabytes, processes, fault):
    """Docker's 64 MB are too little for NCCL, which matters with several processes only."""
    monkeypatch.setattr(host, "SHARED_MEMORY", 2 ** 30)
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_blocks=megabytes * 256, f_frsize=4096))
    text = host.shared_memory_fault(processes)
    assert bool(text) == fault and (not fault or all(word in text for word in (f"{megabytes:,} MB", "--shm-size=1g",
                                                                               "--ipc=host")))
    monkeypatch.undo()
    assert host.shared_memory_fault(8, "/no/such/folder") == ""


def test_the_compiler_is_tried(tmp_path, monkeypatch):
    """Triton takes $CC, else gcc or clang, and Python's headers where sysconfig says."""
    def fault(script=None):
        host.compiler_fault.cache_clear()
        if script is not None:
            (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "cc").chmod(0o755)
            monkeypatch.setenv("CC", str(tmp_path / "cc"))
        return host.compiler_fault()

    assert fault("exit 0") == ""
    assert "python3-dev" in fault("echo '<stdin>:1: fatal error: Python.h: No such file' >&2; exit 1")
    assert "internal error" in fault("echo 'internal error' >&2; exit 1")
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert "does not run" in fault() and "CC" in fault()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install g++" in fault()
    host.compiler_fault.cache_clear()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """HOME and a temporary folder of our own. Returns a function that makes a file system there noexec, or nfs."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    def mount(name, noexec=False, kind=None):
        folder, before = str(tmp_path / name), os.statvfs
        if noexec:
            monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC) if str(
                path).startswith(folder) else before(path))
        if kind:
            monkeypatch.setattr(host, "file_system", lambda path: kind if path.startswith(folder) else "ext4")
    return mount


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="only Linux says noexec")
def test_where_triton_keeps_compiled_code(tmp_path, monkeypatch, folders):
    """As Triton has it, else in the temporary folder. Nothing is made."""
    other = str(tmp_path / "tmp" / f"triton-{os.getuid()}")
    assert host.triton_cache() == ("", "")
    with monkeypatch.context() as patch:  # torch.compile would set the variable to a folder in there
        patch.setattr(host, "cache_fault", lambda path: "noexec" if path == str(tmp_path / "tmp") else "")
        assert host.triton_cache() == (str(tmp_path / "home" / ".triton" / "cache"), "noexec")
    folders("home", kind="nfs4")
    assert host.triton_cache() == ("", "")  # one process may
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder, why = host.triton_cache()
    assert folder == other and "network" in why and str(tmp_path / "home") in why
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "home" / "mine"))  # what the user says counts
    assert host.triton_cache() == ("", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    folders("home", noexec=True)
    folder, why = host.triton_cache()
    assert folder == other and "noexec" in why
    monkeypatch.setenv("HOME", os.devnull)
    folder, why = host.triton_cache()
    assert folder == other and "cannot be written" in why
    assert {path.name for path in tmp_path.rglob("*")} == {"home", "tmp"}
    (tmp_path / "tmp" / f"triton-{os.getuid()}").mkdir()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="another user.*set TRITON_CACHE_DIR"):
        patch.setattr(os, "lstat", lambda path, lstat=os.lstat: SimpleNamespace(st_uid=os.getuid() + 1, st_mode=0))
        host.triton_cache()
    folders("tmp", noexec=True)
    with pytest.raises(UserError, match="cannot be written, and .*noexec; set TRITON_CACHE_DIR"):
        host.triton_cache()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "tmp" / "x"))
    with pytest.raises(UserError, match="TRITON_CACHE_DIR=.*noexec; set TRITON_CACHE_DIR"):
        host.triton_cache()


def test_the_type_of_a_file_system(monkeypatch, tmp_path):
    mounts = r"""/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/a\040b xfs rw 0 0
overlay /srv overlay rw 0 0
tmpfs /srv tmpfs rw,noexec 0 0
"""
    (tmp_path / "mounts").write_text(mounts)
    monkeypatch.setattr("builtins.open", lambda path, *_, open=open, **named: open(
        tmp_path / "mounts" if path == "/proc/self/mounts" else path, *_, **named))
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    assert [host.file_system(folder) for folder in ("/", "/homes", "/home", "/home/c/.triton", "/home/a b/c", "/srv")
            ] == ["ext4", "ext4", "nfs4", "nfs4", "xfs", "tmpfs"]
    (tmp_path / "mounts").unlink()
    assert host.file_system("/home") == ""


def test_another_cache_of_triton_is_set_and_reported(shards, tmp_path, capsys, monkeypatch):
    fake_gpus(monkeypatch, "NVIDIA H100")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(host, "triton_cache", lambda: ("/tmp/triton-7", "/home/x is on a network file system"))
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == 0 and "/tmp/triton-7: /home/x is on a network" in of(lines, "compilers", doctor.NOTE)
    machine.check_compiler()
    assert os.environ["TRITON_CACHE_DIR"] == "/tmp/triton-7"

    def refuse():
        raise UserError("no folder; set TRITON_CACHE_DIR")

    monkeypatch.setattr(host, "triton_cache", refuse)
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == 1 and faults(lines) == [("compilers", "no folder; set TRITON_CACHE_DIR")]


@pytest.mark.parametrize("failure, words", [
    (AssertionError("libcuda.so cannot found!"), ["TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"]),
    (FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"), ["/sbin/ldconfig", "TRITON_LIBCUDA_PATH"]),
    (None, [])])
def test_a_driver_library_that_triton_does_not_find(shards, tmp_path, capsys, monkeypatch, failure, words):
    """torch finds it all the same. It is one line of the doctor and of training."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    ask = host.libcuda_fault
    fake_gpus(monkeypatch, "NVIDIA H100")
    monkeypatch.setattr(host, "libcuda_fault", ask)
    monkeypatch.setattr(driver, "libcuda_dirs", mock.Mock(side_effect=failure))
    ask.cache_clear()
    status, lines, _ = report(capsys, *small(shards, tmp_path, n_embd=128))
    assert status == bool(words) and all(word in of(lines, "compilers", doctor.FAIL) for word in words)
    if words:
        assert len(faults(lines)) == 1
        with pytest.raises(UserError, match="TRITON_LIBCUDA_PATH"):
            machine.check_compiler()
    ask.cache_clear()


def test_an_error_of_the_user_is_a_fault(shards, tmp_path, capsys, monkeypatch):
    """Whatever raises UserError, its line is reported once."""
    def refuse(*args):
        raise UserError("this cannot be; do that")

    monkeypatch.setattr(doctor, "CHECKS", (("GPU", refuse), ("flags", refuse), ("disk", refuse)))
    status, lines, _ = report(capsys)
    assert status == 1 and lines == [(doctor.FAIL, "GPU", "this cannot be; do that")]
    monkeypatch.setattr(doctor, "CHECKS", (("flags", lambda exam: 1 / 0), ("disk", refuse)))
    status, ((mark, name, text),), _ = report(capsys)
    assert status == 1 and (mark, name) == (doctor.FAIL, "flags") and "ZeroDivisionError" in text
