"""What a quantized network costs: bytes and bit operations, by one convention for all methods.

Weights lie packed at their own bits, a site's channels of one width together and rounded up to whole bytes. A site
with mixed widths stores its width for every channel in 3 bits. Scales are float16; a zero point is one byte when it is
rounded and float16 when it is free. Activations store a scale and a zero point for each slot and calibrated timestep
and, where they depend on the timestep, the timestep in 2 bytes. Smoothing scales are float16. Everything that stays
float (biases, norms, embeddings, float sites) has the float model's own width. One bit operation is one bit of the
weight times one bit of the activation in one multiply-accumulate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.contracts.allocation import FLOAT_BITS

SCALE_BYTES = 2
ZERO_POINT_BYTES = 1
FREE_ZERO_POINT_BYTES = 2
TIMESTEP_BYTES = 2
SMOOTHING_BYTES = 2
WIDTH_BITS = 3


@dataclass(frozen=True)
class SiteCost:
    """What the accounting must know about one site.

    Attributes:
        macs: multiply-accumulates at batch 1.
        weights_per_channel: in / groups times the kernel.
        weight_bits: integer [out], FLOAT_BITS where it stays float.
        activation_bits: FLOAT_BITS where the input stays float.
        activation_entries: stored timesteps of the input's quantizer, 1 for a static one.
        per_timestep: the input's scale depends on the timestep.
        round_zero_point: zero points are integers.
        smoothing_channels: input channels with a smoothing scale, 0 for none.
        adapter_values: parameters of an adapter that is not merged.
    """

    macs: int
    weights_per_channel: int
    weight_bits: Tensor
    activation_bits: int
    activation_entries: int = 1
    per_timestep: bool = False
    round_zero_point: bool = True
    smoothing_channels: int = 0
    adapter_values: int = 0


@dataclass(frozen=True)
class Accounting:
    """Bytes and bit operations of a network.

    Attributes:
        weight_bytes: packed codes.
        scale_bytes: scales of weights.
        zero_point_bytes: zero points of weights.
        index_bytes: widths of the channels of mixed sites.
        activation_bytes: tables of the activations.
        smoothing_bytes: smoothing scales.
        adapter_bytes: adapters that were not merged.
        float_bytes: everything that stays float.
        float_model_bytes: of the float network.
        macs: multiply-accumulates of all sites.
        quantized_macs: those with a quantized weight and a quantized input.
        bit_operations: of all sites.
    """

    weight_bytes: int
    scale_bytes: int
    zero_point_bytes: int
    index_bytes: int
    activation_bytes: int
    smoothing_bytes: int
    adapter_bytes: int
    float_bytes: int
    float_model_bytes: int
    macs: int
    quantized_macs: int
    bit_operations: int

    @property
    def total_bytes(self) -> int:
        """Everything that a file must hold."""
        return (
            self.weight_bytes
            + self.scale_bytes
            + self.zero_point_bytes
            + self.index_bytes
            + self.activation_bytes
            + self.smoothing_bytes
            + self.adapter_bytes
            + self.float_bytes
        )

    @property
    def coverage(self) -> float:
        """Share of the multiply-accumulates that are quantized."""
        return self.quantized_macs / self.macs if self.macs else 0.0


def account(sites: Sequence[SiteCost], parameter_count: int, float_value_bytes: int = 4) -> Accounting:
    """Add up the costs of a network.

    Args:
        sites: every site, float ones included.
        parameter_count: all parameters and persistent buffers of the float network.
        float_value_bytes: of one value that stays float.
    """
    quantized = [site for site in sites if is_quantized(site)]
    inputs = [site for site in sites if site.activation_bits != FLOAT_BITS]
    coded = sum(site.weights_per_channel * len(site.weight_bits) for site in quantized)
    return Accounting(
        weight_bytes=sum(packed_bytes(site.weight_bits, site.weights_per_channel) for site in quantized),
        scale_bytes=sum(SCALE_BYTES * len(site.weight_bits) for site in quantized),
        zero_point_bytes=sum(_zero_point_bytes(site) * len(site.weight_bits) for site in quantized),
        index_bytes=sum(-(-WIDTH_BITS * len(site.weight_bits) // 8) for site in quantized if _is_mixed(site)),
        activation_bytes=sum(_activation_bytes(site) for site in inputs),
        smoothing_bytes=sum(SMOOTHING_BYTES * site.smoothing_channels for site in sites),
        adapter_bytes=sum(float_value_bytes * site.adapter_values for site in sites),
        float_bytes=float_value_bytes * (parameter_count - coded),
        float_model_bytes=float_value_bytes * parameter_count,
        macs=sum(site.macs for site in sites),
        quantized_macs=sum(site.macs for site in quantized if site.activation_bits != FLOAT_BITS),
        bit_operations=sum(_bit_operations(site) for site in sites),
    )


def packed_bytes(bits: Tensor, weights_per_channel: int) -> int:
    """Bytes of a weight's codes: the channels of one width together, rounded up to whole bytes."""
    widths, counts = torch.unique(bits.to(torch.int64), return_counts=True)
    pairs = zip(widths.tolist(), counts.tolist(), strict=True)
    return sum(-(-width * count * weights_per_channel // 8) for width, count in pairs)


def is_quantized(site: SiteCost) -> bool:
    """Whether the weight of a site is quantized."""
    return bool((site.weight_bits != FLOAT_BITS).all()) and len(site.weight_bits) > 0


def _is_mixed(site: SiteCost) -> bool:
    return bool((site.weight_bits != site.weight_bits[0]).any())


def _zero_point_bytes(site: SiteCost) -> int:
    return ZERO_POINT_BYTES if site.round_zero_point else FREE_ZERO_POINT_BYTES


def _activation_bytes(site: SiteCost) -> int:
    entry = SCALE_BYTES + _zero_point_bytes(site) + (TIMESTEP_BYTES if site.per_timestep else 0)
    return entry * site.activation_entries


def _bit_operations(site: SiteCost) -> int:
    """Every output channel does the same share of the site's multiply-accumulates."""
    if not len(site.weight_bits):
        return site.macs * FLOAT_BITS * site.activation_bits
    per_channel = site.macs / len(site.weight_bits)
    return round(per_channel * int(site.weight_bits.to(torch.int64).sum()) * site.activation_bits)
