"""Layers with weights in a graph, however they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operation import Multiplying, TransposedConvolution

ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
"""Fused attention."""
_KINDS: Mapping[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    torch.ops.aten.linear.default: nn.Linear,
    torch.conv1d: nn.Conv1d,
    torch.ops.aten.conv1d.default: nn.Conv1d,
    torch.conv2d: nn.Conv2d,
    torch.ops.aten.conv2d.default: nn.Conv2d,
    torch.conv3d: nn.Conv3d,
    torch.ops.aten.conv3d.default: nn.Conv3d,
    torch.conv_transpose1d: nn.ConvTranspose1d,
    torch.ops.aten.conv_transpose1d.default: nn.ConvTranspose1d,
    torch.conv_transpose2d: nn.ConvTranspose2d,
    torch.ops.aten.conv_transpose2d.input: nn.ConvTranspose2d,
    torch.conv_transpose3d: nn.ConvTranspose3d,
    torch.ops.aten.conv_transpose3d.input: nn.ConvTranspose3d,
}
"""The layer that computes what a function does."""
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that multiplies its input by its weight.

    Attributes:
        path: the layer's module path.
        layer: the module that owns the weight.
        input: the node of its input.
        bias: the node of a bias that the forward computes and adds to the output of a layer without one, or None.
    """

    path: str
    layer: Multiplying
    input: fx.Node
    bias: fx.Node | None = None


def layer_call(model: nn.Module, node: fx.Node) -> LayerCall | None:
    """The layer that a node calls: as a module, or by its weight with the module's own settings."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        if not isinstance(layer, Multiplying) or "inner_calls" in node.meta or _is_told_its_size(layer, node):
            return None
        given = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        return LayerCall(str(node.target), layer, given)  # type: ignore[arg-type]
    found = weight_call(model, node)
    return found if isinstance(found, LayerCall) else None


def weight_call(model: nn.Module, node: fx.Node) -> LayerCall | str | None:
    """The layer whose weight a function multiplies by, or why no layer stands for it; None for any other node."""
    if not is_weight_call(node):
        return None
    kind = _KINDS[node.target]
    given = _given(node)
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is computed in the forward"
    path, _, name = str(weight.target).rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, kind) or not isinstance(layer, Multiplying) or name != "weight":
        return "its weight belongs to no layer of its kind"
    if not _same_settings(layer, given):
        return "it uses a layer's weight with other settings than the layer's"
    if getattr(bias, "target", None) == f"{path}.bias" or (bias is None and layer.bias is None):
        return LayerCall(path, layer, given["input"])
    if layer.bias is None and isinstance(layer, nn.Linear) and isinstance(bias, fx.Node):
        return LayerCall(path, layer, given["input"], bias)
    return "it uses a layer's weight with another bias than the layer's"


def is_weight_call(node: fx.Node) -> bool:
    """Whether a node is a function that multiplies by a weight as a layer does."""
    return node.op == "call_function" and node.target in _KINDS


def is_transposed(node: fx.Node) -> bool:
    """Whether such a function is a transposed convolution."""
    return "Transpose" in _KINDS[node.target].__name__


def _given(node: fx.Node) -> dict[str, Any]:
    names = _TRANSPOSED_ARGUMENTS if is_transposed(node) else _ARGUMENTS
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_told_its_size(layer: Multiplying, node: fx.Node) -> bool:
    """Whether a transposed convolution is told the size of its output, which a quantized one is not."""
    told = len(node.args) > 1 or node.kwargs.get("output_size") is not None
    return told and isinstance(layer, TransposedConvolution) and not isinstance(layer, QuantizedLayer)


def embedding_path(model: nn.Module, node: fx.Node) -> str | None:
    """The path of the embedding that a node calls; one that changes its table when it is called is none."""
    if node.op != "call_module":
        return None
    layer = model.get_submodule(str(node.target))
    return str(node.target) if isinstance(layer, nn.Embedding) and layer.max_norm is None else None


def _same_settings(layer: Multiplying, given: Mapping[str, Any]) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    if layer.padding_mode != "zeros":
        return False
    names = _DEFAULTS if layer.transposed else [name for name in _DEFAULTS if name != "output_padding"]
    rank = layer.weight.dim() - 2
    return all(_each(given.get(name, _DEFAULTS[name]), rank) == _each(getattr(layer, name), rank) for name in names)


def _each(value: Any, rank: int) -> Any:
    """(n, ..., n) for n."""
    return tuple(value) * (rank if len(value) == 1 else 1) if isinstance(value, tuple | list) else (value,) * rank
