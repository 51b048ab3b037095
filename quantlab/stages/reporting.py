"""Tells reporters what a run is and what comes out of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from quantlab.contracts.check import plugin_call
from quantlab.contracts.reporter import Curve, MethodResult, Reporter, RunEnd, RunStart, RunStatus, Value
from quantlab.contracts.sections import Choice
from quantlab.plugins import Kind, Registry
from quantlab.recipe.check import short_form
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schema import Recipe
from quantlab.report.console import Console
from quantlab.report.rows import Row
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON, digest_of

FILES = ("report.html", "samples.png", "metrics.json")
"""What a finished run wrote for people."""
HISTORY = "history.json"


@dataclass(frozen=True)
class Reporting:
    """The reporters of a run; without any, nothing is done."""

    reporters: Sequence[Reporter]
    warn: Callable[[str], None]

    def curves(self, method: str, tuned: Quantized, recipe: Recipe) -> None:
        """Tell how the losses of each of a method's tuners went."""
        stages = [stage for stage in tuned.stages if stage.name == "tune"]
        for index, (stage, tuner) in enumerate(zip(stages, recipe.tune.tuners, strict=True)):
            for curve in curves_of(method, f"{index}-{tuner.name}", stage.path):
                self._tell("curve", lambda reporter, curve=curve: reporter.curve(curve))

    def row(self, row: Row, recipe: Recipe | None = None, versions: Mapping[str, JSON] | None = None) -> None:
        """Tell what was measured; ``recipe`` and ``versions`` are of the method, and there are none of full precision.

        Args:
            row: of the result table.
            recipe: as the method resolves it.
            versions: of the plugins that the method was made with.
        """
        tags = {"protocol": row.protocol, "allocation": row.allocation}
        tags |= {name: str(version) for name, version in (versions or {}).items()}
        result = MethodResult(row.method, parameters_of(recipe) if recipe else {}, tags, metrics_of(row))
        self._tell("result", lambda reporter: reporter.result(result))

    def end(self, end: RunEnd) -> None:
        """Tell that the run has ended."""
        self._tell("end", lambda reporter: reporter.end(end))

    def _tell(self, method: str, call: Callable[[Reporter], None]) -> None:
        for reporter in self.reporters:
            try:
                call(reporter)
            except Exception as error:
                reason = " ".join(str(error).split())
                self.warn(f'the reporter "{reporter.name}" failed in {method}: {type(error).__name__}: {reason}')


def make_reporters(choices: Sequence[Choice], registry: Registry) -> list[Reporter]:
    """The chosen reporters.

    Raises:
        PluginError: a package that one needs is missing.
    """
    reporters: list[Reporter] = [registry.create(Kind.REPORTER, choice) for choice in choices]
    for reporter in reporters:
        with plugin_call("reporter", reporter, "require"):
            reporter.require()
    return reporters


@contextmanager
def reporting(reporters: Sequence[Reporter], start: RunStart, console: Console) -> Generator[Reporting]:
    """Around a run: reporters begin with it, and end with it however it ends.

    Raises:
        PluginError: a reporter cannot begin; those that have begun are ended.
    """
    begun: list[Reporter] = []
    told = Reporting(begun, console.warn)
    end = RunEnd(RunStatus.FINISHED)
    try:
        for reporter in reporters:
            with plugin_call("reporter", reporter, "begin"):
                reporter.begin(start)
            begun.append(reporter)
        yield told
        written = (start.folder / name for name in FILES)
        end = RunEnd(RunStatus.FINISHED, files=[path for path in written if path.is_file()])
    except BaseException as error:
        end = RunEnd(RunStatus.FAILED if isinstance(error, Exception) else RunStatus.STOPPED, reason=str(error))
        raise
    finally:
        told.end(end)


def run_start(loaded: LoadedRecipe, folder: Path, environment: Mapping[str, JSON]) -> RunStart:
    """A run as reporters are told of it; ``environment`` is what the run folder says of it."""
    recipe = loaded.recipe
    packages = environment["packages"]
    assert isinstance(packages, dict)
    told = ("python", "platform", "device", "dtype", "threads", "seed")
    tags = {**packages, **{name: environment[name] for name in told}}
    return RunStart(
        recipe=recipe.name,
        method=recipe.method,
        digest=recipe_digest(recipe),
        folder=folder,
        parameters=parameters_of(recipe),
        tags={name: str(value) for name, value in tags.items()},
    )


def recipe_digest(recipe: Recipe) -> str:
    """Hash of the resolved recipe, by which run folders are named."""
    return digest_of(recipe.settings())


def parameters_of(recipe: Recipe) -> dict[str, Value]:
    """A resolved recipe by dotted key."""
    return dict(_leaves(short_form(recipe.settings()), ""))


def _leaves(value: object, dotted: str) -> Iterator[tuple[str, Value]]:
    match value:
        case dict() if value:
            for key, child in cast("dict[str, object]", value).items():
                yield from _leaves(child, f"{dotted}.{key}" if dotted else str(key))
        case list() if value:
            for index, child in enumerate(cast("list[object]", value)):
                yield from _leaves(child, f"{dotted}.{index}")
        case str() | int() | float() | bool() | None:
            yield dotted, value
        case _:
            yield dotted, json.dumps(value)


def metrics_of(row: Row) -> dict[str, float]:
    """The numbers of a row by name."""
    metrics = {name: value for name, value in row.metrics.items() if value is not None}
    for name, (low, high) in row.intervals.items():
        metrics |= {f"{name}-low": low, f"{name}-high": high}
    own = ("weight_bits", "activation_bits", "size_bytes", "coverage", "seconds")
    return metrics | {name: float(getattr(row, name)) for name in own}


def curves_of(method: str, tuner: str, stage: Path) -> Iterator[Curve]:
    """The losses that a tuner's stage kept."""
    file = stage / HISTORY
    history: Mapping[str, Sequence[float]] = json.loads(file.read_text()) if file.is_file() else {}
    for loss, values in history.items():
        points = [(step, value) for step, value in enumerate(values) if not math.isnan(value)]
        if points:
            yield Curve(method, f"{tuner}/{loss}", points)
