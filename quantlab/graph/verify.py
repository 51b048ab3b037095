"""Capture a model and prove the graph; whatever happens, some graph that agrees with the model comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from quantlab.errors import QuantlabError
from quantlab.graph.capture import Example, capture
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.compare import blamed_module, confirmed_outputs, largest_difference
from quantlab.graph.exported import capture_exported
from quantlab.graph.modules import is_leaf
from quantlab.graph.opaque import capture_whole

_MOST_LEAVES = 8
"""So many modules are taken as they are, one after another, before the next method is tried."""


def capture_verified(
    model: nn.Module,
    make_inputs: Callable[[int], Example],
    static: Mapping[str, object],
    *,
    batches: Sequence[int] = (1, 3),
    more_inputs: Sequence[Example] = (),
) -> CapturedGraph:
    """Capture a model and compare the graph with it, exactly, at several batch sizes.

    When the graph fails, the next method is tried: value tracing, value tracing with the failing module as it is,
    torch.export, the whole model as one node. Each reason is one of the graph's ``notes``. No failure of tracing
    escapes; what the model itself raises does.

    Args:
        model: in evaluation mode.
        make_inputs: keyword tensors for a batch size.
        static: non-tensor keywords that the forward always gets.
        batches: the batch sizes to compare at; the largest is the example to capture.
        more_inputs: further inputs to compare at, of another height and width say.
    """
    examples = [make_inputs(batch) for batch in sorted(batches, reverse=True)] + list(more_inputs)
    reasons: list[str] = []
    for captured in _attempts(model, examples, static, reasons):
        return replace(captured, notes=(*reasons, *captured.notes))
    return capture_whole(model, examples[0], dict(static), tuple(reasons))


def _attempts(
    model: nn.Module, examples: Sequence[Example], static: Mapping[str, object], reasons: list[str]
) -> Iterator[CapturedGraph]:
    """Graphs that agree with the model, the best first; reasons for passing one over are added as they come."""
    leaves: frozenset[str] = frozenset()
    for _ in range(_MOST_LEAVES):
        failed: str | None
        try:
            captured = capture(model, examples[0], static, leaves=leaves)
            failed = _disagreement(model, captured, examples)
            if failed is None:
                yield captured
                return
            where = _blame(model, captured, examples)
        except QuantlabError as error:
            failed, where = _one_line(error), error.where or ""
        leaf = _leaf_for(model, where, leaves)
        reasons.append(f"value trace: {failed}; " + (f"{leaf} is called as it is" if leaf else "torch.export is tried"))
        if leaf is None:
            break
        leaves |= {leaf}
    try:
        captured = capture_exported(model, examples[0], static, ())
        failed = _disagreement(model, captured, examples)
        if failed is None:
            yield replace(captured, module_outputs=confirmed_outputs(model, captured, examples[0]))
            return
    except QuantlabError as error:
        failed = _one_line(error)
    reasons.append(f"torch.export: {failed}; the model is called as it is, with its layers replaced in place")


def _disagreement(model: nn.Module, captured: CapturedGraph, examples: Sequence[Example]) -> str | None:
    """How the graph fails to be the model, or None when it agrees everywhere."""
    for example in examples:
        try:
            difference = largest_difference(model, captured, example)
        except QuantlabError as error:
            return _one_line(error)
        except Exception as error:
            return f"the graph fails on {_shapes(example)} ({type(error).__name__}: {_first_line(error)})"
        if difference != 0.0:
            return f"the graph differs from the model by {difference:.3g} on {_shapes(example)}"
    return None


def _blame(model: nn.Module, captured: CapturedGraph, examples: Sequence[Example]) -> str:
    """Path of the module where graph and model first part, over all examples."""
    for example in examples:
        try:
            if path := blamed_module(model, captured, example):
                return path
        except Exception:  # a graph that cannot even be walked has no module to blame
            return ""
    return ""


def _leaf_for(model: nn.Module, where: str, leaves: frozenset[str]) -> str | None:
    """The module to call as it is: the one to blame, or the nearest above it that is not one yet."""
    try:
        while where and (where in leaves or is_leaf(model.get_submodule(where))):
            where = where.rpartition(".")[0]
        return where if where and isinstance(model.get_submodule(where), nn.Module) else None
    except AttributeError:
        return None


def _one_line(error: QuantlabError) -> str:
    return error.message.replace("\n", ";")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shapes(example: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in example.items() if hasattr(value, "shape"))
