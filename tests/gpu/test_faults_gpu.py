"""Faults of two ranks over NCCL: a killed rank, a full disk, a damaged checkpoint. tests/two_rank_faults.py runs them.

Losses are compared with those of a run that nothing happened to, within test_train_gpu.SAME: kernels are not exact.
"""

import os

import pytest
import torch  # noqa: F401 (MULTI_GPU's condition needs it)
import two_rank_faults
from test_train_gpu import FLAGS, MULTI_GPU, SAME

pytestmark = MULTI_GPU


@pytest.fixture(scope="module")
def faults(te, tmp_path_factory):
    """All runs, with delayed FP8 under DDP: three starts of a process on each GPU."""
    arguments = [f"--{name}={value}" for name, value in (FLAGS | dict(USE_DDP=True)).items()]
    return two_rank_faults.run_faults(tmp_path_factory.mktemp("faults"), arguments,
                                      CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"))


@pytest.mark.parametrize("check", [two_rank_faults.check_killed_rank, two_rank_faults.check_full_disk,
                                   two_rank_faults.check_damaged_checkpoint])
def test_faults_of_two_gpus(faults, check):
    check(faults, SAME["loss"])
