"""Where recipes lie: any path, or the recipes that are installed with the package."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from quantlab.errors import RecipeError, nearest

SUFFIX = ".yaml"


def packaged_folder() -> Path:
    """The folder of the installed recipes."""
    return Path(str(files("quantlab_recipes"))).resolve()


def packaged_recipes() -> list[str]:
    """Names of the installed recipes, without the bases that others extend and the benches."""
    folder = packaged_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{SUFFIX}"))
    return sorted(name for name in names if not name.startswith(("base/", "bench/")))


def find_recipe(name: str | Path, beside: Path | None = None) -> Path:
    """The file of a recipe.

    Args:
        name: a path, or the name of an installed recipe; ".yaml" may be left out.
        beside: folder that a relative path starts from before the installed recipes are tried; the working folder
            without it.

    Raises:
        RecipeError: there is no such file; the message has the nearest name.
    """
    found = _candidate(name, beside)
    if found is not None:
        return found
    raise RecipeError(
        f'there is no recipe "{name}"',
        allowed="a path to a YAML file, or one of the installed recipes",
        next_step=nearest(str(name).removesuffix(SUFFIX), packaged_recipes()) or "list them: quantlab list recipes",
    )


def is_recipe(name: str | Path) -> bool:
    """Whether ``find_recipe`` finds a file."""
    return _candidate(name, None) is not None


def _candidate(name: str | Path, beside: Path | None) -> Path | None:
    for folder in (beside or Path(), packaged_folder()):
        for candidate in (folder / name, folder / f"{name}{SUFFIX}"):
            if os.path.isfile(candidate):  # unlike Path.is_file, false for a name that is too long
                return candidate
    return None


def recipe_name(path: Path) -> str:
    """The name of a recipe: its path among the installed recipes, or the name of its file."""
    resolved, folder = path.resolve(), packaged_folder()
    inside = resolved.is_relative_to(folder)
    return resolved.relative_to(folder).with_suffix("").as_posix() if inside else resolved.stem
