"""A run as one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.report.rows import Row
from quantlab.report.tables import cells
from quantlab.store import atomic_write_text


@dataclass(frozen=True)
class StageLine:
    """How long a stage took, and whether it was computed or found."""

    name: str
    seconds: float
    status: str


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    title: str
    rows: Sequence[Row]
    coverage: str
    stages: Sequence[StageLine]
    recipe: str
    environment: str
    grid: Path | None


def save_html(report: Report, path: Path) -> None:
    """Write the page; everything that comes from a recipe is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("quantlab.report"), autoescape=True)
    simulated = any(row.simulated for row in report.rows)
    note = "Simulated: computed in float with quantized values; speed is not measured." if simulated else ""
    page = environment.get_template("report.html").render(
        title=report.title,
        note=note,
        table=cells(report.rows),
        grid=base64.b64encode(report.grid.read_bytes()).decode() if report.grid else "",
        coverage=report.coverage,
        stages=report.stages,
        recipe=report.recipe,
        environment=report.environment,
    )
    atomic_write_text(path, page)
