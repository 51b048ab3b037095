"""EDA-DM's calibration (TDAC): more inputs at steps whose features are dense and various.

Liu et al., *Enhanced Distribution Alignment for Post-Training Quantization of Diffusion Models*, arXiv 2401.04585.
F_t is the output of the middle block at step t for the same trajectories at every step.

- density D_t: the number of steps j with mean (F_t - F_j)^2 <= r;
- variety V_t: the sum over j of 1 - cos(F_t, F_j);
- both min-max normalised over the steps, weight D_t + lambda V_t, numbers of inputs in proportion.

The paper's r (0.3 or 3.0) is a raw squared error, so it means something else in every model. Here r is ``radius`` times
the mean of mean (F_t - F_j)^2 over all pairs of distinct steps, which does not depend on the scale of the features;
``absolute_radius`` is the paper's. Not said in the paper, and chosen here: how many trajectories the features are of,
that cos is of all of them as one vector, that remainders of the proportion go to the largest fractions, and that
inputs are spread evenly when every weight is 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab import CalibrationPairs, CalibrationSampler, SamplerProblem, Strict, draw_pairs


class DensityVarietyConfig(Strict):
    """Options of the ``density-variety`` sampler."""

    feature: str = Field("mid_block", description="path of the module whose output is compared")
    trajectories: int = Field(16, ge=1, description="recorded trajectories that features are computed for")
    radius: float = Field(0.5, gt=0, description="r, of the mean squared distance between distinct steps")
    absolute_radius: float | None = Field(
        None, gt=0, description="r as a raw mean squared difference instead; the paper's scripts: 0.3 or 3.0"
    )
    variety: float = Field(
        1.2, ge=0, description="lambda; the paper's scripts: 1.0 LSUN, 1.2 CIFAR and ImageNet, 5.0 COCO"
    )


class DensityVariety(CalibrationSampler):
    """More inputs at steps where features are dense and various."""

    name: ClassVar[str] = "density-variety"
    paper: ClassVar[str | None] = "EDA-DM, arXiv 2401.04585"
    Config = DensityVarietyConfig

    def __init__(self, config: DensityVarietyConfig) -> None:
        self.config = config

    def choose(self, problem: SamplerProblem) -> CalibrationPairs:
        """Numbers of inputs in proportion to D_t + lambda V_t, trajectories drawn at each step."""
        count = min(self.config.trajectories, problem.num_samples)
        features = problem.features(self.config.feature, count).flatten(1).double().cpu()
        distances = squared_distances(features)
        radius = self.config.absolute_radius
        radius = self.config.radius * mean_of_pairs(distances) if radius is None else radius
        weights = normalised(density(distances, radius)) + self.config.variety * normalised(variety(features))
        return draw_pairs(apportion(weights, problem.budget), problem)


def squared_distances(features: Tensor) -> Tensor:
    """Mean squared differences [S, S] of features [S, n]."""
    return torch.stack([(features - one).square().mean(1) for one in features])


def mean_of_pairs(distances: Tensor) -> float:
    """Mean of distances [S, S] over pairs of distinct steps; 0 for one step."""
    pairs = len(distances) * (len(distances) - 1)
    return distances.sum().item() / pairs if pairs else 0.0


def density(distances: Tensor, radius: float) -> Tensor:
    """D_t [S]: how many steps lie within the radius, itself included."""
    return (distances <= radius).sum(1).double()


def variety(features: Tensor) -> Tensor:
    """V_t [S]: how far the directions of all features are from each."""
    unit = F.normalize(features, dim=1)
    return (1 - unit @ unit.T).sum(1)


def normalised(values: Tensor) -> Tensor:
    """Min-max normalised to [0, 1]; 0 where all are equal."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)


def apportion(weights: Tensor, total: int) -> Tensor:
    """Integers [S] that add up to ``total``, in proportion to the weights; largest remainders, earlier ones first."""
    weights = weights if weights.sum() > 0 else torch.ones_like(weights)
    shares = weights / weights.sum() * total
    counts = shares.floor().long()
    order = (counts - shares).argsort(stable=True)
    counts[order[: total - int(counts.sum())]] += 1
    return counts
