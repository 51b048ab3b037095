"""Squared error of the prediction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.losses.reduction import Reduction, reduce


class MseConfig(LossConfig):
    """Options of the squared error."""

    reduction: Reduction = Field(default=Reduction.SUM, description="over elements")


class MseLoss(Loss):
    """Squared difference between the student's prediction and the teacher's."""

    name = "mse"
    Config = MseConfig

    def __init__(self, config: MseConfig) -> None:
        self.config = config

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """weight * reduction of (student - teacher)^2 over the predictions [B, ...]; 0-dim, at least float32."""
        difference = student[OUTPUT] - teacher[OUTPUT]
        # A sum over a batch of images leaves the range of float16.
        squared = difference.to(torch.promote_types(difference.dtype, torch.float32)).square()
        return self.config.weight_at(step.progress) * reduce(squared, self.config.reduction)
