"""Nothing heavy is imported before it is needed, and the public names are what they say."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import quantlab

HEAVY = ("torch", "torchvision", "torchmetrics", "diffusers", "timm", "numpy", "scipy", "sklearn", "matplotlib")
SOURCE = Path(quantlab.__file__)


def heavy_modules_after(code: str) -> list[str]:
    script = f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stderr.strip().splitlines()[-1])


def call(*arguments: str) -> str:
    return f"""
import sys
sys.argv = ["quantlab", *{arguments!r}]
from quantlab.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import quantlab; quantlab.hookimpl; quantlab.RecipeError; quantlab.Strict", id="import quantlab"),
        pytest.param("import quantlab.store", id="store"),
        pytest.param("from quantlab import load_recipe, load_registry; load_registry()", id="load a recipe"),
        pytest.param(call("--help"), id="help"),
        pytest.param(call("run", "--help"), id="run --help"),
        pytest.param(call("--version"), id="version"),
        pytest.param(call("list", "methods"), id="list methods"),
        pytest.param(call("list", "recipes"), id="list recipes"),
        pytest.param(call("runs", "--runs-dir", "/nowhere"), id="runs"),
    ],
)
def test_nothing_heavy_is_imported(code):
    assert heavy_modules_after(code) == []


def test_the_check_itself_sees_a_heavy_import():
    assert heavy_modules_after("import numpy") == ["numpy"]


def type_checker_imports() -> dict[str, str]:
    """Public name -> module, from the imports that type checkers read."""
    names = {}
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantlab."):
            names |= {alias.asname or alias.name: node.module for alias in node.names}
    return names


def test_type_checkers_and_python_see_the_same_public_names():
    assert sorted(type_checker_imports()) == sorted(quantlab.__all__)


@pytest.mark.parametrize("name", quantlab.__all__)
def test_every_public_name_can_be_imported(name):
    value = getattr(quantlab, name)
    module = getattr(value, "__module__", None)
    assert module in (None, "builtins", type_checker_imports()[name]) or module.startswith(("pluggy", "quantlab"))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quantlab.nothing


def test_no_public_name_is_a_module():
    """A function named like a module of the package would be replaced by it on import."""
    modules = {path.stem for path in SOURCE.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(quantlab.__all__)
