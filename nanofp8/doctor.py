"""Say whether training with the given flags would start on this machine, and if not what to do: train.py --doctor.

It needs neither torch nor numpy nor Transformer Engine, and imports them only where they are. It installs, downloads
and writes nothing. A check that fails in itself becomes a line of the report.
"""

import __future__

import ast
import contextlib
import importlib
import io
import os
import platform
import shutil
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from nanofp8 import cards, host, sizes
from nanofp8.config import UserError, may_choose, parse_flags, precedence
from nanofp8.files import console, error_line, first_line

OK, NOTE, WARN, FAIL = "ok", "-", "warn", "FAIL"  # FAIL: training would fail
WIDTH, INDENT = 110, 25
INSTALL = "`bash run.sh setup` makes an environment with it (docs/install.md)"
# What train.py says of flags. They are taken from its source, because importing train.py needs torch
DEFINITIONS = {"CLASSIC", "PARTS", "PRESETS", "LARGEST_BATCH", "resolve_length", "check_flags", "choose_wrapper"}

Verdict = tuple[str, str]  # a mark, and what was found; of WARN and FAIL also what to do


class Gpu(NamedTuple):
    """A GPU; memory in bytes."""

    name: str
    capability: tuple[int, int]
    free: float
    total: float


@dataclass
class Examination:
    """What is known so far."""

    path: str          # of train.py
    given: list[str]   # flags, as arguments
    ranks: int         # of training, over all machines ...
    local_ranks: int   # ... and on this machine
    torch: ModuleType | None = None
    gpus: list[Gpu] = field(default_factory=list)  # that training could use
    cfg: SimpleNamespace | None = None             # resolved flags
    train: SimpleNamespace | None = None           # DEFINITIONS of train.py
    resumed: bool = False                          # whether --resume found a checkpoint
    version_of_te: str = ""                        # "": it cannot be imported
    precision: Any = None
    wrapper: str = ""                              # "none", "ddp" or "fsdp2", once it is known

    @property
    def device(self) -> Any:
        """The device of rank 0, as a torch.device."""
        return self.torch.device("cuda", 0) if self.gpus else self.torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Software


def check_system(exam: Examination) -> Iterator[Verdict]:
    """Name the operating system, cores and memory, with a container's limit."""
    name = platform.system()
    with contextlib.suppress(OSError):
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    cores = host.usable_cores()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as f:
        memory = min(memory, int(f.read()))
    container = ", in a container" if any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) else ""
    yield OK, f"{name}, {platform.machine()}, {cores} cores, {memory / 1e9:.0f} GB of memory{container}"


def check_python(exam: Examination) -> Iterator[Verdict]:
    """Name this Python."""
    yield OK, f"{platform.python_version()} ({sys.executable})"


def load(name: str) -> tuple[ModuleType | None, str]:
    """Import a module. Returns it, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None, "is not installed"
        failure = error
    except Exception as error:  # a missing library is an OSError; extensions raise anything
        failure = error
    return None, f"cannot be imported ({type(failure).__name__}: {error_line(failure)})"


def version_of(package: str) -> str:
    """Return the version of an installed package, "" if it is not installed or does not say it."""
    try:
        return metadata.version(package)
    except Exception:  # damaged metadata raise anything
        return ""


def check_torch(exam: Examination) -> Iterator[Verdict]:
    """Import torch."""
    exam.torch, why = load("torch")
    if exam.torch is None:
        yield FAIL, f"torch {why}; {INSTALL}"
    elif fault := cards.old_torch(str(exam.torch.__version__)):
        exam.torch = None  # our modules cannot be imported with it
        yield FAIL, f"{fault}; {INSTALL}"
    else:
        cuda = exam.torch.version.cuda
        yield OK, f"{exam.torch.__version__}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"


def check_numpy(exam: Examination) -> Iterator[Verdict]:
    """Report numpy only if it is missing or broken."""
    numpy, why = load("numpy")
    if numpy is None:
        yield FAIL, f"numpy {why}; {INSTALL}"


def check_transformer_engine(exam: Examination) -> Iterator[Verdict]:
    """Import Transformer Engine, if training would, and compare its answers with cards.py. Raises UserError."""
    unused = "without a GPU" if not exam.gpus else "with USE_EMULATION=True" if exam.cfg.USE_EMULATION is True else ""
    if unused or not exam.torch:
        yield NOTE, (version_of("transformer-engine") or "not installed") + (unused and f"; {unused} it is not used")
    else:
        from nanofp8.precision import import_transformer_engine
        try:
            te, _, exam.version_of_te = import_transformer_engine()
        except ImportError as error:
            yield WARN, f"cannot be imported ({error}): all formats are emulated, slowly; {INSTALL}"
            return
        yield OK, exam.version_of_te + cards.untried_version(exam.version_of_te)
        versions = float(exam.torch.version.cuda), load("transformer_engine_torch")[0].get_cublasLt_version()
        for question in cards.SUPPORT:  # on GPU 0
            said = bool(getattr(te, question)())
            if said != cards.supports(question, exam.gpus[0].capability, *versions):
                yield WARN, f"{question}() is {said} here, which docs/cards.md does not say; please report it"


def check_libraries(exam: Examination) -> Iterator[Verdict]:
    """Name the versions of cuDNN and cuBLASLt."""
    if exam.torch and exam.torch.version.cuda:
        number, fault = host.cudnn_version(exam.torch)
        found = [f"cuDNN {cards.version_name(number)}" if number else "no cuDNN"]
        if exam.version_of_te:
            number = load("transformer_engine_torch")[0].get_cublasLt_version()
            found.append(f"cuBLASLt {cards.version_name(number)}")
        yield OK, ", ".join(found)
        if fault:
            yield WARN, f"torch refuses this cuDNN: {fault}"


def check_packages(exam: Examination) -> Iterator[Verdict]:
    """Triton and Dion are imported; flash-attn-4 and QuACK only where the flags want them, because that takes long."""
    found, missing, broken = [], [], {}  # broken: packages by the reason
    for name, package, module in (("Triton", "triton", "triton"), ("Dion", "dion", "dion"),
                                  ("flash-attn-4", "flash-attn-4", ""), ("QuACK", "quack-kernels", "")):
        version, why = version_of(package), ""
        if module and exam.torch:
            loaded, why = load(module)
            version = version or "of unknown version" * (loaded is not None)
        if why.startswith("cannot"):
            broken.setdefault(why, []).append((name, package))
        else:
            (found if version else missing).append(f"{name} {version}".strip())
    for why, packages in broken.items():  # Dion imports Triton and fails as Triton does: one cause, one line
        (name, package), names = packages[0], " and ".join(name for name, _ in packages)
        yield WARN, f"{names} {why}; install {name} anew (requirements.txt), or remove it: pip uninstall {package}"
    yield NOTE, "; ".join(", ".join(names) if names is found else f"not installed: {', '.join(names)} (all optional)"
                          for names in (found, missing) if names)


def check_compilers(exam: Examination) -> Iterator[Verdict]:
    """Try the C compiler that Triton takes, and look for the driver's library and a place for compiled code. Raises
    UserError."""
    fault = host.compiler_fault() or (host.libcuda_fault() if exam.gpus and exam.torch else "")
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if exam.gpus and fault:
        yield FAIL, fault
    elif fault:
        yield NOTE, f"{fault.split('; ')[0]}; without a GPU nothing needs that"
    else:
        yield OK, f"C: {host.c_compiler()}, C++: {cxx or 'none'}, Python.h: yes"
    if exam.gpus:
        folder, why = host.triton_cache()
        if folder:
            yield NOTE, f"Triton keeps compiled code in {folder}: {why}"


# ----------------------------------------------------------------------------------------------------------------------
# GPUs


def check_driver(exam: Examination) -> Iterator[Verdict]:
    """Compare the driver with torch's CUDA; before torch is there, with that of requirements.txt."""
    rows, why = host.ask_nvidia_smi("driver_version")
    cuda = exam.torch.version.cuda or "" if exam.torch else cards.MADE_FOR_CUDA
    fault = cards.driver_fault(rows[0][0], cuda) if rows else ""
    if fault and exam.torch and exam.torch.cuda.is_available():  # NVIDIA's compatibility packages allow that
        yield OK, f"{rows[0][0]}, older than CUDA {cuda} asks for, but it works"
    elif fault:
        yield FAIL, fault
    else:
        yield (OK, rows[0][0]) if rows else (NOTE, why or "nvidia-smi lists no GPU")


def check_gpus(exam: Examination) -> Iterator[Verdict]:
    """List the GPUs and their memory, and compare their number with the processes."""
    if exam.torch and exam.torch.cuda.is_available():
        from nanofp8.machine import gpu_memory
        cuda = exam.torch.cuda
        for i in range(cuda.device_count()):
            try:
                exam.gpus.append(Gpu(cuda.get_device_name(i), cuda.get_device_capability(i), *gpu_memory(i)))
            except RuntimeError as error:
                yield FAIL, (f"GPU {i} cannot be used ({first_line(error)}); see nvidia-smi, choose others by "
                             f"CUDA_VISIBLE_DEVICES")
    elif exam.torch is None and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        for name, capability, free, total in host.ask_nvidia_smi("name,compute_cap,memory.free,memory.total")[0]:
            major, minor = map(int, capability.split("."))
            sizes_of = [int(size) * 2 ** 20 if size.isdecimal() else host.free_memory() for size in (free, total)]
            exam.gpus.append(Gpu(name, (major, minor), *sizes_of))  # a GPU that shares the machine's memory: [N/A]
    if not exam.gpus:
        yield NOTE, "none that torch can use; training runs on the CPU" if exam.torch else "none"
    for (name, capability), count in Counter(gpu[:2] for gpu in exam.gpus).items():
        free = sorted({f"{gpu.free / 1e9:.1f}" for gpu in exam.gpus if gpu[:2] == (name, capability)}, key=float)
        total = next(gpu.total for gpu in exam.gpus if gpu[:2] == (name, capability))
        yield OK, (f"{count} x {name}, compute capability {cards.dotted(capability)}, "
                   f"{' to '.join(dict.fromkeys((free[0], free[-1])))} of {total / 1e9:.1f} GB free")
    if exam.gpus and (fault := host.shared_memory_fault(exam.local_ranks)):
        yield WARN, fault
    if 0 < len(exam.gpus) < exam.local_ranks:
        yield FAIL, f"{exam.local_ranks} processes, but {len(exam.gpus)} GPU(s); set NPROC to at most that"


def check_formats(exam: Examination) -> Iterator[Verdict]:
    """Say what each format does on each kind of GPU, by the table of cards.py."""
    questions = {question.removeprefix("is_").removesuffix("_available"): question for question in cards.SUPPORT}
    if exam.torch:
        from nanofp8.precision import FORMATS
        questions = {f.name: f.question for f in FORMATS.values()}
    for capability in dict.fromkeys(gpu.capability for gpu in exam.gpus):
        by_verdict = {}
        for name, question in questions.items():
            by_verdict.setdefault(cards.verdict(question, capability, asked=True), []).append(name)
        yield NOTE, "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items())
        if fault := cards.age_fault(capability):
            yield FAIL, fault
            continue
        if capability not in cards.HAS_RUN:
            yield NOTE, (f"read from source, never run on compute capability {cards.dotted(capability)}; please send "
                         f"what `python bench.py card` writes (docs/cards.md)")


# ----------------------------------------------------------------------------------------------------------------------
# Flags, and what they choose


def definitions(path: str, **known: Any) -> SimpleNamespace:
    """Return DEFINITIONS of train.py by executing these parts of its source alone. known: names that they use."""
    with open(path, encoding="utf-8-sig") as f:
        tree = ast.parse(f.read())

    def name_of(node: ast.stmt) -> str:
        return getattr(node, "name", "") or ast.unparse(getattr(node, "targets", [ast.Name("")])[0])

    tree.body = [node for node in tree.body if name_of(node) in DEFINITIONS]
    exec(compile(tree, path, "exec", flags=__future__.annotations.compiler_flag), known)
    return SimpleNamespace(**{name: known[name] for name in DEFINITIONS})


def check_flags(exam: Examination) -> Iterator[Verdict]:
    """Resolve the flags as train.py does, with those of a checkpoint that is resumed. Raises UserError."""
    memory = sizes  # batch_sizes() stands there too; it does not know the formats' multiples
    if exam.torch:
        from nanofp8 import memory
    exam.train = definitions(
        exam.path, torch=exam.torch, memory=memory, auto_batch=sizes.auto_batch, steps_for=sizes.steps_for,
        batch_error=sizes.batch_error, value_embed_error=sizes.value_embed_error, may_choose=may_choose,
        precedence=precedence, UserError=UserError)
    cfg = parse_flags(exam.given, exam.path, exam.train.PRESETS, bool(exam.gpus))
    saved = {}
    if not exam.gpus and "preset" in cfg.auto and exam.torch:
        from nanofp8.machine import check_gpus
        check_gpus()
    if cfg.resume and exam.torch:
        from nanofp8 import checkpoint, resuming
        found, _ = resuming.choose_checkpoint(cfg)
        if found:
            saved = checkpoint.adopt_flags(found, cfg, exam.train.CLASSIC, SimpleNamespace(print=print))
        yield NOTE, f"resume: {found} (not verified)" if found else "resume: no checkpoint; a new run would start"
    exam.train.resolve_length(cfg, saved)
    exam.cfg, exam.resumed = cfg, bool(saved)
    if saved:
        checkpoint.check_fixed_flags(found, cfg)
        checkpoint.check_unfinished(found, cfg)
        memory.adopt_batch_size(found, cfg, SimpleNamespace(world_size=exam.ranks))
    parameters = sizes.parameter_count(cfg)
    yield OK, (f"preset {cfg.preset}: {parameters:,} parameters ({cfg.n_layer} layers, width {cfg.n_embd}, vocabulary "
               f"{cfg.vocab_size:,}), {cfg.max_iters:,} steps")


def check_batch(exam: Examination) -> Iterator[Verdict]:
    """Check the flags' combinations as train.py does, which lowers the micro-batch. Raises UserError."""
    cfg = exam.cfg
    exam.train.check_flags(cfg, exam.ranks, exam.resumed)
    micro_batches = cfg.total_batch_size // (exam.ranks * cfg.batch_size * cfg.block_size)
    at_most = " at most" if may_choose(cfg, "batch_size") and exam.gpus else ""
    yield OK, (f"{cfg.total_batch_size:,} tokens a step = {exam.ranks} rank(s) x {micro_batches} micro-batch(es) x "
               f"{cfg.batch_size} sequences{at_most} x {cfg.block_size} tokens"
               + (f"; first {stages}" if (stages := sizes.BatchPlan(cfg).describe()) else ""))


def check_precision(exam: Examination) -> Iterator[Verdict]:
    """Choose the number format as training does. Raises UserError."""
    if not exam.torch:
        return
    from nanofp8.precision import layer_names, match_layers, select_precision
    match_layers(exam.cfg.HIGH_PRECISION_LAYERS, layer_names(exam.cfg.n_layer))
    exam.precision = precision = select_precision(exam.cfg, exam.device)
    text = " ".join(filter(None, (precision.name, precision.reason, precision.details)))
    if exam.gpus and precision.emulated and exam.cfg.USE_EMULATION != True:  # noqa: E712 ("auto" is true as well)
        remedy = "--USE_FP8=False trains in bf16" if exam.version_of_te else "install Transformer Engine"
        yield WARN, f"{text}; this is slower than bf16, {remedy}"
    else:
        yield OK, text


def check_kernels(exam: Examination) -> Iterator[Verdict]:
    """Choose blocks' kernels and attention as training does. Raises UserError."""
    if not exam.precision:
        return
    from nanofp8.attention import choose_attention
    from nanofp8.epilogues import choose_quack
    from nanofp8.fused import blocks_fit
    cfg, device, precision = exam.cfg, exam.device, exam.precision
    fused = blocks_fit(cfg, precision, device)
    by = "our fused kernels" if fused else "the emulation" if precision.emulated else "Transformer Engine's modules"
    quack = choose_quack(cfg, device, precision.name if fused else "")[1]
    _, attention, warning = choose_attention(cfg, device, precision.emulated)
    yield OK, f"blocks: {by}{quack and f' ({quack})'}; attention: {attention}"
    if warning:
        yield WARN, f"attention is {warning}"


def check_optimizers(exam: Examination) -> Iterator[Verdict]:
    """Choose Muon's library and the wrapper as training does. Raises UserError."""
    if not exam.precision:
        return
    from nanofp8.muon import dion_muon, import_bitsandbytes
    cfg, procs = exam.cfg, SimpleNamespace(world_size=exam.ranks, device=exam.device)
    procs.gather = lambda _: [gpu.total for gpu in exam.gpus]
    wrapper, reason = exam.train.choose_wrapper(cfg, procs, sizes.parameter_count(cfg))
    if cfg.USE_8BIT_ADAM:
        import_bitsandbytes(exam.device, wrapper == "fsdp2")
    dion, why = dion_muon(cfg.muon_impl, exam.device, cfg.USE_COMPILE is True)
    yield OK, f"{'Muon by Dion' if dion else f'Muon by torch ({why})'}; wrapper: {wrapper} ({reason})"
    exam.wrapper = wrapper


def check_memory(exam: Examination) -> Iterator[Verdict]:
    """Choose the micro-batch as training does, by a prediction of memory. Raises UserError if not even weights fit."""
    if exam.precision and exam.gpus and exam.wrapper:
        from nanofp8 import memory
        procs = SimpleNamespace(world_size=exam.ranks, device=exam.device, gather=lambda value: [value])
        reason = memory.choose_batch_size(exam.cfg, exam.precision, exam.wrapper, procs).reason
        yield WARN if "may not fit" in reason else OK, f"micro-batch {reason}"


# ----------------------------------------------------------------------------------------------------------------------
# Data and disk


def check_data(exam: Examination) -> Iterator[Verdict]:
    """Find the shards and count their tokens. Raises UserError."""
    from nanofp8.shards import ShardError, find_shards, read_token_count  # imports numpy, if it is there
    cfg, found = exam.cfg, []
    folder = os.path.join(os.path.dirname(os.path.abspath(exam.path)), cfg.data_dir, cfg.dataset)
    for split, flag in (("train", "total_batch_size"), ("val", "block_size")):
        try:
            paths, _ = find_shards(folder, split)
            tokens, needed = sum(map(read_token_count, paths)), getattr(cfg, flag)
        except ShardError as error:
            raise UserError(str(error)) from None
        if tokens <= needed:
            raise UserError(f"the {split} shards of {cfg.dataset} hold {tokens:,} tokens, and {flag}={needed:,} needs "
                            f"more; lower it, or add shards")
        found.append(f"{tokens:,} {split} tokens in {len(paths)} shard(s)")
        if split == "train":
            length = sizes.BatchPlan(cfg).total
            found[0] += f" (the run reads {length:,}: {length / tokens:.2f} epochs)"
    yield OK, f"{cfg.dataset}: {', '.join(found)}"


def check_disk(exam: Examination) -> Iterator[Verdict]:
    """Compare what is free at out_dir with what checkpoints take."""
    cfg, size = exam.cfg, sizes.checkpoint_bytes(exam.cfg) / 1e9
    folder = os.path.abspath(cfg.out_dir)
    while not os.path.lexists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        yield FAIL, f"{folder} is not a folder; choose another --out_dir"
        return
    free, most = shutil.disk_usage(folder).free / 1e9, cfg.keep_checkpoints + 1  # one more while it is written
    text = f"{folder}: {free:,.1f} GB free"
    if not os.access(folder, os.W_OK):
        yield FAIL, f"{folder} cannot be written; choose another --out_dir"
    elif not cfg.keep_checkpoints:
        yield OK, f"{text}; no checkpoints (keep_checkpoints=0)"
    elif free < size:
        yield FAIL, f"{text}, but a checkpoint takes {size:,.2f} GB; make room, or --out_dir, or --keep_checkpoints=0"
    elif free < most * size:
        yield WARN, (f"{text}, but {most} checkpoints of {size:,.2f} GB exist at times; make room, choose another "
                     f"--out_dir, or --keep_checkpoints=1")
    else:
        yield OK, f"{text}; at most {most} checkpoints of {size:,.2f} GB at a time"


# ----------------------------------------------------------------------------------------------------------------------
# The report

CHECKS: tuple[tuple[str, Callable[[Examination], Iterator[Verdict]]], ...] = (
    ("system", check_system), ("Python", check_python), ("torch", check_torch), ("numpy", check_numpy),
    ("driver", check_driver), ("GPU", check_gpus), ("formats", check_formats), ("packages", check_packages),
    ("compilers", check_compilers), ("flags", check_flags), ("batch", check_batch),
    ("Transformer Engine", check_transformer_engine), ("libraries", check_libraries), ("precision", check_precision),
    ("kernels", check_kernels), ("optimizers", check_optimizers), ("memory", check_memory), ("data", check_data),
    ("disk", check_disk),
)
NEED_FLAGS = {"batch", "Transformer Engine", "precision", "kernels", "optimizers", "memory", "data", "disk"}


def examine(exam: Examination) -> Iterator[tuple[str, str, str]]:
    """Make all checks. Yields (mark, name, text) of each line of the report; a fault is reported once."""
    seen = set()
    for name, check in CHECKS:
        if name in NEED_FLAGS and exam.cfg is None:
            continue
        found = []
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                    warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for verdict in check(exam):  # what came before an exception counts
                    found.append(verdict)
        except UserError as error:
            found.append((FAIL, str(error)))
        except Exception as error:
            text = f"this could not be checked ({type(error).__name__}: {error_line(error)}); please report it"
            found.append((FAIL if name == "flags" else WARN, text))  # without flags, little is judged
        for mark, text in found:
            if mark != FAIL or text not in seen:
                yield mark, name, " ".join(text.split())
            seen.add(text)


def format_line(mark: str, name: str, text: str, color: bool) -> str:
    """Return a line of the report, wrapped to WIDTH. color: for a terminal."""
    first = f"{mark:<5} {name:<{INDENT - 7}} "
    line = textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * INDENT, break_on_hyphens=False)
    if not color or mark == NOTE:
        return line
    return f"\033[32m{line[:5]}\033[0m{line[5:]}" if mark == OK else f"\033[31m{line}\033[0m"


def number_in(variable: str) -> int:
    """Return the number in one of torchrun's environment variables; 1 if there is none."""
    text = os.environ.get(variable, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() else 1


def run(path: str, given: Sequence[str]) -> int:
    """Print the report on the machine for these flags. Returns the exit status: 1 if training would fail.

    path: of train.py. given: flags as arguments, whose names and types are right.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    color = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    exam = Examination(path, list(given), number_in("WORLD_SIZE"), number_in("LOCAL_WORLD_SIZE"))
    marks, sys.dont_write_bytecode = Counter(), True
    command = " ".join([os.path.basename(path), *given])
    console(textwrap.fill(f"{command}, {exam.ranks} process(es), on this machine:", WIDTH, break_on_hyphens=False))
    for mark, name, text in examine(exam):
        marks[mark] += 1
        console(format_line(mark, name, text, color))
    warned = f" {marks[WARN]} warning(s)." if marks[WARN] else ""
    if marks[FAIL]:
        console(f"Training with these flags would fail: {marks[FAIL]} line(s) marked {FAIL} say what to do.{warned}")
    else:
        console(f"Training with these flags would start.{warned}")
    return int(marks[FAIL] > 0)
