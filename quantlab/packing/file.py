"""One safetensors file: tensors, and everything else as text in its metadata."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.errors import ArtefactError
from quantlab.packing.manifest import FORMAT, FORMAT_VERSION, Layout, Manifest
from quantlab.store import atomic_write

_TEXTS = ("format_version", "manifest", "layout", "graph")
_MAX_TEXT_BYTES = 1 << 28
"""Of a text when it is inflated, so that a small file cannot fill the memory."""


@dataclass(frozen=True)
class PackedFile:
    """The content of a packed file.

    Attributes:
        manifest: where it comes from.
        layout: what lies where in the tensors.
        graph: the rewritten forward, as ``to_json`` writes it.
        tensors: by name, [n] each.
    """

    manifest: Manifest
    layout: Layout
    graph: str
    tensors: Mapping[str, Tensor]

    @property
    def payload_bytes(self) -> int:
        """Of all tensors: what the accounting counts."""
        return sum(value.nbytes for value in self.tensors.values())


def write_packed(path: Path, content: PackedFile) -> None:
    """Write the file, whole or not at all; checksums are taken here."""
    checksums = {name: checksum(value) for name, value in content.tensors.items()}
    manifest = content.manifest.model_copy(update={"checksums": checksums})
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "manifest": json.dumps(manifest.model_dump(mode="json"), separators=(",", ":"), allow_nan=False),
        "layout": _deflated(content.layout.model_dump_json(exclude_defaults=True)),
        "graph": _deflated(content.graph),
    }
    tensors = {name: value.contiguous() for name, value in content.tensors.items()}
    atomic_write(path, lambda partial: save_file(tensors, partial, {**metadata, "checksum": _text_checksum(metadata)}))


def read_packed(path: Path) -> PackedFile:
    """Read and check a packed file.

    Raises:
        ArtefactError: it is truncated, no packed file, of a newer version, or not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _require_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            "the file is no safetensors file, or is truncated", where=str(path), got=error, next_step="copy it again"
        ) from error
    if metadata.get("checksum") != _text_checksum(metadata):
        raise _changed(path, "the description")
    try:
        manifest = Manifest.model_validate_json(metadata["manifest"])
        layout = Layout.model_validate_json(_inflated(metadata["layout"]))
        graph = _inflated(metadata["graph"])
    except (KeyError, ValueError, zlib.error) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else error
        raise ArtefactError("the file's description cannot be read", where=str(path), got=reason) from error
    if manifest.checksums.keys() != tensors.keys():
        raise _changed(path, "the list of tensors")
    for name, value in tensors.items():
        if checksum(value) != manifest.checksums[name]:
            raise _changed(path, f'the tensor "{name}"')
    return PackedFile(manifest, layout, graph, tensors)


def checksum(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(value.contiguous().view(torch.uint8).numpy()).hexdigest()  # pyright: ignore[reportArgumentType]


def _require_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtefactError(
            "this safetensors file is no packed model",
            where=str(path),
            got=metadata.get("format", "no format"),
            allowed=FORMAT,
            next_step="pack the model of a run: quantlab pack RUN",
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) != FORMAT_VERSION:
        raise ArtefactError(
            "the file was packed by a newer version of quantlab" if version.isdecimal() else "the file has no version",
            where=str(path),
            got=version,
            allowed=str(FORMAT_VERSION),
            next_step="update quantlab",
        )


def _changed(path: Path, what: str) -> ArtefactError:
    return ArtefactError(f"{what} is not what was written", where=str(path), next_step="copy the file again")


def _text_checksum(metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything that stands beside the tensors."""
    return hashlib.sha256("\0".join(metadata.get(name, "") for name in _TEXTS).encode()).hexdigest()


def _deflated(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _inflated(text: str) -> str:
    inflater = zlib.decompressobj()
    content = inflater.decompress(base64.b64decode(text, validate=True), _MAX_TEXT_BYTES)
    if not inflater.eof:
        raise ValueError("a text is truncated or too long")
    return content.decode()
