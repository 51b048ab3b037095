"""Recording of torch functions: every call the forward makes becomes a node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantlab.graph.symbolic import make_symbolic
from quantlab.graph.tracer import Tracer, UnrecordableError, has_tensor, without_symbols

_VALUE_READS = {
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero",
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__",
}  # fmt: skip
"""Calls that turn a tensor's values into Python values, on which the forward may then branch."""
_OPERATORS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
_GRAD_MODE = {"_set_grad_enabled", "set_grad_enabled"}
_TRAINING_FLAGS = (F.dropout, F.batch_norm, F.alpha_dropout, F.dropout2d, F.instance_norm)


class FunctionRecorder(TorchFunctionMode):
    """Sees every torch function, method, operator and attribute of a tensor, factories included."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one torch function and record it."""
        tracer, keywords = self.tracer, dict(kwargs or {})
        if not tracer.recording:
            return func(*args, **keywords)
        with tracer.inside_call():
            return _record(tracer, func, args, keywords)


def _record(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` and add its node; returns what the forward shall see."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return _record_attribute(tracer, func, args)
    if name in ("size", "numel", "nelement", "__len__") and tracer.is_traced(args[0]):
        return _record_size(tracer, name, *args, **kwargs)
    if name in _VALUE_READS:
        if any(tracer.is_traced(arg) for arg in args):
            tracer.note(f"data-dependent: {name.strip('_')}() of a tensor was fixed to its value in the example")
        return func(*args, **kwargs)
    if name in _GRAD_MODE:
        tracer.note("gradients are switched inside the forward, which the graph does not repeat")
        return func(*args, **kwargs)
    if name == "__set__":
        tracer.note(f"the attribute {func.__self__.__name__} of a tensor is set, which the graph does not repeat")
        return func(*args, **kwargs)
    return _record_call(tracer, func, name, args, kwargs)


def _record_call(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    is_method = name not in _OPERATORS and getattr(Tensor, name, None) is func
    target = name if is_method else _OPERATORS.get(name, func)
    try:
        # Before the call: an in-place one changes which node its tensor belongs to.
        node = tracer.emit("call_method" if is_method else "call_function", target, args, kwargs)
    except UnrecordableError:
        if any(tracer.is_traced(arg) for arg in [*args, *kwargs.values()]):
            raise
        with tracer.paused():  # its result is a constant
            return func(*without_symbols(args), **without_symbols(kwargs))
    if _changes_its_arguments(name, kwargs):
        node.meta["impure"] = True
    if func in _TRAINING_FLAGS:
        tracer.note(f"the training flag of {name} is fixed to {kwargs.get('training', False)}", everywhere=True)
    output = func(*without_symbols(args), **without_symbols(kwargs))
    if has_tensor(output):
        return tracer.register(output, node)
    if not node.meta.get("impure") and not node.users:
        tracer.graph.erase_node(node)
    return output


def _changes_its_arguments(name: str, kwargs: Mapping[str, Any]) -> bool:
    in_place_method = name.endswith("_") and not name.endswith("__")
    in_place_operator = name == "__setitem__" or (name.startswith("__i") and hasattr(operator, name))
    in_place = in_place_method or (in_place_operator and name not in ("__invert__", "__index__", "__inv__"))
    return in_place or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _record_attribute(tracer: Tracer, getter: Any, args: tuple[Any, ...]) -> Any:
    tensor, name = args[0], getter.__self__.__name__
    value = getter(*args)
    if name == "shape" and tracer.is_traced(tensor):
        return torch.Size([tracer.size(tensor, index) for index in range(len(value))])
    if name == "device" and (tracer.is_traced(tensor) or isinstance(tensor, nn.Parameter)):
        return tracer.register_device(value, tracer.emit("call_function", getattr, (tensor, name)))
    if isinstance(value, Tensor):
        return tracer.register(value, tracer.emit("call_function", getattr, (tensor, name)))
    return value


def _record_size(tracer: Tracer, name: str, tensor: Tensor, dim: int | None = None) -> Any:
    rank = torch.Tensor.dim(tensor)
    if name == "__len__":
        # len() can only return a plain int, so that its value is guarded.
        return int(tracer.size(tensor, 0))
    if name == "size" and dim is not None:
        return tracer.size(tensor, int(dim) % rank)
    if name == "size":
        return torch.Size([tracer.size(tensor, index) for index in range(rank)])
    node = tracer.emit("call_method", "numel", (tensor,))
    node.meta["scalar"] = True
    return make_symbolic(torch.Tensor.numel(tensor), node, tracer)


class OperatorWatch(TorchDispatchMode):
    """Records aten operators that no torch function announced, such as those of a scripted function."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and record it unless it is part of a recorded call."""
        tracer, keywords = self.tracer, dict(kwargs or {})
        if not tracer.recording:
            return func(*args, **keywords)
        if tracer.depth:
            output = func(*args, **keywords)
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor):
                    tracer.saw_computed(tensor)
            return output
        with tracer.paused():
            node = tracer.emit("call_function", func, args, keywords)
            tracer.note(f"{func} was recorded below torch's functions")
            node.meta["impure"] = func._schema.is_mutable  # type: ignore[attr-defined]
            return tracer.register(func(*args, **keywords), node)
