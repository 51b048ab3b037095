"""Fréchet distance between sets of features."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar

from torch import Tensor, nn

from quantlab.contracts.config import Strict
from quantlab.contracts.model import Evidence
from quantlab.evaluation.samples import ImageMetric, SampleSet
from quantlab.torchvision_shim import ensure_torchvision_imports


class NoOptions(Strict):
    """The metric has no options."""


class _Features(nn.Module):
    """Hands features through where torchmetrics expects a network that makes them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(1)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of features [N, F] and [M, F], in float64; NaN if any is not finite."""
    if not (features.isfinite().all() and reference.isfinite().all()):
        return math.nan  # the eigenvalues of such a matrix end the process
    ensure_torchvision_imports()
    from torchmetrics.image.fid import FrechetInceptionDistance

    count = features.shape[1]
    metric = FrechetInceptionDistance(_Features(count), normalize=True, input_img_size=(count, 1, 1))
    metric.set_dtype(features.double().dtype)
    metric.update(reference.double()[:, :, None, None], real=True)
    metric.update(features.double()[:, :, None, None], real=False)
    return metric.compute().item()


class Fid(ImageMetric):
    """Fréchet distance to the real images."""

    name: ClassVar[str] = "fid"
    paper: ClassVar[str | None] = "Heusel et al. 2017, arXiv 1706.08500"
    needs: ClassVar[Collection[Evidence]] = (Evidence.FEATURES, Evidence.REFERENCE)
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``fid``."""
        assert samples.features is not None and samples.reference_features is not None, "needs says so"
        return {"fid": frechet_distance(samples.features, samples.reference_features)}


class FidToTeacher(ImageMetric):
    """Fréchet distance to images that the float model draws from other noise."""

    name: ClassVar[str] = "fid-to-teacher"
    paper: ClassVar[str | None] = "Heusel et al. 2017, arXiv 1706.08500"
    needs: ClassVar[Collection[Evidence]] = (Evidence.FEATURES,)
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``fid-to-teacher``."""
        assert samples.features is not None and samples.teacher_features is not None, "needs says so"
        return {"fid-to-teacher": frechet_distance(samples.features, samples.teacher_features)}
