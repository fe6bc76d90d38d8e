"""Checkpoint folders on disk: list them, read them, check them.

A checkpoint may be damaged, or come from a stranger: whatever is wrong with it, the reader gets one line.
"""

import glob
import json
import os
import re
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException  # DCP's own, which is not an Exception

from nanofp8.config import UserError
from nanofp8.files import error_line


def steps_of(checkpoint: str) -> int:
    """Return the number in a checkpoint's name (as text, step_1000000 would sort before step_999750)."""
    return int(re.search(r"(\d+)/*$", checkpoint)[1])


def complete_checkpoints(folder: str) -> list[str]:
    """Return the complete checkpoints in a folder, by steps."""
    found = [os.path.dirname(f) for f in glob.glob(os.path.join(glob.escape(folder), "step_*", "meta.json"))]
    return sorted((f for f in found if re.fullmatch(r"step_\d+", os.path.basename(f))), key=steps_of)


def read_checkpoint(folder: str) -> dict:
    """Return meta.json of a checkpoint: step (optimizer steps taken), tokens, flags, loader and more.

    Raises: UserError if the folder is not a complete checkpoint.
    """
    def positive(value: Any) -> bool:
        return isinstance(value, int) and value > 0

    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        named = re.fullmatch(r"step_(\d+)", os.path.basename(os.path.abspath(folder)))
        fits = dict(
            flags=isinstance(meta["flags"], dict), tokens=positive(meta["tokens"]),
            step=positive(meta["step"]) and (not named or meta["step"] == int(named[1])),
            world_size=positive(meta["world_size"]), train_seconds=isinstance(meta["train_seconds"], (int, float)),
            loader=all(isinstance(meta["loader"][key], int) for key in ("step", "micro_batch")))
        for key, well in fits.items():
            if not well:
                raise ValueError(f"its {key} is {meta[key]!r}")
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a complete checkpoint ({error!r}); "
                        f"name a folder step_NNNNNN or a run folder") from None


def load_tensors(folder: str, state: dict, no_dist: bool = False) -> None:
    """Fill the tensors of a nested dict from a checkpoint, in place.

    no_dist: load in this process alone, without a process group.
    Raises: UserError if a tensor is missing or has another shape.
    """
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        raise UserError(f"cannot load checkpoint {folder}: {error_line(error)}", one_rank=True) from None


def load_weights(folder: str, tensors: dict[str, torch.Tensor]) -> None:
    """Fill {parameter name: tensor} from a checkpoint, in this process alone, whatever number of ranks saved it.

    Raises: UserError.
    """
    load_tensors(folder, {"model": tensors}, no_dist=True)
