"""Safetensors files that are written piece by piece, so that no second copy of a tensor is ever in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantlab.errors import ArtefactError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a file is, before its values are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(value: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its elements; a view where it is contiguous and on the CPU."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class TensorFile:
    """A new safetensors file of known tensors, filled in any order; a context that closes it.

    Args:
        path: is overwritten.
        specs: all tensors by name.
        metadata: strings that the file carries besides.

    Raises:
        ArtefactError: a dtype that the format does not have.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self._specs = path, dict(specs)
        self._missing = {name: spec.num_bytes for name, spec in specs.items()}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        starts, end = dict[str, int](), 0
        # Wide dtypes first, so that every tensor begins at a multiple of its elements' size.
        for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            if spec.dtype not in _CODES:
                raise ArtefactError("safetensors files have no such dtype", where=f"{path}: {name}", got=spec.dtype)
            starts[name] = end
            end += spec.num_bytes
            offsets = [starts[name], end]
            header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._starts = {name: 8 + len(text) + start for name, start in starts.items()}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + end)

    def write(self, name: str, value: Tensor, index: tuple[int, ...] = ()) -> None:
        """Write elements that follow one another in the file.

        Args:
            name: of the tensor they belong to.
            value: of the tensor's dtype.
            index: where they begin, in the tensor's first dimensions; () is its start.
        """
        spec = self._specs[name]
        assert value.dtype == spec.dtype, f"{name} was announced as {spec.dtype}"
        start = sum(at * math.prod(spec.shape[axis + 1 :]) for axis, at in enumerate(index)) * spec.dtype.itemsize
        assert start + value.nbytes <= spec.num_bytes, f"{name} was announced as {spec.shape}"
        self._file.seek(self._starts[name] + start)
        self._file.write(bytes_of(value))
        self._missing[name] -= value.nbytes

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        incomplete = [name for name, missing in self._missing.items() if missing]
        if kind is None and incomplete:
            raise ArtefactError("a tensor was not written whole", where=f"{self.path}: {incomplete[0]}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors one after another; they may share memory, and each is its own when they are read."""
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    with TensorFile(path, specs, metadata) as file:
        for name, value in tensors.items():
            file.write(name, value)
