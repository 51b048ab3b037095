"""A bit policy: which channels get how many bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantlab import AllocationProblem, BitMap, BitPolicy, Budget, Strict


class OutsidePolicyConfig(Strict):
    """Options of the policy."""

    fraction: float = Field(
        default=0.25, ge=0, le=0.5, description="share of a site's channels that get one bit more, and as many one less"
    )


class OutsidePolicy(BitPolicy):
    """Channels whose weights reach furthest get one bit more, those that reach least one less."""

    name: ClassVar[str] = "outside-policy"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    mixes: ClassVar[bool] = True
    Config = OutsidePolicyConfig

    def __init__(self, config: OutsidePolicyConfig) -> None:
        self.config = config

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Bits of every channel; their mean in a site is the budget's."""
        weight_bits = dict(problem.given.weight_bits)
        for site in problem.sites:
            if site.weight_shape:
                weight_bits[site.name] = self.bits(problem.data.weight(site.name), problem.budget)
        return BitMap(weight_bits, problem.given.activation_bits)

    def bits(self, weight: Tensor, budget: Budget) -> Tensor:
        """int8 [out] for a weight [out, ...]."""
        bits = torch.full((len(weight),), budget.weight_bits, dtype=torch.int8)
        if 1 < budget.weight_bits < 8:
            order = weight.flatten(1).abs().amax(1).argsort(descending=True, stable=True).cpu()
            moved = int(self.config.fraction * len(weight))
            bits[order[:moved]] += 1
            bits[order[len(weight) - moved :]] -= 1
        return bits
