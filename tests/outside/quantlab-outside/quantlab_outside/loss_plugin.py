"""A loss: what the quantized student is trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab import OUTPUT, Loss, LossConfig, StepContext


class OutsideLossConfig(LossConfig):
    """Options of the loss, beside its weight and schedule."""

    delta: float = Field(default=1.0, gt=0, description="error from which on it grows linearly, as the prediction")


class OutsideLoss(Loss):
    """Huber's loss between the student's prediction and the teacher's."""

    name: ClassVar[str] = "outside-loss"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsideLossConfig

    def __init__(self, config: OutsideLossConfig) -> None:
        self.config = config

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """The weighted sum over the predictions [B, ...]; 0-dim, float32."""
        error = F.huber_loss(student[OUTPUT].float(), teacher[OUTPUT].float(), reduction="sum", delta=self.config.delta)
        return self.config.weight_at(step.progress) * error
