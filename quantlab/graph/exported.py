"""Capture by torch.export: the second choice, when value tracing fails.

The exported program takes parameters as inputs; here they become attributes of the model again, so that passes find
the layers by their own paths.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from quantlab.errors import CaptureError
from quantlab.graph.captured import CapturedGraph, CaptureMethod, OutputType, describe_output
from quantlab.graph.compare import copied
from quantlab.graph.inputs import RETURN_DICT, flatten, tensors_of


def capture_exported(
    model: nn.Module, example: Mapping[str, Any], static: Mapping[str, object], notes: tuple[str, ...]
) -> CapturedGraph:
    """Capture one forward with ``torch.export``, every size open that the model leaves open.

    Raises:
        CaptureError: torch.export cannot, or its program holds what a flat graph cannot.
    """
    keywords = copied(example) | dict(static)
    wraps = RETURN_DICT in inspect.signature(model.forward).parameters
    if wraps:
        keywords[RETURN_DICT] = False
    sizes = pytree.tree_map(
        lambda leaf: dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, Tensor) else None, keywords
    )
    try:
        program = export(model, args=(), kwargs=keywords, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # torch.export raises whatever its many parts raise
        line = str(error).strip().partition("\n")[0]
        raise CaptureError("torch.export failed", got=f"{type(error).__name__}: {line}") from error
    graph, constants = _over_model(model, program, tuple(tensors_of(flatten(example))))
    return CapturedGraph(
        graph=graph,
        input_names=tuple(tensors_of(flatten(example))),
        static=dict(static),
        notes=notes,
        method=CaptureMethod.EXPORT,
        module_outputs=_last_nodes(graph),
        constants=constants,
        output_type=output_type_of(model, example, static) if wraps else None,
    )


def output_type_of(model: nn.Module, example: Mapping[str, Any], static: Mapping[str, object]) -> OutputType | None:
    """The class in which the forward wraps its output when it is asked to."""
    with torch.no_grad():
        return describe_output(model(**copied(example), **(dict(static) | {RETURN_DICT: True})))


def _over_model(
    model: nn.Module, program: ExportedProgram, names: tuple[str, ...]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The program's graph with the model as its root, and its constants."""
    signature = program.graph_signature
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("the forward changes its inputs or buffers, which an exported graph hands back instead")
    inputs = iter(names)
    graph, constants, copies = fx.Graph(), dict[str, Tensor](), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in owned:
            copies[node] = graph.create_node("get_attr", owned[node.name])
        elif node.op == "placeholder" and node.name in lifted:
            name = f"constant_{len(constants)}"
            constants[name] = cast(Tensor, program.constants[lifted[node.name]])
            with graph.inserting_before(None):
                copies[node] = graph.placeholder(name)
        elif node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            with graph.inserting_before(None):
                copies[node] = graph.placeholder(next(inputs))
        elif node.op == "get_attr":
            raise CaptureError("the exported program has a part that is a graph of its own", got=str(node.target))
        elif node.op == "output":
            values = [copies[value] for value in node.args[0] if isinstance(value, fx.Node)]
            graph.output(pytree.tree_unflatten(values, program.call_spec.out_spec))  # type: ignore[arg-type]
            continue
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, lambda value: copies[value])
        if node in copies:
            copies[node].meta = _meta(node)
    graph.lint()
    return graph, constants


def _meta(node: fx.Node) -> dict[str, Any]:
    """What the passes read of a node: its module, shape and dtype."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    meta: dict[str, Any] = {"fqn": stack[-1][0] if stack else "", "stack": [path for path, _ in stack if path]}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        meta["shape"] = tuple(_hint(size) for size in value.shape)
        meta["dtype"] = value.dtype
    elif value is None or isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        meta["scalar"] = True
        meta["impure"] = not node.users
    return meta


def _hint(size: int | torch.SymInt) -> int:
    """The size in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _last_nodes(graph: fx.Graph) -> dict[str, str]:
    """The last tensor computed in each module: a guess at its output, to be confirmed."""
    return {path: node.name for node in graph.nodes if "shape" in node.meta for path in node.meta.get("stack", ())}
