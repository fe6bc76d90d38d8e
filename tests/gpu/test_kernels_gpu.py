"""The checks of tests/test_kernels.py on a GPU, at d20's width, as a part of tests/gpu."""

import torch

if torch.cuda.is_available():
    from test_kernels import *  # noqa: F403
