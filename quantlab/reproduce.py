"""A run beside the numbers that its recipe is expected to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from quantlab.contracts.expected import FULL_PRECISION, Band
from quantlab.errors import RecipeError
from quantlab.recipe.expected import differences
from quantlab.recipe.load import LoadedRecipe, for_method
from quantlab.report.rows import Row
from quantlab.report.tables import markdown_of
from quantlab.run import RunOptions, run
from quantlab.store import JSON

ALL_INSIDE = 0
"""Exit code: every expected number was measured, is comparable and lies inside its band."""
OUTSIDE = 4
"""Exit code: a number lies outside its band."""
UNDECIDED = 5
"""Exit code: none lies outside, and some were not measured, are not comparable or were never found."""


class Verdict(StrEnum):
    """What a measured number says about an expected one."""

    INSIDE = "inside"
    OUTSIDE = "outside"
    NOT_MEASURED = "not measured"
    NOT_COMPARABLE = "not comparable"
    NO_NUMBER = "no number to compare with"


@dataclass(frozen=True)
class Comparison:
    """An expected number beside a measured one.

    Attributes:
        band: what is expected.
        measured: by the run; None where the run has no such number, or nothing was run.
        interval: around it, 95 %, where it is known.
        differences: between how the two were measured.
    """

    band: Band
    measured: float | None
    interval: tuple[float, float] | None
    differences: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Numbers that were measured in different ways are never inside or outside."""
        ends = self.band.ends
        if ends is None:
            return Verdict.NO_NUMBER
        if self.measured is None:
            return Verdict.NOT_MEASURED
        if self.differences:
            return Verdict.NOT_COMPARABLE
        return Verdict.INSIDE if ends[0] <= self.measured <= ends[1] else Verdict.OUTSIDE

    @property
    def explained(self) -> str:
        """The verdict, with the differences that forbid one and the band's note."""
        verdict = self.verdict
        text = f"{verdict}: {'; '.join(self.differences)}" if verdict is Verdict.NOT_COMPARABLE else str(verdict)
        return f"{text} ({self.band.note})" if self.band.note else text

    def to_json(self) -> dict[str, JSON]:
        """As a record."""
        return {
            **self.band.model_dump(mode="json"),
            "ends": self.band.ends,
            "measured": self.measured,
            "interval": self.interval,
            "differences": self.differences,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Reproduction:
    """Every expected number of a recipe beside what its run measured.

    Attributes:
        comparisons: in the recipe's order.
        folder: of the run; None for a dry run.
        text: of the run: its rows, or its plan.
    """

    comparisons: tuple[Comparison, ...]
    folder: Path | None
    text: str

    @property
    def exit_code(self) -> int:
        """ALL_INSIDE, OUTSIDE or UNDECIDED; 0 for a dry run."""
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if self.folder is None or verdicts == {Verdict.INSIDE}:
            return ALL_INSIDE
        return OUTSIDE if Verdict.OUTSIDE in verdicts else UNDECIDED

    def table(self) -> str:
        """What is printed: the run's own table, and the expected numbers below it."""
        heads = ["method", "metric", "expected", "source", "certainty", "measured", "verdict"]
        if self.folder is None:
            heads = [*heads[:5], "comparable"]
        return f"{self.text}\n\n{markdown_of([heads, *map(self._cells, self.comparisons)])}"

    def _cells(self, comparison: Comparison) -> list[str]:
        band = comparison.band
        ends = "-" if band.ends is None else f"{band.ends[0]:.6g} to {band.ends[1]:.6g}"
        expected = [band.method, band.metric, ends, band.source, band.certainty]
        if self.folder is None:
            note = f" ({band.note})" if band.note else ""
            comparable = "; ".join(comparison.differences) or ("yes" if band.ends else str(Verdict.NO_NUMBER))
            return [*expected, comparable + note]
        return [*expected, _number(comparison), comparison.explained]

    def to_json(self) -> dict[str, JSON]:
        """What ``--json`` prints."""
        return {
            "folder": str(self.folder) if self.folder else None,
            "exit_code": self.exit_code,
            "expected": [comparison.to_json() for comparison in self.comparisons],
        }


def reproduce(loaded: LoadedRecipe, options: RunOptions) -> Reproduction:
    """Run a recipe, stages that are there already reused, and compare it with the numbers it is expected to give.

    Raises:
        RecipeError: the recipe expects nothing.
    """
    if not loaded.recipe.expected.bands:
        raise RecipeError(
            "the recipe says no numbers that it is expected to give",
            where=str(loaded.path),
            next_step="add a section expected, or run it without comparing: quantlab run",
        )
    result = run(loaded, options)
    return Reproduction(compare(loaded, result.rows), result.folder, result.table())


def compare(loaded: LoadedRecipe, rows: Sequence[Row]) -> tuple[Comparison, ...]:
    """Every band of a recipe beside the row of its method; without rows nothing is measured."""
    by_method = {row.method: row for row in rows}
    found = []
    for band in loaded.recipe.expected.bands:
        arm = loaded.recipe if band.method == FULL_PRECISION else for_method(loaded, band.method)
        row = by_method.get(band.method)
        measured = row.metrics.get(band.metric) if row else None
        interval = row.intervals.get(band.metric) if row else None
        found.append(Comparison(band, measured, interval, tuple(differences(arm, band))))
    return tuple(found)


def _number(comparison: Comparison) -> str:
    if comparison.measured is None:
        return "-"
    ends = comparison.interval
    return f"{comparison.measured:.6g}" + ("" if ends is None else f" [{ends[0]:.6g}, {ends[1]:.6g}]")
