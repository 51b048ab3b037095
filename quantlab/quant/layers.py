"""Quantized layers: torch's own linear and convolution with quantizers on their two inputs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.tuning import AdapterSpec
from quantlab.quant.adapter import LowRankAdapter


class _Quantized(nn.Module):
    """What both layers share. The engine fills in the parts; a part that is None does nothing.

    Attributes:
        weight_quantizer: of the weight.
        input_quantizer: of the input.
        smoothing: per-input-channel scales [in]; the weight is multiplied by them and the input by their reciprocals.
        adapter: a low-rank change of the weight.
        gradient_checkpointing: recompute the layer in the backward pass instead of keeping what it needs.
    """

    weight: nn.Parameter
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    smoothing: Tensor | None
    adapter: LowRankAdapter | None
    gradient_checkpointing: bool
    _frozen_weight: Tensor | None

    def _make_quantized(self) -> None:
        for name in ("weight_quantizer", "input_quantizer", "adapter"):
            self.register_module(name, None)
        self.register_buffer("smoothing", None)
        self.register_buffer("_frozen_weight", None, persistent=False)
        self.gradient_checkpointing = False

    def add_adapter(self, spec: AdapterSpec, rng: torch.Generator) -> None:
        """Add a low-rank adapter whose start is drawn from ``rng``."""
        self.adapter = LowRankAdapter(self.weight, spec, rng)

    def merge_adapter(self) -> None:
        """Add the adapter's change to the weight and drop the adapter."""
        if self.adapter is not None:
            with torch.no_grad():
                self.weight.add_(self.adapter.delta())
            self.adapter = None

    def float_weight(self) -> Tensor:
        """The weight with adapter and smoothing, before quantization [out, in / groups, *k]."""
        weight = self.weight if self.adapter is None else self.weight + self.adapter.delta()
        return weight if self.smoothing is None else (weight * self._weight_smoothing()).to(weight.dtype)

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        weight = self.float_weight()
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def effective_weight(self) -> Tensor:
        """The quantized weight with the smoothing undone: what stands in the place of the float weight."""
        weight = self.quantized_weight()
        return weight if self.smoothing is None else weight / self._weight_smoothing()

    def freeze(self) -> None:
        """Keep the quantized weight for inference; ``thaw`` drops it again."""
        with torch.no_grad():
            self._frozen_weight = self.quantized_weight().detach()

    def thaw(self) -> None:
        """Quantize the weight at every call again."""
        self._frozen_weight = None

    def _weight_smoothing(self) -> Tensor:
        assert self.smoothing is not None
        groups = getattr(self, "groups", 1)
        if groups == 1:
            return self.smoothing.view(1, -1, *(1,) * (self.weight.dim() - 2))
        # Group g of the outputs reads group g of the inputs.
        scales = self.smoothing.view(groups, -1).repeat_interleave(self.weight.shape[0] // groups, 0)
        return scales.view(*scales.shape, *(1,) * (self.weight.dim() - 2))

    def _quantized_input(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        if self.smoothing is not None:
            reciprocal = 1 / self.smoothing
            # A convolution's channels are dimension 1, a linear layer's the last.
            shape = (-1, *(1,) * (x.dim() - 2)) if isinstance(self, nn.Conv2d) else (-1,)
            x = (x * reciprocal.view(shape)).to(x.dtype)
        if self.input_quantizer is None:
            return x
        return self.input_quantizer(x, timestep)

    def _compute(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        weight = self.quantized_weight() if self._frozen_weight is None else self._frozen_weight
        return self._apply_weight(self._quantized_input(x, timestep), weight)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._compute, x, timestep, use_reentrant=False))
        return self._compute(x, timestep)


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer with quantizers; x is [..., in] of any number of dimensions."""

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """[B, ..., in] -> [B, ..., out]; ``timestep`` [B] for per-timestep quantizers."""
        return self._run(x, timestep)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """A 2D convolution with quantizers."""

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; ``timestep`` [B] for per-timestep quantizers."""
        return self._run(x, timestep)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


def to_quantized(module: nn.Linear | nn.Conv2d) -> QuantizedLinear | QuantizedConv2d:
    """A quantized layer that takes over everything of ``module``: the same Parameter objects, hooks and names."""
    cls = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedConv2d
    layer = cls.__new__(cls)
    layer.__dict__ = module.__dict__
    layer._make_quantized()
    return layer
