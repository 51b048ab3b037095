"""A registry with one small plugin, so that recipes can be checked without any real part."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab import plugins

PLUGIN = """
from quantlab.contracts.config import Strict
from quantlab.contracts.method import Method
from quantlab.hookspecs import hookimpl

class Nothing(Strict):
    pass

class KurtosisConfig(Strict):
    groups: int = 5
    offsets: tuple[int, ...] = (-1, 0, 1)

class FolderConfig(Strict):
    component: str = "unet"
    shards: int = 1

def part(name, config=Nothing):
    return type(name, (), {"name": name, "Config": config, "version": 1, "__doc__": f"The part {name}."})

@hookimpl
def quantlab_methods():
    plain = Method("plain", "nothing special", None, True, {"weights": {"observer": "min_max"}}, "plain.yaml")
    mixed = Method("mixed", "many bits", "a paper", False, {
        "allocate": ["uniform", {"kurtosis": {"groups": 3}}],
        "budget": {"extra_bit_fraction": 0.1},
        "tune": {"tuners": ["distill"], "iterations": 11, "losses": ["mse"]},
    }, "mixed.yaml")
    return [plain, mixed]

@hookimpl
def quantlab_models():
    return [part("builtin"), part("folder", FolderConfig)]

@hookimpl
def quantlab_bit_policies():
    return [part("uniform"), part("kurtosis", KurtosisConfig)]

@hookimpl
def quantlab_quantizers():
    return [part("affine")]

@hookimpl
def quantlab_tuners():
    return [part("distill", KurtosisConfig)]

@hookimpl
def quantlab_losses():
    return [part("mse"), part("lp")]

@hookimpl
def quantlab_corrections():
    return [part("noise")]

@hookimpl
def quantlab_metrics():
    return [part(name) for name in ("fid", "fid-to-teacher", "is", "precision-recall", "accuracy", "paired-error")]
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[plugins.Registry]:
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    file = tmp_path / "small_plugin.py"
    file.write_text(PLUGIN)
    yield plugins.load_registry([file])
    sys.modules.pop("small_plugin")


GOOD = """\
version: 1
model: {name: digits}
method: mixed
budget: {weight_bits: 2, activation_bits: 4}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Write a recipe, by default a good one, and return its path."""

    def write_recipe(text: str = GOOD, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_recipe
