"""An error about a plugin says whose it is and which line of the recipe chose it."""

from __future__ import annotations

import pytest

from quantlab.contracts.check import plugin_call
from quantlab.errors import PluginError, RecipeError
from quantlab.plugins import Kind
from quantlab.recipe.blame import attributed, chosen_at
from quantlab.recipe.load import load_recipe

RECIPE = """\
version: 1
model: {name: digits}
method: plain
baselines: [mixed]
budget: {weight_bits: 2, activation_bits: 4}
allocate:
  - uniform
  - kurtosis: {groups: 2}
"""


def failing(registry, kind: Kind, name: str) -> PluginError:
    """What comes of a plugin that divides by zero at a site."""
    plugin = registry.find(kind, name).value()
    with pytest.raises(PluginError) as caught, plugin_call(kind, plugin, "allocate", "conv_in"):
        1 / 0  # noqa: B018
    return caught.value


def told(registry, write, kind: Kind, name: str) -> str:
    loaded = load_recipe(write(RECIPE), registry=registry)
    error = failing(registry, kind, name)
    with pytest.raises(PluginError) as caught, attributed(loaded):
        raise error
    return str(caught.value)


def test_plugin_hook_site_package_and_line_are_named(registry, write, tmp_path):
    text = told(registry, write, Kind.POLICY, "kurtosis")
    assert 'policy "kurtosis", allocate, site conv_in: the plugin failed' in text
    assert "ZeroDivisionError: division by zero" in text and "test_blame.py:" in text
    assert f"plugin: {tmp_path / 'small_plugin.py'}" in text
    assert f"chosen at: {tmp_path / 'recipe.yaml'}:8 (allocate.1)" in text


def test_a_plugin_without_options_of_its_own_has_its_line(registry, write, tmp_path):
    loaded = load_recipe(write(RECIPE.replace("kurtosis: {groups: 2}", "kurtosis")), registry=registry)
    assert chosen_at(loaded, registry.find(Kind.POLICY, "kurtosis")) == f"{tmp_path / 'recipe.yaml'}:8 (allocate.1)"


def test_a_plugin_of_a_baseline_or_a_default_is_told_so(registry, write):
    assert "chosen at: baseline mixed" in told(registry, write, Kind.TUNER, "distill")
    assert "chosen at: default (weights.quantizer)" in told(registry, write, Kind.QUANTIZER, "affine")


def test_messages_for_a_person_pass_through(registry, write):
    plugin = registry.find(Kind.POLICY, "uniform").value()
    with pytest.raises(RecipeError, match="as it is"), plugin_call("policy", plugin, "allocate"):
        raise RecipeError("as it is")
    with pytest.raises(MemoryError), plugin_call("policy", plugin, "allocate"):
        raise MemoryError
    unknown = PluginError("of nobody", plugin=int)
    with pytest.raises(PluginError) as caught, attributed(load_recipe(write(RECIPE), registry=registry)):
        raise unknown
    assert caught.value is unknown
