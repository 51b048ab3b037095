"""Captured graphs as JSON, and back without running or tracing the model."""

from __future__ import annotations

import base64
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import fx

from quantlab.errors import ArtefactError, CaptureError
from quantlab.graph.captured import CapturedGraph, CaptureMethod, Guard, OutputType
from quantlab.graph.modules import AutogradCall

FORMAT_VERSION = 1
_HOMES = ("torch", "torch.nn.functional", "operator", "builtins", "math", "torch._C._nn", "torch.functional")
"""Where functions can be found that do not say so themselves."""
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


def to_json(captured: CapturedGraph) -> str:
    """The graph with all that is known about it.

    Raises:
        CaptureError: a node calls a function that cannot be imported by name, or has an argument without a JSON form.
    """
    return json.dumps(
        {
            "format": FORMAT_VERSION,
            "torch": torch.__version__,
            "method": captured.method,
            "input_names": captured.input_names,
            "static": _encode(dict(captured.static)),
            "guards": [asdict(guard) for guard in captured.guards],
            "notes": captured.notes,
            "module_outputs": dict(captured.module_outputs),
            "output_type": asdict(captured.output_type) if captured.output_type else None,
            "taps": captured.taps,
            "constants": base64.b64encode(save_tensors(dict(captured.constants))).decode(),
            "nodes": [_encode_node(node) for node in captured.graph.nodes],
        }
    )


def from_json(text: str) -> CapturedGraph:
    """The graph that ``to_json`` wrote.

    Raises:
        ArtefactError: the text is not such a graph, comes from a newer version, or names a function that is gone.
    """
    try:
        data = json.loads(text)
        if data["format"] > FORMAT_VERSION:
            raise ArtefactError(
                "the graph was written by a newer version", got=data["format"], allowed=str(FORMAT_VERSION)
            )
        return CapturedGraph(
            graph=_decode_graph(data["nodes"]),
            input_names=tuple(data["input_names"]),
            static=_decode(data["static"], {}),
            guards=tuple(Guard(**guard) for guard in data["guards"]),
            notes=tuple(data["notes"]),
            method=CaptureMethod(data["method"]),
            module_outputs=data["module_outputs"],
            constants=load_tensors(base64.b64decode(data["constants"])),
            output_type=_decode_output_type(data["output_type"]),
            taps=tuple(data["taps"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise ArtefactError(
            "this is not a captured graph that this version reads",
            got=f"{type(error).__name__}: {error}",
            next_step="capture the model again",
        ) from error


def _decode_output_type(data: dict[str, Any] | None) -> OutputType | None:
    return OutputType(data["target"], tuple(data["fields"])) if data else None


def _encode_node(node: fx.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "target": _encode_target(node.target),
        "args": _encode(node.args),
        "kwargs": _encode(dict(node.kwargs)),
        "meta": {key: _encode(value) for key, value in node.meta.items() if key in _META},
    }


_META = ("fqn", "impure", "scalar", "shape", "dtype", "call_index", "inner_calls")


def _decode_graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph, known = fx.Graph(), dict[str, fx.Node]()
    for data in nodes:
        target, op = data["target"], data["op"]
        target = _decode_target(target) if op == "call_function" else target
        node = graph.create_node(op, target, _decode(data["args"], known), _decode(data["kwargs"], known), data["name"])
        if node.name != data["name"]:
            raise ValueError(f"two nodes are called {data['name']}")
        node.meta.update({key: _decode(value, known) for key, value in data["meta"].items()})
        known[node.name] = node
    graph.lint()
    return graph


def _encode_target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"op:{target.namespace}.{target._opname}.{target._overloadname}"
    if isinstance(target, AutogradCall):
        return f"autograd:{_path_of(target.function)}"
    return _path_of(target)


def _path_of(function: Any) -> str:
    """ "module:qualname" from which the very object can be imported."""
    names = dict.fromkeys((getattr(function, "__qualname__", ""), function.__name__))
    for home in (function.__module__, *_HOMES):
        for name in names:
            try:
                if home and _import(home, name) is function:
                    return f"{home}:{name}"
            except (ImportError, AttributeError):
                continue
    raise CaptureError(
        f"the graph calls {function!r}, which cannot be imported by name", next_step="define it at a module's top level"
    )


def _import(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _decode_target(text: str) -> Any:
    kind, _, rest = text.partition(":")
    if kind == "op":
        namespace, name, overload = rest.rsplit(".", 2)
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if kind == "autograd":
        return AutogradCall(_import(*rest.split(":")))
    return _import(kind, rest)


def _encode(value: Any) -> Any:
    """A value of a node in JSON; what JSON lacks becomes {kind: content}."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case slice():
            return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
        case tuple():
            return {"tuple": [_encode(entry) for entry in value]}
        case list():
            return [_encode(entry) for entry in value]
        case Mapping():
            return {"dict": [[_encode(key), _encode(entry)] for key, entry in value.items()]}
        case torch.device():
            return {"device": str(value)}
        case complex():
            return {"complex": str(value)}
        case _ if value is Ellipsis:
            return {"ellipsis": True}
        case _ if isinstance(value, _TORCH_VALUES):
            return {"torch": str(value).removeprefix("torch.")}
    raise CaptureError(f"a value of type {type(value).__name__} cannot be stored with the graph", got=repr(value))


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, nodes) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "slice":
            return slice(*(_decode(part, nodes) for part in content))
        case "tuple":
            return tuple(_decode(entry, nodes) for entry in content)
        case "dict":
            return {_decode(key, nodes): _decode(entry, nodes) for key, entry in content}
        case "device":
            return torch.device(content)
        case "complex":
            return complex(content)
        case "ellipsis":
            return Ellipsis
        case "torch":
            found = getattr(torch, content)
            if not isinstance(found, _TORCH_VALUES):
                raise ValueError(f"torch.{content} is no value of a graph")
            return found
    raise ValueError(f"unknown kind of value {kind!r}")
