"""A model from a function of an installed package, and of nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.module import ModuleTask
from quantlab.models.python import PythonConfig, PythonSource
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, run

CODE = """
import torch
from torch import nn
from quantlab import Task

def pair():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), [torch.ones(3, 4)]

def task():
    class Mine(Task):
        timestep_input = None
        static = {}
        network = nn.Linear(1, 1)
        def example_inputs(self, batch): return {}
        def network_inputs(self, inputs): return {}
        def combine(self, output, inputs): return output
        def calibrate(self, run, num_samples, rng, progress): raise NotImplementedError
    return Mine()

def number():
    return 3

constant = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the metadata that an installer writes, and a module beside it that belongs to no distribution."""
    site = tmp_path / "site"
    (site / "mymodels").mkdir(parents=True)
    (site / "mymodels" / "__init__.py").write_text("")
    (site / "mymodels" / "nets.py").write_text(CODE)
    (site / "loose_module.py").write_text(CODE)
    info = site / "mymodels-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mymodels\nVersion: 1.2\n")
    (info / "RECORD").write_text("mymodels/__init__.py,,\nmymodels/nets.py,,\nmymodels-1.2.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    yield site  # type: ignore[misc]
    for name in ("mymodels", "mymodels.nets", "loose_module"):
        sys.modules.pop(name, None)


def source(target: str) -> PythonSource:
    return PythonSource(PythonConfig(target=target))


def load(target: str, model: Model | None = None) -> object:
    return source(target).load(model or Model(), Sampling(), torch.device("cpu"), torch.float32)


def test_a_module_with_batches_and_a_task(installed: Path) -> None:
    made = load("mymodels.nets:pair")
    assert isinstance(made, ModuleTask) and isinstance(made.network, nn.Sequential)
    assert type(load("mymodels.nets:task")).__name__ == "Mine"


def test_only_installed_packages(installed: Path) -> None:
    with pytest.raises(RecipeError, match="installed package") as error:
        load("loose_module:pair")
    assert "pip install -e" in str(error.value.next_step) and "loose_module" not in sys.modules
    with pytest.raises(RecipeError, match="installed package"):
        load("no_such_package_at_all:pair")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mymodels.nothing:pair", "cannot be imported"),
        ("mymodels.nets:nothing", "no such function"),
        ("mymodels.nets:constant", "no such function"),
    ],
)
def test_what_is_not_there(installed: Path, target: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load(target)


def test_other_returns_and_weights_are_refused(installed: Path) -> None:
    with pytest.raises(ModelError, match="must return"):
        load("mymodels.nets:number")
    with pytest.raises(RecipeError, match="its own weights"):
        load("mymodels.nets:pair", Model(weights="a.pt"))


def test_the_identity_follows_the_code_and_the_version(installed: Path) -> None:
    first = source("mymodels.nets:pair").identity(Model())
    assert first == source("mymodels.nets:pair").identity(Model())
    assert first != source("mymodels.nets:task").identity(Model())
    (installed / "mymodels" / "nets.py").write_text(CODE + "\n")
    assert source("mymodels.nets:pair").identity(Model()) != first


@pytest.mark.parametrize("target", ["nets", "my models:pair", "mymodels.nets:", "../nets.py:pair", "a.b:c.d"])
def test_a_target_is_a_module_and_a_function(target: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f'version: 1\nmodel: {{source: python, target: "{target}"}}\nmethod: mse\n'
        "budget: {weight_bits: 4, activation_bits: 8}\n"
    )
    with pytest.raises(RecipeError, match=r"package\.module:function"):
        load_recipe(str(recipe))


def test_a_dry_run_tells_the_sites_and_a_run_what_is_lacking(installed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nname: mine\nmodel: {source: python, target: mymodels.nets:pair}\nmethod: mse\n"
        "budget: {weight_bits: 4, activation_bits: 8}\n"
    )
    loaded = load_recipe(str(recipe))

    def go(dry: bool) -> str:
        return run(loaded, RunOptions(tmp_path / "runs", "cpu", "float32", dry, make_console(quiet=True))).table()

    assert "2 of 2 sites" in go(True)
    with pytest.raises(ModelError, match="nothing can be measured"):
        go(False)
