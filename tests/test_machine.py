"""machine.py: peaks of GPUs, what config.json says of machine and code."""

import os
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch

import helpers
from helpers import losses, train_here
from nanofp8 import cards, host, machine
from nanofp8.config import UserError
from nanofp8.machine import check_gpus, describe_machine, peak_flops


def test_the_code_hash_follows_train_py_and_the_package(tmp_path, monkeypatch):
    """It changes with each file that trains, also with a new one, and not with reports or any other file."""
    shutil.copy(helpers.TRAIN, tmp_path)
    package = shutil.copytree(helpers.ROOT / "nanofp8", tmp_path / "nanofp8",
                              ignore=shutil.ignore_patterns("__pycache__"))
    before = describe_machine(helpers.CPU)["code"]
    monkeypatch.setattr(machine, "PROJECT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)  # git takes longest
    assert describe_machine(helpers.CPU)["code"] == before
    seen = {before}
    for path in (tmp_path / "train.py", *sorted(package.glob("*.py")), package / "new.py"):
        with open(path, "a") as f:
            f.write("# edited\n")
        seen.add(describe_machine(helpers.CPU)["code"])
    assert len(seen) == 3 + len(list((helpers.ROOT / "nanofp8").glob("*.py"))) - len(machine.REPORTS)
    assert all((package / name).exists() for name in machine.REPORTS)
    (tmp_path / "README.md").write_text("edited")
    assert describe_machine(helpers.CPU)["code"] in seen


@pytest.mark.parametrize("release, wsl", [
    ("5.15.167.4-microsoft-standard-WSL2\n", True), ("4.4.0-19041-Microsoft\n", True), ("6.1.0-27-amd64\n", False),
    (None, False)])
def test_expandable_segments_but_not_under_wsl2(tmp_path, monkeypatch, release, wsl):
    """There, CUDA's driver may refuse the first allocation. What the user sets stays."""
    if release:
        (tmp_path / "osrelease").write_text(release)
    assert host.is_wsl(str(tmp_path / "osrelease")) == wsl
    monkeypatch.setattr(host, "is_wsl", lambda: wsl)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    host.start_torch()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    host.start_torch()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if wsl else "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is put back


@pytest.fixture
def cuda_folders(tmp_path, monkeypatch):
    """Toolkits of CUDA 12 and 13, one with a cuDNN, and torch's wheels, with empty files for libraries."""
    for name in ("CUDA", "CUDNN", "NVRTC", "CURAND"):
        for end in ("HOME", "PATH"):
            monkeypatch.setenv(f"{name}_{end}", "")  # so that what is set later goes away again
            del os.environ[f"{name}_{end}"]
    for file in ("12/lib64/libnvrtc.so.12", "13/targets/x86_64-linux/lib/libnvrtc.so.13", "c/lib64/libnvrtc.so.13",
                 "c/lib64/libcudnn.so.9", "nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cu13/lib/libcurand.so.10",
                 "nvidia/cudnn/lib/libcudnn.so.9", "nvidia/cudnn/lib/libcudnn_graph.so.9"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


@pytest.mark.parametrize("toolkit, variables, misleads", [
    ("12", {}, True), ("13", {}, False), ("c", {}, True), ("none", {}, False), ("12", dict(CUDA_HOME="13"), False),
    ("13", dict(CUDA_PATH="12"), True), ("13", dict(CUDA_HOME="/usr"), True)])
def test_a_toolkit_that_would_mislead_transformer_engine(cuda_folders, monkeypatch, toolkit, variables, misleads):
    for name, value in variables.items():
        monkeypatch.setenv(name, value if value.startswith("/") else str(cuda_folders / value))
    assert host.toolkit_misleads(str(cuda_folders / "nvidia"), str(cuda_folders / toolkit)) == misleads
    assert not host.toolkit_misleads(str(cuda_folders / "no wheels"), str(cuda_folders / toolkit))


@pytest.mark.parametrize("given", [False, True])
def test_libraries_of_another_cuda_are_not_transformer_engines(cuda_folders, monkeypatch, given):
    """All parts of cuDNN are loaded: its search loads libcudnn.so.9 alone where it is pointed to a folder."""
    loaded, wheels = [], cuda_folders / "nvidia"
    monkeypatch.setattr(host.ctypes, "CDLL", lambda file, mode: loaded.append(os.path.basename(file)))
    if given:
        monkeypatch.setenv("CUDNN_PATH", "/mine")
    host.load_from_wheels(str(wheels))
    assert loaded == ([] if given else ["libcudnn.so.9", "libcudnn_graph.so.9", "libnvrtc.so.13", "libcurand.so.10"])
    names = {name: os.environ.get(name) for name in ("CUDNN_HOME", "NVRTC_HOME", "CURAND_HOME")}
    assert names == (dict.fromkeys(names) if given else dict(
        CUDNN_HOME=str(wheels / "cudnn"), NVRTC_HOME=str(wheels / "cu13"), CURAND_HOME=str(wheels / "cu13")))


PEAKS = {
    "NVIDIA GB300": 2.5e15, "NVIDIA B300 SXM6 AC": 2.25e15, "NVIDIA GB200": 2.5e15, "NVIDIA B200": 2.25e15,
    "NVIDIA GH200 480GB": 989e12, "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H800": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362e12, "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9e12,
    "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 5080": 112.6e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
NO_PEAKS = [  # cards of nearly the same name, cards whose data sheets differ, parts of a card
    "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5080 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 5090 D V2", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 5080 SUPER", "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX PRO 5000 Blackwell", "NVIDIA RTX 6000", "NVIDIA L40", "NVIDIA B100", "NVIDIA H20", "NVIDIA H800 PCIe",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA GB10", "NVIDIA Thor", "Some other GPU",
]


@pytest.mark.parametrize("name, peak", [*PEAKS.items(), *((name, None) for name in NO_PEAKS)])
def test_peak_of_each_card(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_every_entry_of_the_table_is_some_cards():
    assert {peak for _, peak in machine.PEAK_BF16} == {None, *PEAKS.values()} and peak_flops(helpers.CPU) is None


@pytest.mark.slow
def test_profile(fresh, shards, tmp_path, capsys):
    """USE_PROFILE leaves a trace in the run folder, prints the largest operators, and changes no loss."""
    plain = losses(train_here(tmp_path, shards, run_name="a", max_iters=5))
    folder = train_here(tmp_path, shards, run_name="b", max_iters=5, USE_PROFILE=True)
    assert (losses(folder) == plain).all()
    assert (folder / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("profile of one step"))
    assert len([line for line in lines[at + 1:at + 11] if " ms " in line]) == 10


@pytest.mark.parametrize("driver, cuda, needed", [
    ("575.57.08", "13.0", "580"), ("579.1", "13.2", "580"), ("580.82.07", "13.0", ""), ("595.10", "13.0", ""),
    ("570.172.08", "12.8", ""), ("520.61.05", "12.8", "525"), ("575.57.08", "", ""), ("unknown", "13.0", ""),
])
def test_drivers_that_are_too_old(driver, cuda, needed):
    fault = cards.driver_fault(driver, cuda)
    assert bool(fault) == bool(needed) and "\n" not in fault
    if fault:
        assert all(word in fault for word in (driver, cuda, needed, "update it"))
        assert ("CUDA 12 (docs/install.md)" in fault) == (needed == "580")


def test_an_old_driver_is_named_where_torch_sees_no_gpu(tmp_path, monkeypatch):
    """torch itself only says that it finds none."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: NVIDIA GeForce RTX 5090 (UUID: GPU-1)' || echo 575.57.08\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="575.57.08.*580 or newer; update it.*--preset=tiny"):
        check_gpus()
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # then something else is wrong
    with pytest.raises(UserError, match="nvidia-smi lists GPU 0"):
        check_gpus()


@pytest.mark.parametrize("error, words", [
    (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
     ["(Error 802: system not yet initialized)", "nvidia-fabricmanager"]),
    (RuntimeError("cudaGetDeviceCount(). Error 804: forward compatibility"), ["(Error 804", "LD_LIBRARY_PATH"]),
    (AssertionError("Torch not compiled with CUDA enabled"), ["bash run.sh"]),
    (RuntimeError("No CUDA GPUs are available"), ["repair driver or torch"])])
def test_why_cuda_does_not_start_is_named(tmp_path, monkeypatch, error, words):
    def init():
        raise error
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)' || echo 580.82.07\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError) as caught:
        check_gpus()
    assert all(word in str(caught.value) for word in [*words, "GPU 0", "--preset=tiny"]), caught.value


def test_a_gpu_device_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "GPU_DEVICE", str(tmp_path / "nvidia0"))
    check_gpus()
    (tmp_path / "nvidia0").touch()
    with pytest.raises(UserError, match="nvidia0.*nvidia-smi is missing.*--preset=tiny"):
        check_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus()


@pytest.mark.parametrize("script, words", [
    ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", ["GPU 0: NVIDIA H100", "torch"]),
    ("echo 'could not communicate with the driver'; exit 9", ["could not communicate", "does not answer"]),
    ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo '  MIG 1g'; echo 'GPU1 is lost'; exit 15", ["GPU1 is lost"]),
    ("exit 9", ["status 9"]), ("echo 'No devices were found'; exit 6", None), ("true", None),
])  # fmt: skip
def test_gpus_that_torch_does_not_see(tmp_path, monkeypatch, script, words):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if words:
        with pytest.raises(UserError) as caught:
            check_gpus()
        assert all(word in str(caught.value) for word in [*words, "--preset=tiny"])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus()


@pytest.mark.parametrize("visible, meant", [("0", True), ("GPU-1", True), ("", False), ("-1", False),
                                            ("NoDevFiles", False), (" none", False), (" 0,1", True)])
def test_gpus_that_are_asked_for_by_name_and_not_seen(tmp_path, monkeypatch, visible, meant):
    """Slurm sets CUDA_VISIBLE_DEVICES in every job: to NoDevFiles without GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"GPU 0: NVIDIA H100.*{visible}.*--preset=tiny") if meant else nullcontext():
        check_gpus()


def test_visible_devices_that_name_no_gpu(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for visible in ("all", '"0,1"'):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UserError, match=f"GPU 0: NVIDIA H100.*CUDA_VISIBLE_DEVICES={visible}, which names none"):
            check_gpus()


@pytest.mark.parametrize("limit, cores", [("max 100000", 16), ("250000 100000", 3), ("10000 100000", 1), ("", 16),
                                          ("6400000 100000", 16), (None, 16)])
def test_a_containers_share_of_time_counts(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    assert host.usable_cores(str(tmp_path / "cpu.max")) == cores


def test_a_damaged_inforom_is_a_warning_only(tmp_path, monkeypatch):
    """nvidia-smi says it before its answer, and returns 14. Any other status is a failure."""
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for status, answer in ((14, ([["580.82"]], "")), (15, ([], "nvidia-smi: 580.82"))):
        smi.write_text(f"#!/bin/sh\necho 'WARNING: infoROM is corrupted at gpu 0'; echo 580.82; exit {status}\n")
        smi.chmod(0o755)
        assert host.ask_nvidia_smi("driver_version") == answer


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_this_projects(tmp_path, monkeypatch):
    """Not that of a repository that its folder was unpacked into. A git that hangs or fails is none."""
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*me, "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    inside = tmp_path / "project"
    shutil.copytree(helpers.ROOT / "nanofp8", inside / "nanofp8", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(helpers.TRAIN, inside)
    monkeypatch.setattr(machine, "PROJECT", str(inside))
    assert describe_machine(helpers.CPU)["git_commit"] is None
    shutil.copytree(tmp_path / ".git", inside / ".git")
    assert len(describe_machine(helpers.CPU)["git_commit"].removesuffix("-dirty")) == 12

    def hang(*command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert describe_machine(helpers.CPU)["git_commit"] is None


@pytest.mark.parametrize("host_address, own, default, found", [
    ("10.0.0.7", "10.0.0.8", None, "10.0.0.8"),     # another machine
    ("10.0.0.8", "10.0.0.8", None, "10.0.0.8"),     # this one, by its address
    ("127.0.1.1", "127.0.0.1", "10.0.0.8", "10.0.0.8"),  # this one, by Debian's name for it
    ("127.0.1.1", "127.0.0.1", None, ""), ("127.0.0.1", "127.0.0.1", "10.0.0.8", ""), (None, None, None, ""),
])
def test_the_address_by_which_other_machines_reach_this_one(monkeypatch, host_address, own, default, found):
    class Probe:
        def __init__(self, *kind):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def connect(self, address):
            self.own = own if address[0] == host_address else default
            if self.own is None:
                raise OSError("Network is unreachable")

        def getsockname(self):
            return self.own, 9

    def look_up(name):
        if host_address is None:
            raise OSError("Name or service not known")
        return host_address

    monkeypatch.setattr(host.socket, "gethostbyname", look_up)
    monkeypatch.setattr(host.socket, "socket", Probe)
    monkeypatch.setattr(host.socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0"), (3, "eth0")])
    monkeypatch.setattr(host, "address_of", dict(lo="127.0.0.1", ib0="", eth0="10.0.0.8").get)
    assert host.own_address("node1") == found and host.interface_to("node1") == ("eth0" if found else None)


def test_the_addresses_of_this_machines_interfaces():
    names = [name for _, name in host.socket.if_nameindex()]
    assert "lo" not in names or host.address_of("lo") in ("127.0.0.1", "")  # "": not up, or not Linux
    assert host.address_of("none such") == ""


@pytest.mark.parametrize("capability, fault", [((7, 0), "7.0"), ((7, 5), "7.5"), ((8, 0), ""), ((12, 1), "")])
def test_a_gpu_that_is_too_old(capability, fault):
    with pytest.raises(UserError, match=f"{fault}.*8.0.*--preset=tiny") if fault else nullcontext():
        machine.check_capability(capability)
    assert (cards.verdict("is_fp8_available", capability, asked=True) == "refused") == bool(fault)


def test_an_optional_package_that_compiles_functions_is_imported_without_inductor(tmp_path, monkeypatch):
    """torch.compile imports Inductor, which takes seconds. What was passed to it is compiled when it is called."""
    before, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    (tmp_path / "compiles_early.py").write_text(
        "import torch\n@torch.compile(dynamic=True)\ndef double(x):\n    return 2 * x\n")
    (tmp_path / "compiles_early-1.2.dist-info").mkdir()
    (tmp_path / "compiles_early-1.2.dist-info" / "METADATA").write_text("Name: compiles-early\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    module, text = host.optional("compiles-early", "compiles_early", "Early")
    assert text == "Early 1.2" and not compiled
    assert module.double(3) == 6 and module.double(4) == 8 and compiled == [dict(dynamic=True)]
    (tmp_path / "broken_early.py").write_text("raise OSError('no libfoo')")
    module, text = host.optional("compiles-early", "broken_early", "Early")
    assert module is None and "no libfoo" in text
    monkeypatch.undo()
    assert torch.compile is before
