"""Q-Diffusion's calibration: the same number of inputs at evenly spaced steps.

Li et al., *Q-Diffusion: Quantizing Diffusion Models*, ICCV 2023, arXiv 2302.04304, section on timestep-aware
calibration. The released scripts take 20 of 200 steps for latent diffusion and 25 of 50 for Stable Diffusion. Where
not more steps are recorded than ``steps``, the choice is that of no sampler.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantlab import CalibrationPairs, CalibrationSampler, SamplerProblem, Strict


class UniformTimestepsConfig(Strict):
    """Options of the ``uniform-timesteps`` sampler."""

    steps: int = Field(
        20, ge=1, description="evenly spaced steps of the sampler that give inputs; all if there are less"
    )


class UniformTimesteps(CalibrationSampler):
    """The first trajectories at every (S/c)-th step."""

    name: ClassVar[str] = "uniform-timesteps"
    paper: ClassVar[str | None] = "Q-Diffusion, ICCV 2023, arXiv 2302.04304"
    Config = UniformTimestepsConfig

    def __init__(self, config: UniformTimestepsConfig) -> None:
        self.config = config

    def choose(self, problem: SamplerProblem) -> CalibrationPairs:
        """As many at each step as the budget allows: fewer steps have more trajectories each, up to those recorded."""
        steps = evenly_spaced(len(problem.timesteps), min(self.config.steps, problem.budget))
        each = min(problem.num_samples, max(1, problem.budget // len(steps)))
        return CalibrationPairs(steps.repeat_interleave(each), torch.arange(each).repeat(len(steps)))


def evenly_spaced(total: int, count: int) -> Tensor:
    """Every (total / count)-th of ``total`` positions from the first, int64; all of them if there are no more."""
    count = min(total, count)
    return torch.arange(count) * total // count
