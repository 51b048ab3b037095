"""Integer products through torch's oneDNN operators.

The operators are private to torch. So they are looked for, not assumed; and every layer built on them is compared with
the reference before it is used (``quantlab/packing/backends/verify.py``), never trusted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab.packing.backends.integers import INT8_MAX, ConvGeometry, IntegerPart, NotExecutable

_OPERATORS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")
# No fused output quantization and no fused activation.
_FLOAT_OUTPUT = (1.0, 0, torch.float32, "none", [], "")


def missing_operators() -> str:
    """What of oneDNN this torch lacks, "" when nothing."""
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN"
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.onednn, name)]
    return f"this torch has no {', '.join(missing)}" if missing else ""


@dataclass(frozen=True)
class OneDnnProduct:
    """s_x s_w (q_x - z_x)(q_w - z_w) + b of one part of a layer, with the int8 weights in oneDNN's own layout.

    Attributes:
        packed: the weights; several where q_w - z_w leaves int8, which they add up to.
        scale: of the weight, float32 [out].
        bias: float32 [out], or None.
        geometry: of a convolution; None for a linear layer.
    """

    packed: tuple[Any, ...]
    scale: Tensor
    bias: Tensor | None
    geometry: ConvGeometry | None

    @functools.cached_property
    def _zero_points(self) -> Tensor:
        """Of the int8 weights, which have none."""
        return torch.zeros(len(self.scale), dtype=torch.int32)

    @classmethod
    def of(cls, part: IntegerPart, bias: Tensor | None, geometry: ConvGeometry | None) -> OneDnnProduct:
        """The product of a part.

        Raises:
            NotExecutable: oneDNN refuses the weight, or its result is undefined: where a whole window of the kernel
                lies in the padding, its sum is what the memory held before.
        """
        if geometry is not None and _has_empty_window(geometry, part.weight.shape[2:]):
            raise NotExecutable("a window of its kernel sees nothing but padding, of which oneDNN makes no 0")
        try:
            packed = tuple(_pack(piece, part.scale, geometry) for piece in int8_pieces(part.weight))
        except RuntimeError as error:
            raise NotExecutable(f"oneDNN cannot pack its weight: {_reason(error)}") from error
        return cls(packed, part.scale, bias, geometry)

    def __call__(self, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        """Float32 [..., out] of uint8 codes [..., in], or [B, out, H', W'], channels last, of [B, in, H, W]."""
        first, *rest = self.packed
        output = self._product(codes, scale, zero_point, first, self.bias)
        for packed in rest:
            output += self._product(codes, scale, zero_point, packed, None)
        return output

    def held_bytes(self) -> int:
        """Bytes of weights as oneDNN was given them, scales and bias; its layout may pad channels."""
        weights = sum(packed.numel() for packed in self.packed)
        return weights + 4 * (2 if self.bias is not None else 1) * len(self.scale)

    def _product(self, codes: Tensor, scale: float, zero_point: int, packed: Tensor, bias: Tensor | None) -> Tensor:
        operands = (scale, zero_point, packed, self.scale, self._zero_points, bias)
        if self.geometry is None:
            rows = codes.reshape(-1, codes.shape[-1])
            output = torch.ops.onednn.qlinear_pointwise(rows, *operands, *_FLOAT_OUTPUT)
            return output.view(*codes.shape[:-1], -1)
        return torch.ops.onednn.qconv2d_pointwise(
            codes.contiguous(memory_format=torch.channels_last), *operands, *_places(self.geometry), *_FLOAT_OUTPUT
        )


def int8_pieces(weight: Tensor) -> list[Tensor]:
    """int8 tensors that add up to an int16 weight: one where it fits, seldom more than two.

    An 8-bit weight leaves int8 unless its zero point is 128. All pieces of an element have its sign, so that adding
    their products cancels nothing, and each has int32 accumulators of its own.
    """
    pieces: list[Tensor] = []
    while True:
        low, high = (int(end) for end in weight.aminmax())
        if low >= -INT8_MAX - 1 and high <= INT8_MAX:
            return [*pieces, weight.to(torch.int8)]
        piece = weight.clamp(-INT8_MAX - 1, INT8_MAX)
        pieces.append(piece.to(torch.int8))
        weight = weight - piece


def _pack(weight: Tensor, scale: Tensor, geometry: ConvGeometry | None) -> Tensor:
    # Contiguous [out, in]: of a transposed view the operator reads the memory, not the strides.
    weight = weight.contiguous()
    if geometry is None:
        return torch.ops.onednn.qlinear_prepack(weight, None)
    # Input scale and zero point are given again at every call; those of packing do not bind.
    return torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 1, *_places(geometry), None)


def _places(geometry: ConvGeometry) -> tuple[list[int], list[int], list[int], int]:
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups


def _has_empty_window(geometry: ConvGeometry, kernel: tuple[int, ...]) -> bool:
    """Whether the padding holds a whole window of the kernel."""
    sides = zip(geometry.padding, geometry.dilation, kernel, strict=True)
    return any(padding > dilation * (size - 1) for padding, dilation, size in sides)


def _reason(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
