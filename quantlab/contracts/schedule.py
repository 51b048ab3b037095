"""What a loss weighs, and when."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from quantlab.contracts.config import Strict


class Curve(StrEnum):
    """How a factor goes from its initial to its final value."""

    LINEAR = "linear"
    COSINE = "cosine"
    """Half a cosine: slow at both ends."""


class Schedule(Strict):
    """A factor over the iterations of a tuner; 1 throughout unless ``initial`` or ``final`` says otherwise."""

    initial: float = Field(default=1.0, ge=0, description="factor until `start`")
    final: float = Field(default=1.0, ge=0, description="factor from `end` on")
    start: float = Field(default=0.0, ge=0, le=1, description="share of the iterations after which it changes")
    end: float = Field(
        default=1.0, ge=0, le=1, description="share of the iterations after which it has changed; `start`: at once"
    )
    curve: Curve = Curve.LINEAR

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Self:
        if self.start > self.end:
            raise ValueError("start must not lie after end")
        return self

    def factor(self, progress: float) -> float:
        """The factor at a share of the iterations in [0, 1]; exactly ``initial`` up to start, ``final`` from end on."""
        if progress >= self.end:
            return self.final
        if progress <= self.start:
            return self.initial
        share = (progress - self.start) / (self.end - self.start)
        if self.curve is Curve.COSINE:
            share = (1 - math.cos(math.pi * share)) / 2
        return self.initial + (self.final - self.initial) * share


class LossConfig(Strict):
    """The options that every loss has."""

    weight: float = Field(default=1.0, gt=0, description="factor of the loss beside the others")
    schedule: Schedule = Field(default=Schedule(), description="a further factor that changes over the iterations")

    def weight_at(self, progress: float) -> float:
        """Weight times schedule at a share of the iterations in [0, 1]."""
        return self.weight * self.schedule.factor(progress)
