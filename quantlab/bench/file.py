"""What a bench file says."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from quantlab.contracts.config import Strict
from quantlab.errors import RecipeError
from quantlab.recipe.check import check
from quantlab.recipe.find import recipe_name
from quantlab.recipe.layers import read_yaml


class BenchFile(Strict):
    """A bench: a base recipe, and what is varied over it.

    Every matrix maps dotted recipe keys to the values they take; its cells are all their combinations.
    """

    version: int = Field(ge=1, le=1)
    recipe: str = Field(description="the recipe of every cell before its overrides")
    profile: str | None = Field(default=None, description="a profile of the recipe")
    set: dict[str, object] = Field(default_factory=dict, description="overrides of every cell")
    matrices: tuple[dict[str, list[object]], ...]
    baseline: str | None = Field(default=None, description="the method that the others' differences are to")
    results: str = Field("results", description="folder of the result files, relative to the working folder")


def read_bench(path: Path) -> BenchFile:
    """A bench file; raises RecipeError with the line and the key that is wrong."""
    node, _ = read_yaml(path)
    if not node.reach(("matrices",))[1]:
        raise RecipeError(
            "this is no bench: it has no matrices", where=str(path), next_step=f"quantlab run {recipe_name(path)}"
        )
    return check(BenchFile, node)
