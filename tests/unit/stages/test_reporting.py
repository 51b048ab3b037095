"""Reporters are told what a run is and how it ended, and change nothing about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from quantlab import Curve, MethodResult, PluginError, RecipeError, Reporter, RunEnd, RunStart, RunStatus, Strict
from quantlab.errors import Stopped
from quantlab.plugins import load_registry
from quantlab.recipe.load import load_recipe
from quantlab.recipe.reporters import reporter_choices
from quantlab.report.console import make_console
from quantlab.report.rows import Row
from quantlab.stages.reporting import Reporting, curves_of, metrics_of, parameters_of, reporting, run_start

ROW = Row("mse", "toy", 4.0, 8.0, 100, 400, 0.5, {"fid": 2.0, "kid": None}, 3.0, "p", 1, True, True, "a")


class Config(Strict):
    """No options."""


@dataclass
class Memory(Reporter):
    """Keeps what it is told."""

    name: ClassVar[str] = "memory"
    Config = Config
    failing: str = ""
    told: list[object] = field(default_factory=list)

    def _keep(self, method: str, value: object) -> None:
        if method == self.failing:
            raise RuntimeError(f"no room\nfor {method}")
        self.told.append(value)

    def begin(self, start: RunStart) -> None:
        self._keep("begin", start)

    def curve(self, curve: Curve) -> None:
        self._keep("curve", curve)

    def result(self, result: MethodResult) -> None:
        self._keep("result", result)

    def end(self, end: RunEnd) -> None:
        self._keep("end", end)


def start(folder: Path) -> RunStart:
    return RunStart("toy", "mse", "0" * 16, folder, {}, {})


def test_a_finished_run_ends_with_the_files_that_are_there(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    memory = Memory()
    with reporting([memory], start(tmp_path), make_console(quiet=True)) as told:
        told.row(ROW)
    assert memory.told[0] == start(tmp_path)
    assert memory.told[1:] == [
        MethodResult("mse", {}, {"protocol": "p", "allocation": "a"}, metrics_of(ROW)),
        RunEnd(RunStatus.FINISHED, files=[tmp_path / "metrics.json"]),
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("broken"), RunStatus.FAILED),
        (KeyboardInterrupt("broken"), RunStatus.STOPPED),
        (Stopped("broken"), RunStatus.STOPPED),
    ],
)
def test_a_run_that_breaks_is_told_as_such_and_breaks_all_the_same(tmp_path, error, status):
    memory = Memory()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(type(error)), reporting([memory], start(tmp_path), make_console(quiet=True)):
        raise error
    assert memory.told[-1] == RunEnd(status, "broken")


@pytest.mark.parametrize("method", ["result", "end"])
def test_a_reporter_that_fails_on_the_way_is_a_warning(tmp_path, capsys, method):
    failing, memory = Memory(method), Memory()
    with reporting([failing, memory], start(tmp_path), make_console(quiet=True)) as told:
        told.row(ROW)
    assert len(memory.told) == 3 and len(failing.told) == 2
    expected = f'warning: the reporter "memory" failed in {method}: RuntimeError: no room for {method}\n'
    assert capsys.readouterr().err == expected


def test_a_reporter_that_cannot_begin_ends_the_run_and_those_that_have_begun(tmp_path):
    failing, memory = Memory("begin"), Memory()
    with (
        pytest.raises(PluginError, match="no room for begin"),
        reporting([memory, failing], start(tmp_path), make_console(quiet=True)),
    ):
        raise AssertionError("the run has begun")
    assert isinstance(memory.told[-1], RunEnd) and memory.told[-1].status is RunStatus.FAILED
    assert failing.told == []


def test_metrics_are_the_numbers_of_the_row():
    row = replace(ROW, intervals={"fid": (1.0, 3.0)})
    own = {"weight_bits": 4.0, "activation_bits": 8.0, "size_bytes": 100.0, "coverage": 0.5, "seconds": 3.0}
    assert metrics_of(row) == {"fid": 2.0, "fid-low": 1.0, "fid-high": 3.0, **own}


def test_curves_are_the_stored_losses_without_the_steps_that_had_none(tmp_path):
    (tmp_path / "history.json").write_text('{"total": [3.0, NaN, 1.0], "silent": [NaN]}')
    assert list(curves_of("mse", "0-distill", tmp_path)) == [Curve("mse", "0-distill/total", [(0, 3.0), (2, 1.0)])]
    assert list(curves_of("mse", "0-distill", tmp_path / "nothing")) == []


def test_each_tuner_has_its_own_curves(tmp_path):
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "history.json").write_text(json.dumps({"total": [float(index)]}))
    stages = [
        SimpleNamespace(name=name, path=tmp_path / at) for name, at in (("assign", "x"), ("tune", "0"), ("tune", "1"))
    ]
    tuners = tuple(SimpleNamespace(name=name) for name in ("distill", "reconstruct"))
    memory = Memory()
    recipe = SimpleNamespace(tune=SimpleNamespace(tuners=tuners))
    Reporting([memory], print).curves("mse", SimpleNamespace(stages=stages), recipe)  # type: ignore[arg-type]
    assert [(curve.name, curve.points) for curve in memory.told] == [
        ("0-distill/total", [(0, 0.0)]),
        ("1-reconstruct/total", [(0, 1.0)]),
    ]


@pytest.fixture(scope="module")
def digits():
    return load_recipe("digits/mpq-dm-w2a4", profile="smoke")


def test_parameters_are_the_resolved_recipe_by_dotted_key(digits):
    found = parameters_of(digits.recipe)
    assert found["budget.weight_bits"] == digits.recipe.budget.weight_bits
    assert found["model.name"] == "digits" and found["method"] == "mpq-dm"
    assert all(value is None or isinstance(value, str | int | float) for value in found.values())


def test_the_start_of_a_run_has_its_tags(digits, tmp_path):
    told = ("python", "platform", "device", "dtype", "threads", "seed")
    environment = {"packages": {"torch": "2.13.0"}, "processor": "x", **dict.fromkeys(told, 1)}
    begun = run_start(digits, tmp_path, environment)
    assert begun.tags == {"torch": "2.13.0", **dict.fromkeys(told, "1")}
    assert (begun.recipe, begun.method, begun.folder) == (digits.recipe.name, "mpq-dm", tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mflow", 'there is no reporter "mflow"'),
        ("mlflow: {experimnt: x}", 'unknown key "experimnt"'),
        ("mlflow: {experiment: 3}", "should be a valid string"),
        ("[mlflow]", "mapping of keys to values"),
    ],
)
def test_a_wrong_reporter_is_told_with_its_option(text, told):
    with pytest.raises(RecipeError, match=told) as caught:
        reporter_choices([text], load_registry())
    assert str(caught.value).startswith(f"--report-to '{text}': ")


def test_a_reporter_is_written_as_a_recipe_writes_a_plugin():
    short, options = reporter_choices(["tensorboard", "mlflow: {experiment: x}"], load_registry())
    assert (short.name, short.options) == ("tensorboard", {"folder": None})
    assert (options.name, options.options) == ("mlflow", {"experiment": "x", "tracking_uri": None})
