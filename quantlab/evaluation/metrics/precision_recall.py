"""Improved precision and recall with k-nearest-neighbour manifolds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from quantlab.contracts.config import Strict
from quantlab.contracts.model import Evidence
from quantlab.evaluation.samples import ImageMetric, SampleSet

CHUNK_ELEMENTS = 1 << 24
"""Distances held in memory at once: 128 MiB of float64."""


class PrecisionRecallConfig(Strict):
    """Options of precision and recall."""

    neighbours: int = Field(default=3, ge=1, description="k of the manifold's radius")


class ManifoldPrecisionRecall(Metric):
    """Share of generated features inside the real manifold, and of real ones inside the generated manifold.

    A set's manifold is the union of balls around its points that reach their k-th nearest other point
    (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).
    """

    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, neighbours: int = 3) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features [B, F] to one of the two sets."""
        (self.real if real else self.generated).append(features.double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Precision and recall, 0 to 1."""
        real, generated = dim_zero_cat(self.real), dim_zero_cat(self.generated)
        real_radii, generated_radii = self._radii(real), self._radii(generated)
        inside: list[Tensor] = []
        covered = torch.zeros(len(real), dtype=torch.bool)
        for start, distance in _distances(generated, real):
            inside.append((distance <= real_radii[None, :]).any(1))
            covered |= (distance <= generated_radii[start : start + len(distance), None]).any(0)
        return torch.cat(inside).double().mean(), covered.double().mean()

    def _radii(self, points: Tensor) -> Tensor:
        """Distance of each point to its k-th nearest other point; a point's duplicates are other points."""
        k = min(self.neighbours + 1, len(points))  # each point is its own nearest, at distance 0
        return torch.cat([distance.kthvalue(k, dim=1).values for _, distance in _distances(points, points)])


def _distances(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Euclidean distances of some of the rows to all columns, with the index of the first of these rows."""
    count = max(1, CHUNK_ELEMENTS // len(columns))
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        yield start, torch.cdist(part, columns, compute_mode="donot_use_mm_for_euclid_dist")


class PrecisionRecall(ImageMetric):
    """How much of what is generated looks real, and how much of what is real is generated."""

    name: ClassVar[str] = "precision-recall"
    resamples: ClassVar[bool] = False
    paper: ClassVar[str | None] = "Kynkäänniemi et al. 2019, arXiv 1904.06991"
    needs: ClassVar[Collection[Evidence]] = (Evidence.FEATURES, Evidence.REFERENCE)
    Config = PrecisionRecallConfig

    def __init__(self, config: PrecisionRecallConfig) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``precision`` and ``recall``."""
        assert samples.features is not None and samples.reference_features is not None, "needs says so"
        metric = ManifoldPrecisionRecall(self.config.neighbours)
        metric.update(samples.reference_features, real=True)
        metric.update(samples.features, real=False)
        precision, recall = metric.compute()
        return {"precision": precision.item(), "recall": recall.item()}
