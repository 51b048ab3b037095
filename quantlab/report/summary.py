"""Rows of several seeds as means with intervals, and as differences to a baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev

from quantlab.evaluation.interval import Interval, interval, paired_difference, seeds_for_gap
from quantlab.report.rows import FULL_PRECISION, Row
from quantlab.report.tables import markdown_of

CLASSES = ("top-1", "top-5", "agreement", "kl-to-float")
"""Of a classifier."""
METRICS = ("fid", "fid-to-teacher", "sfid", "accuracy", "paired-mse", "psnr", *CLASSES)
"""The metrics of the table in their order, if a line has them. JSON and CSV have all that were measured."""
COMPARED = ("fid", "fid-to-teacher", "top-1")
"""The metrics whose difference to the baseline stands in a bench's table; the last that was measured says how many
seeds it needs."""
OTHER_NOISE = f"{FULL_PRECISION}, other noise"
NOT_A_SETTING = ("model.name", "method", "budget")
"""Beginnings of the keys that have a column of their own."""


@dataclass(frozen=True)
class SummaryLine:
    """One method at one setting, over its seeds.

    Attributes:
        values: the bench's values without the seed; none for the float model, which is the same in all.
        rows: a row for every seed.
        metrics: mean and interval by metric: over the seeds, or over resampled images for a single seed.
        differences: to the baseline over the seeds that both have, by metric; empty for the baseline itself.
        seeds_needed: for the gap to the baseline in the last metric compared; None where nothing tells.
    """

    values: Mapping[str, object]
    rows: Sequence[Row]
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Interval] = field(default_factory=dict)
    seeds_needed: int | None = None

    @property
    def full_precision(self) -> bool:
        """It is the float model."""
        return self.rows[0].method == FULL_PRECISION

    @property
    def setting(self) -> Mapping[str, object]:
        """The values that no column of its own shows."""
        return {key: value for key, value in self.values.items() if not key.startswith(NOT_A_SETTING)}

    @property
    def seconds(self) -> float:
        """Mean over the rows."""
        return mean(row.seconds for row in self.rows)


@dataclass(frozen=True)
class FailedCell:
    """A cell of a bench that did not come to its end.

    Attributes:
        title: its values in one line.
        values: what makes it.
        model: its model's name.
        method: its method.
        message: why.
    """

    title: str
    values: Mapping[str, object]
    model: str
    method: str
    message: str


@dataclass(frozen=True)
class Summary:
    """Every line of a bench, full precision first.

    Attributes:
        lines: one for each method and setting.
        noise: the float model's images from other noise, a line for each protocol that has them.
        baseline: the method that the differences are to.
        failed: cells without a result.
        compared: the metrics whose difference to the baseline stands in the table.
    """

    lines: Sequence[SummaryLine]
    noise: Sequence[SummaryLine] = ()
    baseline: str | None = None
    failed: Sequence[FailedCell] = ()
    compared: Sequence[str] = COMPARED

    @property
    def metrics(self) -> list[str]:
        """The metrics of the table."""
        wanted = dict.fromkeys([*METRICS, *self.compared])
        return [name for name in wanted if any(name in line.metrics for line in self.lines)]

    def cells(self) -> list[list[str]]:
        """The table as text, headings first; a mean with the half width of its 95 % interval."""
        compared = [name for name in self.compared if any(name in line.differences for line in self.lines)]
        against = [f"{name} minus {self.baseline}" for name in compared] + (["seeds for it"] if compared else [])
        head = ["model", "method", "bits W/A", "setting", "seeds", "bytes", *self.metrics, *against, "seconds"]
        body = []
        for line in self.lines:
            body.append(self._cells(line, compared))
            if line.full_precision:
                body += [self._cells(n, compared) for n in self.noise if n.rows[0].protocol == line.rows[0].protocol]
        for cell in self.failed:
            setting = _shown({key: value for key, value in cell.values.items() if key not in ("model.name", "method")})
            blank = ["-"] * (len(head) - 5)
            body.append([cell.model, cell.method, "-", setting, "failed", *blank])
        return [head, *body]

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown_of(self.cells())

    def _cells(self, line: SummaryLine, compared: Sequence[str]) -> list[str]:
        row = line.rows[0]
        against = [show_interval(line.differences[name]) if name in line.differences else "-" for name in compared]
        return [
            row.model,
            row.method,
            f"{row.weight_bits:.3g}/{row.activation_bits:.3g}",
            _shown(line.setting),
            str(len(line.rows)),
            f"{row.size_bytes:,}",
            *(show_interval(line.metrics[name]) if name in line.metrics else "-" for name in self.metrics),
            *against,
            *([str(line.seeds_needed or "-")] if compared else []),
            f"{line.seconds:.0f}",
        ]


def show_interval(value: Interval) -> str:
    """ "0.485 ± 0.040" over seeds, "0.485 [0.46, 0.52]" of one seed over resampled images, or the value alone."""
    if not value.known:
        return f"{value.mean:.4g}"
    if value.count < 2:
        return f"{value.mean:.4g} [{value.low:.4g}, {value.high:.4g}]"
    return f"{value.mean:.4g} ± {value.half_width:.2g}"


def summarize(
    rows: Sequence[tuple[Mapping[str, object], Row]], baseline: str | None = None, failed: Sequence[FailedCell] = ()
) -> Summary:
    """Group rows by everything but the seed; the float row, the same for all, comes once for each protocol.

    A baseline that ran beside several methods has the same row in each of their cells, which counts once.
    """
    groups: dict[str, dict[int, tuple[Mapping[str, object], Row]]] = {}
    for values, row in rows:
        rest = {key: value for key, value in values.items() if key not in ("seed", "method")}
        full = row.method == FULL_PRECISION
        key = json.dumps([row.model, row.protocol, "" if full else row.method, {} if full else rest], sort_keys=True)
        kept = {} if full else {key: value for key, value in values.items() if key != "seed"}
        groups.setdefault(key, {}).setdefault(0 if full else row.seed, (kept, row))
    lines = [_line(list(group.values())) for group in groups.values()]
    lines = sorted(lines, key=lambda line: (line.rows[0].model, not line.full_precision))
    if baseline is not None:
        lines = [_against(line, lines, baseline) for line in lines]
    return Summary(lines, _noise(rows), baseline, failed)


def _line(group: Sequence[tuple[Mapping[str, object], Row]]) -> SummaryLine:
    members = [row for _, row in group]
    found = {}
    for name in dict.fromkeys(name for row in members for name in row.metrics):
        known = [value for row in members if (value := row.metrics.get(name)) is not None]
        if len(known) == 1 and name in members[0].intervals:
            found[name] = Interval(known[0], *members[0].intervals[name], 1)
        elif known:
            found[name] = interval(known)
    return SummaryLine(group[0][0], members, found)


def _noise(rows: Sequence[tuple[Mapping[str, object], Row]]) -> list[SummaryLine]:
    """The float model with other noise, once for each protocol."""
    found = {row.protocol: row for _, row in rows if row.other_noise}
    return [
        _line([({}, replace(row, method=OTHER_NOISE, metrics=row.other_noise, intervals={}))]) for row in found.values()
    ]


def _against(line: SummaryLine, lines: Sequence[SummaryLine], baseline: str) -> SummaryLine:
    """The line with its differences to the baseline's line of the same model, protocol and setting.

    A method may have settings of its own, such as tuning iterations, that the baseline has not: its line is then the
    one that shares most.
    """
    own = {key: value for key, value in line.values.items() if key != "method"}
    fitting = [
        (len(other.values), other)
        for other in lines
        if other.rows[0].method == baseline
        and other.rows[0].protocol == line.rows[0].protocol
        and all(own.get(key) == value for key, value in other.values.items() if key != "method")
    ]
    if not fitting or line.full_precision or line.rows[0].method == baseline:
        return line
    return difference(line, max(fitting, key=lambda pair: pair[0])[1])


def difference(line: SummaryLine, baseline: SummaryLine, told_by: str | None = None) -> SummaryLine:
    """The line with its differences to another one, paired over the seeds of both, and the seeds for one of them."""
    differences = {
        name: found
        for name in line.metrics
        if (found := paired_difference(_by_seed(line, name), _by_seed(baseline, name)))
    }
    last = told_by or next((name for name in reversed(COMPARED) if name in line.metrics), COMPARED[0])
    return replace(line, differences=differences, seeds_needed=_seeds_needed(line, baseline, last))


def _by_seed(line: SummaryLine, metric: str) -> dict[int, float]:
    return {row.seed: value for row in line.rows if (value := row.metrics.get(metric)) is not None}


def _seeds_needed(line: SummaryLine, baseline: SummaryLine, metric: str) -> int | None:
    """By the variation of both over their seeds, pooled, relative to the baseline's mean."""
    both = [list(_by_seed(each, metric).values()) for each in (line, baseline)]
    if min(map(len, both)) < 2 or not mean(both[1]):
        return None
    pooled, centre = math.sqrt(mean(stdev(values) ** 2 for values in both)), mean(both[1])
    return seeds_for_gap(pooled / centre, (mean(both[0]) - centre) / centre)


def _shown(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
