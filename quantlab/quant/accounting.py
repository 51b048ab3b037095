"""What a quantized network costs: bytes and bit operations, by one convention for all methods.

Weights lie packed at their own bits, a site's channels of one width together and rounded up to whole bytes. A site
with mixed widths stores its width for every channel in 3 bits. Scales and smoothing scales are float32, as the model
computes with them, unless the recipe has scales rounded to float16. A rounded zero point is an integer as wide as its
site's values need, a free one float32.
A format of its own says what it stores besides.
Activations store a scale and a zero point for each slot and calibrated timestep and, where they depend on the
timestep, the timestep in 2 bytes; corrections of the sampler store their tensors and such a timestep for each recorded
step. Where the parts of a skip concatenation are quantized apart, each has its own scales in the activation and in the
weight that reads it. Everything that stays float (biases, norms, embeddings, float sites, buffers) has the float
model's own width and is counted once however many modules share it. A low-rank branch stores its factors in float16.
A packed file's tensors have exactly this size; its description and its graph come on top.
One bit operation is one bit of the weight, or of the other operand where two activations are multiplied, times one bit
of the activation in one multiply-accumulate; those of a branch are counted at 16 times 16 bits, as multiply-accumulates
that are not quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.contracts.allocation import FLOAT_BITS

ACCOUNTING_VERSION = 2
"""Raised when the convention changes, so that sizes by different ones never meet in a table."""
SCALE_BYTES = 4
SMOOTHING_BYTES = 4
FREE_ZERO_POINT_BYTES = 4
TIMESTEP_BYTES = 2
WIDTH_BITS = 3
BRANCH_BITS = 16
"""Of the factors of a low-rank branch and of what they are multiplied by."""


@dataclass(frozen=True)
class FloatModel:
    """What the float network stores.

    Attributes:
        tensors: bytes and names of every parameter and persistent buffer; a shared one has several names.
    """

    tensors: tuple[tuple[int, frozenset[str]], ...]

    @classmethod
    def of(cls, network: nn.Module) -> FloatModel:
        """The float model of a network."""
        names: dict[int, set[str]] = {}
        values = network.state_dict(keep_vars=True)
        for name, value in values.items():
            names.setdefault(id(value), set()).add(name)
        sizes = {id(value): value.numel() * value.element_size() for value in values.values()}
        return cls(tuple((sizes[key], frozenset(found)) for key, found in names.items()))

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return sum(size for size, _ in self.tensors)

    def without(self, replaced: Collection[str]) -> int:
        """Bytes that are left when the tensors ``replaced`` go; a shared one stays while anyone else needs it."""
        return sum(size for size, names in self.tensors if not names <= set(replaced))


@dataclass(frozen=True)
class Product:
    """A product of two activations.

    Attributes:
        macs: multiply-accumulates at batch 1.
        bits: of its two operands.
    """

    macs: int
    bits: tuple[int, int]


@dataclass(frozen=True)
class SiteCost:
    """What the accounting must know about one site.

    Attributes:
        name: of the site; its weight is the float model's tensor ``name.weight``.
        macs: multiply-accumulates at batch 1.
        weights_per_channel: in / groups times the kernel.
        weight_bits: integer [out], FLOAT_BITS where it stays float.
        activation_bits: FLOAT_BITS where the input stays float.
        activation_entries: stored timesteps of the input's quantizer, 1 for a static one, times the parts of a split.
        per_timestep: the input's scale depends on the timestep.
        weight_zero_point_bytes: of one zero point of the weight, see ``zero_point_bytes``.
        activation_zero_point_bytes: of one zero point of the input.
        weight_scale_bytes: of one scale of the weight.
        activation_scale_bytes: of one scale of the input.
        weight_scales_per_channel: 1, or the parts of a skip concatenation that are quantized apart.
        smoothing_channels: input channels with a smoothing scale, 0 for none.
        adapter_bytes: of an adapter that is not merged.
        extra_bytes: what the format of the weight or the input stores besides, see ``Quantizer.extra_bytes``.
        branch_values: of both factors of a low-rank branch, 0 for none.
        products: of an attention with quantized operands; together they have the site's ``macs``.
        operand_bytes: tables of the operands of these products.
        input_elements: of all inputs of one forward at batch 1.
    """

    name: str
    macs: int
    weights_per_channel: int
    weight_bits: Tensor
    activation_bits: int
    activation_entries: int = 1
    per_timestep: bool = False
    weight_zero_point_bytes: int = 1
    activation_zero_point_bytes: int = 1
    weight_scale_bytes: int = SCALE_BYTES
    activation_scale_bytes: int = SCALE_BYTES
    weight_scales_per_channel: int = 1
    smoothing_channels: int = 0
    adapter_bytes: int = 0
    extra_bytes: int = 0
    branch_values: int = 0
    products: tuple[Product, ...] = ()
    operand_bytes: int = 0
    input_elements: int = 0

    @property
    def branch_macs(self) -> int:
        """Multiply-accumulates of the branch: one for each of its values at each position of the output."""
        weights = self.weights_per_channel * len(self.weight_bits)
        return self.macs // weights * self.branch_values if weights else 0


@dataclass(frozen=True)
class Accounting:
    """Bytes and bit operations of a network.

    Attributes:
        weight_bytes: packed codes.
        scale_bytes: scales of weights, and what formats of their own store besides.
        zero_point_bytes: zero points of weights.
        index_bytes: widths of the channels of mixed sites.
        activation_bytes: tables of the activations.
        smoothing_bytes: smoothing scales.
        adapter_bytes: adapters that were not merged.
        branch_bytes: low-rank branches.
        float_bytes: everything that stays float.
        float_model_bytes: of the float network.
        macs: multiply-accumulates of all sites and of their branches.
        quantized_macs: those with a quantized weight and a quantized input.
        bit_operations: of all sites.
        activation_memory_bytes: of the inputs of all quantized sites at batch 1, each at its own bits and rounded up to
            whole bytes; an input that several sites read counts for each, since each quantizes it for itself.
        correction_bytes: what corrections of the sampler store.
        other_macs: multiply-accumulates outside every site, which stay float; no bit operations are counted for them.
    """

    weight_bytes: int
    scale_bytes: int
    zero_point_bytes: int
    index_bytes: int
    activation_bytes: int
    smoothing_bytes: int
    adapter_bytes: int
    branch_bytes: int
    float_bytes: int
    float_model_bytes: int
    macs: int
    quantized_macs: int
    bit_operations: int
    activation_memory_bytes: int
    correction_bytes: int = 0
    other_macs: int = 0

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
            + self.branch_bytes
            + self.float_bytes
            + self.correction_bytes
        )

    @property
    def coverage(self) -> float:
        """Share of all multiply-accumulates that are quantized, those outside every site included."""
        total = self.macs + self.other_macs
        return self.quantized_macs / total if total else 0.0


def account(sites: Sequence[SiteCost], float_model: FloatModel) -> Accounting:
    """Add up the costs of a network.

    Args:
        sites: every site, float ones included.
        float_model: of the float network.
    """
    quantized = [site for site in sites if is_quantized(site)]
    inputs = [site for site in sites if site.activation_bits != FLOAT_BITS]
    products = [product for site in sites for product in site.products if FLOAT_BITS not in product.bits]
    return Accounting(
        weight_bytes=sum(packed_bytes(site.weight_bits, site.weights_per_channel) for site in quantized),
        scale_bytes=sum(site.weight_scale_bytes * _weight_scales(site) for site in quantized)
        + sum(site.extra_bytes for site in sites),
        zero_point_bytes=sum(site.weight_zero_point_bytes * _weight_scales(site) for site in quantized),
        index_bytes=sum(index_bytes(len(site.weight_bits)) for site in quantized if _is_mixed(site)),
        activation_bytes=sum(_activation_bytes(site) for site in inputs),
        smoothing_bytes=sum(SMOOTHING_BYTES * site.smoothing_channels for site in sites),
        adapter_bytes=sum(site.adapter_bytes for site in sites),
        branch_bytes=sum(BRANCH_BITS // 8 * site.branch_values for site in sites),
        float_bytes=float_model.without({f"{site.name}.weight" for site in quantized}),
        float_model_bytes=float_model.total_bytes,
        macs=sum(site.macs + site.branch_macs for site in sites),
        quantized_macs=sum(site.macs for site in quantized if site.activation_bits != FLOAT_BITS)
        + sum(product.macs for product in products),
        bit_operations=sum(_bit_operations(site) for site in sites),
        activation_memory_bytes=sum(-(-site.input_elements * site.activation_bits // 8) for site in inputs),
    )


def zero_point_bytes(zero_point: Tensor, rounded: bool) -> int:
    """Bytes of one zero point: the smallest integer, signed or not, that holds a tensor's, float32 for free ones."""
    return zero_point_dtype(zero_point).itemsize if rounded else FREE_ZERO_POINT_BYTES


def zero_point_dtype(zero_point: Tensor) -> torch.dtype:
    """The smallest integer type that holds a tensor's rounded zero points."""
    for kind in (torch.uint8, torch.int8, torch.uint16, torch.int16):
        limits = torch.iinfo(kind)
        if bool(((zero_point >= limits.min) & (zero_point <= limits.max)).all()):
            return kind
    return torch.int32


def packed_bytes(bits: Tensor, weights_per_channel: int) -> int:
    """Bytes of a weight's codes: the channels of one width together, rounded up to whole bytes."""
    widths, counts = torch.unique(bits.to(torch.int64), return_counts=True)
    pairs = zip(widths.tolist(), counts.tolist(), strict=True)
    return sum(-(-width * count * weights_per_channel // 8) for width, count in pairs)


def index_bytes(channels: int) -> int:
    """Bytes of the widths of a mixed site's channels."""
    return -(-WIDTH_BITS * channels // 8)


def is_quantized(site: SiteCost) -> bool:
    """Whether the weight of a site is quantized."""
    return bool((site.weight_bits != FLOAT_BITS).all()) and len(site.weight_bits) > 0


def _is_mixed(site: SiteCost) -> bool:
    return bool((site.weight_bits != site.weight_bits[0]).any())


def _weight_scales(site: SiteCost) -> int:
    return len(site.weight_bits) * site.weight_scales_per_channel


def _activation_bytes(site: SiteCost) -> int:
    if site.products:
        return site.operand_bytes
    zero_point_bytes, scale_bytes = site.activation_zero_point_bytes, site.activation_scale_bytes
    return table_bytes(site.activation_entries, zero_point_bytes, site.per_timestep, scale_bytes)


def table_bytes(entries: int, zero_point_bytes: int, per_timestep: bool, scale_bytes: int = SCALE_BYTES) -> int:
    """Bytes of the table of an activation: scales, zero points, and timesteps where they depend on them."""
    return (scale_bytes + zero_point_bytes + (TIMESTEP_BYTES if per_timestep else 0)) * entries


def _bit_operations(site: SiteCost) -> int:
    """Every output channel does the same share of the site's multiply-accumulates; a branch comes on top."""
    if site.products:
        return sum(product.macs * product.bits[0] * product.bits[1] for product in site.products)
    if not len(site.weight_bits):
        return site.macs * FLOAT_BITS * site.activation_bits
    per_channel = site.macs / len(site.weight_bits)
    own = round(per_channel * int(site.weight_bits.to(torch.int64).sum()) * site.activation_bits)
    return own + site.branch_macs * BRANCH_BITS**2
