"""The weight of a quantized layer as codes, proved to be what the layer computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.contracts.quant import QParams
from quantlab.errors import PackError
from quantlab.packing.bitpack import MAX_WIDTH
from quantlab.packing.stored import PackedWeight, dequantize, encode
from quantlab.packing.tables import bits_of, require_stored
from quantlab.quant.layers import QuantizedLayer


@dataclass(frozen=True)
class CodedWeight:
    """A weight in integers.

    Attributes:
        codes: uint8 [out, in / groups, *k].
        parameters: its grid, scales [out] or [parts, out].
        bits: int64 [out].
    """

    codes: Tensor
    parameters: QParams
    bits: Tensor


def code_weight(name: str, layer: QuantizedLayer) -> CodedWeight:
    """The codes of a layer with a quantized weight.

    Args:
        name: of the layer, for messages.
        layer: its adapter is merged.

    Raises:
        PackError: its quantizer has a format of its own, free zero points, more than 8 bits or another axis than 0.
        NonFiniteError: the weight is not finite.
    """
    assert layer.weight_quantizer is not None
    parameters = require_stored(layer.weight_quantizer, name)
    bits = bits_of(parameters).expand(layer.weight_shape[0])
    if int(bits.max()) > MAX_WIDTH or parameters.axis != 0:
        raise PackError(
            "only weights with a scale for each output channel and at most 8 bits are packed",
            where=name,
            got=f"{int(bits.max())} bits, axis {parameters.axis}",
        )
    if isinstance(layer.stored, PackedWeight):
        return CodedWeight(layer.stored.codes(), parameters, bits)
    weight = layer.float_weight()
    codes = encode(weight, parameters)
    if not torch.equal(dequantize(codes, parameters, weight.dtype), layer.quantized_weight()):
        raise PackError(
            f'the weights of the quantizer "{layer.weight_quantizer.name}" are not what its scales and zero points say',
            where=name,
        )
    return CodedWeight(codes, parameters, bits)
