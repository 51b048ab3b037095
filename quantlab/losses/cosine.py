"""One minus the cosine of the angle between student and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.errors import RecipeError
from quantlab.losses.reduction import Reduction, reduce
from quantlab.losses.taps import at_least_float, pixel_vectors


class Vectors(StrEnum):
    """What is one vector."""

    SAMPLE = "sample"
    """Everything of a sample."""
    PIXEL = "pixel"
    """The channels of a pixel or token."""


class CosineConfig(LossConfig):
    """Options of the cosine loss."""

    vectors: Vectors = Field(default=Vectors.SAMPLE, description="what is one vector")
    feature: str | None = Field(
        default=None, description="path of the module whose output is compared; none: the prediction"
    )
    reduction: Reduction = Field(default=Reduction.SUM, description="over the vectors")


class CosineLoss(Loss):
    """One minus the cosine between the student's vectors and the teacher's; blind to their lengths."""

    name = "cosine"
    Config = CosineConfig

    def __init__(self, config: CosineConfig) -> None:
        self.config = config

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The module of ``feature``."""
        return (self.config.feature,) if self.config.feature else ()

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """weight * reduction of 1 - cos over samples or pixels of [B, ...]; a zero vector counts as orthogonal.

        Raises:
            RecipeError: the vectors have one element, so that their cosine is its sign.
        """
        path = self.config.feature or OUTPUT
        mine, theirs = (self._rows(at_least_float(values[path])) for values in (student, teacher))
        if mine.shape[1] == 1:
            raise RecipeError(
                "vectors of one element have no angle to learn from",
                where='loss "cosine"',
                got=f"{self.config.vectors} of {tuple(student[path].shape)}",
                next_step="set vectors: sample, or name a feature with several channels",
            )
        errors = 1 - F.cosine_similarity(mine, theirs, dim=1)
        return self.config.weight_at(step.progress) * reduce(errors, self.config.reduction)

    def _rows(self, values: Tensor) -> Tensor:
        return values.flatten(1) if self.config.vectors is Vectors.SAMPLE else pixel_vectors(values)
