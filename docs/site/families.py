"""What the site adds to the page of a family of methods: its parts with their options, its rows in every bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantlab.plugins import Entry, Kind, Registry

FLOAT = "full precision"
LEFT_OUT = frozenset({"accuracy", "paired-mse", "seeds for it", "seconds"})
"""Columns of a bench's table that a method's page can do without; the bench's own page has them."""


def entries_of(registry: Registry, family: str) -> Iterator[Entry]:
    """What a plugin package brings, kind by kind."""
    for kind in Kind:
        yield from (entry for entry in registry.entries(kind).values() if entry.origin.partition(" ")[0] == family)


def appendix(registry: Registry, family: str, results: Path, document: Callable[[Entry], str]) -> str:
    """Markdown for the end of a family's page; empty for a package without methods."""
    entries = list(entries_of(registry, family))
    methods = {entry.name for entry in entries if entry.kind is Kind.METHOD}
    parts = [document(entry) for entry in entries if entry.kind is not Kind.METHOD]
    text = []
    if parts:
        text += ["## Parts and all their options", *parts]
    if methods:
        text += ["## Rows in the benches", *(_measured(methods, results) or ["No committed bench has a row yet."])]
    return "\n\n".join(text)


@dataclass(frozen=True)
class BenchTable:
    """The table of a bench as it is committed: heads, and rows of as many cells."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def chosen(self, methods: set[str]) -> tuple[tuple[str, ...], ...]:
        """The rows of these methods with full precision's of the same models; none without a row of a method."""
        model, method = self.heads.index("model"), self.heads.index("method")
        mine = [row for row in self.rows if row[method] in methods]
        models = {row[model] for row in mine}
        return tuple(row for row in self.rows if row in mine or (row[method] == FLOAT and row[model] in models))


def read_table(path: Path) -> BenchTable:
    """The first Markdown table of a file.

    Raises:
        ValueError: it has none.
    """
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 2:
        raise ValueError(f"{path}: no table")
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return BenchTable(cells[0], tuple(cells[2:]))


def _measured(methods: set[str], results: Path) -> list[str]:
    text = []
    for summary in sorted(results.glob("*/summary.md")):
        table = read_table(summary)
        rows = table.chosen(methods)
        if rows:
            kept = [
                index
                for index, head in enumerate(table.heads)
                if head not in LEFT_OUT and any(row[index] not in ("", "-") for row in rows)
            ]
            lines = [[row[index] for index in kept] for row in (table.heads, *rows)]
            lines.insert(1, ["---"] * len(kept))
            bench = summary.parent.name
            text.append(
                f"`quantlab bench recipes/bench/{bench}.yaml`, [the whole table](../results/{bench}/summary.md):"
            )
            text.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return text
