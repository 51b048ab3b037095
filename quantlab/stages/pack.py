"""Write the evaluated model as one file, and read it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from quantlab.allocation.cost import student_cost
from quantlab.allocation.student import Student
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import Progress, Task
from quantlab.errors import ArtefactError, PackError
from quantlab.packing.file import PackedFile, read_packed, write_packed
from quantlab.packing.manifest import Origin
from quantlab.packing.read import load_packed
from quantlab.packing.write import Finished
from quantlab.packing.write import pack as pack_network
from quantlab.plugins import Registry
from quantlab.recipe.schema import Recipe
from quantlab.stages.context import RunContext
from quantlab.stages.outcome import Measured, Protocol
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON, StageFolder

PACK_VERSION = 1
FILE = "model.safetensors"


def pack(
    context: RunContext, task: Task, final: Quantized, recipe: Recipe, measured: Measured, protocol: Protocol, arm: str
) -> StageFolder | None:
    """Write the packed file of a method; None for a model that cannot be packed, which is said."""
    evaluation: dict[str, JSON] = {
        "metrics": dict(measured.metrics),
        "protocol": protocol.digest,
        "protocol_fields": dict(protocol.fields),
    }
    origin = Origin(method=arm, recipe=recipe.settings(), evaluation=evaluation)  # type: ignore[arg-type]
    try:
        content = pack_student(final.student, final.bit_map, final.corrections, recipe, task, origin)
    except PackError as refusal:
        context.console.info(f"{arm}: not packed: {refusal}")
        return None
    key: dict[str, JSON] = {
        "version": PACK_VERSION,
        "from": final.stage.digest,
        "evaluate": measured.stage.digest,
        "protocol": protocol.digest,
        "recipe": recipe.settings(),
    }

    def compute(folder: Path, progress: Progress) -> None:
        write_packed(folder / FILE, content)
        require_equal(folder / FILE, final.student, task, context.registry)

    stage = context.stage("pack", f"{arm}: pack", key, compute, link=f"{arm}/pack")
    context.console.info(f"{arm}: packed into {stage.file(FILE).stat().st_size:,} bytes, {arm}/pack/{FILE}")
    return stage


def pack_student(
    student: Student,
    bit_map: BitMap,
    corrections: Sequence[FittedCorrection],
    recipe: Recipe,
    task: Task,
    origin: Origin,
) -> PackedFile:
    """The content of a student's packed file.

    Raises:
        PackError: it cannot be packed, or its size is not what the accounting says.
    """
    content = pack_network(
        Finished(
            network=student.network,
            graph=student.graph,
            layers=student.layers(),
            products=student.products(),
            float_model=student.float_model,
            timestep_input=task.timestep_input,
            corrections=tuple(zip(recipe.corrections, corrections, strict=True)),
            scales=recipe.pack.scales,
            origin=origin,
        )
    )
    cost = student_cost(student, bit_map, student.float_model, corrections)
    if content.payload_bytes != cost.total_bytes:
        raise PackError(
            "the tensors of the file and the accounting differ in size",
            got=f"{content.payload_bytes:,} bytes",
            allowed=f"{cost.total_bytes:,} bytes",
            next_step="this is a defect of quantlab",
        )
    return content


def require_equal(path: Path, student: Student, task: Task, registry: Registry) -> None:
    """Raise ArtefactError unless the file's model computes what the student does, to the bit."""
    inputs = task.example_inputs(2)
    device = str(next(student.network.parameters()).device)
    own = read_packed(path).manifest.network is not None
    loaded = load_packed(path, device, registry=registry, network=None if own else task.network)
    with torch.no_grad():
        equal = torch.equal(loaded.run(inputs), student.run(inputs))
    if not equal:
        raise ArtefactError("the packed model computes something else than the simulated one", where=str(path))


def evaluation_of(run_folder: Path, method: str) -> Mapping[str, object]:
    """What a finished run says about one of its methods; nothing for an unfinished run."""
    file = run_folder / "metrics.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    found = next((row for row in rows if row["method"] == method), None)
    return {name: found[name] for name in ("metrics", "protocol", "protocol_fields")} if found else {}
