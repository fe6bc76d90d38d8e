"""procs.py: ranks and what they share, and how a script ends."""

import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from helpers import ROOT, TRAIN, fails_in_one_line, finish, flag_args, one_process, start, train_here
from nanofp8 import config, host, procs
from nanofp8.config import UserError
from nanofp8.procs import (
    Processes,
    command_line,
    environment_fault,
    memory_error_message,
    report_good_end,
    start_processes,
)

pytestmark = pytest.mark.usefixtures("fresh")


# -----------------------------------------------------------------------------------------------------
# Ranks


def test_one_process_has_what_it_sums_and_sends(capsys):
    procs = one_process()
    tensor = torch.ones(2)
    assert procs.sum(tensor) is tensor and tensor.tolist() == [1, 1]
    assert procs.broadcast({"a": 1}) == {"a": 1}
    procs.print("once")
    one_process(rank=1, world_size=2).print("not by rank 1")
    assert procs.is_main and capsys.readouterr().out == "once\n"


def test_a_group_of_one_without_torchrun():
    procs = start_processes()
    assert (procs.rank, procs.local_rank, procs.world_size, procs.device) == (0, 0, 1, torch.device("cpu"))
    assert dist.is_initialized() and procs.mesh.size() == 1 and procs.mesh.mesh_dim_names == ("data",)
    again = start_processes()  # another script in the same process joins the group that is there
    assert again.world_size == 1


@pytest.mark.parametrize("variables, tasks", [
    (dict(SLURM_STEP_NUM_TASKS="2"), "2"), (dict(OMPI_COMM_WORLD_SIZE="4"), "4"), (dict(SLURM_STEP_NUM_TASKS="1"), ""),
    (dict(SLURM_STEP_NUM_TASKS="x"), ""), ({}, "")])
def test_a_process_that_is_alone_among_tasks_says_so(monkeypatch, capsys, variables, tasks):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start_processes()
    text = capsys.readouterr().out
    assert (f"one of {tasks} tasks" in text and "bash run.sh" in text) if tasks else not text


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2.*has 2.*NPROC") as caught:
        start_processes()
    assert caught.value.status == 2 and not dist.is_initialized()


@pytest.mark.parametrize("variables,words", [
    (dict(RANK="x"), ["RANK", "'x'", "torchrun"]),
    (dict(WORLD_SIZE="-2"), ["WORLD_SIZE", "'-2'"]),
    (dict(RANK="1"), ["RANK=1", "WORLD_SIZE"]),
    (dict(WORLD_SIZE="2"), ["WORLD_SIZE=2", "MASTER_ADDR", "MASTER_PORT"]),
])
def test_wrong_variables_of_torchrun_are_one_line(monkeypatch, capsys, variables, words):
    """The script ends with status 2 and one line on the rank that meets it, not in its error handler."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        command_line(lambda *_: pytest.fail("it ran"), lambda argv: SimpleNamespace(rank_timeout=5.0), TRAIN, [])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*MASTER_PORT") as caught:
            start_processes()
    assert caught.value.one_rank and "\n" not in str(caught.value)


GLOO = "[enforce fail at device.cc:212] ifa != nullptr. Unable to find "


@pytest.mark.parametrize("error, interface, local_size, words", [
    (GLOO + "interface for: [127.0.0.1]", None, 1, ["no network interface", "ip link set lo up"]),
    (GLOO + "address for: eth7", "eth7", 1, ["GLOO_SOCKET_IFNAME=eth7", "unset"]),
    (GLOO + "interface for: [10.0.0.7]", None, 0, ["NCCL_SOCKET_IFNAME", "between the machines"]),
    ("NCCL error: unhandled system error", None, 1, ["NCCL_DEBUG=INFO"])])
def test_ranks_that_cannot_connect_are_one_line(monkeypatch, error, interface, local_size, words):
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=RuntimeError(error)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface or "")
    with pytest.raises(UserError) as caught:
        start_processes()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert ("NCCL_DEBUG" in str(caught.value)) == ("NCCL_DEBUG=INFO" in words)


def test_a_busy_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock(side_effect=RuntimeError("CUDA error: busy\nmore advice")))
    with pytest.raises(UserError, match="GPU 0.*busy.*CUDA_VISIBLE_DEVICES") as caught:
        start_processes()
    assert "\n" not in str(caught.value)


def test_a_virtual_gpu_that_refuses_expandable_segments(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    refused = RuntimeError("CUDA driver error: operation not supported")
    monkeypatch.setattr(procs, "first_allocation", mock.Mock(side_effect=refused))
    with pytest.raises(UserError, match="operation not supported.*PYTORCH_ALLOC_CONF=expandable_segments:False"):
        start_processes()


@pytest.mark.parametrize("rank, local_size, warned", [(0, "2", True), (1, "2", False), (0, "1", False), (0, "", False)])
def test_little_shared_memory_is_a_warning_before_nccl_starts(monkeypatch, capsys, rank, local_size, warned):
    """Of local rank 0, and only where several processes share a machine."""
    started = mock.Mock(side_effect=KeyError("NCCL"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(procs, "first_allocation", lambda: None)
    monkeypatch.setattr(dist, "init_process_group", started)
    monkeypatch.setattr(procs, "connect_store", lambda rank: dist.HashStore())
    monkeypatch.setattr(host, "SHARED_MEMORY", 2 ** 60)
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=local_size, MASTER_ADDR="a",
                            MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(KeyError, match="NCCL"):
        start_processes()
    out = capsys.readouterr().out
    assert (out.startswith("warning: ") and "--shm-size" in out) == warned and bool(out) == warned


# -----------------------------------------------------------------------------------------------------
# The end of a script


@pytest.mark.parametrize("local_rank,named,left", [(0, True, True), (1, True, False), (0, False, False)])
def test_a_good_end_leaves_a_file_for_run_sh(tmp_path, monkeypatch, local_rank, named, left):
    monkeypatch.delenv("ENDED_WELL", raising=False)
    if named:
        monkeypatch.setenv("ENDED_WELL", str(tmp_path / "yes"))
    report_good_end(Processes(local_rank, local_rank, 2, torch.device("cpu"), None))
    assert (tmp_path / "yes").exists() == left


def test_a_good_end_is_one_also_where_the_temporary_folder_was_emptied(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ENDED_WELL", str(tmp_path / "gone" / "yes"))
    report_good_end(Processes(0, 0, 2, torch.device("cpu"), None))
    assert str(tmp_path / "gone" / "yes") in capsys.readouterr().out


def ended_with(capsys, run, world_size=1, **read):
    """Exit status and stderr of command_line() around `run`."""
    with pytest.raises(SystemExit) as stop:
        command_line(run, lambda argv: SimpleNamespace(argv=argv, rank_timeout=9.0), "/x/script.py", [], **read)
    assert not dist.is_initialized()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("status", [1, 2])
def test_a_user_error_is_one_line_with_its_status(capsys, status):
    def run(cfg, procs):
        raise UserError("the disk is full; make room", status)

    assert ended_with(capsys, run) == (status, "script.py: error: the disk is full; make room\n")


def test_a_script_that_succeeds_returns_its_result():
    result = command_line(lambda cfg, procs: (cfg.argv, procs.world_size), lambda argv: SimpleNamespace(argv=argv),
                          "s.py", ["a"])
    assert result == (["a"], 1)
    assert not dist.is_initialized()


def test_another_exception_keeps_its_traceback():
    def run(cfg, procs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command_line(run, lambda argv: SimpleNamespace(), "s.py", [])
    assert not dist.is_initialized()


CFG = SimpleNamespace(batch_size=16, block_size=1, USE_AC_BLOCKS=False, USE_AC_LM_HEAD=True)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUDA error: out of memory\nadvice"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_names_the_rank_and_what_needs_less(error):
    """Numbers are halved and switches set, where that is possible."""
    procs = one_process(rank=3, world_size=4)
    line = memory_error_message(error, procs, CFG, list(vars(CFG)))
    assert all(word in line for word in ("rank 3", "memory", "--batch_size=8 or --USE_AC_BLOCKS=True")), line
    assert "block_size" not in line and "USE_AC_LM_HEAD" not in line
    assert "--" not in memory_error_message(error, procs, CFG, [])


def test_a_limit_of_threads_is_one_line():
    error = RuntimeError("can't start new thread")
    assert "ulimit -u" in memory_error_message(error, one_process(), CFG, list(vars(CFG)))


@pytest.mark.parametrize("error, words", [
    (RuntimeError("CUDA error: uncorrectable ECC error encountered\nadvice"), ["ECC", "CUDA_VISIBLE_DEVICES"]),
    (RuntimeError("cuDNN error: CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH"), ["cuDNN", "LD_LIBRARY_PATH"]),
    (RuntimeError("CUDA error: the launch timed out and was terminated\nadvice"), ["timed out", "display"]),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/home/me/.triton/cache/x"),
     ["/home/me/.triton/cache/x", "quota", "TRITON_CACHE_DIR"]),
    (OSError(errno.EACCES, "Permission denied", "/x"), []), (RuntimeError("a shape does not fit"), [])])
def test_faults_of_gpus_and_folders_are_one_line(error, words):
    line = environment_fault(error)
    assert all(word in line for word in words) and "\n" not in line and bool(line) == bool(words), line


@pytest.mark.parametrize("message", ["CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasLtMatmul(...)`",
                                     "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "nvrtc: error: invalid value"])
def test_libraries_on_ld_library_path_are_named(tmp_path, monkeypatch, message):
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/opt/intel/lib::{tmp_path}")
    assert environment_fault(RuntimeError(message)) == ""  # none there: then the traceback is worth more
    (tmp_path / "libcublasLt.so.12").touch()
    line = environment_fault(RuntimeError(message))
    assert message in line and f"LD_LIBRARY_PATH names {tmp_path}" in line and "unset" in line
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert environment_fault(RuntimeError(message)) == ""


def test_a_kernel_that_fails_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "libcublas.so").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert environment_fault(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling x")) == ""


def test_a_torch_for_amds_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(UserError, match="AMD.*--preset=tiny"):
        start_processes()


def test_a_project_in_a_folder_called_quack_keeps_its_tracebacks(tmp_path):
    code = compile("1 / 0", str(tmp_path / "quack" / "train.py"), "exec")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code, dict(__name__="__main__"))
    assert environment_fault(caught.value) == ""


def test_a_full_cache_of_torch_compile_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/x")
        except OSError as error:
            raise RuntimeError(f"InductorError: {error}\nmore") from None
    line = environment_fault(caught.value)
    assert "/cache/x" in line and "TORCHINDUCTOR_CACHE_DIR" in line and "\n" not in line


def test_tritons_cache_may_be_in_its_own_home(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert procs.in_triton_cache(os.path.expanduser("~/.triton/cache/x")) and not procs.in_triton_cache("/h/x")
    monkeypatch.setenv("TRITON_HOME", "/h")
    assert procs.in_triton_cache("/h/.triton/cache/x") and host.triton_folder() == "/h/.triton/cache"


@pytest.mark.parametrize("package, raised, words", [
    ("triton/runtime", 'import os; os.rmdir("/cache/x")', ["Triton's cache", "another process", "TRITON_CACHE_DIR"]),
    ("triton/runtime", 'import os; os.rmdir("/tools/ptxas")', []),
    ("triton/runtime", 'json.loads("{")', ["Triton's cache", "rm -r /cache"]),
    ("triton/runtime", 'json.dumps({1})', []),
    ("flash_attn/cute", '1 / 0', ["--attention=cudnn", "ZeroDivisionError", "cute/kernel.py:2"]),
    ("quack", 'None.x', ["--USE_QUACK=False", "AttributeError"]),
    ("quack", 'exec("raise RuntimeError(\'CUDA error: an illegal memory access\')")', []),
    ("another", '1 / 0', [])])
def test_faults_of_packages_of_kernels_are_one_line(tmp_path, monkeypatch, package, raised, words):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    code = compile(f"import json\n{raised}", str(tmp_path / package / "kernel.py"), "exec")
    with pytest.raises(Exception) as caught:
        exec(code, dict(__name__=package.replace("/", ".") + ".kernel"))
    line = environment_fault(caught.value)
    assert all(word in line for word in words) and "\n" not in line and bool(line) == bool(words), line


def test_other_errors_have_nothing_to_do_with_memory():
    assert memory_error_message(RuntimeError("a shape does not fit"), one_process(), CFG, ["batch_size"]) == ""


def test_too_little_memory_is_one_line(tmp_path, shards, fresh, monkeypatch, capsys):
    """In training; the run folder stays as it is, and what would need less is named."""
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit) as error:
        train_here(tmp_path, shards, batch_size=4)
    line = capsys.readouterr().err
    assert error.value.code == 1 and line.count("\n") == 1 and "--batch_size=2 or --USE_AC_BLOCKS=True" in line
    monkeypatch.setattr(train, "GPT", mock.Mock(side_effect=RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4096 bytes.")))
    fails_in_one_line(capsys, 1, "rank 0 has too little memory", out_dir=tmp_path, data_dir=shards)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "train_orig.py", "sample.py", "bench.py"])
def test_ctrl_c_during_imports_is_one_line(tmp_path, script):
    """A torch of our own sends the signal as it is imported."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    result = finish(start(ROOT / script, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert result.code == 130 and result.err == f"{script}: stopped by Ctrl-C\n" and not result.out


@pytest.mark.parametrize("path", [ROOT / "train.py", ROOT / "train_orig.py", ROOT / "sample.py", ROOT / "bench.py",
                                  *sorted((ROOT / "tools").glob("*.py"))], ids=lambda path: path.name)
def test_a_python_without_torch_is_one_line(tmp_path, path):
    script = path.name
    if script == "overview.py":  # it draws, and needs no torch
        (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('none', name='matplotlib')")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    result = finish(start(path, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert result.code == 1 and not result.out and result.err.count("\n") == 1
    assert result.err.startswith(f"{script}: error: ") and "has no" in result.err and "run.sh" in result.err


@pytest.mark.parametrize("script", ["train.py", "train_orig.py", "sample.py", "bench.py"])
@pytest.mark.parametrize("package, error", [
    ("torch", "ImportError('libcudnn.so.9: cannot open shared object file')"), ("torch", "OSError('libcublas.so.12')"),
    ("numpy", "ImportError('\\n\\nIMPORTANT:\\n\\nOriginal error was: No module named _multiarray_umath\\n')")])
def test_a_package_that_is_broken_is_one_line(tmp_path, script, package, error):
    (tmp_path / f"{package}.py").write_text(f"raise {error}")
    others = {"LD_LIBRARY_PATH": str(tmp_path)} if "libc" in error else {}
    result = finish(start(ROOT / script, cwd=tmp_path, PYTHONPATH=str(tmp_path), **others))
    assert ("unset LD_LIBRARY_PATH" in result.err) == bool(others)
    assert result.code == 1 and not result.out and result.err.count("\n") == 1, result.err
    assert f"cannot import {package} (" in result.err and "bash run.sh" in result.err
    assert any(word in result.err for word in ("libcudnn.so.9", "libcublas.so.12", "_multiarray_umath"))


def test_a_broken_environment_of_run_sh_is_to_be_deleted(monkeypatch, tmp_path):
    """run.sh trusts it, so that starting with run.sh would say the same again. One that a user made is left alone."""
    monkeypatch.setattr(config, "OWN_ENVIRONMENT", str(tmp_path))
    (tmp_path / "installed").touch()
    assert "which makes an environment" in config.environment_remedy()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert config.environment_remedy().startswith(f"delete {tmp_path} ")
    (tmp_path / "installed").unlink()
    assert "which makes an environment" in config.environment_remedy()


def test_an_error_of_a_library_during_training_stays_a_traceback(tmp_path):
    """Only what fails while a package is imported is put down to the package."""
    (tmp_path / "numpy.py").write_text("def save():\n    raise OSError('disk')\n")
    code = "from nanofp8 import config; config.explain_early_errors('a.py'); import numpy; numpy.save()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1 and "Traceback" in done.stderr and "cannot import" not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_current_folder_that_was_deleted_is_one_line(tmp_path, script):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(f"cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} {ROOT / script}", shell=True,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no longer exists; cd" in done.stderr


def test_no_temporary_folder_is_one_line(capsys):
    """As in a container that is read-only."""
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")
    with mock.patch("tempfile.gettempdir", side_effect=error), pytest.raises(SystemExit) as end:
        config.start_script("a/train.py")
    assert end.value.code == 1 and re.fullmatch("train.py: error: .*set TMPDIR.*\n", capsys.readouterr().err)


def test_a_python_that_is_too_old_is_one_line():
    """As nanofp8/__init__.py is the first that runs, no newer syntax may come before it."""
    code = "import sys; sys.version_info = (3, 8, 10); import nanofp8"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "3.10" in done.stderr and "3.8" in done.stderr


@pytest.mark.parametrize("script", ["train.py", "train_orig.py", "bench.py"])
def test_a_torch_that_is_too_old_is_one_line(tmp_path, script):
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1'")
    result = finish(start(ROOT / script, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert result.code == 1 and not result.out and result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"{script}: error: torch 2.9.1 is too old") and "bash run.sh" in result.err


def test_ctrl_c_is_handed_over_to_the_script(monkeypatch):
    """exit_on_ctrl_c() changes nothing where Ctrl-C is ignored, as in the background of a shell."""
    for before, ours in ((signal.default_int_handler, True), (signal.SIG_IGN, False)):
        monkeypatch.setattr(signal, "getsignal", lambda number, handler=before: handler)
        with mock.patch.object(signal, "signal") as installed:
            config.exit_on_ctrl_c("a/train.py")
        assert installed.called == ours
        if ours:
            handler = installed.call_args.args[1]
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    with mock.patch.object(signal, "signal") as installed:
        config.raise_on_ctrl_c()
    assert installed.call_args.args == (signal.SIGINT, signal.default_int_handler)


def test_an_ascii_console_gets_escapes(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(UnicodeEncodeError):
        print("ü", flush=True)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    config.print_any_text()
    print("ü", flush=True)
    assert stdout.buffer.getvalue() == b"\\xfc\n"


@pytest.mark.slow
def test_a_run_with_an_ascii_console(tmp_path, shards):
    arguments = flag_args(data_dir=shards, out_dir=tmp_path / "é", run_name="ü", max_iters=1)
    result = finish(start(TRAIN, *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii"))
    assert result.code == 0 and not result.err and "/\\xe9/\\xfc " in result.out and result.out.isascii()


def test_ctrl_c_before_training_is_one_line(tmp_path, shards, fresh, monkeypatch, capsys):
    monkeypatch.setattr(train, "calibrate", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as error:
        train_here(tmp_path, shards)
    assert error.value.code == 130 and capsys.readouterr().err == f"{os.path.basename(TRAIN)}: stopped by Ctrl-C\n"
    assert not list(tmp_path.iterdir())
