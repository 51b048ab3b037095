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
        [R]; a constant row has no outliers and gets 0, which ranks it last.
    """
    if rows.shape[1] < 2:
        return rows.new_zeros(len(rows))
    centred = rows - rows.mean(1, keepdim=True)
    deviation = rows.std(1)
    value = centred.pow(4).mean(1) / deviation.pow(4)
    return torch.where((deviation > 0) & torch.isfinite(value), value, torch.zeros_like(value))
