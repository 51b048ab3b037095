"""A reporter of runs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from quantlab import Curve, MethodResult, Reporter, RunEnd, RunStart, Strict


class OutsideReporterConfig(Strict):
    """No options."""


class OutsideReporter(Reporter):
    """What it is told, a line each, in the file reported.txt of the run."""

    name: ClassVar[str] = "outside-reporter"
    Config = OutsideReporterConfig

    def __init__(self, config: OutsideReporterConfig) -> None:
        self._file = Path()

    def begin(self, start: RunStart) -> None:
        """The recipe."""
        self._file = start.folder / "reported.txt"
        self._write(f"begin {start.recipe}")

    def curve(self, curve: Curve) -> None:
        """Its name."""
        self._write(f"curve {curve.method} {curve.name}")

    def result(self, result: MethodResult) -> None:
        """The method."""
        self._write(f"result {result.method}")

    def end(self, end: RunEnd) -> None:
        """How it ended."""
        self._write(f"end {end.status}")

    def _write(self, line: str) -> None:
        with self._file.open("a") as file:
            print(line, file=file)
