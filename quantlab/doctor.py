"""Looks at a model as the engine will: what a capture yields, and what of it can be quantized."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantlab.allocation.plan import Plan
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.model import Task
from quantlab.contracts.site import Site, SiteKind
from quantlab.errors import QuantlabError
from quantlab.graph.uncovered import Uncovered, by_reason, find_uncovered, peak_activation_bytes
from quantlab.plugins import Kind, Registry
from quantlab.quant.accounting import FloatModel
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.recipe.schema import SCHEMA_VERSION, Recipe
from quantlab.report.diagnosis import Diagnosis, KindLine, ProtectedLine, shortened
from quantlab.run import dry_cost, load_task
from quantlab.stages import prepare
from quantlab.store import JSON, json_text

METHOD = "min-max"
"""Of a model that is named without a recipe; what the doctor says does not depend on it but for the size."""
BITS: JSON = {"weight_bits": 4, "activation_bits": 8}
_REASONS = {
    SiteKind.ATTENTION: "with the key attention; float otherwise",
    SiteKind.MATMUL: "with the key products; float otherwise",
    SiteKind.EMBEDDING: "with the key embeddings; float otherwise",
}


class LowCoverage(QuantlabError):
    """Less of a model can be quantized than was asked for."""

    exit_code = 3


def diagnose(model: str, registry: Registry, overrides: Sequence[str] = (), device: str = "cpu") -> Diagnosis:
    """The capture matrix of a model.

    Args:
        model: "source:name", such as "diffusers:folder", or a recipe.
        registry: plugins.
        overrides: "a.b=c" over the recipe, "model.component=unet" say.
        device: where it is captured.

    Raises:
        RecipeError: there is no such source or recipe, or an override is wrong.
        ModelError: the model cannot be loaded.
    """
    source, _, name = model.partition(":")
    if name and source in registry.entries(Kind.MODEL) and not Path(model).exists():
        loaded = named_model(source, name, registry, overrides)
    else:
        loaded = load_recipe(model, list(overrides), registry)
    return diagnose_task(model, load_task(loaded, device, "float32"), loaded)


def named_model(source: str, name: str, registry: Registry, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The least recipe about a model of a source."""
    given: JSON = {
        "version": SCHEMA_VERSION,
        "model": {"source": source, "name": name},
        "method": METHOD,
        "budget": BITS,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "doctor.yaml"
        file.write_text(json_text(given))  # JSON is YAML
        return load_recipe(file, list(overrides), registry)


def diagnose_task(model: str, task: Task, loaded: LoadedRecipe) -> Diagnosis:
    """The capture matrix of a loaded model, with the bits of a recipe."""
    start = time.perf_counter()
    graph, sites = prepare.capture_sites(task)
    seconds = time.perf_counter() - start
    recipe = loaded.recipe
    uncovered = tuple(find_uncovered(task.network, graph))
    plan = prepare.plan(sites, recipe, loaded.origin, task.protect, uncovered)
    float_model = FloatModel.of(task.network)
    return Diagnosis(
        model=model,
        network=type(task.network).__name__,
        method=str(graph.method),
        seconds=seconds,
        notes=graph.notes,
        kinds=(*_kinds(sites), *_others(uncovered)),
        protected=tuple(_protected(plan, task, recipe)),
        guards=tuple(f"{guard.condition} is {guard.holds}" for guard in graph.guards),
        parameters=sum(parameter.numel() for parameter in task.network.parameters()),
        weight_bytes=float_model.total_bytes,
        quantized_bytes=dry_cost(recipe, plan, float_model).total_bytes,
        activation_bytes=peak_activation_bytes(graph),
        inputs={name: tuple(value.shape) for name, value in task.example_inputs(1).items()},
    )


def _kinds(sites: Sequence[Site]) -> Iterator[KindLine]:
    for kind in SiteKind:
        same = [site for site in sites if site.kind is kind]
        if same:
            yield KindLine(
                str(kind), len(same), sum(s.macs for s in same), kind not in _REASONS, _REASONS.get(kind, "")
            )


def _others(uncovered: Sequence[Uncovered]) -> Iterator[KindLine]:
    """What multiplies without being a site, by operation and reason."""
    for (operation, reason), same in by_reason(uncovered).items():
        names = shortened(list(dict.fromkeys(found.where for found in same if found.where)))
        where = f" ({names})" if names else ""
        yield KindLine(operation, len(same), sum(found.macs for found in same), False, f"no site: {reason}{where}")


def _protected(plan: Plan, task: Task, recipe: Recipe) -> Iterator[ProtectedLine]:
    """The sites outside the budget, by what put them there."""
    tags = task.protect if recipe.protect is None else recipe.protect
    outside: dict[tuple[str, str], list[str]] = {}
    for entry in plan.sites:
        if entry.budgeted or not entry.site.weight_shape:
            continue
        bits = "float" if entry.weight_bits == FLOAT_BITS else str(entry.weight_bits)
        own = [tag for tag in tags if tag in entry.site.tags and str(tags[tag]) == bits]
        outside.setdefault((f"protected: {own[0]}" if own else "keep", bits), []).append(entry.site.name)
    yield from (ProtectedLine(rule, bits, tuple(names)) for (rule, bits), names in outside.items())


def require_coverage(diagnosis: Diagnosis, least: float) -> None:
    """Raise LowCoverage when less of the multiply-accumulates can be quantized."""
    if diagnosis.coverage < least:
        raise LowCoverage(
            "too little of the model can be quantized",
            where=diagnosis.model,
            got=f"{diagnosis.coverage:.3f} of the multiply-accumulates",
            allowed=f"at least {least:g} (--min-coverage)",
        )
