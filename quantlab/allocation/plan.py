"""Which sites are quantized, and with what bits before any policy has spoken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.sections import Attention, Budget, Embeddings, Products
from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.errors import ModelError, RecipeError
from quantlab.graph.uncovered import Uncovered

_LAYERS = (SiteKind.CONV, SiteKind.CONV_TRANSPOSE, SiteKind.LINEAR)
"""What budgets are about."""


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
        slot_bits: bits of single inputs where they differ from ``activation_bits``, by slot.
    """

    site: Site
    weight_bits: int
    activation_bits: int
    budgeted: bool
    reason: str = ""
    split: tuple[int, ...] = ()
    slot_bits: Mapping[str, int] = field(default_factory=dict)

    def bits_of(self, slot: Slot) -> int:
        """Nominal bits of an input."""
        return self.slot_bits.get(slot.name, self.activation_bits)

    @property
    def quantized(self) -> bool:
        """Whether anything of it leaves floating point."""
        return self.weight_bits != FLOAT_BITS or self.activation_bits != FLOAT_BITS


@dataclass(frozen=True)
class Plan:
    """The intent for every site, in the graph's order.

    Attributes:
        sites: of the graph; products outside attention and embeddings only where the recipe has them quantized.
        budget: of the sites that policies may allocate.
        uncovered: all other multiply-accumulates, which stay float.
    """

    sites: tuple[SitePlan, ...]
    budget: Budget
    uncovered: tuple[Uncovered, ...] = ()

    @property
    def quantized(self) -> tuple[SitePlan, ...]:
        """The sites that leave floating point."""
        return tuple(entry for entry in self.sites if entry.quantized)

    @property
    def layers(self) -> tuple[SitePlan, ...]:
        """Of them, the layers: those with a weight."""
        return tuple(entry for entry in self.quantized if entry.site.weight_shape is not None)

    @property
    def products(self) -> tuple[SitePlan, ...]:
        """Of them, the products of activations, attentions included."""
        return tuple(entry for entry in self.quantized if entry.site.weight_shape is None)

    @property
    def budgeted(self) -> tuple[Site, ...]:
        """The sites that policies may allocate."""
        return tuple(entry.site for entry in self.sites if entry.budgeted)

    def nominal(self) -> BitMap:
        """The bit map before any policy: every channel of a site alike."""
        return BitMap(
            {e.site.name: torch.full((e.site.out_channels,), e.weight_bits, dtype=torch.int8) for e in self.sites},
            {(e.site.name, slot.name): e.bits_of(slot) for e in self.sites for slot in e.site.slots},
        )


def planned_sites(sites: Sequence[Site], products: Products | None, embeddings: Embeddings | None) -> tuple[Site, ...]:
    """The sites that a plan is about: products outside attention and embeddings only where they are asked for."""
    unasked = {SiteKind.MATMUL: products is None, SiteKind.EMBEDDING: embeddings is None}
    return tuple(site for site in sites if not unasked.get(site.kind, False))


def make_plan(
    sites: Sequence[Site],
    keep: Mapping[str, int],
    budget: Budget,
    *,
    split_skip: bool = False,
    attention: Attention | None = None,
    products: Products | None = None,
    embeddings: Embeddings | None = None,
    uncovered: Sequence[Uncovered] = (),
) -> Plan:
    """Give every site its nominal bits.

    Args:
        sites: of the captured graph.
        keep: bits by site name of the sites outside the budget, FLOAT_BITS for float.
        budget: bits of all others.
        split_skip: of them, those fed by a skip concatenation quantize its parts apart.
        attention: bits of attention's products, which no budget is about; they stay float without it.
        products: likewise of products of activations outside fused attention.
        embeddings: likewise of tables.
        uncovered: multiply-accumulates that no site stands for.

    Raises:
        RecipeError: nothing is left to quantize, or what is asked for is not there.
        ModelError: the model has no linear layer or convolution inside it.
    """
    if not any(site.kind in _LAYERS for site in sites):
        raise ModelError(
            "the model has no linear layer or convolution that can be quantized",
            where="capture",
            next_step="if the model is itself one layer, put it into a torch.nn.Sequential",
        )
    _require(SiteKind.ATTENTION, attention, sites, "fused attention; one that is written out has `products`")
    _require(SiteKind.MATMUL, products, sites, "matrix product of two activations outside fused attention")
    _require(SiteKind.EMBEDDING, embeddings, sites, "embedding")
    entries = []
    for site in planned_sites(sites, products, embeddings):
        kept = keep.get(site.name)
        if site.kind is SiteKind.ATTENTION and attention is None:
            entries.append(SitePlan(site, FLOAT_BITS, FLOAT_BITS, False, f"{site.kind} sites are not quantized"))
        elif kept == FLOAT_BITS:
            entries.append(SitePlan(site, FLOAT_BITS, FLOAT_BITS, False, "kept float by the recipe"))
        elif site.kind is SiteKind.ATTENTION and attention is not None:
            entries.append(_attention_plan(site, kept, attention))
        elif site.kind is SiteKind.MATMUL and products is not None:
            entries.append(SitePlan(site, FLOAT_BITS, kept or products.bits, False))
        elif site.kind is SiteKind.EMBEDDING and embeddings is not None:
            entries.append(SitePlan(site, kept or embeddings.bits, FLOAT_BITS, False))
        elif kept is not None:
            entries.append(SitePlan(site, kept, kept, False))
        else:
            split = site.split if split_skip else ()
            entries.append(SitePlan(site, budget.weight_bits, budget.activation_bits, True, split=split))
    unasked = [site for site in sites if site.kind is SiteKind.MATMUL and products is None]
    left = [Uncovered(site.name, str(site.kind), site.macs, "the recipe has no `products`") for site in unasked]
    plan = Plan(tuple(entries), budget, (*left, *uncovered))
    if not plan.budgeted:
        raise RecipeError(
            "no site is left for the budget", where="keep", next_step="remove a keep rule that matches everything"
        )
    return plan


def _require(kind: SiteKind, asked: object, sites: Sequence[Site], what: str) -> None:
    """Raise RecipeError where a key is about sites that the model has not."""
    if asked is not None and not any(site.kind is kind for site in sites):
        key = {SiteKind.ATTENTION: "attention", SiteKind.MATMUL: "products", SiteKind.EMBEDDING: "embeddings"}[kind]
        raise RecipeError(f"the model has no {what}", where=key, next_step="leave the key out")


def _attention_plan(site: Site, kept: int | None, attention: Attention) -> SitePlan:
    """The intent for an attention; a ``keep`` rule about it has the last word."""
    shapes = {slot.name: slot.shape for slot in site.slots}
    if len(site.slots) != len(shapes):
        return SitePlan(site, FLOAT_BITS, FLOAT_BITS, False, "attention called more than once in a forward")
    probabilities = Slot("probabilities", (*shapes["query"][:-1], shapes["key"][-2]))
    site = replace(site, slots=(*site.slots, probabilities))
    bits, probability_bits = (attention.bits, attention.probability_bits) if kept is None else (kept, kept)
    return SitePlan(site, FLOAT_BITS, bits, False, slot_bits={probabilities.name: probability_bits})


def mean_weight_bits(bit_map: BitMap, sites: Sequence[Site]) -> float:
    """Parameter-weighted mean bits of the weights of ``sites``."""
    bits = sum(float(bit_map.weight_bits[site.name].double().mean()) * site.weight_count for site in sites)
    return bits / sum(site.weight_count for site in sites)
