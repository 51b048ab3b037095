"""A method: a named fragment of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A paper's choices, as data; a recipe that names the method inherits them.

    Attributes:
        name: what a recipe writes after ``method:``.
        summary: one line for ``quantlab list``.
        paper: where it was published, or None.
        data_free: no calibration data are needed.
        fragment: the recipe's sections that the method sets, as they would stand in YAML.
        origin: the file it was read from.
    """

    name: str
    summary: str
    paper: str | None
    data_free: bool
    fragment: Mapping[str, object]
    origin: str
