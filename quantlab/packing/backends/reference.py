"""The exact reference: a layer in plain integers, and its simulation in float64 to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.packing.backends.integers import ConvGeometry, IntegerPart, IntegerSite


def input_codes(part: IntegerPart, x: Tensor, timestep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 in the shape of x [B, ...], with the scale and zero point of each sample [B, 1, ...]."""
    grid = part.grid
    index = grid.index(timestep, len(x))
    shape = (-1, *(1,) * (x.dim() - 1))
    scale, zero_point = grid.scale[index].view(shape), grid.zero_point[index].view(shape)
    return torch.round(x / scale).add(zero_point).clamp(0, grid.quant_max).to(torch.uint8), scale, zero_point


def accumulate(centred: Tensor, weight: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """The accumulators: sums of products of integers, int32 [..., out] or [B, out, H', W'].

    Args:
        centred: codes minus zero point, int32 [..., in] or [B, in, H, W]; a padded border is 0 in it.
        weight: int [out, in / groups, *k].
        geometry: of a convolution.
    """
    weight = weight.to(torch.int32)
    if geometry is None:
        return centred @ weight.t()
    (vertical, horizontal), groups = geometry.padding, geometry.groups
    padded = F.pad(centred, (horizontal, horizontal, vertical, vertical))
    reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, geometry.stride, strict=True))
    samples, out = len(centred), len(weight)
    total = torch.zeros(samples, groups, out // groups, height * width, dtype=torch.int32)
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            top, left = row * geometry.dilation[0], column * geometry.dilation[1]
            tap = padded[:, :, top :: geometry.stride[0], left :: geometry.stride[1]][:, :, :height, :width]
            inputs = tap.reshape(samples, groups, -1, height * width)
            total += weight[:, :, row, column].view(groups, out // groups, -1) @ inputs
    return total.view(samples, out, height, width)


@dataclass(frozen=True)
class ReferenceProduct:
    """s_x s_w (q_x - z_x)(q_w - z_w) + b of one part of a layer from its exact accumulators, epilogue in float64."""

    part: IntegerPart
    bias: Tensor | None
    geometry: ConvGeometry | None

    def __call__(self, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        """Float32 [..., out] of uint8 codes [..., in], or [B, out, H', W'] of [B, in, H, W]."""
        accumulators = accumulate(codes.to(torch.int32) - zero_point, self.part.weight, self.geometry)
        output = accumulators * (scale * _by_output(self.part.scale.double(), self.geometry))
        return (output if self.bias is None else output + _by_output(self.bias, self.geometry)).float()

    def held_bytes(self) -> int:
        """Bytes of weights, scales and bias."""
        return 2 * self.part.weight.numel() + 4 * (2 if self.bias is not None else 1) * len(self.part.scale)


def simulate(site: IntegerSite, x: Tensor, timestep: Tensor | None = None) -> Tensor:
    """What the simulation computes on a smoothed input x, in float64: dequantized input times dequantized weight.

    The codes are those of the float32 simulation; everything after them is float64.

    Args:
        site: the layer's integers.
        x: float32 [B, ..., in] or [B, in, H, W].
        timestep: [B], for a per-timestep grid.
    """
    dim = -1 if site.geometry is None else 1
    inputs, weights = [], []
    for part, values in zip(site.parts, x.split(part_sizes(site, x), dim), strict=True):
        codes, scale, zero_point = input_codes(part, values, timestep)
        inputs.append((codes.double() - zero_point) * scale.double())
        weights.append(part.weight.double() * part.scale.double().view(-1, *(1,) * (part.weight.dim() - 1)))
    dequantized, weight = torch.cat(inputs, dim), torch.cat(weights, 1)
    bias = None if site.bias is None else site.bias.double()
    if site.geometry is None:
        return F.linear(dequantized, weight, bias)
    geometry = site.geometry
    return F.conv2d(dequantized, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def part_sizes(site: IntegerSite, x: Tensor) -> tuple[int, ...]:
    """Channels of x that belong to each part; of a grouped convolution all to the one."""
    return site.sizes if len(site.sizes) > 1 else (x.shape[-1 if site.geometry is None else 1],)


def _by_output(values: Tensor, geometry: ConvGeometry | None) -> Tensor:
    return values if geometry is None else values.view(-1, 1, 1)
