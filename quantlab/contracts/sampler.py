"""Which recorded inputs calibrate the quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor


@dataclass(frozen=True)
class CalibrationPairs:
    """Recorded inputs by step and trajectory, sorted by both.

    Attributes:
        steps: positions in the sampler, 0 is the noisiest, int64 [M].
        samples: indices of the trajectories, int64 [M].
    """

    steps: Tensor
    samples: Tensor


@dataclass(frozen=True)
class SamplerProblem:
    """What a calibration sampler chooses from.

    Attributes:
        timesteps: of the recorded steps [S], from the noisiest to the cleanest.
        num_samples: N, the trajectories recorded at every step.
        budget: pairs of step and trajectory that are wanted, at most S * N.
        features: the outputs [S, n, ...] of a module, by its path, for the first n trajectories at every step; with
            guidance, of both halves of the batch [S, 2 n, ...]. The float network runs when it is called.
        rng: the only source of randomness a sampler may use.
    """

    timesteps: Tensor
    num_samples: int
    budget: int
    features: Callable[[str, int], Tensor]
    rng: torch.Generator


class CalibrationSampler(ABC):
    """Chooses the recorded inputs that ranges and scores are found on.

    A sampler is built from its validated ``Config`` and must be deterministic under ``problem.rng``.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    @abstractmethod
    def choose(self, problem: SamplerProblem) -> CalibrationPairs:
        """At least one pair and at most ``problem.budget`` of them, sorted by step, then by trajectory."""
