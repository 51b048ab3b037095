"""Modules that stand in a quantized network while it is exported, and compute by nodes of ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.packing.backends.integers import InputGrid
from quantlab.packing.coded import CodedWeight
from quantlab.packing.exports.onnx_types import OnnxInteger, onnx_grid

OPSET = 21
"""The first with 4-bit and 16-bit integers."""


class OnnxWeightPart(nn.Module):
    """Codes, scales and zero points of a weight, or of the part of one that has scales of its own.

    Args:
        codes: integers [out, in / groups, *k].
        scale: float32 [out].
        zero_point: integers [out].
        site: for messages.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, site: str) -> None:
        super().__init__()
        grid = onnx_grid(codes.flatten(1).amax(1).to(torch.int64), zero_point, OnnxInteger.UINT4, site)
        self.kind = grid.kind
        shift = grid.shift.view(-1, *(1,) * (codes.dim() - 1))
        self.register_buffer("codes", (codes.to(torch.int64) + shift).to(self.kind.torch_type))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", grid.zero_point.to(self.kind.torch_type))

    def forward(self) -> Tensor:
        """The weight, float32 [out, in / groups, *k]."""
        operands = (self.codes, self.scale, self.zero_point)
        return _onnx("DequantizeLinear", operands, torch.float32, self.codes, axis=0)


class OnnxWeight(nn.Module):
    """The weight of a layer: in the place of its ``stored``."""

    def __init__(self, coded: CodedWeight, site: str) -> None:
        super().__init__()
        parameters, out = coded.parameters, len(coded.bits)
        sizes = parameters.split or (coded.codes.shape[1],)
        pieces = zip(
            coded.codes.split(sizes, 1),
            parameters.scale.view(-1, out),
            parameters.zero_point.view(-1, out),
            strict=True,
        )
        self.parts = nn.ModuleList(OnnxWeightPart(*piece, site) for piece in pieces)

    @property
    def kinds(self) -> list[OnnxInteger]:
        """The type of each part."""
        return [part.kind for part in self.parts]  # type: ignore[misc]

    def forward(self) -> Tensor:
        """The weight, float32 [out, in / groups, *k]."""
        parts = [part() for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class OnnxInput(nn.Module):
    """An activation of one grid through its codes and back, in the place of its quantizer.

    QuantizeLinear saturates at the ends of its type, not of the codes: a value beyond the codes is clipped before,
    which gives the same code.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: InputGrid, site: str) -> None:
        super().__init__()
        quant_max, offset = torch.tensor(grid.quant_max), grid.zero_point[0]
        found = onnx_grid(quant_max, offset, OnnxInteger.UINT8, site)
        self.kind = found.kind
        self.fills_type = grid.quant_max == self.kind.largest and not int(found.shift)
        self.register_buffer("scale", grid.scale[0])
        self.register_buffer("zero_point", found.zero_point.to(self.kind.torch_type))
        # Numbers, not tensors: a node Clip, which a runtime knows how to join with the quantization after it.
        self.low, self.high = ((ends - offset).mul(grid.scale[0]).item() for ends in (torch.tensor(0), quant_max))

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantized and dequantized x."""
        if not self.fills_type:
            x = torch.clamp(x, self.low, self.high)
        codes = _onnx("QuantizeLinear", (x, self.scale, self.zero_point), self.kind.torch_type, x)
        return _onnx("DequantizeLinear", (codes, self.scale, self.zero_point), torch.float32, x)


class OnnxTable(nn.Module):
    """An activation with a grid for each stored timestep, in the place of its quantizer.

    Each sample has its own scale. QuantizeLinear could take them along the batch, but runtimes that fuse it with a
    convolution take one scale for a tensor. So the codes are computed by elementwise nodes, in the simulation's steps.
    """

    scale: Tensor
    zero_point: Tensor
    middles: Tensor

    def __init__(self, grid: InputGrid, timesteps: Tensor) -> None:
        super().__init__()
        self.quant_max = float(grid.quant_max)
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point.float())
        self.register_buffer("middles", (timesteps.double()[1:] + timesteps.double()[:-1]) / 2)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantized and dequantized x [B, ...] of the samples' timesteps [B]."""
        assert timestep is not None, "the engine threads the timestep to every layer"
        # What a binary search finds, which ONNX has no operator for: how many middles lie below.
        index = (timestep.double()[:, None] > self.middles).sum(1)
        shape = (-1, *(1,) * (x.dim() - 1))
        scale, zero_point = (value.index_select(0, index).view(shape) for value in (self.scale, self.zero_point))
        codes = torch.clamp(torch.round(x / scale) + zero_point, 0.0, self.quant_max)
        return (codes - zero_point) * scale


def input_module(grid: InputGrid, site: str) -> OnnxInput | OnnxTable:
    """The module that quantizes by a grid; raises PackError when ONNX has no integers for it."""
    return OnnxInput(grid, site) if grid.timesteps is None else OnnxTable(grid, grid.timesteps)


def _onnx(name: str, operands: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor, axis: int | None = None) -> Tensor:
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(name, operands, attributes, dtype=dtype, shape=like.shape, version=OPSET)
