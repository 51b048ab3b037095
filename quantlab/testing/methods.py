"""The contract of a method."""

from __future__ import annotations

from quantlab.contracts.method import Method
from quantlab.plugins import load_registry
from quantlab.recipe.check import check, check_plugins
from quantlab.recipe.layers import merge, node_of
from quantlab.recipe.method import FRAGMENT_SECTIONS
from quantlab.recipe.schema import SCHEMA_VERSION, Recipe
from quantlab.testing.contract import Subject


def says_what_it_is(subject: Subject) -> None:
    """A name, a line about it and where it was published."""
    method: Method = subject.plugin
    subject.require(bool(method.summary.strip()), "it has a summary of one line", repr(method.summary))
    subject.require("\n" not in method.summary.strip(), "its summary is one line", repr(method.summary))


def makes_a_recipe(subject: Subject) -> None:
    """With a model and a budget its fragment is a whole recipe, and every plugin that it names is installed."""
    method: Method = subject.plugin
    foreign = [key for key in method.fragment if key not in FRAGMENT_SECTIONS]
    subject.require(not foreign, f"it sets only {', '.join(FRAGMENT_SECTIONS)}", ", ".join(foreign))
    experiment = {
        "version": SCHEMA_VERSION,
        "model": {"source": "builtin", "name": "digits"},
        "method": method.name,
        "budget": {"weight_bits": 4, "activation_bits": 8},
    }
    root = merge(node_of(experiment, "the kit's recipe"), node_of(method.fragment, f"method {method.name}"))
    contract = "its fragment resolves: sections, plugins and their options"
    subject.call(lambda: check_plugins(check(Recipe, root), root, load_registry()), contract)


CHECKS = (says_what_it_is, makes_a_recipe)
