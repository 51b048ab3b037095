"""What the graph of a packed file may call: arithmetic on tensors, and nothing that reaches the machine.

A graph is run as generated code, so a file from somewhere else is checked before a name in it is imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import keyword
import math
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch

from quantlab.errors import ArtefactError

_BUILTINS = {getattr, abs, bool, divmod, float, int, len, max, min, pow, range, round, slice, sum, tuple, list}
_OWN = frozenset(
    {
        "quantlab.graph.guards:require",
        "quantlab.graph.guards:contiguous_when",
        "quantlab.graph.opaque:call_opaque",
    }
)
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "scalar_tensor", "tensor", "zeros")
_TORCH = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch._C._special", "torch._C._linalg")
_CALLS = {"attrgetter", "itemgetter", "methodcaller", "call"}
"""Functions of ``operator`` that make or call functions."""
_REACHING = {
    "numpy",
    "apply_",
    "map_",
    "map2_",
    "register_hook",
    "storage",
    "untyped_storage",
    "share_memory_",
    "from_file",
}
"""Methods and operators of tensors that call functions or lead out of tensors."""


def require_harmless(text: str) -> None:
    """Raise ArtefactError for a graph, as ``to_json`` writes it, that names anything but arithmetic."""
    try:
        data = json.loads(text)
        nodes, output_type = data["nodes"], data["output_type"]
        targets = [(str(node["op"]), str(node["target"]), node) for node in nodes]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError("the file's graph cannot be read", got=f"{type(error).__name__}: {error}") from error
    for op, target, node in targets:
        if not _is_harmless(op, target) or not all(map(_is_attribute, _attributes(target, node))):
            raise ArtefactError(
                "the file's graph calls what no packed model needs, and it is not run",
                got=f"{op} {target}",
                next_step="distrust the file, or pack the model again",
            )
    if output_type is not None and str(output_type["target"]).partition(".")[0] != "diffusers":
        raise ArtefactError("the file's graph returns an object of a class outside diffusers", got=output_type)


def _is_harmless(op: str, target: str) -> bool:
    match op:
        case "output":
            return target == "output"
        case "placeholder":
            return target.isidentifier() and not keyword.iskeyword(target)
        case "get_attr" | "call_module":
            return all(part.isidentifier() or part.isdecimal() for part in target.split("."))
        case "call_method":
            return target not in _REACHING and _is_public(target) and callable(getattr(torch.Tensor, target, None))
        case "call_function":
            return target in _OWN or _is_arithmetic(*target.split(":", 1)) if ":" in target else False
    return False


def _is_arithmetic(module: str, name: str) -> bool:
    match module:
        case "builtins":
            return any(name == function.__name__ for function in _BUILTINS)
        case "math":
            return _is_public(name) and callable(getattr(math, name, None))
        case "operator" | "_operator":
            return name not in _CALLS and name in operator.__all__
        case "op":
            namespace, _, rest = name.partition(".")
            return namespace == "aten" and rest.partition(".")[0] not in _REACHING
    found = getattr(importlib.import_module(module), name, None) if module in _TORCH else None
    return found is not None and any(found is function for function in _tensor_functions().get(name, ()))


@functools.cache
def _tensor_functions() -> dict[str, list[Any]]:
    """Functions of torch that take tensors, by name, and those that make one from numbers."""
    found: dict[str, list[Any]] = {name: [getattr(torch, name)] for name in _FACTORIES}
    for home, functions in torch.overrides.get_overridable_functions().items():
        if home is not torch.Tensor:
            for function in functions:
                found.setdefault(function.__name__, []).append(function)
    return found


def _attributes(target: str, node: dict[str, Any]) -> Iterator[Any]:
    """The names that a node reads by ``getattr``; None for one that is computed."""
    if target == "builtins:getattr":
        arguments: Collection[Any] = node["args"].get("tuple", ())
        names = [name for name in list(arguments)[1:2] if isinstance(name, str)]
        yield from names or [None]


def _is_attribute(name: str | None) -> bool:
    """Whether a tensor has a plain attribute of this name."""
    return name is not None and _is_public(name) and inspect.isdatadescriptor(getattr(torch.Tensor, name, None))


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")
