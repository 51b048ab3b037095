"""Rows of several seeds as means with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlab.evaluation.interval import Interval, interval
from quantlab.report.rows import FULL_PRECISION, Row
from quantlab.report.tables import markdown_of

METRICS = ("fid", "fid-to-teacher", "accuracy", "paired-mse", "psnr")


@dataclass(frozen=True)
class SummaryLine:
    """One method at one setting, over its seeds.

    Attributes:
        values: the bench's values without the seed.
        rows: a row for every seed.
        metrics: mean and interval by metric.
    """

    values: Mapping[str, object]
    rows: Sequence[Row]
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class Summary:
    """Every line of a bench, full precision first."""

    lines: Sequence[SummaryLine]

    def markdown(self) -> str:
        """A Markdown table; a mean with the half width of its 95 % interval."""
        head = ["model", "method", "bits W/A", "setting", "seeds", "bytes", *METRICS, "seconds"]
        return markdown_of([head, *(self._cells(line) for line in self.lines)])

    def _cells(self, line: SummaryLine) -> list[str]:
        row = line.rows[0]
        bits = "32/32" if row.method == FULL_PRECISION else f"{row.weight_bits:.3g}/{row.activation_bits:.3g}"
        setting = {k: v for k, v in line.values.items() if k not in ("model.name", "method", "budget")}
        shown = ", ".join(f"{key}={value}" for key, value in setting.items()) if row.method != FULL_PRECISION else ""
        numbers = [show_interval(line.metrics[name]) if name in line.metrics else "-" for name in METRICS]
        seconds = sum(each.seconds for each in line.rows) / len(line.rows)
        return [
            row.model,
            row.method,
            bits,
            shown,
            str(len(line.rows)),
            f"{row.size_bytes:,}",
            *numbers,
            f"{seconds:.0f}",
        ]


def show_interval(value: Interval) -> str:
    """ "0.485 ± 0.040", or the value alone when there is one."""
    return f"{value.mean:.4g}" if value.count < 2 else f"{value.mean:.4g} ± {value.half_width:.2g}"


def summarize(rows: Sequence[tuple[Mapping[str, object], Row]]) -> Summary:
    """Group rows by everything but the seed; the float row, the same for all, comes once for each protocol."""
    groups: dict[str, list[tuple[Mapping[str, object], Row]]] = {}
    for values, row in rows:
        rest = {key: value for key, value in values.items() if key != "seed"}
        full = row.method == FULL_PRECISION
        key = json.dumps([row.model, row.protocol, "" if full else row.method, {} if full else rest], sort_keys=True)
        group = groups.setdefault(key, [])
        if not full or not group:
            group.append((rest, row))
    lines = []
    for group in groups.values():
        members = [row for _, row in group]
        found = {}
        for name in METRICS:
            known = [value for row in members if (value := row.metrics.get(name)) is not None]
            if known:
                found[name] = interval(known)
        lines.append(SummaryLine(group[0][0], members, found))
    return Summary(sorted(lines, key=lambda line: (line.rows[0].model, line.rows[0].method != FULL_PRECISION)))
