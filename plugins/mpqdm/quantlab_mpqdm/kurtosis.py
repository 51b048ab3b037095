"""Kurtosis of weight channels."""

from __future__ import annotations

import torch
from torch import Tensor


def kurtosis(rows: Tensor) -> Tensor:
    """Fourth standardised moment of every row, without subtracting 3: a Gaussian has 3, outliers raise it.

    mean((x - mean)^4) / std^4 with the fourth moment over n and the standard deviation over n - 1, as in the released
    code of MPQ-DM (arXiv 2412.11549).

    Args:
        rows: [R, n].

    Returns:
        float32 [R], computed in float64; a constant row has no outliers and gets 0, which ranks it last.
    """
    if rows.shape[1] < 2:
        return torch.zeros(len(rows), device=rows.device)
    # Kurtosis does not depend on the scale; in float64 and brought to size 1 nothing can overflow or vanish.
    values = rows.double()
    size = values.abs().amax(1, keepdim=True)
    values = values / torch.where(size > 0, size, torch.ones_like(size))
    centred = values - values.mean(1, keepdim=True)
    variance = centred.square().sum(1) / (rows.shape[1] - 1)
    result = centred.pow(4).mean(1) / variance.square()
    # Rounding the mean leaves a constant row a tiny variance, so its range decides.
    constant = values.amax(1) == values.amin(1)
    # In float32 rows that differ by their scale alone are equal and keep their order.
    return torch.where(constant, torch.zeros_like(result), result).float()
