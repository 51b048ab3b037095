"""Operations on activations alone, with a quantizer for each of their operands."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import Pack

LEFT, RIGHT = "left", "right"


class QuantizedOperands(nn.Module):
    """What operations without a weight share.

    Attributes:
        quantizers: by slot; a slot without one stays float.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict()

    @abstractmethod
    def operands(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """The float tensor of every slot, from the arguments of a call."""

    def round_parameters(self) -> None:
        """Put parameters that the quantizers round at their rounded values."""
        for quantizer in self.quantizers.values():
            cast(Quantizer, quantizer).round_parameters()

    def store_as(self, settings: Pack) -> None:
        """Put the parameters of every quantizer at values that a file holds."""
        for quantizer in self.quantizers.values():
            cast(Quantizer, quantizer).store_as(settings)

    def quantized(self, slot: str, x: Tensor, timestep: Tensor | None) -> Tensor:
        """The tensor of a slot as its quantizer, if there is one, has it."""
        return self.quantizers[slot](x, timestep) if slot in self.quantizers else x


class QuantizedProduct(QuantizedOperands):
    """The matrix product of two activations."""

    def forward(self, left: Tensor, right: Tensor, *, timestep: Tensor | None = None) -> Tensor:
        """[..., n, k] and [..., k, m] -> [..., n, m]; ``timestep`` [B] is for per-timestep quantizers."""
        return self.quantized(LEFT, left, timestep) @ self.quantized(RIGHT, right, timestep)

    def operands(self, left: Tensor, right: Tensor, *, timestep: Tensor | None = None) -> Mapping[str, Tensor]:
        """The two operands as they are."""
        return {LEFT: left, RIGHT: right}
