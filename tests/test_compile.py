"""The Triton kernels compile for every kind of GPU. tools/compile_matrix.py does it, in a process without the tests'
TRITON_INTERPRET=1."""

import os
import re

import pytest

from helpers import ROOT, finish, start

pytest.importorskip("triton")

TABLE = ROOT / "results" / "cpu" / "compile_matrix.md"


def compile_kernels(folder, *options):
    """Compile; return the rows of the table, {(kernel, variant): cells}."""
    result = finish(start(ROOT / "tools" / "compile_matrix.py", f"--out={folder}/matrix.md", *options, cwd=folder), 900)
    assert result.code == 0, result.err[-3000:]
    return rows_of(folder / "matrix.md")


def rows_of(path):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines()
            if re.match(r"\| \w+_", line)]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_the_smallest_model_on_the_oldest_gpus_and_the_newest(tmp_path):
    """In bf16 for sm_80, in bf16 and FP8 for sm_89, where values are rounded to FP8 another way, and sm_120."""
    rows = compile_kernels(tmp_path, "--cases=tiny", "--targets=80,89,120")
    assert all(("fp8" in f"{kernel} {variant}".lower()) == (cells[2] == "not asked for")
               for (kernel, variant), cells in rows.items())
    assert all(re.fullmatch(r"\d+, [\d,]+", cell) for cells in rows.values() for cell in cells[3:])
    assert {kernel for kernel, _ in rows} <= {kernel for kernel, _ in rows_of(TABLE)}


@pytest.mark.slow
@pytest.mark.skipif("COMPILE_ALL" not in os.environ, reason="takes 90 s; set COMPILE_ALL=1")
def test_all_variants_for_all_gpus(tmp_path):
    """Nothing fails, and results/ has the same variants: if not, run `python tools/compile_matrix.py`."""
    rows = compile_kernels(tmp_path)
    launched = {name for path in (ROOT / "nanofp8").glob("*.py") for name in re.findall(r"kernels\.(\w+)\[",
                                                                                        path.read_text())}
    assert launched == {kernel for kernel, _ in rows}
    assert rows.keys() == rows_of(TABLE).keys()
    versions = [re.search(r"Triton ([\d.]+)", path.read_text())[1] for path in (tmp_path / "matrix.md", TABLE)]
    if versions[0] == versions[1]:
        assert rows == rows_of(TABLE)


def test_wrong_targets_are_one_line(tmp_path):
    result = finish(start(ROOT / "tools" / "compile_matrix.py", "--targets=90,95", cwd=tmp_path))
    assert result.code == 2 and "'95'" in result.err and "120" in result.err and result.err.count("\n") == 1
