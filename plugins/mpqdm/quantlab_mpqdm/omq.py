"""Outlier-driven mixed quantization: inside a layer, channels with outliers get the bits of those without.

Feng et al., MPQ-DM, AAAI 2025, arXiv 2412.11549, section "Outlier-Driven Mixed Quantization".
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from quantlab import AllocationProblem, BitMap, BitPolicy, Observer, RecipeError, Site, Strict
from quantlab_mpqdm.kurtosis import kurtosis


class Ranking(StrEnum):
    """Which channels come first; all but the kurtosis are controls."""

    KURTOSIS = "kurtosis"
    RANDOM = "random"
    HEAD = "head"
    """The first channels of the layer."""
    TAIL = "tail"
    """The last channels of the layer."""


class KurtosisConfig(Strict):
    """Options of the ``kurtosis`` policy; the defaults are the paper's."""

    offsets: tuple[int, int, int] = Field(default=(-1, 0, 1), description="bits that the three groups get, relative")
    groups: int = Field(default=5, ge=0, description="largest number of tenths moved up and down; released code: 1")
    search_observer: Observer = Field(default=Observer.MSE, description="scales in the search; released: min_max")
    quantize_inputs: bool = Field(default=True, description="search with quantized inputs; released: false")
    small_layers: bool = Field(
        default=True, description="layers of fewer than ten channels are searched channel by channel; released: false"
    )
    ranking: Ranking = Field(default=Ranking.KURTOSIS, description="order of the channels")
    force: int | None = Field(default=None, ge=0, description="move this many tenths without a search")

    @field_validator("offsets")
    @classmethod
    def _keep_the_mean(cls, offsets: tuple[int, int, int]) -> tuple[int, int, int]:
        low, middle, high = offsets
        if middle != 0 or low + high != 0 or high <= 0:
            raise ValueError("offsets must be [-k, 0, k], so that the mean bits stay")
        return offsets


class KurtosisPolicy(BitPolicy):
    """Channels with heavy tails get a bit more, as many light-tailed ones a bit less, where the output gains by it."""

    name: ClassVar[str] = "kurtosis"
    paper: ClassVar[str | None] = "MPQ-DM, AAAI 2025, arXiv 2412.11549"
    version: ClassVar[int] = 2
    mixes: ClassVar[bool] = True
    Config = KurtosisConfig

    def __init__(self, config: KurtosisConfig) -> None:
        self.config = config

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Split every site around the bits it is given; ties keep the smaller split.

        A site that another policy gave bits without room for the offsets keeps them.

        Raises:
            RecipeError: the budget's own bits leave no room.
        """
        bits = dict(problem.given.weight_bits)
        for site in problem.sites:
            order = self.ranked(problem.data.weight(site.name), problem.rng)
            split = self._split(problem, site, order)
            bits[site.name] = self._extra(self._bits(site, bits[site.name], order, split), order, split, problem)
        return BitMap(bits, problem.given.activation_bits)

    def ranked(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Channels of a weight [out, in, *k] from the one that deserves bits most to the one that does least.

        One stable sort, so that channels with equal kurtosis keep their order and none is in two groups.
        """
        channels = weight.shape[0]
        match self.config.ranking:
            case Ranking.KURTOSIS:
                return torch.argsort(kurtosis(weight.flatten(1)), descending=True, stable=True)
            case Ranking.RANDOM:
                return torch.randperm(channels, generator=rng)
            case Ranking.HEAD:
                return torch.arange(channels)
            case Ranking.TAIL:
                return torch.arange(channels - 1, -1, -1)

    def candidates(self, channels: int) -> list[int]:
        """How many channels may move up, and as many down: multiples of a tenth, at most half of them."""
        tenth = channels // 10
        if tenth == 0:
            if not self.config.small_layers:
                return [0]
            tenth = 1
        return [count for step in range(self.config.groups + 1) if (count := step * tenth) <= channels // 2]

    def _split(self, problem: AllocationProblem, site: Site, order: Tensor) -> int:
        """The number of channels to move whose output error is smallest."""
        given = problem.given.weight_bits[site.name]
        if not self._has_room(given) and not (given == problem.budget.weight_bits).all():
            return 0
        if self.config.force is not None:
            return min(self.config.force * max(1, site.out_channels // 10), site.out_channels // 2)
        input_bits = (
            problem.given.activation_bits[site.name, site.slots[0].name] if self.config.quantize_inputs else None
        )
        counts = self.candidates(site.out_channels)
        bits = [self._bits(site, given, order, count) for count in counts]
        return counts[problem.data.best_bits(site.name, bits, self.config.search_observer, input_bits)]

    def _has_room(self, given: Tensor) -> bool:
        low, _, high = self.config.offsets
        return bool(given.min() + low >= 1 and given.max() + high <= 8)

    def _bits(self, site: Site, given: Tensor, order: Tensor, count: int) -> Tensor:
        """The given bits with ``count`` channels moved up and as many down."""
        low, _, high = self.config.offsets
        if count and not self._has_room(given):
            raise RecipeError(
                "the bits leave no room for mixing",
                where=f'policy "kurtosis", site {site.name}',
                got=sorted(set(given.tolist())),
                allowed=f"{1 - low} to {8 - high} bits",
                next_step="raise budget.weight_bits, or drop the policy from `allocate`",
            )
        bits = given.clone()
        bits[order[:count]] += high
        bits[order[len(order) - count :]] += low
        return bits

    def _extra(self, bits: Tensor, order: Tensor, split: int, problem: AllocationProblem) -> Tensor:
        """MPQ-DM+: the next channels in the order get one more bit, as many as the budget grants and at least one.

        The paper does not say which; the next-highest kurtosis is the natural reading.
        """
        fraction = problem.budget.extra_bit_fraction
        count = max(1, int(fraction * len(order))) if fraction else 0
        chosen = order[split : split + count]
        more = bits.clone()
        more[chosen] = (more[chosen] + 1).clamp(max=8)
        return more
