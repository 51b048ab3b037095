"""Squared error of a module's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import Tensor

from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import Loss, StepContext
from quantlab.losses.reduction import Reduction, reduce
from quantlab.losses.taps import at_least_float, last_block


class FeaturesConfig(LossConfig):
    """Options of the squared error of features."""

    feature: str | None = Field(
        default=None, description="path of the module whose output is compared; none: last block"
    )
    reduction: Reduction = Field(default=Reduction.SUM, description="over elements")


class FeaturesLoss(Loss):
    """Squared difference between the student's features and the teacher's."""

    name = "features"
    paper = "FitNets, ICLR 2015, arXiv 1412.6550, without its regressor"
    Config = FeaturesConfig

    def __init__(self, config: FeaturesConfig) -> None:
        self.config = config
        self._feature = config.feature

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The named module, or the last block; raises RecipeError for a network without blocks."""
        self._feature = self._feature or last_block(sites, self.name)
        return (self._feature,)

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """weight * reduction of (student - teacher)^2 over the features [B, ...]; 0-dim, at least float32."""
        assert self._feature is not None, "taps() is asked for before the first step"
        squared = at_least_float(student[self._feature] - teacher[self._feature]).square()
        return self.config.weight_at(step.progress) * reduce(squared, self.config.reduction)
