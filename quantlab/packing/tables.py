"""Scales, zero points and timesteps of quantizers, to the tensors of a file and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantlab.contracts.quant import PerChannel, PerTensor, QParams, QuantSpec
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import Pack, ScaleType
from quantlab.errors import PackError
from quantlab.packing.blobs import BlobReader, BlobWriter
from quantlab.packing.manifest import IntegerType, TableRecord, TimestepType, dtype_name, dtype_of
from quantlab.quant.accounting import zero_point_dtype
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer
from quantlab.quant.split import SplitQuantizer

_CONFIG = AffineConfig.model_validate({})
WEIGHT_SCALES, INPUT_SCALES = "scales.weight", "scales.input"


def require_stored(quantizer: Quantizer, site: str) -> QParams:
    """What a quantizer stores.

    Raises:
        PackError: it has a format of its own, or free zero points.
    """
    parameters = quantizer.qparams()
    if parameters is None:
        raise PackError(f'the format of the quantizer "{quantizer.name}" cannot be packed', where=site)
    if not parameters.round_zero_point:
        raise PackError(
            "the zero points are free floats, which integers cannot execute",
            where=site,
            next_step="set pack.free_zero_points: round and run the recipe again, which evaluates the rounded model",
        )
    if isinstance(parameters.quant_min, Tensor) or parameters.quant_min != 0:
        raise PackError("the codes do not begin at 0", where=site, got=parameters.quant_min)
    return parameters


def bits_of(parameters: QParams) -> Tensor:
    """The bits of a quantizer's codes, int64 of the shape of ``quant_max``."""
    return torch.log2(torch.as_tensor(parameters.quant_max).double() + 1).round().to(torch.int64)


def write_zero_points(blobs: BlobWriter, zero_point: Tensor) -> IntegerType:
    """Add a tensor's zero points to those of its type; returns the type."""
    dtype = zero_point_dtype(zero_point)
    blobs.add(f"zero_points.{dtype_name(dtype)}", zero_point.to(dtype))
    return IntegerType(dtype_name(dtype))


def read_zero_points(blobs: BlobReader, kind: IntegerType, count: int) -> Tensor:
    """The inverse of ``write_zero_points``."""
    return blobs.take(f"zero_points.{kind}", count, dtype_of(kind))


def write_timesteps(blobs: BlobWriter, timesteps: Tensor, site: str) -> TimestepType:
    """Add timesteps in two bytes each; returns their type.

    Raises:
        PackError: two bytes do not hold one of them exactly.
    """
    for kind in TimestepType:
        stored = timesteps.double().clamp(min=0).to(dtype_of(kind))
        if torch.equal(stored.double(), timesteps.double()):
            blobs.add(f"timesteps.{kind}", stored)
            return kind
    raise PackError(
        "a timestep does not fit into two bytes",
        where=site,
        got=timesteps.max().item(),
        allowed="integers up to 65,535, or values of float16",
    )


def read_timesteps(blobs: BlobReader, kind: TimestepType, count: int, dtype: str) -> Tensor:
    """The inverse of ``write_timesteps``."""
    return blobs.take(f"timesteps.{kind}", count, dtype_of(kind)).to(dtype_of(dtype))


def write_scales(blobs: BlobWriter, blob: str, scale: Tensor, kind: ScaleType, site: str) -> None:
    """Add scales in their stored type.

    Raises:
        PackError: one is not a value of it.
    """
    stored = scale.to(dtype_of(kind))
    if not torch.equal(stored.to(scale), scale):
        raise PackError(f"a scale is no value of {kind}", where=site, next_step="run the recipe again with this pack")
    blobs.add(blob, stored)


def write_table(blobs: BlobWriter, quantizer: Quantizer, scales: ScaleType, site: str) -> TableRecord:
    """Add an activation's quantizer.

    Raises:
        PackError: it cannot be packed.
    """
    parameters = require_stored(quantizer, site)
    parts = list(quantizer.parts) if isinstance(quantizer, SplitQuantizer) else [quantizer]
    for part in parts:
        if not isinstance(part, AffineQuantizer):
            raise PackError(
                f'the quantizer "{quantizer.name}" of an input may compute by rules of its own',
                where=site,
                allowed="affine",
            )
    write_scales(blobs, INPUT_SCALES, parameters.scale, scales, site)
    kind = write_zero_points(blobs, parameters.zero_point)
    record = TableRecord(bits=int(bits_of(parameters)), zero_points=kind, split=parameters.split)
    if parameters.timesteps is None:
        return record
    stored = torch.cat([part.timesteps for part in parts])  # type: ignore[union-attr]
    return record.model_copy(
        update={
            "entries": len(parameters.timesteps),
            "timesteps": write_timesteps(blobs, stored, site),
            "timestep_dtype": dtype_name(stored.dtype),
        }
    )


def read_table(blobs: BlobReader, record: TableRecord, scales: ScaleType, split_dim: int = 1) -> Quantizer:
    """The quantizer that ``write_table`` wrote; of a split one the parts lie along ``split_dim``."""
    parts = max(1, len(record.split))
    count = parts * record.entries
    scale = blobs.take(INPUT_SCALES, count, dtype_of(scales)).float().view(parts, -1)
    zero_point = read_zero_points(blobs, record.zero_points, count).float().view(parts, -1)
    timesteps: Sequence[Tensor | None] = [None] * parts
    if record.timesteps is not None:
        timesteps = read_timesteps(blobs, record.timesteps, count, record.timestep_dtype).view(parts, -1).unbind()
    spec = QuantSpec(PerTensor(), per_timestep=record.timesteps is not None)
    found = []
    for index, steps in enumerate(timesteps):
        quantizer = AffineQuantizer(spec, record.bits, _CONFIG)
        shape = (-1,) if steps is not None else ()
        _put(quantizer, scale[index].reshape(shape), zero_point[index].reshape(shape), scales)
        if steps is not None:
            quantizer.timesteps = steps.clone()
        found.append(quantizer)
    return SplitQuantizer(found, record.split, split_dim) if record.split else found[0]


def weight_quantizer(parameters: QParams, bits: Tensor, scales: ScaleType) -> Quantizer:
    """The quantizer of a weight with these parameters; ``bits`` int8 [out]."""
    spec = QuantSpec(PerChannel(0))
    values = parameters.scale.view(-1, len(bits)), parameters.zero_point.view(-1, len(bits))
    found = []
    for scale, zero_point in zip(*values, strict=True):
        quantizer = AffineQuantizer(spec, bits, _CONFIG)
        _put(quantizer, scale, zero_point, scales)
        found.append(quantizer)
    return SplitQuantizer(found, parameters.split, 1) if parameters.split else found[0]


def _put(quantizer: AffineQuantizer, scale: Tensor, zero_point: Tensor, scales: ScaleType) -> None:
    quantizer.scale = nn.Parameter(scale.clone(), requires_grad=False)
    quantizer.zero_point = nn.Parameter(zero_point.clone(), requires_grad=False)
    quantizer.store_as(Pack(scales=scales))
