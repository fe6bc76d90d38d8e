"""The checks of tests/test_attention.py on a GPU, with heads of 128, as a part of tests/gpu."""

import torch

if torch.cuda.is_available():
    from test_attention import *  # noqa: F403
