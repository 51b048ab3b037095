"""The tables of docs/performance.md, from the committed JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.integer_layers import layers_markdown
from benchmarks.integer_unet import unet_markdown

_TABLES: Mapping[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "integer-layers": ("Layers in integers", layers_markdown),
    "integer-unet": ("The CIFAR-10 UNet in integers, batch 8", unet_markdown),
}
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"


def markdown(results: dict[str, Any]) -> str:
    """The machine in one line, then a table for each section."""
    machine = results["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    lines = [
        f"{machine['processor']} with {machine['vectors']}, {machine['threads']} thread, Python {machine['python']}, "
        f"torch {machine['torch']}; {peers}.",
    ]
    sections: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        sections.setdefault(case["section"], []).append(case)
    for title, cases in sections.items():
        lines += ["", f"### {title}", "", f'Ratio: {cases[0]["ratio"]}, "{cases[0]["baseline"]}".']
        lines += [
            "",
            "| work | arm | ms | ratio | least to largest | goal | besides |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row for case in cases for row in _rows(case)]
    for section, (title, table) in _TABLES.items():
        if section in results:
            lines += ["", f"### {title}", "", table(results[section])]
    return "\n".join(lines)


def _rows(case: dict[str, Any]) -> list[str]:
    rows = []
    for name, arm in case["arms"].items():
        if "missing" in arm:
            rows.append(f"| {case['work']} | {name} | | | | | {arm['missing']} |")
        else:
            spread = f"{arm['ratio_least']:.3g} to {arm['ratio_largest']:.3g}"
            rows.append(
                f"| {case['work']} | {name} | {arm['milliseconds']:.3g} | {arm['ratio']:.3g} | {spread} "
                f"| {arm['goal']} | {arm['fact']} |"
            )
    return rows


def filled(document: str, name: str, results: dict[str, Any]) -> str:
    """The document with the tables between its markers for ``name`` replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{markdown(results)}\n{end}{after}"


def write_tables(document: Path, results: Path) -> None:
    """Replace the tables in a document by those of a result file."""
    document.write_text(filled(document.read_text(), results.stem, json.loads(results.read_text())))
