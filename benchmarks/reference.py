"""The same algorithms the plain way: a loop over channels, a quantizer for each width.

This is how the released code of MPQ-DM is laid out (arXiv 2412.11549), written afresh. Its weights are quantized by
three quantizers whose results are masked and added; clipping is by two rectifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 80
POWER = 2.4


def mse_search_by_channel(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out] of a weight [out, n]: one channel, one candidate at a time."""
    found = [_mse_search(channel, bits) for channel in weight]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero_point for _, zero_point in found])


def _mse_search(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high, levels = x.min(), x.max(), 2**bits - 1
    best = 1e10
    scale = zero_point = torch.zeros(())
    for index in range(CANDIDATES):
        shrunk_low, shrunk_high = low * (1.0 - index * 0.01), high * (1.0 - index * 0.01)
        step = (shrunk_high - shrunk_low) / levels
        offset = (-shrunk_low / step).round()
        codes = torch.clamp(torch.round(x / step) + offset, 0, levels)
        error = (x - (codes - offset) * step).abs().pow(POWER).mean()
        if error < best:
            best, scale, zero_point = error, step, offset
    return scale, zero_point


def masked_sum(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor) -> Tensor:
    """The quantized weight of channels of several widths: one pass and one mask for each width.

    Args:
        weight: [out, ...].
        scale: broadcasts against it.
        zero_point: likewise.
        bits: likewise.
    """
    total: Tensor | None = None
    for width in sorted(set(bits.flatten().tolist())):
        mask = bits == width
        part = _quantized(torch.where(mask, weight, 0.0), scale, zero_point, 2**width - 1)
        part = torch.where(mask, part, 0.0)
        total = part if total is None else total + part
    assert total is not None
    return total


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    ratio = x / scale
    codes = (ratio.round() - ratio).detach() + ratio + zero_point
    codes = codes + torch.relu(0 - codes)
    codes = codes - torch.relu(codes - levels)
    return (codes - zero_point) * scale
