"""Checks a file without running it: a recipe, or a bench with all its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantlab.bench.cells import expand
from quantlab.bench.file import read_bench
from quantlab.errors import RecipeError
from quantlab.plugins import Registry
from quantlab.recipe.find import find_recipe
from quantlab.recipe.layers import read_yaml
from quantlab.recipe.load import load_recipe


def validate(name: str | Path, registry: Registry, overrides: Sequence[str] = (), profile: str | None = None) -> str:
    """A line about a recipe or bench in which everything that can be seen without its model is right.

    Raises:
        RecipeError: with the file and line of what is wrong.
    """
    path = find_recipe(name)
    if not read_yaml(path)[0].reach(("matrices",))[1]:
        loaded = load_recipe(path, overrides, registry, profile)
        return f"{loaded.path}: valid; method {loaded.recipe.method}, {len(loaded.recipe.baselines)} baselines"
    if overrides or profile:
        raise RecipeError("a bench sets its values itself", where=str(path), got="--set or --profile")
    return f"{path}: valid; a bench of {len(expand(read_bench(path), path, registry))} cells"
