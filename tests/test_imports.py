"""Imports point one way: ``utils`` and ``bnn`` know nothing of each other, and only the PEFT glue knows PEFT."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PEFT_GLUE = ("adapter.py", "bayesianize.py", "lora.py", "merging.py", "methods/")
SOURCES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("bnn", "utils")}


def imported(source: str, package: str) -> set[str]:
    """Top-level names of every import, wherever it stands; relative ones count as the package itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def files(package: str) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in SOURCES[package]]


@pytest.mark.parametrize("path", files("bnn"))
def test_bnn_imports_neither_utils_nor_hydra(path):
    assert not imported(path.read_text(), "bnn") & {
        "utils",
        "hydra",
        "omegaconf",
        "configs",
        "pipeline",
        "train_script",
    }


@pytest.mark.parametrize("path", files("bnn"))
def test_only_the_glue_imports_peft(path):
    if not path.relative_to(ROOT / "bnn").as_posix().startswith(PEFT_GLUE):
        assert not imported(path.read_text(), "bnn") & {"peft", "transformers"}


@pytest.mark.parametrize("path", files("utils"))
def test_utils_never_imports_bnn(path):
    assert not imported(path.read_text(), "utils") & {"bnn", "pipeline", "train_script"}


def test_the_check_sees_every_form_of_import():
    source = """
import a.b, c as d
def f():
    from e.f import g
    from . import h
    importlib.import_module("i.j")
    __import__("k")
"""
    assert imported(source, "own") == {"a", "c", "e", "own", "i", "k"}
    assert all(SOURCES.values())
