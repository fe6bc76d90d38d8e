"""
Compile every Triton kernel, in every variant that training asks for, for each kind of GPU. Needs no GPU.

    python tools/compile_matrix.py                            # writes results/cpu/compile_matrix.md
    python tools/compile_matrix.py --out=/tmp/matrix.md --cases=tiny --targets=80,120

Small models of the presets' widths run one forward and backward pass on the CPU. Where a kernel would be launched, its
arguments are recorded instead: so the variants are those of the real launch code, with its dtypes, constants and
alignments. Each is then compiled for each target. Registers and spills are those that `ptxas -v` prints, which comes
with Triton; shared memory is Triton's own figure. FP8 variants are not compiled for sm_80, where nothing asks for them.
torch.compile's kernels are not among them: it makes its own.

    --targets=80,89,...   compute capabilities without the dot; 103, 110 and 121 are known too
    --cases=d20,tiny,...  of CASES; each runs in bf16 and FP8, with weights in fp32, and in bf16 as under FSDP2
    --out=PATH            the table; "": print nothing but errors
    --jobs=2              processes

Exit status: 1 if a variant does not compile or does not fit a card, 2 for wrong arguments.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # the tests set it; interpreted kernels cannot be compiled

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

from nanofp8.config import OneLineParser, UserError, exit_with


class Target(NamedTuple):
    """A kind of GPU."""

    cards: str
    shared: int  # bytes of shared memory that one block of threads can have (CUDA C++ Programming Guide)


TARGETS = {
    80: Target("A100", 163 << 10), 89: Target("RTX 4090, L40S", 99 << 10), 90: Target("H100, H200", 227 << 10),
    100: Target("B200", 227 << 10), 103: Target("B300", 227 << 10), 110: Target("Thor", 227 << 10),
    120: Target("RTX 5090, RTX PRO 6000", 99 << 10), 121: Target("GB10", 99 << 10),
}
DEFAULT_TARGETS = "80,89,90,100,120"
REGISTERS_PER_BLOCK = 65536  # of all targets
MAX_SPILLED = 64             # bytes a thread: a few, in a kernel that waits for memory, cost nothing that shows
LAYERS = 3  # the first block, the last, and one between: launches depend on nothing else of the depth
CASES = {
    "d20": dict(preset="d20"),
    "speedrun": dict(preset="speedrun", n_value_embed=1),
    "d12": dict(preset="d12", n_value_embed=1),
    "tiny": dict(preset="tiny"),
    "no softcap": dict(preset="tiny", logit_softcap=0),
}

# What fused.py asks about a GPU, which selects the kernels of FP8: most GPUs; those of cards.own_quantize(); those of
# cards.any_fp8_layout()
FP8_KERNELS = (dict(needs_transposes=True, own_quantize=False), dict(needs_transposes=True, own_quantize=True),
               dict(needs_transposes=False, own_quantize=False))

# The argument of a kernel that has the weights' dtype: fp32, or bf16 under FSDP2. quantize_fp8 takes gradients too
WEIGHTS = {"add_norm_forward": "gain_ptr", "add_norm_backward": "gain_ptr", "embed_norm_forward": "table_ptr",
           "value_embedding_forward": "table_ptr", "value_embedding_backward": "table_ptr",
           "embedding_gradient": "grad_ptr", "quantize_fp8": "x_ptr"}


class Launch(NamedTuple):
    """One launch as Triton would compile it."""

    kernel: str
    signature: tuple[tuple[str, str], ...]    # of each argument: its type, or "constexpr"
    constants: tuple[tuple[tuple, Any], ...]  # values of the constants, by their place
    aligned: tuple[tuple, ...]                # places of the arguments that are divisible by 16
    num_warps: int

    @property
    def fp8(self) -> bool:
        """Whether it writes FP8, for which a GPU before sm_89 has no instructions."""
        return "fp8" in self.kernel + str(self.signature) or dict(self.named_constants()).get("FP8") is True

    def named_constants(self) -> list[tuple[str, Any]]:
        """Return (name, value) of the constants that are constexpr arguments of the kernel."""
        names = [name for name, _ in self.signature]
        return [(names[place[0]], value) for place, value in self.constants if names[place[0]].isupper()]

    def variant(self) -> str:
        """Return what tells it from launches of the same kernel, except alignment: constants, outputs that an FP8
        kernel leaves out, the weights' dtype."""
        constants = [name if value is True else f"{name}={value}" for name, value in self.named_constants()
                     if value is not False]
        names = [name for name, _ in self.signature]
        absent = [f"no {names[place[0]].removesuffix('_ptr')}" for place, value in self.constants
                  if self.fp8 and value is None and names[place[0]] in ("cols_ptr", "amax_ptr")]
        weights, label = dict(self.signature).get(WEIGHTS.get(self.kernel, ""), ""), "weights"
        if self.kernel == "quantize_fp8":
            label = "x"
        return ", ".join(constants + absent + [f"{label} {weights.removeprefix('*')}"] * bool(weights))


class Compiled(NamedTuple):
    """What a compiler said of one variant on one target."""

    registers: int
    spilled: int  # bytes
    shared: int   # bytes
    error: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# Recording


class NoDevice:
    """Stands for Triton's CUDA driver: tells what is compiled for, and launches nothing."""

    def __init__(self, target: int = 90):
        """target: compute capability, 90 for 9.0. A launch is specialized alike for all."""
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.target, 32)


def record(cases: list[str]) -> dict[Launch, None]:
    """Return all different launches of the cases, in the order in which they came."""
    import torch
    from triton.runtime import jit
    from triton.runtime.driver import driver

    import train
    from nanofp8 import epilogues, fused, loss

    launches: dict[Launch, None] = {}

    def run(self, *args, grid, warmup, **options):
        """Take the place of JITFunction.run."""
        *_, backend, binder = self.device_caches[0]
        bound, specialization, parsed = binder(*args, **options)
        parsed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, parsed)
        launches[Launch(self.fn.__name__, tuple(signature.items()), tuple(sorted(constants.items())),
                        tuple(sorted(place for place, value in attributes.items() if value)), parsed.num_warps)] = None

    def matmul(a, b, dtype=torch.bfloat16, out=None, **_):
        """Take the place of fused.matmul: nothing of a right shape and dtype, as a GPU would return it."""
        a, b = (x.data if isinstance(x, fused.Fp8) else x for x in (a, b))
        return torch.zeros(a.shape[0], b.shape[0], dtype=dtype) if out is None else out

    def relu2_backward_matmul(grad, weight, activation, scaling):
        """Take the place of QuACK's; logits_matmul and the others too."""
        rows = torch.zeros(len(grad.data), len(weight.data)).to(scaling.dtype)
        return tuple(fused.Fp8(x, scaling.inverse) for x in (rows, rows.t().contiguous()))

    def logits_matmul(h, weight, softcap):
        return matmul(h, weight), torch.zeros(len(h.data), -(-len(weight.data) // epilogues.TILE_N))

    driver.set_active(NoDevice())
    patches = [mock.patch.object(jit.JITFunction, "run", run), mock.patch.object(fused, "INTERPRET_ON_CPU", True),
               mock.patch.object(fused, "te_quantizer", lambda *_: None),
               *(mock.patch.object(module, "kernels_fit", lambda *_: True) for module in (train, fused)),
               *(mock.patch.object(module, "matmul", matmul) for module in (fused, loss)),
               mock.patch.object(epilogues, "plain_matmul", matmul),
               mock.patch.object(epilogues, "relu2_matmul",
                                 lambda x, weight, scaling: matmul(x, weight).to(scaling.dtype)),
               mock.patch.object(epilogues, "relu2_backward_matmul", relu2_backward_matmul),
               mock.patch.object(epilogues, "logits_matmul", logits_matmul)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for case in cases:
            for fsdp2 in (False, True):
                one_pass(CASES[case], False, fsdp2)
                for changes, quack in [*((answers, False) for answers in FP8_KERNELS), (FP8_KERNELS[0], True)]:
                    with mock.patch.multiple(fused, **{name: lambda v=value: v for name, value in changes.items()}):
                        one_pass(CASES[case], True, fsdp2, quack)
    return launches


def one_pass(changes: dict[str, Any], fp8: bool, fsdp2: bool, quack: bool = False) -> None:
    """Run forward, backward and evaluation of a small model with fused blocks, and of RopeQKNorm for other blocks.

    quack: as where QuACK multiplies.
    """
    import torch

    import train
    from nanofp8 import epilogues, te_emulation
    from nanofp8.fused import FusedBlocks, RopeQKNorm
    from nanofp8.muon import apply_update, momentum_update
    from nanofp8.precision import FORMATS, Precision

    changes = changes | dict(n_layer=LAYERS, vocab_size=512, block_size=32, batch_size=2, loss_chunk_size=64,
                             total_batch_size=64, USE_FP8=fp8, USE_QUACK=False)
    cfg = train.read_flags([f"--{name}={value}" for name, value in changes.items()], has_gpu=True)
    chosen = FORMATS["fp8-delayed" if fp8 else "bf16"]
    precision = Precision(te_emulation, chosen, None, False, "")
    model = train.GPT(cfg, precision, lambda f: f, torch.device("cpu"))
    # What FusedBlocks reads of Transformer Engine and of its layers
    state = SimpleNamespace(is_fp8_enabled=lambda: fp8, reduce_and_update_fp8_tensors=lambda **_: None)
    model.te = SimpleNamespace(quantization=SimpleNamespace(FP8GlobalStateManager=state))
    for block in model.blocks:
        for layer, gemms in ((block.attn.qkv, 1), (block.attn.proj, 1), (block.mlp, 2)):
            layer.fp8, layer.prepare_forward, layer.end_forward = fp8, lambda *_, **__: None, lambda: None
            layer.fp8_meta = {key: SimpleNamespace(scale=torch.ones(count * gemms),
                                                   amax_history=torch.zeros(4, count * gemms))
                              for key, count in (("scaling_fwd", 3), ("scaling_bwd", 2))}
    model.fused = FusedBlocks(model, epilogues.Quack(fp8=quack))
    model.head.quack = quack and model.head.softcap > 0
    if fsdp2:  # its policy casts all parameters but the residual scalars
        for name, module in model.named_children():
            if name != "scales":
                module.bfloat16()
    idx = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.int32)
    model(idx, idx.long(), first=True).backward()
    if not fsdp2:  # gradients exist now: the second micro-batch adds to them
        model(idx, idx.long(), first=False, in_place="add").backward()
    with torch.no_grad():
        model(idx, idx.long())
    qkv = torch.zeros(cfg.batch_size, cfg.block_size, 3 * cfg.n_embd, dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.backward(*zip(*[(x, torch.zeros_like(x)) for x in RopeQKNorm.apply(
        qkv * 1, model.cos, model.sin, cfg.n_head, cfg.norm_eps)], strict=True))
    weights, one = [torch.zeros(64, 64)], torch.ones(())
    for update in (momentum_update(weights, weights, one, nesterov=True), weights):  # of Muon, of NorMuon
        for cautious in (False, True):
            apply_update(weights, update, one, one, one, cautious)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling


def compile_one(launch: Launch, target: int) -> Compiled:
    """Compile one variant for one target (in a process of its own)."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import driver

    from nanofp8 import kernels
    driver.set_active(NoDevice(target))  # kernels.round_fp8() asks
    knobs.nvidia.dump_ptxas_log = True
    attributes = {place: [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(getattr(kernels, launch.kernel), dict(launch.signature), dict(launch.constants), attributes)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            kernel = triton.compile(source, target=GPUTarget("cuda", target, 32),
                                    options=dict(num_warps=launch.num_warps))
    except Exception as error:
        return Compiled(0, 0, 0, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if "cvt.rz.f16" in kernel.asm["ptx"]:
        return Compiled(0, 0, 0, "cuts values to fp16 before it rounds them to FP8")
    log = printed.getvalue()
    registers = re.search(r"Used (\d+) registers", log)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return Compiled(int(registers[1]) if registers else 0, spilled, kernel.metadata.shared)


def compile_all(launches: list[Launch], targets: list[int], jobs: int) -> dict[tuple[Launch, int], Compiled]:
    """Compile all variants for all targets that have their instructions."""
    tasks = [(launch, target) for launch in launches for target in targets if target >= 89 or not launch.fp8]
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        # A cached kernel would print no ptxas log. spawn: torch's threads must not be forked
        with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            return dict(zip(tasks, pool.map(compile_one, *zip(*tasks, strict=True), chunksize=4), strict=True))


def problems(results: dict[tuple[Launch, int], Compiled]) -> list[str]:
    """Return one line for each variant that does not compile, spills many registers, or does not fit a card."""
    lines = []
    for (launch, target), result in results.items():
        where = f"{launch.kernel} ({launch.variant()}) on sm_{target}"
        if result.error:
            lines.append(f"{where} does not compile: {result.error}")
        elif not result.registers:
            lines.append(f"{where}: ptxas -v printed no number of registers")
        if result.spilled > MAX_SPILLED:
            lines.append(f"{where} spills {result.spilled} bytes of registers")
        if result.shared > TARGETS[target].shared:
            lines.append(f"{where} needs {result.shared} bytes of shared memory, but has {TARGETS[target].shared}")
        if result.registers * launch.num_warps * 32 > REGISTERS_PER_BLOCK:
            lines.append(f"{where} needs {result.registers} registers in each of {32 * launch.num_warps} threads")
    return lines


def table(results: dict[tuple[Launch, int], Compiled], targets: list[int]) -> list[str]:
    """Return one row per kernel and variant: of its launches, which differ in alignment, the largest figures."""
    rows: dict[tuple[str, str, int], dict[int, list[Compiled]]] = {}
    for (launch, target), result in results.items():
        row = rows.setdefault((launch.kernel, launch.variant(), launch.num_warps), {})
        row.setdefault(target, []).append(result)

    def cell(found: list[Compiled]) -> str:
        if not found:
            return "not asked for"
        if any(result.error for result in found):
            return "fails"
        spilled, shared = max(r.spilled for r in found), max(r.shared for r in found)
        return f"{max(r.registers for r in found)}, {shared:,}" + (f", {spilled} spilled" if spilled else "")

    lines = [f"| kernel | variant | warps | launches | {' | '.join(f'sm_{t}' for t in targets)} |",
             "|---|---|---|---|" + "---|" * len(targets)]
    for (kernel, variant, warps), found in sorted(rows.items()):
        cells = " | ".join(cell(found.get(target, [])) for target in targets)
        lines.append(f"| {kernel} | {variant} | {warps} | {max(map(len, found.values()))} | {cells} |")
    return lines


def markdown(results: dict[tuple[Launch, int], Compiled], targets: list[int]) -> str:
    """Return the file that is written."""
    import triton
    cards = "; ".join(f"sm_{t}: {TARGETS[t].cards}, {TARGETS[t].shared:,} bytes of shared memory" for t in targets)
    launches, wrong = {launch for launch, _ in results}, problems(results)
    spills = {(launch.kernel, launch.variant(), target) for (launch, target), result in results.items()
              if result.spilled}
    limits = f"{len(wrong)} fail, exceed a limit or spill more than {MAX_SPILLED} bytes a thread"
    return "\n".join([
        "# Triton kernels, compiled for each kind of GPU",
        f"`python tools/compile_matrix.py`, Triton {triton.__version__}, without a GPU: compiled, not run.", "",
        f"{len(launches)} launches of {len({launch.kernel for launch in launches})} kernels, {len(results)} "
        f"compilations. {limits}; {len(spills)} cells spill fewer.", "",
        f"{cards}.", "",
        "Cells: registers a thread, bytes of shared memory a block, bytes of spilled registers (stores and loads).",
        "They are the largest of the variant's launches, which differ in the alignment of their arguments.",
        "FP8 needs sm_89; on sm_80 nothing asks for it.", "",
        *table(results, targets)]) + "\n"


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--targets", default=DEFAULT_TARGETS)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", default=str(ROOT / "results" / "cpu" / "compile_matrix.md"))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    targets, cases = args.targets.split(","), args.cases.split(",")
    for name, given, known in (("targets", targets, [*map(str, TARGETS)]), ("cases", cases, [*CASES])):
        if wrong := [value for value in given if value not in known]:
            raise UserError(f"--{name}: unknown '{wrong[0]}'; choose from {', '.join(known)}", 2)
    targets = [int(target) for target in targets]
    results = compile_all(list(record(cases)), targets, args.jobs)
    if args.out:
        pathlib.Path(args.out).write_text(markdown(results, targets))
    if wrong := problems(results):
        print("\n".join(wrong), file=sys.stderr)
        raise UserError(f"{len(wrong)} problems with the kernels (above)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error, "compile_matrix.py")
