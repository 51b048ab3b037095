"""A pass: scales between activation and weight that keep the float function."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantlab import SmoothingPass, Strict


class OutsidePassConfig(Strict):
    """Options of the pass."""

    limit: float = Field(default=16.0, ge=1, description="largest scale, and the reciprocal of the smallest")


class OutsidePass(SmoothingPass):
    """Input channels are divided by the square root of their magnitude over the weight's, within a limit."""

    name: ClassVar[str] = "outside-pass"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsidePassConfig

    def __init__(self, config: OutsidePassConfig) -> None:
        self.config = config

    def scales(self, weight_absmax: Tensor, input_absmax: Tensor) -> Tensor:
        """Scales [in]; a channel that is dead on one side keeps 1."""
        alive = (weight_absmax > 0) & (input_absmax > 0)
        ratio = torch.where(alive, input_absmax, 1.0) / torch.where(alive, weight_absmax, 1.0)
        return ratio.sqrt().clamp(1 / self.config.limit, self.config.limit)
