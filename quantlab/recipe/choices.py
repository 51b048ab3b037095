"""The plugins that a recipe chooses, wherever in it they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from quantlab.contracts.sections import Choice
from quantlab.plugins import Kind, Registry
from quantlab.recipe.layers import KeyPath
from quantlab.recipe.schema import Recipe
from quantlab.store import JSON

LISTS: tuple[tuple[Kind, KeyPath], ...] = (
    (Kind.PASS, ("passes",)),
    (Kind.POLICY, ("allocate",)),
    (Kind.TUNER, ("tune", "tuners")),
    (Kind.LOSS, ("tune", "losses")),
    (Kind.CORRECTION, ("corrections",)),
    (Kind.METRIC, ("evaluate", "metrics")),
)
"""Where a recipe lists plugins."""
SINGLES: tuple[tuple[Kind, KeyPath], ...] = (
    (Kind.SAMPLER, ("calibrate", "sampler")),
    (Kind.QUANTIZER, ("weights", "quantizer")),
    (Kind.QUANTIZER, ("activations", "quantizer")),
)
"""Where a recipe names one plugin."""


def chosen(recipe: Recipe) -> Iterator[tuple[Kind, KeyPath, Choice]]:
    """Every plugin with options that a recipe chooses: its kind, where it stands, and the choice."""
    for kind, path in LISTS:
        for index, choice in enumerate(_at(recipe, path)):
            yield kind, (*path, index), choice
    for kind, path in SINGLES:
        choice = _at(recipe, path)
        if choice is not None:
            yield kind, path, choice


def with_choices(recipe: Recipe, change: Callable[[Kind, KeyPath, Choice], Choice]) -> Recipe:
    """The recipe with every choice changed."""
    for kind, path in LISTS:
        choices = _at(recipe, path)
        changed = tuple(change(kind, (*path, index), choice) for index, choice in enumerate(choices))
        recipe = _replaced(recipe, path, changed)
    for kind, path in SINGLES:
        choice = _at(recipe, path)
        if choice is not None:
            recipe = _replaced(recipe, path, change(kind, path, choice))
    return recipe


def essence(recipe: Recipe, registry: Registry) -> JSON:
    """The recipe as plain JSON without whatever has its default value.

    So a key or an option that quantlab gains later leaves the hash of results as it was; whoever changes a default
    raises the version of its class or stage, as for any change of numbers.
    """

    def reduce(kind: Kind, path: KeyPath, choice: Choice) -> Choice:
        options = registry.config(kind, choice).model_dump(mode="json", exclude_defaults=True)
        return choice.model_copy(update={"options": options})

    source = reduce(Kind.MODEL, ("model",), recipe.model.plugin)
    model = recipe.model.model_copy(update={"options": source.options})
    reduced = with_choices(recipe.model_copy(update={"model": model}), reduce)
    return reduced.settings(defaults=False)


def _at(recipe: Recipe, path: KeyPath) -> Any:
    """The choice at a path, or the tuple of choices."""
    value: Any = recipe
    for key in path:
        value = getattr(value, str(key))
    return value


def _replaced(recipe: Recipe, path: KeyPath, value: object) -> Recipe:
    """The recipe with another value at a path of one or two keys."""
    if len(path) == 1:
        return recipe.model_copy(update={str(path[0]): value})
    section = getattr(recipe, str(path[0]))
    return recipe.model_copy(update={str(path[0]): section.model_copy(update={str(path[1]): value})})
