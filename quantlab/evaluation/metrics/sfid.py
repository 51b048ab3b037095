"""Fréchet distance between sets of spatial features."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from quantlab.contracts.model import Evidence
from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.samples import ImageMetric, SampleSet


class SpatialFrechetDistance(Metric):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) in float64, exact for singular covariances too.

    Flattened maps easily have more features than there are images, and the square root of a singular product is where
    the usual algorithms lose half of their digits. With centred features X = Q R (thin QR) and C = R^T R / (n - 1),
    the eigenvalues of C1 C2 are the squared singular values of R1 R2^T / sqrt((n1 - 1) (n2 - 1)), so the trace is
    their sum and nothing is inverted or rooted.
    """

    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add flattened feature maps [B, S] to one of the two sets."""
        (self.real if real else self.generated).append(features.double())

    def compute(self) -> Tensor:
        """The distance; NaN if any feature is not finite."""
        first, other = dim_zero_cat(self.real), dim_zero_cat(self.generated)
        if not (first.isfinite().all() and other.isfinite().all()):
            return torch.tensor(math.nan, dtype=torch.float64)
        shift = (first.mean(0) - other.mean(0)).square().sum()
        roots = _root(first), _root(other)
        traces = sum(root.square().sum() for root in roots)
        return shift + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()


def _root(features: Tensor) -> Tensor:
    """R [min(n, S), S] with R^T R the covariance of features [n, S]."""
    centred = features - features.mean(0)
    return torch.linalg.qr(centred, mode="r").R / math.sqrt(len(features) - 1)


class SFid(ImageMetric):
    """Fréchet distance of spatial features to the real images: sees whether things are where they belong."""

    name: ClassVar[str] = "sfid"
    paper: ClassVar[str | None] = "Nash et al. 2021, arXiv 2103.03841"
    needs: ClassVar[Collection[Evidence]] = (Evidence.SPATIAL, Evidence.REFERENCE)
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``sfid``."""
        assert samples.spatial is not None and samples.reference_spatial is not None, "needs says so"
        metric = SpatialFrechetDistance()
        metric.update(samples.reference_spatial, real=True)
        metric.update(samples.spatial, real=False)
        return {"sfid": metric.compute().item()}
