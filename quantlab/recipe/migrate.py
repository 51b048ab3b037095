"""Brings a recipe of an older version forward, one version at a time."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from quantlab.errors import RecipeError
from quantlab.recipe.layers import read_yaml
from quantlab.recipe.schema import SCHEMA_VERSION

Content = dict[str, object]
Migration = Callable[[Content], Content]
"""The content of a recipe of one version as one of the next, without ``version``; a pure function."""

MIGRATIONS: Mapping[int, Migration] = {}
"""From the version that is the key to the next one."""


def migrated(path: Path, migrations: Mapping[int, Migration] = MIGRATIONS, current: int = SCHEMA_VERSION) -> str | None:
    """The text of a recipe in the current version; None when it is there already. Comments but the first are lost.

    Raises:
        RecipeError: the file states no version, or one that does not lead to the current one.
    """
    node, text = read_yaml(path)
    version, found = node.reach(("version",))
    number = version.plain
    if not found or not isinstance(number, int) or isinstance(number, bool):
        raise RecipeError(
            "a recipe states its version",
            where=version.origin,
            got=repr(number) if found else "no version",
            allowed=f"1 to {current}",
            next_step="add the version that it was written for",
        )
    if number == current:
        return None
    if number > current:
        raise RecipeError(
            "the recipe was written for a newer quantlab",
            where=version.origin,
            got=number,
            allowed=f"up to {current}",
            next_step="pip install --upgrade quantlab",
        )
    given = cast(Content, node.plain)
    content = {key: child for key, child in given.items() if key != "version"}
    for step in range(number, current):
        if step not in migrations:
            raise RecipeError(
                f"nothing leads from version {step} to {step + 1}",
                where=version.origin,
                got=number,
                allowed=", ".join(map(str, [*migrations, current])),
                next_step=f"quantlab init writes a recipe of version {current} to start from",
            )
        content = migrations[step](copy.deepcopy(content))
    return _first_comment(text) + _as_yaml({"version": current, **content})


def _first_comment(text: str) -> str:
    lines = []
    for line in text.splitlines(keepends=True):
        if line.strip() and not line.startswith("#"):
            break
        lines.append(line)
    return "".join(lines)


def _as_yaml(content: Content) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
