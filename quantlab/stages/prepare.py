"""Load, capture, plan and calibrate: what all methods of a run share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from quantlab.allocation.plan import Plan, SitePlan, make_plan, planned_sites
from quantlab.allocation.student import tapped_run
from quantlab.calibration.recording import load_recording, provenance, record
from quantlab.calibration.tensor_file import bytes_of
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.model import CalibrationSet, GenerativeTask, Progress, Task
from quantlab.contracts.sections import Calibrate, RecordedDtype, Sampling
from quantlab.contracts.site import Site
from quantlab.errors import ModelError, RecipeError, nearest
from quantlab.graph.capture import capture_once
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.inputs import nested
from quantlab.graph.roles import TAGS
from quantlab.graph.serialize import from_json, to_json
from quantlab.graph.sites import find_sites
from quantlab.graph.uncovered import Uncovered, find_uncovered
from quantlab.graph.verify import capture_verified
from quantlab.matching import match_sites
from quantlab.recipe.schema import Recipe
from quantlab.stages.context import RunContext, as_json, version_of
from quantlab.store import JSON, StageFolder, atomic_write_json, digest_of

CAPTURE_VERSION = 1
CALIBRATE_VERSION = 1
ENCODE_VERSION = 1
CONDITIONS = "conditions.safetensors"
PROVENANCE_FILE = "calibration.json"
_SITES = TypeAdapter(tuple[Site, ...])


@dataclass(frozen=True)
class Captured:
    """A task with its graph and sites, and with the multiply-accumulates that no site stands for."""

    task: Task
    graph: CapturedGraph
    sites: tuple[Site, ...]
    stage: StageFolder
    uncovered: tuple[Uncovered, ...] = ()


def fingerprint(task: Task) -> str:
    """Hash of the network's float weights, and of what the task's outcome depends on beside them."""
    digest = hashlib.sha256(task.conditions_digest.encode())
    for name, value in sorted(task.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()[:16]


def capture(context: RunContext, task: Task) -> Captured:
    """Capture the network as one verified graph and find its sites."""
    example = task.example_inputs(1)
    key: dict[str, JSON] = {
        "version": CAPTURE_VERSION,
        "weights": fingerprint(task),
        "network": f"{type(task.network).__module__}.{type(task.network).__qualname__}",
        "static": {name: repr(value) for name, value in sorted(task.static.items())},
        "inputs": {name: [str(value.dtype), list(value.shape)] for name, value in sorted(example.items())},
        "libraries": {name: version_of(name) for name in ("torch", "diffusers")},
    }

    def compute(folder: Path, progress: Progress) -> None:
        graph, sites = capture_sites(task)
        (folder / "graph.json").write_text(to_json(graph))
        (folder / "sites.json").write_bytes(_SITES.dump_json(sites, indent=1))

    stage = context.stage("capture", "Capture the graph", key, compute, link="capture")
    graph = from_json(stage.file("graph.json").read_text())
    # What is known of the sites follows from the graph; sites.json of a stored stage may be older than what this knows.
    context.console.detail(f"captured by {graph.method}, {len(graph.guards)} conditions on sizes")
    for note in graph.notes:
        context.console.info(f"capture: {note}")
    uncovered = tuple(find_uncovered(task.network, graph))
    return Captured(task, graph, find_sites(task.network, graph), stage, uncovered)


def weightless(task: Task) -> bool:
    """Whether the network has shapes alone, on the meta device: enough for a dry run."""
    return any(parameter.is_meta for parameter in task.network.parameters())


def require_weights(task: Task) -> None:
    """Raise ModelError for a network of shapes alone."""
    if weightless(task):
        raise ModelError(
            "the model is given without weights, which is enough for a plan and nothing else",
            where="model.weights",
            next_step="name its checkpoint, or ask for the plan: quantlab run RECIPE --dry-run",
        )


def capture_sites(task: Task) -> tuple[CapturedGraph, tuple[Site, ...]]:
    """The verified graph of a task's network, and its sites; unverified for a network of shapes alone."""
    if weightless(task):
        graph = capture_once(task.network, nested(task.example_inputs(3)), task.static)
        return graph, find_sites(task.network, graph)
    graph = capture_verified(task.network, lambda batch: nested(task.example_inputs(batch)), task.static)
    return graph, find_sites(task.network, graph)


def plan(
    sites: Sequence[Site],
    recipe: Recipe,
    origin: Mapping[str, str],
    protect: Mapping[str, int] | None = None,
    uncovered: Sequence[Uncovered] = (),
) -> Plan:
    """Nominal bits of every site: those of its ``keep`` rule, else of its protected tags, else of the budget.

    Args:
        sites: of the captured graph.
        recipe: with the rules and the budget.
        origin: dotted key of the recipe -> file and line, for messages.
        protect: bits by tag of the model's family, where the recipe has none of its own.
        uncovered: multiply-accumulates that no site stands for.

    Raises:
        RecipeError: a pattern matches nothing, or there is no such tag.
    """
    for tag in recipe.protect or ():
        if tag not in TAGS:
            raise RecipeError(
                "no site has such a tag",
                where=origin.get(f"protect.{tag}", "protect"),
                got=tag,
                allowed=", ".join(TAGS),
                next_step=nearest(tag, TAGS),
            )
    bits = protected_sites(sites, (protect or {}) if recipe.protect is None else recipe.protect)
    planned = planned_sites(sites, recipe.products, recipe.embeddings)
    rules = match_sites(recipe.keep, [site.name for site in planned], origin=origin)
    bits |= {name: FLOAT_BITS if rule.bits == "float" else rule.bits for name, rule in rules.items()}
    return make_plan(
        sites,
        bits,
        recipe.budget,
        split_skip=recipe.split_skip,
        attention=recipe.attention,
        products=recipe.products,
        embeddings=recipe.embeddings,
        uncovered=uncovered,
    )


def encode(context: RunContext, task: Task) -> None:
    """Encode the prompts of a task once; whoever reads the run later needs no text encoder."""
    if not isinstance(task, GenerativeTask) or task.prompts(1) is None:
        return
    key: dict[str, JSON] = {"version": ENCODE_VERSION, "conditions": task.conditions_digest}

    def compute(folder: Path, progress: Progress) -> None:
        save_file(dict(task.encode()), folder / CONDITIONS)

    stage = context.stage("encode", "Encode the prompts", key, compute, link="encode")
    task.use_encoded(load_file(stage.file(CONDITIONS)))


def protected_sites(sites: Sequence[Site], protect: Mapping[str, int]) -> dict[str, int]:
    """Bits of the layers with a protected tag; the most where a layer has several."""
    found = {site.name: [protect[tag] for tag in site.tags if tag in protect] for site in sites if site.weight_shape}
    return {name: max(bits) for name, bits in found.items() if bits}


@dataclass(frozen=True)
class Calibrated:
    """The float network's recorded trajectories.

    Attributes:
        data: mapped into memory.
        stage: that holds them.
        batch: rows of the network in one forward that measures; None: all.
    """

    data: CalibrationSet
    stage: StageFolder
    batch: int | None = None


def calibrate(
    context: RunContext, captured: Captured, sampling: Sampling, settings: Calibrate, seed: int
) -> Calibrated:
    """Record what the float network sees and says."""
    key: dict[str, JSON] = {
        "version": CALIBRATE_VERSION,
        "capture": captured.stage.digest,
        "sampling": as_json(sampling),
        "trajectories": settings.trajectories,
        "seed": seed,
    }
    if settings.batch is not None:
        key["batch"] = settings.batch
    if settings.dtype is not RecordedDtype.NETWORK:
        key["dtype"] = settings.dtype
    task, file = captured.task, "calibration.safetensors"
    drawn_from = task.calibration_digest()
    if drawn_from is not None:
        key["data"] = drawn_from
    device = next(task.network.parameters()).device

    def compute(folder: Path, progress: Progress) -> None:
        run = tapped_run(task.network, captured.graph, ())
        rng = torch.Generator().manual_seed(seed)
        record(task, lambda inputs: run(inputs)[0], settings, rng, progress, folder / file)
        about = provenance(task, load_recording(folder / file, device), sampling.model_dump(mode="json"), seed)
        atomic_write_json(folder / PROVENANCE_FILE, about)

    stage = context.stage("calibrate", "Record calibration data", key, compute, link="calibrate")
    return Calibrated(load_recording(stage.file(file), device), stage, settings.batch)


def plan_digest(plan: Plan) -> str:
    """Hash of the nominal bits and of what is split, for the key of assignment."""

    def intent(entry: SitePlan) -> list[JSON]:
        split: list[JSON] = [list(entry.split)] if entry.split else []
        slots: list[JSON] = [dict(entry.slot_bits)] if entry.slot_bits else []
        return [entry.weight_bits, entry.activation_bits, entry.budgeted, *split, *slots]

    return digest_of({entry.site.name: intent(entry) for entry in plan.sites})


def layer_set_digest(plan: Plan) -> str:
    """Hash of which sites the budget is about and of the bits of all others, for the protocol id."""

    def kept(entry: SitePlan) -> JSON:
        if entry.weight_bits == entry.activation_bits:
            return entry.weight_bits
        return [entry.weight_bits, entry.activation_bits, dict(entry.slot_bits)]

    return digest_of({entry.site.name: "budget" if entry.budgeted else kept(entry) for entry in plan.sites})
