"""What a packed file says of itself: who made it and from what, and how its tensors are to be read."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import torch
from pydantic import Field

from quantlab.contracts.config import Strict
from quantlab.contracts.sections import Choice, ScaleType

FORMAT = "quantlab-packed"
FORMAT_VERSION = 1
Width = Annotated[int, Field(ge=1, le=8)]


class IntegerType(StrEnum):
    """The type of a tensor's zero points."""

    UINT8 = "uint8"
    INT8 = "int8"
    UINT16 = "uint16"
    INT16 = "int16"
    INT32 = "int32"


class TimestepType(StrEnum):
    """The type of stored timesteps: two bytes each."""

    UINT16 = "uint16"
    FLOAT16 = "float16"


class WeightRecord(Strict):
    """A quantized weight.

    Attributes:
        bits: of every channel; None where they differ and are stored.
        zero_points: their type.
        split: input channels of the parts that have scales of their own; () for one piece.
    """

    bits: Width | None
    zero_points: IntegerType
    split: tuple[int, ...] = ()


class TableRecord(Strict):
    """Scales and zero points of an activation.

    Attributes:
        bits: of its codes.
        zero_points: their type.
        entries: calibrated timesteps, 1 for a static scale.
        timesteps: the type of the stored timesteps; None for a static scale.
        timestep_dtype: the type that the timesteps had.
        split: channels of the parts that have a table each; () for one piece.
    """

    bits: Width
    zero_points: IntegerType
    entries: int = Field(default=1, ge=1)
    timesteps: TimestepType | None = None
    timestep_dtype: str = "int64"
    split: tuple[int, ...] = ()


class SiteRecord(Strict):
    """A quantized layer.

    Attributes:
        name: its path in the network.
        weight: None where the weight stays float.
        input: None where the input does.
        smoothing: there are smoothing scales.
        branch_rank: of its low-rank branch; 0 without one.
    """

    name: str
    weight: WeightRecord | None = None
    input: TableRecord | None = None
    smoothing: bool = False
    branch_rank: int = Field(default=0, ge=0)


class OperandsRecord(Strict):
    """A product of activations with quantized operands, by slot; by its site."""

    name: str
    slots: dict[str, TableRecord]


class FloatRecord(Strict):
    """A tensor that stays as it is.

    Attributes:
        names: in the network's state dict; more than one for a shared tensor.
        dtype: as torch calls it, "float32".
        shape: of the tensor.
    """

    names: tuple[str, ...] = Field(min_length=1)
    dtype: str
    shape: tuple[int, ...]


class CorrectionRecord(Strict):
    """A fitted correction of the sampler.

    Attributes:
        choice: the plugin with its options.
        tensors: what it has fitted.
        steps: recorded steps.
        timesteps: the type of their stored timesteps.
        timestep_dtype: the type that they had.
    """

    choice: Choice
    tensors: tuple[FloatRecord, ...]
    steps: int = Field(ge=0)
    timesteps: TimestepType
    timestep_dtype: str


class Layout(Strict):
    """The order in which everything lies in the tensors of the file."""

    sites: tuple[SiteRecord, ...]
    attentions: tuple[OperandsRecord, ...]
    floats: tuple[FloatRecord, ...]
    corrections: tuple[CorrectionRecord, ...]
    products: tuple[OperandsRecord, ...] = ()


class NetworkRecord(Strict):
    """How the network is built before it is filled.

    Attributes:
        class_name: a model class of diffusers.
        config: what it is built from.
    """

    class_name: str
    config: dict[str, object]


class Origin(Strict):
    """Where a packed model comes from.

    Attributes:
        method: that quantized it.
        recipe: all of it, resolved.
        evaluation: metrics and protocol that were measured on this very model.
    """

    method: str = ""
    recipe: dict[str, object] = Field(default_factory=dict)
    evaluation: dict[str, object] = Field(default_factory=dict)


class Manifest(Strict):
    """The description of a packed file.

    Attributes:
        format_version: raised when older readers would misread the file.
        quantlab: the version that wrote it.
        network: None for a network that the reader must bring.
        dtype: that the network computes in.
        timestep_input: the network's keyword that carries the timestep.
        scales: the type of scales.
        origin: what it was made from.
        checksums: SHA-256 of every tensor, by name.
    """

    format_version: Literal[1] = FORMAT_VERSION
    quantlab: str
    network: NetworkRecord | None
    dtype: str
    timestep_input: str | None
    scales: ScaleType
    origin: Origin
    checksums: dict[str, str]


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of ``dtype_name``; raises ValueError for anything else."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found
