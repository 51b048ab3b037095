"""Every recipe that is installed resolves, with every profile."""

from __future__ import annotations

import pytest

from quantlab.recipe.find import packaged_recipes
from quantlab.recipe.load import for_method, load_recipe


@pytest.mark.parametrize("name", packaged_recipes())
@pytest.mark.parametrize("profile", [None, "smoke"])
def test_a_recipe_resolves_with_its_baselines(name, profile):
    loaded = load_recipe(name, profile=profile)
    assert loaded.recipe.name == name
    for baseline in loaded.recipe.baselines:
        other = for_method(loaded, baseline)
        assert (other.model, other.keep, other.evaluate) == (
            loaded.recipe.model,
            loaded.recipe.keep,
            loaded.recipe.evaluate,
        )
