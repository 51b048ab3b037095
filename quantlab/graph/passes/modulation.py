"""The modulation of an adaptive norm: n (c + scale) + shift, with scale and shift from a linear layer.

DiT, arXiv 2212.09748, section 3.2.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from quantlab.graph.functional import LayerCall
from quantlab.quant.layers import QuantizedLayer

_ADD, _MULTIPLY = (torch.add, operator.add), (torch.mul, torch.multiply, operator.mul)
_ADD_METHODS, _MULTIPLY_METHODS = ("add", "__add__", "__radd__"), ("mul", "multiply", "__mul__", "__rmul__")
_VIEWS = ("unsqueeze", "to", "contiguous", "clone")


@dataclass(frozen=True)
class Rows:
    """Output channels of a linear layer.

    Attributes:
        path: of the layer.
        channels: which of them.
    """

    path: str
    channels: slice

    def divide(self, model: nn.Module, divisor: Tensor, added: float) -> None:
        """Change the layer, in place, so that (added + output) becomes (added + output) / divisor."""
        layer = cast(nn.Linear, model.get_submodule(self.path))
        layer.weight[self.channels] /= divisor[:, None]
        layer.bias[self.channels] = (layer.bias[self.channels] + added) / divisor - added


@dataclass(frozen=True)
class Modulation:
    """Where scale and shift of a modulated tensor come from.

    Attributes:
        node: the modulated tensor [B, ..., C].
        scale: the C outputs of a layer that, plus ``added``, multiply.
        shift: the C outputs that are added.
        added: 1 in every model known; 0 where the scale multiplies as it is.
    """

    node: fx.Node
    scale: Rows
    shift: Rows
    added: float

    def divide(self, model: nn.Module, divisor: Tensor) -> None:
        """Have the modulated tensor come out divided by ``divisor`` [C], in place."""
        self.scale.divide(model, divisor, self.added)
        self.shift.divide(model, divisor, 0.0)


def find_modulation(model: nn.Module, calls: Mapping[fx.Node, LayerCall], node: fx.Node) -> Modulation | None:
    """The modulation that a node is, if scale and shift are outputs of a linear layer that nothing else uses.

    The layer must have a bias, be called once, and have no quantizer of its weight yet.
    """
    channels = node.meta["shape"][-1] if node.meta.get("shape") else 0
    for product, shift in _operand_pairs(node, _ADD, _ADD_METHODS):
        if not isinstance(product, fx.Node) or not isinstance(shift, fx.Node) or len(product.users) > 1:
            continue
        shift_rows = _rows(model, calls, shift, channels)
        for _, factor in _operand_pairs(product, _MULTIPLY, _MULTIPLY_METHODS):
            if not isinstance(factor, fx.Node) or shift_rows is None:
                continue
            scale, added = _without_constant(factor)
            scale_rows = _rows(model, calls, scale, channels)
            if scale_rows is not None and scale_rows != shift_rows:
                return Modulation(node, scale_rows, shift_rows, added)
    return None


def _operand_pairs(
    node: fx.Node, functions: tuple[object, ...], methods: tuple[str, ...]
) -> list[tuple[object, object]]:
    """Both operands of an operation in both orders; nothing for any other node."""
    matches = node.target in (methods if node.op == "call_method" else functions)
    if not matches or len(node.args) != 2 or node.kwargs:
        return []
    first, second = node.args
    return [(first, second), (second, first)]


def _without_constant(factor: fx.Node) -> tuple[fx.Node, float]:
    """Scale and constant of (constant + scale), where nothing else uses the scale."""
    node = factor
    while _is_view(node) and _used_once(node):
        node = cast(fx.Node, node.args[0])
    for constant, scale in _operand_pairs(node, _ADD, _ADD_METHODS):
        if isinstance(constant, int | float) and isinstance(scale, fx.Node) and _used_once(node):
            return scale, float(constant)
    return factor, 0.0


def _rows(model: nn.Module, calls: Mapping[fx.Node, LayerCall], node: fx.Node, channels: int) -> Rows | None:
    """The outputs of a linear layer that a tensor [B, 1, ..., channels] holds, if nothing else uses them."""
    while node not in calls:
        if not _used_once(node):
            return None
        if node.target is operator.getitem and isinstance(node.args[1], int):
            return _chunk(model, calls, node, channels)
        if not _is_view(node):
            return None
        node = cast(fx.Node, node.args[0])
    return _of_layer(model, calls, node, slice(0, channels), channels) if _used_once(node) else None


def _chunk(model: nn.Module, calls: Mapping[fx.Node, LayerCall], part: fx.Node, channels: int) -> Rows | None:
    """The outputs in one of the equal chunks of the last dimension."""
    chunk, index = part.args
    assert isinstance(chunk, fx.Node) and isinstance(index, int)
    is_chunk = chunk.target is torch.chunk or (chunk.op == "call_method" and chunk.target == "chunk")
    given = dict(zip(("input", "chunks", "dim"), chunk.args, strict=False)) | chunk.kwargs
    source, count = given.get("input"), given.get("chunks")
    if not is_chunk or not isinstance(source, fx.Node) or source not in calls or not isinstance(count, int):
        return None
    if given.get("dim", 0) not in (-1, len(source.meta["shape"]) - 1) or len(source.users) > 1:
        return None
    if source.meta["shape"][-1] != count * channels:
        return None
    start = index % count * channels
    alone = sum(user.target is operator.getitem and user.args[1] == index for user in chunk.users) == 1
    return _of_layer(model, calls, source, slice(start, start + channels), count * channels) if alone else None


def _of_layer(
    model: nn.Module, calls: Mapping[fx.Node, LayerCall], node: fx.Node, channels: slice, outputs: int
) -> Rows | None:
    path = calls[node].path
    layer = model.get_submodule(path)
    once = sum(call.path == path for call in calls.values()) == 1
    quantized = isinstance(layer, QuantizedLayer) and (layer.weight_quantizer or layer.adapter) is not None
    fits = isinstance(layer, nn.Linear) and layer.bias is not None and layer.out_features == outputs
    return Rows(path, channels) if fits and once and not quantized and calls[node].bias is None else None


def _is_view(node: fx.Node) -> bool:
    """Whether a node leaves the last dimension as it is: a cast, or new dimensions of size 1 before it."""
    if node.op == "call_method":
        return node.target in _VIEWS and _keeps_last(node)
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    return all(entry is None or entry == slice(None) for entry in node.args[1]) and _keeps_last(node)


def _keeps_last(node: fx.Node) -> bool:
    source = cast(fx.Node, node.args[0])
    return source.meta["shape"][-1:] == node.meta["shape"][-1:]


def _used_once(node: fx.Node) -> bool:
    return sum(not user.meta.get("scalar") for user in node.users) == 1
