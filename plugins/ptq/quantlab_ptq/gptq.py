"""GPTQ: rounding weights one input at a time, each error made up for by the inputs that are still to come.

Frantar et al., ICLR 2023, arXiv 2210.17323. For a row w of a weight and the second moment H of the layer's inputs, the
output error of a rounded row q is (w - q) H (w - q)ᵀ / 2; everything here minimises that, all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab import NonFiniteError, QParams, QuantizedLayer, WeightGrid

_SAMPLES_AT_ONCE = 64
"""Samples whose unfolded inputs are in memory together."""


@dataclass(frozen=True)
class Grid:
    """What the rows of a weight may be rounded to.

    Attributes:
        scale: float64 [groups, rows, 1], or [groups, rows, fan] where inputs have scales of their own.
        zero_point: the same shape, integers or free.
        quant_max: the same shape: rows may differ in width.
    """

    scale: Tensor
    zero_point: Tensor
    quant_max: Tensor

    @classmethod
    def of(cls, parameters: QParams, weight: Tensor, groups: int) -> Grid:
        """The grid of the quantizer of a weight [out, in / groups, *k]."""
        grid = WeightGrid.of(parameters, weight.dim())

        def rows(value: Tensor) -> Tensor:
            shape = weight.shape if parameters.split else (len(weight), *(1,) * (weight.dim() - 1))
            return value.double().expand(shape).flatten(1).unflatten(0, (groups, -1))

        return cls(rows(grid.scale), rows(grid.zero_point), rows(grid.quant_max))

    def take(self, columns: Tensor) -> Grid:
        """The grid of some columns [groups, n] of the weight, in their order."""
        if self.scale.shape[-1] == 1:
            return self
        index = columns[:, None].expand(-1, self.scale.shape[1], -1)
        return Grid(*(value.gather(-1, index) for value in (self.scale, self.zero_point, self.quant_max)))

    def column(self, index: int) -> Grid:
        """The grid of one column."""
        if self.scale.shape[-1] == 1:
            return self
        return Grid(*(value[..., index, None] for value in (self.scale, self.zero_point, self.quant_max)))

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the quantizer makes of a weight [groups, rows, fan], and a weight of which it makes that.

        They differ only at the ends of a range whose zero point is no integer.
        """
        steps = torch.round(weight / self.scale)
        codes = torch.minimum((steps + self.zero_point).clamp(min=0), self.quant_max)
        lowest, highest = torch.floor(-self.zero_point), torch.ceil(self.quant_max - self.zero_point)
        stored = torch.minimum(torch.maximum(steps, lowest), highest)
        return (codes - self.zero_point) * self.scale, stored * self.scale


def input_rows(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What each output of a layer is a product with: [groups, positions, in / groups * kernel].

    The layer's own operation with the identity as its weight, so that stride, padding, dilation and groups are those of
    the layer.
    """
    shape, groups = layer.weight_shape, layer.groups
    fan = shape[1:].numel()
    identity = torch.eye(fan, dtype=x.dtype, device=x.device).view(fan, *shape[1:])
    unfolded = layer.apply_weight(x, identity.repeat(groups, *(1,) * (len(shape) - 1)), None)
    last = unfolded.movedim(layer.channel_dim, -1)
    return last.flatten(0, -2).unflatten(1, (groups, fan)).transpose(0, 1)


def second_moment(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """H = 2 / n * sum of x xᵀ over the n positions of a layer's input, float64 [groups, fan, fan]."""
    total, count = torch.zeros((), dtype=torch.float64, device=x.device), 0
    for part in x.split(_SAMPLES_AT_ONCE):
        rows = input_rows(layer, part.float())
        total = total + (rows.mT @ rows).double()
        count += rows.shape[1]
    return 2 / count * total


def quantize_rows(
    weight: Tensor, moment: Tensor, grid: Grid, *, damping: float = 0.01, block: int = 128, act_order: bool = False
) -> Tensor:
    """Weights on the grid whose output error is small (algorithm 1 of the paper).

    Args:
        weight: [groups, rows, fan].
        moment: H, float64 [groups, fan, fan].
        grid: of the weight.
        damping: share of the mean of H's diagonal that is added to it.
        block: columns after which the error is handed on to all that follow; it changes the speed, not the result.
        act_order: columns in the order of H's diagonal, the largest first.

    Returns:
        float64 [groups, rows, fan]: what the grid's quantizer maps to the chosen values. An input that is always 0 gets
        the value of a weight of 0.

    Raises:
        NonFiniteError: H has no Cholesky factor even with damping.
    """
    weight, moment = weight.double().clone(), moment.clone()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal[dead] = 1
    weight.masked_fill_(dead[:, None], 0)
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    fan = weight.shape[-1]
    order = (
        diagonal.argsort(dim=-1, descending=True, stable=True) if act_order else torch.arange(fan).expand(len(dead), -1)
    )
    order = order.to(weight.device)
    weight, grid = weight.gather(-1, order[:, None].expand_as(weight)), grid.take(order)
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None].expand_as(moment))
    factor = _inverse_factor(moment)
    stored = torch.empty_like(weight)
    for start in range(0, fan, block):
        stop = min(start + block, fan)
        errors = weight.new_zeros(*weight.shape[:-1], stop - start)
        for column in range(start, stop):
            value, rounded = grid.column(column).round(weight[..., column, None])
            error = (weight[..., column, None] - value) / factor[:, column, column, None, None]
            weight[..., column:stop] -= error * factor[:, None, column, column:stop]
            errors[..., column - start, None], stored[..., column, None] = error, rounded
        weight[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return torch.empty_like(stored).scatter(-1, order[:, None].expand_as(stored), stored)


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H [groups, fan, fan]."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if failed.any():
        raise NonFiniteError(
            "the second moment of a layer's inputs is not positive definite",
            where="gptq",
            next_step="raise the tuner's damping, or calibrate.samples",
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def output_error(difference: Tensor, moment: Tensor) -> float:
    """Mean squared error of a layer's outputs for a change of its weight [groups, rows, fan] under H."""
    change = difference.double()
    return float(((change @ moment) * change).sum(-1).mean() / 2)
