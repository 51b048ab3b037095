"""Nested arguments as flat names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

RETURN_DICT = "return_dict"
"""The flag of diffusers' forwards that says whether the output is wrapped; it changes nothing else."""


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested dicts, tuples and lists as ``name__key``; None counts as not given."""
    return dict(_leaves(arguments, ""))


def _leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}__")
        elif isinstance(value, tuple | list) and any(isinstance(entry, Tensor) for entry in value):
            yield from _leaves(dict(enumerate(value)), f"{name}__")
        elif value is not None:
            yield name, value


def tensors_of(flat: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among flat arguments."""
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def call_arguments(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in, keywords beyond the signature among them."""
    bound = signature.bind_partial(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
    return arguments


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call from flat names: ``name__key`` is the entry ``key`` of a dict ``name``."""
    arguments: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("__")
        inner = arguments
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return arguments
