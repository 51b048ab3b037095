"""A first recipe, and the schema that an editor checks it with."""

from __future__ import annotations

from pathlib import Path

from quantlab.errors import RecipeError
from quantlab.plugins import Registry
from quantlab.recipe.json_schema import recipe_schema
from quantlab.store import json_text

SCHEMA_FILE = "quantlab.schema.json"
STARTER = """\
# yaml-language-server: $schema={schema}
# quantlab run {file} --profile smoke   (seconds, to see that it runs; its numbers mean nothing)
version: 1
extends: base/digits           # the model, its layers and how it is measured: quantlab show {file} --resolved
method: mse                    # quantlab list methods
baselines: [min-max]           # further rows of the same table
budget: {{weight_bits: 4, activation_bits: 8}}
"""


def write_schema(path: Path, registry: Registry) -> Path:
    """Write the JSON schema of recipes with the plugins that are installed, over an older one; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(recipe_schema(registry)))
    return path


def write_starter(path: Path, registry: Registry) -> Path:
    """Write a recipe to begin with, and the schema beside it; returns the recipe's path.

    Raises:
        RecipeError: the file exists.
    """
    if path.exists():
        raise RecipeError("the file exists", where=str(path), next_step="give another name")
    write_schema(path.parent / SCHEMA_FILE, registry)
    path.write_text(STARTER.format(schema=SCHEMA_FILE, file=path.name))
    return path
