"""The numbers that a recipe is expected to give: whether a recipe is as they were measured."""

from __future__ import annotations

import json
from typing import Any

from quantlab.contracts.expected import FULL_PRECISION, Band, Plain
from quantlab.errors import RecipeError, nearest
from quantlab.plugins import Registry
from quantlab.recipe.layers import KeyPath, Node
from quantlab.recipe.schema import Recipe

OF_FULL_PRECISION = ("model", "sampling", "evaluate")
"""The sections that the float network's numbers depend on."""


def check_expected(recipe: Recipe, root: Node, registry: Registry) -> None:
    """Raise RecipeError for a protocol's key that no recipe has, and for a method that nobody knows."""
    expected = recipe.expected
    for key in expected.protocol:
        _check_key(recipe, root, key, ("expected", "protocol", key))
    for index, band in enumerate(expected.bands):
        for key in band.protocol:
            _check_key(recipe, root, key, ("expected", "bands", index, "protocol", key))
        if band.method != FULL_PRECISION:
            registry.method(band.method, root.reach(("expected", "bands", index, "method"))[0].origin)


def _check_key(recipe: Recipe, root: Node, key: str, place: KeyPath) -> None:
    above = recipe.settings()
    *sections, last = key.split(".")
    for section in sections:
        inner = above.get(section)
        above = inner if isinstance(inner, dict) else {}
    if last not in above:
        raise RecipeError(
            f'no recipe has the key "{key}"',
            where=root.reach(place)[0].origin,
            allowed="dotted keys of a recipe, such as evaluate.samples",
            next_step=nearest(last, above),
        )


def differences(recipe: Recipe, band: Band) -> list[str]:
    """Why a number of this recipe cannot be compared with a band: each in a few words; empty where it can.

    Args:
        recipe: of the band's own method.
        band: of the recipe.
    """
    protocol = {**recipe.expected.protocol, **band.protocol}
    found = []
    for key, theirs in protocol.items():
        if band.method == FULL_PRECISION and key.partition(".")[0] not in OF_FULL_PRECISION:
            continue
        ours = _value_at(recipe, key)
        if ours != theirs:
            found.append(f"{key} is {_shown(ours)} here and {_shown(theirs)} there")
    return [*found, *band.unlike]


def _value_at(recipe: Recipe, key: str) -> Any:
    value = recipe.settings()
    for part in key.split("."):
        value = value[part]
    return value


def _shown(value: Plain) -> str:
    return value if isinstance(value, str) else json.dumps(value)
