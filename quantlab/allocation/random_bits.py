"""Bits of whole sites by chance: the control of every policy that claims to know better."""

from __future__ import annotations

import numpy as np
import torch

from quantlab.allocation.groups import Options, WidthsConfig, bit_map_of, groups_of, infeasible, knapsack_of
from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy, Resource
from quantlab.contracts.sections import Budget


class RandomPolicy(BitPolicy):
    """Sites start at the lowest bits; steps are bought in a random order until none fits the budget."""

    name = "random"
    Config = WidthsConfig

    def __init__(self, config: WidthsConfig) -> None:
        self.config = config

    def between_sites(self) -> bool:
        """Sites compete for the budget."""
        return True

    def lowest_bits(self, budget: Budget) -> tuple[int, int]:
        """The lowest candidate; inputs keep the budget's bits."""
        return min(self.config.candidates(budget)), budget.activation_bits

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Bits of every site, those that share a format alike.

        Raises:
            RecipeError: nothing fits.
        """
        groups = groups_of(problem.sites)
        options = Options(self.config.candidates(problem.budget), (problem.budget.activation_bits,))
        knapsack = knapsack_of(problem, groups, options, [])
        chosen = np.zeros(len(groups), dtype=np.int64)
        if not knapsack.fits(chosen):
            raise infeasible(self.name, knapsack, [Resource.WEIGHT_BITS, *problem.limits])
        steps = len(options.weights) - 1
        for ticket in torch.randperm(len(groups) * steps, generator=problem.rng).tolist():
            bought = chosen.copy()
            bought[ticket % len(groups)] += 1
            if knapsack.fits(bought):
                chosen = bought
        return bit_map_of(problem, groups, [options.pairs[option] for option in chosen])
