"""Bit allocation: what a policy gets and what it must return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor

    from quantlab.contracts.quant import Observer
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
    def output_error(self, site: str, bits: Tensor, observer: Observer, input_bits: int | None) -> float:
        """Mean squared error of the site's output against the float one.

        Args:
            site: its name.
            bits: int8 [out] bits of every output channel.
            observer: how the scales of the weights are found.
            input_bits: bits of a per-tensor input quantizer found with MSE, or None for float inputs.
        """


@dataclass(frozen=True)
class AllocationProblem:
    """What a policy is asked to solve.

    Attributes:
        sites: the sites that may be allocated, in the graph's order.
        data: measured facts about them.
        budget: what they may cost.
        given: bits so far, of every site; a policy returns it with the bits of ``sites`` changed.
        rng: the only source of randomness a policy may use.
    """

    sites: Sequence[Site]
    data: SiteData
    budget: Budget
    given: BitMap
    rng: torch.Generator


class BitPolicy(ABC):
    """Decides the bits of every output channel.

    A policy is built from its validated ``Config`` and must be deterministic under ``problem.rng``.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    @abstractmethod
    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Return the bit map within the budget, keeping what is ``given`` for sites not in ``problem.sites``."""
