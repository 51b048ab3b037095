"""Quantization from Python: a module in memory, or the model of an earlier run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import escape
from safetensors.torch import load_file
from torch import Tensor, nn

from quantlab.allocation.cost import student_cost
from quantlab.allocation.student import Student, build_student, restore
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import GenerativeTask, Inputs, Run, Task
from quantlab.contracts.sections import Evaluate, Model, Sampling
from quantlab.errors import ArtefactError, RecipeError
from quantlab.evaluation.quality import quality
from quantlab.graph.bind import bind
from quantlab.graph.serialize import from_json
from quantlab.graph.sites import find_sites
from quantlab.models.builtin import BuiltinConfig, BuiltinSource, BuiltinTask
from quantlab.models.module import Batch, ModuleTask
from quantlab.packing.file import write_packed
from quantlab.packing.manifest import Origin
from quantlab.packing.model import PackedModel, install
from quantlab.packing.read import load_packed
from quantlab.plugins import Registry, load_registry
from quantlab.quant.accounting import Accounting, FloatModel
from quantlab.recipe.check import check, check_plugins
from quantlab.recipe.layers import merge, node_of
from quantlab.recipe.load import for_method, load_recipe
from quantlab.recipe.schema import SCHEMA_VERSION, Recipe
from quantlab.report.console import Console, make_console
from quantlab.report.grid import GridRow, save_grid
from quantlab.run import load_task, task_of
from quantlab.stages import correct, prepare
from quantlab.stages import pack as pack_stage
from quantlab.stages import quantize as quantize_stages
from quantlab.stages.context import RunContext
from quantlab.stages.describe import coverage_text, pixels
from quantlab.stages.evaluate import draw
from quantlab.store import Store, create_run, read_json


@dataclass(frozen=True)
class QuantizedModule:
    """What ``quantize`` returns.

    Attributes:
        module: a copy of the module whose forward computes with quantized values, called as before.
        bit_map: bits of every channel and input.
        accounting: bytes and bit operations.
        coverage: how much is quantized, and what stays float and why.
    """

    module: nn.Module
    bit_map: BitMap
    accounting: Accounting
    coverage: str

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.coverage)}</pre>"


def quantize(
    module: nn.Module,
    batches: Iterable[Batch],
    method: str = "mse",
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    keep: Mapping[str, int | str] | None = None,
    samples: int = 128,
    iterations: int = 300,
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    timestep_input: str | None = None,
    registry: Registry | None = None,
    console: Console | None = None,
) -> QuantizedModule:
    """Quantize any module in memory; the module itself is not changed.

    Args:
        module: in evaluation mode, or its dropout is captured as training.
        batches: inputs of its forward: a tensor, a sequence of tensors or a dict for each batch.
        method: as ``quantlab list methods`` shows.
        weight_bits: mean bits of the weights.
        activation_bits: bits of the inputs of sites.
        keep: patterns over site names with their own bits, or "float".
        samples: rows of the batches that calibration uses.
        iterations: optimizer steps, for a method that tunes.
        seed: of everything random.
        settings: further recipe sections, such as ``{"tune": {"rank": 8}}``.
        timestep_input: the keyword that carries the timestep, where its name does not tell.
        registry: plugins; the installed ones without it.
        console: progress; silent without it.

    Raises:
        RecipeError: an option, pattern or method is wrong.
        ModelError: the batches do not fit the module.
    """
    registry = registry or load_registry()
    task = ModuleTask(module, batches, timestep_input)
    own = {
        "version": SCHEMA_VERSION,
        "model": {"source": "memory", "name": type(module).__name__},
        "method": method,
        "budget": {"weight_bits": weight_bits, "activation_bits": activation_bits},
        "keep": [{"match": pattern, "bits": bits} for pattern, bits in (keep or {}).items()],
        "calibrate": {"trajectories": samples, "samples": samples},
        "tune": {"iterations": iterations, "teacher_store_mib": 0},  # nobody comes after to share it with
        "seed": seed,
    }
    root = node_of(registry.method(method, "quantize(method=...)").fragment, f"method {method}")
    for layer in (own, settings or {}):
        root = merge(root, node_of(layer, "quantize(...)"))
    recipe = check_plugins(check(Recipe, root), root, registry)
    if recipe.corrections:
        raise RecipeError(
            "a module in memory is not sampled, so its sampler cannot be corrected",
            where=root.reach(("corrections",))[0].origin,
            got=recipe.corrections[0].name,
            next_step='choose another method, or pass settings={"corrections": []}',
        )
    with tempfile.TemporaryDirectory() as folder:
        run_folder = create_run(Path(folder), "memory", "0" * 16)
        context = RunContext(Store(Path(folder)), run_folder, registry, console or make_console(quiet=True))
        return _quantize(context, task, recipe, samples)


def _quantize(context: RunContext, task: ModuleTask, recipe: Recipe, samples: int) -> QuantizedModule:
    captured = prepare.capture(context, task)
    plan = prepare.plan(captured.sites, recipe, {}, task.protect, captured.uncovered)
    quantize_stages.check_budget(plan, recipe, context.registry, FloatModel.of(task.network), recipe.method)
    calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
    rows = min(samples, calibrated.data.num_samples)
    recipe = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"samples": rows})})
    assigned = quantize_stages.assign_bits(context, captured, calibrated, plan, recipe, "memory")
    tuned = quantize_stages.tune(context, captured, calibrated, assigned, recipe, "memory")
    final = quantize_stages.finalize(context, tuned, "memory", recipe.pack)
    cost = student_cost(final.student, final.bit_map, FloatModel.of(task.network))
    bound = bind(final.student.network, final.student.graph, task.timestep_input)
    return QuantizedModule(bound, final.bit_map, cost, coverage_text(plan, cost))


@dataclass(frozen=True)
class LoadedRun:
    """The quantized model of a run folder, with the corrections of its sampler."""

    task: Task
    student: Student
    recipe: Recipe
    method: str
    bit_map: BitMap
    corrections: tuple[FittedCorrection, ...] = ()

    def bound(self) -> nn.Module:
        """The quantized network with its graph for a forward, for the pipeline that held the float one.

        ``pipeline.unet = run.bound()`` leaves the pipeline otherwise as it is. Corrections of the sampler are not in
        it. Bind before offloading is switched on. A second call gives a second network.
        """
        return bind(copy.deepcopy(self.student.network), self.student.graph, self.task.timestep_input)

    def run(self, inputs: Inputs) -> Tensor:
        """The quantized forward on keyword tensors."""
        return self.student.run(inputs)

    def install(self, pipeline: Any, component: str | None = None) -> Any:
        """Make a diffusers pipeline denoise with this model; as ``PackedModel.install``."""
        return install(self.student.network, self.student.graph, self.task.timestep_input, pipeline, component)


def load_quantized(
    path: str | Path,
    method: str | None = None,
    device: str = "cpu",
    steps: int | None = None,
    *,
    keep_packed: bool | None = None,
    network: nn.Module | None = None,
) -> LoadedRun | PackedModel:
    """The quantized model of an earlier run's folder, or of a packed file; what ``path`` is decides.

    Both run the denoiser by ``run`` and give it to a pipeline by ``install``.

    Args:
        path: a run folder, or a file that ``quantlab pack`` or a run wrote.
        method: of a run folder, one of its methods; the recipe's own without it.
        device: where to put it.
        steps: of a run folder, denoising steps of its task; those of the run without it.
        keep_packed: of a file, leave the codes packed and unpack them whenever a layer runs.
        network: of a file that cannot build its network, a module of the same structure.

    Raises:
        ArtefactError: the folder is no complete run, or a file is damaged.
        RecipeError: an option does not go with what the path is.
    """
    path = Path(path)
    if path.is_file():
        _refuse("of a run folder, and this is a packed file", path, method=method, steps=steps)
        return load_packed(path, device, keep_packed=bool(keep_packed), network=network)
    _refuse("of a packed file, and this is none", path, keep_packed=keep_packed, network=network)
    return _load_run(path, method, device, steps)


def _refuse(what: str, path: Path, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise RecipeError(f'the option "{given[0]}" is one {what}', where=str(path), next_step="leave it out")


def _load_run(folder: Path, method: str | None, device: str, steps: int | None = None) -> LoadedRun:
    """The quantized model of a run folder."""
    file = folder / "recipe.resolved.yaml"
    if not file.is_file():
        raise ArtefactError("this is no run folder", where=str(folder), next_step="list them: quantlab runs")
    loaded = load_recipe(file, [f"sampling.steps={steps}"] if steps else [])
    method = method or loaded.recipe.method
    recipe = for_method(loaded, method)
    final = folder / method / "finalize"
    if not final.is_dir():
        raise ArtefactError("the run has no such method, or did not finish", where=str(folder), got=method)
    task = load_task(loaded, device, str(read_json(folder / "environment.json").get("dtype", "float32")))
    encoded = folder / "encode" / prepare.CONDITIONS
    if isinstance(task, GenerativeTask) and encoded.is_file():
        task.use_encoded(load_file(encoded))
    graph = from_json((folder / "capture" / "graph.json").read_text())
    sites = find_sites(task.network, graph)
    plan = prepare.plan(sites, recipe, loaded.origin, task.protect)
    bit_map = quantize_stages.bit_map_from_json(read_json(final / "allocation.json"))  # type: ignore[arg-type]
    student = build_student(task, graph, plan)
    choices = quantize_stages.choices_of(recipe, loaded.registry)
    restore(student, bit_map, choices, quantize_stages.load_state(final / "final.safetensors"))
    quantize_stages.finalize_student(student, recipe.pack)
    for layer in student.layers().values():
        layer.freeze()
    fitted = folder / method / "correct" / correct.FILE
    corrections = correct.load_corrections(fitted, recipe, loaded.registry) if recipe.corrections else ()
    return LoadedRun(task, student, recipe, method, bit_map, corrections)


def pack(folder: Path, method: str | None = None, output: Path | None = None) -> str:
    """Write the packed file of a run's method; returns a line about it.

    Raises:
        PackError: the model cannot be packed; the message says why.
        ArtefactError: the folder is no complete run.
    """
    loaded = _load_run(folder, method, "cpu")
    evaluation = pack_stage.evaluation_of(folder, loaded.method)
    origin = Origin(method=loaded.method, recipe=loaded.recipe.settings(), evaluation=dict(evaluation))
    student, task = loaded.student, loaded.task
    content = pack_stage.pack_student(student, loaded.bit_map, loaded.corrections, loaded.recipe, task, origin)
    file = output or folder / f"{loaded.method}.safetensors"
    write_packed(file, content)
    pack_stage.require_equal(file, student, task, load_registry())
    size, before = file.stat().st_size, student.float_model.total_bytes
    return f"{loaded.method} in {file}: {size:,} bytes, of {before:,} in float; tensors {content.payload_bytes:,} bytes"


def sample(path: Path, number: int, seed: int, output: Path, device: str, steps: int | None = None) -> str:
    """Draw images from the quantized model of a run or a packed file into a PNG; returns a line about it."""
    loaded = _packed_with_task(path, device, steps) if path.is_file() else _load_run(path, None, device, steps)
    task = _drawing(loaded.task, path)
    settings = Evaluate(samples=max(2, number), batch=250)
    with make_console().task("Draw images") as progress, torch.no_grad():
        images = draw(task, loaded.run, settings, seed, progress, loaded.corrections)[:number]
    per_row = min(number, 16)
    rows = [GridRow(loaded.method, pixels(part)) for part in images.split(per_row)]
    save_grid(rows, output)
    return f"{number} images of {loaded.method} in {output}"


def _drawing(task: Task, path: Path) -> GenerativeTask:
    """The task as one that draws images; raises ArtefactError for any other."""
    if not isinstance(task, GenerativeTask):
        raise ArtefactError("this model draws no images", where=str(path), got=type(task).__name__)
    return task


@dataclass(frozen=True)
class _Drawing:
    """What drawing images needs."""

    task: GenerativeTask
    run: Run
    method: str
    corrections: tuple[FittedCorrection, ...]


def _packed_with_task(path: Path, device: str, steps: int | None) -> _Drawing:
    """A packed model with the sampler of its recipe."""
    packed, registry = load_packed(path, device), load_registry()
    try:
        recipe = Recipe.model_validate(packed.manifest.origin.recipe)
    except ValueError as error:
        raise ArtefactError(
            "the file has no recipe that says how to sample",
            where=str(path),
            next_step="load it by quantlab.load_quantized and put it into a pipeline by install",
        ) from error
    if steps:
        recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": steps})})
    task = task_of(recipe, registry, device, packed.manifest.dtype)
    return _Drawing(_drawing(task, path), packed.run, packed.method, packed.corrections)


def check_zoo(name: str, samples: int, steps: int) -> str:
    """Measure a denoiser that ships: FID to the data at its noise floor, class accuracy.

    Raises:
        RecipeError: the model is no denoiser.
    """
    task = BuiltinSource(BuiltinConfig()).load(
        Model(name=name), Sampling(steps=steps), torch.device("cpu"), torch.float32
    )
    if not isinstance(task, BuiltinTask):
        raise RecipeError("only a denoiser is measured by the images it draws", where="quantlab zoo check", got=name)
    with make_console().task("Draw images") as progress:
        found = quality(task, lambda inputs: task.network(**inputs, **task.static)[0], samples, 11, progress)
    return f"{name}: {found}"
