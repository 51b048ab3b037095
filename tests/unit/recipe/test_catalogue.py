from __future__ import annotations

import pytest

from quantlab.errors import RecipeError
from quantlab.plugins import Broken, Kind
from quantlab.recipe.catalogue import catalogue, describe, kind_of


def test_a_kind_is_listed_with_a_line_each(registry):
    text = catalogue(registry, "policies")
    assert text.splitlines()[0] == "policies"
    assert "kurtosis  The part kurtosis." in text
    assert "distill" not in text


def test_everything_is_listed_with_broken_plugins_last(registry):
    registry.broken.append(Broken("other 1.0", "ImportError: no"))
    text = catalogue(registry)
    assert all(f"{kind.plural}\n" in text for kind in Kind)
    assert "digits/mpq-dm-w2a4" in text
    assert text.endswith("could not be loaded\n  other 1.0: ImportError: no")


def test_a_policy_is_described_with_its_options(registry):
    text = describe(registry.find(Kind.POLICY, "kurtosis"))
    assert "policy kurtosis" in text
    assert "groups = 5" in text
    assert "offsets = [-1, 0, 1]" in text


def test_a_method_is_described_with_its_fragment(registry):
    text = describe(registry.find(Kind.METHOD, "mixed"))
    assert "paper: a paper" in text
    assert 'allocate: ["uniform", {"kurtosis": {"groups": 3}}]' in text


def test_an_unknown_kind_has_the_nearest(registry):
    assert kind_of("policy") is kind_of("policies") is Kind.POLICY
    with pytest.raises(RecipeError, match='did you mean "policies"'):
        catalogue(registry, "policys")
    with pytest.raises(RecipeError, match="recipes"):
        catalogue(registry, "recipez")
    with pytest.raises(RecipeError) as caught:
        kind_of("recipes")
    allowed = str(caught.value).partition("allowed")[2]
    assert "recipes" not in allowed, "a recipe is no kind"
    assert "policy" in allowed and "policies" not in allowed, "one of them is asked for"
