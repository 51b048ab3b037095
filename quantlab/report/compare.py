"""Rows ranked beside those of the same protocol, and nothing else beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from quantlab.errors import RecipeError, nearest
from quantlab.report.formats import Table, TableFormat, flatten
from quantlab.report.records import line_record
from quantlab.report.sources import ValuedRow
from quantlab.report.summary import Summary, SummaryLine, difference, summarize
from quantlab.store import JSON, json_text


class Better(StrEnum):
    """Which end of a metric is the good one."""

    LOWER = "lower"
    HIGHER = "higher"


DIRECTIONS: Mapping[str, Better] = {
    **dict.fromkeys(("fid", "fid-to-teacher", "sfid", "sfid-to-teacher", "kid", "paired-mse", "lpips"), Better.LOWER),
    **dict.fromkeys(("psnr", "ssim", "precision", "recall", "clip-score"), Better.HIGHER),
    **dict.fromkeys(("top-1", "top-5", "agreement"), Better.HIGHER),
    "kl-to-float": Better.LOWER,
}
REFUSED: Mapping[str, str] = {
    "accuracy": "images that are washed out to their class's mean score higher than the data itself",
    "is": "it rises while images get worse, since it never looks at the data",
}
"""Metrics that tell something beside others, but by which a worse method can win."""


@dataclass(frozen=True)
class Ranking:
    """The lines of one protocol.

    Attributes:
        protocol: the id.
        fields: of the protocol; empty for results of earlier versions.
        ranked: best first, each with its difference to the best.
        others: full precision, and lines without the metric.
        noise: full precision with other noise.
    """

    protocol: str
    fields: Mapping[str, JSON]
    ranked: Sequence[SummaryLine]
    others: Sequence[SummaryLine]
    noise: Sequence[SummaryLine]

    def cells(self, by: str) -> list[list[str]]:
        """The table as text, headings first."""
        lines = [*self.others, *self.ranked]
        head, *body = Summary(lines, self.noise, "the first", compared=(by,)).cells()
        unranked = len(body) - len(self.ranked)
        ranks = ["-"] * unranked + [str(rank) for rank in range(1, len(self.ranked) + 1)]
        return [["rank", *head], *([rank, *line] for rank, line in zip(ranks, body, strict=True))]

    def records(self) -> list[dict[str, JSON]]:
        """Every line with its rank."""
        ranked = [{"rank": rank, **line_record(line)} for rank, line in enumerate(self.ranked, 1)]
        return [*ranked, *({"rank": None, **line_record(line)} for line in (*self.others, *self.noise))]


@dataclass(frozen=True)
class Comparison:
    """Rankings, one for each protocol.

    Attributes:
        by: the metric.
        rankings: never merged.
        differing: what differs between the protocols, a sentence a field; empty for one protocol.
    """

    by: str
    rankings: Sequence[Ranking]
    differing: Sequence[str]

    @property
    def comparable(self) -> bool:
        """All rows have one protocol."""
        return len(self.rankings) == 1

    def render(self, wanted: TableFormat) -> str:
        """All tables as text."""
        if wanted is TableFormat.CSV:
            return Table([], [record for ranking in self.rankings for record in ranking.records()]).render(wanted)
        if wanted is TableFormat.JSON:
            return json_text(self.to_json())
        tables = [Table(ranking.cells(self.by), [], self._notes(ranking)) for ranking in self.rankings]
        return "\n\n".join(table.render(wanted) for table in tables)

    def to_json(self) -> dict[str, JSON]:
        """The whole comparison as plain JSON."""
        rankings: list[JSON] = [
            {"protocol": each.protocol, "protocol_fields": each.fields, "lines": each.records()}
            for each in self.rankings
        ]
        return {"by": self.by, "comparable": self.comparable, "differing": self.differing, "rankings": rankings}

    def _notes(self, ranking: Ranking) -> list[str]:
        return [f"ranked by {self.by}; protocol {ranking.protocol}"]


def compare(rows: Sequence[ValuedRow], by: str = "fid-to-teacher", better: Better | None = None) -> Comparison:
    """Rank the rows of each protocol by one metric.

    Args:
        rows: with the values that make them, as ``read_rows`` gives them.
        by: the metric; the mean over seeds counts.
        better: which end of it is the good one, for a metric that a plugin brought.

    Raises:
        RecipeError: the metric says nothing about which method is better, or no row has it.
    """
    if by not in REFUSED:
        check_measured(by, rows)
    lower = direction(by, better) is Better.LOWER
    summary = summarize(rows)
    rankings = []
    for protocol in dict.fromkeys(line.rows[0].protocol for line in summary.lines):
        lines = [line for line in summary.lines if line.rows[0].protocol == protocol]
        ranked = [line for line in lines if not line.full_precision and by in line.metrics]
        others = [line for line in lines if line.full_precision or by not in line.metrics]
        ranked.sort(key=lambda line: line.metrics[by].mean * (1 if lower else -1))
        ranked = [difference(line, ranked[0], by) if index else line for index, line in enumerate(ranked)]
        noise = [line for line in summary.noise if line.rows[0].protocol == protocol]
        fields = next((line.rows[0].protocol_fields for line in lines if line.rows[0].protocol_fields), {})
        rankings.append(Ranking(protocol, fields, ranked, others, noise))
    return Comparison(by, rankings, differing({each.protocol: each.fields for each in rankings}))


def differing(protocols: Mapping[str, Mapping[str, JSON]]) -> list[str]:
    """What differs between protocols, a sentence a field."""
    if len(protocols) < 2:
        return []
    flat = {protocol: flatten(fields) for protocol, fields in protocols.items()}
    unknown = [protocol for protocol, fields in flat.items() if not fields]
    known = {protocol: fields for protocol, fields in flat.items() if fields}
    told = []
    for key in dict.fromkeys(key for fields in known.values() for key in fields):
        values = {protocol: str(fields.get(key, "-")) for protocol, fields in known.items()}
        if len(set(values.values())) > 1:
            told.append(f"{key}: " + ", ".join(f"{value} ({protocol})" for protocol, value in values.items()))
    if unknown:
        told.append(f"the results of {', '.join(unknown)} are from before results kept their protocol: run them again")
    return told


def direction(by: str, better: Better | None = None) -> Better:
    """Which end of a metric is the good one; raises RecipeError where that cannot be said."""
    if by in REFUSED:
        raise RecipeError(
            f"methods are not ranked by {by}: {REFUSED[by]}", where="--by", allowed=", ".join(sorted(DIRECTIONS))
        )
    known = better or DIRECTIONS.get(by)
    if known is None:
        raise RecipeError(
            f'which end of "{by}" is the good one is not known',
            where="--by",
            allowed=f"{', '.join(sorted(DIRECTIONS))}; quantlab compare takes others with --better lower or higher",
            next_step=nearest(by, DIRECTIONS),
        )
    return known


def check_measured(by: str, rows: Sequence[ValuedRow]) -> None:
    """Raise RecipeError for a metric that no row has."""
    measured = sorted({name for _, row in rows for name in row.metrics})
    if by not in measured:
        raise RecipeError(
            f'no result has the metric "{by}"',
            where="--by",
            allowed=", ".join(name for name in measured if name not in REFUSED),
            next_step=nearest(by, measured),
        )
