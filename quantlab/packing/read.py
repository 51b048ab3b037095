"""From a packed file to the network that computes as the simulated one did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.sections import ScaleType
from quantlab.errors import ArtefactError
from quantlab.graph.passes.insert_quantizers import quantize_at
from quantlab.graph.passes.replace_attention import attention_path
from quantlab.graph.serialize import from_json
from quantlab.packing.bitpack import WIDTH_BITS, channels_size, packed_size, unpack_widths
from quantlab.packing.blobs import BlobReader
from quantlab.packing.file import PackedFile, read_packed
from quantlab.packing.manifest import (
    CorrectionRecord,
    FloatRecord,
    Layout,
    Manifest,
    OperandsRecord,
    SiteRecord,
    WeightRecord,
    dtype_of,
)
from quantlab.packing.model import PackedModel
from quantlab.packing.network import build_network
from quantlab.packing.stored import PackedWeight
from quantlab.packing.tables import WEIGHT_SCALES, read_table, read_timesteps, read_zero_points, weight_quantizer
from quantlab.packing.trust import require_harmless
from quantlab.plugins import Kind, Registry, load_registry
from quantlab.quant.attention import QuantizedAttention
from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operands import QuantizedOperands, QuantizedProduct
from quantlab.quant.operation import Weighted


def load_packed(
    path: str | Path,
    device: str = "cpu",
    *,
    keep_packed: bool = False,
    network: nn.Module | None = None,
    registry: Registry | None = None,
) -> PackedModel:
    """The model of a packed file; no float weights of the original are needed.

    Args:
        path: the file.
        device: where to put it.
        keep_packed: layers keep their codes packed and unpack them whenever they run; otherwise all weights are
            unpacked now. Both compute the same to the bit.
        network: a module of the same structure, which is copied, where the file cannot build one: see
            ``PackedModel``.
        registry: plugins, for corrections of the sampler; the installed ones without it.

    Raises:
        ArtefactError: the file is truncated, foreign, newer or changed, or does not fit the network it names.
    """
    path = Path(path)
    file = read_packed(path)
    try:
        return _load(file, device, keep_packed, network, registry)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError("the file does not fit its own description", where=str(path), got=error) from error


def _load(
    file: PackedFile, device: str, keep_packed: bool, given: nn.Module | None, registry: Registry | None
) -> PackedModel:
    require_harmless(file.graph)
    manifest, layout = file.manifest, file.layout
    network = build_network(manifest.network, given, dtype_of(manifest.dtype))
    nn.Module.to(network, device=torch.device(device))
    _require_names(network, layout)
    blobs = BlobReader({name: value.to(device) for name, value in file.tensors.items()})
    weight_bits = {}
    for site in layout.sites:
        weight_bits[site.name] = _read_site(blobs, network, site, manifest.scales, keep_packed)
    for record in layout.attentions:
        _put_product(network, attention_path(record.name), _read_product(blobs, record, manifest, QuantizedAttention()))
    for record in layout.products:
        _put_product(network, record.name, _read_product(blobs, record, manifest, QuantizedProduct()))
    for record in layout.floats:
        _put_float(network, record, _read_float(blobs, record))
    corrections = tuple(_read_correction(blobs, record, registry) for record in layout.corrections)
    blobs.finish()
    nn.Module.to(network, device=torch.device(device)).requires_grad_(False)
    bits = BitMap(weight_bits, dict(_activation_bits(layout)))
    return PackedModel(network, from_json(file.graph), manifest, bits, corrections)


def _read_product(
    blobs: BlobReader, record: OperandsRecord, manifest: Manifest, product: QuantizedOperands
) -> QuantizedOperands:
    for slot, table in record.slots.items():
        product.quantizers[slot] = read_table(blobs, table, manifest.scales)
    return product


def _put_product(network: nn.Module, path: str, product: QuantizedOperands) -> None:
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent).add_module(name, product)


def _require_names(network: nn.Module, layout: Layout) -> None:
    """Raise ArtefactError unless the file has every tensor of the network, and no other."""
    coded = {f"{site.name}.weight" for site in layout.sites if site.weight is not None}
    floats = {name for record in layout.floats for name in record.names}
    expected = network.state_dict()
    wrong = dict.fromkeys(expected.keys() - floats - coded, "missing")
    wrong |= dict.fromkeys((floats | coded) - expected.keys(), "not in the network")
    for record in layout.floats:
        shapes = {name: list(expected[name].shape) for name in record.names if name in expected}
        wrong |= {name: f"of shape {shape}" for name, shape in shapes.items() if shape != list(record.shape)}
    if wrong:
        name = min(wrong)
        raise ArtefactError(
            "the tensors of the file are not those of the network it names",
            where=name,
            got=wrong[name],
            next_step="use the version of diffusers that the model was packed with",
        )


def _read_site(blobs: BlobReader, network: nn.Module, site: SiteRecord, scales: ScaleType, keep: bool) -> Tensor:
    """Make one layer quantized, and fill it; returns its bits [out]."""
    found = network.get_submodule(site.name)
    if not isinstance(found, Weighted):
        raise ArtefactError(
            "only linear layers, convolutions and embeddings are packed", where=site.name, got=type(found).__name__
        )
    quantize_at(network, site.name)
    layer = network.get_submodule(site.name)
    assert isinstance(layer, QuantizedLayer)
    stored = _read_weight(blobs, site.name, layer, site.weight, scales) if site.weight is not None else None
    if site.smoothing:
        layer.smoothing = blobs.take("smoothing", layer.input_channels, torch.float32).to(layer.weight.dtype, copy=True)
    if site.branch_rank:
        layer.add_branch(site.branch_rank)
        assert layer.branch is not None
        for factor in (layer.branch.A, layer.branch.B):
            factor.data = blobs.take("branches", factor.numel(), torch.float16).view(factor.shape).to(factor)
    if site.input is not None:
        layer.input_quantizer = read_table(blobs, site.input, scales, layer.channel_dim)
    if stored is None:
        return torch.full((layer.weight_shape[0],), FLOAT_BITS, dtype=torch.int8)
    _put_weight(layer, stored, keep)
    layer.weight_quantizer = weight_quantizer(stored.qparams(), stored.bits, scales)
    return stored.bits


def _read_weight(
    blobs: BlobReader, name: str, layer: QuantizedLayer, record: WeightRecord, scales: ScaleType
) -> PackedWeight:
    shape = layer.weight_shape
    if record.bits is None:
        packed = blobs.take("widths", packed_size(shape[0], WIDTH_BITS), torch.uint8)
        bits = unpack_widths(packed, shape[0])
    else:
        bits = torch.full((shape[0],), record.bits, dtype=torch.int8, device=layer.weight.device)
    codes = blobs.take("codes", channels_size(bits, shape[1:].numel()), torch.uint8).clone()
    parts = (len(record.split), shape[0]) if record.split else (shape[0],)
    count = torch.Size(parts).numel()
    if record.split and sum(record.split) != shape[1]:
        raise ArtefactError("the parts of a weight are not all of it", where=name, got=record.split)
    scale = blobs.take(WEIGHT_SCALES, count, dtype_of(scales)).to(torch.float32, copy=True).view(parts)
    zero_point = read_zero_points(blobs, record.zero_points, count).clone().view(parts)
    return PackedWeight(codes, bits, scale, zero_point, shape, layer.weight.dtype, record.split)


def _put_weight(layer: QuantizedLayer, stored: PackedWeight, keep: bool) -> None:
    if keep:
        layer.stored = stored
        # The shape and type of the weight without its memory; NaN, so that no one takes it for the weight.
        nothing = torch.full((1,) * layer.weight.dim(), torch.nan, dtype=stored.dtype, device=layer.weight.device)
        layer.weight = nn.Parameter(nothing.expand(layer.weight.shape), requires_grad=False)
        return
    weight = stored()
    layer.weight = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
    layer.set_float_weight(weight)
    layer.use_weight(weight)


def _read_float(blobs: BlobReader, record: FloatRecord) -> Tensor:
    count = torch.Size(record.shape).numel()
    return blobs.take(f"float.{record.dtype}", count, dtype_of(record.dtype)).clone().view(record.shape)


def _put_float(network: nn.Module, record: FloatRecord, value: Tensor) -> None:
    """Put one tensor wherever the network has it."""
    for name in record.names:
        parent, _, attribute = name.rpartition(".")
        module = network.get_submodule(parent)
        is_parameter = attribute in module._parameters
        setattr(module, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _read_correction(blobs: BlobReader, record: CorrectionRecord, registry: Registry | None) -> FittedCorrection:
    timesteps = read_timesteps(blobs, record.timesteps, record.steps, record.timestep_dtype)
    tensors: Mapping[str, Tensor] = {each.names[0]: _read_float(blobs, each) for each in record.tensors}
    correction = (registry or load_registry()).create(Kind.CORRECTION, record.choice)
    return FittedCorrection(correction, timesteps, tensors)


def _activation_bits(layout: Layout) -> Iterator[tuple[tuple[str, str], int]]:
    for site in layout.sites:
        yield (site.name, "input"), site.input.bits if site.input is not None else FLOAT_BITS
    for product in (*layout.attentions, *layout.products):
        for slot, table in product.slots.items():
            yield (product.name, slot), table.bits
