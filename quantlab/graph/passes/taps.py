"""Give a graph the outputs of some of its modules as extra outputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from quantlab.errors import CaptureError, nearest
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.opaque import as_opaque_call


def attach_taps(captured: CapturedGraph, module_paths: Sequence[str]) -> CapturedGraph:
    """The graph with the output ``(output, {path: tensor})``.

    Of a module that returns several tensors the first is taken; of one called several times, the last call's.

    Raises:
        CaptureError: a path is no module that the forward calls.
    """
    captured = captured.copy()
    graph = captured.graph
    by_name = {node.name: node for node in graph.nodes}
    taps: dict[str, fx.Node] = {}
    for path in module_paths:
        name = captured.module_outputs.get(path)
        if name is not None:
            taps[path] = _unchanged(graph, by_name[name])
        else:
            taps[path] = _inner_tap(graph, path, captured)
    (output,) = graph.find_nodes(op="output")
    before = output.args[0][0] if captured.taps else output.args[0]  # type: ignore[index]
    output.args = ((before, taps),)
    graph.lint()
    return replace(captured, taps=tuple(module_paths))


def _unchanged(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A tensor as its module left it: a copy when something later changes it in place."""
    if not any(user.meta.get("impure") and not user.meta.get("scalar") for user in node.users):
        return node
    with graph.inserting_after(node):
        return graph.call_method("clone", (node,))


def _inner_tap(graph: fx.Graph, path: str, captured: CapturedGraph) -> fx.Node:
    """A tap inside a module that is called as it is."""
    holders = [node for node in graph.nodes if path in {inner for inner, *_ in node.meta.get("inner_calls", ())}]
    if not holders:
        known = [*captured.module_outputs, *(p for n in graph.nodes for p, *_ in n.meta.get("inner_calls", ()))]
        raise CaptureError(
            f'no module of the graph has the path "{path}"',
            where="taps",
            next_step=nearest(path, known) or "choose one of the paths that quantlab show --sites lists",
        )
    pair = as_opaque_call(graph, holders[-1])
    parent = str(pair.meta["fqn"])
    relative = path.removeprefix(f"{parent}.") if parent else path
    module, timestep, timed, taps, args, kwargs = pair.args
    pair.args = (module, timestep, timed, (*taps, relative), args, kwargs)  # type: ignore[misc]
    with graph.inserting_after(pair):
        tensors = graph.call_function(operator.getitem, (pair, 1))
    with graph.inserting_after(tensors):
        return graph.call_function(operator.getitem, (tensors, relative))
