"""From a finished network to the content of a packed file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import Tensor, nn

from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.sections import Choice, ScaleType
from quantlab.errors import ArtefactError, PackError
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.serialize import to_json
from quantlab.packing.bitpack import pack_channels, pack_widths
from quantlab.packing.blobs import BlobWriter
from quantlab.packing.coded import code_weight
from quantlab.packing.file import PackedFile
from quantlab.packing.manifest import (
    CorrectionRecord,
    FloatRecord,
    Layout,
    Manifest,
    OperandsRecord,
    Origin,
    SiteRecord,
    WeightRecord,
    dtype_name,
)
from quantlab.packing.network import describe_network
from quantlab.packing.tables import (
    WEIGHT_SCALES,
    write_scales,
    write_table,
    write_timesteps,
    write_zero_points,
)
from quantlab.packing.trust import require_harmless
from quantlab.quant.accounting import FloatModel
from quantlab.quant.attention import QuantizedAttention
from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operands import QuantizedOperands, QuantizedProduct


@dataclass(frozen=True)
class Finished:
    """A finalized network with what is to be packed beside it.

    Attributes:
        network: holds the layers and attentions at their paths.
        graph: its rewritten forward.
        layers: quantized layers by path, adapters merged.
        products: attentions and other products of activations with quantized operands, by site.
        float_model: what the float network stored.
        timestep_input: the keyword that carries the timestep.
        corrections: of the sampler, with the choices that they were built from.
        scales: the type of scales.
        origin: where the model comes from.
    """

    network: nn.Module
    graph: CapturedGraph
    layers: Mapping[str, QuantizedLayer]
    products: Mapping[str, QuantizedOperands]
    float_model: FloatModel
    timestep_input: str | None
    corrections: Sequence[tuple[Choice, FittedCorrection]] = ()
    scales: ScaleType = ScaleType.FLOAT32
    origin: Origin = field(default_factory=Origin)


def pack(model: Finished) -> PackedFile:
    """Code a network.

    Raises:
        PackError: a part of it has no place in the format; the message names the site and why.
        NonFiniteError: the model's own weights do not fit what it was finalized for.
    """
    blobs = BlobWriter()
    layout = Layout(
        sites=tuple(_write_site(blobs, name, layer, model.scales) for name, layer in model.layers.items()),
        attentions=_write_products(blobs, model, QuantizedAttention),
        products=_write_products(blobs, model, QuantizedProduct),
        floats=tuple(_write_floats(blobs, model)),
        corrections=tuple(_write_correction(blobs, *pair) for pair in model.corrections),
    )
    manifest = Manifest(
        quantlab=version("quantlab"),
        network=describe_network(model.network),
        dtype=dtype_name(next(model.network.parameters()).dtype),
        timestep_input=model.timestep_input,
        scales=model.scales,
        origin=model.origin,
        checksums={},
    )
    graph = to_json(model.graph)
    try:
        require_harmless(graph)
    except ArtefactError as error:
        raise PackError("the forward calls what a packed file may not name", got=error.got) from error
    return PackedFile(manifest, layout, graph, blobs.finish())


def _write_site(blobs: BlobWriter, name: str, layer: QuantizedLayer, scales: ScaleType) -> SiteRecord:
    if layer.adapter is not None:
        raise PackError("the layer has an adapter that is not merged", where=name, next_step="finalize it before")
    weight = _write_weight(blobs, name, layer, scales) if layer.weight_quantizer is not None else None
    if layer.smoothing is not None:
        blobs.add("smoothing", layer.smoothing.float())
    if layer.branch is not None:
        for factor in (layer.branch.A, layer.branch.B):
            if not torch.equal(factor.half().to(factor), factor):
                raise PackError("a low-rank branch holds values that float16 has not", where=name)
            blobs.add("branches", factor.half())
    return SiteRecord(
        name=name,
        weight=weight,
        input=write_table(blobs, layer.input_quantizer, scales, name) if layer.input_quantizer is not None else None,
        smoothing=layer.smoothing is not None,
        branch_rank=layer.branch.rank if layer.branch is not None else 0,
    )


def _write_weight(blobs: BlobWriter, name: str, layer: QuantizedLayer, scales: ScaleType) -> WeightRecord:
    coded = code_weight(name, layer)
    parameters, bits = coded.parameters, coded.bits.cpu()
    blobs.add("codes", pack_channels(coded.codes.flatten(1).cpu(), bits))
    uniform = bool((bits == bits[0]).all())
    if not uniform:
        blobs.add("widths", pack_widths(bits))
    write_scales(blobs, WEIGHT_SCALES, parameters.scale, scales, name)
    return WeightRecord(
        bits=int(bits[0]) if uniform else None,
        zero_points=write_zero_points(blobs, parameters.zero_point),
        split=parameters.split,
    )


def _write_products(blobs: BlobWriter, model: Finished, kind: type[QuantizedOperands]) -> tuple[OperandsRecord, ...]:
    """The products of activations of one kind."""

    def record(name: str, product: QuantizedOperands) -> OperandsRecord:
        quantizers = product.quantizers.items()
        slots = {slot: write_table(blobs, quantizer, model.scales, name) for slot, quantizer in quantizers}  # type: ignore[arg-type]
        return OperandsRecord(name=name, slots=slots)

    return tuple(record(*item) for item in model.products.items() if isinstance(item[1], kind))


def _write_floats(blobs: BlobWriter, model: Finished) -> Iterator[FloatRecord]:
    """Everything that stays as it is; a tensor that modules of the float model share is written once."""
    coded = {f"{name}.weight" for name, layer in model.layers.items() if layer.weight_quantizer is not None}
    state = model.network.state_dict()
    for _, names in model.float_model.tensors:
        kept = sorted(names - coded)
        if not kept:
            continue
        values: list[Tensor] = [state[name] for name in kept]
        if any(not torch.equal(value, values[0]) for value in values):
            raise PackError(
                "the float model shares this tensor, and quantization has changed it in one place alone",
                where=", ".join(kept),
            )
        yield _write_float(blobs, kept, values[0])


def _write_float(blobs: BlobWriter, names: Sequence[str], value: Tensor) -> FloatRecord:
    blobs.add(f"float.{dtype_name(value.dtype)}", value)
    return FloatRecord(names=tuple(names), dtype=dtype_name(value.dtype), shape=tuple(value.shape))


def _write_correction(blobs: BlobWriter, choice: Choice, fitted: FittedCorrection) -> CorrectionRecord:
    where = f"correction {choice.name}"
    kind = write_timesteps(blobs, fitted.timesteps, where)
    tensors = tuple(_write_float(blobs, (name,), value) for name, value in fitted.tensors.items())
    return CorrectionRecord(
        choice=choice,
        tensors=tensors,
        steps=len(fitted.timesteps),
        timesteps=kind,
        timestep_dtype=dtype_name(fitted.timesteps.dtype),
    )
