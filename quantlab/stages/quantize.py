"""Assign, tune and finalize: from a plan to the model that is evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.budgets import require_feasible
from quantlab.allocation.plan import Plan
from quantlab.allocation.student import (
    QuantizerChoice,
    QuantizerChoices,
    Student,
    add_adapters,
    build_student,
    fill,
    restore,
    tapped_run,
)
from quantlab.calibration.choose import choose_pairs
from quantlab.calibration.collect import calibration_batch
from quantlab.calibration.spill import streaming_in
from quantlab.calibration.tensor_file import write_tensors
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.check import check_tuned, plugin_call
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import CalibrationBatch, Progress
from quantlab.contracts.sections import AS_IT_IS, Choice, Pack, Tune, Weights
from quantlab.contracts.tuning import Checkpoint, TappedRun, TuneJob, Tuner
from quantlab.errors import ArtefactError
from quantlab.graph.blocks import Traced, cut_blocks
from quantlab.plugins import Kind, Registry
from quantlab.quant.accounting import FloatModel
from quantlab.recipe.schema import Recipe
from quantlab.stages.context import RunContext, as_json
from quantlab.stages.prepare import Calibrated, Captured, plan_digest
from quantlab.stages.scores import measure_scores
from quantlab.stages.teacher import remembered_taps, taps_of
from quantlab.store import JSON, StageFolder, atomic_write, digest_of
from quantlab.tuning.block_data import recorded_in_parts
from quantlab.tuning.finalize import finalize as finalize_layers

ASSIGN_VERSION = 1
TUNE_VERSION = 1
FINALIZE_VERSION = 1


@dataclass(frozen=True)
class Quantized:
    """A student after one of the stages.

    Attributes:
        student: its network, quantizers in place.
        bit_map: its bits.
        batch: what its bits and scales were found on.
        stage: the last stage.
        stages: all of them from assignment on.
        corrections: of the sampler, once they are fitted.
    """

    student: Student
    bit_map: BitMap
    batch: CalibrationBatch
    stage: StageFolder
    stages: tuple[StageFolder, ...]
    corrections: tuple[FittedCorrection, ...] = ()


def choices_of(recipe: Recipe, registry: Registry) -> QuantizerChoices:
    """The quantizer classes of a recipe with their settings."""

    def choose(settings: Weights) -> QuantizerChoice:
        return QuantizerChoice(registry.find(Kind.QUANTIZER, settings.quantizer.name).value, settings)

    return QuantizerChoices(choose(recipe.weights), choose(recipe.activations))


def chosen_batch(captured: Captured, calibrated: Calibrated, recipe: Recipe, registry: Registry) -> CalibrationBatch:
    """The recorded inputs that ranges and scores are found on, as the recipe's sampler chooses them."""
    task, data, settings, pairs = captured.task, calibrated.data, recipe.calibrate, None
    if settings.sampler is not None:
        sampler = registry.create(Kind.SAMPLER, settings.sampler)
        rng = torch.Generator().manual_seed(recipe.seed)

        def tap(path: str) -> TappedRun:
            return tapped_run(task.network, captured.graph, (path,))

        pairs = choose_pairs(sampler, task, data, settings.samples, tap, rng)
    return calibration_batch(task, data, settings.samples, pairs)


def method_of(recipe: Recipe, registry: Registry) -> AssignMethod:
    """The passes, policies and quantizers of a recipe as objects."""
    return AssignMethod(
        [registry.create(Kind.PASS, choice) for choice in recipe.passes],
        [registry.create(Kind.POLICY, choice) for choice in recipe.allocate],
        choices_of(recipe, registry),
        recipe.inputs_from,
        recipe.pack,
    )


def check_budget(plan: Plan, recipe: Recipe, registry: Registry, float_model: FloatModel, arm: str) -> None:
    """Raise RecipeError for policies that cannot work here or a budget that none of their allocations can keep."""
    require_feasible(
        plan,
        [registry.create(Kind.POLICY, choice) for choice in recipe.allocate],
        recipe.inputs_from,
        float_model,
        timesteps=recipe.sampling.steps if recipe.activations.per_timestep else 1,
        smoothed=bool(recipe.passes),
        where=f"method {arm}",
        scale_bytes=recipe.pack.scales.itemsize,
    )


def assign_bits(
    context: RunContext, captured: Captured, calibrated: Calibrated, plan: Plan, recipe: Recipe, arm: str
) -> Quantized:
    """Smooth, allocate bits and find scales."""
    registry = context.registry
    plugins = [(Kind.PASS, choice) for choice in recipe.passes] + [(Kind.POLICY, choice) for choice in recipe.allocate]
    plugins += [(Kind.QUANTIZER, recipe.weights.quantizer), (Kind.QUANTIZER, recipe.activations.quantizer)]
    plugins += [(Kind.SAMPLER, recipe.calibrate.sampler)] if recipe.calibrate.sampler else []
    key: dict[str, JSON] = {
        "version": ASSIGN_VERSION,
        "calibrate": calibrated.stage.digest,
        "plan": plan_digest(plan),
        "budget": recipe.budget.model_dump(mode="json", exclude_none=True),
        "samples": recipe.calibrate.samples,
        "passes": [as_json(choice) for choice in recipe.passes],
        "allocate": [as_json(choice) for choice in recipe.allocate],
        "weights": as_json(recipe.weights),
        "activations": as_json(recipe.activations),
        "inputs_from": recipe.inputs_from,
        "seed": recipe.seed,
        "plugins": context.versions(*plugins),
    }
    if recipe.budget.size_mb is not None and recipe.pack != AS_IT_IS:
        key["pack"] = as_json(recipe.pack)  # the bits depend on it
    if recipe.calibrate.sampler is not None:
        key["sampler"] = as_json(recipe.calibrate.sampler)
    method, share = method_of(recipe, registry), calibrated.batch is not None
    batch = chosen_batch(captured, calibrated, recipe, registry)
    static = [site.name for site in plan.budgeted if not site.has_samples_first]
    if static and recipe.activations.per_timestep:
        context.console.warn(
            f"{arm}: {len(static)} sites get one activation scale for all timesteps, "
            f"since dimension 0 of their input is not the batch: {', '.join(static)}"
        )
    if recipe.split_skip and not any(entry.split for entry in plan.sites):
        context.console.warn(f"{arm}: no site under the budget is fed by a skip concatenation, so nothing is split")

    scores = measure_scores(context, captured, calibrated, batch, plan, method, recipe, arm)
    if scores.stages:
        key["scores"] = [stage.digest for stage in scores.stages]

    def compute(folder: Path, progress: Progress) -> None:
        student = build_student(captured.task, captured.graph, plan, share=share)
        rng = torch.Generator().manual_seed(recipe.seed)
        with streaming_in(folder, calibrated.batch) as streaming:
            bit_map = assign(student, method, batch, rng, progress, scores.values, streaming)
        (folder / "allocation.json").write_text(json.dumps(bit_map_to_json(bit_map)))
        save_state(student, folder / "qparams.safetensors")

    stage = context.stage("assign", f"{arm}: assign bits and scales", key, compute, link=f"{arm}/assign")
    bit_map = bit_map_from_json(json.loads(stage.file("allocation.json").read_text()))
    student = build_student(captured.task, captured.graph, plan, share=share)
    restore(student, bit_map, method.choices, load_state(stage.file("qparams.safetensors")))
    return Quantized(student, bit_map, batch, stage, (*scores.stages, stage))


def tune(
    context: RunContext, captured: Captured, calibrated: Calibrated, assigned: Quantized, recipe: Recipe, arm: str
) -> Quantized:
    """Give the student to each of the method's tuners in turn; without one it is returned as it is."""
    tuned = assigned
    for index, choice in enumerate(recipe.tune.tuners):
        tuned = _tune_with(context, captured, calibrated, tuned, recipe, choice, f"{arm}/tune-{index}-{choice.name}")
    return tuned


def _tune_with(
    context: RunContext,
    captured: Captured,
    calibrated: Calibrated,
    before: Quantized,
    recipe: Recipe,
    choice: Choice,
    link: str,
) -> Quantized:
    """One tuner's stage. Its key has nothing of the tuners after it, so that methods share what they have in common."""
    registry, settings = context.registry, recipe.tune.model_copy(update={"tuners": (choice,)})
    plugins = [(Kind.TUNER, choice), *((Kind.LOSS, loss) for loss in settings.losses)]
    key: dict[str, JSON] = {
        "version": TUNE_VERSION,
        "from": before.stage.digest,
        "tune": settings.model_dump(mode="json", exclude={"teacher_store_mib"}),
        "seed": recipe.seed,
        "plugins": context.versions(*plugins),
    }
    tuner: Tuner = registry.create(Kind.TUNER, choice)
    tuned = context.store.has("tune", key)
    taps = remembered_taps(
        context, captured, calibrated, recipe, tuner, link.replace("/tune-", "/teacher-"), tuned=tuned
    )
    student = before.student
    for layer in student.layers().values():
        layer.merge_adapter()  # of the tuner before; a branch stays
    adapter = tuner.adapter(settings)
    if adapter is not None:
        add_adapters(student, adapter, recipe.seed)

    def compute(folder: Path, progress: Progress) -> None:
        checkpoint = FileCheckpoint(folder)
        job = tune_job(captured, calibrated, before, registry, settings, recipe.seed, checkpoint, progress)
        job = replace(job, taps_at=None if taps is None else taps.at)
        with plugin_call("tuner", tuner, "tune"):
            result = check_tuned(tuner, tuner.tune(job))
        (folder / "notes.json").write_text(json.dumps(list(result.notes)))
        (folder / "history.json").write_text(json.dumps({name: list(h) for name, h in result.history.items()}))
        save_state(student, folder / "tuned.safetensors")
        checkpoint.remove()

    title = f"{link.partition('/')[0]}: {choice.name}"
    stage = context.stage("tune", title, key, compute, link=link, resumable=True)
    for note in json.loads(notes.read_text()) if (notes := stage.path / "notes.json").is_file() else ():
        context.console.warn(f"{title}: {note}")
    fill(student, load_state(stage.file("tuned.safetensors")))
    stages = (*before.stages, *(() if taps is None else (taps.stage,)), stage)
    return Quantized(student, before.bit_map, before.batch, stage, stages)


def tune_job(
    captured: Captured,
    calibrated: Calibrated,
    before: Quantized,
    registry: Registry,
    settings: Tune,
    seed: int,
    checkpoint: Checkpoint,
    progress: Progress,
) -> TuneJob:
    """Everything a tuner needs, with forwards that return the losses' taps."""
    student, task = before.student, captured.task
    layers = student.trained_layers()
    teacher, traced = Traced(task.network, captured.graph), Traced(student.network, student.graph)

    def tap(paths: Sequence[str]) -> tuple[TappedRun, TappedRun]:
        return tapped_run(student.network, student.graph, paths), tapped_run(task.network, captured.graph, paths)

    losses = [registry.create(Kind.LOSS, choice) for choice in settings.losses]
    run, float_run = tap(taps_of(losses, captured.sites))
    return TuneJob(
        task=task,
        network=student.network,
        layers=layers,
        sites=captured.sites,
        student=run,
        teacher=float_run,
        tap=tap,
        cut=lambda partition: tuple(
            recorded_in_parts(block, calibrated.batch)
            for block in cut_blocks(teacher, traced, layers, task.timestep_input, partition)
        ),
        calibration=calibrated.data,
        batch=before.batch,
        losses=losses,
        settings=settings,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def finalize(context: RunContext, tuned: Quantized, arm: str, pack: Pack = AS_IT_IS) -> Quantized:
    """Merge adapters and round zero points: the model that is evaluated and packed."""
    key: dict[str, JSON] = {"version": FINALIZE_VERSION, "from": tuned.stage.digest}
    if pack != AS_IT_IS:
        key["pack"] = as_json(pack)

    def compute(folder: Path, progress: Progress) -> None:
        changed = finalize_student(tuned.student, pack)
        (folder / "rounding.json").write_text(json.dumps(changed))
        (folder / "allocation.json").write_text(json.dumps(bit_map_to_json(tuned.bit_map)))
        save_state(tuned.student, folder / "final.safetensors")

    stage = context.stage("finalize", f"{arm}: finalize", key, compute, link=f"{arm}/finalize")
    if stage.reused:
        finalize_student(tuned.student, pack)
    for layer in tuned.student.layers().values():
        layer.freeze()
    return Quantized(tuned.student, tuned.bit_map, tuned.batch, stage, (*tuned.stages, stage))


def finalize_student(student: Student, pack: Pack) -> dict[str, float]:
    """Finalize layers and products of activations in place; returns what it changed, by layer."""
    for product in student.products().values():
        product.round_parameters()
        product.store_as(pack)
    return finalize_layers(student.layers(), pack)


@dataclass(frozen=True)
class FileCheckpoint(Checkpoint):
    """A checkpoint as one safetensors file, replaced atomically."""

    folder: Path

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """What was saved last, or None."""
        if not self._file.is_file():
            return None
        with safe_open(self._file, "pt") as file:
            iteration = int((file.metadata() or {})["iteration"])
        return iteration, load_file(self._file)

    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a new file and put it in the place of the old one."""
        atomic_write(self._file, lambda path: write_tensors(path, tensors, {"iteration": str(iteration)}))

    def remove(self) -> None:
        """The result stands; the way to it need not be kept."""
        self._file.unlink(missing_ok=True)


def save_state(student: Student, path: Path) -> None:
    """Write a student's parameters and buffers."""
    write_tensors(path, student.network.state_dict())


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a student's parameters and buffers; raises ArtefactError for a truncated or foreign file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtefactError("the file is not safetensors, or is truncated", where=str(path), got=error) from error


def bit_map_to_json(bit_map: BitMap) -> dict[str, JSON]:
    """Bits as plain JSON."""
    weights = {name: bits.tolist() for name, bits in bit_map.weight_bits.items()}
    activations = {f"{site}:{slot}": bits for (site, slot), bits in bit_map.activation_bits.items()}
    return {"weight_bits": weights, "activation_bits": activations, "digest": digest_of([weights, activations])}


def bit_map_from_json(content: Mapping[str, Mapping[str, object]]) -> BitMap:
    """The inverse of ``bit_map_to_json``."""
    weights = {name: torch.tensor(bits, dtype=torch.int8) for name, bits in content["weight_bits"].items()}
    activations = {}
    for name, bits in content["activation_bits"].items():
        site, _, slot = name.rpartition(":")
        activations[site, slot] = int(str(bits))
    return BitMap(weights, activations)
