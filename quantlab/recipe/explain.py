"""The resolved recipe as text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from quantlab.recipe.check import short_form
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schema import Recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; loading it gives the same recipe."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)  # keeps the order of the keys
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(short_form(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def explain(loaded: LoadedRecipe) -> str:
    """One line a value: its dotted key, the value, and where it came from, in columns."""
    rows = list(_leaves(short_form(loaded.recipe.model_dump(mode="json")), "", loaded))
    key_width, value_width = max(len(row[0]) for row in rows), min(48, max(len(row[1]) for row in rows))
    return "\n".join(f"{key:<{key_width}}  {value:<{value_width}}  # {origin}" for key, value, origin in rows)


def _leaves(value: object, dotted: str, loaded: LoadedRecipe) -> Iterator[tuple[str, str, str]]:
    """The values that have an origin of their own."""
    if dotted in loaded.origin:
        yield dotted, value if isinstance(value, str) else json.dumps(value), loaded.origin[dotted]
        return
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _leaves(child, f"{dotted}.{key}" if dotted else str(key), loaded)
