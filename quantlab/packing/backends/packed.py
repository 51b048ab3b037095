"""Products whose weights stay packed in their own bits, and are unpacked whenever they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.packing.backends.integers import ConvGeometry, IntegerPart
from quantlab.packing.backends.layers import Product
from quantlab.packing.bitpack import pack_channels, unpack_channels

MakeProduct = Callable[[IntegerPart, Tensor | None, ConvGeometry | None], Product]


@dataclass(frozen=True)
class PackedProduct:
    """The product of one part of a layer, made anew from packed codes at every call: the same to the bit.

    Attributes:
        packed: codes, as ``pack_channels`` writes them.
        part: what the product is of; its weight has no memory, only the shape.
        bias: float32 [out], or None.
        geometry: of a convolution; None for a linear layer.
        make: makes the product that runs.
    """

    packed: Tensor
    part: IntegerPart
    bias: Tensor | None
    geometry: ConvGeometry | None
    make: MakeProduct

    @classmethod
    def of(
        cls, make: MakeProduct, part: IntegerPart, bias: Tensor | None, geometry: ConvGeometry | None
    ) -> PackedProduct:
        """The product of a part, which ``make`` makes where it runs unpacked."""
        codes = (part.weight.flatten(1) + part.zero_point[:, None]).to(torch.uint8)
        shape_alone = torch.zeros((), dtype=torch.int16).expand(part.weight.shape)
        return cls(pack_channels(codes, part.bits), replace(part, weight=shape_alone), bias, geometry, make)

    def __call__(self, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        """Unpack, multiply, and let go."""
        part = self.part
        found = unpack_channels(self.packed, part.bits, part.weight.shape[1:].numel())
        weight = found.to(torch.int16).sub_(part.zero_point.to(torch.int16)[:, None]).view(part.weight.shape)
        return self.make(replace(part, weight=weight), self.bias, self.geometry)(codes, scale, zero_point)

    def held_bytes(self) -> int:
        """Bytes of packed codes, widths, zero points, scales and bias."""
        channels = len(self.part.scale)
        return len(self.packed) + channels * (1 + 4 + 4 + (0 if self.bias is None else 4))
