"""One table in the formats that people and programs read."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from quantlab.report.tables import markdown_of
from quantlab.store import JSON, json_text


class TableFormat(StrEnum):
    """How a table is written."""

    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"
    LATEX = "latex"

    @property
    def suffix(self) -> str:
        """Of a file in this format."""
        return {TableFormat.MARKDOWN: ".md", TableFormat.LATEX: ".tex"}.get(self, f".{self}")


@dataclass(frozen=True)
class Table:
    """The same lines twice: for a person and for a program.

    Attributes:
        cells: text, headings first; of Markdown and LaTeX.
        records: everything with all digits; of CSV and JSON.
        notes: sentences below the table, in Markdown and LaTeX.
    """

    cells: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, JSON]]
    notes: Sequence[str] = ()

    def render(self, wanted: TableFormat) -> str:
        """The table as text, without a line break at its end."""
        match wanted:
            case TableFormat.MARKDOWN:
                return "\n\n".join([markdown_of(self.cells), *self.notes])
            case TableFormat.LATEX:
                return "\n".join([latex_of(self.cells), *(f"% {line}" for line in _lines(self.notes))])
            case TableFormat.CSV:
                return csv_of(self.records)
            case TableFormat.JSON:
                return json_text(list(self.records))


def latex_of(lines: Sequence[Sequence[str]]) -> str:
    """Text cells, headings first, as a LaTeX tabular that needs no package."""
    head, *body = [" & ".join(map(latex_escape, line)) + r" \\" for line in lines]
    columns = "l" * len(lines[0])
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", head, r"\hline", *body, r"\end{tabular}"])


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "\n": " ",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def csv_of(records: Sequence[Mapping[str, JSON]]) -> str:
    """Records as CSV; nested values get dotted columns; what a record lacks, and NaN, is empty."""
    flat = [flatten(record) for record in records]
    columns = list(dict.fromkeys(key for record in flat for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().removesuffix("\n")


def flatten(value: Mapping[str, JSON], above: str = "") -> dict[str, JSON]:
    """Nested mappings as one, with dotted keys; a list becomes its items with spaces between them, NaN None."""
    flat: dict[str, JSON] = {}
    for key, child in value.items():
        match child:
            case Mapping():
                flat |= flatten(child, f"{above}{key}.")
            case list() | tuple():
                flat[f"{above}{key}"] = " ".join(map(str, child))
            case float() if not math.isfinite(child):
                flat[f"{above}{key}"] = None
            case _:
                flat[f"{above}{key}"] = child
    return flat


def _lines(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in note.splitlines()]
