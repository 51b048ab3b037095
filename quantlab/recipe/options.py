"""The options of a plugin as text: name, default, type, bounds and what it means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def option_lines(config: type[BaseModel]) -> list[str]:
    """A line an option, in the order of the class; those of an option with options of its own are indented."""
    schema = config.model_json_schema()
    return _lines(schema, schema.get("$defs", {}), "  ") or ["  none"]


def option_types(config: type[BaseModel]) -> dict[str, str]:
    """What may stand at each option, in words: "whole number, at least 1"."""
    schema = config.model_json_schema()
    definitions = schema.get("$defs", {})
    return {name: _type(option, definitions) for name, option in schema.get("properties", {}).items()}


def _lines(schema: Mapping[str, Any], definitions: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, option in schema.get("properties", {}).items():
        default = json.dumps(option["default"]) if "default" in option else "required"
        meaning = option.get("description", "")
        lines.append(f"{indent}{name} = {default}  ({_type(option, definitions)})  {meaning}".rstrip())
        inner = definitions.get(str(option.get("$ref", "")).rpartition("/")[2], {})
        lines += _lines(inner, definitions, f"{indent}  ")
    return lines


def _type(option: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What may stand there, in words: "whole number, at least 1"."""
    if "$ref" in option:
        return _type(definitions[option["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in option:
        return " or ".join(dict.fromkeys(_type(part, definitions) for part in option["anyOf"]))
    if "enum" in option or "const" in option:
        return " | ".join(json.dumps(value) for value in option.get("enum", [option.get("const")]))
    if option.get("type") == "array":
        items = option.get("items") or {}
        return f"list of {_type(items, definitions)}" if items else "list"
    kind = _TYPES.get(option.get("type", ""), "mapping")
    bounds = [f"{words} {option[key]:g}" for key, words in _BOUNDS.items() if key in option]
    return ", ".join([kind, *bounds])
