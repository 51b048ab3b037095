"""Set the scales that move range between a layer's weight and its input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.quant.layers import QuantizedLayer


def smooth(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Have each quantized layer multiply its weight by scales and its input by their reciprocals.

    The float function stays: sum_i (w_i s_i) (x_i / s_i) = sum_i w_i x_i.

    Args:
        model: holds quantized layers at the paths in ``scales``.
        scales: positive finite scales [in] of the input channels, by site; they replace earlier ones.

    Raises:
        ModelError: a site is no quantized layer, or its scales do not fit; nothing is changed then.
    """
    layers = {site: _checked_layer(model, site, scale) for site, scale in scales.items()}
    for site, layer in layers.items():
        layer.smoothing = scales[site].detach().to(layer.weight).clone()


def _checked_layer(model: nn.Module, site: str, scale: Tensor) -> QuantizedLayer:
    layer = model.get_submodule(site)
    if not isinstance(layer, QuantizedLayer) or isinstance(layer, nn.Embedding):
        raise ModelError(
            "only a quantized layer that multiplies its input can be smoothed", where=site, got=type(layer).__name__
        )
    channels = layer.input_channels
    if scale.shape != (channels,):
        raise ModelError(
            "smoothing takes one scale for each input channel",
            where=site,
            got=list(scale.shape),
            allowed=f"[{channels}]",
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ModelError("smoothing scales must be positive and finite", where=site)
    return layer
