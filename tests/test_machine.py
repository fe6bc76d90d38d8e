"""machine.py: peaks of GPUs, what config.json says of machine and code."""

import shutil

import pytest
import torch

import helpers
from nanofp8 import machine
from nanofp8.machine import describe_machine, peak_flops


def test_the_code_hash_follows_train_py_and_the_package(tmp_path, monkeypatch):
    """It changes with each file of the package, also with a new one, and not with any other file."""
    shutil.copy(helpers.TRAIN, tmp_path)
    package = shutil.copytree(helpers.ROOT / "nanofp8", tmp_path / "nanofp8", ignore=shutil.ignore_patterns("__pycache__"))
    before = describe_machine(helpers.CPU)["code"]
    monkeypatch.setattr(machine, "ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)  # git takes longest
    assert describe_machine(helpers.CPU)["code"] == before
    seen = {before}
    for path in (tmp_path / "train.py", *sorted(package.glob("*.py")), package / "new.py"):
        with open(path, "a") as f:
            f.write("# edited\n")
        seen.add(describe_machine(helpers.CPU)["code"])
    assert len(seen) == 3 + len(list((helpers.ROOT / "nanofp8").glob("*.py")))
    (tmp_path / "README.md").write_text("edited")
    assert describe_machine(helpers.CPU)["code"] in seen


