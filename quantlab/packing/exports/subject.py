"""What is exported: a quantized network with its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A quantized network to export; the export works on a copy.

    Attributes:
        network: with ``QuantizedLinear`` and ``QuantizedConv2d`` layers.
        forward: runs a copy of the network on tensors by name.
        method: that quantized it, "" when it is not known.
        recipe: what it was quantized by, for the file's description.
        config: what a model of diffusers is built from; {} for any other.
    """

    network: nn.Module
    forward: Callable[[nn.Module, Mapping[str, Tensor]], Any]
    method: str = ""
    recipe: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
