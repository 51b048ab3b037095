"""Type checkers know the type of everything public."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantlab

ROOT = Path(quantlab.__file__).parents[1]
PUBLIC = ("quantlab.contracts", "quantlab.errors", "quantlab.hookspecs", "quantlab.notebook", "quantlab.testing")
"""Modules that are public as a whole, besides the names of ``quantlab`` itself."""


def test_every_public_name_has_a_known_type() -> None:
    """``pyright --verifytypes``, which takes the interpreter that comes first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pyright", "--verifytypes", "quantlab", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "No module named" in done.stderr:
        pytest.skip("pyright is not installed")
    symbols = [symbol for symbol in json.loads(done.stdout)["typeCompleteness"]["symbols"] if is_public(symbol)]
    unknown = {
        symbol["name"]: [found["message"] for found in symbol["diagnostics"]]
        for symbol in symbols
        if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
    }
    assert len(symbols) > 1000
    assert not unknown


def is_public(symbol: dict[str, object]) -> bool:
    """Whether a symbol, by one of its names, is public or a member of what is."""
    names = [str(symbol["name"]), *symbol.get("alternateNames", [])]  # type: ignore[misc]
    owners = [*PUBLIC, *(f"quantlab.{name}" for name in quantlab.__all__)]
    owners += [
        f"{value.__module__}.{name}" for name in quantlab.__all__ if isinstance(value := getattr(quantlab, name), type)
    ]
    return any(name == owner or name.startswith(f"{owner}.") for name in names for owner in owners)
