"""Tests of run.sh in a copy of the folder, with fakes of python, uv, nvidia-smi and scontrol on PATH.

Nothing is installed, and no network is used.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

# Logs what it is asked to do. Runs `-c` and `-` programs in the real python, which sees only the packages in $STUBS.
PYTHON = r"""#!/bin/bash
log() { echo "$(basename "$(dirname "$(dirname "$0")")") $*" >>"$LOG"; }
case "$*" in
  '-m venv '*)
    log venv
    [ -z "${NO_VENV:-}" ] && [[ $PWD != *:* ]] || exit 1
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip --version') [ -z "${NO_PIP:-}" ] || [ -n "${PYTHONPATH:-}" ] ;;
  '-m pip '*)
    [ -z "${PYTHONPATH:-}" ] || exit 0 # "Requirement already satisfied"
    part=${@: -1}
    log "pip $* NVTE=${NVTE_BUILD_USE_NVIDIA_WHEELS:-} :" $(grep -v '^#' "$part")
    touch "$(dirname "$0")/../left-by-pip"
    [ "${PIP_USER:-1}" = 0 ] || { echo "ERROR: Can not perform a '--user' install." >&2; exit 1; }
    [ -z "${PIP_CONSTRAINT:-}" ] || { echo "ERROR: ResolutionImpossible" >&2; exit 1; }
    if [ -n "${HANG:-}" ] && grep -q "^$HANG" "$part"; then sleep 60 & echo $! >"$LOG.pid"; wait; fi
    if [ -n "${FAIL:-}" ] && grep -q "^$FAIL" "$part"; then echo "ERROR: no route to host" >&2; exit 1; fi ;;
  '-W ignore -c import torch') [ -z "${NO_TORCH:-}" ] || { echo "ImportError: libtorch.so" >&2; exit 1; } ;;
  '-W ignore -c import transformer_engine.pytorch')
    [ -z "${NO_TE:-}" ] || { echo "ImportError: GLIBCXX" >&2; exit 1; } ;;
  '-c '*'from torch.distributed.run import main'*)
    log "torchrun ${*:3} OMP=${OMP_NUM_THREADS:-}"
    end() { log "torchrun got $1"; kill $!; [ -z "${SAFE:-}" ] || touch "$ENDED_WELL"; exit 1; }
    if [ -n "${TRAIN_WAITS:-}" ]; then trap 'end TERM' TERM; trap 'end INT' INT; sleep 60 & wait; fi
    [ -z "${SAFE:-}" ] || touch "$ENDED_WELL"
    exit "${STATUS:-0}" ;;
  '-m pytest'*) log "$PWD pytest ${*:3}"; exit "${STATUS:-0}" ;;
  train.py*)
    threads=${OMP_NUM_THREADS:+ OMP=$OMP_NUM_THREADS}
    log "$* RANK=${RANK:-}${WORLD_SIZE:+ of $WORLD_SIZE, $LOCAL_WORLD_SIZE here}$threads"
    if [ -n "${TRAIN_WAITS:-}" ]; then trap 'log train got TERM; kill $!; exit 7' TERM; sleep 60 & wait; fi
    exit "${STATUS:-0}" ;;
  data/cachedfineweb10b.py*)
    log "$*"; [ -z "${NO_NET:-}" ] || exit 1
    mkdir -p data/fineweb10B; touch data/fineweb10B/f_train_000001.bin ;;
  *check_command_line*) [ -z "${OLD:-}" ] && exec "$REAL" -S "$@" ;;
  *urlopen*) [ -n "${CPU_INDEX:-}" ] ;;
  *_base_executable*) [ -z "${OLD:-}" ] && case $0 in */.venv/*) echo "$BASE" ;; *) echo "$0" ;; esac ;;
  *Python.h*) [ -z "${NO_HEADERS:-}" ] ;;
  *) PYTHONPATH="$STUBS" exec "$REAL" -S "$@" ;;
esac
"""
UV = r"""#!/bin/bash
echo "uv $*" >>"$LOG"
mkdir -p "${@: -1}/bin" && cp "$(dirname "$0")/python3" "${@: -1}/bin/python"
"""
# Stands in for nanofp8/config.py: the tests are about what run.sh does with its answers.
CONFIG = r"""
import os, sys
def check_command_line(path, argv):
    assert os.path.exists(path)
    if "--help" in argv:
        print("rank", os.environ.get("RANK"), "all flags")
        sys.exit(0)
    if "--wrong=1" in argv:
        print("train.py: error: unknown flag --wrong", file=sys.stderr)
        sys.exit(2)
"""
CPU_PARTS = 3  # of requirements-cpu.txt, each with its own pip call
GPU_PARTS = 6  # of requirements.txt

ALONE = "--standalone --local_addr=127.0.0.1"  # torchrun's options for one machine


class Host:
    """A copy of the project's folder on a machine made of fakes."""

    def __init__(self, tmp):
        self.tmp, self.repo, self.bin, self.stubs = tmp, tmp / "repo", tmp / "fake" / "bin", tmp / "stubs"
        for folder in (self.repo / "data", self.repo / "nanofp8", self.bin, self.stubs):
            folder.mkdir(parents=True)
        (self.repo / "nanofp8" / "config.py").write_text(CONFIG)
        for name in ("run.sh", "requirements.txt", "requirements-cpu.txt", "train.py", "nanofp8/cards.py"):
            shutil.copy(ROOT / name, self.repo / name)
        for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
            self.fake(name, PYTHON)
        self.fake("c++", "#!/bin/bash\n")
        self.fake("scontrol", "#!/bin/bash\nprintf '%s\\n' node7 node8\n")
        self.gpus(0)
        self.log = tmp / "log"
        real = subprocess.run([sys.executable, "-c", "import sys; print(sys._base_executable)"],
                              capture_output=True, text=True)
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(tmp), "LOG": str(self.log),
                    "STUBS": str(self.stubs), "REAL": real.stdout.strip(), "BASE": str(self.bin / "python3"),
                    "CPU_MAX": str(tmp / "no limit")}

    def fake(self, name, text, folder=None):
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def gpus(self, n, capability="9.0"):
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(n))
        asked = f"case $* in *compute_cap*) echo {capability}; exit ;; esac"
        self.fake("nvidia-smi", f"#!/bin/bash\n{asked}\n{lines or 'echo No devices were found; exit 6'}\n")
        return self

    def has(self, *modules):
        """Let every fake python import these modules."""
        for module in modules:
            path = self.stubs / (module.replace(".", "/") + ".py")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.touch()
        return self

    def command(self, *args):
        return ["bash", str(self.repo / "run.sh"), *args]

    def start(self, *args, **env):
        return subprocess.Popen(self.command(*args), env={**self.env, **env}, cwd=self.tmp, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *args, status=0, **env):
        """Run run.sh to its end and return what it printed. self.did: what the fakes were asked to do, a line each."""
        self.log.write_text("")
        done = subprocess.run(self.command(*args), env={**self.env, **env}, cwd=self.tmp, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
        self.did = self.log.read_text().splitlines()
        assert done.returncode == status, done.stdout
        return done.stdout

    def pips(self):
        return [line for line in self.did if " pip " in line]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def wait_for(condition, what):
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.02)


# Set-up


def test_a_gpu_without_nvidia_smi_is_no_reason_to_train_on_the_cpu(host):
    """As in a container that has the compute capability of the driver alone."""
    host.has("torch", "numpy")
    (host.bin / "nvidia-smi").unlink()
    device = host.tmp / "nvidia0"
    device.touch()
    if shutil.which("nvidia-smi", path=host.env["PATH"]):
        pytest.skip("this machine has one")
    out = host.run(status=1, NVIDIA_DEVICE=str(device))
    assert str(device) in out and "NVIDIA_DRIVER_CAPABILITIES" in out and "--preset=tiny" in out
    host.run("--preset=tiny", NVIDIA_DEVICE=str(device))
    host.run(NVIDIA_DEVICE=str(device), CUDA_VISIBLE_DEVICES="")


def test_cpu_setup_then_training(host):
    out = host.run("--max_iters=5", "--run_name=a b")
    assert host.did[0] == "fake venv"
    torch, rest, _ = host.pips()
    assert torch.endswith(" : torch==2.13.0") and "numpy" in rest and "transformer-engine" not in rest
    assert host.did[-1] == ".venv train.py --max_iters=5 --run_name=a b RANK="
    assert len(host.did) == 2 + CPU_PARTS  # and no data was fetched
    assert "making" in out and "installing torch" in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds of torch")
@pytest.mark.parametrize("answers", [True, False])
def test_cpu_index_is_used_if_it_answers(host, answers):
    out = host.run(**({"CPU_INDEX": "1"} if answers else {}))
    assert all(("--extra-index-url https://download.pytorch.org/whl/cpu" in line) == answers for line in host.pips())
    assert ("CPU index" in out) != answers


def test_gpu_setup_in_order(host):
    host.gpus(8).run()
    torch, tools, engine, rest, dion, dsl = host.pips()
    assert torch.endswith(" : torch==2.11.0")
    assert "wheel" in tools and "ninja" in tools
    assert engine.endswith("NVTE=1 : transformer-engine[core-cu13,pytorch]==2.20.2")
    assert ["--no-build-isolation" in line for line in host.pips()] == [False, False, True, False, False, False]
    assert "bitsandbytes" in rest and "git+https" in dion and "flash-attn-4" in dsl and "quack" in dsl
    assert all("-c .venv/part1.txt" in line for line in host.pips())  # nothing later moves torch
    assert not any("extra-index-url" in line for line in host.pips())
    assert host.did[-2] == ".venv data/cachedfineweb10b.py 9"
    assert host.did[-1].startswith(f".venv torchrun --nproc_per_node=8 {ALONE} train.py OMP=")


def test_gpu_setup_wants_a_compiler(host):
    out = host.gpus(1).run(status=1, NO_HEADERS="1")
    assert "g++ python3-dev" in out and not host.pips()


@pytest.mark.parametrize("driver, fine", [
    ("550.54.15", False), ("579.1", False), ("580.159.04", True), ("1000.1", True),
])  # fmt: skip
def test_gpu_setup_wants_a_driver_for_cuda_13(host, driver, fine):
    host.fake("nvidia-smi", f"#!/bin/bash\n[ $1 = -L ] && echo 'GPU 0: H100' || echo {driver}\n")
    out = host.run("--preset=tiny", status=0 if fine else 1)
    assert (driver in out) != fine and bool(host.pips()) == fine


def test_second_start_installs_nothing(host):
    host.run()
    out = host.run("--max_iters=1")
    assert host.did == [".venv train.py --max_iters=1 RANK="] and out == ""


def test_changed_requirements_are_installed(host):
    host.run()
    with open(host.repo / "requirements-cpu.txt", "a") as f:
        f.write("another\n")
    host.run()
    assert host.pips()[-1].endswith(" another")
    host.run()
    assert not host.pips()


def test_kernels_for_hopper_are_installed_on_hopper_only(host):
    host.gpus(1, "12.0").run("--preset=tiny")
    assert len(host.pips()) == GPU_PARTS - 1 and not any("flash-attn-4" in line for line in host.pips())


def test_gpu_environment_serves_a_machine_without_gpu(host):
    host.gpus(2).run("--dataset=shakespeare")
    host.gpus(0).run()
    assert host.did == [".venv train.py RANK="]


def test_cpu_environment_does_not_serve_a_gpu(host):
    host.run()
    host.gpus(1).run("--preset=tiny")
    assert len(host.pips()) == GPU_PARTS


def test_dion_may_fail(host):
    out = host.gpus(1).run("--preset=tiny", FAIL="dion")
    assert "pip install -r .venv/part5.txt" in out
    assert host.did[-1] == ".venv train.py --preset=tiny RANK="
    host.run("--preset=tiny")
    assert not host.pips()


def test_other_failures_end_the_setup_and_are_repaired(host):
    out = host.run(status=1, FAIL="numpy")
    assert "no route to host" in out and "run the same command again" in out.splitlines()[-1]
    assert not any("train.py" in line for line in host.did)
    (host.repo / ".venv" / "broken").touch()
    host.run()
    assert len(host.pips()) == CPU_PARTS and not (host.repo / ".venv" / "broken").exists()


def test_a_pip_that_installs_for_the_user_installs_here(host):
    """PIP_USER=1, and `user = true` in a pip.conf, which the same variable overrides."""
    host.run(PIP_USER="1")
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == ".venv train.py RANK="


def test_versions_of_an_image_are_not_for_its_own_environment(host):
    """NVIDIA's PyTorch images set PIP_CONSTRAINT. The command that run.sh names for a retry does not use it either."""
    env = {"PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
    out = host.run(**env)
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == ".venv train.py RANK="
    assert out.count("PIP_CONSTRAINT is not used") == 1
    assert host.run(**env) == ""  # nothing is installed
    out = host.gpus(1).run("--preset=tiny", FAIL="dion", **env)
    retry = re.search(r"to retry: (.* -r \S+)", out)[1]
    subprocess.run(["bash", "-c", retry], env=host.env | env | {"PIP_USER": "0"}, cwd=host.repo, check=True)


def test_what_pip_has_installed_is_tried(host):
    """pip may have put it elsewhere, and a library may be missing. Without torch, the next start installs again."""
    out = host.run(status=1, NO_TORCH="1")
    assert "libtorch.so" in out and "pip config list" in out and len(host.pips()) == 1
    host.run()
    assert len(host.pips()) == CPU_PARTS and host.did[-1].startswith(".venv train.py")
    out = host.gpus(1).run("--dataset=shakespeare", NO_TE="1")
    assert "GLIBCXX" in out and "emulated" in out and host.did[-1].startswith(".venv train.py")
    assert host.run("--dataset=shakespeare") == "" and host.pips() == []


@pytest.mark.parametrize("name", ["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"])
def test_pip_installs_into_its_own_environment(host, name):
    path = host.bin / "python3"
    path.write_text(path.read_text().replace("NVTE=", f"{name}=${{{name}:-}} ninja=${{PATH%%:*}} NVTE="))
    host.run(**{name: "/elsewhere"})
    assert len(host.pips()) == CPU_PARTS
    assert all(f"{name}= ninja={host.repo}/.venv/bin " in line for line in host.pips())


def test_an_environment_is_for_one_kind_of_processor(host):
    """Folders may be shared by x86 and ARM machines, whose Pythons have the same name and version."""
    host.run()
    (host.stubs / "platform.py").write_text("def machine(): return 'aarch64'\n")
    host.run()
    assert len(host.pips()) == CPU_PARTS
    host.run()
    assert host.pips() == []


def test_packages_on_pythonpath_are_installed_nevertheless(host):
    """They need not be there at the next start. Nor does a pip there count as .venv's. Training sees PYTHONPATH."""
    path = host.bin / "python3"
    path.write_text(path.read_text().replace("RANK=${RANK:-}", "$PYTHONPATH RANK=${RANK:-}"))
    env = {"PYTHONPATH": str(host.tmp / "site")}
    host.run(**env)
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == f".venv train.py {env['PYTHONPATH']} RANK="
    shutil.rmtree(host.repo / ".venv")
    host.fake("uv", "#!/bin/bash\nexit 1\n")
    assert "with venv and pip" in host.run(status=1, NO_PIP="1", **env)


def test_broken_python_in_venv_is_repaired(host):
    host.run()
    (host.repo / ".venv/bin/python").unlink()
    host.run()
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == ".venv train.py RANK="


def test_activated_unfinished_venv_is_not_trusted(host):
    host.run(status=1, FAIL="numpy")
    host.has("torch", "numpy")  # as pip left it
    venv = host.repo / ".venv"
    (venv / "bin" / "python3").symlink_to("python")
    env = {"VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{host.env['PATH']}"}
    host.run(**env)
    assert len(host.pips()) == CPU_PARTS
    host.run(**env)
    assert host.did == [".venv train.py RANK="]


@pytest.mark.parametrize("sig, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_setup(host, sig, status):
    process = host.start(HANG="numpy")
    pid = Path(f"{host.log}.pid")
    wait_for(lambda: pid.exists() and pid.read_text().strip(), "pip")
    process.send_signal(sig)  # to run.sh alone
    out = process.communicate(timeout=15)[0]
    assert process.returncode == status, out
    assert "run the same command again" in out

    def gone():
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid.read_text().strip()}/stat")  # a zombie where nothing reaps orphans
        return stat.exists() and stat.read_text().split()[2] == "Z"

    wait_for(gone, "pip's child to end")
    (host.repo / ".venv" / "half").touch()
    host.run()
    assert len(host.pips()) == CPU_PARTS and not (host.repo / ".venv" / "half").exists()


def test_a_file_system_without_locks(host):
    """flock's status is 1 only where another process holds the lock."""
    host.fake("flock", '#!/bin/bash\necho "flock: 9: Function not implemented" >&2; exit 71\n')
    assert "waiting" not in host.run() and len(host.pips()) == CPU_PARTS and host.did[-1].startswith(".venv train.py")


@pytest.mark.skipif(shutil.which("flock", path="/usr/bin:/bin") is None, reason="no flock")
def test_two_starts_set_up_once(host):
    host.fake("flock", '#!/bin/bash\n/usr/bin/env -i /usr/bin/flock "$@" || { s=$?; touch "$LOG.waits"; exit $s; }\n')
    first = host.start(HANG="numpy")
    pid = Path(f"{host.log}.pid")
    wait_for(lambda: pid.exists() and pid.read_text().strip(), "pip")
    second = host.start()
    wait_for(Path(f"{host.log}.waits").exists, "the second start")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert first.wait(15) == 0 and second.wait(15) == 0
    assert "waiting" in second.stdout.read() and "waiting" not in first.stdout.read()
    assert sum(" pip " in line for line in host.log.read_text().splitlines()) == CPU_PARTS


def test_uv_where_python_has_no_venv(host):
    host.fake("uv", UV)
    host.run(NO_VENV="1")
    assert host.did[1].startswith("uv venv") and "--seed" in host.did[1]
    assert f"--python {host.bin}/python3" in host.did[1]
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == ".venv train.py RANK="


def test_uv_brings_a_python(host):
    host.fake("uv", UV)
    host.run(OLD="1")
    assert "--python 3.12" in host.did[0] and len(host.pips()) == CPU_PARTS


def test_neither_venv_nor_uv(host):
    host.fake("uv", "#!/bin/bash\nexit 1\n")
    assert "apt install python3-venv" in host.run(status=1, NO_VENV="1")


def test_a_colon_in_the_path_of_the_folder(host):
    """Python's venv refuses it since 3.11. uv takes it, and an environment that is there is used."""
    host.repo = host.repo.rename(host.tmp / "12:30")
    uv = host.fake("uv", "#!/bin/bash\nexit 1\n")
    out = host.run(status=1).splitlines()
    assert "contains ':'" in out[-1] and "rename or move" in out[-1] and out[-1].endswith(f"{host.repo.resolve()}")
    assert len(out) == 2 and "making" in out[0]
    assert "apt install python3-venv" in host.run(status=1, OLD="1")  # there is no Python that could refuse
    uv.write_text(UV)
    host.run()
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == ".venv train.py RANK="
    host.has("torch", "numpy").run()
    assert host.did == ["fake train.py RANK="]


# The doctor

@pytest.mark.parametrize("command", [["doctor", "--preset=d12"], ["--preset=d12", "--doctor"], ["doctor", "--doctor"],
                                     ["--doctor=1"]])  # train.py refuses the last
def test_doctor_changes_nothing(host, command):
    """The Python that is here answers; nothing is installed, downloaded or made, not even a lock."""
    before = sorted(host.repo.rglob("*"))
    out = host.gpus(2).run(*command, status=1, STATUS="1")
    rest = " ".join(word for word in command if word != "doctor")
    assert host.did == [f"fake train.py --doctor {rest} RANK= of 2, 2 here"] and out == ""
    assert sorted(host.repo.rglob("*")) == before


def test_doctor_takes_the_python_that_would_train(host):
    host.run()
    host.run("doctor")
    assert host.did == [".venv train.py --doctor RANK= of 1, 1 here"]
    host.gpus(8).run("doctor", NNODES="2", NODE_RANK="0", MASTER_ADDR="node7")  # .venv lacks Transformer Engine
    assert host.did == [".venv train.py --doctor RANK= of 16, 8 here"]
    host.has("torch", "numpy", "transformer_engine.pytorch").run("doctor")
    assert host.did == ["fake train.py --doctor RANK= of 8, 8 here"]


def test_doctor_says_what_is_wrong_with_a_gpu(host):
    """run.sh does not end before it, as it does before training."""
    host.fake("nvidia-smi", "#!/bin/bash\necho NVML: Driver/library version mismatch; exit 18\n")
    host.run("doctor")
    assert host.did == ["fake train.py --doctor RANK= of 1, 1 here"]
    assert "driver" in host.run(status=1)


# A python that is there already


def test_existing_python_is_used_as_it_is(host):
    out = host.has("torch", "numpy").run("--max_iters=1")
    assert host.did == ["fake train.py --max_iters=1 RANK="] and out == ""
    assert not (host.repo / ".venv").exists()


def test_existing_python_with_gpu_needs_transformer_engine(host):
    host.gpus(1).has("torch", "numpy").run("--preset=tiny")
    assert len(host.pips()) == GPU_PARTS
    shutil.rmtree(host.repo / ".venv")
    host.has("transformer_engine.pytorch", "transformer_engine.__init__").run("--preset=tiny")
    assert host.did == ["fake train.py --preset=tiny RANK="]


@pytest.mark.parametrize("version, usable", [("2.16.1", False), ("2.14.0+3b1d2c9", False), ("2.17.0", True),
                                             ("2.20.2", True), ("3.0", True)])
def test_existing_python_with_another_transformer_engine(host, version, usable):
    """One that is too old is named, and run.sh makes its own environment."""
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch")
    (host.stubs / "transformer_engine" / "__init__.py").write_text(f"__version__ = '{version}'")
    out = host.run("--preset=tiny")
    assert (len(host.pips()) == 0) == usable and (version in out and "2.17" in out) == (not usable)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("version, usable", [("2.9.1", False), ("2.10.0", True)])
def test_existing_python_with_another_torch(host, gpus, version, usable):
    """One that is too old is named, and run.sh makes its own environment."""
    host.gpus(gpus).has("torch", "numpy", "transformer_engine.pytorch")
    (host.stubs / "torch.py").write_text(f"__version__ = '{version}'")
    out = host.run("--preset=tiny")
    assert (len(host.pips()) == 0) == usable and (version in out and "2.10" in out) == (not usable)


def test_existing_python_whose_torch_does_not_import(host):
    host.has("numpy")
    (host.stubs / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    out = host.run()
    assert "libcudart.so.13" in out and len(host.pips()) == CPU_PARTS


def test_existing_python_without_numpy(host):
    out = host.has("torch").run(status=1)
    assert len(out.splitlines()) == 1 and "numpy" in out and host.did == []


def test_existing_python_without_pytest(host):
    host.has("torch", "numpy")
    assert "no pytest" in host.run("test", status=1)
    host.run()


def test_named_python(host):
    other = host.fake("python", PYTHON, host.tmp / "other" / "bin")
    host.has("torch", "numpy").run(PYTHON=str(other))
    assert host.did == ["other train.py RANK="]
    host.run(VIRTUAL_ENV=str(host.tmp / "other"))
    assert host.did == ["other train.py RANK="]
    assert "PYTHON=/no/such/python" in host.run(status=1, PYTHON="/no/such/python")


@pytest.mark.parametrize("command", [[], ["setup"], ["doctor"], ["test"], ["--help"]])
@pytest.mark.parametrize("text", ["exit 0", 'echo "$*"', "echo False", "exit 1"])  # true, echo, an old Python, false
def test_named_python_that_is_none(host, command, text):
    """It is not taken for one that has done its work, and no other is taken instead."""
    host.fake("python", f"#!/bin/bash\n{text}\n", host.tmp / "other" / "bin")
    named = f"{host.tmp}/other/bin/python"
    out = host.has("torch", "numpy").run(*command, status=1, PYTHON=named)
    assert out.count("\n") == 1 and f"PYTHON={named}" in out and "3.10 or newer" in out and host.did == []


def test_venv_is_made_from_named_python(host):
    other = host.fake("python", PYTHON, host.tmp / "other" / "bin")
    host.run(PYTHON=str(other))
    assert host.did[0] == "other venv"


def test_venv_of_someone_else_is_left_alone(host):
    host.fake("python", PYTHON, host.repo / ".venv" / "bin")
    assert "activate it or remove it" in host.run(status=1)
    assert host.did == [] and (host.repo / ".venv/bin/python").exists()
    host.has("torch", "numpy").run(VIRTUAL_ENV=str(host.repo / ".venv"))
    assert host.did == [".venv train.py RANK="]


# Start


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5", "", "08", "2 3"])
def test_bad_nproc(host, bad):
    out = host.has("torch", "numpy").run(status=2, NPROC=bad)
    assert len(out.splitlines()) == 1 and "NPROC" in out and host.did == []


def test_more_processes_than_gpus(host):
    assert "NPROC=3" in host.gpus(2).run(status=2, NPROC="3")


def test_nproc(host):
    host.has("torch", "numpy").run("--seed=1", NPROC="3")
    assert host.did[0].startswith(f"fake torchrun --nproc_per_node=3 {ALONE} train.py --seed=1 OMP=")
    host.run(NPROC="2", OMP_NUM_THREADS="5")
    assert host.did[0].endswith(" OMP=5")


def test_commands_for_one_machine_need_no_host_name():
    """torchrun looks the machine's own name up unless it has an address: where it does not resolve, it hangs."""
    lines = [line for path in [*ROOT.glob("*.py"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
             for line in path.read_text(encoding="utf-8").splitlines() if "torchrun --standalone" in line]
    assert len(lines) >= 6 and all(f"torchrun {ALONE} " in line for line in lines), lines


def test_threads_of_several_processes_follow_the_cores_that_they_may_use(host):
    """getconf counts all of the machine's; nproc those of the affinity mask, as of a job on a shared node."""
    host.fake("nproc", "#!/bin/bash\necho 12\n")
    host.fake("getconf", "#!/bin/bash\necho 64\n")
    host.has("torch", "numpy").run(NPROC="3")
    assert host.did[0].endswith(" OMP=4")
    (host.bin / "cpu.max").write_text("750000 100000\n")
    host.run(NPROC="3", CPU_MAX=host.bin / "cpu.max")  # 7.5 cores' time
    assert host.did[0].endswith(" OMP=2")
    host.run(CPU_MAX=host.bin / "cpu.max")
    assert host.did == ["fake train.py RANK= OMP=8"]
    (host.bin / "cpu.max").write_text("max 100000\n")
    host.run(NPROC="3", CPU_MAX=host.bin / "cpu.max")
    assert host.did[0].endswith(" OMP=4")
    host.fake("nproc", "#!/bin/bash\nexit 127\n")  # macOS has none
    host.run(NPROC="4")
    assert host.did[0].endswith(" OMP=16")


def test_fewer_cores_than_processes_are_said(host):
    """srun of Slurm 22.05 gives one core unless it is told again."""
    host.fake("nproc", "#!/bin/bash\necho 1\n")
    out = host.gpus(8).has("torch", "numpy", "transformer_engine.pytorch").run("--dataset=shakespeare")
    assert "1 core" in out and "8 processes" in out and "--cpus-per-task" in out
    assert "SRUN_CPUS_PER_TASK" in (ROOT / "examples" / "slurm.sh").read_text()


def test_one_process_takes_no_ranks_from_outside(host):
    host.has("torch", "numpy").run(RANK="3", WORLD_SIZE="4")
    assert host.did == ["fake train.py RANK="]


@pytest.mark.parametrize("visible, processes", [
    ("2,3", 2), ("5", 1), ("", 1), ("0,1,-1,2", 2), ("0,1,9,2", 2), ("GPU-0,GPU-1", 2), ("0,1,", 2), ("-1", 1),
    ("0, 1", 2), (" 0 ,1", 2), ("0 1", 1), ("none", 1),
])  # fmt: skip
def test_visible_gpus(host, visible, processes):
    """As CUDA counts them: up to the first entry that is not a GPU."""
    host.gpus(8).has(*SETTLED)
    host.run("--dataset=shakespeare", CUDA_VISIBLE_DEVICES=visible)
    assert ("--nproc_per_node=2" in host.did[0]) == (processes == 2) and ("torchrun" in host.did[0]) == (processes > 1)


def test_a_gpu_that_does_not_answer_stops_training_unless_the_cpu_is_meant(host):
    host.has("torch", "numpy").fake("nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed: no driver' >&2; exit 9\n")
    out = host.run(status=1)
    assert "NVIDIA-SMI has failed" in out and "--preset=tiny" in out and host.did == []
    for visible in ("0", "GPU-1"):  # Slurm sets it in every job
        assert "NVIDIA-SMI has failed" in host.run(status=1, CUDA_VISIBLE_DEVICES=visible) and host.did == []
    for arguments, env in ((["--preset=tiny"], {}), *(([], dict(CUDA_VISIBLE_DEVICES=v)) for v in ("", "NoDevFiles"))):
        host.run(*arguments, **env)
        assert host.did[-1].startswith("fake train.py")
    host.gpus(0).run()  # nvidia-smi without a GPU: a login node
    assert host.did == ["fake train.py RANK="]


SETTLED = ("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
ON_TWO = "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-1)'"


def smi(host, script):
    host.fake("nvidia-smi", f"#!/bin/bash\ncase $* in *compute_cap*) echo 9.0; exit ;; esac\n{script}\n")
    return host.has(*SETTLED)


def test_a_driver_that_hangs_is_one_line(host):
    """The fake of `timeout` stands for 60 s."""
    host.has("torch", "numpy").fake("timeout", '#!/bin/bash\n[ "$3" != nvidia-smi ] || exit 124\n"${@:3}"\n')
    host.fake("nvidia-smi", "#!/bin/bash\nexec sleep 60\n")
    out = host.run(status=1)
    assert "no answer in 60 s" in out and "--preset=tiny" in out and out.count("\n") == 1 and host.did == []


def test_a_damaged_inforom_is_a_warning_only(host):
    """nvidia-smi says it before the list, and returns 14."""
    smi(host, f"echo 'WARNING: infoROM is corrupted at gpu 0000:01:00.0'; {ON_TWO}; exit 14")
    host.run("--dataset=shakespeare")
    assert "--nproc_per_node=2" in host.did[0]


def test_a_lost_gpu_is_named_and_the_others_can_train(host):
    smi(host, f"{ON_TWO}; echo 'Unable to determine the device handle for GPU2: GPU is lost'; exit 15")
    out = host.run("--dataset=shakespeare", status=1)
    assert "GPU2: GPU is lost" in out and "CUDA_VISIBLE_DEVICES" in out and host.did == []
    host.run("--dataset=shakespeare", CUDA_VISIBLE_DEVICES="0,1")
    assert "--nproc_per_node=2" in host.did[0]


@pytest.mark.parametrize("visible", ["all", '"0,1"', "cuda:0"])
def test_visible_devices_that_name_no_gpu(host, visible):
    """Training on the CPU would be a surprise."""
    out = host.gpus(2).has(*SETTLED).run(status=1, CUDA_VISIBLE_DEVICES=visible)
    assert f"CUDA_VISIBLE_DEVICES={visible} names no GPU" in out and "0,1" in out and host.did == []
    host.gpus(0).run(CUDA_VISIBLE_DEVICES=visible)  # there is none to name
    assert host.did == ["fake train.py RANK="]


def test_one_part_of_a_divided_gpu_is_used(host):
    """CUDA shows a process one MIG device."""
    smi(host, ON_TWO.replace("; echo", "; echo '  MIG 3g.40gb Device 0: (UUID: MIG-1)'; echo"))
    assert "MIG" in host.run("--dataset=shakespeare") and host.did == ["fake train.py --dataset=shakespeare RANK="]
    assert "MIG" in host.run("--dataset=shakespeare", CUDA_VISIBLE_DEVICES="MIG-1,MIG-2")
    assert host.did == ["fake train.py --dataset=shakespeare RANK="]
    assert "MIG" not in host.run("--dataset=shakespeare", CUDA_VISIBLE_DEVICES="0,1")  # the user knows
    assert "--nproc_per_node=2" in host.did[0]


def test_how_run_sh_must_be_started(host, tmp_path):
    """Not by another shell, not from its text, and not as a copy, which sbatch makes."""
    text = (host.repo / "run.sh").read_text()
    for command in (["bash"], ["bash", "-c", text]):
        done = subprocess.run(command, input=text, env=host.env, capture_output=True, text=True, cwd=host.repo)
        assert done.returncode == 2 and "bash run.sh" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    if shutil.which("dash"):
        done = subprocess.run(["dash", "run.sh"], env=host.env, capture_output=True, text=True, cwd=host.repo)
        assert done.returncode == 2 and "bash run.sh" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "slurm_script").write_text(text)
    done = subprocess.run(["bash", tmp_path / "spool" / "slurm_script"], env=host.env, capture_output=True, text=True)
    assert done.returncode == 2 and "sbatch --wrap" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["slurm_script"]


@pytest.mark.parametrize("env", [dict(PET_NNODES="2"), dict(OMPI_COMM_WORLD_SIZE="4")])
def test_one_start_of_many_is_no_run_of_its_own(host, env):
    out = host.has("torch", "numpy").run(status=2, **env)
    assert all(name in out for name in ("NNODES", "NODE_RANK", "MASTER_ADDR")) and host.did == []
    host.run(NNODES="2", NODE_RANK="0", MASTER_ADDR="a", **env)
    assert "--nnodes=2" in host.did[0]


ONE_STEP = dict(SLURM_STEP_NUM_NODES="1", SLURM_STEP_NUM_TASKS="1")


@pytest.mark.parametrize("env, alone", [
    (dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="10.0.0.1"), False), (dict(NODE_RANK="1"), False),
    (dict(NODE_RANK="0", MASTER_ADDR="10.0.0.1"), False), (dict(RDZV_ENDPOINT="10.0.0.1:29400"), False),
    (dict(NODE_RANK="0"), True), (dict(WORLD_SIZE="4"), True), (dict(MASTER_ADDR="localhost", WORLD_SIZE="1"), True),
    (dict(NODE_RANK="0", MASTER_ADDR="10.0.0.1", WORLD_SIZE="1"), True),
    (dict(WORLD_SIZE="2", MASTER_ADDR="10.0.0.1", **ONE_STEP), True),
    (dict(NODE_RANK="1", MASTER_ADDR="10.0.0.1", **ONE_STEP), False)])
def test_variables_of_several_machines_without_their_number(host, env, alone):
    """As platforms set them, or with NNODES forgotten: each machine would train alone, without a word."""
    out = host.has("torch", "numpy", "pytest").run(status=0 if alone else 2, **env)
    assert host.did == ["fake train.py RANK="] * alone and ("NNODES" in out) != alone
    for command in ("test", "doctor"):
        host.run(command, **env)
    host.run(**env | dict(NNODES="1", NODE_RANK="0"))
    assert not any("--nnodes" in line for line in host.did)


def test_variables_of_others_that_would_change_torchrun_or_python(host):
    host.has("torch", "numpy")
    path = host.bin / "python3"
    path.write_text(path.read_text().replace("RANK=${RANK:-}", "${!PET_@}$PYTHONSAFEPATH RANK=${RANK:-}"))
    host.run(PET_NPROC_PER_NODE="8", PET_STANDALONE="1", PYTHONSAFEPATH="1")
    assert host.did == ["fake train.py  RANK="]


def test_no_temporary_folder_for_several_processes(host):
    out = host.has("torch", "numpy").run(status=1, NPROC="2", TMPDIR=str(host.tmp / "none"))
    assert str(host.tmp / "none") in out and "set TMPDIR" in out


def test_gpus_that_are_too_old_get_one_line_before_anything_is_installed(host):
    out = host.gpus(2, capability="7.5").run(status=1)
    assert "7.5" in out and "8.0" in out and "--preset=tiny" in out and host.did == []
    host.run("--preset=tiny")  # on the CPU, with the packages for it
    assert len(host.pips()) == CPU_PARTS and host.did[-1].startswith(".venv train.py")
    host.gpus(1, capability="12.0").run("--dataset=shakespeare")
    assert len(host.pips()) == GPU_PARTS - 1  # no flash-attn-4: not Hopper


def test_a_folder_that_cannot_be_written_is_one_line(host):
    (host.repo / ".setup.lock").mkdir()  # root could write to a folder without permissions
    out = host.run(status=1)
    assert "cannot be written" in out and "line" not in out


def test_a_folder_that_cannot_be_written_and_has_all_can_train(host):
    """As of an installation that several users share."""
    (host.repo / ".setup.lock").mkdir()
    folder = host.repo / "data" / "fineweb10B"
    folder.mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        (folder / name).write_text("x")
    (folder / "download.json").write_text('{"train_shards": 1, "revision": null}')
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch").run("--out_dir=/elsewhere")
    assert host.did == ["fake train.py --out_dir=/elsewhere RANK="]
    (folder / "fineweb_val_000000.bin").unlink()
    assert "cannot be written" in host.run("--out_dir=/elsewhere", status=1)


def test_a_link_to_run_sh_runs_the_project(host):
    link = host.tmp / "elsewhere.sh"
    link.symlink_to(host.repo / "run.sh")
    host.has("torch", "numpy")
    done = subprocess.run(["bash", str(link)], env=host.env, cwd=host.tmp, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_several_machines(host):
    out = host.has("torch", "numpy").run("--seed=1", NPROC="2", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert "machine 1 of 2: training is reported on machine 0, 10.0.0.1" in out  # else its shell would say nothing
    assert host.did[0].startswith("fake torchrun --nproc_per_node=2 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 "
                                  "--master_port=29500 train.py --seed=1 ")
    host.run(NNODES="2", RDZV_ENDPOINT="h:1", RDZV_ID="7")
    assert "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=h:1 --rdzv_id=7 train.py" in host.did[0]
    host.run(NNODES="1")
    assert f"--nproc_per_node=1 {ALONE} train.py" in host.did[0]


@pytest.mark.parametrize("name, value", [
    ("NPROC", "99999999999999999999"), ("NPROC", "9999999999"), ("MAX_RESTARTS", "99999999999999999999"),
    ("NNODES", "99999999999999999999"), ("MASTER_ADDR", "10.0.0.1:29500"), ("MASTER_ADDR", "a b"),
    ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "abc")])
def test_numbers_and_addresses_that_cannot_be(host, name, value):
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"} | {name: value}
    out = host.has("torch", "numpy").run(status=2, **env)
    assert len(out.splitlines()) == 1 and name in out and value in out and host.did == []


def test_an_ipv6_address_of_the_first_machine(host):
    host.has("torch", "numpy").run(NNODES="2", NODE_RANK="0", MASTER_ADDR="fd00::1")
    assert "--master_addr=fd00::1" in host.did[0]


@pytest.mark.parametrize("env", [{"NNODES": "2"}, {"NNODES": "2", "NODE_RANK": "0"}, {"NNODES": "x"}])
def test_several_machines_without_a_meeting_point(host, env):
    out = host.run(status=2, **env)
    assert len(out.splitlines()) == 1 and "NNODES" in out


@pytest.mark.parametrize("name, bad", [
    ("NODE_RANK", "2"), ("NODE_RANK", "-1"), ("NODE_RANK", "x"), ("NODE_RANK", "1.5"), ("NODE_RANK", "01"),
    ("NODE_RANK", "9" * 20), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"), ("MASTER_PORT", "-5"),
    ("MASTER_PORT", "http"), ("MASTER_PORT", "9" * 20),
])  # fmt: skip
@pytest.mark.parametrize("command", [[], ["doctor"]])
def test_several_machines_with_a_wrong_number(host, command, name, bad):
    """Told at once, before anything is installed or started."""
    out = host.run(*command, status=2, **{"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node7", name: bad})
    assert out.count("\n") == 1 and name in out and f"'{bad}'" in out and host.did == []
    assert {"NODE_RANK": "0 to 1", "MASTER_PORT": "1 to 65535"}[name] in out


def test_several_machines_with_a_port(host):
    host.has("torch", "numpy").run(NNODES="2", NODE_RANK="1", MASTER_ADDR="node7", MASTER_PORT="65535")
    assert "--node_rank=1 --master_addr=node7 --master_port=65535 train.py" in host.did[0]


def test_slurm(host):
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123",
            "SLURM_STEP_NODELIST": "node[7-8]"}
    host.has("torch", "numpy").run(NPROC="4", **step)
    assert ("--nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=node7 --master_port=20123 --rdzv_id=123.0 "
            "train.py") in host.did[0]
    assert "--ntasks-per-node=1" in host.run(status=2, **{**step, "SLURM_STEP_NUM_TASKS": "16"})
    assert "--ntasks-per-node=1" in host.run(status=2, **{**step, "SLURM_STEP_NUM_NODES": "1"})  # two runs otherwise
    host.run(**{**step, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"})
    assert host.did == ["fake train.py RANK="]
    host.fake("scontrol", "#!/bin/bash\nexit 1\n")
    assert "MASTER_ADDR" in host.run(status=2, **step)


def test_exit_status_comes_through(host):
    host.has("torch", "numpy", "pytest").run(status=3, STATUS="3")
    host.run(status=4, STATUS="4", NPROC="2")
    host.run("test", status=5, STATUS="5")


def test_signal_reaches_training(host):
    process = host.has("torch", "numpy").start(TRAIN_WAITS="1")
    wait_for(lambda: host.log.exists() and "train.py" in host.log.read_text(), "training")
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 7 and "train got TERM" in host.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("safe", [True, False])
def test_a_signal_to_several_processes(host, number, safe):
    """torchrun gets it once and returns 1. That becomes 0 only if the workers left a file that says they ended well."""
    outside = host.tmp / "outside"
    outside.touch()  # the file of another run must not count
    env = {"NPROC": "2", "TRAIN_WAITS": "1", "ENDED_WELL": str(outside)} | ({"SAFE": "1"} if safe else {})
    process = host.has("torch", "numpy").start(**env)
    wait_for(lambda: host.log.exists() and "torchrun" in host.log.read_text(), "torchrun")
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(15) == (0 if safe else 1)
    heard = "INT" if number == signal.SIGINT else "TERM"
    assert [line for line in host.log.read_text().splitlines() if "got" in line] == [f"fake torchrun got {heard}"]


def fake_torchrun(host, main):
    """Let run.sh start its own program with a stand-in for torchrun, whose main() has this body."""
    path = host.bin / "python3"
    path.write_text(path.read_text().replace("from torch.distributed.run import main", "no such program"))
    host.has("torch.__init__", "torch.distributed.__init__", "torch.distributed.elastic.__init__", "numpy",
             "torch.distributed.elastic.multiprocessing.__init__")
    folder = host.stubs / "torch" / "distributed"
    (folder / "elastic" / "multiprocessing" / "api.py").write_text("class SignalException(Exception): pass")
    (folder / "elastic" / "multiprocessing" / "errors.py").write_text(
        "class ChildFailedError(Exception):\n    def get_first_failure(self): return self.args")
    (folder / "run.py").write_text("def main():\n    " + main)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_batch_systems_signal_to_torchrun_itself_ends_nothing(host, number):
    """It may reach all processes of a job. torchrun's own part is a fake module here, which sends it to itself."""
    fake_torchrun(host, f"import os; os.kill(os.getpid(), {number:d}); print('all have trained')")
    assert host.run(NPROC="2") == "all have trained\n"


@pytest.mark.parametrize("code, status, words", [(-9, 1, ["rank 1", "SIGKILL", "memory"]), (2, 2, [])])
def test_a_rank_that_the_system_killed_is_named(host, code, status, words):
    """It could not say anything itself."""
    fake_torchrun(host, f"from types import SimpleNamespace as Failure\n"
                        f"    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError\n"
                        f"    raise ChildFailedError(1, Failure(exitcode={code}))")
    output = host.run(status=status, NPROC="2")
    assert all(word in output for word in words) and bool(output) == bool(words)


def test_a_failure_stays_one_without_a_signal(host):
    host.has("torch", "numpy").run(status=1, STATUS="1", SAFE="1", NPROC="2")


def test_restarts(host):
    host.has("torch", "numpy").run("--seed=1", NPROC="2", MAX_RESTARTS="3")
    assert f"{ALONE} --max_restarts=3 train.py --seed=1" in host.did[0]
    host.run(MAX_RESTARTS="1")  # one process needs torchrun too, to be restarted
    assert f"torchrun --nproc_per_node=1 {ALONE} --max_restarts=1 train.py" in host.did[0]
    host.run(MAX_RESTARTS="0")
    assert host.did == ["fake train.py RANK="]
    assert "MAX_RESTARTS" in host.run(status=2, MAX_RESTARTS="often")


def test_test_command(host):
    host.run("test", "-k", "a or b")
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == f".venv {host.repo.resolve()} pytest -k a or b"


@pytest.mark.parametrize("gpus, here, arguments", [(0, True, "-n 2 --dist loadgroup"), (0, False, ""), (1, True, "")])
def test_all_tests_in_two_processes(host, gpus, here, arguments):
    host.has("torch", "numpy", "pytest", "transformer_engine.pytorch")
    (host.stubs / "transformer_engine" / "__init__.py").write_text("__version__ = '2.20.2'")
    if here:
        host.has("xdist")
    host.gpus(gpus).run("test")
    assert host.did == [f"fake {host.repo.resolve()} pytest {arguments}"]


@pytest.mark.parametrize("gpus, flags, fetched", [
    (0, [], False), (2, [], True), (2, ["--dataset=shakespeare"], False),
])  # fmt: skip
def test_setup_command(host, gpus, flags, fetched):
    out = host.gpus(gpus).run("setup", *flags, NPROC="1")
    assert len(host.pips()) == (GPU_PARTS if gpus else CPU_PARTS)
    assert ("data/cachedfineweb10b.py" in host.did[-1]) == fetched and not any("train.py" in line for line in host.did)
    assert f"{host.repo.resolve()}/.venv/bin/python" in out
    host.run("setup", *flags)
    assert host.did == []
    assert "--wrong" in host.run("setup", "--wrong=1", status=2)


# Flags, checked before anything is set up


@pytest.mark.parametrize("env", [{}, {"NPROC": "8", "RANK": "3"}])
def test_help_sets_nothing_up(host, env):
    assert host.gpus(8).run("--max_iters=5", "--help", **env) == "rank None all flags\n"
    assert host.did == [] and not (host.repo / ".venv").exists()


def test_wrong_flag_sets_nothing_up(host):
    out = host.gpus(8).run("--wrong=1", status=2)
    assert out == "train.py: error: unknown flag --wrong\n"
    assert host.did == [] and not (host.repo / ".venv").exists()


def test_flags_are_checked_before_a_download(host):
    host.gpus(8).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
    assert "--wrong" in host.run("--wrong=1", status=2) and host.did == []


@pytest.mark.parametrize("config", [None, "raise ImportError", "def check_command_line(*args): 1 / 0"])
def test_flags_that_nothing_can_check_are_left_to_train_py(host, config):
    """Without a Python of 3.10, or if the check fails, run.sh prints nothing about it, and train.py answers."""
    if config:
        (host.repo / "nanofp8" / "config.py").write_text(config)
    host.fake("uv", UV)
    out = host.run("--wrong=1", OLD="" if config else "1")
    assert len(host.pips()) == CPU_PARTS and host.did[-1] == ".venv train.py --wrong=1 RANK=" and "rror" not in out
    host.run("--help", OLD="" if config else "1")
    assert host.did == [".venv train.py --help RANK="]  # no torchrun


def test_any_new_python_checks(host):
    host.fake("python3", "#!/bin/bash\necho too old >&2; exit 1\n")
    assert host.run("--help") == "rank None all flags\n"


@pytest.mark.skipif("def check_command_line" not in (ROOT / "nanofp8" / "config.py").read_text(),
                    reason="this nanofp8/config.py has no check_command_line")
def test_check_of_this_train_py(host):
    shutil.copy(ROOT / "nanofp8" / "config.py", host.repo / "nanofp8" / "config.py")
    assert "--max_iters=" in host.run("--help") and host.did == []
    out = host.run("--max_itres=5", status=2)
    assert "--max_iters" in out and out.count("\n") == 1 and host.did == []
    host.has("torch", "numpy").run("--max_iters=5", "--run_name=a b")
    assert host.did == ["fake train.py --max_iters=5 --run_name=a b RANK="]


# Data


@pytest.mark.parametrize("flags, fetched", [
    ([], True), (["--max_iters=3"], True), (["--dataset=shakespeare"], False), (["--data_dir=/mnt/shards"], False),
    (["--preset=tiny"], False), (["--preset=d12"], True), (["--dataset=shakespeare", "--dataset=fineweb10B"], True),
])  # fmt: skip
def test_which_flags_fetch_data(host, flags, fetched):
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__").run(*flags)
    assert ("fake data/cachedfineweb10b.py 9" in host.did) == fetched
    host.run(*flags)
    assert not any("cachedfineweb10b" in line for line in host.did)


@pytest.mark.parametrize("flags, saved, fetched", [
    (["--resume=auto"], "shakespeare", False), (["--resume=auto"], "fineweb10B", True), (["--resume=auto"], None, True),
    ([], "shakespeare", True), (["--resume="], "shakespeare", True),
])  # fmt: skip
def test_a_resumed_run_keeps_its_data(host, flags, saved, fetched):
    """A checkpoint's data set decides, where flags do not name another: train.py adopts it."""
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
    (host.repo / "train.py").write_text((ROOT / "train.py").read_text().partition("from typing")[0] + '''
dataset: str = "fineweb10B"
data_dir: str = "data"
resume: str = ""
def read_flags(argv):
    return argv
''')
    (host.repo / "nanofp8" / "resuming.py").write_text(f'''
def choose_checkpoint(argv):
    assert argv == {flags}
    return {saved and "step_000001"!r}, None
def read_checkpoint(folder):
    assert folder == "step_000001"
    return dict(flags=dict(dataset={saved!r}))
''')
    host.run(*flags)
    assert ("fake data/cachedfineweb10b.py 9" in host.did) == fetched


def test_a_file_of_another_name_is_no_train_shard(host):
    """Only files that training reads count: x_train_v2_val_000000.bin is a val shard, x_train_000001 (1).bin a copy."""
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
    folder = host.repo / "data" / "fineweb10B"
    folder.mkdir()
    for name in ("x_train_v2_val_000000.bin", "x_train_000001 (1).bin", "x_train_1.bin"):
        (folder / name).touch()
    host.run()
    assert "fake data/cachedfineweb10b.py 9" in host.did


def fineweb_of(host, asked, *names):
    """Give the host these files of FineWeb, and the record of a download of `asked` train shards (None: no record)."""
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
    folder = host.repo / "data" / "fineweb10B"
    folder.mkdir()
    for name in names:
        (folder / f"fineweb_{name}.bin").write_bytes(b"x")
    if asked is not None:
        (folder / "download.json").write_text(json.dumps({"train_shards": asked, "revision": "0" * 40}, indent=1))
    return host


@pytest.mark.parametrize("asked, names, fetched", [
    (9, ["val_000000", "train_000001"], 9), (2, ["train_000001", "train_000002"], 2), (3, [], 3), (None, [], 9),
    (2, ["val_000000", "train_000001", "train_000002"], None), (None, ["val_000000", "train_000001"], None),
    (1, ["val_000000", "train_000001", "train_000002"], None), (103, ["val_000000", "train_000002"], 103),
])  # fmt: skip
def test_a_download_that_was_broken_off_is_completed(host, asked, names, fetched):
    """It is completed up to what was asked for, and no more; without a record, nothing is added to what is there."""
    fineweb_of(host, asked, *names).run()
    assert host.did == [f"fake data/cachedfineweb10b.py {fetched}"] * bool(fetched) + ["fake train.py RANK="]


def test_a_download_that_cannot_be_completed(host):
    """Training runs on what is there and says so. setup, which exists to download, fails."""
    out = fineweb_of(host, 9, "val_000000", "train_000001", "train_000004").run(NO_NET="1")
    assert "2 of the 9 train shards" in out and host.did[-1] == "fake train.py RANK="
    assert "--dataset=shakespeare" in host.run("setup", status=1, NO_NET="1")
    (host.repo / "data" / "fineweb10B" / "fineweb_val_000000.bin").unlink()
    host.run(status=1, NO_NET="1")  # nothing to evaluate on
    assert host.did == ["fake data/cachedfineweb10b.py 9"]


def edit_flag(host, name, line):
    """Replace the line of a flag in the host's train.py."""
    path = host.repo / "train.py"
    text, count = re.subn(rf"^{name}\b[^=\n]*= .*$", line, path.read_text(), flags=re.M)
    assert count == 1
    path.write_text(text)


@pytest.mark.parametrize("name, lines, fetched", [
    ("dataset", ["dataset = 'shakespeare'", 'dataset = "shakespeare"  # or "fineweb10B"',
                 "dataset: str = 'shakespeare'", 'dataset : str="shakespeare"  # dataset = "fineweb10B"'], False),
    ("dataset", ["dataset = 'fineweb10B'", 'dataset: str = "fineweb10B"  # not "shakespeare", not \'x\''], True),
    ("data_dir", ['data_dir: FolderName = "/mnt/shards"  # "data" or another folder'], False),
    ("preset", ['preset = "tiny"', 'preset: Literal["auto", "d20", \'tiny\'] = "tiny"  # "auto": d20 or tiny'], False),
    ("preset", ['preset = "d12"', 'preset: Literal["auto", "d20", \'tiny\'] = "auto"  # "auto": d20 or "tiny"'], True),
])  # fmt: skip
def test_edited_train_py_decides_too(host, name, lines, fetched):
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
    for line in lines:
        edit_flag(host, name, line)
        host.run()
        assert host.did == ["fake data/cachedfineweb10b.py 9"] * fetched + ["fake train.py RANK="], line
        shutil.rmtree(host.repo / "data" / "fineweb10B", ignore_errors=True)


def test_failed_download_is_said(host):
    host.gpus(1).has("torch", "numpy", "transformer_engine.pytorch", "transformer_engine.__init__")
    assert "--dataset=shakespeare" in host.run(status=1, NO_NET="1")
    assert not any("train.py" in line for line in host.did)
