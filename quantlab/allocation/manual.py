"""Bits by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy
from quantlab.contracts.config import Strict
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site
from quantlab.errors import RecipeError
from quantlab.matching import match_sites

Bits = Annotated[int, Field(ge=1, le=8)]


class ManualRule(Strict):
    """Bits for the sites that a pattern matches; what is left out stays as it was."""

    match: str = Field(description="glob over site names")
    weight_bits: Bits | None = Field(default=None, description="of every channel; none: as it was")
    activation_bits: Bits | None = Field(default=None, description="of every input; none: as it was")
    optional: bool = Field(default=False, description="a pattern that matches nothing is no error")


class ManualConfig(Strict):
    """Rules in order; the last one that matches a site wins."""

    rules: tuple[ManualRule, ...] = Field(description="patterns over site names with their bits")


class ManualPolicy(BitPolicy):
    """Sites get the bits that the recipe writes down for them, within the budget's mean."""

    name = "manual"
    Config = ManualConfig

    def __init__(self, config: ManualConfig) -> None:
        self.config = config

    def lowest_bits(self, budget: Budget) -> tuple[int, int]:
        """The lowest bits that are written down, or the budget's."""
        rules = self.config.rules
        weights = [rule.weight_bits for rule in rules if rule.weight_bits]
        inputs = [rule.activation_bits for rule in rules if rule.activation_bits]
        return min(budget.weight_bits, *weights, 8), min(budget.activation_bits, *inputs, 8)

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Apply the rules to what is given.

        Raises:
            RecipeError: a pattern matches none of the sites, or the mean bits of the weights exceed the budget.
        """
        chosen = match_sites(self.config.rules, [site.name for site in problem.sites], key="manual.rules")
        weights, activations = dict(problem.given.weight_bits), dict(problem.given.activation_bits)
        for site in problem.sites:
            rule = chosen.get(site.name)
            if rule and rule.weight_bits and site.weight_shape:
                weights[site.name] = torch.full((site.out_channels,), rule.weight_bits, dtype=torch.int8)
            if rule and rule.activation_bits:
                activations |= {(site.name, slot.name): rule.activation_bits for slot in site.slots}
        bit_map = BitMap(weights, activations)
        mean, allowed = _mean_bits(problem.sites, bit_map), problem.budget.weight_bits
        if mean > allowed + problem.budget.extra_bit_fraction:
            raise RecipeError(
                "the bits written down for the sites exceed the budget",
                where="manual.rules",
                got=f"{mean:.3f} mean weight bits",
                allowed=f"{allowed} plus the extra bit fraction {problem.budget.extra_bit_fraction}",
                next_step="lower some of them, or raise budget.weight_bits",
            )
        return bit_map


def _mean_bits(sites: Sequence[Site], bit_map: BitMap) -> float:
    """Parameter-weighted mean bits of the weights; 0 without weights."""
    weighted = [(site.weight_count, bit_map.weight_bits[site.name]) for site in sites if site.weight_shape]
    total = sum(count for count, _ in weighted)
    return sum(count * bits.double().mean().item() for count, bits in weighted) / total if total else 0.0
