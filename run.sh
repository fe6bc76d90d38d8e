#!/usr/bin/env bash
# Set up what is missing, then train: bash run.sh [--name=value ...]
#
#   bash run.sh --max_iters=50            flags of train.py; --help lists them
#   bash run.sh setup [--name=value ...]  make the environment and download the data that these flags need, then stop
#   bash run.sh doctor [--name=value ...] say whether training with these flags would start here; changes nothing
#   bash run.sh test [-k name ...]        run the tests, with arguments of pytest
#
# Environment variables:
#   PYTHON        python to use as it is, or to make .venv from (default: the active environment's, else python3)
#   NPROC         processes on this machine (default: one per GPU, 1 without GPUs)
#   MAX_RESTARTS  how many times torchrun restarts all processes after one has died (default 0); they continue from the
#                 newest checkpoint of their run
#   Several machines (start the same command on each):
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    as torchrun's options of these names
#   NNODES, RDZV_ENDPOINT, RDZV_ID                 the same, but torchrun numbers the machines
#   Under srun with one task per machine, these are set from Slurm's own variables.
#
# On SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2, training finishes the current step, saves a checkpoint and stops; the
# exit status is 0 if the checkpoint was written.
[ -n "${BASH_VERSION:-}" ] && [ -n "${BASH_SOURCE:-}" ] || { echo "run.sh: start it as a file, with bash: bash run.sh" >&2 && exit 2; }
set -euo pipefail
script=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || echo "${BASH_SOURCE[0]}") # a link to run.sh may be elsewhere
cd -P -- "$(dirname -- "$script")" >/dev/null

say() { echo "run.sh: $*" >&2; }
die() { say "$1"; exit "${2:-1}"; }
[ -f train.py ] || die "there is no train.py in $PWD (sbatch runs a copy of this script); use sbatch --wrap='bash FOLDER/run.sh', with the project's folder" 2
whole() { case $1 in 0) ;; '' | 0* | *[!0-9]* | ??????????*) return 1 ;; esac; } # is $1 an integer of 1 to 9 digits?
positive() { [ "$2" != 0 ] && whole "$2" || die "$1 must be ${3:-}a positive integer of at most 9 digits, got '$2'" 2; }

flag() { # print the value of flag $1 among the arguments that follow, else train.py's: name: type = "value"
  local name=$1 value arg
  value=$(sed -n "s/^$name *\(:[^=]*\)\{0,1\}= *[\"']\([^\"']*\)[\"'].*/\2/p" train.py | sed -n 1p)
  shift
  for arg in "$@"; do case $arg in "--$name="*) value=${arg#*=} ;; esac done
  echo "$value"
}

[ ! -d /usr/lib/wsl/lib ] || PATH=$PATH:/usr/lib/wsl/lib # WSL2's nvidia-smi; PATH lacks it under sudo and ssh
# All GPUs in the machine decide what is installed; the GPUs that CUDA_VISIBLE_DEVICES allows decide what runs. CUDA
# uses the entries before the first that is not a GPU.
ask_smi() { # a driver that hangs must not hang this script, nor keep Ctrl-C from it
  local wait=(timeout --foreground 60)
  "${wait[@]}" true 2>/dev/null || wait=() # macOS has none
  ${wait[@]+"${wait[@]}"} nvidia-smi "$@"
}
smi_status=0
smi=$(ask_smi -L 2>&1) || smi_status=$?
[ "$smi_status" -ne 124 ] || smi='no answer in 60 s'
machine_gpus=$(grep -c '^GPU ' <<<"$smi" || true)
mig=$(grep -c '^ *MIG ' <<<"$smi" || true) # parts of divided GPUs
capabilities=''
[ "$machine_gpus" -eq 0 ] || capabilities=$(ask_smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
newest=$(sort -n <<<"$capabilities" | tail -n 1)
no_gpu='' # why none can train here, unless none was asked for: training on the CPU instead would be a surprise
case $newest in
  [1-7].[0-9]) machine_gpus=0 no_gpu="the newest GPU has compute capability $newest, but training needs 8.0 (A100) or newer; use another one" ;;
esac
read -r first_visible <<<"${CUDA_VISIBLE_DEVICES-0}" || true
if [ "$smi_status" -ne 0 ] && [[ $smi != *"No devices"* ]] && command -v nvidia-smi >/dev/null; then
  smi=$(grep -v -m1 '^GPU \|^ ' <<<"$smi" || echo "status $smi_status")
  if [ "$machine_gpus" -eq 0 ]; then
    no_gpu="the GPU does not answer (nvidia-smi: $smi); repair its driver"
  elif [ "$smi_status" -ne 14 ] && [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then # 14: the infoROM is damaged, which is a warning
    no_gpu="a GPU does not answer (nvidia-smi: $smi); repair it, or name the others: CUDA_VISIBLE_DEVICES=0,1"
  fi
elif [ -e "${NVIDIA_DEVICE:-/dev/nvidia0}" ] && ! command -v nvidia-smi >/dev/null; then # the variable is for tests
  no_gpu="there is a GPU (${NVIDIA_DEVICE:-/dev/nvidia0}) but no nvidia-smi; install it, or start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
fi
case $first_visible in
  [0-9]* | GPU-* | MIG-*) ;;
  '' | -* | [Nn]one* | void | NoDevFiles) no_gpu='' ;; # the CPU is meant
  *) [ "$machine_gpus" -eq 0 ] || no_gpu="CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names no GPU; unset it, or give numbers such as 0,1" ;;
esac
gpus=$machine_gpus
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=0 mig=0
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES" || true
  for entry in "${visible[@]+"${visible[@]}"}"; do
    read -r entry <<<"$entry" || true # without blanks around it
    [[ $entry != MIG-* ]] || mig=$((mig + 1))
    case $entry in
      GPU-* | MIG-*) [ "$machine_gpus" -gt 0 ] || break ;;
      '' | *[!0-9]*) break ;;
      *) [ "$((10#$entry))" -lt "$machine_gpus" ] || break ;;
    esac
    gpus=$((gpus + 1))
  done
fi
[ "$mig" -eq 0 ] || [ "$gpus" -le 1 ] || { say "GPUs are divided by MIG, and training can use one part; the others stay free" && gpus=1; }
requirements="requirements-cpu.txt"
[ "$machine_gpus" -eq 0 ] || requirements="requirements.txt"
NPROC=${NPROC-$((gpus > 0 ? gpus : 1))}
positive NPROC "$NPROC"
MAX_RESTARTS=${MAX_RESTARTS:-0}
[ "$MAX_RESTARTS" = 0 ] || positive MAX_RESTARTS "$MAX_RESTARTS" "0 or "
[ "$gpus" -eq 0 ] || [ "$NPROC" -le "$gpus" ] ||
  die "NPROC=$NPROC, but only $gpus GPUs may be used here; set NPROC to at most $gpus" 2

# Under srun every machine runs this script once. Rank 0 is on the first machine of the job step.
NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-} MASTER_ADDR=${MASTER_ADDR:-} RDZV_ENDPOINT=${RDZV_ENDPOINT:-}
[ -n "$NNODES" ] || [ "${SLURM_STEP_NUM_TASKS:-1}" -le "${SLURM_STEP_NUM_NODES:-1}" ] ||
  die "srun started several tasks per machine; use --ntasks-per-node=1 and set NPROC for processes per machine" 2
[ -n "$NNODES" ] || { [ "${PET_NNODES:-1}" = 1 ] && [ "${OMPI_COMM_WORLD_SIZE:-1}" = 1 ]; } ||
  die "mpirun or Kubeflow started this several times; start it once on each machine, with NNODES, NODE_RANK and MASTER_ADDR" 2
if [ -z "$NNODES" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
  NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
  MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))} # one port per job, for jobs on one machine
  [ -n "$MASTER_ADDR" ] || read -r MASTER_ADDR < <(scontrol show hostnames "${SLURM_STEP_NODELIST:-}" 2>/dev/null) || true
fi
if [ -n "$NNODES" ]; then
  positive NNODES "$NNODES"
  [ -z "$NODE_RANK" ] || { whole "$NODE_RANK" && [ "$NODE_RANK" -lt "$NNODES" ]; } ||
    die "NODE_RANK must be an integer from 0 to $((NNODES - 1)) (NNODES - 1), got '$NODE_RANK'" 2
  [ -z "${MASTER_PORT:-}" ] || { whole "$MASTER_PORT" && [ "$MASTER_PORT" -ge 1 ] && [ "$MASTER_PORT" -le 65535 ]; } ||
    die "MASTER_PORT must be an integer from 1 to 65535, got '$MASTER_PORT'" 2
fi
if [ "${NNODES:-1}" -gt 1 ]; then
  case $MASTER_ADDR in
    *:*:*) ;; # IPv6
    *:* | *[[:space:]]*) die "MASTER_ADDR must be a host name or an address without a port, got '$MASTER_ADDR'" 2 ;;
  esac
fi
if [ "${NNODES:-1}" -gt 1 ] && [ -z "$RDZV_ENDPOINT" ] && { [ -z "$NODE_RANK" ] || [ -z "$MASTER_ADDR" ]; }; then
  die "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR (of machine 0), or RDZV_ENDPOINT; set them" 2
fi

# Run a step of the set-up in a process group of its own, so that a signal to this script alone also ends pip and its
# compilers. Without that, bash would exit and pip would continue to write into .venv.
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
  die "set-up interrupted; run the same command again to repeat it" "$1"
}
quiet() { "$@" >/dev/null 2>&1; }

# Return 0 if python $1 can train as it is. Search for torch before importing it, because importing takes seconds.
usable() {
  "$1" -W ignore - "$gpus" >/dev/null <<'END'
import importlib.util, sys
if sys.version_info < (3, 10) or importlib.util.find_spec("torch") is None:
    sys.exit(1)
try:
    import torch
    sys.path.insert(0, ".")
    from nanofp8.cards import old_torch, unsupported_version
    if reason := old_torch(str(getattr(torch, "__version__", ""))):
        raise ImportError(reason)
    if int(sys.argv[1]):
        import transformer_engine.pytorch
        if reason := unsupported_version(getattr(transformer_engine, "__version__", "")):
            raise ImportError(reason)
except Exception as error:
    reason = (str(error).strip() or repr(error)).splitlines()[-1]
    sys.exit(f"run.sh: not using {sys.executable}: it has torch, but not what training needs ({reason})")
END
}

# .venv/installed says what .venv contains (python's version, the requirements file and its hash, and the processor, for
# machines of two kinds that share this folder), or "unfinished".
key() {
  .venv/bin/python -c 'import hashlib, platform, sys
print(sys.version.split()[0], sys.argv[1], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(),
      *{platform.machine()} - {"x86_64"})' "$1" 2>/dev/null
}
# requirements.txt contains all of requirements-cpu.txt, so a .venv with GPU packages also serves a machine without GPU.
complete() {
  grep -qsxF "$(key "$requirements")" .venv/installed || grep -qsxF "$(key requirements.txt)" .venv/installed
}

# pip for .venv, whose versions the requirements decide. NVIDIA's images set PIP_CONSTRAINT to the versions of their own
# environment, which pip cannot install together with ours. pip takes what is on PYTHONPATH for installed, but the next
# start may be without it. With the other variables it would install elsewhere.
own_pip=(env -u PIP_CONSTRAINT -u PYTHONPATH -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT .venv/bin/python -m pip)

# Make an empty .venv with python's own venv and pip, or with uv, which needs neither and can download a python.
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
    if "${own_pip[@]}" --version >/dev/null 2>&1; then return; fi
  done
  [ -z "$base" ] || [[ $PWD != *:* ]] || # venv refuses it since Python 3.11; uv does not
    die "the path of this folder contains ':', and Python makes no environment there; rename or move the folder: $PWD"
  die "found no Python 3.10 to 3.14 with venv and pip, and no uv; install one (Debian, Ubuntu: apt install python3-venv)"
}

# Whether there is a GPU of compute capability 9.0. Elsewhere Transformer Engine would find flash-attn-4 and take it.
hopper() {
  grep -q '^9\.' <<<"$capabilities"
}

# Import a package as .venv has it, without what the surroundings bring (LD_LIBRARY_PATH may bring other libraries, but
# some Pythons do not start without it). If that fails, print the reason.
try() {
  local error
  error=$(env -u PYTHONPATH -u LD_LIBRARY_PATH .venv/bin/python -W ignore -c "import $1" 2>&1) ||
    error=$(env -u PYTHONPATH .venv/bin/python -W ignore -c "import $1" 2>&1) || { tail -n 1 <<<"$error"; return 1; }
}

# Install the numbered parts of the requirements, in order. Part 1 pins torch; the later parts must keep that version.
install() {
  local part title option driver why cpu_index='https://download.pytorch.org/whl/cpu'
  local -x PATH=$PWD/.venv/bin:$PATH # for ninja, which compiles Transformer Engine on all cores (MAX_JOBS)
  export PIP_USER=0 # pip refuses "user = true" of a pip.conf, or PIP_USER=1, in an environment like .venv
  set -- -qq --disable-pip-version-check -c .venv/part1.txt
  if [ "$machine_gpus" -gt 0 ]; then
    # Compile Transformer Engine with torch's CUDA headers, because an installed toolkit may be of another version, and
    # without expert parallelism, which is not used here and needs more headers.
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 GIT_TERMINAL_PROMPT=0
    driver=$(ask_smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sort | sed -n 1p) || true
    case $driver in
      [1-4]??.* | 5[0-7]?.*)
        die "the NVIDIA driver is $driver, but CUDA 13 needs 580 or newer; update it, or set PYTHON to a python that has torch and transformer_engine for CUDA 12 (docs/install.md)"
        ;;
    esac
    if ! command -v c++ >/dev/null ||
      ! .venv/bin/python -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null; then
      die "Transformer Engine and torch.compile need a C++ compiler and Python's headers; install them (Debian, Ubuntu: apt install g++ python3-dev)"
    fi
  elif [ "$(uname)" = Linux ]; then
    # PyPI's torch for Linux includes gigabytes of CUDA. PyTorch's own index has the same version as +cpu, which pip
    # prefers.
    if timeout 5 .venv/bin/python -c "import urllib.request as r; r.urlopen('$cpu_index/torch/', timeout=3)" 2>/dev/null; then
      set -- "$@" --extra-index-url "$cpu_index"
    else
      say "PyTorch's CPU index does not respond; installing torch from pip's default index, perhaps with CUDA (several GB)"
    fi
  fi
  [ -z "${PIP_CONSTRAINT:-}" ] || say "PIP_CONSTRAINT is not used: .venv has versions of its own"
  for part in 1 2 3 4 5 6; do
    title=$(sed -n "s/^# $part\. //p" "$requirements")
    [ -n "$title" ] || break
    [[ $title != *Hopper* ]] || hopper || continue
    awk -v head="# $part. " '/^# [1-9]\. / { on = index($0, head) == 1 } on' "$requirements" >".venv/part$part.txt"
    option=--no-input
    [[ $title != *'no build isolation'* ]] || option=--no-build-isolation
    say "installing $title"
    if step "${own_pip[@]}" install "$@" "$option" -r ".venv/part$part.txt"; then
      [ "$part" -gt 1 ] || why=$(try torch) ||
        die "pip ended well, but .venv cannot import torch ($why); if pip.conf sets target, prefix or root (.venv/bin/python -m pip config list), take that out; then run the same command again"
      continue
    fi
    [[ $title == *optional* ]] ||
      die "installation failed (pip's error is above); run the same command again to retry, with MAX_JOBS=1 in front of it if a compiler was killed: it had too little memory"
    say "that failed, but training works without it; to retry: ${own_pip[*]} install -r .venv/part$part.txt"
  done
  [ "$machine_gpus" -eq 0 ] || why=$(try transformer_engine.pytorch) ||
    say "Transformer Engine was installed, but cannot be imported ($why); until that is repaired FP8 is emulated, slower than bf16 (docs/install.md)"
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

# Allow one set-up or download at a time in this folder; a second one waits (not on macOS, which has no flock, nor on
# file systems without locks).
lock() {
  local status=0
  ! command -v flock >/dev/null || flock -n 9 2>/dev/null || status=$?
  [ "$status" -ne 1 ] || { say "another run.sh is setting up here; waiting for it" && flock 9; }
}

can_write() {
  (: >>.setup.lock) 2>/dev/null || die "$PWD cannot be written; copy the project to a folder where you can write"
}

python=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
found=$(command -v "${python:=python3}" || true)
[ -n "$found" ] || [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON does not exist; set it to a Python of 3.10 or newer"
[ -z "${PYTHON:-}" ] || # what it prints counts: /bin/true ends well too
  [ "$("$PYTHON" -c 'import sys; print(sys.version_info >= (3, 10))' </dev/null 2>/dev/null)" = True ] ||
  die "PYTHON=$PYTHON is not a Python of 3.10 or newer; set it to one, or unset it"
# Ranks come from torchrun alone, not from whatever started this script; nor do torchrun's options (PET_*). Python must
# find nanofp8/ beside train.py
ranks=${WORLD_SIZE:-}
unset RANK LOCAL_RANK WORLD_SIZE PYTHONSAFEPATH ${!PET_@}
command=train
case ${1:-} in setup | test | doctor) command=$1 && shift ;; esac
[ "$command" != train ] || case " $* " in *' --doctor '* | *' --doctor='*) command=doctor ;; esac
case $command in train | setup) check_flags "$@" ;; esac
# Variables of one of several machines that would each train alone. Under srun on one machine, a job script may have set
# MASTER_ADDR and WORLD_SIZE for other programs.
if [ "$command" = train ] && [ -z "$NNODES" ]; then
  [ "${NODE_RANK:-0}" = 0 ] && [ -z "$RDZV_ENDPOINT" ] &&
    { [ -z "$MASTER_ADDR" ] || [ -n "${SLURM_STEP_NUM_NODES:-}" ] || [ "$ranks" = 1 ] || [ -z "$ranks$NODE_RANK" ]; } ||
    die "NODE_RANK, MASTER_ADDR, WORLD_SIZE or RDZV_ENDPOINT is set as for several machines; set NNODES too, their number (1: this machine alone)" 2
fi
[ -z "$no_gpu" ] || [ "$command" != train ] || [ "$(flag preset "$@")" != auto ] ||
  die "$no_gpu, or train on the CPU: --preset=tiny"
# Whether the Python that was found can train as it is. Run.sh's own .venv does not count: it must be complete.
found_is_ready() {
  [ -n "$found" ] && { [ ! -f .venv/installed ] || [ ! "${found%/*}" -ef .venv/bin ]; } && usable "$found"
}

if [ "$command" = doctor ]; then # by the Python that would train; if none is ready, by any that can answer
  if ! found_is_ready; then
    found=''
    for name in .venv/bin/python "$python" python3 python3.12 python3.13 python3.11 python3.10; do
      if quiet "$name" -c 'import sys; assert sys.version_info >= (3, 10)'; then found=$name && break; fi
    done
    [ -n "$found" ] || die "found no Python of 3.10 or newer; install one (Debian, Ubuntu: apt install python3-venv)"
  fi
  export WORLD_SIZE=$((NPROC * ${NNODES:-1})) LOCAL_WORLD_SIZE=$NPROC PYTHONDONTWRITEBYTECODE=1
  exec "$found" train.py --doctor "$@"
fi

py=$PWD/.venv/bin/python
if found_is_ready; then
  py=$found
  for name in numpy $([ "$command" != test ] || echo pytest); do
    "$py" -c "import $name" 2>/dev/null || die "$py has torch but no $name; run: $py -m pip install $name"
  done
elif ! complete; then
  [ -f .venv/installed ] || [ ! -e .venv/bin/python ] || die "$PWD/.venv was not made by run.sh; activate it or remove it"
  can_write
  {
    lock
    complete || { make_venv && install; }
  } 9>.setup.lock
fi

if [ "$command" = test ]; then
  # All tests run in two processes, but not with a GPU: there they would wait for each other and share its memory
  [ "$#" -gt 0 ] || [ "$gpus" -gt 0 ] || ! quiet "$py" -c 'import xdist' || set -- -n 2 --dist loadgroup
  unset PYTHONDONTWRITEBYTECODE # else each process that a test starts compiles the modules again, which takes 1 s
  exec "$py" -m pytest "$@"
fi
case " $* " in *' --help '* | *' -h '*) exec "$py" train.py --help ;; esac

# With a GPU, train.py's default data set is FineWeb. Preset tiny, the default without a GPU, uses Shakespeare, which is
# included.
# Print the number of FineWeb's train shards that are here. Return 0 if val and the first $1 train shards are.
fineweb() {
  local i name=data/fineweb10B/fineweb_val_000000.bin files=(data/fineweb10B/*_train_[0-9][0-9][0-9][0-9][0-9][0-9].bin)
  if [ -e "${files[0]}" ]; then echo "${#files[@]}"; else echo 0; fi
  for ((i = 1; ; i++)); do
    [ -s "$name" ] || return 1
    [ "$i" -le "$1" ] || return 0
    printf -v name 'data/fineweb10B/fineweb_train_%06d.bin' "$i"
  done
}
# Return 0 if --resume finds a checkpoint of another data set, which a resumed run keeps. It takes seconds.
resumes_other_data() {
  [ -n "$(flag resume "$@")" ] && quiet "$py" -W ignore -c 'import sys
import train
from nanofp8 import resuming
checkpoint, _ = resuming.choose_checkpoint(train.read_flags(sys.argv[1:]))
sys.exit(resuming.read_checkpoint(checkpoint)["flags"]["dataset"] == "fineweb10B")' "$@"
}
# Return 0 if shards are missing; set how many train shards are `here`, and how many cachedfineweb10b.py was `asked` for.
# If that is unknown, none are added to what is here.
lacks_fineweb() {
  asked=$(sed -n 's/.*"train_shards": *\([1-9][0-9]\{0,2\}\),.*/\1/p' data/fineweb10B/download.json 2>/dev/null) || true
  ! here=$(fineweb "${asked:-0}") && { [ "$here" -eq 0 ] || [ -n "$asked" ]; } && ! resumes_other_data "$@"
}
if [ "$gpus" -gt 0 ] && [ "$(flag dataset "$@") $(flag data_dir "$@")" = "fineweb10B data" ] &&
  [ "$(flag preset "$@")" != tiny ] && lacks_fineweb "$@"; then
  can_write
  {
    lock
    if lacks_fineweb "$@"; then # another start may just have downloaded them
      asked=${asked:-9}
      if ! step "$py" data/cachedfineweb10b.py "$asked"; then
        here=$(fineweb 0) && [ "$here" -gt 0 ] && [ "$command" != setup ] ||
          die "could not download FineWeb10B (the error is above); run again, or train on the included text: --dataset=shakespeare"
        say "could not complete FineWeb10B (the error is above); training on $here of the $asked train shards that were asked for"
      fi
    fi
  } 9>.setup.lock
fi

if [ "$command" = setup ]; then
  say "ready; this python will train: $py"
  exit 0
fi

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc counts those that this process may use
if read -r quota period 2>/dev/null <"${CPU_MAX:-/sys/fs/cgroup/cpu.max}" && whole "$quota" && whole "$period"; then
  quota=$(((quota + period - 1) / period)) # a container's share of time (docker --cpus); the variable is for tests
  if [ "$quota" -lt "$cores" ]; then # torch does not look at it
    cores=$quota
    [ "$NPROC" -gt 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
  fi
fi
[ "$cores" -ge "$NPROC" ] || say "$NPROC processes share $cores core(s), and will wait for each other; under Slurm ask for more: srun --cpus-per-task"
set -- train.py "$@"
if [ -z "$NNODES" ] && [ "$NPROC" -eq 1 ] && [ "$MAX_RESTARTS" -eq 0 ]; then
  exec "$py" "$@"
fi
[ "$MAX_RESTARTS" -eq 0 ] || set -- --max_restarts="$MAX_RESTARTS" "$@"
# A unique id per job: processes that torchrun restarts find their own run folder by it, not another job's.
RDZV_ID=${RDZV_ID:-${SLURM_JOB_ID:+$SLURM_JOB_ID.${SLURM_STEP_ID:-0}}}
if [ "${NNODES:-1}" -eq 1 ]; then
  set -- --standalone --local_addr=127.0.0.1 "$@" # a host name that does not resolve would block for minutes
elif [ -n "$RDZV_ENDPOINT" ]; then
  # torchrun would use this machine's name, which may mean 127.0.1.1 here and nothing elsewhere: give it the address, and
  # say whether this machine is the endpoint's host
  read -r address endpoint < <("$py" -c 'import socket, sys; from nanofp8.host import own_address
print(own_address(sys.argv[1]), socket.gethostbyname(sys.argv[1]))' "${RDZV_ENDPOINT%:*}" 2>/dev/null) || true
  if [ -n "${endpoint:-}" ]; then
    set -- --local_addr="$address" "$@"
    case $endpoint in "$address" | 127.*) set -- --rdzv_conf=is_host=1 "$@" ;; esac
  fi
  set -- --nnodes="$NNODES" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${RDZV_ID:-nanogpt-fp8}" "$@"
else
  [ "$NODE_RANK" -eq 0 ] || say "machine $NODE_RANK of $NNODES: training is reported on machine 0, $MASTER_ADDR"
  [ -z "$RDZV_ID" ] || set -- --rdzv_id="$RDZV_ID" "$@"
  set -- --nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" "$@"
fi
# torchrun's default is one thread per process; divide the cores among the processes instead.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

# torchrun, started by this python, runs in a process group of its own. So it gets a signal once, from this script, even
# where the terminal or Slurm signals the whole group. It passes the signal to the workers and then returns 1 whatever
# their status. Therefore the workers create a file when they have ended well: all ranks took part until the end, and
# the last checkpoint is on disk. A failed worker has printed its error in one line, so torchrun's traceback is left out
# and the exit status is the worker's.
launch='
import signal, sys
for number in signal.SIGUSR1, signal.SIGUSR2: # Slurm or SGE may send it to all; it is passed on as SIGTERM
    signal.signal(number, lambda *_: None)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode == -signal.SIGKILL:
        print(f"run.sh: rank {rank} was killed (SIGKILL), often because the machine or its container ran out of memory;"
              " see dmesg", file=sys.stderr)
    sys.exit(max(1, failure.exitcode))
except SignalException:
    sys.exit(1)
except Exception as error:
    line = (str(error).strip() or repr(error)).splitlines()[0]
    sys.exit(f"run.sh: torchrun cannot start ({line}); check NNODES, MASTER_ADDR, MASTER_PORT or RDZV_ENDPOINT")
'
# Seconds that torchrun waits for workers to end after a signal (torch 2.12 and newer; before, always 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
positive TORCH_ELASTIC_SHUTDOWN_TIMEOUT "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
ended_well=$(mktemp -d)/yes || die "cannot make a temporary folder in ${TMPDIR:-/tmp}; set TMPDIR to a folder that can be written"
trap 'rm -rf -- "${ended_well%/yes}"' EXIT
signalled=''
pass_on() { signalled=$1 && kill "-$1" "$torchrun" 2>/dev/null || true; }
trap 'pass_on TERM' TERM HUP USR1 USR2 && trap 'pass_on INT' INT
set -m
ENDED_WELL=$ended_well "$py" -c "$launch" --nproc_per_node="$NPROC" "$@" </dev/null &
set +m
torchrun=$! status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # torchrun still runs: wait returned because of a signal
  status=0
  wait "$torchrun" || status=$?
done
if [ "$status" -ne 0 ] && [ -n "$signalled" ] && [ -e "$ended_well" ]; then
  say "training ended well after SIG$signalled; exit status 0"
  status=0
fi
exit "$status"
