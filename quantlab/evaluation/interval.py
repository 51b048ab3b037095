"""How sure a number is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; ``low`` and ``high`` are NaN where nothing tells how sure the mean is.

    Attributes:
        count: independent values (seeds) behind it; an interval around a single one is from resampled images.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2

    @property
    def known(self) -> bool:
        """There is an interval."""
        return math.isfinite(self.low)

    @property
    def excludes_zero(self) -> bool:
        """All of the interval lies on one side of zero: of a difference, it is beyond the noise."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of the mean of independent values (seeds)."""
    from scipy.stats import t

    centre, count = mean(values), len(values)
    if count < 2:
        return Interval(centre, math.nan, math.nan, count)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(centre, centre - half, centre + half, count)


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209); never outside 0 to 1."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + confidence) / 2))
    share, weight = successes / count, z * z / count
    centre = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    # At a share of 0 or 1 one end is that share itself, but for rounding.
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    return (low if successes else 0.0, high if successes < count else 1.0)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Interval | None:
    """The mean of values minus baseline over the seeds that both have, with the t interval of the differences.

    What a seed does to both cancels, so it is narrower than the difference of two means. None without a shared seed.
    """
    shared = sorted(values.keys() & baseline.keys())
    return interval([values[seed] - baseline[seed] for seed in shared], confidence) if shared else None


def centred_percentiles(
    value: float, resampled: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The bootstrap percentile interval of a value, moved so that the resampled values' mean is the value itself.

    A Fréchet distance grows when images are drawn with replacement; unmoved, its percentiles would not even hold the
    value. A mean over images does not grow, and hardly moves.
    """
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resampled, float), [tail, 1 - tail]) + (value - mean(resampled))
    return float(low), float(high)


def seeds_for_gap(variation: float, relative_gap: float) -> int | None:
    """Seeds that each of two methods needs for a gap to be seen; None for no gap.

    n = 15.7 (CV / relative gap)^2: a two-sided 5 % test of two means that sees the gap in 80 % of the cases,
    2 (1.960 + 0.842)^2 = 15.7. At least 2, since one seed has no variation.

    Args:
        variation: the coefficient of variation over seeds, standard deviation / mean.
        relative_gap: difference of the means / mean.
    """
    return max(2, math.ceil(15.7 * (variation / relative_gap) ** 2)) if relative_gap else None
