"""From a tuned student to the one that is evaluated and packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantlab.contracts.sections import AS_IT_IS, Pack
from quantlab.quant.layers import QuantizedLayer


def finalize(layers: Mapping[str, QuantizedLayer], pack: Pack = AS_IT_IS) -> dict[str, float]:
    """Merge adapters, round the zero points that quantizers round anyway and the branches to float16, in place.

    Args:
        layers: by site.
        pack: what a packed file holds; its defaults change nothing.

    Returns:
        site -> largest change of the quantized weight that this made; rounding a zero point that is already rounded
        with a straight-through gradient changes nothing, so anything but 0 is the merge's own float rounding.
    """
    changed: dict[str, float] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            before = layer.quantized_weight()
            layer.merge_adapter()
            if layer.branch is not None:
                layer.branch.round_factors()
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    quantizer.round_parameters()
            layer.store_as(pack)
            changed[name] = (layer.quantized_weight() - before).abs().max().item()
    return changed
