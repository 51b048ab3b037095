"""Put a graph in the place of a model's forward, in the very object that a pipeline holds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quantlab.errors import CaptureError, ModelError
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.inputs import RETURN_DICT, call_arguments, flatten, tensors_of
from quantlab.graph.run import check_inputs, compile_graph, output_wrapper

ORIGINAL_CLASS = "quantlab_original_class"
"""The attribute of a bound model's class that holds the class it was."""
_BOUND = "quantlab_bound"
"""The attribute of a bound model's class that holds its graph and the input that carries the timestep."""
_CHANGING = (
    "add_adapter",
    "load_lora_adapter",
    "load_attn_procs",
    "fuse_lora",
    "fuse_qkv_projections",
    "set_attn_processor",
    "set_attention_backend",
    "enable_xformers_memory_efficient_attention",
    "enable_forward_chunking",
)
"""Methods of diffusers' models that give them other layers, or another forward, than the graph has."""


def bind(model: nn.Module, captured: CapturedGraph, timestep_input: str | None) -> nn.Module:
    """Make ``model(...)`` run the graph; returns the same object.

    The model's class becomes a subclass of the same name whose forward runs the graph, so that ``isinstance``,
    ``config``, ``state_dict`` and ``save_pretrained`` go on as before. A timestep given as a number, a 0-dim tensor or
    [1] is spread over the batch, as is any tensor that comes without the batch. Called with another non-tensor
    argument, or another set of tensors, than the graph was captured with, the model raises CaptureError; methods by
    which diffusers would change layers or forward behind the graph's back, such as loading a LoRA, raise ModelError.

    Args:
        model: the model of the graph, or one of the same structure.
        captured: a graph without taps.
        timestep_input: the input that carries the timestep, or None.

    Raises:
        ModelError: the model is bound already, or a forward of its own object would hide the bound one.
    """
    original = type(model)
    if hasattr(original, ORIGINAL_CLASS):
        raise ModelError("a graph is bound to this model already", where=original.__name__, next_step="unbind it first")
    if "forward" in model.__dict__:
        raise ModelError(
            "the model object has a forward of its own, which would hide the graph",
            where=original.__name__,
            next_step="bind before offloading or accelerate hooks are switched on, or remove them",
        )
    attributes = {
        "forward": _bound_forward(original, captured, timestep_input),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        ORIGINAL_CLASS: original,
        _BOUND: (captured, timestep_input),
        **{name: _refusal(name) for name in _CHANGING if hasattr(original, name)},
    }
    model.__class__ = type(original.__name__, (original,), attributes)
    return model


def unbind(model: nn.Module) -> nn.Module:
    """Give the model its own forward back; returns the same object.

    Raises:
        ModelError: no graph is bound to it.
    """
    original = getattr(type(model), ORIGINAL_CLASS, None)
    if original is None:
        raise ModelError("no graph is bound to this model", where=type(model).__name__)
    model.__class__ = original
    return model


def bound_graph(model: nn.Module) -> tuple[CapturedGraph, str | None] | None:
    """The graph that a model is bound to, with the input that carries the timestep; None for an unbound model."""
    return getattr(type(model), _BOUND, None)


def _refusal(name: str) -> Any:
    """A method that says why it cannot work on a bound model."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            f"{name} cannot work here: the model runs a captured graph of its layers as they were, whose bits and "
            "scales were found for these weights",
            where=type(self).__name__,
            next_step="do it to the float model (fuse a LoRA into its weights), and quantize the result",
        )

    return refuse


def _bound_forward(original: type[nn.Module], captured: CapturedGraph, timestep_input: str | None) -> Any:
    signature = inspect.signature(original.forward)
    run = compile_graph(captured, wrap=False)
    wrap = output_wrapper(captured.output_type) if captured.output_type else None
    static = _constants_of(call_arguments(signature, **captured.static))
    ranks = {
        str(node.target): len(node.meta["shape"])
        for node in captured.graph.find_nodes(op="placeholder")
        if "shape" in node.meta
    }

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = call_arguments(signature, self, *args, **kwargs)
        arguments.pop(next(iter(signature.parameters)))
        wrapped = arguments.get(RETURN_DICT, True)
        flat = flatten(arguments)
        if timestep_input in flat:
            flat[timestep_input] = _per_sample(flat, timestep_input)
        _check_constants(_constants_of(arguments, besides=timestep_input), static)
        output = run(self, check_inputs(captured, _with_batch(tensors_of(flat), ranks)))
        return wrap(output) if wrap is not None and wrapped else output

    return forward


def _constants_of(arguments: Mapping[str, Any], besides: str | None = None) -> dict[str, Any]:
    """The arguments that are no tensors, flat; ``return_dict`` may change from call to call."""
    flat = flatten(arguments)
    return {k: v for k, v in flat.items() if not isinstance(v, Tensor) and k not in (RETURN_DICT, besides, "self")}


def _check_constants(given: Mapping[str, Any], captured: Mapping[str, Any]) -> None:
    for name in sorted({*given, *captured}):
        if given.get(name) != captured.get(name):
            raise CaptureError(
                f'the graph was captured with another value of the argument "{name}"',
                got="not given" if name not in given else repr(given[name]),
                allowed="not given" if name not in captured else repr(captured[name]),
                next_step="capture the model again with this value as static",
            )


def _with_batch(tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors that lack the dimension of the batch, such as Flux's positions, spread over the others' batch."""
    batch = next((len(value) for name, value in tensors.items() if value.dim() and value.dim() == ranks.get(name)), 1)
    return {
        name: value.expand(batch, *value.shape) if value.dim() + 1 == ranks.get(name) else value
        for name, value in tensors.items()
    }


def _per_sample(flat: Mapping[str, Any], name: str) -> Tensor:
    """The timestep as a tensor [B], from a number or a tensor of one or B values."""
    timestep = flat[name]
    sample = next((v for key, v in flat.items() if key != name and isinstance(v, Tensor) and v.dim()), None)
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep, dtype=torch.float32 if isinstance(timestep, float) else torch.int64)
    if sample is None:
        return timestep
    timestep = timestep.to(sample.device).reshape(-1)
    return timestep.expand(sample.shape[0]) if timestep.shape[0] == 1 else timestep
