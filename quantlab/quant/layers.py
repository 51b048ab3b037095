"""Quantized layers: torch's own linear and convolution with quantizers on their two inputs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import Pack
from quantlab.contracts.tuning import AdapterSpec, AdapterStart
from quantlab.quant.adapter import LowRankAdapter
from quantlab.quant.branch import LowRankBranch


class _Quantized(nn.Module):
    """What both layers share. The engine fills in the parts; a part that is None does nothing.

    Attributes:
        weight_quantizer: of the weight.
        input_quantizer: of the input.
        smoothing: per-input-channel scales [in]; the weight is multiplied by them and the input by their reciprocals.
        adapter: a low-rank change of the weight, merged into it when tuning is done.
        stored: gives the quantized weight in the place of ``weight``, which then holds nothing: of a layer of a packed
            file that stays packed.
        branch: a low-rank product in float beside the quantized weight, on the smoothed input before quantization.
        gradient_checkpointing: recompute the layer in the backward pass instead of keeping what it needs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    smoothing: Tensor | None
    adapter: LowRankAdapter | None
    branch: LowRankBranch | None
    stored: nn.Module | None
    gradient_checkpointing: bool
    _frozen_weight: Tensor | None

    def _make_quantized(self) -> None:
        for name in ("weight_quantizer", "input_quantizer", "adapter", "branch", "stored"):
            self.register_module(name, None)
        self.register_buffer("smoothing", None)
        self.register_buffer("_frozen_weight", None, persistent=False)
        self.gradient_checkpointing = False

    def add_adapter(self, spec: AdapterSpec, rng: torch.Generator) -> None:
        """Add a low-rank adapter whose random start is drawn from ``rng``; the others need the weight's quantizer."""
        adapter = LowRankAdapter(self.weight, spec, rng)
        if spec.start is not AdapterStart.RANDOM:
            error = self._quantization_error()
            adapter.approximate(error)
            if spec.start is AdapterStart.QUANTIZED_BASE:
                with torch.no_grad():
                    self.weight.sub_(error)
        self.adapter = adapter

    def merge_adapter(self) -> None:
        """Add the adapter's change to the weight and drop the adapter."""
        if self.adapter is not None:
            with torch.no_grad():
                self.weight.add_(self.adapter.delta())
            self.adapter = None

    def add_branch(self, rank: int) -> None:
        """Add a low-rank branch of zeros; what it takes over is to be taken from the weight."""
        self.branch = LowRankBranch(self.weight, rank, getattr(self, "groups", 1))

    def float_weight(self) -> Tensor:
        """The weight with adapter and smoothing, before quantization [out, in / groups, *k]."""
        weight = self.weight if self.adapter is None else self.weight + self.adapter.delta()
        return weight if self.smoothing is None else (weight * self._weight_smoothing()).to(weight.dtype)

    def set_float_weight(self, weight: Tensor) -> None:
        """Change the weight so that ``float_weight`` gives this one; the adapter must be merged before."""
        assert self.adapter is None, "an adapter would be added to the new weight"
        with torch.no_grad():
            self.weight.copy_(weight if self.smoothing is None else weight / self._weight_smoothing())

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if self.stored is not None:
            return self.stored()
        weight = self.float_weight()
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def effective_weight(self) -> Tensor:
        """The quantized weight with the smoothing undone: what stands in the place of the float weight."""
        weight = self.quantized_weight()
        return weight if self.smoothing is None else weight / self._weight_smoothing()

    def _quantization_error(self) -> Tensor:
        """Weight minus quantized weight, smoothing undone, so that it can be added to the weight."""
        with torch.no_grad():
            error = self.float_weight() - self.quantized_weight()
            return error if self.smoothing is None else (error / self._weight_smoothing()).to(error.dtype)

    def freeze(self) -> None:
        """Keep the quantized weight for inference; ``thaw`` drops it again."""
        with torch.no_grad():
            self._frozen_weight = self.quantized_weight().detach()

    def use_weight(self, weight: Tensor) -> None:
        """Compute with this smoothed weight [out, in / groups, *k] until ``thaw``; gradients reach it."""
        self._frozen_weight = weight

    def store_as(self, settings: Pack) -> None:
        """Put the parameters of both quantizers at values that a file with these settings holds."""
        for quantizer in (self.weight_quantizer, self.input_quantizer):
            if quantizer is not None:
                quantizer.store_as(settings)

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

    def smoothed_input(self, x: Tensor) -> Tensor:
        """The input divided by the smoothing scales, before quantization; the shape and dtype of x."""
        if self.smoothing is None:
            return x
        reciprocal = 1 / self.smoothing
        # A convolution's channels are dimension 1, a linear layer's the last.
        shape = (-1, *(1,) * (x.dim() - 2)) if isinstance(self, nn.Conv2d) else (-1,)
        return (x * reciprocal.view(shape)).to(x.dtype)

    def quantized_input(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        """The input that the quantized weight is applied to: smoothed, then quantized."""
        x = self.smoothed_input(x)
        return x if self.input_quantizer is None else self.input_quantizer(x, timestep)

    def _compute(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        weight = self.quantized_weight() if self._frozen_weight is None else self._frozen_weight
        y = self.apply_weight(self.quantized_input(x, timestep), weight, self.bias)
        return y if self.branch is None else y + self._apply_branch(self.smoothed_input(x), self.branch)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own operation with another weight [out, in / groups, *k] and bias [out]."""
        raise NotImplementedError

    def _apply_branch(self, x: Tensor, branch: LowRankBranch) -> Tensor:
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

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, weight, bias)

    def _apply_branch(self, x: Tensor, branch: LowRankBranch) -> Tensor:
        return F.linear(F.linear(x, branch.A), branch.B)


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """A 2D convolution with quantizers."""

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; ``timestep`` [B] for per-timestep quantizers."""
        return self._run(x, timestep)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']."""
        return self._conv_forward(x, weight, bias)

    def _apply_branch(self, x: Tensor, branch: LowRankBranch) -> Tensor:
        return F.conv2d(self._conv_forward(x, branch.A, None), branch.B, groups=self.groups)


def to_quantized(module: nn.Linear | nn.Conv2d) -> QuantizedLinear | QuantizedConv2d:
    """A quantized layer that takes over everything of ``module``: the same Parameter objects, hooks and names."""
    cls = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedConv2d
    layer = cls.__new__(cls)
    layer.__dict__ = module.__dict__
    layer._make_quantized()
    return layer
