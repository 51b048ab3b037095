"""Turn sites into quantized layers at their own paths, and lead the timestep to them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx, nn

from quantlab.errors import CaptureError, nearest
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import LayerCall, embedding_path, layer_call
from quantlab.graph.opaque import as_opaque_call
from quantlab.graph.roles import data_inputs
from quantlab.quant.layers import QuantizedLayer, to_quantized


def insert_quantizers(
    model: nn.Module, captured: CapturedGraph, site_names: Sequence[str], timestep_input: str | None
) -> CapturedGraph:
    """Replace the layers ``site_names`` of ``model`` by quantized ones, still without quantizers.

    The float function stays: a quantized layer without parts computes what the layer computed.

    Args:
        model: changed in place; parameters keep their identity and names.
        captured: of this model or of one like it.
        site_names: paths of layers with a weight.
        timestep_input: the input that becomes the second argument of every quantized layer, or None.

    Raises:
        CaptureError: a name is no layer of the graph, or the timestep is no input of it.
    """
    captured = captured.copy()
    graph, names = captured.graph, frozenset(site_names)
    timestep = _placeholder(captured, timestep_input) if timestep_input else None
    reached: set[str] = set()
    for node in list(graph.nodes):
        if (call := layer_call(model, node)) is not None and call.path in names:
            _call_layer(_without_bias(graph, node, call), call.path, call.input, timestep)
            reached.add(call.path)
        elif (path := embedding_path(model, node)) is not None and path in names and "inner_calls" not in node.meta:
            node.args, node.kwargs = tuple(data_inputs(node)), {}  # hooks see what is given by position
            reached.add(path)
        elif "inner_calls" in node.meta:
            inner = names & {path for path, *_ in node.meta["inner_calls"]}
            if inner and timestep is not None:
                _time_inside(graph, node, sorted(inner), timestep)
            reached |= inner
    for name in site_names:
        if name not in reached:
            raise CaptureError(
                "no linear layer, convolution or embedding of the graph has this path",
                where=name,
                next_step=nearest(name, [path for path, _ in model.named_modules()]),
            )
    for name in site_names:
        quantize_at(model, name)
    graph.lint()
    return captured


def _placeholder(captured: CapturedGraph, name: str) -> fx.Node:
    for node in captured.graph.find_nodes(op="placeholder"):
        if node.target == name:
            return node
    raise CaptureError(
        f'the graph has no input "{name}" for the timestep',
        allowed=", ".join(captured.input_names),
        next_step=nearest(name, captured.input_names),
    )


def _call_layer(node: fx.Node, path: str, layer_input: fx.Node, timestep: fx.Node | None) -> None:
    """Make a node the call of the layer at ``path``, with the timestep when both have one entry a sample."""
    arguments: tuple[fx.Node, ...] = (layer_input,)
    if timestep is not None and _samples(layer_input) == _samples(timestep):
        arguments += (timestep,)
    if node.op != "call_module":
        # A layer that the model calls by its weight; the node keeps its name and place.
        node.op, node.target = "call_module", path
    node.args, node.kwargs = arguments, {}


def _without_bias(graph: fx.Graph, node: fx.Node, call: LayerCall) -> fx.Node:
    """The node that shall call the layer: a new one where a bias is computed, which ``node`` then adds to it."""
    if call.bias is None:
        return node
    with graph.inserting_before(node):
        inner = graph.create_node("call_module", call.path, (call.input,))
    inner.meta = dict(node.meta)
    node.target, node.args, node.kwargs = operator.add, (inner, call.bias), {}
    return inner


def _samples(node: fx.Node) -> int | None:
    shape = node.meta.get("shape")
    return shape[0] if shape else None


def _time_inside(graph: fx.Graph, node: fx.Node, inner: Sequence[str], timestep: fx.Node) -> None:
    """Have a module that is called as it is hand the timestep to the layers inside it."""
    pair = as_opaque_call(graph, node)
    parent = str(pair.meta["fqn"])
    timed = tuple(path.removeprefix(f"{parent}.") if parent else path for path in inner)
    module, _, _, *rest = pair.args
    pair.args = (module, timestep, timed, *rest)


def quantize_at(model: nn.Module, name: str) -> None:
    """Put a quantized layer wherever the model holds the layer ``name``; a shared one stays shared."""
    layer = model.get_submodule(name)
    if isinstance(layer, QuantizedLayer):
        return
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is layer]
    quantized = to_quantized(layer)  # type: ignore[arg-type]
    for path in paths:
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, quantized)
