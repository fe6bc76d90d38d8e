"""Precision: the one place that knows number formats, and who computes them; FP8's scaling state; layers in bf16.

To add a format, add one entry to FORMATS. FP8_RECIPE=x selects the entry fp8-x; a flag of its own needs a line in
choose_format().
"""

import contextlib
import fnmatch
import importlib
import inspect
import warnings
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from nanofp8 import cards
from nanofp8.config import UserError
from nanofp8.files import console, error_line
from nanofp8.machine import check_capability, check_compiler, check_triton

# ----------------------------------------------------------------------------------------------------------------------
# Formats


def delayed_scaling(recipes: Any, cfg: SimpleNamespace, lacking: Collection[str]) -> Any:
    """Build DelayedScaling: E4M3 forward, E5M2 gradients, scales from the amaxes of earlier micro-batches.

    Ranks share their amaxes after a step (share_amaxes), not in each pass: there they would wait for the slowest.
    """
    return recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID, margin=cfg.FP8_MARGIN, reduce_amax=False,
                                  amax_history_len=cfg.FP8_AMAX_HISTORY, amax_compute_algo="max")


def nvfp4_scaling(recipes: Any, cfg: SimpleNamespace, lacking: Collection[str]) -> Any:
    """Build NVFP4BlockScaling with the ingredients that the flags ask for, except those in `lacking`."""
    off = {field: flag in lacking or not getattr(cfg, flag) for flag, (field, _) in NVFP4_INGREDIENTS.items()}
    return recipes.NVFP4BlockScaling(**off)


@dataclass(frozen=True)
class Format:
    """What the script must know of a number format of block matmuls."""

    name: str                       # as logs and tables name it
    # Builds the recipe from (TE's module of recipes, flags, flags that TE cannot follow here); None: bf16 needs none
    recipe: Callable[[Any, SimpleNamespace, Collection[str]], Any] | None = None
    question: str = ""              # name of TE's function that says whether the device has the format
    multiple: int = 1               # n_embd and the tokens of a micro-batch must be multiples of this
    fused: bool = False             # our fused blocks (fused.py) can run it
    fp8_head: bool = False          # the head's matmuls can be FP8 too
    calibrated: bool = False        # scales come from earlier micro-batches: calibration passes fill the amax history
    flags: tuple[str, ...] = ()     # flags that have no effect with other formats


FP8_FLAGS = ("FP8_RECIPE", "USE_FP8_HEAD")
# {flag: (field of TE's recipe that switches it off, name)}
NVFP4_INGREDIENTS = {
    "NVFP4_HADAMARD": ("disable_rht", "Hadamard transform"),
    "NVFP4_STOCHASTIC_ROUNDING": ("disable_stochastic_rounding", "stochastic rounding"),
    "NVFP4_2D_WEIGHTS": ("disable_2d_quantization", "2-D weights"),
}
FORMATS = {f.name: f for f in (
    Format("bf16", fused=True),
    Format("fp8-delayed", delayed_scaling, "is_fp8_available", 16, fused=True, fp8_head=True, calibrated=True,
           flags=(*FP8_FLAGS, "FP8_MARGIN", "FP8_AMAX_HISTORY", "FP8_CALIBRATION_STEPS")),
    Format("fp8-current", lambda recipes, *_: recipes.Float8CurrentScaling(), "is_fp8_available", 16, fp8_head=True,
           flags=FP8_FLAGS),
    Format("fp8-block", lambda recipes, *_: recipes.Float8BlockScaling(), "is_fp8_block_scaling_available", 128,
           fp8_head=True, flags=FP8_FLAGS),
    Format("fp8-mxfp8", lambda recipes, *_: recipes.MXFP8BlockScaling(), "is_mxfp8_available", 32, fp8_head=True,
           flags=FP8_FLAGS),
    Format("nvfp4", nvfp4_scaling, "is_nvfp4_available", 128, flags=tuple(NVFP4_INGREDIENTS)),
)}


def choose_format(cfg: SimpleNamespace) -> Format:
    """Return the format that the flags ask for."""
    return FORMATS["nvfp4" if cfg.USE_NVFP4 else f"fp8-{cfg.FP8_RECIPE}" if cfg.USE_FP8 else "bf16"]


def has_fp8_head(chosen: Format, cfg: SimpleNamespace) -> bool:
    """Whether the head's matmuls run in FP8. Raises UserError as match_layers() does."""
    kept = match_layers(cfg.HIGH_PRECISION_LAYERS, layer_names(cfg.n_layer))
    return chosen.fp8_head and cfg.USE_FP8_HEAD and "head" not in kept


def check_format(chosen: Format, cfg: SimpleNamespace) -> None:
    """Check that the model's shapes and the other flags fit the format. Raises UserError."""
    name, tokens = chosen.name, cfg.batch_size * cfg.block_size
    if cfg.n_embd % chosen.multiple or tokens % chosen.multiple:
        off = "--USE_NVFP4=False --USE_FP8=False" if cfg.USE_NVFP4 else "--USE_FP8=False"
        raise UserError(f"{name} needs n_embd and batch_size x block_size divisible by {chosen.multiple}, "
                        f"got {cfg.n_embd} and {tokens}; choose others, or {off} for bf16", 2)
    if has_fp8_head(chosen, cfg) and (cfg.vocab_size % 16 or cfg.loss_chunk_size % 16):
        raise UserError(f"an FP8 head needs vocab_size and loss_chunk_size divisible by 16, got {cfg.vocab_size} and "
                        f"{cfg.loss_chunk_size}; choose others, or --USE_FP8_HEAD=False", 2)
    if cfg.FP8_STATS_INTERVAL and chosen.recipe is None:
        raise UserError("FP8_STATS_INTERVAL has nothing to look at in bf16; "
                        "set USE_FP8 or USE_NVFP4, or leave it at 0", 2)


# ----------------------------------------------------------------------------------------------------------------------
# Transformer Engine

# All of Transformer Engine that this project uses: module, names in it, arguments that they must take. Most are not
# part of its documented interface, so that another version may lack them
TE, QUANTIZATION = "transformer_engine.pytorch", "transformer_engine.pytorch.quantization"
TE_PARTS = (
    (TE, "Linear LayerNormLinear LayerNormMLP RMSNorm DotProductAttention checkpoint", ""),
    (TE, "is_fp8_available is_fp8_block_scaling_available is_mxfp8_available is_nvfp4_available", "return_reason"),
    (TE, "autocast", "enabled recipe"),
    (TE, "Float8Quantizer", "scale amax fp8_dtype columnwise"),
    ("transformer_engine.common.recipe", "Format DelayedScaling Float8CurrentScaling Float8BlockScaling "
                                         "MXFP8BlockScaling NVFP4BlockScaling", ""),
    (QUANTIZATION, "FP8GlobalStateManager.is_fp8_enabled FP8GlobalStateManager.reset", ""),
    (QUANTIZATION, "FP8GlobalStateManager.reduce_and_update_fp8_tensors", "forward"),
    (TE + ".module.base", "TransformerEngineBaseModule.prepare_forward", "num_gemms"),
    (TE + ".module.base", "TransformerEngineBaseModule.end_forward", ""),
    (TE + ".constants", "DType.kFloat8E4M3 DType.kFloat8E5M2", ""),
    (TE + ".cpp_extensions", "general_gemm", "A B out_dtype out accumulate layout use_split_accumulator"),
    (TE + ".tensor.storage.float8_tensor_storage", "Float8TensorStorage", ""),
    ("transformer_engine_torch", "fp8_transpose get_cublasLt_version", ""),
)


def missing_parts() -> list[str]:
    """Return what the installed Transformer Engine lacks of TE_PARTS, as dotted names."""
    missing = []
    for module, names, arguments in TE_PARTS:
        for name in names.split():
            try:
                part = importlib.import_module(module)
                for step in name.split("."):
                    part = getattr(part, step)
                known = inspect.signature(part).parameters if arguments else ()
                missing += [f"{module}.{name}({argument})" for argument in arguments.split() if argument not in known]
            except (ImportError, AttributeError):
                missing.append(f"{module}.{name}")
    return missing


def import_transformer_engine() -> tuple[ModuleType, ModuleType, str]:
    """Import Transformer Engine; return transformer_engine.pytorch, its module of recipes, and its version.

    Its warnings are switched off: they are about other frameworks, and repeat with every pass.
    Raises: ImportError in one line, whatever a broken installation raises (OSError for a missing library, and more);
        UserError if it is too old or lacks something that is used here.
    """
    warnings.filterwarnings("ignore", module="transformer_engine")
    try:
        import transformer_engine.pytorch
        from transformer_engine.common import recipe
    except Exception as error:
        raise ImportError(error_line(error)) from error
    version = getattr(transformer_engine, "__version__", "of unknown version")
    remedy = (f"install {cards.TE_MADE_FOR} as docs/install.md says, or choose another Python; "
              f"--USE_EMULATION=True does without it, slowly")
    if reason := cards.unsupported_version(version):
        raise UserError(f"{reason}; {remedy}")
    if missing := missing_parts():
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"Transformer Engine {version} lacks what this code uses: {', '.join(missing[:3])}{more}; "
                        f"{remedy}")
    return transformer_engine.pytorch, recipe, version


# ----------------------------------------------------------------------------------------------------------------------
# What a run uses


@dataclass
class Precision:
    """The format of block matmuls, and who computes it."""

    te: ModuleType   # the layers' library: transformer_engine.pytorch, or nanofp8.te_emulation
    format: Format
    recipe: Any      # Transformer Engine's, or the emulation's, of the format; None: bf16
    emulated: bool   # by nanofp8.te_emulation
    reason: str      # of that choice, for the start-up table
    details: str = ""  # which of the format's parts run, for the start-up table
    grad_zscore: float = 0.0  # what skip_grad_zscore="auto" stands for

    @property
    def name(self) -> str:
        """The format's name: "bf16", "fp8-delayed", ..., "nvfp4"."""
        return self.format.name

    @property
    def fused(self) -> bool:
        """Whether our fused blocks can take the place of Transformer Engine's modules."""
        return self.format.fused and not self.emulated

    def fp8_head(self, cfg: SimpleNamespace) -> bool:
        """Whether the head's matmuls run in FP8."""
        return has_fp8_head(self.format, cfg)

    def calibration_steps(self, cfg: SimpleNamespace) -> int:
        """Return the number of first steps that a calibration pass precedes."""
        return cfg.FP8_CALIBRATION_STEPS if self.format.calibrated else 0

    def evaluation_formats(self, cfg: SimpleNamespace) -> list[str]:
        """Return the formats to evaluate in; the first is the one that counts (EVAL_PRECISION)."""
        names = list(dict.fromkeys(("bf16", self.name)))
        return names if cfg.EVAL_PRECISION == "bf16" else names[::-1]

    def flags_without_effect(self, cfg: SimpleNamespace) -> list[str]:
        """Return the flags that were given for other formats, each as "NAME=value"."""
        others = dict.fromkeys(flag for f in FORMATS.values() for flag in f.flags if flag not in self.format.flags)
        return [f"{flag}={getattr(cfg, flag)}" for flag in others if flag in cfg.explicit]

    @contextlib.contextmanager
    def autocast(self, procs: Any, quantized: bool = True) -> Iterator[None]:
        """Enter the context of a forward pass: bf16 by torch.autocast, FP8 or NVFP4 by te.autocast.

        Args:
            procs: Processes (device).
            quantized: False: bf16 although the run has a format.
        """
        enabled = quantized and self.recipe is not None
        recipe = self.recipe if enabled else None
        with torch.autocast(procs.device.type, dtype=torch.bfloat16), self.te.autocast(enabled=enabled, recipe=recipe):
            yield

    @torch.no_grad()
    def share_amaxes(self, model: nn.Module, procs: Any) -> None:
        """Give all ranks the largest amaxes of any rank and the scales that follow, if it is delayed scaling.

        So a checkpoint of one rank's state is that of all. Until the next call each rank adds its own amaxes: ranks may
        scale differently, because a product is divided by the scales that its operands were multiplied by. The oldest
        amax of the history counted in TE's last scale, which dropped it: it does not count here.
        """
        state = fp8_state(model) if procs.world_size > 1 else {}
        if not state:
            return
        names = [name.removesuffix("scale") for name in state if name.endswith(".scale")]
        names.sort(key=lambda name: ".scaling_bwd." in name)
        scales, histories = ([state[name + key] for name in names] for key in ("scale", "amax_history"))
        # Where no history says otherwise, the smallest scale: with FP8_AMAX_HISTORY=1 all amaxes are forgotten by now
        shared, sizes = torch.cat([torch.cat(histories, dim=1), -torch.cat(scales)[None]]), [len(s) for s in scales]
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        history, before = shared[:-1], -shared[-1]
        amax = history.amax(0)
        forward = sum(size for name, size in zip(names, sizes, strict=True) if ".scaling_fwd." in name)
        limits = torch.full_like(amax, torch.finfo(torch.float8_e5m2).max)
        limits[:forward] = torch.finfo(torch.float8_e4m3fn).max
        limits *= 2.0 ** -self.recipe.margin
        after = (limits / amax).clamp(max=torch.finfo(torch.float32).max)
        after = torch.where((amax > 0) & amax.isfinite(), after, before)  # as Transformer Engine does
        torch._foreach_copy_(histories, history.split(sizes, dim=1))
        torch._foreach_copy_(scales, after.split(sizes))


def select_precision(cfg: SimpleNamespace, device: torch.device) -> Precision:
    """Choose the number format, and Transformer Engine or its emulation, by asking TE what the device can do.

    A GPU without the default format trains in bf16, unless a flag asks for a format: emulation is slower than bf16.
    Raises: UserError.
    """
    chosen, missing, note, lacking, why_lacking = choose_format(cfg), "", "", (), ""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        check_capability(capability)
        check_triton(capability)
        check_compiler()
    if cfg.USE_EMULATION is True:
        missing = "USE_EMULATION=True"
    elif device.type != "cuda":
        missing = "no GPU"
    else:
        try:
            te, recipes, version = import_transformer_engine()
        except ImportError as error:
            missing = f"Transformer Engine cannot be imported: {error}"
            if not device.index and chosen.recipe:  # on each machine once
                console(f"warning: {error_line(error)}: Transformer Engine cannot be imported, so {chosen.name} is "
                        f"emulated, which is slower than bf16; install it (docs/install.md), or use --USE_FP8=False")
    if not missing and chosen.question:
        available, why = getattr(te, chosen.question)(return_reason=True)
        asked = chosen.name != "fp8-delayed" or {"USE_FP8", "FP8_RECIPE"} & {*cfg.explicit}
        if not available and not asked:
            chosen, note = FORMATS["bf16"], f" (no FP8 here: {why.rstrip('.')}; --USE_FP8=True emulates it)"
        elif not available:
            missing = why.rstrip(".")
    check_format(chosen, cfg)
    if missing:
        from nanofp8 import te_emulation as te
        recipes = te.recipe
    elif chosen.name == "nvfp4":
        lacking, why_lacking = check_nvfp4(cfg, capability, version)
    recipe = chosen.recipe and chosen.recipe(recipes, cfg, lacking)
    by = f"by nanofp8/te_emulation.py ({missing})"
    if not missing:
        by = f"by Transformer Engine {version}{cards.untried_version(version)}{note}"
    fp8_on_12 = not missing and chosen.name.startswith("fp8") and capability[0] == 12
    return Precision(te, chosen, recipe, bool(missing), f"EMULATED {by}" if missing and recipe else by,
                     ingredients(recipe, why_lacking) if chosen.name == "nvfp4" else "",
                     cards.GRAD_ZSCORE_12 if fp8_on_12 else 0.0)


def check_one_format(precision: Precision, procs: Any) -> None:
    """Raise UserError if the ranks' GPUs, of several kinds, would train in different formats: each rank chose alone."""
    chosen = procs.gather(f"{'emulated ' * precision.emulated}{precision.name}")
    for rank, name in enumerate(chosen):
        if name != chosen[0]:
            raise UserError(f"rank {rank} would train in {name}, rank 0 in {chosen[0]}; choose GPUs of one kind by "
                            f"CUDA_VISIBLE_DEVICES, or --USE_FP8=False, which all have", 2)


def check_nvfp4(cfg: SimpleNamespace, capability: tuple[int, int], version: str) -> tuple[Collection[str], str]:
    """Return the flags of NVFP4 that Transformer Engine cannot follow on this GPU, and why.

    Raises: UserError if such a flag was given as True, or if this cuBLASLt computes NVFP4 wrongly.
    """
    if fault := cards.nvfp4_fault(importlib.import_module("transformer_engine_torch").get_cublasLt_version()):
        raise UserError(fault)
    lacking, oldest = cards.nvfp4_lacks(capability, version), cards.dotted(cards.NVFP4_OLDEST_12)
    here = f"on compute capability {cards.dotted(capability)}"
    for flag in lacking:
        if flag in cfg.explicit and getattr(cfg, flag):
            raise UserError(f"{flag}=True needs Transformer Engine {oldest} or newer {here}, got {version}; install "
                            f"{cards.TE_MADE_FOR} as docs/install.md says, or leave the flag out", 2)
    why = f"for which Transformer Engine {version} has no kernels {here}; {oldest} has"
    return lacking, why if lacking else ""


def ingredients(recipe: Any, why_lacking: str) -> str:
    """Return which ingredients an NVFP4 recipe has, and which not. why_lacking: of those that were asked for."""
    names = {on: [name for field, name in NVFP4_INGREDIENTS.values() if on != getattr(recipe, field)]
             for on in (True, False)}
    return ", ".join([f"{word} {' and '.join(names[on])}" for word, on in (("with", True), ("without", False))
                      if names[on]]) + (f" ({why_lacking})" if why_lacking else "")


def layer_names(n_layer: int) -> list[str]:
    """Return the names of the layers with matmuls, in the model's order."""
    return [f"blocks.{i}.{layer}" for i in range(n_layer) for layer in ("attn.qkv", "attn.proj", "mlp")] + ["head"]


def match_layers(patterns: str, layers: Sequence[str]) -> set[str]:
    """Return the layers that the flag HIGH_PRECISION_LAYERS names.

    patterns: with commas between; a name (blocks.19 means everything inside it) or wildcards (blocks.*.attn.proj).
    Raises: UserError if a pattern matches nothing.
    """
    chosen = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matched = [n for n in layers if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, pattern + ".*")]
        if not matched:
            raise UserError(f"HIGH_PRECISION_LAYERS: '{pattern}' matches no layer; "
                            f"layers are {', '.join(layers[:3])}, ... {layers[-1]}", 2)
        chosen.update(matched)
    return chosen


def keep_high_precision(model: nn.Module, patterns: str, te: ModuleType) -> list[str]:
    """Make the layers whose names match a pattern run in bf16 (see match_layers); the head already does.

    NVFP4 is usually trained with the last blocks in bf16 (arXiv 2509.25149). te: the library of the model's layers.
    Returns: names of the layers, in the model's order. Raises: UserError if a pattern matches nothing.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, (te.Linear, te.LayerNormLinear, te.LayerNormMLP))]
    layers.append("head")
    chosen = match_layers(patterns, layers)

    def in_bf16(forward):
        def wrapped(*args, **kwargs):
            with te.autocast(enabled=False):
                return forward(*args, **kwargs)
        return wrapped

    for name in chosen - {"head"}:
        layer = model.get_submodule(name)
        layer.in_bf16, layer.forward = True, in_bf16(layer.forward)
    return sorted(chosen, key=layers.index)


# ----------------------------------------------------------------------------------------------------------------------
# Scaling state


def fp8_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the live tensors of delayed scaling; clone() them to keep them. Empty for recipes without state.

    Keys: "<module>.<scaling_fwd|scaling_bwd>.<scale|amax_history>". fp32.
    """
    state = {}
    for name, module in model.named_modules():
        for key in ("scaling_fwd", "scaling_bwd"):
            scaling = getattr(module, "fp8_meta", {}).get(key)
            if hasattr(scaling, "amax_history"):
                state[f"{name}.{key}.scale"] = scaling.scale
                state[f"{name}.{key}.amax_history"] = scaling.amax_history
    return state


def snapshot_scales(model: nn.Module) -> Callable[[], None]:
    """Copy the delayed-scaling state, and return a function that restores it.

    A skipped step must leave the amax history as it was: an inf in it would freeze a scale, and a huge amax would flush
    gradients to zero, for FP8_AMAX_HISTORY micro-batches.
    """
    live = list(fp8_state(model).values())
    copies = torch._foreach_mul(live, 1) if live else []  # one kernel for many tensors; clone() takes one for each
    return lambda: torch._foreach_copy_(live, copies) if live else None


@contextlib.contextmanager
def preserved_scales(model: nn.Module) -> Iterator[None]:
    """Restore the delayed-scaling state after what runs inside.

    Transformer Engine records amaxes in passes without gradients too, and the next training step would count them.
    """
    restore = snapshot_scales(model)
    try:
        yield
    finally:
        restore()
