"""The words of quantization: granularity, observers, what a quantizer is asked for and what it stores.

Everywhere x_hat = scale * (q - zero_point), with q an integer in [quant_min, quant_max].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Observer(StrEnum):
    """How the range of a tensor is found."""

    MIN_MAX = "min_max"
    """The full range, widened to hold 0."""
    SCALED_MIN_MAX = "scaled_min_max"
    """The full range times (bits + 2) / 8."""
    MSE = "mse"
    """The best of 80 shrunken ranges by mean |x - x_hat|^2.4."""
    PERCENTILE = "percentile"
    """From the (100 - p)-th to the p-th percentile, widened to hold 0; p is an option of the quantizer."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale []."""


@dataclass(frozen=True)
class PerChannel:
    """One scale a slice of ``axis``: a weight [out, in, *k] with axis 0 has scale [out]."""

    axis: int = 0


Granularity = PerTensor | PerChannel


@dataclass(frozen=True)
class QuantSpec:
    """What a recipe asks of a quantizer.

    Attributes:
        granularity: how many scales.
        observer: how the range is found.
        per_timestep: one scale for each calibrated timestep, looked up from the timestep input for each sample.
        share_start: every timestep starts from one range found over all of them, to be told apart by tuning.
        round_zero_point: zero points are rounded, with a straight-through gradient; otherwise they are free floats.
    """

    granularity: Granularity
    observer: Observer = Observer.MSE
    per_timestep: bool = False
    share_start: bool = False
    round_zero_point: bool = True


@dataclass(frozen=True)
class QParams:
    """What a quantizer stores.

    Attributes:
        scale: [] per tensor, [out] per channel, [T] per stored timestep; of a split tensor one for each part before.
        zero_point: the same shape.
        quant_min: smallest code, an int or int tensor [out].
        quant_max: largest code, likewise.
        axis: the channel axis, or None.
        timesteps: the calibrated timesteps [T] of a per-timestep table, or None.
        round_zero_point: the zero points are integers; otherwise they are free floats.
        split: sizes of the parts that have scales of their own; () for a tensor in one piece.
        scale_bytes: of one scale in a file; the scales are values that so many bytes hold.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int | Tensor
    quant_max: int | Tensor
    axis: int | None = None
    timesteps: Tensor | None = None
    round_zero_point: bool = True
    split: tuple[int, ...] = ()
    scale_bytes: int = 4
