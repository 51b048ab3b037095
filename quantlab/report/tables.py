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


def _bits(row: Row) -> str:
    if row.method == FULL_PRECISION:
        return "32/32"
    return f"{row.weight_bits:.3g}/{row.activation_bits:.3g}"


def _size(row: Row) -> str:
    return f"{row.size_bytes:,} ({row.smaller:.1f}x)"


COLUMNS = (
    Column("method", lambda row: row.method),
    Column("bits W/A", _bits),
    Column("bytes (smaller by)", _size),
    Column("FID", _metric("fid", 2)),
    Column("FID to teacher", _metric("fid-to-teacher", 2)),
    Column("IS", _metric("is", 2)),
    Column("accuracy", _metric("accuracy", 3)),
    Column("PSNR dB", _metric("psnr", 2)),
    Column("seconds", lambda row: "-" if row.method == FULL_PRECISION else number(row.seconds, 0)),
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The headings and every row as text."""
    return [[column.title for column in COLUMNS], *([column.show(row) for column in COLUMNS] for row in rows)]


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
