"""What came out of a bench, as its folder holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import escape

from quantlab.bench.cells import Cell
from quantlab.bench.file import BenchFile
from quantlab.report.formats import Table, TableFormat
from quantlab.report.html import BenchCell, BenchReport, save_bench_html
from quantlab.report.records import summary_records
from quantlab.report.sources import SUMMARY, ValuedRow, read_result, read_run
from quantlab.report.summary import FailedCell, Summary, summarize
from quantlab.report.tables import html_of
from quantlab.store import atomic_write_json, atomic_write_text

FAILED_SUFFIX = ".failed.txt"


@dataclass(frozen=True)
class BenchResult:
    """What came out of a bench.

    Attributes:
        title: its name.
        folder: of the result files.
        rows: of every cell with a result, each with the cell's values.
        failed: every cell without one.
        baseline: the method that the differences are to, or None.
    """

    title: str
    folder: Path
    rows: Sequence[ValuedRow]
    failed: Sequence[FailedCell]
    baseline: str | None

    @property
    def failures(self) -> Mapping[str, str]:
        """Title and message of every cell that failed."""
        return {cell.title: cell.message for cell in self.failed}

    @property
    def notes(self) -> list[str]:
        """What failed and why, for below a table."""
        return [f"failed: {cell.title}\n  {cell.message}" for cell in self.failed]

    def summary(self) -> Summary:
        """Means and intervals over seeds, and differences to the baseline."""
        return summarize(self.rows, self.baseline, self.failed)

    def table(self, wanted: TableFormat = TableFormat.MARKDOWN) -> str:
        """The summary as text."""
        return self._table().render(wanted)

    def _repr_html_(self) -> str:
        return html_of(self.summary().cells()) + "".join(f"<pre>{escape(note)}</pre>" for note in self.notes)

    def write(self) -> None:
        """Write the summary in every format beside the results."""
        table = self._table()
        for wanted in (TableFormat.CSV, TableFormat.LATEX):
            atomic_write_text(self.folder / f"{SUMMARY}{wanted.suffix}", table.render(wanted) + "\n")
        markdown = table.render(TableFormat.MARKDOWN)
        atomic_write_text(self.folder / f"{SUMMARY}{TableFormat.MARKDOWN.suffix}", f"# {self.title}\n\n{markdown}\n")
        record = {"schema_version": 1, "title": self.title, "baseline": self.baseline, "lines": list(table.records)}
        atomic_write_json(self.folder / f"{SUMMARY}{TableFormat.JSON.suffix}", record)

    def _table(self) -> Table:
        summary = self.summary()
        return Table(summary.cells(), summary_records(summary), self.notes)


def save_page(result: BenchResult, cells: Sequence[Cell], runs_dir: Path, bench_file: BenchFile) -> None:
    """Write ``report.html`` beside the results; runs that are still in ``runs_dir`` are shown site by site."""
    shown = []
    for cell in cells:
        file = result.folder / f"{cell.file_name}.json"
        if file.exists():
            run = read_run(file)
            folder = runs_dir / run if run and (runs_dir / run).is_dir() else None
            shown.append(BenchCell(cell.title, cell.values, [row for _, row in read_result(file)], folder))
    report = BenchReport(
        result.title, shown, result.failures, bench_file.model_dump_json(indent=1, exclude_defaults=True)
    )
    save_bench_html(report, result.folder / "report.html")


def collect(title: str, folder: Path, cells: Sequence[Cell], baseline: str | None) -> BenchResult:
    """The results of these cells that are in the folder; raises ArtefactError for a damaged one."""
    rows: list[ValuedRow] = []
    failed = []
    for cell in cells:
        result, failure = folder / f"{cell.file_name}.json", folder / f"{cell.file_name}{FAILED_SUFFIX}"
        if result.exists():
            rows += read_result(result)
        elif failure.exists():
            recipe, message = cell.loaded.recipe, failure.read_text().partition("\n\n")[2].rstrip("\n")
            failed.append(FailedCell(cell.title, cell.values, recipe.model.name, recipe.method, message))
    return BenchResult(title, folder, rows, failed, baseline)


def write_failure(folder: Path, cell: Cell, message: str) -> None:
    """Keep why a cell failed, beside the results of the others."""
    atomic_write_text(folder / f"{cell.file_name}{FAILED_SUFFIX}", f"{cell.title}\n\n{message}\n")


def forget_failure(folder: Path, cell: Cell) -> None:
    """Before a cell is run again."""
    (folder / f"{cell.file_name}{FAILED_SUFFIX}").unlink(missing_ok=True)
