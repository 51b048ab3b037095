"""Quantized models in the formats of other projects: of a run, of a packed file, or of a module in memory."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantlab.api import LoadedRun, QuantizedModule, load_quantized
from quantlab.contracts.model import Inputs, Task
from quantlab.errors import ArtefactError, RecipeError, nearest
from quantlab.graph.run import compile_graph
from quantlab.packing.exports.compressed_tensors import CompressedExport
from quantlab.packing.exports.compressed_tensors import export_compressed_tensors as write_compressed_tensors
from quantlab.packing.exports.onnx import OnnxExport
from quantlab.packing.exports.onnx import export_onnx as write_onnx
from quantlab.packing.exports.subject import Subject
from quantlab.packing.file import read_packed
from quantlab.packing.manifest import Manifest
from quantlab.packing.model import PackedModel
from quantlab.packing.network import describe_network
from quantlab.packing.read import load_packed
from quantlab.plugins import load_registry
from quantlab.recipe.schema import Recipe
from quantlab.run import task_of

Exportable = LoadedRun | PackedModel | QuantizedModule
_EXAMPLES = 2
"""Samples of the inputs that a forward is translated with; one would be taken for a batch that is always one."""


class Target(StrEnum):
    """A format of another project."""

    ONNX = "onnx"
    """One file with QuantizeLinear and DequantizeLinear."""
    COMPRESSED_TENSORS = "compressed-tensors"
    """A folder with safetensors and a config.json."""


def target_of(name: str) -> Target:
    """The format of a name; raises RecipeError when there is none."""
    if name not in list(Target):
        raise RecipeError(
            f'there is no format "{name}"',
            where="--to",
            allowed=", ".join(Target),
            next_step=nearest(name, Target),
        )
    return Target(name)


def export_onnx(model: Exportable, inputs: Mapping[str, Tensor], path: str | Path) -> OnnxExport:
    """Write a quantized model as one ONNX file whose numbers are those of the simulation.

    Args:
        model: of a run, of a packed file, or what ``quantize`` returned; on the CPU, in float32.
        inputs: tensors by name that its forward takes, with at least two samples; their sizes but the batch are fixed.
        path: the file to write.

    Raises:
        PackError: the format cannot hold the model, or a package is missing; the message says what and why.
    """
    return write_onnx(_subject(model), inputs, Path(path))


def export_compressed_tensors(model: Exportable, folder: str | Path, *, weights_only: bool = False) -> CompressedExport:
    """Write a quantized model as a folder that the library compressed-tensors reads.

    Args:
        model: of a run, of a packed file, or what ``quantize`` returned.
        folder: gets ``model.safetensors`` and ``config.json``.
        weights_only: leave out how inputs are quantized, and hold convolutions as the floats that they compute with.

    Raises:
        PackError: the format cannot hold the model, or a package is missing; the message says what and why.
    """
    return write_compressed_tensors(_subject(model), Path(folder), weights_only=weights_only)


def export(
    path: Path, to: Target, output: Path | None = None, method: str | None = None, *, weights_only: bool = False
) -> str:
    """Export the model of a run folder or of a packed file; returns lines about what was written.

    Raises:
        PackError: the format cannot hold the model, or a package is missing.
        ArtefactError: the path is no complete run and no packed file, or a file does not say what model it is of.
        RecipeError: an option does not go with the path or the format.
    """
    if weights_only and to is Target.ONNX:
        raise RecipeError(
            "ONNX holds quantized inputs, so nothing is to be left out",
            where="--weights-only",
            next_step="leave it out",
        )
    model, task = _from_file(path, method) if path.is_file() else _from_run(path, method)
    if to is Target.ONNX:
        file = output or _beside(path, model.method).with_suffix(".onnx")
        return str(export_onnx(model, task.example_inputs(_EXAMPLES), file))
    folder = output or _beside(path, model.method).with_suffix(".compressed-tensors")
    return str(export_compressed_tensors(model, folder, weights_only=weights_only))


def _beside(path: Path, method: str) -> Path:
    """In a run folder by the name of the method, beside a packed file by the file's."""
    return path / f"{method}.x" if path.is_dir() else path


def _from_run(folder: Path, method: str | None) -> tuple[LoadedRun, Task]:
    found = load_quantized(folder, method)
    assert isinstance(found, LoadedRun), "a folder gives a run"
    return found, found.task


def _from_file(path: Path, method: str | None) -> tuple[PackedModel, Task]:
    if method is not None:
        raise RecipeError(
            'the option "method" is one of a run folder, and this is a packed file', where=str(path), got=method
        )
    manifest = read_packed(path).manifest
    task = _task_of(path, manifest)
    network = task.network if manifest.network is None else None
    return load_packed(path, keep_packed=True, network=network), task


def _task_of(path: Path, manifest: Manifest) -> Task:
    try:
        recipe = Recipe.model_validate(manifest.origin.recipe)
    except ValueError as error:
        raise ArtefactError(
            "the file has no recipe that says what its inputs are",
            where=str(path),
            next_step="load it by quantlab.load_quantized, and export it with inputs by quantlab.export_onnx",
        ) from error
    return task_of(recipe, load_registry(), "cpu", manifest.dtype)


def _subject(model: Exportable) -> Subject:
    if isinstance(model, QuantizedModule):
        return Subject(model.module, _call, config=_config(model.module))
    if isinstance(model, PackedModel):
        recipe = model.manifest.origin.recipe
        return Subject(model.network, compile_graph(model.graph), model.method, recipe, _config(model.network))
    student, recipe = model.student, model.recipe.model_dump(mode="json")
    return Subject(student.network, compile_graph(student.graph), model.method, recipe, _config(student.network))


def _call(network: nn.Module, inputs: Inputs) -> Any:
    return network(**inputs)


def _config(network: nn.Module) -> Mapping[str, object]:
    found = describe_network(network)
    return {"_class_name": found.class_name, **found.config} if found is not None else {}
