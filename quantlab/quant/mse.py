"""The MSE search: the best of 80 shrunken ranges of every row, without judging all of them in full.

What decides is sum |x - x_hat|^2.4, whose power is ten times as dear as the rest. By Lyapunov's inequality log sum a^p
is convex in p, so the sums at 2, 2.5 and 3, which need one square root, hold the sum at 2.4 between two bounds that are
a few thousandths apart. A candidate whose lower bound exceeds another's upper bound cannot win; the few that are left
are judged by the formula itself; the compiled search first thins them out once more, by a quicker and less exact power
of 2.4. The choice is that of judging all of them, bit for bit, whatever order the sums of the
bounds are taken in: the slack covers the rounding of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.quant.compiled import compiled_for

NUM_CANDIDATES = 80
"""Shrunken ranges that the search tries: 1.00, 0.99, ..., 0.21 of the full range."""
MSE_POWER = 2.4
"""Exponent of the error that the search minimises."""
BLOCK_ELEMENTS = 1 << 17
"""Elements of one temporary."""
GATHERED_ELEMENTS = 1 << 19
"""Elements of the rows that a compiled sum gets as copies at once."""
COMPILED_LENGTH = 1 << 12
"""Longest part of a row that a compiled sum gets: a longer one is summed in cascades, in half the speed."""
_UNIT = 2.0**-24
"""Largest relative rounding error of a float32 operation."""
_PLAIN_SCALES = (1e-12, 1e10)
"""Between these no power of an error leaves the range of float32; outside every candidate is judged."""
_QUICK_POWER = 1000 * _UNIT
"""Relative error of exp2(2.4 log2 a), at most: 2.4 ln 2 times |log2 a| < 150, each right to 4 units."""


@dataclass(frozen=True)
class _Candidates:
    """Scales and zero points [80, R] of R rows."""

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, quant_max: Tensor) -> _Candidates:
        shrink = [1.0 - 0.01 * index for index in range(NUM_CANDIDATES)]
        factor = torch.tensor(shrink, dtype=torch.float32, device=low.device)[:, None]
        scale = (high * factor - low * factor) / quant_max
        return cls(scale, torch.round(-(low * factor) / scale))


def mse_search(
    rows: Tensor, low: Tensor, high: Tensor, quant_max: Tensor, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R] with the smallest mean |x - x_hat|^2.4 of 80 shrunken ranges; the first of equals wins.

    Args:
        rows: float32 [R, n].
        low: smallest value of each row [R], or of the longer row that it was thinned from.
        high: largest likewise.
        quant_max: largest code of each row [R].
        compiled: take the sums of the bounds with a compiled function; the choice is the same.
    """
    candidates = _Candidates.of(low, high, quant_max)
    constant = high == low
    open_, slack = _may_win(rows, torch.maximum(low.abs(), high.abs()), quant_max, candidates, compiled)
    open_ &= ~constant
    if compiled:
        open_ = _still_open(rows, quant_max, candidates, open_, slack)
    # Where one is left its error decides nothing; with such a scale it is a number.
    only = open_ & (open_.sum(0) == 1) & _is_plain(candidates.scale)
    errors = torch.where(only, 0.0, _errors(rows, quant_max, candidates, open_ & ~only))
    best = errors.amin(0)
    order = torch.arange(NUM_CANDIDATES, device=rows.device)[:, None]
    first = torch.where(errors == best, order, NUM_CANDIDATES - 1).amin(0)[None]
    found = torch.isfinite(best)
    scale = torch.where(found, candidates.scale.gather(0, first)[0], 1.0)
    zero_point = torch.where(found, candidates.zero_point.gather(0, first)[0], 0.0)
    # A constant row has no range to shrink: one step reaches its value exactly.
    value = torch.where(low == 0, torch.ones_like(low), low)
    scale = torch.where(constant, value.abs(), scale)
    return scale, torch.where(constant, (low < 0).float(), zero_point)


def _may_win(
    rows: Tensor, absmax: Tensor, quant_max: Tensor, candidates: _Candidates, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Candidates [80, R] that the bounds do not rule out, and how far rounding may move each one's logarithm."""
    length, scale = rows.shape[1], candidates.scale
    inverse = 1 / scale
    two, two_half, three = (
        sums.double() for sums in _power_sums(rows, inverse, -candidates.zero_point, quant_max, compiled)
    )
    size = MSE_POWER * scale.double().log()
    upper = size + 0.2 * two.log() + 0.8 * two_half.log()
    lower = size + 1.2 * two_half.log() - 0.2 * three.log()
    # Rounding of sums in at least eight lanes, and of the errors themselves: differences of numbers up to absmax.
    slack = _UNIT * (4.0 * (length / 8 + 64) + 20.0 * absmax * inverse / (two / length).sqrt())
    return ~_ruled_out(lower - slack, upper + slack, scale), slack


def _ruled_out(lower: Tensor, upper: Tensor, scale: Tensor) -> Tensor:
    """Candidates [80, R] that cannot win, by bounds of the logarithm of each one's error."""
    bound = torch.nan_to_num(upper, nan=torch.inf).amin(0)
    # Where a sum is 0 the bounds are no numbers, and comparing them rules nothing out.
    return (lower > bound) & _is_plain(scale)


def _is_plain(scale: Tensor) -> Tensor:
    smallest, largest = _PLAIN_SCALES
    return (scale > smallest) & (scale < largest)


def _still_open(rows: Tensor, quant_max: Tensor, candidates: _Candidates, open_: Tensor, slack: Tensor) -> Tensor:
    """Of the open candidates [80, R] those that a quick power of 2.4 does not rule out."""
    scale, sums = candidates.scale, torch.full_like(candidates.scale, torch.nan, dtype=torch.float64)
    row, candidate = (open_ & (open_.sum(0) > 1)).mT.nonzero(as_tuple=True)
    for part in torch.arange(len(row), device=rows.device).split(max(1, GATHERED_ELEMENTS // rows.shape[1])):
        where = candidate[part], row[part]
        low_code = -candidates.zero_point[where]
        (sums[where],) = _compiled_sums(
            _quick_power_sum_of, rows[row[part]], 1 / scale[where], low_code, low_code + quant_max[row[part]]
        )
    error, slack = MSE_POWER * scale.double().log() + sums.log(), slack + _QUICK_POWER
    return open_ & ~_ruled_out(error - slack, error + slack, scale)


def _compiled_sums(function: Callable[..., tuple[Tensor, ...]], rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Sums in float64 over the rows by a compiled function, parts of the rows at a time."""
    parts = -(-rows.shape[1] // COMPILED_LENGTH)
    compiled = compiled_for(function, rows.dtype, rows.dim())
    found = [compiled(part.contiguous(), *others) for part in rows.tensor_split(parts, 1)]
    return tuple(torch.stack(sums).double().sum(0) for sums in zip(*found, strict=True))


def _quick_power_sum_of(rows: Tensor, inverse: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    ratio = rows * inverse[:, None]
    codes = torch.minimum(torch.maximum(torch.round(ratio), low[:, None]), high[:, None])
    return (torch.exp2(MSE_POWER * torch.log2((codes - ratio).abs())).sum(1),)


def _power_sums(
    rows: Tensor, inverse: Tensor, low_code: Tensor, quant_max: Tensor, compiled: bool
) -> tuple[Tensor, ...]:
    """Sums [80, R] of a^2, a^2.5 and a^3 over a row's errors a, in units of the candidate's scale."""
    if compiled:
        return _compiled_sums(_power_sums_of, rows, inverse, low_code, low_code + quant_max)
    sums = tuple(torch.empty_like(inverse) for _ in range(3))
    height = max(1, BLOCK_ELEMENTS // rows.shape[1])
    depth = max(1, BLOCK_ELEMENTS // (min(height, len(rows)) * rows.shape[1]))
    for start in range(0, len(rows), height):
        part = slice(start, start + height)
        for first in range(0, NUM_CANDIDATES, depth):
            block = slice(first, first + depth), part
            codes = low_code[block]
            for total, value in zip(
                sums, _power_sums_of(rows[part], inverse[block], codes, codes + quant_max[part]), strict=True
            ):
                total[block] = value
    return sums


def _power_sums_of(rows: Tensor, inverse: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    ratio = rows[None] * inverse[:, :, None]
    codes = torch.minimum(torch.maximum(torch.round(ratio), low[:, :, None]), high[:, :, None])
    error = (codes - ratio).abs()
    square = error * error
    return square.sum(2), (square * error.sqrt()).sum(2), (square * error).sum(2)


def _errors(rows: Tensor, quant_max: Tensor, candidates: _Candidates, chosen: Tensor) -> Tensor:
    """Mean errors [80, R] of the chosen candidates; infinite for others and where they are no numbers."""
    errors = torch.full_like(candidates.scale, torch.inf)
    row, candidate = chosen.mT.nonzero(as_tuple=True)
    for part in torch.arange(len(row), device=rows.device).split(max(1, BLOCK_ELEMENTS // rows.shape[1])):
        where = candidate[part], row[part]
        column, offset, levels = (
            value[:, None] for value in (candidates.scale[where], candidates.zero_point[where], quant_max[row[part]])
        )
        x = rows[row[part]]
        codes = (x / column).round_().add_(offset).clamp_(min=0).clamp_(max=levels)
        error = codes.sub_(offset).mul_(column).sub_(x).abs_().pow_(MSE_POWER).mean(1)
        errors[where] = torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf)
    return errors
