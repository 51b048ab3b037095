"""The scales that LSQ trains: where they start, and how their gradients are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab import QParams, QuantizedLayer, Quantizer, RecipeError, parts_of


@dataclass(frozen=True)
class LearnedScale:
    """One trained scale.

    Attributes:
        name: "site/weight scale" or "site/input scale"; with a number behind it where parts have scales of their own.
        quantizer: that it belongs to.
        parameter: the scale, [], [out] or [T].
        factor: of its gradient, g = 1 / sqrt(numel * Qp), in the shape of the scale.
    """

    name: str
    quantizer: Quantizer
    parameter: nn.Parameter
    factor: Tensor

    def scale_gradients(self) -> torch.utils.hooks.RemovableHandle:
        """Have every gradient multiplied by the factor until the handle is removed."""
        return self.parameter.register_hook(lambda gradient: gradient * self.factor)


def learned_scales(layers: Mapping[str, QuantizedLayer], examples: Mapping[str, Tensor]) -> list[LearnedScale]:
    """The scales of both tensors of every layer.

    Qp is the number of levels above 0, quant_max - zero_point, at least 1: 2^(b - 1) - 1 for the paper's signed tensors
    and 2^b - 1 for its unsigned ones.

    Args:
        layers: by site.
        examples: each layer's input for one sample [1, ...]; numel counts what shares a scale in it or in a weight.

    Raises:
        RecipeError: a quantizer has no scale that can be trained.
    """
    found = []
    for name, layer in layers.items():
        tensors = {
            "weight": (layer.weight_quantizer, layer.float_weight().detach()),
            "input": (layer.input_quantizer, examples[name]),
        }
        for part, (quantizer, tensor) in tensors.items():
            pieces = parts_of(quantizer, tensor) if quantizer is not None else []
            for index, (piece, values) in enumerate(pieces):
                scale, stored = _scale_of(piece, f"{part} of site {name}")
                factor = 1 / torch.sqrt(values[0].numel() * (stored.quant_max - stored.zero_point).clamp(min=1))
                number = f" {index}" if len(pieces) > 1 else ""
                found.append(LearnedScale(f"{name}/{part} scale{number}", piece, scale, factor))
    return found


def start_at_mean_magnitude(name: str, layer: QuantizedLayer) -> None:
    """Put the scales of the weight of a site at 2 mean |w| / sqrt(Qp) and its codes around 0, in place.

    A channel of b bits has its zero point at 2^(b - 1), so that its levels are -2^(b - 1), ..., Qp = 2^(b - 1) - 1
    times the scale, as the paper has them for signed tensors; at 1 bit Qp is taken as 1. A channel of zeros keeps its
    scale.

    Raises:
        RecipeError: the quantizer has no scale that can be trained.
    """
    if layer.weight_quantizer is None:
        return
    for quantizer, weight in parts_of(layer.weight_quantizer, layer.float_weight().detach()):
        scale, stored = _scale_of(quantizer, f"weight of site {name}")
        half = (torch.as_tensor(stored.quant_max) + 1) / 2
        magnitude = weight.float().flatten(1).abs().mean(1)
        start = 2 * magnitude / (half - 1).clamp(min=1).sqrt()
        scale.data = torch.where(magnitude > 0, start, stored.scale).to(scale)
        quantizer.zero_point.data = half.to(scale)  # type: ignore[union-attr]


def _scale_of(quantizer: Quantizer, where: str) -> tuple[nn.Parameter, QParams]:
    """A quantizer's scale and what it stores."""
    scale, stored = getattr(quantizer, "scale", None), quantizer.qparams()
    if not isinstance(scale, nn.Parameter) or stored is None:
        raise RecipeError(
            "lsq needs quantizers with scales",
            where=f"tune.tuners, {where}",
            got=type(quantizer).__name__,
            next_step="choose the quantizer affine",
        )
    return scale, stored
