"""What a layer with a weight computes, whatever its kind, with the weight as one row for each output channel.

Quantizers, policies and tuners know one layout, [out, in / groups, *kernel]. A transposed convolution of torch holds
[in, out / groups, *kernel]; ``rows_of`` and ``own_layout`` go between the two.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Multiplying = nn.Linear | Convolution | TransposedConvolution
"""Layers that multiply their input by their weight."""
Weighted = Multiplying | nn.Embedding
"""Layers whose weight can be quantized; an embedding has a row for each entry, and looks them up."""

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def rows_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """[out, in / groups, *kernel] of a weight in the layer's own layout; a view where that is possible."""
    if not isinstance(layer, TransposedConvolution):
        return weight
    # Group g of the outputs reads group g of the inputs.
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def own_layout(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of ``rows_of``, also for another number of rows than the layer's own."""
    return rows_of(layer, rows)  # exchanging the two channel axes of each group undoes itself


def rows_shape(layer: Weighted) -> torch.Size:
    """Shape of the weight as rows, [out, in / groups, *kernel]."""
    if not isinstance(layer, TransposedConvolution):
        return layer.weight.shape
    return torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.weight.shape[2:]))


def compute(layer: nn.Module, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation on x with another weight [out, in / groups, *kernel] and bias [out]."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, rows, bias)
    if isinstance(layer, Convolution):
        return layer._conv_forward(x, rows, bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, rows, layer.padding_idx)
    layer = cast(nn.ConvTranspose2d, layer)
    transposed = _TRANSPOSED[rows.dim() - 2]
    places = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    return transposed(x, own_layout(layer, rows), bias, *places)  # type: ignore[arg-type]


def pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A convolution of x [B, in, ...] with a kernel of one element, [out, in / groups, 1, ...]."""
    return _PLAIN[weight.dim() - 2](x, weight, groups=groups)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of input and output that holds the channels: 1 of a convolution, the last otherwise."""
    return 1 if isinstance(layer, Convolution | TransposedConvolution) else -1
