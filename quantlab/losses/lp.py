"""A power of the error of the prediction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.losses.reduction import Reduction, reduce


class LpConfig(LossConfig):
    """Options of the power of the error."""

    p: float = Field(default=2.4, ge=1, description="exponent; below 1 the gradient at 0 is infinite")
    reduction: Reduction = Field(default=Reduction.SUM, description="over elements")


class LpLoss(Loss):
    """Power p of the difference between the student's prediction and the teacher's."""

    name = "lp"
    Config = LpConfig

    def __init__(self, config: LpConfig) -> None:
        self.config = config

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """weight * reduction of |student - teacher|^p over the predictions [B, ...]; 0-dim, at least float32."""
        difference = student[OUTPUT] - teacher[OUTPUT]
        # A sum over a batch of images leaves the range of float16.
        magnitude = difference.to(torch.promote_types(difference.dtype, torch.float32)).abs()
        return self.config.weight_at(step.progress) * reduce(magnitude.pow(self.config.p), self.config.reduction)
