"""Time-smoothed relation distillation: the student keeps the similarities between the teacher's pixels.

Feng et al., MPQ-DM, AAAI 2025, arXiv 2412.11549, section "Time-Smoothed Relation Distillation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab import Loss, LossConfig, Site, StepContext, last_block


class RelationConfig(LossConfig):
    """Options of the ``relation`` loss."""

    window: int = Field(default=2, ge=1, description="consecutive denoising steps whose features are averaged")
    overlap: bool = Field(default=False, description="a loss at every step once the window is full, not once a window")
    weight: float = Field(default=100.0, gt=0, description="the loss is a sum of divergences times this")
    gradient: bool = Field(
        default=True,
        description="the current step's features are attached; the released code detaches them and trains nothing",
    )
    feature: str | None = Field(
        default=None, description="path of the module whose output is compared; none: last block"
    )


class RelationLoss(Loss):
    """Divergence between the student's and the teacher's pixel similarities, averaged over denoising steps."""

    name: ClassVar[str] = "relation"
    paper: ClassVar[str | None] = "MPQ-DM, AAAI 2025, arXiv 2412.11549"
    needs_timestep: ClassVar[bool] = True
    Config = RelationConfig

    def __init__(self, config: RelationConfig) -> None:
        self.config = config
        self._feature = config.feature
        self._window: list[tuple[Tensor, Tensor]] = []

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The output of the last block: what the final projection gets.

        Raises:
            RecipeError: the network has no blocks and no feature is named.
        """
        self._feature = self._feature or last_block(sites, self.name)
        return (self._feature,)

    def reset(self) -> None:
        """Forget the window."""
        self._window.clear()

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext
    ) -> Tensor | None:
        """The weighted divergence at the end of each window, None before."""
        path = self._feature
        assert path is not None, "taps() is asked for before the first step"
        self._window.append((student[path], teacher[path]))
        if len(self._window) < self.config.window:
            # Earlier steps are history: their graph has been used, and their parameters have moved on.
            self._window[-1] = (student[path].detach(), teacher[path])
            return None
        attached = torch.stack([mine for mine, _ in self._window]).mean(0)
        theirs = torch.stack([other for _, other in self._window]).mean(0)
        if self.config.overlap:
            self._window = [(mine.detach(), other) for mine, other in self._window[1:]]
        else:
            self._window.clear()
        divergence = relation_divergence(attached if self.config.gradient else attached.detach(), theirs)
        return self.config.weight_at(step.progress) * divergence


def relation_divergence(student: Tensor, teacher: Tensor, *, normalize: bool = True) -> Tensor:
    """Sum over all pixels of KL(teacher || student) between their rows of similarities, temperature 1.

    Args:
        student: features [B, C, H, W], or tokens [B, T, C].
        teacher: the same shape.
        normalize: scale every pixel's vector to length 1 first, so that similarities are cosines.
    """
    mine, theirs = similarities(student, normalize), similarities(teacher, normalize)
    return F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)


def similarities(features: Tensor, normalize: bool = True) -> Tensor:
    """Products of all pairs of pixel vectors: [B, C, H, W] -> [B, HW, HW], or tokens [B, T, C] -> [B, T, T]."""
    tokens = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
    if normalize:
        tokens = F.normalize(tokens, dim=-1)
    return tokens @ tokens.transpose(1, 2)
