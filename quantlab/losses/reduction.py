"""From an error for each element to one number."""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor


class Reduction(StrEnum):
    """How the errors of the elements become one number."""

    SUM = "sum"
    """Over everything, as EfficientDM and MPQ-DM do."""
    MEAN = "mean"
    """Over everything; its gradient does not grow with the batch."""


def reduce(errors: Tensor, reduction: Reduction) -> Tensor:
    """Sum or mean over all elements, 0-dim."""
    match reduction:
        case Reduction.SUM:
            return errors.sum()
        case Reduction.MEAN:
            return errors.mean()
