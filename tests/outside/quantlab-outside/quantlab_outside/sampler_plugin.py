"""A calibration sampler: which recorded inputs ranges are found on."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from quantlab import CalibrationPairs, CalibrationSampler, SamplerProblem, Strict, draw_pairs


class OutsideSamplerConfig(Strict):
    """Options of the sampler."""

    last: float = Field(default=0.5, gt=0, le=1, description="share of the steps, the cleanest, that give inputs")


class OutsideSampler(CalibrationSampler):
    """Inputs from the cleanest steps alone, at random among them."""

    name: ClassVar[str] = "outside-sampler"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsideSamplerConfig

    def __init__(self, config: OutsideSamplerConfig) -> None:
        self.config = config

    def choose(self, problem: SamplerProblem) -> CalibrationPairs:
        """As many pairs as the budget."""
        total = len(problem.timesteps)
        first = total - max(1, round(self.config.last * total))
        steps = torch.randint(first, total, (problem.budget,), generator=problem.rng)
        return draw_pairs(torch.bincount(steps, minlength=total), problem)
