"""Measured facts about sites, from tensors in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.contracts.allocation import SiteData
from quantlab.contracts.quant import Observer
from quantlab.contracts.scores import ScoreRequest
from quantlab.errors import PluginError
from quantlab.quant.functional import fake_quantize, per_channel, search_scale
from quantlab.quant.operation import Weighted, channel_dim, compute, rows_of

Compute = Callable[[Tensor, Tensor], Tensor]
"""A site's operation on an input and a weight."""

Patches = Callable[[Tensor], Tensor]
"""What the weights of a site multiply, out of an input: [rows, groups, in / groups * prod(k)]."""

PATCH_ELEMENTS = 1 << 22
"""Elements of patches in memory at once."""
INPUT_SEARCH_ELEMENTS = 8192
"""Elements of an input on which the MSE search for its range judges candidates."""
CLOSE_ERRORS = 1e-3
"""Output errors that differ relatively by less are compared by ``output_error`` itself."""
ROUNDING_ENERGY = 1e-9
"""Output errors below this part of the output's mean square may be rounding alone."""


@dataclass(frozen=True)
class SiteRecord:
    """A site's tensors.

    Attributes:
        weight: float32 [out, in / groups, *k], whatever the network computes in.
        inputs: calibration inputs, float32 [B, in, ...] of a convolution, [B, ..., in] of a linear layer; indices of
            an embedding.
        channel_dim: the input dimension that holds the channels.
        groups: of a convolution.
        compute: the operation.
        patches: what the weights multiply.
        smoothing: per-input-channel scales [in], or None.
    """

    weight: Tensor
    inputs: tuple[Tensor, ...]
    channel_dim: int
    groups: int
    compute: Compute
    patches: Patches
    smoothing: Tensor | None = None

    @classmethod
    def of_layer(cls, module: nn.Module, inputs: tuple[Tensor, ...]) -> SiteRecord:
        """The record of a layer with a weight that saw ``inputs``."""
        layer = cast(Weighted, module)
        weight = rows_of(layer, layer.weight.detach()).float()
        inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
        own_bias = getattr(layer, "bias", None)
        bias = None if own_bias is None else own_bias.detach().float()
        return cls(
            weight=weight,
            inputs=inputs,
            channel_dim=channel_dim(layer),
            groups=getattr(layer, "groups", 1),
            compute=lambda x, w: compute(layer, x, w, bias),
            patches=lambda x: _patches(layer, weight, x),
        )

    def weight_absmax(self) -> Tensor:
        """Largest magnitude of the weights that read each input channel [in]."""
        out, fan = self.weight.shape[:2]
        by_group = self.weight.abs().reshape(self.groups, out // self.groups, fan, -1)
        return by_group.amax((1, 3)).flatten()

    def input_absmax(self) -> Tensor:
        """Largest magnitude of each input channel [in], before smoothing."""
        return torch.stack([self._channels_last(x).abs().amax(0) for x in self.inputs]).amax(0)

    def smoothed_weight(self) -> Tensor:
        """The weight times the smoothing scales."""
        if self.smoothing is None:
            return self.weight
        scales = self.smoothing.view(self.groups, 1, -1).expand(-1, self.weight.shape[0] // self.groups, -1)
        scales = scales.reshape(self.weight.shape[0], -1)
        return self.weight * scales.view(*scales.shape, *(1,) * (self.weight.dim() - 2))

    def smoothed_inputs(self) -> Iterator[Tensor]:
        """The inputs divided by the smoothing scales."""
        for x in self.inputs:
            yield x if self.smoothing is None else x * per_channel(1 / self.smoothing, x.dim(), self.channel_dim)

    def patch_batches(self) -> Iterator[Tensor]:
        """What the weights multiply, smoothed, some samples at a time: [rows, groups, in / groups * prod(k)]."""
        for x in self.smoothed_inputs():
            elements = max(1, self.patches(x[:1]).numel())
            for part in x.split(max(1, PATCH_ELEMENTS // elements)):
                yield self.patches(part)

    def _channels_last(self, x: Tensor) -> Tensor:
        """[rows, in]."""
        return x.movedim(self.channel_dim, -1).flatten(0, -2)


def _patches(layer: Weighted, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    if isinstance(layer, nn.Conv2d):
        return _conv_patches(layer, x)
    # What the identity in the place of the weight gives.
    fan, groups = weight[0].numel(), getattr(layer, "groups", 1)
    identity = torch.eye(fan, dtype=x.dtype, device=x.device).view(fan, *weight.shape[1:])
    found = compute(layer, x, identity.repeat(groups, *(1,) * (weight.dim() - 1)), None)
    return found.movedim(1, -1).reshape(-1, groups, fan)


def _conv_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    kernel = cast(tuple[int, int], conv.kernel_size)
    columns = F.unfold(padded, kernel, cast(tuple[int, int], conv.dilation), 0, cast(tuple[int, int], conv.stride))
    return columns.transpose(1, 2).reshape(-1, conv.groups, columns.shape[1] // conv.groups)


class TensorSiteData(SiteData):
    """Facts about sites whose tensors are in memory; float outputs, scales and moments are computed once.

    Args:
        records: the sites' tensors.
        scores: what was computed for the policies beforehand.
        one_site: keep outputs, quantized inputs and Gram matrices of the last site alone, for records made on demand.
    """

    def __init__(
        self,
        records: Mapping[str, SiteRecord],
        scores: Mapping[ScoreRequest, Mapping[str, Tensor]] | None = None,
        *,
        one_site: bool = False,
    ) -> None:
        self._one_site, self._last = one_site, ""
        self._records = records
        self._scores = scores or {}
        self._moments: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._scales: dict[tuple[str, int, Observer], tuple[Tensor, Tensor]] = {}
        self._quantized_inputs: dict[tuple[str, int], list[Tensor]] = {}

    def weight(self, site: str) -> Tensor:
        """The float weight, smoothed."""
        return self._records[site].smoothed_weight()

    def inputs(self, site: str) -> Iterator[Tensor]:
        """Calibration inputs, smoothed."""
        return self._records[site].smoothed_inputs()

    def absmax(self, site: str) -> Tensor:
        """Largest magnitude of each input channel, before smoothing."""
        return self._records[site].input_absmax()

    def input_second_moment(self, site: str) -> Tensor:
        """E[x^2] of what each weight multiplies, float64 [groups, in / groups * prod(k)]."""
        if site not in self._moments:
            self._moments[site] = _mean_of(self._records[site], lambda rows: rows.double().square().sum(0))
        return self._moments[site]

    def input_gram(self, site: str) -> Tensor:
        """E[x x^T] of what the weights multiply, float64 [groups, n, n]."""
        self._visit(site)
        if site not in self._grams:
            self._grams[site] = _mean_of(
                self._records[site], lambda rows: torch.einsum("rgi,rgj->gij", rows, rows).double()
            )
        return self._grams[site]

    def score(self, request: ScoreRequest) -> Mapping[str, Tensor]:
        """A score that was declared, from what was computed beforehand."""
        if request not in self._scores:
            raise PluginError(
                "a policy asked for a score that it did not declare",
                where=f'score "{request.score}"',
                next_step="return the same request from the policy's `scores`",
            )
        return self._scores[request]

    def output_error(self, site: str, bits: Tensor, observer: Observer, input_bits: int | None) -> float:
        """Mean squared error of the site's output with quantized weights, and inputs if asked, against float."""
        record = self._records[site]
        weight = self.quantized_weight(site, bits, observer)
        inputs = list(record.smoothed_inputs()) if input_bits is None else self._inputs_at(site, input_bits)
        outputs = self._float_outputs(site)
        squared = [(record.compute(x, weight) - y).square() for x, y in zip(inputs, outputs, strict=True)]
        if len(squared) == 1:
            return squared[0].mean().item()
        return sum(part.double().sum().item() for part in squared) / sum(part.numel() for part in squared)

    def best_bits(self, site: str, candidates: Sequence[Tensor], observer: Observer, input_bits: int | None) -> int:
        """Index of the candidate with the least ``output_error``; the first of equals.

        An output channel's error depends on its own bits alone. So one product of the inputs for each width gives the
        errors of all candidates, however many; those too close to tell apart are judged by ``output_error``.
        """
        widths = sorted(set(torch.cat(list(candidates)).tolist()))
        if len(candidates) <= len(widths):
            return super().best_bits(site, candidates, observer, input_bits)
        outputs = self._float_outputs(site)
        inputs = list(self.inputs(site)) if input_bits is None else self._inputs_at(site, input_bits)
        errors = {width: self._channel_errors(site, width, observer, inputs) for width in widths}
        total = torch.stack([sum((errors[w] * (bits == w)).sum() for w in widths) for bits in candidates])  # type: ignore[misc]
        energy = sum(y.square().sum(dtype=torch.float64) for y in outputs)
        bound = total.nan_to_num(nan=math.inf).min() * (1 + CLOSE_ERRORS) + ROUNDING_ENERGY * energy
        close = [index for index, error in enumerate(total) if not error > bound]
        chosen = [candidates[index] for index in close]
        return close[super().best_bits(site, chosen, observer, input_bits) if len(close) > 1 else 0]

    def _channel_errors(self, site: str, width: int, observer: Observer, inputs: Sequence[Tensor]) -> Tensor:
        """Squared errors of every output channel when all have this width, summed over the rest: float64 [out]."""
        record = self._records[site]
        weight = self.quantized_weight(site, torch.full((len(record.weight),), width, dtype=torch.int8), observer)
        squared = (
            record.compute(x, weight).sub_(y).square_().movedim(record.channel_dim, -1).flatten(0, -2).double().sum(0)
            for x, y in zip(inputs, self._float_outputs(site), strict=True)
        )
        return cast(Tensor, sum(squared))

    def _visit(self, site: str) -> None:
        """Drop the large tensors of other sites, where only one site's are kept."""
        if self._one_site and site != self._last:
            for kept in (self._grams, self._outputs, self._quantized_inputs):
                kept.clear()
        self._last = site

    def _float_outputs(self, site: str) -> list[Tensor]:
        self._visit(site)
        if site not in self._outputs:
            record = self._records[site]
            self._outputs[site] = [record.compute(x, record.weight) for x in record.inputs]
        return self._outputs[site]

    def quantized_weight(self, site: str, bits: Tensor, observer: Observer) -> Tensor:
        """The smoothed weight, quantized."""
        weight = self.weight(site)
        scale, zero_point = weight.new_empty(len(bits)), weight.new_empty(len(bits))
        for width in sorted(set(bits.tolist())):
            chosen = bits == width
            found_scale, found_zero_point = self._scales_at(site, width, observer)
            scale[chosen], zero_point[chosen] = found_scale[chosen], found_zero_point[chosen]
        dims = weight.dim()
        levels = per_channel(2.0**bits - 1, dims)
        return fake_quantize(weight, per_channel(scale, dims), per_channel(zero_point, dims), levels)

    def _scales_at(self, site: str, width: int, observer: Observer) -> tuple[Tensor, Tensor]:
        """Scales of every channel at one width: the candidates of a search differ only in who has which."""
        key = (site, width, observer)
        if key not in self._scales:
            rows = self.weight(site).flatten(1)
            self._scales[key] = search_scale(rows, torch.full((len(rows),), width), observer)
        return self._scales[key]

    def _inputs_at(self, site: str, width: int) -> list[Tensor]:
        self._visit(site)
        key = (site, width)
        if key not in self._quantized_inputs:
            inputs = list(self.inputs(site))
            row = torch.cat([x.flatten() for x in inputs]).view(1, -1)
            scale, zero_point = search_scale(row, torch.tensor([width]), Observer.MSE, INPUT_SEARCH_ELEMENTS)
            self._quantized_inputs[key] = [fake_quantize(x, scale, zero_point, 2**width - 1) for x in inputs]
        return self._quantized_inputs[key]


def _mean_of(record: SiteRecord, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over all rows of patches, from sums over some of them."""
    found, rows = torch.zeros((), dtype=torch.float64), 0
    for patches in record.patch_batches():
        found = found + total(patches)
        rows += len(patches)
    return found / rows
