"""Value tracing: run the forward once and write down what it does.

The real forward runs on real, fake or meta tensors, so that every branch, ``len(x.shape)`` or ``isinstance`` works.
Torch functions, module calls and custom autograd functions are recorded as they happen.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from quantlab.errors import CaptureError, QuantlabError
from quantlab.graph.captured import CapturedGraph, CaptureMethod, OutputType, describe_output
from quantlab.graph.functions import FunctionRecorder, OperatorWatch
from quantlab.graph.inputs import RETURN_DICT, flatten, tensors_of
from quantlab.graph.modules import recorded_modules
from quantlab.graph.relative import (
    align,
    fake_copy,
    is_fake,
    make_dtypes_relative,
    merge_layout_branches,
    model_dtype,
    opposite_batch,
)
from quantlab.graph.tracer import Tracer

Example = Mapping[str, Any]
"""Keyword tensors of a forward, or nested dicts of them; dimension 0 is the batch."""


def capture(
    model: nn.Module, example: Example, static: Mapping[str, object], *, leaves: frozenset[str] = frozenset()
) -> CapturedGraph:
    """Record one forward as a graph.

    Batch size, height and width, device and dtype stay open where the forward leaves them open; what it branched on
    becomes a guard.

    Args:
        model: in evaluation mode; on real, fake or meta tensors like the example.
        example: keyword tensors; use an odd batch such as 3 and a timestep for each sample.
        static: non-tensor keywords that the forward always gets.
        leaves: paths of modules to call as they are instead of entering them.

    Raises:
        CaptureError: the forward does something that a graph cannot repeat; ``where`` is the module's path.
    """
    captured = _trace(model, example, static, leaves)
    notes: list[str] = []
    captured = _open_batch(captured, model, example, static, leaves, notes)
    captured = _open_dtypes(captured, model, example, static, leaves, notes)
    return replace(captured, notes=(*captured.notes, *notes))


def capture_once(model: nn.Module, example: Example, static: Mapping[str, object]) -> CapturedGraph:
    """Record one forward as a graph whose dtypes and batch may be those of the example: enough to find its sites.

    Raises:
        CaptureError: as ``capture``.
    """
    return _trace(model, example, static, frozenset())


def _trace(model: nn.Module, example: Example, static: Mapping[str, object], leaves: frozenset[str]) -> CapturedGraph:
    arguments = pytree.tree_map_only(Tensor, torch.clone, dict(example))  # one tensor given twice is two inputs
    tensors = tensors_of(flatten(arguments))
    fake_modes = [tensor.fake_mode for tensor in tensors.values() if isinstance(tensor, FakeTensor)]
    tracer = Tracer(model, leaves, fake=any(map(is_fake, [*tensors.values(), *model.parameters()])))
    for name, tensor in tensors.items():
        tracer.add_input(name, tensor)
    keywords = arguments | dict(static)
    if RETURN_DICT in inspect.signature(model.forward).parameters:
        keywords[RETURN_DICT] = True  # to see which class the tensors are wrapped in
    try:
        with (
            recorded_modules(tracer),
            torch.no_grad(),
            fake_modes[0] if fake_modes else nullcontext(),
            OperatorWatch(tracer),
            FunctionRecorder(tracer),
        ):
            output = model.forward(**keywords)
            tracer.recording = False
    except QuantlabError:
        raise
    except Exception as error:
        where = getattr(error, "captured_in", "") or "forward"
        raise CaptureError(
            "the forward failed while it was captured", where=where, got=f"{type(error).__name__}: {error}"
        ) from error
    output_type = _finish(tracer, output)
    return CapturedGraph(
        graph=tracer.graph,
        input_names=tuple(tensors),
        static=dict(static),
        guards=tuple(tracer.guards),
        notes=tuple(tracer.notes),
        method=CaptureMethod.LEAF_MODULES if leaves else CaptureMethod.VALUE_TRACE,
        module_outputs={path: name for path, name in tracer.module_outputs.items() if _exists(tracer.graph, name)},
        constants=tracer.constants,
        output_type=output_type,
    )


def _finish(tracer: Tracer, output: Any) -> OutputType | None:
    """Close the graph with the output's tensors and drop what nothing uses."""
    output_type = describe_output(output)
    if output_type is not None:
        output = tuple(output[name] for name in output_type.fields)
    tracer.graph.output(tracer.argument(output))
    tracer.graph.eliminate_dead_code(is_kept)
    tracer.graph.lint()
    return output_type


def is_kept(node: fx.Node) -> bool:
    """Whether a node stays although nothing uses it: it changes a tensor in place, or checks a guard."""
    return node.op in ("placeholder", "output") or bool(node.meta.get("impure"))


def _exists(graph: fx.Graph, name: str) -> bool:
    return any(node.name == name for node in graph.nodes)


def _open_dtypes(
    captured: CapturedGraph,
    model: nn.Module,
    example: Example,
    static: Mapping[str, object],
    leaves: frozenset[str],
    notes: list[str],
) -> CapturedGraph:
    """Literal dtypes that are the model's own follow the model from now on."""
    own = model_dtype(model)
    if own is None:
        return captured
    other = torch.float32 if own == torch.float64 else torch.float64
    again = _trace_fake(model, example, static, leaves, other, repeats=1)
    pairs = align(captured.graph, again.graph) if isinstance(again, CapturedGraph) else None
    if pairs is None:
        notes.append(f"the graph's dtypes are fixed: the forward is another one in {other} ({_reason(again)})")
        return captured
    reference = next(name for name, p in model.named_parameters() if p.is_floating_point())
    make_dtypes_relative(captured.graph, pairs, reference)
    captured.graph.lint()
    return captured


def _open_batch(
    captured: CapturedGraph,
    model: nn.Module,
    example: Example,
    static: Mapping[str, object],
    leaves: frozenset[str],
    notes: list[str],
) -> CapturedGraph:
    """Guards on the batch go when the other branch only changes the memory layout (diffusers' upsampling does)."""
    tensors = tensors_of(flatten(example))
    batch = next((len(tensor) for tensor in tensors.values() if tensor.dim()), 0)
    larger = opposite_batch(captured.graph, batch)
    if larger is None:
        return captured
    again = _trace_fake(model, example, static, leaves, None, repeats=larger // batch)
    pairs = align(captured.graph, again.graph) if isinstance(again, CapturedGraph) else None
    if not isinstance(again, CapturedGraph) or pairs is None:
        notes.append(f"guards on sizes stay: a batch of {larger} may take another path ({_reason(again)})")
        return captured
    dropped = merge_layout_branches(captured.graph, again.graph, pairs)
    captured.graph.lint()
    return replace(captured, guards=tuple(g for g in captured.guards if g.condition not in dropped))


def _reason(outcome: CapturedGraph | QuantlabError) -> str:
    return outcome.what if isinstance(outcome, QuantlabError) else "its nodes differ"


def _trace_fake(
    model: nn.Module,
    example: Example,
    static: Mapping[str, object],
    leaves: frozenset[str],
    dtype: torch.dtype | None,
    repeats: int,
) -> CapturedGraph | QuantlabError:
    """Trace on fake tensors, with another floating dtype and a batch ``repeats`` times as large; costs no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        result = mode.from_tensor(tensor.detach())
        result = result.to(dtype) if dtype is not None and tensor.is_floating_point() else result
        return result.repeat(repeats, *[1] * (tensor.dim() - 1)) if repeats > 1 and tensor.dim() else result

    try:
        copied = fake_copy(model, mode, dtype)
        with mode:
            inputs = pytree.tree_map_only(Tensor, fake, dict(example))
        return _trace(copied, inputs, static, leaves)
    except QuantlabError as error:
        return error
    except Exception as error:  # the first trace stands on its own; why the second failed is told
        return CaptureError(f"{type(error).__name__}: {error}")
