"""Which sites are quantized, and with what bits before any policy has spoken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site, SiteKind
from quantlab.errors import ModelError, RecipeError


@dataclass(frozen=True)
class SitePlan:
    """The intent for one site.

    Attributes:
        site: the site.
        weight_bits: nominal bits of its weight, FLOAT_BITS when it stays float.
        activation_bits: likewise of its input.
        budgeted: the budget and the policies decide about it; otherwise a ``keep`` rule fixed its bits.
        reason: why it stays float, "" otherwise.
        split: sizes of the parts of its input that get quantizers of their own, as do the weights that read them.
    """

    site: Site
    weight_bits: int
    activation_bits: int
    budgeted: bool
    reason: str = ""
    split: tuple[int, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether anything of it leaves floating point."""
        return self.weight_bits != FLOAT_BITS or self.activation_bits != FLOAT_BITS


@dataclass(frozen=True)
class Plan:
    """The intent for every site, in the graph's order."""

    sites: tuple[SitePlan, ...]
    budget: Budget

    @property
    def quantized(self) -> tuple[SitePlan, ...]:
        """The sites that leave floating point."""
        return tuple(entry for entry in self.sites if entry.quantized)

    @property
    def budgeted(self) -> tuple[Site, ...]:
        """The sites that policies may allocate."""
        return tuple(entry.site for entry in self.sites if entry.budgeted)

    def nominal(self) -> BitMap:
        """The bit map before any policy: every channel of a site alike."""
        return BitMap(
            {e.site.name: torch.full((e.site.out_channels,), e.weight_bits, dtype=torch.int8) for e in self.sites},
            {(e.site.name, slot.name): e.activation_bits for e in self.sites for slot in e.site.slots},
        )


def make_plan(sites: Sequence[Site], keep: Mapping[str, int], budget: Budget, *, split_skip: bool = False) -> Plan:
    """Give every site its nominal bits.

    Args:
        sites: of the captured graph.
        keep: bits by site name of the sites outside the budget, FLOAT_BITS for float.
        budget: bits of all others.
        split_skip: of them, those fed by a skip concatenation quantize its parts apart.

    Raises:
        RecipeError: nothing is left to quantize.
        ModelError: the model has no linear layer or convolution inside it.
    """
    if not any(site.kind in (SiteKind.CONV, SiteKind.LINEAR) for site in sites):
        raise ModelError(
            "the model has no linear layer or convolution that can be quantized",
            where="capture",
            next_step="if the model is itself one layer, put it into a torch.nn.Sequential",
        )
    entries = []
    for site in sites:
        if site.kind not in (SiteKind.CONV, SiteKind.LINEAR):
            entries.append(SitePlan(site, FLOAT_BITS, FLOAT_BITS, False, f"{site.kind} sites are not quantized"))
        elif site.name in keep:
            bits = keep[site.name]
            reason = "kept float by the recipe" if bits == FLOAT_BITS else ""
            entries.append(SitePlan(site, bits, bits, False, reason))
        else:
            split = site.split if split_skip else ()
            entries.append(SitePlan(site, budget.weight_bits, budget.activation_bits, True, split=split))
    plan = Plan(tuple(entries), budget)
    if not plan.budgeted:
        raise RecipeError(
            "no site is left for the budget", where="keep", next_step="remove a keep rule that matches everything"
        )
    return plan


def mean_weight_bits(bit_map: BitMap, sites: Sequence[Site]) -> float:
    """Parameter-weighted mean bits of the weights of ``sites``."""
    bits = sum(float(bit_map.weight_bits[site.name].double().mean()) * site.weight_count for site in sites)
    return bits / sum(site.weight_count for site in sites)
