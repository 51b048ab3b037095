"""The integers inside a quantized layer: y = s_x s_w (q_x - z_x)(q_w - z_w) + b.

``integers_of`` reads them out of a layer and proves that they are what the layer simulates; where they are not, it says
why. Everything after it knows integers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from quantlab.contracts.quant import QParams
from quantlab.contracts.quantizer import Quantizer
from quantlab.packing.stored import PackedWeight
from quantlab.quant.grid import WeightGrid
from quantlab.quant.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from quantlab.quant.split import SplitQuantizer
from quantlab.quant.timestep import nearest_index

INT32_MAX = 2**31 - 1
UINT8_MAX = 255
INT8_MAX = 127
MAX_PIECES = 3
"""Most int8 numbers that a weight is written as the sum of; 8-bit codes whose zero point is 0 need three."""


class NotExecutable(Exception):
    """A layer has no exact integer form here; the text says why. It ends in a dispatch table, never before a user."""


Rows = tuple[tuple[int, Tensor | None], ...]
"""Rows of a table, each with the samples that it holds for; None for all of them."""
ONE_ROW: Rows = ((0, None),)


@dataclass(frozen=True)
class InputGrid:
    """How an input becomes codes.

    Attributes:
        scale: float32 [T], one for each stored timestep; [1] without timesteps.
        zero_point: int32 [T].
        quant_max: largest code, at most 255.
        timesteps: the stored timesteps, sorted [T], or None.
    """

    scale: Tensor
    zero_point: Tensor
    quant_max: int
    timesteps: Tensor | None = None

    def rows(self, timestep: Tensor | None) -> Rows:
        """The rows of the table that the samples of a batch ask for."""
        if self.timesteps is None:
            return ONE_ROW
        assert timestep is not None, "the engine threads the timestep to every layer"
        index = nearest_index(self.timesteps, timestep.to(self.timesteps.device))
        found = index.unique().tolist()
        if len(found) == 1:
            return ((found[0], None),)
        return tuple((row, (index == row).nonzero()[:, 0]) for row in found)

    def same_as(self, other: InputGrid) -> bool:
        """Whether both give the same codes to every input."""
        steps = self.timesteps, other.timesteps
        same_steps = steps[0] is steps[1] if None in steps else torch.equal(*cast(tuple[Tensor, Tensor], steps))
        return (
            same_steps
            and self.quant_max == other.quant_max
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )

    def index(self, timestep: Tensor | None, samples: int) -> Tensor:
        """Row of the table for each sample, int64 [samples]."""
        if self.timesteps is None:
            return torch.zeros(samples, dtype=torch.int64)
        assert timestep is not None, "the engine threads the timestep to every layer"
        return nearest_index(self.timesteps, timestep.to(self.timesteps.device))


@dataclass(frozen=True)
class IntegerPart:
    """One product of integers: a layer has one, or one for each part of its split input.

    Attributes:
        weight: q - zero_point, int16 [out, in / groups, *k].
        scale: of the weight, float32 [out].
        zero_point: of the weight, int32 [out].
        bits: of the weight's codes q, int8 [out].
        grid: of the input.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    grid: InputGrid

    @property
    def accumulator_bound(self) -> int:
        """No accumulator, and no partial sum of one, gets beyond this in magnitude, zero point corrected or not."""
        largest = int(self.weight.to(torch.int64).abs().flatten(1).sum(1).max())
        return largest * (self.grid.quant_max + int(self.grid.zero_point.abs().max()))


@dataclass(frozen=True)
class ConvGeometry:
    """Where a convolution's kernel goes; zero padding, symmetric."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class IntegerSite:
    """A layer in integers.

    Attributes:
        parts: their products are added.
        bias: float32 [out], or None.
        sizes: input channels of each part.
        geometry: of a convolution; None for a linear layer.
    """

    parts: tuple[IntegerPart, ...]
    bias: Tensor | None
    sizes: tuple[int, ...]
    geometry: ConvGeometry | None


def integers_of(layer: QuantizedLayer) -> IntegerSite:
    """The integers of a layer.

    Raises:
        NotExecutable: an operand is not quantized, its quantizer is no grid of integers with at most 8 bits, its zero
            points are free floats, an accumulator could leave int32, or the layer does not compute in float32.
    """
    if layer.weight.dtype != torch.float32:
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        raise NotExecutable(
            f"it computes in {dtype}, not in float32: what its simulation multiplies is rounded to {dtype}, "
            "and integers are not; quantize in float32"
        )
    if layer.adapter is not None:
        raise NotExecutable("its adapter is not merged into the weight")
    if layer.weight_quantizer is None or layer.input_quantizer is None:
        raise NotExecutable(f"its {'weight' if layer.weight_quantizer is None else 'input'} stays float")
    geometry = _geometry(_with_kernel(layer))
    stored = _stored(layer.weight_quantizer, "weight")
    sizes = _sizes(stored, layer.input_quantizer, layer.weight.shape[1])
    if len(sizes) > 1 and geometry is not None and geometry.groups > 1:
        raise NotExecutable("its input is split and its convolution grouped")
    weight = _weight(layer, stored)
    # [parts, out]; parts of an input that the weight does not tell apart share the weight's scale and zero point.
    scale, zero_point = (
        value.detach().reshape(len(stored.split) or 1, -1).expand(len(sizes), weight.shape[0])
        for value in (stored.scale, stored.zero_point)
    )
    bits = torch.log2(torch.as_tensor(stored.quant_max).double() + 1).round().to(torch.int8).expand(weight.shape[0])
    parts = tuple(
        IntegerPart(
            part,
            scale[position].contiguous(),
            zero_point[position].to(torch.int32),
            bits.clone(),
            input_grid(quantizer),
        )
        for position, (part, quantizer) in enumerate(
            zip(weight.split(sizes, 1), _quantizers(layer.input_quantizer, len(sizes)), strict=True)
        )
    )
    bound = max(part.accumulator_bound for part in parts)
    if bound > INT32_MAX:
        raise NotExecutable(f"an accumulator could reach {bound:.2e}, more than int32 holds")
    return IntegerSite(parts, None if layer.bias is None else layer.bias.detach().clone(), sizes, geometry)


def _with_kernel(layer: QuantizedLayer) -> QuantizedLinear | QuantizedConv2d:
    if not isinstance(layer, QuantizedLinear | QuantizedConv2d):
        kind = type(layer).__name__.removeprefix("Quantized")
        raise NotExecutable(f"a layer of the kind {kind} has no integer kernel")
    return layer


def _geometry(layer: QuantizedLinear | QuantizedConv2d) -> ConvGeometry | None:
    if isinstance(layer, QuantizedLinear):
        return None
    if layer.padding_mode != "zeros":
        raise NotExecutable(f"its padding is {layer.padding_mode}, not zeros")
    stride, dilation = cast(tuple[int, int], layer.stride), cast(tuple[int, int], layer.dilation)
    padding = layer.padding
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, layer.kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            raise NotExecutable("its padding differs between the two sides")
        padding = tuple(span // 2 for span in spans)
    elif padding == "valid":
        padding = (0, 0)
    return ConvGeometry(stride, cast(tuple[int, int], padding), dilation, layer.groups)


def _stored(quantizer: Quantizer, operand: str) -> QParams:
    """What a quantizer stores, when that is a grid of integers with codes from 0 to at most 255."""
    stored = quantizer.qparams()
    if stored is None:
        raise NotExecutable(f'the quantizer "{quantizer.name}" of its {operand} is no scale and zero point')
    if not torch.equal(stored.zero_point, stored.zero_point.round()):
        raise NotExecutable(f"the zero points of its {operand} are free floats; round_zero_point makes them integers")
    largest = torch.as_tensor(stored.quant_max).max()
    if torch.as_tensor(stored.quant_min).any() or largest > UINT8_MAX:
        raise NotExecutable(f"the codes of its {operand} are not in 0 to {UINT8_MAX}")
    return stored


def _sizes(weight: QParams, quantizer: Quantizer, columns: int) -> tuple[int, ...]:
    """Input channels of each part that has scales of its own."""
    of_input = quantizer.sizes if isinstance(quantizer, SplitQuantizer) else ()
    if weight.split and of_input and weight.split != of_input:
        raise NotExecutable(f"its weight is split into {weight.split} and its input into {of_input}")
    return of_input or weight.split or (columns,)


def _quantizers(quantizer: Quantizer, parts: int) -> list[Quantizer]:
    if isinstance(quantizer, SplitQuantizer):
        return [cast(Quantizer, part) for part in quantizer.parts]
    return [quantizer] * parts


@torch.no_grad()
def _weight(layer: QuantizedLayer, stored: QParams) -> Tensor:
    """Codes minus zero points, int16, proved to be what the layer computes with."""
    grid = WeightGrid.of(stored, layer.weight.dim())
    if isinstance(layer.stored, PackedWeight):
        codes = layer.stored.codes().to(grid.scale.dtype)
    else:
        codes = torch.round(layer.float_weight() / grid.scale) + grid.zero_point
    centred = torch.minimum(codes.clamp(min=0), grid.quant_max) - grid.zero_point
    if not torch.equal(centred * grid.scale, layer.quantized_weight()):
        raise NotExecutable(f'the quantizer "{_name(layer.weight_quantizer)}" of its weight rounds in its own way')
    if centred.abs().max() > MAX_PIECES * INT8_MAX:
        raise NotExecutable(f"a weight's code is too far from its zero point for {MAX_PIECES} int8 numbers")
    return centred.to(torch.int16)


def input_grid(quantizer: Quantizer) -> InputGrid:
    """The grid of an input, proved on a probe to be what the quantizer computes.

    Raises:
        NotExecutable: it is no grid of integers with at most 8 bits, or its zero points are free floats.
    """
    stored = _stored(quantizer, "input")
    if stored.axis is not None:
        raise NotExecutable("its input has a scale for each channel")
    scale, zero_point = stored.scale.detach().reshape(-1), stored.zero_point.detach().reshape(-1)
    timesteps = None if stored.timesteps is None else stored.timesteps.detach()
    grid = InputGrid(
        scale.float().clone(), zero_point.to(torch.int32), int(torch.as_tensor(stored.quant_max).max()), timesteps
    )
    # From well below the smallest code to well above the largest, ties between codes among them.
    steps = torch.linspace(-grid.quant_max, 2 * grid.quant_max, 6 * grid.quant_max + 1)
    probe = (steps - zero_point[:, None]) * scale[:, None]
    codes = torch.round(probe / scale[:, None]).add(zero_point[:, None]).clamp(0, grid.quant_max)
    with torch.no_grad():
        if not torch.equal((codes - zero_point[:, None]) * scale[:, None], quantizer(probe, timesteps)):
            raise NotExecutable(f'the quantizer "{_name(quantizer)}" of its input rounds in its own way')
    return grid


def _name(quantizer: Quantizer | None) -> str:
    return "none" if quantizer is None else quantizer.name
