"""The stages of a run, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import escape

from quantlab.allocation.cost import planned_cost, student_cost
from quantlab.allocation.plan import Plan, mean_weight_bits
from quantlab.contracts.model import Outcome, Task
from quantlab.contracts.sections import Choice
from quantlab.contracts.site import Site
from quantlab.errors import RecipeError
from quantlab.evaluation.features import feature_identity
from quantlab.graph.uncovered import find_uncovered
from quantlab.plugins import Kind, Registry
from quantlab.processes import ALONE, Processes
from quantlab.quant.accounting import ACCOUNTING_VERSION, Accounting, FloatModel
from quantlab.recipe.blame import attributed
from quantlab.recipe.choices import chosen, essence
from quantlab.recipe.load import LoadedRecipe, for_method
from quantlab.recipe.schema import Recipe
from quantlab.report.console import Console
from quantlab.report.rows import FULL_PRECISION, Row, row_to_json
from quantlab.report.tables import cells, html_of, markdown
from quantlab.stages import classify, correct, describe, evaluate, inspect, pack, prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.stages.denoiser import require_denoiser
from quantlab.stages.kinds import evaluation_of
from quantlab.stages.outcome import Evaluation, Measured, Protocol, outcome_of, require_outcome
from quantlab.stages.reporting import Reporting, make_reporters, recipe_digest, reporting, run_start
from quantlab.store import JSON, RunFolder, Store, WatchedRun, create_run, digest_of


@dataclass(frozen=True)
class RunOptions:
    """Where and how a recipe runs.

    Attributes:
        runs_dir: run folders and stored stages.
        device: "cpu", "cuda", ...
        dtype: "float32", "bfloat16" or "float16".
        dry_run: stop after the plan.
        console: whom to tell.
        reporters: who keeps a record of the run, with checked options.
        processes: that share the run; the first one reports.
    """

    runs_dir: Path
    device: str
    dtype: str
    dry_run: bool
    console: Console
    reporters: tuple[Choice, ...] = ()
    processes: Processes = ALONE


@dataclass(frozen=True)
class RunResult:
    """What came out of a run: full precision first, then the baselines, then the recipe's own method."""

    folder: Path | None
    rows: tuple[Row, ...]
    text: str

    def table(self) -> str:
        """What is printed at the end."""
        return self.text

    def _repr_html_(self) -> str:
        return html_of(cells(self.rows)) if self.rows else f"<pre>{escape(self.text)}</pre>"

    def to_json(self) -> dict[str, JSON]:
        """What ``--json`` prints."""
        return {"folder": str(self.folder) if self.folder else None, "rows": [row_to_json(row) for row in self.rows]}


def run(loaded: LoadedRecipe, options: RunOptions) -> RunResult:
    """Run the recipe's method and its baselines, and measure them beside full precision.

    Raises:
        PluginError: a plugin failed or returned the wrong thing; it names the package and the recipe's line.
    """
    with attributed(loaded):
        return _run(loaded, options)


def _run(loaded: LoadedRecipe, options: RunOptions) -> RunResult:
    recipe, console, processes = loaded.recipe, options.console, options.processes
    device = processes.device(options.device)
    task = load_task(loaded, device, options.dtype)
    require_denoiser(task, [for_method(loaded, method) for method in methods_of(recipe)], loaded.registry)
    if options.dry_run:
        return RunResult(None, (), dry_run(loaded, task, options))
    prepare.require_weights(task)
    kind = evaluation_of(task)
    require_outcome(loaded.registry, recipe.evaluate, kind.outcome)
    kind.require(loaded.registry, task, recipe.evaluate)
    if processes.count > 1:
        console.info(f"{processes.count} processes, on {', '.join(processes.everyone(device))}")
    reporters = make_reporters(options.reporters, loaded.registry) if processes.first else []
    folder = run_folder(recipe, options)
    context = RunContext(Store(options.runs_dir, console.info), folder, loaded.registry, console, processes)
    environment = describe.begin(context, loaded, device, options.dtype)
    with reporting(reporters, run_start(loaded, folder.path, environment), console) as told:
        return _measured(loaded, task, kind, context, told)


def _measured(
    loaded: LoadedRecipe, task: Task, kind: type[Evaluation[Any]], context: RunContext, told: Reporting
) -> RunResult:
    """Every method of the recipe, from the capture of the model to the files at the end."""
    recipe, folder, console = loaded.recipe, context.folder, context.console
    captured = prepare.capture(context, task)
    float_model = FloatModel.of(task.network)
    plan = prepare.plan(captured.sites, recipe, loaded.origin, task.protect, captured.uncovered)
    cost = dry_cost(recipe, plan, float_model)
    folder.write_json("plan.json", describe.plan_json(plan, cost))
    coverage = describe.coverage_text(plan, cost)
    console.info(coverage)
    check_budgets(loaded, task, captured.sites, float_model)
    prepare.encode(context, task)
    calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
    evaluation = kind(context, task, captured, recipe.sampling, recipe.evaluate)
    protocol = evaluation.protocol(plan)

    measured = evaluation.measure(None, "float")
    rows = [float_row(recipe, measured, float_model, protocol, evaluation.other_noise())]
    told.row(rows[0])
    images = [(FULL_PRECISION, measured.images)]
    for method in methods_of(recipe):
        arm = for_method(loaded, method)
        plan = prepare.plan(captured.sites, arm, loaded.origin, task.protect, captured.uncovered)
        assigned = quantize.assign_bits(context, captured, calibrated, plan, arm, method)
        tuned = quantize.tune(context, captured, calibrated, assigned, arm, method)
        told.curves(method, tuned, arm)
        final = quantize.finalize(context, tuned, method, arm.pack)
        inspect.inspect_sites(context, captured, calibrated, final, method)
        final = correct.correct(context, captured, calibrated, final, arm, method)
        measured = evaluation.measure(final, method)
        pack.pack(context, task, final, arm, measured, protocol, method)
        seconds = sum(stage.seconds for stage in final.stages)
        # A classifier is calibrated on images of its data, whatever the method does with them.
        data_free = kind.outcome is Outcome.IMAGES and loaded.registry.method(method).data_free
        rows.append(quantized_row(arm, plan, final, measured, float_model, seconds, protocol, data_free))
        told.row(rows[-1], arm, plugin_versions(arm, loaded.registry))
        images.append((method, measured.images))
    if context.processes.first:
        describe.finish(context, loaded, rows, images, coverage)
    text = f"{markdown(rows)}\n\nsimulated in float; speed is not measured\n{coverage}\nrun folder: {folder.path}"
    return RunResult(folder.path, tuple(rows), text)


def run_folder(recipe: Recipe, options: RunOptions) -> RunFolder:
    """A new run folder, which the first process makes and writes."""
    processes = options.processes
    if not processes.first:
        return WatchedRun(processes.tell(Path()))
    folder = create_run(options.runs_dir, recipe.name, recipe_digest(recipe))
    processes.tell(folder.path)
    return folder


def methods_of(recipe: Recipe) -> list[str]:
    """The baselines, each once, and last the recipe's own method."""
    return [*(name for name in dict.fromkeys(recipe.baselines) if name != recipe.method), recipe.method]


def check_budgets(loaded: LoadedRecipe, task: Task, sites: Sequence[Site], float_model: FloatModel) -> None:
    """Raise RecipeError for a method whose budget cannot be kept, before anything is measured."""
    for method in methods_of(loaded.recipe):
        arm = for_method(loaded, method)
        plan = prepare.plan(sites, arm, loaded.origin, task.protect)
        quantize.check_budget(plan, arm, loaded.registry, float_model, method)


def cell_digest(loaded: LoadedRecipe) -> str:
    """Hash of everything a run's numbers depend on: recipe, weights, and versions of plugins, stages and accounting."""
    recipe, registry = loaded.recipe, loaded.registry
    source = registry.create(Kind.MODEL, recipe.model.plugin)
    arms = [for_method(loaded, method) for method in (*recipe.baselines, recipe.method)]
    versions = [prepare.CAPTURE_VERSION, prepare.CALIBRATE_VERSION, quantize.ASSIGN_VERSION, quantize.TUNE_VERSION]
    versions += [quantize.FINALIZE_VERSION, evaluate.REFERENCE_VERSION, evaluate.EVALUATE_VERSION, ACCOUNTING_VERSION]
    versions += [correct.CORRECT_VERSION] if any(arm.corrections for arm in arms) else []
    classes = any(outcome_of(registry, choice.name) is Outcome.CLASSES for choice in recipe.evaluate.metrics)
    versions += [classify.CLASSIFY_VERSION] if classes else []
    return digest_of(
        {
            "arms": [essence(arm, registry) for arm in arms],
            "plugins": {name: found for arm in arms for name, found in plugin_versions(arm, registry).items()},
            "weights": source.identity(recipe.model),
            "versions": versions,
            **feature_identity(recipe.evaluate),
        }
    )


def plugin_versions(recipe: Recipe, registry: Registry) -> dict[str, JSON]:
    """The versions of every plugin class that a recipe's numbers depend on."""
    names = [(kind, choice.name) for kind, _, choice in chosen(recipe)]
    names += [(Kind.MODEL, recipe.model.source)]
    return {f"{kind}/{name}": registry.find(kind, name).value.version for kind, name in names}


def load_task(loaded: LoadedRecipe, device: str, dtype: str) -> Task:
    """The recipe's model as a task; raises as ``task_of`` does."""
    return task_of(loaded.recipe, loaded.registry, device, dtype)


def task_of(recipe: Recipe, registry: Registry, device: str, dtype: str) -> Task:
    """The recipe's model as a task; raises RecipeError for a device, dtype or model that is not there."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise RecipeError("there is no such dtype", where="--dtype", got=dtype, allowed=", ".join(kinds))
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise RecipeError(
            "the device cannot be used",
            where="--device",
            got=f"{device} ({reason})",
            allowed="cpu, or cuda, cuda:1, ... on a machine and a torch that have it",
        ) from error
    source = registry.create(Kind.MODEL, recipe.model.plugin)
    return source.load(recipe.model, recipe.sampling, place, kinds[dtype])


def dry_run(loaded: LoadedRecipe, task: Task, options: RunOptions) -> str:
    """Sites, bits, size and bit operations, with nothing measured and nothing kept."""
    recipe = loaded.recipe
    with options.console.task("Capture the graph"):
        graph, sites = prepare.capture_sites(task)
    uncovered = tuple(find_uncovered(task.network, graph))
    plan = prepare.plan(sites, recipe, loaded.origin, task.protect, uncovered)
    float_model = FloatModel.of(task.network)
    cost = dry_cost(recipe, plan, float_model)
    check_budgets(loaded, task, sites, float_model)
    return f"{describe.plan_text(plan, cost)}\n{describe.resources_text(task, recipe, float_model)}"


def dry_cost(recipe: Recipe, plan: Plan, float_model: FloatModel) -> Accounting:
    """What the recipe's own method will cost."""
    return planned_cost(
        plan,
        float_model,
        timesteps=recipe.sampling.steps if recipe.activations.per_timestep else 1,
        smoothed=bool(recipe.passes),
        scale_bytes=recipe.pack.scales.itemsize,
    )


def site_table(loaded: LoadedRecipe) -> str:
    """The sites of a recipe's model with their bits: ``quantlab show sites``."""
    return dry_run(loaded, load_task(loaded, "cpu", "float32"), RunOptions(Path(), "cpu", "float32", True, quiet()))


def quiet() -> Console:
    """A console that says nothing."""
    from quantlab.report.console import make_console

    return make_console(quiet=True)


def float_row(
    recipe: Recipe,
    measured: Measured,
    float_model: FloatModel,
    protocol: Protocol,
    other_noise: Mapping[str, float | None],
) -> Row:
    """The full-precision row."""
    return Row(
        method=FULL_PRECISION,
        model=recipe.model.name,
        weight_bits=32,
        activation_bits=32,
        size_bytes=float_model.total_bytes,
        float_bytes=float_model.total_bytes,
        coverage=0.0,
        metrics=measured.metrics,
        seconds=0.0,
        protocol=protocol.digest,
        seed=0,
        data_free=True,
        simulated=False,
        allocation="",
        intervals=measured.intervals,
        protocol_fields=protocol.fields,
        other_noise=other_noise,
    )


def quantized_row(
    arm: Recipe,
    plan: Plan,
    final: quantize.Quantized,
    measured: Measured,
    float_model: FloatModel,
    seconds: float,
    protocol: Protocol,
    data_free: bool,
) -> Row:
    """The row of a method."""
    cost = student_cost(final.student, final.bit_map, float_model, final.corrections)
    inputs = [final.bit_map.activation_bits[site.name, site.slots[0].name] for site in plan.budgeted]
    return Row(
        method=arm.method,
        model=arm.model.name,
        weight_bits=mean_weight_bits(final.bit_map, plan.budgeted),
        activation_bits=sum(inputs) / len(inputs),
        size_bytes=cost.total_bytes,
        float_bytes=cost.float_model_bytes,
        coverage=cost.coverage,
        metrics=measured.metrics,
        seconds=seconds,
        protocol=protocol.digest,
        seed=arm.seed,
        data_free=data_free,
        simulated=True,
        allocation=str(quantize.bit_map_to_json(final.bit_map)["digest"]),
        intervals=measured.intervals,
        protocol_fields=protocol.fields,
    )
