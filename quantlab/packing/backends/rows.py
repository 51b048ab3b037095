"""A layer as a product of matrices: codes to rows of int8, a convolution through its patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.packing.backends.int8 import INT8_MIN, Int8Weight, input_offset
from quantlab.packing.backends.integers import INT8_MAX, ConvGeometry, IntegerPart, NotExecutable

_ROW_COUNTS = (16, 64, 128)
"""Rows for which kernels of their own are likely."""
_ROUNDINGS = 2.5e-7
"""Relative; two float32 epilogues that round in another order."""


class MatrixProduct(Protocol):
    """The product with one weight matrix."""

    def __call__(self, rows: Tensor, scale: float, shift: int) -> Tensor:
        """Float [n, out] of int8 rows [n, k]: s_x s_w (rows + shift)(q_w - z_w) + b, ``scale`` that of the input."""
        ...

    def held_bytes(self) -> int:
        """Bytes of weights, scales and bias."""
        ...


@dataclass(frozen=True)
class RowsProduct:
    """A layer's product through a product of matrices.

    Attributes:
        matrix: the product.
        quant_max: largest code of the input.
        geometry: of a convolution; None for a linear layer.
        kernel: height and width of a convolution's kernel; () for a linear layer.
    """

    matrix: MatrixProduct
    quant_max: int
    geometry: ConvGeometry | None
    kernel: tuple[int, ...]

    @classmethod
    def of(
        cls,
        part: IntegerPart,
        bias: Tensor | None,
        geometry: ConvGeometry | None,
        device: torch.device,
        matrix: Callable[[Int8Weight], MatrixProduct],
    ) -> RowsProduct:
        """The product of one part of a layer.

        Args:
            part: its integers.
            bias: float32 [out], or None.
            geometry: of a convolution.
            device: where it is computed.
            matrix: makes the product of a weight on that device.

        Raises:
            NotExecutable: the convolution is grouped, an accumulator could leave int32, a padded border would need a
                code beyond int8, the operator refuses it, or its numbers depend on how many rows there are.
        """
        grid = part.grid
        for zero_point in grid.zero_point.unique().tolist() if geometry is not None and any(geometry.padding) else []:
            if not INT8_MIN <= zero_point - input_offset(zero_point, grid.quant_max) <= INT8_MAX:
                raise NotExecutable(f"its padded border would need the code {zero_point}, and int8 has none for it")
        weight = Int8Weight.of(part, bias, geometry).to(device)
        product = matrix(weight)
        if device.type != "cpu":
            _require_agreement(product, weight.values.shape[1], device)
        return cls(product, grid.quant_max, geometry, tuple(part.weight.shape[2:]))

    def __call__(self, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        """[..., out] of uint8 codes [..., in], or [B, out, H', W'], channels last in memory, of [B, in, H, W]."""
        offset = input_offset(zero_point, self.quant_max)
        # Bytes wrap around, so that one subtraction is right for offsets of either sign.
        shifted = codes.sub(offset % 256).view(torch.int8)
        if self.geometry is None:
            output = self.matrix(shifted.reshape(-1, shifted.shape[-1]), scale, offset - zero_point)
            return output.view(*shifted.shape[:-1], -1)
        taken = patches(shifted, self.geometry, self.kernel, zero_point - offset)
        output = self.matrix(taken.flatten(0, 2), scale, offset - zero_point)
        return output.view(*taken.shape[:3], -1).permute(0, 3, 1, 2)

    def held_bytes(self) -> int:
        """Bytes of weights, scales and bias."""
        return self.matrix.held_bytes()


def agrees_for_any_rows(matrix: MatrixProduct, columns: int, device: torch.device) -> bool:
    """Whether few rows at a time give the numbers of many: a GPU has kernels of their own for both.

    Layers are compared with their simulation on few rows, so this is what extends it to many.
    """
    rng = torch.Generator().manual_seed(0)
    shape = max(_ROW_COUNTS), columns
    rows = torch.randint(INT8_MIN, INT8_MAX + 1, shape, dtype=torch.int8, generator=rng).to(device)
    few, *others = (torch.cat([matrix(part, 1.0, 0) for part in rows.split(count)]) for count in _ROW_COUNTS)
    allowed = _ROUNDINGS * few.abs().max()
    return all(bool((other - few).abs().max() <= allowed) for other in others)


def _require_agreement(matrix: MatrixProduct, columns: int, device: torch.device) -> None:
    try:
        agrees = agrees_for_any_rows(matrix, columns, device)
    except RuntimeError as error:
        raise NotExecutable(f"the operator refuses it: {str(error).splitlines()[0]}") from error
    if not agrees:
        raise NotExecutable("its kernels for few and for many rows give other numbers")


def patches(x: Tensor, geometry: ConvGeometry, kernel: tuple[int, ...], border: int) -> Tensor:
    """What each output position sees, [B, H', W', kernel height x width x channels], of x [B, C, H, W] of any dtype.

    Args:
        x: the input.
        geometry: of a convolution of one group.
        kernel: height and width.
        border: value of the padding.
    """
    (vertical, horizontal), (stride_y, stride_x), (dilation_y, dilation_x) = (
        geometry.padding,
        geometry.stride,
        geometry.dilation,
    )
    # Channels last, so that a patch is made of runs of channels.
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical), value=border)
    height = (padded.shape[1] - dilation_y * (kernel[0] - 1) - 1) // stride_y + 1
    width = (padded.shape[2] - dilation_x * (kernel[1] - 1) - 1) // stride_x + 1
    taps = [
        padded[:, y * dilation_y :: stride_y, x * dilation_x :: stride_x][:, :height, :width]
        for y in range(kernel[0])
        for x in range(kernel[1])
    ]
    return torch.cat(taps, -1)
