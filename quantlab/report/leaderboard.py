"""Results sorted within one protocol, never across."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlab.evaluation.interval import Interval, interval
from quantlab.report.rows import FULL_PRECISION, Row

LARGE = 1e4
"""Metrics from here on are shown without decimals."""
RANKED_BY = ("fid-to-teacher", "top-1", "paired-mse")
"""What places are sorted by: the first of these that was measured."""
Entry = tuple[Mapping[str, object], Row]
"""A row with the values of its cell; those of a run are empty."""


@dataclass(frozen=True)
class Heading:
    """How a metric shows: its name, its digits, and whether less is better; None where neither end is."""

    title: str
    digits: int
    less_is_better: bool | None


HEADINGS: Mapping[str, Heading] = {
    "fid-to-teacher": Heading("FID to teacher", 2, True),
    "fid": Heading("FID", 2, True),
    "sfid": Heading("sFID", 2, True),
    "kid": Heading("KID x1000", 3, True),
    "precision": Heading("precision", 3, False),
    "recall": Heading("recall", 3, False),
    "psnr": Heading("PSNR dB", 2, False),
    "ssim": Heading("SSIM", 3, False),
    "lpips": Heading("LPIPS", 3, True),
    "paired-mse": Heading("paired MSE", 4, True),
    "clip-score": Heading("CLIP score", 2, False),
    "top-1": Heading("top-1", 3, False),
    "top-5": Heading("top-5", 3, False),
    "agreement": Heading("agreement", 3, False),
    "kl-to-float": Heading("KL to float", 4, True),
    "accuracy": Heading("accuracy", 3, None),
    "is": Heading("IS", 2, None),
}


@dataclass(frozen=True)
class Place:
    """One method at one setting over its seeds.

    Attributes:
        setting: the values of its cell besides method, model, budget and seed.
        row: of its first seed.
        seeds: how many.
        metrics: mean and interval by name; a metric without a finite value is left out.
        seconds: mean over seeds.
    """

    setting: str
    row: Row
    seeds: int
    metrics: Mapping[str, Interval]
    seconds: float

    @property
    def title(self) -> str:
        """The method with its bits and setting."""
        if self.row.method == FULL_PRECISION:
            return FULL_PRECISION
        return " ".join(
            filter(None, (self.row.method, f"W{self.row.weight_bits:.3g}A{self.row.activation_bits:.3g}", self.setting))
        )

    def rank_value(self, metric: str) -> float:
        """What places are sorted by, smaller for a better one; infinite where it was not measured."""
        found = self.metrics.get(metric)
        if found is None:
            return math.inf
        return -found.mean if heading(metric).less_is_better is False else found.mean


@dataclass(frozen=True)
class Leaderboard:
    """The places of one protocol, best first, after full precision."""

    protocol: str
    model: str
    places: Sequence[Place]

    @property
    def columns(self) -> list[str]:
        """The metrics that were measured, in a fixed order."""
        found = {name for place in self.places for name in place.metrics}
        return [name for name in HEADINGS if name in found] + sorted(found - set(HEADINGS))

    @property
    def ranked_by(self) -> str:
        """The metric that places are sorted by."""
        return ranking_metric(self.places)

    @property
    def ranked(self) -> list[Place]:
        """Without full precision."""
        return [place for place in self.places if place.row.method != FULL_PRECISION]

    @property
    def full_precision(self) -> Place | None:
        """The float model: its FID to teacher is what other noise alone makes."""
        return next((place for place in self.places if place.row.method == FULL_PRECISION), None)


def leaderboards(entries: Sequence[Entry]) -> list[Leaderboard]:
    """A leaderboard for every protocol, by model."""
    protocols: dict[str, list[Entry]] = {}
    for entry in entries:
        protocols.setdefault(entry[1].protocol, []).append(entry)
    boards = [Leaderboard(protocol, found[0][1].model, _places(found)) for protocol, found in protocols.items()]
    return sorted(boards, key=lambda board: board.model)


def ranking_metric(places: Sequence[Place]) -> str:
    """The first of RANKED_BY that one of the places has."""
    found = {name for place in places for name in place.metrics}
    return next((name for name in RANKED_BY if name in found), RANKED_BY[0])


def heading(metric: str) -> Heading:
    """How a metric shows; one that a plugin brings goes by its own name."""
    return HEADINGS.get(metric, Heading(metric, 3, None))


def shown(value: Interval | None, digits: int) -> str:
    """A mean, with the half width of its interval where there are several seeds."""
    if value is None:
        return "-"
    digits = digits if abs(value.mean) < LARGE else 0
    mean = f"{value.mean:,.{digits}f}"
    return mean if value.count < 2 else f"{mean} ± {value.half_width:,.{digits}f}"


def _places(entries: Sequence[Entry]) -> list[Place]:
    """Entries grouped by everything but the seed; the float row is the same for all and comes once."""
    groups: dict[str, list[Entry]] = {}
    for values, row in entries:
        full = row.method == FULL_PRECISION
        rest = {} if full else {key: value for key, value in values.items() if key != "seed"}
        group = groups.setdefault(json.dumps([row.method, rest], sort_keys=True, default=str), [])
        if not full or not group:
            group.append((rest, row))
    places = [_place(group) for group in groups.values()]
    metric = ranking_metric(places)
    return sorted(places, key=lambda place: (place.row.method != FULL_PRECISION, place.rank_value(metric), place.title))


def _place(group: Sequence[Entry]) -> Place:
    values, row = group[0]
    rows = [each for _, each in group]
    metrics = {}
    for name in dict.fromkeys(name for each in rows for name in each.metrics):
        known = [value for each in rows if (value := each.metrics.get(name)) is not None]
        if known:
            metrics[name] = interval(known)
    named = {key: value for key, value in values.items() if key not in ("method", "model.name", "budget")}
    setting = ", ".join(f"{key}={value}" for key, value in named.items())
    return Place(setting, row, len(rows), metrics, sum(each.seconds for each in rows) / len(rows))
