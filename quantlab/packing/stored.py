"""A weight as packed codes, unpacked when it is needed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from quantlab.contracts.quant import QParams
from quantlab.packing.bitpack import unpack_channels
from quantlab.quant.grid import WeightGrid


class PackedWeight(nn.Module):
    """A quantized weight [out, in / groups, *k] in its own bits.

    Attributes:
        packed: codes, as ``pack_channels`` writes them.
        bits: int8 [out].
        scale: of the weight's grid, float32 [out], or [parts, out] of a split weight.
        zero_point: likewise, in a small integer type.
    """

    packed: Tensor
    bits: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        packed: Tensor,
        bits: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        split: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.split = shape, dtype, split
        for name, value in (("packed", packed), ("bits", bits), ("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, value, persistent=False)

    def codes(self) -> Tensor:
        """uint8, the shape of the weight."""
        return unpack_channels(self.packed, self.bits, self.shape[1:].numel()).view(self.shape)

    def qparams(self) -> QParams:
        """The grid of the weight."""
        quant_max = 2 ** self.bits.to(torch.int64) - 1
        return QParams(self.scale, self.zero_point.to(self.scale), 0, quant_max, 0, split=self.split)

    def forward(self) -> Tensor:
        """The weight that the simulation computes with, to the bit."""
        return dequantize(self.codes(), self.qparams(), self.dtype)


def dequantize(codes: Tensor, parameters: QParams, dtype: torch.dtype) -> Tensor:
    """scale * (q - zero_point) in the very steps of ``fake_quantize``; codes [out, in / groups, *k]."""
    grid = WeightGrid.of(parameters, codes.dim())
    return cast(Tensor, codes.to(grid.scale.dtype).sub_(grid.zero_point).mul_(grid.scale).to(dtype))


def encode(weight: Tensor, parameters: QParams) -> Tensor:
    """The codes, uint8, that ``fake_quantize`` rounds a float weight [out, in / groups, *k] to."""
    grid = WeightGrid.of(parameters, weight.dim())
    ratio = weight.to(torch.promote_types(weight.dtype, grid.scale.dtype)) / grid.scale
    codes = torch.round(ratio).add_(grid.zero_point).clamp_(torch.zeros_like(grid.quant_max), grid.quant_max)
    return codes.to(torch.uint8)
