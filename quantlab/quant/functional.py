"""Quantizer arithmetic: everything that turns numbers into codes and back.

x_hat = scale * (q - zero_point), with integer codes q in [0, quant_max]. Rounding is half to even throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.contracts.quant import Observer
from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.quant.compiled import compiled_for
from quantlab.quant.mse import mse_search

MIN_SCALE = 1e-8
"""Smallest scale: of an empty range in the min-max search, as in the released code of MPQ-DM, and in training."""
PERCENTILE = 99.9
"""Percent of a row's elements that the percentile observer keeps below the upper end of the range."""


class _FakeQuantize(torch.autograd.Function):
    """Keeps x itself for backward and computes the rest again: one saved copy, which the caller holds anyway."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor, compiled: bool) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, scale, zero_point, quant_max)
        ctx.compiled = compiled
        (y,) = _call(_quantize, compiled, x, scale, zero_point, quant_max)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        (gradient,) = gradients
        x, scale, zero_point, quant_max = ctx.saved_tensors
        for_x, for_scale, for_zero_point, *_ = ctx.needs_input_grad
        if not (for_scale or for_zero_point):
            (found,) = _call(_gradient_of_x, ctx.compiled, x, scale, zero_point, quant_max, gradient)
            return found.view(x.shape), None, None, None, None
        found = _call(_gradients, ctx.compiled, x, scale, zero_point, quant_max, gradient)
        return (
            found[0].view(x.shape) if for_x else None,
            found[1].view(scale.shape) if for_scale else None,
            found[2].view(zero_point.shape) if for_zero_point else None,
            None,
            None,
        )


def _call(
    function: Callable[..., tuple[Tensor, ...]], compiled: bool, x: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """``function`` on the tensors as they are, or compiled on rows [C, n] of x that have a scale each."""
    if not compiled:
        return function(x, *others)
    scale = others[0]
    rows = scale.numel()
    if rows != 1 and (scale.dim() != x.dim() or scale.shape[0] != rows):
        raise QuantlabError(
            "a compiled quantizer needs one scale, or one for each entry of the first dimension",
            where="fake_quantize",
            got=f"scales {tuple(scale.shape)} of a tensor {tuple(x.shape)}",
            next_step="set the quantizer's option `compiled` to false",
        )
    shaped = [
        value.reshape(rows, -1) if value.numel() in (rows, x.numel()) else value.expand(rows, 1) for value in others
    ]
    return compiled_for(function, x.dtype, 2)(x.reshape(rows, -1), *shaped)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor) -> tuple[Tensor, ...]:
    codes = torch.round(_ratio(x, scale)).add_(zero_point).clamp_(min=0).clamp_(max=quant_max)
    return (codes.sub_(zero_point).mul_(scale).to(x.dtype),)


def _gradient_of_x(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    codes = torch.round(_ratio(x, scale)).add_(zero_point)
    # Inclusive borders: a code that lands on one keeps its gradient, as clamp's does.
    inside = (codes.clamp(min=0).clamp_(max=quant_max) == codes).to(codes.dtype)
    return ((gradient.to(codes.dtype) * inside).to(x.dtype),)


def _gradients(x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    ratio = _ratio(x, scale)
    gradient = gradient.to(ratio.dtype)
    codes = torch.round(ratio).add_(zero_point)
    clamped = codes.clamp(min=0).clamp_(max=quant_max)
    inside = (clamped == codes).to(ratio.dtype)
    # Products in the memory layout of the incoming gradient: it decides the order of the sums, and so their last bit.
    for_scale = (gradient * clamped.sub_(zero_point).sub_(ratio.mul_(inside))).sum_to_size(scale.shape)
    for_x = gradient * inside
    for_zero_point = (gradient - for_x).mul_(-scale).sum_to_size(zero_point.shape)
    return for_x.to(x.dtype), for_scale, for_zero_point


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in the higher precision of the two; torch would let a scale of no dimensions take that of x."""
    return x.to(torch.promote_types(x.dtype, scale.dtype)) / scale


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_max: int | Tensor,
    *,
    round_zero_point: bool = False,
    compiled: bool = False,
) -> Tensor:
    """Quantize and dequantize x.

    Args:
        x: any shape.
        scale: broadcasts against x; see ``per_channel``.
        zero_point: broadcasts against x; may be fractional.
        quant_max: largest code; a tensor gives every channel its own number of levels, so that a layer of 1-, 2- and
            3-bit channels is one call.
        round_zero_point: use the rounded zero point, with a straight-through gradient.
        compiled: let torch compile the arithmetic. Values and the gradient for x are the same bits; the sums of the
            gradients for scale and zero point round in another order.

    Returns:
        scale * (clamp(round(x / scale) + zero_point, 0, quant_max) - zero_point), the shape and dtype of x.
        Gradients (LSQ, arXiv 1902.08153, without its scaling): for x, 1 inside the range and 0 outside; for the
        scale, q - zero_point - x / scale inside and q - zero_point outside; for the zero point, 0 inside and -scale
        outside. Half-precision inputs are computed in the precision of the scale.
    """
    if round_zero_point:
        zero_point = zero_point + (torch.round(zero_point) - zero_point).detach()
    levels = quant_max if isinstance(quant_max, Tensor) else torch.tensor(quant_max, device=x.device)
    return _FakeQuantize.apply(x, scale, zero_point, levels.to(scale.dtype), compiled)  # type: ignore[no-any-return]


def per_channel(values: Tensor, dims: int, axis: int = 0) -> Tensor:
    """Shape values [C] so that they broadcast along ``axis`` of a tensor with ``dims`` dimensions."""
    shape = [1] * dims
    shape[axis] = -1
    return values.view(shape)


def search_scale(
    rows: Tensor,
    bits: Tensor,
    observer: Observer,
    max_elements: int | None = None,
    *,
    percentile: float = PERCENTILE,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row.

    Args:
        rows: [R, n], finite.
        bits: integer [R], 1 to 8.
        observer: how the range of a row is found.
        max_elements: the MSE search judges candidates on about this many evenly spaced elements of a longer row; the
            range itself is always that of the whole row.
        percentile: p of the percentile observer, above 50 and at most 100 %: see ``percentile_range``.
        compiled: let torch compile the MSE search; the result is the same.

    Returns:
        scale and zero point, float32 [R]; zero points are integers but may lie outside the codes' range.

    Raises:
        NonFiniteError: a row holds NaN or infinity.
    """
    rows = rows.float()
    low, high = rows.amin(1), rows.amax(1)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NonFiniteError("a tensor to be quantized holds NaN or infinity", where="scale search")
    quant_max = (2.0 ** bits.to(rows.device)) - 1
    match observer:
        case Observer.MIN_MAX:
            return _from_range(low, high, quant_max)
        case Observer.SCALED_MIN_MAX:
            factor = (bits.to(rows.device).double() + 2) / 8
            return _from_range(low * factor, high * factor, quant_max)
        case Observer.MSE:
            stride = max(1, rows.shape[1] // max_elements) if max_elements else 1
            return mse_search(rows[:, ::stride].contiguous(), low, high, quant_max, compiled=compiled)
        case Observer.PERCENTILE:
            return _from_range(*percentile_range(rows, percentile), quant_max)


def percentile_range(rows: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The (100 - p)-th and the p-th percentile of every row [R, n], by nearest rank and without interpolation.

    With k = ceil(p n / 100) they are the k-th largest and the k-th smallest element of the row, [R] each. So a row of
    fewer than 100 / (100 - p) elements keeps its extremes, as every row does at p = 100.
    """
    count = rows.shape[1]
    # Rounded before it is rounded up: 99.9 % of 1,000 is 999, whatever binary fractions make of it.
    rank = min(count, math.ceil(round(percentile * count / 100, 6)))
    low, high = (rows.kthvalue(position, 1).values for position in (count - rank + 1, rank))
    return low, high


def _from_range(low: Tensor, high: Tensor, quant_max: Tensor) -> tuple[Tensor, Tensor]:
    """The range widened to hold 0, computed in float64."""
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    scale = ((high - low) / quant_max).clamp(min=MIN_SCALE)
    return scale.float(), torch.round(-low / scale).float()


def smoothing_scale(weight_absmax: Tensor, input_absmax: Tensor, alpha: float) -> Tensor:
    """Scales [in] = input_absmax^alpha / weight_absmax^(1 - alpha); a channel that is dead on either side keeps 1.

    The weight is multiplied by them and the input by their reciprocals (SmoothQuant, arXiv 2211.10438, equation 4;
    MPQ-DM uses alpha = 0.5).
    """
    ratio = (
        torch.sqrt(input_absmax / weight_absmax)
        if alpha == 0.5
        else input_absmax.pow(alpha) / weight_absmax.pow(1 - alpha)
    )
    alive = (weight_absmax > 0) & (input_absmax > 0) & torch.isfinite(ratio) & (ratio > 0)
    return torch.where(alive, ratio, torch.ones_like(ratio))
