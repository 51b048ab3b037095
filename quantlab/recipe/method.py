"""Reads a method: a YAML file inside a plugin."""

from __future__ import annotations

from pathlib import Path

from quantlab.contracts.method import Method
from quantlab.errors import PluginError, RecipeError, nearest
from quantlab.recipe.layers import read_yaml

FRAGMENT_SECTIONS = (
    "passes",
    "allocate",
    "weights",
    "activations",
    "split_skip",
    "inputs_from",
    "tune",
    "corrections",
    "budget",
    "calibrate",
)
"""The sections of a recipe that a method may set; the others belong to the experiment."""


def method_from_yaml(path: Path) -> Method:
    """The method in a YAML file; its name is the file's name.

    The file has ``summary`` (one line), ``paper``, ``data_free`` (false if left out), and the recipe's sections in
    FRAGMENT_SECTIONS that the method sets. The sections are checked when a recipe is resolved with them.

    Raises:
        PluginError: the file cannot be read, a key is unknown or the summary is missing.
    """
    try:
        node, _ = read_yaml(path)
    except RecipeError as error:
        raise PluginError(error.what, where=error.where, got=error.got, next_step=error.next_step) from error
    about, content = {"summary", "paper", "data_free"}, dict(node.value) if isinstance(node.value, dict) else {}
    for key, child in content.items():
        if key not in about and key not in FRAGMENT_SECTIONS:
            known = (*sorted(about), *FRAGMENT_SECTIONS)
            raise PluginError(
                f'a method has no key "{key}"',
                where=child.origin,
                allowed=", ".join(known),
                next_step=nearest(key, known),
            )
    head = {key: content[key].plain for key in about & content.keys()}
    summary, paper, data_free = head.get("summary"), head.get("paper"), head.get("data_free", False)
    if not isinstance(summary, str) or not isinstance(paper, str | None) or not isinstance(data_free, bool):
        raise PluginError(
            "a method needs a summary (text), and may have a paper (text) and data_free (true or false)",
            where=str(path),
        )
    fragment = {key: child.plain for key, child in content.items() if key not in about}
    return Method(path.stem, summary, paper, data_free, fragment, str(path))
