"""Recipes of pretend older versions come forward one step at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.errors import RecipeError
from quantlab.recipe.layers import read_yaml
from quantlab.recipe.migrate import MIGRATIONS, Content, migrated
from quantlab.recipe.schema import SCHEMA_VERSION

OLD = "# my experiment\n\nversion: 1\nbits: {weights: 2}\nmethod: mse  # fast\n"


def nested(content: Content) -> Content:
    """Version 2 keeps bits in the budget."""
    bits = content.pop("bits")
    return {**content, "budget": {"weight_bits": bits["weights"]}}  # type: ignore[index]


def renamed(content: Content) -> Content:
    """Version 3 calls a method an algorithm."""
    return {**{k: v for k, v in content.items() if k != "method"}, "algorithm": content["method"]}


PRETEND = {1: nested, 2: renamed}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def test_it_comes_forward_step_by_step(old: Path, tmp_path: Path) -> None:
    text = migrated(old, PRETEND, 3)
    assert text is not None and text.startswith("# my experiment\n\nversion: 3\n")
    new = tmp_path / "new.yaml"
    new.write_text(text)
    assert read_yaml(new)[0].plain == {"version": 3, "budget": {"weight_bits": 2}, "algorithm": "mse"}
    assert old.read_text() == OLD, "the file itself is left alone"


def test_a_current_recipe_has_nothing_to_do(old: Path) -> None:
    assert migrated(old) is None
    assert migrated(old, PRETEND, 1) is None


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("version: 9", "newer quantlab"),
        ("", "no version"),
        ("version: one", "states its version"),
        ("version: true", "states its version"),
        ("version: 0", "nothing leads from version 0 to 1"),
    ],
)
def test_what_leads_nowhere_is_told_with_its_line(old: Path, version: str, told: str) -> None:
    old.write_text(OLD.replace("version: 1", version))
    with pytest.raises(RecipeError, match=told) as caught:
        migrated(old)
    assert str(old) in str(caught.value)


def test_every_older_version_has_its_step() -> None:
    assert set(MIGRATIONS) == set(range(1, SCHEMA_VERSION))
