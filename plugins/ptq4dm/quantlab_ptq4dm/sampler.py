"""PTQ4DM's calibration: timesteps from a normal distribution that is skewed to clean images.

Shang et al., *Post-Training Quantization on Diffusion Models*, CVPR 2023, arXiv 2211.15736, section on normally
distributed time-step calibration. Inputs are those of the reverse process, which is what quantlab records.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantlab import CalibrationPairs, CalibrationSampler, SamplerProblem, Strict, draw_pairs


class NormalTimestepsConfig(Strict):
    """Options of the ``normal-timesteps`` sampler, as shares of the largest recorded timestep T."""

    mean: float = Field(0.4, ge=0, le=1, description="mean of the timestep, of T; the paper's text: at most 0.5")
    std: float = Field(0.4, gt=0, description="standard deviation of the timestep, of T; the paper's text: 0.5")


class NormalTimesteps(CalibrationSampler):
    """Inputs at timesteps t ~ N(0.4 T, 0.4 T), clamped to the trajectory."""

    name: ClassVar[str] = "normal-timesteps"
    paper: ClassVar[str | None] = "PTQ4DM, CVPR 2023, arXiv 2211.15736"
    Config = NormalTimestepsConfig

    def __init__(self, config: NormalTimestepsConfig) -> None:
        self.config = config

    def choose(self, problem: SamplerProblem) -> CalibrationPairs:
        """As many draws as the budget; each goes to the recorded step nearest to it, and gets a trajectory there."""
        steps = nearest_steps(self.draw(problem), problem.timesteps)
        return draw_pairs(torch.bincount(steps, minlength=len(problem.timesteps)), problem)

    def draw(self, problem: SamplerProblem) -> Tensor:
        """Timesteps [budget], float64, clamped to the recorded ones."""
        timesteps = problem.timesteps.double()
        low, high = timesteps.min(), timesteps.max()
        normal = torch.randn(problem.budget, generator=problem.rng, dtype=torch.float64)
        return (self.config.mean * high + self.config.std * high * normal).clamp(low, high)


def nearest_steps(drawn: Tensor, timesteps: Tensor) -> Tensor:
    """The recorded step nearest to each drawn timestep, int64 [M]; of two equally near ones the noisier."""
    return (drawn[:, None] - timesteps.double()[None, :]).abs().argmin(1)
