"""Which integer type of ONNX holds a grid exactly: codes and zero points move together, so that none is negative."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from quantlab.errors import PackError


class OnnxInteger(StrEnum):
    """Unsigned integer types of QuantizeLinear and DequantizeLinear, opset 21, the smallest first."""

    UINT4 = "uint4"
    UINT8 = "uint8"
    UINT16 = "uint16"

    @property
    def largest(self) -> int:
        """The largest value."""
        return {OnnxInteger.UINT4: 15, OnnxInteger.UINT8: 255, OnnxInteger.UINT16: 65535}[self]

    @property
    def torch_type(self) -> torch.dtype:
        """The smallest type of torch that holds the values."""
        return torch.uint16 if self is OnnxInteger.UINT16 else torch.uint8


@dataclass(frozen=True)
class OnnxGrid:
    """Integers of a grid, moved so that codes and zero points are not negative.

    Attributes:
        kind: the smallest type for all of them.
        shift: what is added to codes and zero points, in the shape of the zero points.
        zero_point: the moved zero points.
    """

    kind: OnnxInteger
    shift: Tensor
    zero_point: Tensor


def onnx_grid(largest: Tensor, zero_point: Tensor, smallest: OnnxInteger, site: str) -> OnnxGrid:
    """The grid of codes 0 to ``largest`` around ``zero_point`` in integers of ONNX; scale * (q - zero_point) stays.

    Args:
        largest: the largest codes, an integer tensor that broadcasts with the zero points.
        zero_point: integers.
        smallest: the smallest type allowed.
        site: for the message.

    Raises:
        PackError: a zero point is too far from the codes for any type.
    """
    zero_point = zero_point.to(torch.int64)
    shift = (-zero_point).clamp(min=0)
    moved = zero_point + shift
    top = int(torch.maximum(moved, largest + shift).max())
    kinds = [kind for kind in OnnxInteger if kind.largest >= max(top, smallest.largest)]
    if not kinds:
        raise PackError(
            "a zero point is too far from its codes for the integers of ONNX",
            where=site,
            got=int(zero_point[zero_point.abs() == zero_point.abs().max()].flatten()[0]),
            allowed=f"codes and zero points within a span of {OnnxInteger.UINT16.largest}",
            next_step="calibrate the site again; its range does not hold 0 nearly",
        )
    return OnnxGrid(kinds[0], shift, moved)
