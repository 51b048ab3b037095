"""The reporters that a command asks for; they stand beside a recipe and not in it, since no number depends on them."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.contracts.sections import Choice
from quantlab.plugins import Kind, Registry
from quantlab.recipe.check import check
from quantlab.recipe.layers import parse_yaml

OPTION = "--report-to"


def reporter_choices(texts: Sequence[str], registry: Registry) -> tuple[Choice, ...]:
    """Reporters with their checked options, each written as a recipe writes a plugin: ``name`` or ``{name: options}``.

    Raises:
        RecipeError: a name is unknown or an option is wrong.
    """
    return tuple(_choice(text, registry) for text in texts)


def _choice(text: str, registry: Registry) -> Choice:
    root = parse_yaml(text, f"{OPTION} '{text}'", numbered=False)
    choice = check(Choice, root)
    config = registry.find(Kind.REPORTER, choice.name, root.origin).value.Config
    options = check(config, root, (choice.name,), choice.options)
    return choice.model_copy(update={"options": options.model_dump(mode="json")})
