"""Precision: which Transformer Engine, which recipe; the state of FP8's scaling; layers kept in bf16."""

import contextlib
import fnmatch
from dataclasses import dataclass

import torch

from nanofp8.config import UserError


@dataclass
class Precision:
    """The layers' library (TE or its emulation), the recipe of block matmuls, and why."""

    te: object
    recipe: object  # None: bf16
    name: str       # "bf16", "fp8-delayed", ..., "nvfp4"
    emulated: bool
    reason: str

    @contextlib.contextmanager
    def autocast(self, procs, quantized=True):
        """The context of a forward pass: bf16 by torch.autocast, FP8 or NVFP4 by te.autocast.

        Delayed scaling reduces its amaxes over all ranks, so that every rank scales alike.
        """
        enabled = quantized and self.recipe is not None
        group = procs.mesh.get_group() if procs.world_size > 1 else None
        with torch.autocast(procs.device.type, dtype=torch.bfloat16), \
                self.te.autocast(enabled=enabled, recipe=self.recipe if enabled else None, amax_reduction_group=group):
            yield


def flags_without_effect(cfg, name):
    """["NVFP4_HADAMARD=False", ...]: flags that were set for another format than this run's, "fp8-delayed" or another."""
    of_format = {"fp8-": ("FP8_RECIPE", "USE_FP8_HEAD"), "fp8-delayed": ("FP8_MARGIN", "FP8_AMAX_HISTORY", "FP8_CALIBRATION_STEPS"),
                 "nvfp4": ("NVFP4_HADAMARD", "NVFP4_STOCHASTIC_ROUNDING", "NVFP4_2D_WEIGHTS")}
    return [f"{flag}={getattr(cfg, flag)}" for format_, flags in of_format.items() if not name.startswith(format_)
            for flag in flags if flag in cfg.explicit]


def keep_high_precision(model, patterns, te):
    """Make the layers whose names match one of the patterns (with commas between) run in bf16; returns their names.

    A pattern is a name (blocks.19 means all inside it) or has wildcards (blocks.*.attn.proj). NVFP4 is usually trained
    with the last blocks in bf16 (arXiv 2509.25149). Raises UserError if a pattern matches nothing.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, (te.Linear, te.LayerNormLinear, te.LayerNormMLP))]
    layers.append("head")
    chosen = set()
    for pattern in filter(None, (p.strip() for p in patterns.split(","))):
        matched = [n for n in layers if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, pattern + ".*")]
        if not matched:
            raise UserError(f"HIGH_PRECISION_LAYERS: '{pattern}' matches no layer; there are {', '.join(layers[:3])}, "
                            f"... {layers[-1]}", 2)
        chosen.update(matched)

    def in_bf16(forward):
        def wrapped(*args, **kwargs):
            with te.autocast(enabled=False):
                return forward(*args, **kwargs)
        return wrapped

    model.fp8_head = model.fp8_head and "head" not in chosen
    for name in chosen - {"head"}:
        layer = model.get_submodule(name)
        layer.in_bf16, layer.forward = True, in_bf16(layer.forward)
    return sorted(chosen, key=layers.index)


def fp8_state(model):
    """The delayed-scaling state as plain tensors: {"<module>.<scaling_fwd|scaling_bwd>.<scale|amax_history>": tensor}.

    Empty under recipes that have no state. The tensors are the live ones: clone() them to keep them.
    """
    state = {}
    for name, module in model.named_modules():
        for key in ("scaling_fwd", "scaling_bwd"):
            held = getattr(module, "fp8_meta", {}).get(key)
            if hasattr(held, "amax_history"):
                state[f"{name}.{key}.scale"] = held.scale
                state[f"{name}.{key}.amax_history"] = held.amax_history
    return state


def snapshot_scales(model):
    """Copies the delayed-scaling state; returns a function that puts it back.

    An inf in the amax history would freeze a scale, and a huge amax flush gradients to zero, until it leaves the history:
    for FP8_AMAX_HISTORY micro-batches. So a step that is skipped must leave the history as it was.
    """
    live = list(fp8_state(model).values())
    kept = torch._foreach_mul(live, 1) if live else []  # one kernel for many, where clone() is one for each
    return lambda: torch._foreach_copy_(live, kept) if live else None


@contextlib.contextmanager
def preserved_scales(model):
    """Whatever quantizes inside leaves the delayed-scaling state as it was: Transformer Engine notes amaxes even without
    gradients, and the next training step would count them."""
    put_back = snapshot_scales(model)
    try:
        yield
    finally:
        put_back()
