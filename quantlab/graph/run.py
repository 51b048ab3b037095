"""Run a captured graph with the model as its root."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from quantlab.errors import CaptureError, nearest
from quantlab.graph.captured import ROOT, CapturedGraph, OutputType
from quantlab.graph.inputs import RETURN_DICT, flatten

Forward = Callable[[nn.Module, Mapping[str, Any]], Any]
"""A graph's forward: the model and the inputs, flat or nested."""


def runner(model: nn.Module, captured: CapturedGraph) -> Callable[[Mapping[str, Any]], Any]:
    """The graph as a function of its inputs.

    It returns what the captured call of the model returns; a graph with taps returns a pair of that and the tapped
    tensors by module path.

    Raises (when called):
        CaptureError: an input is unknown or missing, or a size breaks a guard.
    """
    forward = compile_graph(captured)
    return lambda inputs: forward(model, inputs)


def compile_graph(captured: CapturedGraph, wrap: bool = True) -> Forward:
    """The graph as a function of a model and the inputs, to be run with any copy of the model.

    Args:
        captured: the graph.
        wrap: return what the captured call returned; otherwise the graph's plain output.
    """
    code = captured.graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)
    generated = namespace["forward"]
    placeholders = tuple(str(node.target) for node in captured.graph.find_nodes(op="placeholder"))
    finish = _wrapper(captured) if wrap else lambda output: output

    def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        values = check_inputs(captured, flatten(inputs)) | dict(captured.constants) | {ROOT: model}
        return finish(generated(model, *(values[name] for name in placeholders)))

    return forward


def check_inputs(captured: CapturedGraph, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, all there and no other.

    Raises:
        CaptureError: one is missing or unknown.
    """
    allowed = ", ".join(captured.input_names)
    again = "capture the model again with the inputs it is to be called with"
    for name in flat:
        if name not in captured.input_names:
            raise CaptureError(
                f'the graph has no input "{name}"',
                allowed=allowed,
                next_step=nearest(name, captured.input_names) or again,
            )
    for name in captured.input_names:
        if name not in flat:
            raise CaptureError(f'the input "{name}" is missing', got=", ".join(flat), allowed=allowed, next_step=again)
    return dict(flat)


def _wrapper(captured: CapturedGraph) -> Callable[[Any], Any]:
    """How the graph's output becomes that of the captured call."""
    if captured.output_type is None or not captured.static.get(RETURN_DICT, True):
        return lambda output: output
    wrap = output_wrapper(captured.output_type)
    return lambda output: (wrap(output[0]), output[1]) if captured.taps else wrap(output)


def output_wrapper(output_type: OutputType) -> Callable[[tuple[Any, ...]], Any]:
    """Puts a graph's tuple into the class that the model's forward returns."""
    module, _, name = output_type.target.partition(":")
    wrapped: Any = importlib.import_module(module)
    for part in name.split("."):
        wrapped = getattr(wrapped, part)
    return lambda output: wrapped(**dict(zip(output_type.fields, output, strict=True)))
