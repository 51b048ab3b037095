"""How sure a metric of one set of images is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from quantlab.contracts.model import Progress
from quantlab.evaluation.interval import centred_percentiles


class Samples(Protocol):
    """Images, or answers about inputs, that can be drawn again."""

    def __len__(self) -> int: ...

    def pick(self, index: Tensor) -> Self:
        """Those at an index [M], one of them several times perhaps."""
        ...


AnySamples = TypeVar("AnySamples", bound=Samples, contravariant=True)


class Metric(Protocol[AnySamples]):
    """As much of a metric as is needed to compute it."""

    name: ClassVar[str]
    resamples: ClassVar[bool]

    def compute(self, samples: AnySamples, /) -> dict[str, float]:
        """One or more named values."""
        ...


def bootstrap(
    metrics: Sequence[Metric[AnySamples]],
    samples: AnySamples,
    values: Mapping[str, float | None],
    resamples: int,
    rng: torch.Generator,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every metric for which resampling makes sense, by metric.

    Args:
        metrics: those with ``resamples`` false are left out.
        samples: the images, or the answers of a classifier.
        values: of the metrics over all images, each once; one without a value has no interval either.
        resamples: how often as many are drawn with replacement.
        rng: draws them.
        progress: told after each.
    """
    count, suitable = len(samples), [metric for metric in metrics if metric.resamples]
    drawn: dict[str, list[float]] = {}
    for done in range(resamples if suitable else 0):
        again = samples.pick(torch.randint(count, (count,), generator=rng))
        for metric in suitable:
            for name, value in metric.compute(again).items():
                drawn.setdefault(name, []).append(value)
        progress(done + 1, resamples)
    found = {}
    for name, resampled in drawn.items():
        value = values[name]
        if value is not None and all(map(math.isfinite, resampled)):  # equal images have an infinite PSNR
            found[name] = centred_percentiles(value, resampled)
    return found
