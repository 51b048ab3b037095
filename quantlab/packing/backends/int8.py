"""Weights and inputs as int8, for products of int8 by int8 into int32.

Codes of up to 8 bits fill at most 256 consecutive integers, so that some shift takes them into int8; what was shifted
comes back in int32, where nothing is rounded. With input r + shift and weight w = v + residual,

    sum (r + shift)(v + residual) = sum r v + residual sum r + shift sum w.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.packing.backends.integers import INT8_MAX, INT32_MAX, ConvGeometry, IntegerPart, NotExecutable

INT8_MIN = -128


def input_offset(zero_point: int, quant_max: int) -> int:
    """What codes 0 to ``quant_max`` less it are int8: the zero point where that fits, else the nearest that does."""
    return min(max(zero_point, quant_max - INT8_MAX), -INT8_MIN)


@dataclass(frozen=True)
class Int8Weight:
    """The weight of one part of a layer, as a matrix.

    Attributes:
        values: q_w - z_w less the residual, int8 [out, k]; of a convolution k = kernel height, width, input channel.
        residual: int32 [out]; None where it is all 0: only 8-bit channels whose zero point is not 128 have one.
        total: sums of q_w - z_w, int32 [out].
        scale: float32 [out].
        bias: float32 [out], or None.
    """

    values: Tensor
    residual: Tensor | None
    total: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, part: IntegerPart, bias: Tensor | None, geometry: ConvGeometry | None) -> Int8Weight:
        """The matrix of a part.

        Raises:
            NotExecutable: the convolution is grouped, or an accumulator could leave int32.
        """
        if geometry is not None and geometry.groups > 1:
            raise NotExecutable("its convolution is grouped, and patches of all channels are multiplied")
        weight = part.weight if geometry is None else part.weight.permute(0, 2, 3, 1)
        weight = weight.reshape(len(weight), -1).to(torch.int32)
        lowest, highest = weight.amin(1), weight.amax(1)
        residual = torch.zeros_like(lowest).maximum(highest - INT8_MAX).minimum(lowest - INT8_MIN)
        values = weight - residual[:, None]
        # Some tensor cores saturate: no partial sum may leave int32, not even one that a later term brings back.
        bound = -INT8_MIN * int(values.to(torch.int64).abs().sum(1).max())
        if bound > INT32_MAX:
            raise NotExecutable(f"an accumulator of int8 products could reach {bound:.2e}, more than int32 holds")
        total = weight.sum(1, dtype=torch.int32)
        return cls(values.to(torch.int8), residual if residual.any() else None, total, part.scale, bias)

    def corrections(self, rows: Tensor, shift: int) -> Tensor:
        """What is added to the products of int8 rows [n, k] with ``values``: int32, [out] or [n, out]."""
        by_channel = self.total * shift
        if self.residual is None:
            return by_channel
        return by_channel + rows.sum(1, dtype=torch.int32)[:, None] * self.residual

    def to(self, device: torch.device) -> Int8Weight:
        """The same on a device."""
        return Int8Weight(
            self.values.to(device),
            None if self.residual is None else self.residual.to(device),
            self.total.to(device),
            self.scale.to(device),
            None if self.bias is None else self.bias.to(device),
        )

    def without_values(self) -> Int8Weight:
        """The same for a product that holds the values in its own way."""
        return replace(self, values=self.values.new_empty(0))

    def held_bytes(self) -> int:
        """Bytes of everything."""
        return self.values.numel() + 4 * sum(
            len(values) for values in (self.residual, self.total, self.scale, self.bias) if values is not None
        )
