"""The arithmetic of residual quantization: a base, binary corrections, and a search over both.

MPQ-DMv2, arXiv 2507.04290, framework figure: W_hat = Q_{n-1}(W) + B(W - Q_{n-1}(W)) with B(r) = alpha sign(r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab import fake_quantize

PLANES = 2
"""Binary corrections of a salient channel."""
NUM_CANDIDATES = 80
"""Shrunken ranges of the joint search, as in the engine's: 1.00, 0.99, ..., 0.21 of the full range."""


def base_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, *, round_zero_point: bool) -> Tensor:
    """scale * (q - zero_point) with q = clamp(round(x / scale + zero_point), 0, 2^bits - 1), the shape of x.

    A free zero point stands inside the rounding, so that a channel has 2^bits levels. ``fake_quantize`` adds it after,
    as the released MPQ-DM does; a fraction then gives the clamp's two borders beside the codes between them: one level
    more than the bits can tell. The gradients are those of ``fake_quantize``.

    Args:
        x: [out, ...].
        scale: [out].
        zero_point: [out].
        bits: [out].
        round_zero_point: round it, with a straight-through gradient.
    """
    dims = x.dim()
    step, levels = column(scale, dims), column(2.0 ** bits.to(scale.dtype) - 1, dims)
    if round_zero_point:
        return fake_quantize(x, step, column(zero_point, dims), levels, round_zero_point=True)
    shift = column(scale * zero_point, dims)
    return (fake_quantize(x + shift, step, torch.zeros_like(step), levels) - shift).to(x.dtype)


def fit_corrections(rows: Tensor, base: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the corrections and the corrected rows.

    The scale of a plane is alpha = mean |r| of what is left, which makes alpha sign(r) the nearest to r in squared
    error; the figure does not say, so a guess.

    Args:
        rows: [R, n].
        base: their base quantization [R, n].
        planes: how many corrections each row has [R].

    Returns:
        [PLANES, R], 0 where a row has no such plane, and [R, n].
    """
    scales, values = [], base
    for plane in range(PLANES):
        left = rows - values
        alpha = torch.where(planes > plane, left.abs().mean(1), torch.zeros_like(left[:, 0]))
        values = values + alpha[:, None] * sign(left)
        scales.append(alpha)
    return torch.stack(scales), values


def joint_search(
    rows: Tensor, base_bits: Tensor, planes: Tensor, start: tuple[Tensor, Tensor], *, round_zero_point: bool
) -> tuple[Tensor, Tensor]:
    """Base scale and zero point [R] of the shrunken range with the least squared error after the corrections.

    Args:
        rows: [R, n].
        base_bits: of the base [R].
        planes: how many corrections each row has [R].
        start: scale and zero point to improve on; a constant row keeps them.
        round_zero_point: only integers are tried; a free one centres two levels on 0.
    """

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        base = base_quantize(rows, scale, zero_point, base_bits, round_zero_point=round_zero_point)
        return (rows - fit_corrections(rows, base, planes)[1]).square().mean(1)

    (best_scale, best_zero_point), levels = start, 2.0**base_bits - 1
    best = error(best_scale, best_zero_point)
    low, high = rows.amin(1), rows.amax(1)
    for index in range(NUM_CANDIDATES):
        factor = 1.0 - 0.01 * index
        scale = torch.where(high > low, (high - low) * factor / levels, best_scale)
        zero_point = torch.where(high > low, -low * factor / scale, best_zero_point)
        if round_zero_point:
            zero_point = zero_point.round()
        found = error(scale, zero_point)
        better = found < best
        best = torch.where(better, found, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def sign(values: Tensor) -> Tensor:
    """1 or -1: one bit has no 0."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def column(values: Tensor, dims: int) -> Tensor:
    """Values [out] along the first of ``dims`` dimensions."""
    return values.view(-1, *(1,) * (dims - 1))
