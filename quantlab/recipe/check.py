"""Checks resolved values against the schema and the plugins' Configs; every error has a file and a line."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from quantlab.contracts.sections import Choice, Model
from quantlab.errors import RecipeError, nearest
from quantlab.plugins import Kind, Registry
from quantlab.recipe.choices import with_choices
from quantlab.recipe.layers import KeyPath, Node
from quantlab.recipe.schema import Recipe

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def check(
    model: type[AnyModel], root: Node, at: KeyPath = (), value: object = None, beside: Collection[str] = ()
) -> AnyModel:
    """Validate against a pydantic model, without turning text or true into a number.

    Args:
        model: the model class.
        root: the whole recipe, for the origins.
        at: where in the recipe the value stands.
        value: what to validate; the value at ``at`` without it.
        beside: keys that may stand there too, and were checked before.

    Raises:
        RecipeError: what is wrong, with its file and line, the value, what is allowed and the nearest spelling.
    """
    try:
        given = root.reach(at)[0].plain if value is None else value
        return model.model_validate_json(json.dumps(given), strict=True)  # of JSON: a list may become a tuple
    except ValidationError as error:
        # A misspelt key is also a missing one: the key that is there comes first.
        errors = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        # A union reports each of its members: one message for all errors at one place.
        _, place = root.reach((*at, *errors[0]["loc"]))
        alike = [other for other in errors if root.reach((*at, *other["loc"]))[1] == place]
        raise _recipe_error(model, root, at, place, alike, beside) from error


def check_plugins(recipe: Recipe, root: Node, registry: Registry) -> Recipe:
    """The recipe with the options of every chosen plugin checked and completed with their defaults.

    Raises:
        RecipeError: a name is unknown or an option is wrong.
    """

    def complete(kind: Kind, at: KeyPath, choice: Choice) -> Choice:
        config = registry.find(kind, choice.name, root.reach(at)[0].origin).value.Config
        given = root.reach((*at, choice.name))
        inside = (*at, choice.name) if len(given[1]) == len(at) + 1 else (*at, "options")
        checked = check(config, root, inside, choice.options)
        return choice.model_copy(update={"options": checked.model_dump(mode="json")})

    config = registry.find(Kind.MODEL, recipe.model.source, root.reach(("model", "source"))[0].origin).value.Config
    keys = [name for name in Model.model_fields if name != "options"]
    options = check(config, root, ("model",), recipe.model.options, keys).model_dump(mode="json")
    model = recipe.model.model_copy(update={"options": options})
    return with_choices(recipe.model_copy(update={"model": model}), complete)


def check_model(recipe: Recipe, root: Node, registry: Registry) -> None:
    """Raise RecipeError for a model that its source, where it can tell, does not have, or for missing weights."""
    source = registry.find(Kind.MODEL, recipe.model.source).value
    if not recipe.model.name and getattr(source, "needs_name", True):
        raise RecipeError(
            '"model.name" is missing',
            where=root.reach(("model",))[0].origin,
            next_step="add it, or extend a base recipe",
        )
    weights = recipe.model.weights
    if weights is not None and not Path(weights).is_file():
        raise RecipeError(
            "there is no such file of weights",
            where=root.reach(("model", "weights"))[0].origin,
            got=weights,
            next_step="give a path relative to the working folder, or an absolute one",
        )
    known: Collection[str] | None = getattr(source, "models", None)
    if known is not None and recipe.model.name not in known:
        raise RecipeError(
            f'the source "{recipe.model.source}" has no model "{recipe.model.name}"',
            where=root.reach(("model", "name"))[0].origin,
            allowed=", ".join(known) or "none in a recipe",
            next_step=nearest(recipe.model.name, known),
        )


def check_corrections(recipe: Recipe, root: Node) -> None:
    """Raise RecipeError for corrections of a sampler that they do not fit."""
    if recipe.corrections and recipe.sampling.scheduler == "flow-euler":
        raise RecipeError(
            "corrections of the sampler are about predicted noise, and along a flow the network predicts velocities",
            where=root.reach(("corrections",))[0].origin,
            got=", ".join(choice.name for choice in recipe.corrections),
            next_step="leave corrections out (corrections: []), or choose a method without them",
        )


def _recipe_error(
    model: type[BaseModel],
    root: Node,
    at: KeyPath,
    place: KeyPath,
    errors: list[ErrorDetails],
    beside: Collection[str],
) -> RecipeError:
    """The message for what pydantic found at one place of the recipe."""
    node, first = root.reach(place)[0], errors[0]
    dotted, key = ".".join(map(str, place)), str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        inner = place[len(at) : -1]
        known = [*(() if inner else beside), *_fields(model, inner)]
        inside = f' in "{".".join(map(str, place[:-1]))}"' if len(place) > 1 else ""
        return RecipeError(
            f'unknown key "{key}"{inside}',
            where=node.origin,
            allowed=", ".join(known) or "no keys",
            next_step=nearest(key, known),
        )
    if first["type"] == "missing":
        missing = ".".join(map(str, (*place, key)))
        return RecipeError(
            f'"{missing}" is missing',
            where=node.origin,
            next_step=f"add it, extend a base recipe, or give it with --set {missing}=VALUE",
        )
    text = " or ".join(dict.fromkeys(_told(error) for error in errors))
    words = re.findall(r"'([^']+)'", " ".join(str(error.get("ctx", {}).get("expected", "")) for error in errors))
    return RecipeError(
        f'"{dotted}" {text}' if dotted else f"this {text}",
        where=node.origin,
        got=_short(node.plain),
        next_step=nearest(node.value, words) if isinstance(node.value, str) else None,
    )


_KINDS = {
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "model_type": "should be a mapping of keys to values",
    "dict_type": "should be a mapping of keys to values",
}
"""What pydantic calls arrays and objects."""


def _told(error: ErrorDetails) -> str:
    """Pydantic's words as the end of a sentence that begins with the key."""
    if error["type"] in _KINDS:
        return _KINDS[error["type"]]
    text = error["msg"].removeprefix("Value error, ")
    return text.removeprefix("Input ") if text.startswith("Input ") else f"is wrong: {text}"


def _short(value: object, limit: int = 100) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _fields(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that are allowed at a place inside a model."""
    found: type[BaseModel] | None = model
    for key in path:
        if isinstance(key, str) and found is not None:
            field = found.model_fields.get(key)
            found = _model_in(field.annotation) if field else None
    return list(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as ``tuple[Keep, ...]`` or ``Choice | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for model in map(_model_in, get_args(annotation)) if model), None)


def short_form(value: object) -> object:
    """A dumped recipe as a person writes it: plugins as ``name`` or ``{name: options}``."""
    match value:
        case {"name": str(name), "options": options, **others} if not others:
            return {name: short_form(options)} if options else name
        case Mapping():
            return {key: short_form(child) for key, child in value.items()}
        case list():
            return [short_form(child) for child in value]
        case _:
            return value
