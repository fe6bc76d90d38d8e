#!/usr/bin/env bash
# Set up what is missing, then train: bash run.sh [--name=value ...]
#
#   bash run.sh --max_iters=50        train.py's flags; --help lists them
#   bash run.sh setup [--name=value ...]  make the environment and download the data that these flags need, then stop
#   bash run.sh test [-k name ...]    the tests, with pytest's arguments
#
# From the environment:
#   PYTHON      the python to use, or to make .venv from (default: the active environment's, else python3)
#   NPROC       processes on this machine (default: one for each GPU, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    several machines: start the same command on each
#   NNODES, RDZV_ENDPOINT, RDZV_ID                 the same, where torchrun is to number the machines
#   Under srun, with one task a machine, Slurm's own variables set these.
#   MAX_RESTARTS  how often torchrun starts all processes again when one has died (default 0); they go on from the
#                 newest checkpoint of their run
#
# SIGTERM and SIGINT to this script make training write a checkpoint and end: status 0 once that is safe.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null

say() { echo "run.sh: $*" >&2; }
die() { say "$1"; exit "${2:-1}"; }
positive() { case $2 in '' | 0* | *[!0-9]*) die "$1 must be a positive integer, not '$2'" 2 ;; esac; }

# What is installed follows the GPUs in the machine; what runs follows those that may be used.
machine_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
case ${CUDA_VISIBLE_DEVICES-all} in
  all) gpus=$machine_gpus ;;
  '' | -* | NoDevFiles) gpus=0 ;;
  *) gpus=${CUDA_VISIBLE_DEVICES//[^,]/} && gpus=$((machine_gpus > 0 ? ${#gpus} + 1 : 0)) ;;
esac
requirements="requirements-cpu.txt"
[ "$machine_gpus" -eq 0 ] || requirements="requirements.txt"
NPROC=${NPROC-$((gpus > 0 ? gpus : 1))}
positive NPROC "$NPROC"
MAX_RESTARTS=${MAX_RESTARTS:-0}
[ "$MAX_RESTARTS" = 0 ] || positive MAX_RESTARTS "$MAX_RESTARTS"
[ "$gpus" -eq 0 ] || [ "$NPROC" -le "$gpus" ] || die "NPROC=$NPROC is more than the GPUs that may be used here: $gpus" 2

# Under srun every machine runs this script once; the step's first machine is the meeting point.
NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-} MASTER_ADDR=${MASTER_ADDR:-} RDZV_ENDPOINT=${RDZV_ENDPOINT:-}
if [ -z "$NNODES" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
  [ "${SLURM_STEP_NUM_TASKS:-1}" -le "$SLURM_STEP_NUM_NODES" ] ||
    die "srun starts several tasks a machine: use --ntasks-per-node=1, and NPROC for the processes" 2
  NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
  MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))} # jobs that share a machine keep apart
  [ -n "$MASTER_ADDR" ] || read -r MASTER_ADDR < <(scontrol show hostnames "${SLURM_STEP_NODELIST:-}" 2>/dev/null) || true
fi
[ -z "$NNODES" ] || positive NNODES "$NNODES"
if [ "${NNODES:-1}" -gt 1 ] && [ -z "$RDZV_ENDPOINT" ] && { [ -z "$NODE_RANK" ] || [ -z "$MASTER_ADDR" ]; }; then
  die "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR (machine 0), or RDZV_ENDPOINT" 2
fi

# Run a step of the set-up in a process group of its own, so that a signal to this script alone ends pip and its
# compilers too: bash by itself would go and leave them writing into .venv.
step() {
  local status=0
  trap 'stop 130' INT && trap 'stop 143' TERM HUP
  set -m
  "$@" </dev/null &
  set +m
  wait "$!" || status=$?
  trap - INT TERM HUP
  return "$status"
}
stop() {
  [ -z "${!:-}" ] || kill -TERM -- "-$!" 2>/dev/null || true
  wait
  die "set-up stopped; the next start does it again" "$1"
}
quiet() { "$@" >/dev/null 2>&1; }

# True if python $1 can train as it is. Modules are looked for first: importing them takes seconds.
usable() {
  "$1" -W ignore - "$gpus" >/dev/null <<'END'
import importlib.util, sys
if sys.version_info < (3, 10) or importlib.util.find_spec("torch") is None:
    sys.exit(1)
try:
    import torch
    if int(sys.argv[1]):
        import transformer_engine.pytorch
except Exception as error:
    reason = (str(error).strip() or repr(error)).splitlines()[-1]
    sys.exit(f"run.sh: {sys.executable} has torch but is not used as it is: {reason}")
END
}

# .venv/installed says what .venv holds (python's version, the requirements and their hash), or "unfinished".
key() {
  .venv/bin/python -c 'import hashlib, sys
print(sys.version.split()[0], sys.argv[1], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1" 2>/dev/null
}
# The GPU set holds the CPU set, so a .venv shared by machines with and without GPUs stays as it is.
complete() {
  grep -qsxF "$(key "$requirements")" .venv/installed || grep -qsxF "$(key requirements.txt)" .venv/installed
}

# Make an empty .venv with python's own venv and pip, or with uv, which needs neither and can bring a python.
make_venv() {
  local name base=''
  for name in "$python" python3 python3.12 python3.13 python3.11 python3.10; do
    base=$("$name" -c 'import sys; print(sys._base_executable if (3, 10) <= sys.version_info[:2] <= (3, 14) else "")' 2>/dev/null) || true
    [ -z "$base" ] || break
  done
  say "making $PWD/.venv"
  for name in venv uv; do
    rm -rf .venv && mkdir .venv && echo unfinished >.venv/installed
    case $name in
      venv) [ -z "$base" ] || step quiet "$base" -m venv .venv || true ;;
      uv) step quiet uv venv --seed --allow-existing --python "${base:-3.12}" .venv || true ;;
    esac
    if .venv/bin/python -m pip --version >/dev/null 2>&1; then return; fi
  done
  die "found no Python 3.10 to 3.14 with venv and pip (Debian, Ubuntu: apt install python3-venv) and no uv"
}

# Install the requirements by their numbered parts, in order, torch's pin (part 1) holding throughout.
install() {
  local part title option driver cpu_index='https://download.pytorch.org/whl/cpu'
  set -- -qq --disable-pip-version-check -c .venv/part1.txt
  if [ "$machine_gpus" -gt 0 ]; then
    # Compile Transformer Engine with the CUDA headers that come with torch, not with those of a toolkit of another
    # version, and without its expert parallelism, which is of no use here and needs more of them.
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 GIT_TERMINAL_PROMPT=0
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sort | sed -n 1p)
    case $driver in
      [1-4]??.* | 5[0-7]?.*) die "the NVIDIA driver, $driver, is older than 580, which CUDA 13 needs: update it, or give a python that has torch and transformer_engine (PYTHON=)" ;;
    esac
    if ! command -v c++ >/dev/null || ! .venv/bin/python -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null; then
      die "Transformer Engine and torch.compile need a C++ compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev)"
    fi
  elif [ "$(uname)" = Linux ]; then
    # PyPI's torch for Linux brings gigabytes of CUDA; PyTorch's own index has the same version as +cpu, which pip prefers.
    if timeout 5 .venv/bin/python -c "import urllib.request as r; r.urlopen('$cpu_index/torch/', timeout=3)" 2>/dev/null; then
      set -- "$@" --extra-index-url "$cpu_index"
    else
      say "PyTorch's CPU index does not answer: torch comes from pip's own sources, perhaps with CUDA along"
    fi
  fi
  for part in 1 2 3 4 5; do
    title=$(sed -n "s/^# $part\. //p" "$requirements")
    [ -n "$title" ] || break
    awk -v head="# $part. " '/^# [1-9]\. / { on = index($0, head) == 1 } on' "$requirements" >".venv/part$part.txt"
    option=--no-input
    [[ $title != *'no build isolation'* ]] || option=--no-build-isolation
    say "installing $title"
    step .venv/bin/python -m pip install "$@" "$option" -r ".venv/part$part.txt" && continue
    [[ $title == *optional* ]] || die "installing failed (pip says why above); the same command tries again"
    say "that failed, and training does without; to try again: .venv/bin/python -m pip install -r .venv/part$part.txt"
  done
  key "$requirements" >.venv/installed.new && mv .venv/installed.new .venv/installed
}

# Answer --help and wrong flags before anything is installed or downloaded, by the first Python of 3.10 or newer. Return
# if all flags are right, or if no such Python is here: train.py answers them too.
check_flags() {
  local name answer status code='
import sys
assert sys.version_info >= (3, 10)
try:
    from nanofp8.config import check_command_line
    check_command_line("train.py", sys.argv[1:])
except Exception:
    pass
sys.exit(100)
'
  for name in "$python" .venv/bin/python python3 python3.12 python3.13 python3.11 python3.10; do
    status=0
    answer=$("$name" -W ignore -c "$code" "$@" 2>&1) || status=$?
    case $status in
      0) printf '%s\n' "$answer"; exit 0 ;;     # --help
      2) printf '%s\n' "$answer" >&2; exit 2 ;; # a wrong flag
      100) return ;;
    esac
  done
}

# One set-up or download at a time in this folder; a second one waits (not on macOS, which has no flock).
lock() {
  command -v flock >/dev/null || return 0
  flock -n 9 || { say "another run.sh is setting up here; waiting for it" && flock 9; }
}

python=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
found=$(command -v "${python:=python3}" || true)
[ -n "$found" ] || [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not there"
unset RANK LOCAL_RANK WORLD_SIZE # of whatever started this script
command=train
case ${1:-} in setup | test) command=$1 && shift ;; esac
[ "$command" = test ] || check_flags "$@"
py=$PWD/.venv/bin/python
if [ -n "$found" ] && { [ ! -f .venv/installed ] || [ ! "${found%/*}" -ef .venv/bin ]; } && usable "$found"; then
  py=$found # not run.sh's own .venv, which must be complete
  for name in numpy $([ "$command" != test ] || echo pytest); do
    "$py" -c "import $name" 2>/dev/null || die "$py has torch but no $name: $py -m pip install $name"
  done
elif ! complete; then
  [ -f .venv/installed ] || [ ! -e .venv/bin/python ] || die "$PWD/.venv is not run.sh's: activate it or remove it"
  {
    lock
    complete || { make_venv && install; }
  } 9>.setup.lock
fi

[ "$command" != test ] || exec "$py" -m pytest "$@"
case " $* " in *' --help '* | *' -h '*) exec "$py" train.py --help ;; esac

# FineWeb is train.py's default with a GPU; on a CPU it trains on Shakespeare, which is there.
flag() { # print the value of flag $1 among the arguments that follow, else train.py's: name: type = "value"
  local name=$1 value arg
  value=$(sed -n "s/^$name *\(:[^=]*\)\{0,1\}= *[\"']\([^\"']*\)[\"'].*/\2/p" train.py | sed -n 1p)
  shift
  for arg in "$@"; do case $arg in "--$name="*) value=${arg#*=} ;; esac done
  echo "$value"
}
if [ "$gpus" -gt 0 ] && [ "$(flag dataset "$@") $(flag data_dir "$@")" = "fineweb10B data" ] && [ "$(flag preset "$@")" != tiny ]; then
  {
    lock
    compgen -G 'data/fineweb10B/*_train_*.bin' >/dev/null || step "$py" data/cachedfineweb10b.py 9 ||
      die "no FineWeb10B shards (why is above); --dataset=shakespeare trains on the text that comes along"
  } 9>.setup.lock
fi

if [ "$command" = setup ]; then
  say "ready; this python will train: $py"
  exit 0
fi

set -- train.py "$@"
if [ -z "$NNODES" ] && [ "$NPROC" -eq 1 ] && [ "$MAX_RESTARTS" -eq 0 ]; then
  exec "$py" "$@"
fi
[ "$MAX_RESTARTS" -eq 0 ] || set -- --max_restarts="$MAX_RESTARTS" "$@"
# A name of its own lets a job that torchrun starts again know its run folder from those of other jobs.
RDZV_ID=${RDZV_ID:-${SLURM_JOB_ID:+$SLURM_JOB_ID.${SLURM_STEP_ID:-0}}}
if [ "${NNODES:-1}" -eq 1 ]; then
  set -- --standalone "$@"
elif [ -n "$RDZV_ENDPOINT" ]; then
  set -- --nnodes="$NNODES" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${RDZV_ID:-nanogpt-fp8}" "$@"
else
  [ -z "$RDZV_ID" ] || set -- --rdzv_id="$RDZV_ID" "$@"
  set -- --nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" "$@"
fi
# torchrun would give each process one thread; share the cores out instead.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

# torchrun, of this python, in a process group of its own: it hears of a signal once, from here, also where the terminal
# or Slurm signals the whole group. It passes the signal on and returns 1 whatever the workers made of it, so they leave a
# file when they have ended well: all ranks were still there then, and the last checkpoint is on disk.
# A failed worker has said why in one line, so torchrun's tracebacks are left out, and the status is the worker's.
launch='
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    sys.exit(max(1, error.get_first_failure()[1].exitcode))
except SignalException:
    sys.exit(1)
'
# From torch 2.12 on torchrun leaves workers as many seconds to end as this variable says; before, 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
ended_well=$(mktemp -d)/yes
trap 'rm -rf -- "${ended_well%/yes}"' EXIT
signalled=''
pass_on() { signalled=$1 && kill "-$1" "$torchrun" 2>/dev/null || true; }
trap 'pass_on TERM' TERM HUP && trap 'pass_on INT' INT
set -m
ENDED_WELL=$ended_well "$py" -c "$launch" --nproc_per_node="$NPROC" "$@" </dev/null &
set +m
torchrun=$! status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ended wait, not torchrun
  status=0
  wait "$torchrun" || status=$?
done
if [ "$status" -ne 0 ] && [ -n "$signalled" ] && [ -e "$ended_well" ]; then
  say "training ended well after SIG$signalled: status 0"
  status=0
fi
exit "$status"
