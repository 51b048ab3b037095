"""Quantizers of their own for the parts of a tensor that a concatenation joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from quantlab.contracts.quant import QParams
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import Pack


class SplitQuantizer(Quantizer):
    """Quantizes parts of a tensor, split along one dimension, each with its own range (Q-Diffusion, arXiv 2302.04304).

    Args:
        parts: one quantizer for each part.
        sizes: of the parts along the dimension.
        dim: the dimension: 1 of a convolution's input and of a weight, -1 of a linear layer's input.
    """

    name: ClassVar[str] = "split"

    def __init__(self, parts: Sequence[Quantizer], sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.parts, self.sizes, self.dim = nn.ModuleList(parts), tuple(sizes), dim

    def _quantizers(self) -> list[Quantizer]:
        return [cast(Quantizer, part) for part in self.parts]

    def observe(self, x: Tensor, timestep: Tensor | None = None) -> None:
        """Show each part of x to its quantizer."""
        for quantizer, part in zip(self._quantizers(), x.split(self.sizes, self.dim), strict=True):
            quantizer.observe(part, timestep)

    def freeze(self) -> None:
        """Turn what was observed into parameters, part by part."""
        for quantizer in self._quantizers():
            quantizer.freeze()

    def choose(self, output_error: Callable[[], float]) -> None:
        """Let every part decide, those before it decided, those after it as they are."""
        for quantizer in self._quantizers():
            quantizer.choose(output_error)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantize and dequantize each part of x."""
        parts = zip(self._quantizers(), x.split(self.sizes, self.dim), strict=True)
        return torch.cat([quantizer(part, timestep) for quantizer, part in parts], self.dim)

    def round_parameters(self) -> None:
        """Put the parameters of every part at their rounded values."""
        for quantizer in self._quantizers():
            quantizer.round_parameters()

    def store_as(self, settings: Pack) -> None:
        """Put the parameters of every part at values that a file holds."""
        for quantizer in self._quantizers():
            quantizer.store_as(settings)

    def constrain(self) -> None:
        """Bring the parameters of every part back to where they must be."""
        for quantizer in self._quantizers():
            quantizer.constrain()

    def qparams(self) -> QParams | None:
        """What the parts store, stacked; None if one of them cannot be packed."""
        parts = [part for quantizer in self._quantizers() if (part := quantizer.qparams()) is not None]
        if len(parts) != len(self.sizes):
            return None
        first = parts[0]
        return QParams(
            torch.stack([part.scale for part in parts]),
            torch.stack([part.zero_point for part in parts]),
            first.quant_min,
            first.quant_max,
            first.axis,
            first.timesteps,
            first.round_zero_point,
            self.sizes,
            first.scale_bytes,
        )

    def extra_bytes(self) -> int:
        """What the formats of the parts store besides."""
        return sum(quantizer.extra_bytes() for quantizer in self._quantizers())


def parts_of(quantizer: Quantizer, x: Tensor) -> list[tuple[Quantizer, Tensor]]:
    """The quantizers of the parts of x, each with its part; quantizer and x where it is quantized in one piece."""
    if not isinstance(quantizer, SplitQuantizer):
        return [(quantizer, x)]
    parts = x.split(quantizer.sizes, quantizer.dim)
    return [(cast(Quantizer, part), value) for part, value in zip(quantizer.parts, parts, strict=True)]
