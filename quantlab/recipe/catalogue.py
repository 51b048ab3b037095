"""What there is to choose from, as text for ``quantlab list`` and ``quantlab show``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence

from quantlab.contracts.method import Method
from quantlab.errors import RecipeError, nearest
from quantlab.plugins import Entry, Kind, Registry
from quantlab.recipe.find import packaged_recipes
from quantlab.recipe.options import option_lines

RECIPES = "recipes"


def kind_of(word: str, *others: str) -> Kind:
    """The kind that a word on the command line means: "policy" or "policies"; ``others`` are offered beside plurals."""
    for kind in Kind:
        if word in (kind.value, kind.plural):
            return kind
    words = [*(kind.plural for kind in Kind), *others] if others else [kind.value for kind in Kind]
    raise RecipeError(f'there is no kind "{word}"', allowed=", ".join(words), next_step=nearest(word, words))


def catalogue(registry: Registry, word: str | None = None) -> str:
    """Names with one line about each: of one kind, of the installed recipes, or of everything.

    Plugins that could not be loaded stand at the end.
    """
    kinds = list(Kind) if word is None else [] if word == RECIPES else [kind_of(word, RECIPES)]
    parts = [
        _section(kind.plural, [(e.name, _summary(e), e.origin) for e in registry.entries(kind).values()])
        for kind in kinds
    ]
    if word in (None, RECIPES):
        parts.append(_section(RECIPES, [(name, "", "") for name in packaged_recipes()]))
    broken = [f"  {broken}" for broken in registry.broken]
    return "\n\n".join([*parts, "\n".join(["could not be loaded", *broken])] if broken else parts)


def describe(entry: Entry) -> str:
    """Everything about one name: what it does, its paper, its package, its options or its fragment."""
    paper = getattr(entry.value, "paper", None)
    lines = [f"{entry.kind} {entry.name}", inspect.cleandoc(_document(entry)), ""]
    lines += [f"paper: {paper}"] if paper else []
    lines += [f"from: {entry.origin}"]
    if isinstance(entry.value, Method):
        lines += [f"data-free: {'yes' if entry.value.data_free else 'no'}", "", *_fragment(entry.value)]
    elif hasattr(entry.value, "Config"):
        lines += ["options:", *option_lines(entry.value.Config)]
    return "\n".join(lines)


def _section(title: str, rows: Sequence[tuple[str, str, str]]) -> str:
    width = max((len(name) for name, _, _ in rows), default=0)
    body = [f"  {name:<{width}}  {text}{f'  [{origin}]' if origin else ''}".rstrip() for name, text, origin in rows]
    return "\n".join([title, *(body or ["  none"])])


def _document(entry: Entry) -> str:
    return entry.value.summary if isinstance(entry.value, Method) else entry.value.__doc__ or ""


def _summary(entry: Entry) -> str:
    return _document(entry).strip().partition("\n")[0]


def _fragment(method: Method) -> list[str]:
    return [f"{key}: {json.dumps(value)}" for key, value in method.fragment.items()]
