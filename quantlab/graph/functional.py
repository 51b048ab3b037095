"""Linear and convolution layers in a graph, however they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_LINEAR = (F.linear, torch.ops.aten.linear.default)
_CONV = (F.conv2d, torch.conv2d, torch.ops.aten.conv2d.default)
ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
"""Fused attention."""
_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear or convolution layer.

    Attributes:
        path: the layer's module path.
        layer: the module that owns the weight.
        input: the node of its input.
    """

    path: str
    layer: nn.Linear | nn.Conv2d
    input: fx.Node


def layer_call(model: nn.Module, node: fx.Node) -> LayerCall | None:
    """The layer that a node calls: as a module, or by its weight with the module's own settings."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        if isinstance(layer, nn.Linear | nn.Conv2d) and "inner_calls" not in node.meta:
            given = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
            return LayerCall(str(node.target), layer, given)  # type: ignore[arg-type]
        return None
    if node.op != "call_function" or (node.target not in _LINEAR and node.target not in _CONV):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not str(weight.target).endswith(".weight"):
        return None
    path = str(weight.target).removesuffix(".weight")
    layer = model.get_submodule(path)
    own_bias = (
        getattr(bias, "target", None) == f"{path}.bias" if getattr(layer, "bias", None) is not None else bias is None
    )
    if not own_bias or not _same_settings(layer, node.target in _CONV, given):
        return None
    return LayerCall(path, layer, given["input"])  # type: ignore[arg-type]


def _same_settings(layer: nn.Module, is_conv: bool, given: dict[str, Any]) -> bool:
    if not is_conv:
        return isinstance(layer, nn.Linear)
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return False
    return all(_pair(given.get(key, default)) == _pair(getattr(layer, key)) for key, default in _CONV_DEFAULTS.items())


def _pair(value: Any) -> Any:
    """(n, n) for n."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
