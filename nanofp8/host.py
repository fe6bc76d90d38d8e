"""What a machine says of itself, standard library alone: nvidia-smi, C compiler, /dev/shm, torch, optional packages."""

import contextlib
import ctypes
import functools
import glob
import importlib.metadata
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from types import ModuleType
from typing import Any, Callable, Iterator

from nanofp8.cards import old_torch
from nanofp8.config import UserError, environment_remedy
from nanofp8.files import error_line

# Bytes of /dev/shm that NCCL's documentation asks of a container (user guide, troubleshooting: --shm-size=1g)
SHARED_MEMORY = 2 ** 30
# How the names of network file systems begin in /proc/mounts
NETWORK = ("nfs", "cifs", "smb", "9p", "lustre", "gpfs", "beegfs", "ceph", "afs", "fuse.sshfs", "fuse.glusterfs")


def is_wsl(path: str = "/proc/sys/kernel/osrelease") -> bool:
    """Whether this is Windows' Linux (WSL2), or a container there."""
    try:
        with open(path, encoding="ascii") as f:
            return "microsoft" in f.read().lower()
    except (OSError, ValueError):
        return False


def start_torch() -> None:
    """Import torch for training, and libraries of its wheels where Transformer Engine would find others. Raises
    UserError if torch is too old: later, that would be an AttributeError."""
    if not is_wsl():  # there, the first allocation may fail (pytorch issue 192330)
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch starts
    import torch
    if fault := old_torch(str(torch.__version__)):
        raise UserError(f"{fault}; {environment_remedy()}")
    wheels = os.path.join(sysconfig.get_path("purelib"), "nvidia")
    if toolkit_misleads(wheels):
        load_from_wheels(wheels)


def toolkit_misleads(wheels: str, usual: str = "/usr/local/cuda") -> bool:
    """Whether Transformer Engine would take libraries of a CUDA toolkit that do not go with torch's wheels.

    It looks into the toolkit first (transformer_engine/common/__init__.py of 2.20.2). NVRTC of another major version
    would compile with the headers of the wheels; cuDNN is loaded without its parts. And below CUDA_HOME=/usr it
    searches all folders, links that lead back up too.

    wheels: the folder nvidia of Python's packages. usual: where toolkits are installed.
    """
    def major(*folders: str) -> str:
        files = [file for folder in folders for file in glob.glob(os.path.join(folder, "libnvrtc.so.[0-9]*"))]
        return max((os.path.basename(file).split(".")[2] for file in files), key=int, default="")

    homes = [folder for name in ("CUDA_HOME", "CUDA_PATH") if (folder := os.environ.get(name))] + [usual]
    libraries = [[os.path.join(home, "lib64"), os.path.join(home, "targets", "*", "lib")] for home in homes]
    toolkit, ours = next(filter(None, (major(*folders) for folders in libraries)), ""), major(f"{wheels}/cu*/lib")
    has_cudnn = any(glob.glob(os.path.join(folder, "libcudnn.so*")) for folders in libraries for folder in folders)
    root = os.path.realpath(homes[0]) in ("/", "/usr")
    return bool(ours) and (toolkit not in ("", ours) or has_cudnn or root)


def load_from_wheels(wheels: str) -> None:
    """Load cuDNN, NVRTC and cuRAND of torch's wheels before Transformer Engine does, and point it to them; unless the
    user points it somewhere."""
    patterns = dict(CUDNN="cudnn/lib/lib*.so.*[0-9]", NVRTC="cu*/lib/libnvrtc.so.*[0-9]",
                    CURAND="cu*/lib/libcurand.so.*[0-9]")
    files = {name: sorted(glob.glob(os.path.join(wheels, pattern))) for name, pattern in patterns.items()}
    if not all(files.values()) or any(f"{name}_{end}" in os.environ for name in files for end in ("HOME", "PATH")):
        return
    for name, found in files.items():
        for file in found:
            with contextlib.suppress(OSError):
                ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
        os.environ[f"{name}_HOME"] = os.path.dirname(os.path.dirname(found[0]))


def optional(package: str, module: str, name: str) -> tuple[ModuleType | None, str]:
    """Import a package that may be missing or broken. Returns (module, name and version), or (None, why it cannot run).

    package: as PyPI knows it. module: what to import of it, or a module of ours that needs it. name: as people say it.
    """
    try:
        version = importlib.metadata.version(package)
        with compiling_later():
            found = importlib.import_module(module)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{name} is not installed"
    except Exception as error:  # a missing library is an OSError; extensions raise anything
        return None, f"{name} cannot be imported: {error_line(error)}"
    return found, f"{name} {version}"


def compiled_at_first_call(function: Callable | None = None, **options: Any) -> Callable:
    """Do what torch.compile does with `function`, also as a decorator with options, but only when it is first called.

    torch.compile imports Inductor at once, which takes 2 s. Functions that are never called need not wait for it.
    """
    if function is None:
        return functools.partial(compiled_at_first_call, **options)

    @functools.cache
    def compiled() -> Callable:
        import torch
        return torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        return compiled()(*args, **named)
    return call


@contextlib.contextmanager
def compiling_later() -> Iterator[None]:
    """Let torch.compile be compiled_at_first_call() in a context, for packages that call it while they are imported."""
    import torch
    before, torch.compile = torch.compile, compiled_at_first_call
    try:
        yield
    finally:
        torch.compile = before


def cudnn_version(torch: ModuleType) -> tuple[int, str]:
    """Return the version of the cuDNN that is loaded, as one number (0: unknown), and why torch refuses it, or "".

    torch raises a RuntimeError if another cuDNN than its own was found, but only when first asked. Transformer Engine
    works with it all the same.
    """
    fault = ""
    for _ in range(2):
        try:
            return torch.backends.cudnn.version() or 0, fault
        except RuntimeError as error:
            fault = error_line(error)
    return 0, fault


def ask_nvidia_smi(fields: str) -> tuple[list[list[str]], str]:
    """Ask nvidia-smi for some fields of all GPUs.

    fields: names of --query-gpu, with commas between.
    Returns: a list of texts for each GPU, and why there is none ("" if nvidia-smi has answered).
    """
    if not shutil.which("nvidia-smi"):
        return [], "nvidia-smi is not here"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error_line(error)}"
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
    if done.returncode and not (done.returncode == 14 and lines):  # 14: the infoROM is damaged, which is a warning
        return [], f"nvidia-smi: {(lines + done.stderr.strip().splitlines() or [f'status {done.returncode}'])[0]}"
    return [[text.strip() for text in line.split(",")] for line in lines], ""


def free_memory() -> int:
    """Return the bytes of this machine's memory that processes can get, files in the page cache included; 0: unknown.

    A GPU that shares this memory (DGX Spark) does not count that cache as free, though it is given up on demand.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def ends_with_parent(number: int) -> Callable[[], None]:
    """Return a function that lets this process get a signal as soon as the thread that started it ends, also by
    kill -9. As preexec_fn it loads nothing in the child. It does nothing where this cannot be asked for (macOS)."""
    try:
        import ctypes  # some builds of Python lack it
        return functools.partial(ctypes.CDLL(None).prctl, 1, number)  # PR_SET_PDEATHSIG
    except (ImportError, AttributeError):
        return lambda: None


def usable_cores(limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return how many cores this process may keep busy: those of its affinity mask, or fewer by its container's share
    of time (docker --cpus), which cgroups state in the file `limit` as microseconds of each period."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open(limit, encoding="ascii") as f:
        quota, period = map(int, f.read().split())  # "max": no limit
        cores = min(cores, -(-quota // period))
    return max(1, cores)


def own_address(host: str) -> str:
    """Return this machine's IPv4 address by which a host, and other machines like it, reach this one; "" if that is
    not known, or if the host is 127.0.0.1: then all is on one machine.

    gloo and torchrun would look up this machine's own name, which Debian and Ubuntu give the address 127.0.1.1: no
    other machine reaches that. On the host itself its name may have that address, too: there the default route counts.
    """
    def source(target: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing
            return probe.getsockname()[0]

    try:
        address = socket.gethostbyname(host)
        own = source(address)
        if own.startswith("127."):
            return "" if address == "127.0.0.1" else source("192.0.2.1")  # RFC 5737: no machine has it
        return own
    except OSError:
        return ""


def interface_to(host: str) -> str | None:
    """Return the network interface that has own_address(), for gloo; None: gloo may choose."""
    own = own_address(host)
    return next((name for _, name in socket.if_nameindex() if own and address_of(name) == own), None)


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface; "" if it has none, and on other systems than Linux."""
    if sys.platform != "linux":
        return ""
    import fcntl
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            SIOCGIFADDR = 0x8915  # netdevice(7)
            return socket.inet_ntoa(fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", interface.encode()))[20:24])
        except OSError:
            return ""


def c_compiler() -> str | None:
    """Return the C compiler that Triton takes (triton/runtime/build.py): $CC, gcc or clang; None without one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def compiler_fault() -> str:
    """Return what keeps Triton, and so torch.compile on a GPU, from building C code for this Python, with the remedy;
    "" if nothing does. The compiler is tried; it writes no file."""
    needed = "Triton and torch.compile need"
    compiler = c_compiler()
    if compiler is None:
        return f"{needed} a C compiler, but there is no gcc or clang; install one (Debian, Ubuntu: apt install g++)"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)  # as Triton does
    try:
        done = subprocess.run([compiler, "-fsyntax-only", f"-I{include}", "-x", "c", "-"], capture_output=True,
                              input="#include <Python.h>\n", text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{needed} a C compiler, but {compiler} does not run ({error_line(error)}); install gcc, or correct CC"
    if done.returncode == 0:
        return ""
    if "Python.h" in done.stderr:
        return (f"{needed} Python's headers, but {include} has no Python.h; install them (Debian, Ubuntu: apt install "
                f"python3-dev), or choose a Python that has them by PYTHON=")
    why = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
    return f"{needed} a C compiler, but {compiler} fails ({why}); install gcc, or correct CC"


def file_system(folder: str) -> str:
    """Return the type of the file system that holds a folder, such as "ext4"; "" where that is not known (macOS)."""
    folder, found = os.path.join(os.path.realpath(folder), ""), ("", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            _, point, kind, *_ = line.split()
            point = point.replace("\\040", " ")
            if folder.startswith(os.path.join(point, "")) and len(point) >= len(found[0]):  # the last one lies on top
                found = point, kind
    return found[1]


def cache_fault(folder: str) -> str:
    """Return why Triton cannot keep compiled code in a folder, which need not exist yet, or "". Writes nothing."""
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):  # Triton loads libraries from there
        return f"{folder} is on a file system that is mounted with noexec"
    return ""


def triton_folder() -> str:
    """Return the folder in which Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")


def triton_cache() -> tuple[str, str]:
    """Return the folder to set TRITON_CACHE_DIR to, and why: Triton's usual folder, ~/.triton, cannot be used; or that
    of torch.compile cannot, which sets the variable itself, to one in the temporary folder. ("", ""): leave it unset.

    Raises: UserError if no folder can be used.
    """
    remedy = "set TRITON_CACHE_DIR to a folder that can be written and is not mounted with noexec"
    if given := os.environ.get("TRITON_CACHE_DIR"):
        if fault := cache_fault(given):
            raise UserError(f"Triton cannot keep compiled code in TRITON_CACHE_DIR={given}: {fault}; {remedy}")
        return "", ""
    usual = triton_folder()
    fault = cache_fault(usual)
    if not fault and os.environ.get("WORLD_SIZE", "1") != "1" and file_system(usual).startswith(NETWORK):
        # There, ranks that compile the same kernel fail as they remove files (triton issue 11512)
        fault = f"{usual} is on a network file system, where several processes may fail"
    if not fault:
        why = cache_fault(tempfile.gettempdir())
        return (usual, why) if why else ("", "")
    try:
        other = os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}")
        strange = os.path.lexists(other) and os.lstat(other).st_uid != os.getuid()  # code of another user would run
        why = f"{other} is another user's" if strange else cache_fault(other)
    except OSError as error:
        why = error_line(error)
    if why:
        raise UserError(f"Triton cannot keep compiled code: {fault}, and {why}; {remedy}")
    return other, fault


@functools.cache
def libcuda_fault() -> str:
    """Return why Triton does not find the driver's library, which torch finds all the same, with the remedy, or ""."""
    try:
        from triton.backends.nvidia.driver import libcuda_dirs
    except Exception:  # no Triton, or another one than 3.6: nothing is known
        return ""
    found = "Triton does not find the driver's libcuda.so.1"
    try:
        libcuda_dirs()
    except AssertionError:  # neither ldconfig nor LD_LIBRARY_PATH names it
        return f"{found}; set TRITON_LIBCUDA_PATH to the folder that holds it, or add that folder to LD_LIBRARY_PATH"
    except (OSError, subprocess.SubprocessError) as error:  # no /sbin/ldconfig, as on NixOS
        return f"{found} ({error_line(error)}); set TRITON_LIBCUDA_PATH to the folder that holds it"
    except Exception:  # of another Triton: nothing is known
        return ""
    return ""


def shared_memory_fault(processes: int, folder: str = "/dev/shm") -> str:
    """Return a warning if NCCL may find too little shared memory for this many GPU processes on this machine, or "".

    Docker gives a container 64 MB.
    """
    if processes < 2 or not hasattr(os, "statvfs"):
        return ""
    try:
        stat = os.statvfs(folder)
    except OSError:  # no such folder
        return ""
    size = stat.f_blocks * stat.f_frsize
    if size >= SHARED_MEMORY:
        return ""
    return (f"{folder} has {size / 2 ** 20:,.0f} MB, which NCCL may find too little for {processes} GPUs; start the "
            f"container with --shm-size=1g or --ipc=host")
