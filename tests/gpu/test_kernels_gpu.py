"""train.py's Triton kernels on a GPU: the checks of tests/kernel_checks.py, at d20's width."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

if torch.cuda.is_available():
    from kernel_checks import *  # noqa: F403
