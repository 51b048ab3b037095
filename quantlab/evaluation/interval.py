"""How sure a number is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; ``low`` and ``high`` are NaN for a single value.

    Attributes:
        count: values behind it.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values (seeds)."""
    from scipy.stats import t

    centre, count = mean(values), len(values)
    if count < 2:
        return Interval(centre, math.nan, math.nan, count)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(centre, centre - half, centre + half, count)
