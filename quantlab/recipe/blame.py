"""Whose plugin an error is about, and which line of the recipe chose it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from quantlab.errors import PluginError
from quantlab.plugins import Entry
from quantlab.recipe.choices import chosen
from quantlab.recipe.layers import KeyPath
from quantlab.recipe.load import LoadedRecipe, for_method
from quantlab.recipe.schema import Recipe


@contextmanager
def attributed(loaded: LoadedRecipe) -> Generator[None]:
    """Around the run of a recipe: an error about a plugin's class names its package and the recipe's line.

    Raises:
        PluginError: the same error, with both.
    """
    try:
        yield
    except PluginError as error:
        entry = loaded.registry.entry_of(error.plugin) if error.plugin else None
        if entry is None:
            raise
        raise error.attributed(entry.origin, chosen_at(loaded, entry)) from error


def chosen_at(loaded: LoadedRecipe, entry: Entry) -> str | None:
    """Where the recipe chooses a plugin: a file and line, a method's fragment or a default; None for nowhere."""
    path = _path(loaded.recipe, entry)
    if path is not None:
        node, reached = loaded.root.reach(path)
        return f"{node.origin if reached == path else 'default'} ({'.'.join(map(str, path))})"
    arms = [method for method in loaded.recipe.baselines if _path(for_method(loaded, method), entry)]
    return f"baseline {arms[0]}" if arms else None


def _path(recipe: Recipe, entry: Entry) -> KeyPath | None:
    """The keys that lead to where a recipe names a plugin."""
    for kind, path, choice in chosen(recipe):
        if (kind, choice.name) == (entry.kind, entry.name):
            return path
    return None
