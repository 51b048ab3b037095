"""Recording of module calls and of custom autograd functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import CaptureError
from quantlab.graph.tracer import Tracer, without_symbols

_PATCHING = threading.RLock()
_COMPOSED = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_DTYPE_DEPENDENT = {"RMSNorm", "FP32LayerNorm"}
"""Norms by class name whose forward asks for dtypes, so that its record would hold for one dtype only."""


class AutogradCall:
    """The ``apply`` of a ``torch.autograd.Function`` as a graph's target, so that its own backward stays."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__module__ = function.__module__

    def __call__(self, *args: Any) -> Any:
        """Apply the function."""
        return self.function.apply(*args)


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of the module is one node: torch's own layers, unless they are made of other modules.

    A class that derives from a torch layer and has a forward of its own is entered.
    """
    if isinstance(module, _COMPOSED):
        return False
    return type(module).forward.__module__.startswith("torch.nn.") or type(module).__name__ in _DTYPE_DEPENDENT


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that stands for a module's output: itself, or the first one in it."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((found for found in map(first_tensor, values) if found is not None), None)


@contextmanager
def recorded_modules(tracer: Tracer) -> Iterator[None]:
    """Module calls and autograd functions are recorded inside.

    ``nn.Module.__call__`` and ``torch.autograd.Function.apply`` are replaced for the whole process and put back at the
    end, errors included; captures in other threads wait.
    """
    with _PATCHING:
        owner, call = threading.get_ident(), nn.Module.__call__
        apply = torch.autograd.Function.__dict__["apply"]

        def recorded_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return call(module, *args, **kwargs)
            return _record_module(tracer, call, module, args, kwargs)

        def recorded_apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
            if threading.get_ident() != owner or not tracer.recording:
                return apply.__func__(cls, *args)
            with tracer.paused():
                node = tracer.emit("call_function", AutogradCall(cls), args)
                return tracer.register(apply.__func__(cls, *without_symbols(args)), node)

        nn.Module.__call__ = recorded_call
        torch.autograd.Function.apply = classmethod(recorded_apply)  # type: ignore[assignment]
        try:
            yield
        finally:
            nn.Module.__call__ = call
            torch.autograd.Function.apply = apply


def _record_module(
    tracer: Tracer, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    path = tracer.module_paths.get(id(module))
    if not tracer.recording:
        return _watch_inner_call(tracer, path, call, module, args, kwargs)
    if not path:
        return call(module, *args, **kwargs)
    tracer.stack.append(path)
    try:
        if path in tracer.leaves or is_leaf(module):
            with tracer.paused():
                output = _record_leaf(tracer, call, module, args, kwargs)
        else:
            _note_module(tracer, module)
            output = call(module, *args, **kwargs)
        tensor = first_tensor(output)
        node = tracer.node_of(tensor) if tensor is not None else None
        if node is not None:
            tracer.module_outputs[path] = node.name
        return output
    except CaptureError:
        raise
    except Exception as error:
        # The innermost module names the place; what the forward itself catches is not ours to change.
        if not hasattr(error, "captured_in"):
            error.captured_in = tracer.where  # type: ignore[attr-defined]
        raise
    finally:
        tracer.stack.pop()


def _record_leaf(
    tracer: Tracer, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    path = tracer.where
    node = tracer.emit("call_module", path, args, kwargs)
    node.meta["call_index"] = tracer.call_counts.get(path, 0)
    tracer.call_counts[path] = node.meta["call_index"] + 1
    if getattr(module, "inplace", False):
        node.meta["impure"] = True
    if not is_leaf(module):
        node.meta["inner_calls"] = []
    tracer.opaque.append(node)
    try:
        output = call(module, *without_symbols(args), **without_symbols(kwargs))
    finally:
        tracer.opaque.pop()
    return tracer.register(output, node)


def _watch_inner_call(
    tracer: Tracer, path: str | None, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
) -> Any:
    """Keep the shapes that the layers inside a module called as it is see."""
    output = call(module, *args, **kwargs)
    inner = tracer.opaque[-1].meta.get("inner_calls") if tracer.opaque else None
    if inner is not None and path and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        inner.append((path, tuple(args[0].shape), tuple(output.shape)))
    return output


def _note_module(tracer: Tracer, module: nn.Module) -> None:
    """Say what entering this module loses."""
    if isinstance(module, nn.MultiheadAttention):
        tracer.note("nn.MultiheadAttention is one opaque call; its projections are no sites")
    if module._forward_hooks or module._forward_pre_hooks:
        tracer.note("forward hooks of a module that holds others are not repeated by the graph")
