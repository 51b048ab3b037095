"""Kernel distance between sets of features."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from quantlab.contracts.model import Evidence
from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.samples import ImageMetric, SampleSet

SCALE = 1000
"""As papers print it; torchmetrics and torch-fidelity return the plain value."""
CHUNK_ROWS = 1024


class KernelDistance(Metric):
    """Unbiased squared MMD with the kernel (x . y / F + 1)^3, over the whole sets and in float64.

    torchmetrics' own metric averages over subsets that it draws with the global generator, so that its value changes
    from call to call; the estimate over all pairs has no such noise, and is what those subsets estimate.
    (Bińkowski et al. 2018, arXiv 1801.01401, section 4: the U-statistic, which leaves out a point's pair with itself.)
    """

    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features [B, F] to one of the two sets."""
        (self.real if real else self.generated).append(features.double())

    def compute(self) -> Tensor:
        """The distance; may be a little below 0 for equal distributions, since it is unbiased."""
        real, generated = dim_zero_cat(self.real), dim_zero_cat(self.generated)
        across = _kernel_sum(real, generated) / (len(real) * len(generated))
        return _mean_of_pairs(real) + _mean_of_pairs(generated) - 2 * across


def _mean_of_pairs(points: Tensor) -> Tensor:
    """Mean of the kernel over ordered pairs of different points."""
    count, width = points.shape
    own = (points.square().sum(1) / width + 1).pow(3).sum()
    return (_kernel_sum(points, points) - own) / (count * (count - 1))


def _kernel_sum(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum of the kernel over all pairs."""
    width = rows.shape[1]
    parts = [(part @ columns.T / width + 1).pow(3).sum() for part in rows.split(CHUNK_ROWS)]
    return torch.stack(parts).sum()


class Kid(ImageMetric):
    """Kernel distance to the real images, times 1000; unbiased, so it suits small sets where FID does not."""

    name: ClassVar[str] = "kid"
    paper: ClassVar[str | None] = "Bińkowski et al. 2018, arXiv 1801.01401"
    needs: ClassVar[Collection[Evidence]] = (Evidence.FEATURES, Evidence.REFERENCE)
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``kid``, times 1000."""
        assert samples.features is not None and samples.reference_features is not None, "needs says so"
        metric = KernelDistance()
        metric.update(samples.reference_features, real=True)
        metric.update(samples.features, real=False)
        return {"kid": SCALE * metric.compute().item()}
