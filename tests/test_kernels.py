"""train.py's Triton kernels on a CPU, in Triton's interpreter: tests/kernel_checks.py in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernel_checks.py")],
                            env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
