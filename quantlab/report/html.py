"""A run or a bench as one self-contained HTML file: no script, no font, no image from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from quantlab.report import figures, strips
from quantlab.report.details import MethodDetails, read_details
from quantlab.report.execution import read_executions
from quantlab.report.images import AMPLIFICATION, ImageRow, image_rows
from quantlab.report.leaderboard import Leaderboard, Place, heading, leaderboards, shown
from quantlab.report.rows import FULL_PRECISION, Row
from quantlab.store import atomic_write_text

SIMULATED = "Simulated: computed in float with quantized values; speed is not measured."
BESIDE = 4
"""Methods side by side in one drawing."""
MOST_DETAILS = 12
"""Methods of a bench that are shown site by site: the best of each protocol, so that the file stays small."""


@dataclass(frozen=True)
class StageLine:
    """How long a stage took, whether it was computed or found, and the hash that names it in the store."""

    name: str
    seconds: float
    status: str
    digest: str = ""


@dataclass(frozen=True)
class RunReport:
    """What the page of a run shows.

    Attributes:
        rows: full precision first.
        folder: the run's, with the links to its stages.
        grid: images in a row of samples.
        recipe: resolved, as YAML.
        origins: where each value of the recipe came from.
        environment: versions, machine and seed, as JSON.
        calibration: what was recorded, with its hash, as JSON; "" when that is not known.
    """

    title: str
    rows: Sequence[Row]
    folder: Path
    grid: int
    coverage: str
    stages: Sequence[StageLine]
    recipe: str
    origins: Mapping[str, str]
    environment: str
    calibration: str = ""


@dataclass(frozen=True)
class BenchCell:
    """One cell of a bench.

    Attributes:
        title: its values in one line.
        values: of its keys.
        rows: what came out of it.
        run_folder: of the run that computed it, where that is at hand: bits, errors and images are read from it.
    """

    title: str
    values: Mapping[str, object]
    rows: Sequence[Row]
    run_folder: Path | None = None


@dataclass(frozen=True)
class BenchReport:
    """What the page of a bench shows.

    Attributes:
        cells: those that have a result.
        failures: title and message of every cell that has none.
        recipe: the bench file.
        environment: versions and machine, as JSON.
    """

    title: str
    cells: Sequence[BenchCell]
    failures: Mapping[str, str]
    recipe: str
    environment: str = ""


@dataclass(frozen=True)
class Board:
    """A leaderboard as the template takes it: text cells and a plot."""

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    plot: Markup
    legend: Markup


@dataclass(frozen=True)
class Sites:
    """The drawings of some methods side by side."""

    bits: Markup
    scales: Markup


def save_run_html(report: RunReport, path: Path) -> None:
    """Write the page of a run; everything that comes from a recipe or a plugin is escaped."""
    boards = leaderboards([({}, row) for row in report.rows])
    methods = [row.method for row in report.rows if row.method != FULL_PRECISION]
    details = [read_details(report.folder, method) for method in methods]
    _write(
        path,
        "run.html",
        title=report.title,
        note=SIMULATED if any(row.simulated for row in report.rows) else "",
        boards=[_board(board, {method: index for index, method in enumerate(methods)}) for board in boards],
        images=image_rows(report.folder, methods, report.grid),
        coverage=report.coverage,
        stages=report.stages,
        origins=report.origins,
        recipe=report.recipe,
        environment=report.environment,
        calibration=report.calibration,
        rows=report.rows,
        executions=read_executions(report.folder, methods),
        **_drawings(details),
    )


def save_bench_html(report: BenchReport, path: Path) -> None:
    """Write the page of a bench, with a leaderboard for every protocol; everything is escaped."""
    entries = [(cell.values, row) for cell in report.cells for row in cell.rows]
    boards = leaderboards(entries)
    names = dict.fromkeys(row.method for _, row in entries if row.method != FULL_PRECISION)
    details, images = _bench_details(report, boards)
    _write(
        path,
        "bench.html",
        title=report.title,
        note=SIMULATED if any(row.simulated for _, row in entries) else "",
        boards=[_board(board, {method: index for index, method in enumerate(names)}) for board in boards],
        images=images,
        failures=report.failures,
        recipe=report.recipe,
        environment=report.environment,
        rows=list({(row.method, row.seed, row.protocol, row.allocation): row for _, row in entries}.values()),
        omitted=max(0, sum(len(board.ranked) for board in boards) - len(details)),
        **_drawings(details),
    )


def _bench_details(report: BenchReport, boards: Sequence[Leaderboard]) -> tuple[list[MethodDetails], list[ImageRow]]:
    """Site by site the best places of each protocol whose run is at hand, and the images of the first such run."""
    folders = {id(row): cell for cell in report.cells for row in cell.rows if cell.run_folder is not None}
    details, images = [], []
    for board in boards:
        places = [place for place in board.ranked if id(place.row) in folders]
        for place in places[: max(1, MOST_DETAILS // len(boards))]:
            folder = folders[id(place.row)].run_folder
            assert folder is not None
            details.append(read_details(folder, place.row.method, f"{place.title} ({board.model})"))
            if not images:
                images = image_rows(folder, [place.row.method], 16)
    return details, images


def _board(board: Leaderboard, series: Mapping[str, int]) -> Board:
    metrics = [heading(name) for name in board.columns]
    arrows = {True: " ↓", False: " ↑", None: ""}
    titles = [each.title + arrows[each.less_is_better] for each in metrics]
    headings = ["", "method", "bits W/A", "bytes", "smaller by", *titles, "seconds", "seeds", "data"]
    ranks = {id(place): str(index) for index, place in enumerate(board.ranked, 1)}
    lines = [_line(place, ranks.get(id(place), ""), board.columns) for place in board.places]
    full = board.full_precision
    ranked_by = board.ranked_by
    measured, told = [place for place in board.ranked if ranked_by in place.metrics], heading(ranked_by)
    # A share that should be large is drawn as what is missing to 1.
    missing = told.less_is_better is False
    points = [
        figures.SizePoint(
            place.title, series[place.row.method], place.row.size_bytes, _drawn(place, ranked_by, missing)
        )
        for place in measured
    ]
    floor = _drawn(full, ranked_by, missing) if full and ranked_by in full.metrics else None
    used = {series[place.row.method]: place.row.method for place in measured}
    return Board(
        f"{board.model}, protocol {board.protocol}",
        headings,
        lines,
        figures.size_quality(points, floor, f"1 - {told.title}" if missing else told.title, drawn=not missing),
        figures.legend(dict(sorted(used.items()))),
    )


def _drawn(place: Place, metric: str, missing: bool) -> float:
    mean = place.metrics[metric].mean
    return 1 - mean if missing else mean


def _line(place: Place, rank: str, columns: Sequence[str]) -> list[str]:
    row, full = place.row, place.row.method == FULL_PRECISION
    name = f"{row.method} ({place.setting})" if place.setting and not full else row.method
    bits = "32/32" if full else f"{row.weight_bits:.3g}/{row.activation_bits:.3g}"
    values = [shown(place.metrics.get(metric), heading(metric).digits) for metric in columns]
    seconds = "-" if full else f"{place.seconds:.0f}"
    data = "" if full else "data-free" if row.data_free else "needs data"
    return [rank, name, bits, f"{row.size_bytes:,}", f"{row.smaller:.1f}x", *values, seconds, str(place.seeds), data]


def _drawings(details: Sequence[MethodDetails]) -> dict[str, object]:
    """The drawings that go through methods site by site."""
    groups = [details[start : start + BESIDE] for start in range(0, len(details), BESIDE)]
    widest = strips.scale_range(details)
    return {
        "sites": [Sites(strips.bit_strips(group), strips.scale_strips(group, widest)) for group in groups],
        "widths": strips.used_bits(details),
        "errors": figures.site_errors(details),
        "error_legend": figures.legend({i: method.title for i, method in enumerate(details) if method.errors}),
        "histories": figures.histories(details),
        "history_legend": figures.legend({i: method.title for i, method in enumerate(details) if method.histories}),
        "amplification": AMPLIFICATION,
        "shades": range(2 * strips.LEVELS + 1),
        "widest": widest,
    }


def _write(path: Path, template: str, **values: object) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quantlab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    atomic_write_text(path, environment.get_template(template).render(values))
