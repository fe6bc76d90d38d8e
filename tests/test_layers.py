"""The order of the modules: each imports only what stands before it, so there are no import cycles."""

import ast
import re

import pytest

from helpers import ROOT

# As the table of docs/architecture.md lists them
TABLE = [line.split("|")[1] for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n")
         if line.startswith("| `")]
ORDER = [name for cell in TABLE for name in re.findall(r"`(?:nanofp8/)?(\w+)\.py`", cell)]
SCRIPTS = {"train", "train_orig", "sample", "bench"}


def imported(path):
    """Names of the project's modules that a file imports anywhere in it."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            modules += [f"nanofp8.{a.name}" for a in node.names] if node.module == "nanofp8" else [node.module]
    inside = {name.split(".")[1] for name in modules if name.startswith("nanofp8.")}
    return inside | SCRIPTS & set(modules)


def path_of(name):
    return ROOT / f"{name}.py" if name in SCRIPTS else ROOT / "nanofp8" / f"{name}.py"


def test_every_module_has_its_place():
    assert {path.stem for path in (ROOT / "nanofp8").glob("*.py")} - {"__init__"} == set(ORDER) - SCRIPTS


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_before_it(name):
    assert imported(path_of(name)) <= set(ORDER[:ORDER.index(name)])


def test_the_modules_that_import_nothing_of_the_project():
    alone = "prefetch files cards sizes config kernels te_emulation plain zero epilogue_functions".split()
    assert not any(imported(path_of(name)) for name in alone)


def test_the_package_itself_imports_nothing_but_sys():
    tree = ast.parse((ROOT / "nanofp8" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == ["import sys"]
