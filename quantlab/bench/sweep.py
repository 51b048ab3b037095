"""One method over budgets: what quality costs in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from quantlab.bench.file import BenchFile
from quantlab.bench.launch import Launcher
from quantlab.bench.matrix import run_matrix
from quantlab.bench.result import BenchResult
from quantlab.errors import RecipeError
from quantlab.plugins import Registry
from quantlab.recipe.find import find_recipe, recipe_name
from quantlab.recipe.layers import parse_yaml
from quantlab.recipe.load import parse_override
from quantlab.report.compare import Better, check_measured, direction
from quantlab.report.console import Console
from quantlab.report.formats import Table, TableFormat
from quantlab.report.records import line_record
from quantlab.report.scatter import Point, scatter
from quantlab.report.sources import PARETO
from quantlab.report.summary import SummaryLine, show_interval
from quantlab.store import JSON, atomic_write_json, atomic_write_text


@dataclass(frozen=True)
class Sweep:
    """What is varied, and by what it is judged.

    Attributes:
        recipe: a YAML file, or an installed recipe by name.
        budgets: values by key of the recipe's ``budget``; all combinations are run.
        seeds: of every budget.
        overrides: "a.b=c", of every cell.
        profile: of the recipe.
        by: the metric.
        results: folder of the result files.
        report_to: reporters of each cell's run, as of a bench.
    """

    recipe: str
    budgets: Mapping[str, Sequence[object]]
    seeds: Sequence[int]
    overrides: Sequence[str]
    profile: str | None
    by: str
    results: Path
    report_to: Sequence[str] = ()

    def bench_file(self) -> BenchFile:
        """The sweep as a bench."""
        given = map(parse_override, self.overrides)
        matrix: dict[str, list[object]] = {"seed": list(self.seeds)}
        matrix |= {f"budget.{key}": list(values) for key, values in self.budgets.items()}
        return BenchFile(
            version=1,
            recipe=str(find_recipe(self.recipe).resolve()),
            profile=self.profile,
            set={"baselines": [], **{".".join(item.path): item.value.plain for item in given}},
            matrices=(matrix,),
            results=str(self.results),
        )


@dataclass(frozen=True)
class SweepResult:
    """Every budget with its size and quality.

    Attributes:
        by: the metric.
        bench: what ran.
        lines: one for each budget, smallest first.
        on_front: for each line whether no other one is as small and as good, and better in one of the two.
    """

    by: str
    bench: BenchResult
    lines: Sequence[SummaryLine]
    on_front: Sequence[bool]

    def table(self, wanted: TableFormat) -> str:
        """The budgets as text."""
        return Table(self._cells(), self._records(), self.bench.notes).render(wanted)

    def write(self) -> Path:
        """Write ``pareto.json`` and the picture ``pareto.svg`` beside the results; returns the picture's file."""
        record = {"schema_version": 1, "by": self.by, "points": self._records()}
        atomic_write_json(self.bench.folder / f"{PARETO}.json", record)
        points = [
            Point(_bytes(line), line.metrics[self.by], _bits(line), front)
            for line, front in zip(self.lines, self.on_front, strict=True)
        ]
        picture = self.bench.folder / f"{PARETO}.svg"
        atomic_write_text(picture, scatter(points, "bytes", self.by, self.bench.title))
        return picture

    def _records(self) -> list[dict[str, JSON]]:
        return [{"on_front": front, **line_record(line)} for line, front in zip(self.lines, self.on_front, strict=True)]

    def _cells(self) -> list[list[str]]:
        body = []
        for line, front in zip(self.lines, self.on_front, strict=True):
            measured = show_interval(line.metrics[self.by])
            body.append([_bits(line), f"{_bytes(line):,.0f}", measured, str(len(line.rows)), "yes" if front else ""])
        return [["bits W/A", "bytes", self.by, "seeds", "on the front"], *body]


def sweep(
    wanted: Sweep, registry: Registry, runs_dir: Path, console: Console, launcher: Launcher | None = None
) -> SweepResult:
    """Run a recipe's method at every budget, as a bench does, and find the Pareto front of size and quality.

    Raises:
        RecipeError: no budget is varied, or the metric says nothing about quality, both told before anything runs; or
            the metric was not measured.
    """
    if not any(wanted.budgets.values()):
        raise RecipeError("a sweep varies a budget", next_step="for example --weight-bits 2,3,4 --activation-bits 4")
    sign = 1 if direction(wanted.by) is Better.LOWER else -1
    title = f"{recipe_name(find_recipe(wanted.recipe))}, sweep"
    result = run_matrix(wanted.bench_file(), title, Path(), registry, runs_dir, console, (), launcher, wanted.report_to)
    if result.rows:
        check_measured(wanted.by, result.rows)
    lines = [line for line in result.summary().lines if not line.full_precision and wanted.by in line.metrics]
    lines.sort(key=_bytes)
    front = pareto_front([(_bytes(line), sign * line.metrics[wanted.by].mean) for line in lines])
    return SweepResult(wanted.by, result, lines, front)


def budgets_from(texts: Sequence[str]) -> dict[str, list[object]]:
    """ "weight_bits=2,3" as the values of a budget's key; a key without values is left out."""
    pairs = [parse_override(text) for text in texts if not text.endswith("=")]
    return {
        ".".join(pair.path): [parse_yaml(part, "--budget").plain for part in str(pair.value.plain).split(",")]
        for pair in pairs
    }


def seeds_from(text: str) -> list[int]:
    """ "1,2,3" as numbers; raises RecipeError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            "seeds are whole numbers", where="--seeds", got=text, next_step="for example --seeds 1,2,3"
        ) from error


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point whether no other one is at most as large in both coordinates and smaller in one."""
    return [
        not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        for point in points
    ]


def _bytes(line: SummaryLine) -> float:
    return mean(row.size_bytes for row in line.rows)


def _bits(line: SummaryLine) -> str:
    row = line.rows[0]
    return f"{row.weight_bits:.3g}/{row.activation_bits:.3g}"
