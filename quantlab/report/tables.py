"""Rows as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import escape

from quantlab.report.rows import FULL_PRECISION, Row


@dataclass(frozen=True)
class Column:
    """A column of a result table: its heading and how a row shows in it."""

    title: str
    show: Callable[[Row], str]


def number(value: float | None, digits: int) -> str:
    """A number with a fixed number of digits; "-" when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _metric(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: number(row.metrics.get(name), digits)


def _share(name: str) -> Callable[[Row], str]:
    """A share of the inputs with its interval, "0.912 [0.887, 0.932]"."""

    def show(row: Row) -> str:
        ends = row.intervals.get(name)
        around = "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
        return number(row.metrics.get(name), 3) + around

    return show


def _bits(row: Row) -> str:
    if row.method == FULL_PRECISION:
        return "32/32"
    return f"{row.weight_bits:.3g}/{row.activation_bits:.3g}"


def _size(row: Row) -> str:
    return f"{row.size_bytes:,} ({row.smaller:.1f}x)"


FIRST = (
    Column("method", lambda row: row.method),
    Column("bits W/A", _bits),
    Column("bytes (smaller by)", _size),
)
METRICS = {
    "fid": Column("FID", _metric("fid", 2)),
    "fid-to-teacher": Column("FID to teacher", _metric("fid-to-teacher", 2)),
    "is": Column("IS", _metric("is", 2)),
    "accuracy": Column("accuracy", _metric("accuracy", 3)),
    "top-1": Column("top-1", _share("top-1")),
    "top-5": Column("top-5", _share("top-5")),
    "agreement": Column("agreement", _share("agreement")),
    "kl-to-float": Column("KL to float", _metric("kl-to-float", 4)),
    "psnr": Column("PSNR dB", _metric("psnr", 2)),
}
"""Columns of metrics by name; those that no row has are left out."""
LAST = (Column("seconds", lambda row: "-" if row.method == FULL_PRECISION else number(row.seconds, 0)),)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The headings and every row as text."""
    measured = [column for name, column in METRICS.items() if any(name in row.metrics for row in rows)]
    columns = [*FIRST, *measured, *LAST]
    return [[column.title for column in columns], *([column.show(row) for column in columns] for row in rows)]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    return markdown_of(cells(rows))


def markdown_of(lines: Sequence[Sequence[str]]) -> str:
    """Text cells, headings first, as an aligned Markdown table."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *body])


def html_of(lines: Sequence[Sequence[str]]) -> str:
    """Text cells, headings first, as an HTML table; what is special in HTML is escaped."""
    head, *body = [[escape(cell) for cell in line] for line in lines]
    rows = ["".join(f"<td>{cell}</td>" for cell in line) for line in body]
    headings = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><tr>{headings}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
