"""The recipe as a JSON schema, with the names and options of the plugins that are installed, for editors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from quantlab.contracts.sections import Choice, Model
from quantlab.plugins import Kind, Registry
from quantlab.recipe.choices import LISTS, SINGLES
from quantlab.recipe.schema import Recipe

Schema = dict[str, Any]
_REFERENCE = "#/$defs/"


def recipe_schema(registry: Registry) -> Schema:
    """The JSON schema (draft 2020-12) of a recipe file.

    It is more lenient than loading where a file need not be whole: a base recipe, the method or a profile may give what
    is left out. A plugin stands as its name, or as its name with its options; a source's options stand beside its name.
    """
    schema = Recipe.model_json_schema()
    definitions: Schema = schema["$defs"]
    for kind in Kind:
        if kind not in (Kind.METHOD, Kind.MODEL):
            definitions[_choice_name(kind)] = _choice(registry, kind, definitions)
    for kind, path in (*LISTS, *SINGLES):
        parent = _parent(schema, path[:-1])
        parent["properties"][path[-1]] = _with_choice(parent["properties"][path[-1]], kind)
    definitions.pop(Choice.__name__)
    definitions[Model.__name__] = _model(registry, definitions)
    for name in ("Budget",):
        definitions[name].pop("required", None)
    methods = {"enum": list(registry.entries(Kind.METHOD))}
    schema["properties"]["method"] |= methods
    schema["properties"]["baselines"]["items"] = methods
    schema["required"] = ["version"]
    partial = {"type": "object", "properties": dict(schema["properties"]), "additionalProperties": False}
    definitions["Profile"] = partial
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = names | {"description": "recipes that this one is laid on, later ones win"}
    schema["properties"]["profiles"] = {
        "type": "object",
        "additionalProperties": {"$ref": f"{_REFERENCE}Profile"},
        "description": "sets of values by name, for --profile",
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _choice_name(kind: Kind) -> str:
    return f"{kind.value.capitalize()}Choice"


def _choice(registry: Registry, kind: Kind, definitions: Schema) -> Schema:
    """A plugin of a kind: its name, or a mapping of its name to its options."""
    entries = registry.entries(kind)
    chosen = [
        {
            "type": "object",
            "properties": {name: {"anyOf": [_config(entry.value.Config, name, kind, definitions), {"type": "null"}]}},
            "required": [name],
            "additionalProperties": False,
        }
        for name, entry in entries.items()
    ]
    names = {"enum": list(entries), "description": f"a {kind}, by name; options: quantlab show {kind} NAME"}
    return {"anyOf": [names, *chosen]}


def _config(config: Any, name: str, kind: Kind, definitions: Schema) -> Schema:
    """The schema of a Config, its own definitions moved to the recipe's under a name of their own."""
    schema = config.model_json_schema()
    inner = schema.pop("$defs", {})
    prefix = f"{kind.value}/{name}/"
    for key, value in inner.items():
        definitions[_escaped(prefix + key)] = _renamed(value, prefix)
    return _renamed(schema, prefix)


def _escaped(name: str) -> str:
    return name.replace("/", ".")


def _renamed(value: Any, prefix: str) -> Any:
    """The same schema with references to definitions of another name."""
    if isinstance(value, Mapping):
        return {
            key: f"{_REFERENCE}{_escaped(prefix + child.removeprefix(_REFERENCE))}"
            if key == "$ref" and isinstance(child, str)
            else _renamed(child, prefix)
            for key, child in value.items()
        }
    return [_renamed(child, prefix) for child in value] if isinstance(value, list) else value


def _with_choice(prop: Schema, kind: Kind) -> Schema:
    """A property that refers to any plugin, referring to those of a kind."""
    target = f"{_REFERENCE}{_choice_name(kind)}"

    def swap(value: Any) -> Any:
        if isinstance(value, Mapping):
            if value.get("$ref") == f"{_REFERENCE}{Choice.__name__}":
                return {**value, "$ref": target}
            return {key: swap(child) for key, child in value.items() if key != "default"}
        return [swap(child) for child in value] if isinstance(value, list) else value

    return swap(copy.deepcopy(prop))


def _parent(schema: Schema, path: tuple[str | int, ...]) -> Schema:
    """The object that holds a recipe's key: the recipe itself, or the definition of a section."""
    found = schema
    for key in path:
        reference = found["properties"][key]["$ref"]
        found = schema["$defs"][reference.removeprefix(_REFERENCE)]
    return found


def _model(registry: Registry, definitions: Schema) -> Schema:
    """The model's section, by its source: each with options of its own."""
    own = Model.model_json_schema()["properties"]
    own.pop("options")
    sections = []
    for name, entry in registry.entries(Kind.MODEL).items():
        options = _config(entry.value.Config, name, Kind.MODEL, definitions).get("properties", {})
        listed = getattr(entry.value, "models", None)
        names = {"name": {"enum": list(listed)}} if listed else {}
        sections.append(
            {
                "type": "object",
                "properties": {**own, **names, **options, "source": {"const": name}},
                "additionalProperties": False,
                "required": [] if name == own["source"]["default"] else ["source"],
            }
        )
    return {"anyOf": sections}
