"""Memory-based temporal relation distillation: relations to the teacher's pixels of all timesteps.

Feng et al., MPQ-DMv2, arXiv 2507.04290, framework figure. No code and no settings are published: what the figure leaves
open is marked "guess", and starts from RDD by the same first author (`cantbebetter2/RDD`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab import Loss, LossConfig, Site, StepContext, last_block


class MemoryRelationConfig(LossConfig):
    """Options of the ``memory-relation`` loss."""

    size: int = Field(
        default=1000, ge=1, description="pixels kept of each timestep; guess: RDD keeps 20,000 in all, for 20 steps"
    )
    refreshed: int = Field(
        default=128, ge=1, description="pixels that enter a timestep's queue at a visit, the oldest leave; guess: RDD's"
    )
    samples: int = Field(
        default=1024, ge=1, description="pixels of all timesteps that are related to; guess: RDD takes 4,096"
    )
    temperature: float = Field(default=0.1, gt=0, description="what cosines are divided by; guess: RDD's")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="of the sum over pixels; guess: a divergence at temperature 0.1 is about 100 times that at 1, "
        "where MPQ-DM has a weight of 100",
    )
    feature: str | None = Field(
        default=None, description="path of the module whose output is compared; none: last block"
    )


class MemoryRelationLoss(Loss):
    """Divergence between the student's and the teacher's similarities to remembered pixels of the teacher."""

    name: ClassVar[str] = "memory-relation"
    paper: ClassVar[str | None] = "MPQ-DMv2, arXiv 2507.04290, framework figure; settings are guesses"
    needs_timestep: ClassVar[bool] = True
    Config = MemoryRelationConfig

    def __init__(self, config: MemoryRelationConfig) -> None:
        self.config = config
        self._feature = config.feature
        self._queue: PixelQueue | None = None

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The named module, or the last block; raises RecipeError for a network without blocks."""
        self._feature = self._feature or last_block(sites, self.name)
        return (self._feature,)

    def state(self) -> dict[str, Tensor]:
        """The queues; empty before the first step."""
        return {} if self._queue is None else {"pixels": self._queue.pixels, "seen": self._queue.seen}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back the queues, or forget them for a run from its start."""
        self._queue = PixelQueue(state["pixels"].clone(), state["seen"].clone()) if state else None

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """Remember some of the teacher's pixels at this timestep, then compare relations to a sample of all."""
        path = self._feature
        assert path is not None, "taps() is asked for before the first step"
        mine, theirs = unit_pixels(student[path]), unit_pixels(teacher[path])
        if self._queue is None:
            self._queue = PixelQueue.empty(step.num_steps, self.config.size, theirs)
        chosen = torch.randperm(len(theirs), generator=step.rng)[: self.config.refreshed]
        self._queue.push(step.step_index, theirs[chosen])
        remembered = self._queue.sample(self.config.samples, step.rng).to(theirs)
        divergence = memory_divergence(mine, theirs, remembered, self.config.temperature)
        return self.config.weight_at(step.progress) * divergence


class PixelQueue:
    """A queue of pixel vectors for every timestep; the newest take the place of the oldest.

    Attributes:
        pixels: [T, size, C]; a slot that was never filled holds 0.
        seen: how many pixels each timestep was given, int64 [T].
    """

    def __init__(self, pixels: Tensor, seen: Tensor) -> None:
        self.pixels, self.seen = pixels, seen

    @classmethod
    def empty(cls, num_steps: int, size: int, like: Tensor) -> PixelQueue:
        """Queues of ``size`` pixels for vectors such as ``like`` [*, C]."""
        return cls(like.new_zeros(num_steps, size, like.shape[1]), torch.zeros(num_steps, dtype=torch.int64))

    def push(self, step_index: int, pixels: Tensor) -> None:
        """Add pixels [N, C] to the queue of a timestep; of more than fit the last stay."""
        size = self.pixels.shape[1]
        first = int(self.seen[step_index])
        kept = pixels.detach()[-size:]
        slots = torch.arange(first + len(pixels) - len(kept), first + len(pixels)) % size
        self.pixels[step_index, slots.to(self.pixels.device)] = kept
        self.seen[step_index] += len(pixels)

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """At most ``count`` different pixels [N, C], drawn alike from all that any queue holds."""
        size = self.pixels.shape[1]
        filled = torch.arange(size) < self.seen[:, None].clamp(max=size)
        where = filled.flatten().nonzero().flatten()
        drawn = where[torch.randperm(len(where), generator=rng)[:count]]
        return self.pixels.flatten(0, 1)[drawn.to(self.pixels.device)]


def memory_divergence(student: Tensor, teacher: Tensor, remembered: Tensor, temperature: float) -> Tensor:
    """Sum over pixels of KL(softmax(F_t P^T / T) || softmax(F_s P^T / T)), 0-dim.

    Args:
        student: F_s [N, C].
        teacher: F_t [N, C].
        remembered: P [M, C], the same for both.
        temperature: T.
    """
    mine, theirs = student @ remembered.T / temperature, teacher @ remembered.T / temperature
    return F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)


def unit_pixels(features: Tensor) -> Tensor:
    """Pixel vectors of length 1: [B, C, H, W] -> [B H W, C], or tokens [B, T, C] -> [B T, C]."""
    tokens = features.movedim(1, -1) if features.dim() == 4 else features
    return F.normalize(tokens.flatten(0, -2), dim=-1)
