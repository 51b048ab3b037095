"""The grid of a weight, whatever its quantizer shares scales over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.contracts.quant import QParams
from quantlab.quant.functional import per_channel


@dataclass(frozen=True)
class WeightGrid:
    """scale * (q - zero_point) with q in 0, ..., quant_max; each broadcasts over the weight [out, in / groups, *k].

    Attributes:
        scale: [], [out, 1, ...] or, where parts of the inputs have scales of their own, [out, in, 1, ...].
        zero_point: likewise, integers or free.
        quant_max: likewise, in the dtype of the scale.
    """

    scale: Tensor
    zero_point: Tensor
    quant_max: Tensor

    @classmethod
    def of(cls, parameters: QParams, dims: int) -> WeightGrid:
        """The grid of a weight with so many dimensions."""
        scale = parameters.scale
        quant_max = torch.as_tensor(parameters.quant_max, device=scale.device).to(scale.dtype).expand_as(scale)

        def shaped(value: Tensor) -> Tensor:
            if parameters.split:
                sizes = torch.tensor(parameters.split, device=value.device)
                columns = value.reshape(len(sizes), -1).mT.repeat_interleave(sizes, 1)
                return columns.reshape(*columns.shape, *(1,) * (dims - 2))
            return per_channel(value, dims, parameters.axis) if parameters.axis is not None else value

        return cls(shaped(scale), shaped(parameters.zero_point), shaped(quant_max))
