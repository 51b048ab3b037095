"""Modules called as they are: the layers inside get their timestep, and taps their tensors, through hooks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlab.graph.capture import Example
from quantlab.graph.captured import ROOT, CapturedGraph, CaptureMethod
from quantlab.graph.inputs import flatten, tensors_of
from quantlab.graph.modules import first_tensor


def call_opaque(
    module: nn.Module,
    timestep: Tensor | None,
    timed: Sequence[str],
    taps: Sequence[str],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module that was not entered by the capture.

    Args:
        module: it.
        timestep: [B], given to the layers ``timed`` as a second argument, or None.
        timed: paths in ``module`` of quantized layers.
        taps: paths in ``module`` whose outputs are wanted; the empty path is the module itself.
        args: of the call.
        kwargs: of the call.

    Returns:
        What the module returns, and the tapped tensors by path in ``module``.
    """
    tapped: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                tapped[path] = tensor

        return hook

    with ExitStack() as hooks:
        for path in timed if timestep is not None else ():
            layer = module.get_submodule(path)
            handle = layer.register_forward_pre_hook(lambda _layer, given: (given[0], timestep))
            hooks.callback(handle.remove)
        for path in taps:
            hooks.callback(module.get_submodule(path).register_forward_hook(keep(path)).remove)
        return unbound_forward(module)(*args, **kwargs), tapped


def unbound_forward(module: nn.Module) -> Callable[..., Any]:
    """A call of the module by its own forward, also when a graph is bound to it."""
    original = getattr(type(module), "quantlab_original_class", None)
    return module if original is None else lambda *args, **kwargs: original.forward(module, *args, **kwargs)


def capture_whole(model: nn.Module, example: Example, static: dict[str, Any], notes: tuple[str, ...]) -> CapturedGraph:
    """A graph of one node, the model's own forward: the last resort, which works for every model."""
    inner: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inner.append((path, tuple(args[0].shape), tuple(output.shape)))

        return hook

    graph = fx.Graph()
    tensors = tensors_of(flatten(example))
    placeholders = {name: graph.placeholder(name) for name in tensors}
    for name, tensor in tensors.items():
        placeholders[name].meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype)
    keywords = _nested(example, placeholders) | static
    with graph.inserting_before(None):
        root = graph.placeholder(ROOT)
    pair = graph.call_function(call_opaque, (root, None, (), (), (), keywords))
    pair.meta["fqn"] = ""
    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(watch(path)).remove)
        model(**example, **static)
    pair.meta["inner_calls"] = inner
    graph.output(graph.call_function(operator.getitem, (pair, 0)))
    return CapturedGraph(graph, tuple(tensors), static, notes=notes, method=CaptureMethod.WHOLE_MODULE)


def _nested(example: Any, placeholders: dict[str, fx.Node], prefix: str = "") -> dict[str, Any]:
    """The example with placeholders in place of its tensors."""
    nested: dict[str, Any] = {}
    for key, value in example.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            nested[key] = _nested(value, placeholders, f"{name}__")
        elif isinstance(value, tuple | list):
            nested[key] = tuple(placeholders.get(f"{name}__{i}", entry) for i, entry in enumerate(value))
        else:
            nested[key] = placeholders.get(name, value)
    return nested


def as_opaque_call(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A module called as it is, as the call that also serves timesteps and taps; the node keeps the output."""
    if node.target is call_opaque:
        return node
    path = str(node.target)
    with graph.inserting_before(node):
        module = graph.create_node("get_attr", path)
        pair = graph.call_function(call_opaque, (module, None, (), (), node.args, dict(node.kwargs)))
    pair.meta.update(fqn=path, inner_calls=node.meta.pop("inner_calls"))
    node.op, node.target, node.args, node.kwargs = "call_function", operator.getitem, (pair, 0), {}
    return pair
