"""How sure a metric of one set of images is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from quantlab.contracts.model import Progress
from quantlab.evaluation.interval import centred_percentiles
from quantlab.evaluation.samples import ImageMetric, SampleSet


def bootstrap(
    metrics: Sequence[ImageMetric],
    samples: SampleSet,
    values: Mapping[str, float | None],
    resamples: int,
    rng: torch.Generator,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every metric for which resampling makes sense, by metric.

    Args:
        metrics: those with ``resamples`` false are left out.
        samples: the images.
        values: of the metrics over all images, each once; one without a value has no interval either.
        resamples: how often as many images are drawn with replacement.
        rng: draws them.
        progress: told after each.
    """
    count, suitable = len(samples.images), [metric for metric in metrics if metric.resamples]
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
