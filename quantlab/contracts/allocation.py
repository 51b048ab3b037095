"""Bit allocation: what a policy gets and what it must return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor

    from quantlab.contracts.quant import Observer
    from quantlab.contracts.scores import ScoreRequest
    from quantlab.contracts.sections import Budget
    from quantlab.contracts.site import Site

FLOAT_BITS = 32
"""The entry of a bit map for a channel or slot that stays in floating point."""


@dataclass(frozen=True)
class BitMap:
    """The one bit-width type, from policy to report.

    Attributes:
        weight_bits: site name -> int8 [out], any mix of 1 to 8 inside one site, or FLOAT_BITS throughout.
        activation_bits: (site name, slot name) -> bits, or FLOAT_BITS.
    """

    weight_bits: Mapping[str, Tensor]
    activation_bits: Mapping[tuple[str, str], int]


class SiteData(ABC):
    """Measured facts about the sites, computed when asked for."""

    @abstractmethod
    def weight(self, site: str) -> Tensor:
        """The float weight [out, in / groups, *k], with smoothing scales applied."""

    @abstractmethod
    def inputs(self, site: str) -> Iterator[Tensor]:
        """Calibration inputs [B, in, ...] in order, with smoothing scales applied."""

    @abstractmethod
    def absmax(self, site: str) -> Tensor:
        """Largest magnitude of each input channel [in], before smoothing."""

    @abstractmethod
    def quantized_weight(self, site: str, bits: Tensor, observer: Observer) -> Tensor:
        """The smoothed weight after affine quantization with int8 [out] bits: the shape of ``weight``."""

    @abstractmethod
    def input_second_moment(self, site: str) -> Tensor:
        """E[x^2] of what each weight of a channel multiplies, float64 [groups, in / groups * prod(k)], smoothed.

        The mean is over samples and output positions; the columns are those of ``weight(site).flatten(1)``.
        """

    @abstractmethod
    def input_gram(self, site: str) -> Tensor:
        """E[x x^T] of the same, float64 [groups, n, n] with n = in / groups * prod(k)."""

    @abstractmethod
    def score(self, request: ScoreRequest) -> Mapping[str, Tensor]:
        """A score that the policy declared in ``scores``: site -> float64 [len(widths)].

        Raises:
            PluginError: it was not declared.
        """

    @abstractmethod
    def output_error(self, site: str, bits: Tensor, observer: Observer, input_bits: int | None) -> float:
        """Mean squared error of the site's output against the float one.

        Args:
            site: its name.
            bits: int8 [out] bits of every output channel.
            observer: how the scales of the weights are found.
            input_bits: bits of a per-tensor input quantizer found with MSE, or None for float inputs.
        """

    def best_bits(self, site: str, candidates: Sequence[Tensor], observer: Observer, input_bits: int | None) -> int:
        """Index of the candidate bits, int8 [out] each, with the least ``output_error``; the first of equals."""
        best, best_error = 0, math.inf
        for index, bits in enumerate(candidates):
            error = self.output_error(site, bits, observer, input_bits)
            if error < best_error:
                best, best_error = index, error
        return best


class Resource(StrEnum):
    """What bits cost, named as the budget's keys."""

    WEIGHT_BITS = "weight_bits"
    """Bits of all weights together."""
    SIZE = "size_mb"
    """Bytes."""
    BIT_OPERATIONS = "bit_operations"
    """Bits of the weight times bits of the input times multiply-accumulates, at batch 1."""
    ACTIVATION_MEMORY = "activation_memory_mb"
    """Bytes of quantized inputs at batch 1."""


@dataclass(frozen=True)
class AllocationProblem:
    """What a policy is asked to solve.

    Attributes:
        sites: the sites that may be allocated, in the graph's order.
        data: measured facts about them.
        budget: what they may cost.
        given: bits so far, of every site; a policy returns it with the bits of ``sites`` changed.
        rng: the only source of randomness a policy may use.
        limits: what the bits of ``sites`` may cost together, of the resources that the budget limits besides the mean
            bits of weights; whatever does not depend on these bits is taken off already.
    """

    sites: Sequence[Site]
    data: SiteData
    budget: Budget
    given: BitMap
    rng: torch.Generator
    limits: Mapping[Resource, float] = field(default_factory=dict[Resource, float])


class BitPolicy(ABC):
    """Decides the bits of every output channel.

    A policy is built from its validated ``Config`` and must be deterministic under ``problem.rng``.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    mixes: ClassVar[bool] = False
    """Whether channels of one site may get different bits."""
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    def between_sites(self) -> bool:
        """Whether it weighs sites against one another, and so must see all of them at once."""
        return False

    def scores(self, budget: Budget) -> Sequence[ScoreRequest]:
        """The scores that ``allocate`` will ask for; the engine computes and keeps them."""
        return ()

    def lowest_bits(self, budget: Budget) -> tuple[int, int]:
        """The lowest bits of weights and of inputs that it may give a whole site: what the least plan costs."""
        return budget.weight_bits, budget.activation_bits

    @abstractmethod
    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Return the bit map within the budget, keeping what is ``given`` for sites not in ``problem.sites``."""
