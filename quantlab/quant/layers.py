"""Quantized layers: torch's own layers with quantizers on their weight and their input."""

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
from quantlab.quant.operation import (
    TransposedConvolution,
    Weighted,
    channel_dim,
    compute,
    own_layout,
    pointwise,
    rows_of,
    rows_shape,
)


class QuantizedLayer(nn.Module):
    """What all quantized layers share. The engine fills in the parts; a part that is None does nothing.

    Every method speaks of weights as rows, [out, in / groups, *k]; ``weight`` itself has the layout of torch's layer.

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
    groups: int = 1
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
        adapter = LowRankAdapter(rows_of(self, self.weight), spec, rng)
        if spec.start is not AdapterStart.RANDOM:
            error = self._quantization_error()
            adapter.approximate(error)
            if spec.start is AdapterStart.QUANTIZED_BASE:
                with torch.no_grad():
                    self.weight.sub_(own_layout(self, error))
        self.adapter = adapter

    def merge_adapter(self) -> None:
        """Add the adapter's change to the weight and drop the adapter."""
        if self.adapter is not None:
            with torch.no_grad():
                self.weight.add_(own_layout(self, self.adapter.delta()))
            self.adapter = None

    @property
    def allows_branch(self) -> bool:
        """Whether a low-rank branch is defined: of a transposed convolution its cost is not that of its values."""
        return not isinstance(self, TransposedConvolution)

    def add_branch(self, rank: int) -> None:
        """Add a low-rank branch of zeros; what it takes over is to be taken from the weight.

        Raises:
            ValueError: the layer allows none.
        """
        if not self.allows_branch:
            raise ValueError("a transposed convolution has no low-rank branch")
        self.branch = LowRankBranch(self.weight, rank, self.groups)

    def float_weight(self) -> Tensor:
        """The weight with adapter and smoothing, before quantization [out, in / groups, *k]."""
        weight = rows_of(self, self.weight)
        weight = weight if self.adapter is None else weight + self.adapter.delta()
        return weight if self.smoothing is None else (weight * self._weight_smoothing()).to(weight.dtype)

    def set_float_weight(self, weight: Tensor) -> None:
        """Change the weight so that ``float_weight`` gives this one; the adapter must be merged before."""
        assert self.adapter is None, "an adapter would be added to the new weight"
        with torch.no_grad():
            rows = weight if self.smoothing is None else weight / self._weight_smoothing()
            self.weight.copy_(own_layout(self, rows))

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if self.stored is not None:
            return self.stored()
        weight = self.float_weight()
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def effective_weight(self) -> Tensor:
        """The quantized weight with the smoothing undone, in the layout of ``weight``: it stands in its place."""
        weight = self.quantized_weight()
        return own_layout(self, weight if self.smoothing is None else weight / self._weight_smoothing())

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

    @property
    def weight_shape(self) -> torch.Size:
        """Of the weight as rows: [out, in / groups, *k]."""
        return rows_shape(cast(Weighted, self))

    @property
    def input_channels(self) -> int:
        """Channels of the input, those of all groups together."""
        return self.weight_shape[1] * self.groups

    @property
    def channel_dim(self) -> int:
        """The dimension of input and output that holds the channels."""
        return channel_dim(self)

    def _weight_smoothing(self) -> Tensor:
        assert self.smoothing is not None
        groups, shape = self.groups, self.weight_shape
        if groups == 1:
            return self.smoothing.view(1, -1, *(1,) * (len(shape) - 2))
        # Group g of the outputs reads group g of the inputs.
        scales = self.smoothing.view(groups, -1).repeat_interleave(shape[0] // groups, 0)
        return scales.view(*scales.shape, *(1,) * (len(shape) - 2))

    def smoothed_input(self, x: Tensor) -> Tensor:
        """The input divided by the smoothing scales, before quantization; the shape and dtype of x."""
        if self.smoothing is None:
            return x
        reciprocal = 1 / self.smoothing
        shape = (-1, *(1,) * (x.dim() - 2)) if self.channel_dim == 1 else (-1,)
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
        return compute(self, x, weight, bias)

    def _apply_branch(self, x: Tensor, branch: LowRankBranch) -> Tensor:
        inner = compute(self, x, branch.A, None)
        return F.linear(inner, branch.B) if branch.B.dim() == 2 else pointwise(inner, branch.B, self.groups)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The layer's output on x [B, ...]; ``timestep`` [B] is for per-timestep quantizers."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._compute, x, timestep, use_reentrant=False))
        return self._compute(x, timestep)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantizers; x is [..., in] of any number of dimensions."""


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A 1D convolution with quantizers; x is [B, in, L]."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A 2D convolution with quantizers; x is [B, in, H, W]."""


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """A 3D convolution with quantizers; x is [B, in, D, H, W]."""


class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """A transposed 1D convolution with quantizers; x is [B, in, L]."""


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """A transposed 2D convolution with quantizers; x is [B, in, H, W]."""


class QuantizedConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    """A transposed 3D convolution with quantizers; x is [B, in, D, H, W]."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """An embedding with a quantized table, a scale for each row; x is indices [...], which stay as they are."""

    bias = None


_CLASSES: dict[type[Weighted], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
}


def to_quantized(module: Weighted) -> QuantizedLayer:
    """A quantized layer that takes over everything of ``module``: the same Parameter objects, hooks and names."""
    cls = next(quantized for plain, quantized in _CLASSES.items() if isinstance(module, plain))
    layer = cls.__new__(cls)
    layer.__dict__ = module.__dict__
    layer._make_quantized()
    return layer
