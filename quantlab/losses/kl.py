"""Divergence between the distributions over channels of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.errors import RecipeError
from quantlab.losses.reduction import Reduction, reduce
from quantlab.losses.taps import at_least_float, pixel_vectors


class KlConfig(LossConfig):
    """Options of the divergence."""

    temperature: float = Field(default=1.0, gt=0, description="what logits are divided by")
    feature: str | None = Field(
        default=None, description="path of the module whose channels are logits; none: the prediction"
    )
    reduction: Reduction = Field(default=Reduction.SUM, description="over samples and pixels")


class KlLoss(Loss):
    """Kullback-Leibler divergence of the student's softmax over channels from the teacher's.

    For a classifier the channels are the classes. The prediction of a denoiser is no distribution: there a ``feature``
    with several channels must be named, and every pixel's channels are taken as logits.
    """

    name = "kl"
    paper = "Distilling the knowledge in a neural network, arXiv 1503.02531, section 2"
    Config = KlConfig

    def __init__(self, config: KlConfig) -> None:
        self.config = config

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The module of ``feature``."""
        return (self.config.feature,) if self.config.feature else ()

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """weight * T^2 * reduction over rows of KL(softmax(teacher / T) || softmax(student / T)); 0-dim.

        T^2 keeps the size of the gradient when the temperature changes. Logits are [B, K], [B, K, H, W], or tokens
        [B, T, K].

        Raises:
            RecipeError: there is one channel, whose softmax is 1 whatever it holds.
        """
        path, temperature = self.config.feature or OUTPUT, self.config.temperature
        mine, theirs = (pixel_vectors(at_least_float(values[path])) / temperature for values in (student, teacher))
        if mine.shape[1] == 1:
            raise RecipeError(
                "a softmax over one channel is always 1",
                where='loss "kl"',
                got=tuple(student[path].shape),
                next_step="name a feature with several channels: {kl: {feature: path.of.module}}",
            )
        divergence = F.kl_div(mine.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(1)
        return self.config.weight_at(step.progress) * temperature**2 * reduce(divergence, self.config.reduction)
