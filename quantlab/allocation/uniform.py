"""The same bits everywhere."""

from __future__ import annotations

import torch

from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy
from quantlab.contracts.config import Strict


class UniformConfig(Strict):
    """No options: the bits are the budget's."""


class UniformPolicy(BitPolicy):
    """Every channel of every site gets the budget's bits."""

    name = "uniform"
    Config = UniformConfig

    def __init__(self, config: UniformConfig) -> None:
        self.config = config

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Weights [out] and activation slots of ``problem.sites`` at the budget's bits; the others as given."""
        budget = problem.budget
        weights = {
            site.name: torch.full((site.out_channels,), budget.weight_bits, dtype=torch.int8)
            for site in problem.sites
            if site.weight_shape
        }
        activations = {(site.name, slot.name): budget.activation_bits for site in problem.sites for slot in site.slots}
        return BitMap({**problem.given.weight_bits, **weights}, {**problem.given.activation_bits, **activations})
