"""Fold smoothing into the norm before a layer, so that it costs nothing at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import LayerCall, layer_call
from quantlab.graph.passes.modulation import Modulation, find_modulation
from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operation import channel_dim

_AffineNorm = nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_NORMS = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    torch.ops.aten.layer_norm.default: ("input", "normalized_shape", "weight", "bias"),
    F.group_norm: ("input", "num_groups", "weight", "bias"),
    torch.ops.aten.group_norm.default: ("input", "num_groups", "weight", "bias"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
}
"""Functional norms with the order of their arguments."""
_LAST_DIM = (F.layer_norm, torch.ops.aten.layer_norm.default)
_PASSING_MODULES = (nn.Identity, nn.Dropout)
_PASSING_METHODS = ("to", "contiguous", "clone")


@dataclass(frozen=True)
class _Affine:
    """A norm with a weight for each channel, wherever its parameters live.

    Attributes:
        node: its output.
        weight: [C].
        bias: [C], or None.
        axis: the dimension of the channels.
    """

    node: fx.Node
    weight: Tensor
    bias: Tensor | None
    axis: int

    def divide(self, model: nn.Module, divisor: Tensor) -> None:
        """Have the norm's output come out divided by ``divisor`` [C], in place."""
        self.weight.div_(divisor)
        if self.bias is not None:
            self.bias.div_(divisor)


def fold_into_norm(model: nn.Module, captured: CapturedGraph, site: str) -> tuple[str, ...]:
    """Move the reciprocal scales of a site into the norm that feeds it, and the scales into its weight.

    The norm is an affine one, called as a module or as a function, or an adaptive one that is modulated by outputs of a
    linear layer: n (1 + scale) + shift. All users of its output must be quantized layers with the same scales, as
    query, key and value can be. The float function stays: the norm's weight and bias are divided by s, or the rows of
    the linear layer are changed so that 1 + scale and shift are; the layers' weights are multiplied.

    Args:
        model: changed in place.
        captured: its graph, with quantizers inserted.
        site: a quantized layer with smoothing.

    Returns:
        The sites whose smoothing is now folded; empty when the norm or one of its users does not allow it. A scale that
        is a parameter plus what all blocks share, as PixArt's, does not.
    """
    calls = {node: call for node in captured.graph.nodes if (call := layer_call(model, node)) is not None}
    norm = _norm_before(model, captured.graph, calls, site)
    scale = getattr(model.get_submodule(site), "smoothing", None)
    if norm is None or scale is None:
        return ()
    axis = norm.axis if isinstance(norm, _Affine) else len(norm.node.meta["shape"]) - 1
    if norm.node.meta["shape"][axis] != len(scale):
        return ()
    try:
        sites = tuple(dict.fromkeys(_fed_sites(model, calls, norm.node, axis)))
    except _OtherUserError:
        return ()
    if not all(_has_scale(model, path, scale) and _is_called_once(calls, path) for path in sites):
        return ()
    with torch.no_grad():
        norm.divide(model, scale)
        for path in sites:
            layer = cast(QuantizedLayer, model.get_submodule(path))
            weight = layer.float_weight().clone()
            layer.smoothing = None
            layer.set_float_weight(weight)
    return sites


class _OtherUserError(Exception):
    """Something else than a layer uses the norm's output."""


def _norm_before(
    model: nn.Module, graph: fx.Graph, calls: Mapping[fx.Node, LayerCall], site: str
) -> _Affine | Modulation | None:
    """The norm whose output, at most cast, transposed or dropped out, is the site's input."""
    node = next((call.input for call in calls.values() if call.path == site), None)
    while node is not None and (_passes(model, node) or _is_transpose(node)):
        node = cast(fx.Node, node.args[0])
    if node is None:
        return None
    norm = _affine(model, node)
    if norm is None:
        return find_modulation(model, calls, node)
    uses = sum(other is not None and other.weight is norm.weight for other in (_affine(model, n) for n in graph.nodes))
    return norm if uses == 1 else None


def _affine(model: nn.Module, node: fx.Node) -> _Affine | None:
    """The affine norm that a node computes, called as a module or as a function on parameters."""
    rank = len(node.meta.get("shape") or ())
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        weight = module.weight if isinstance(module, _AffineNorm) else None
        bias = getattr(module, "bias", None)
        axis = rank - 1 if isinstance(module, nn.LayerNorm) else 1
    else:
        given = dict(zip(_NORMS.get(node.target, ()), node.args, strict=False)) | node.kwargs  # type: ignore[call-overload]
        weight, bias = (_parameter(model, given.get(name)) for name in ("weight", "bias"))
        axis = rank - 1 if node.target in _LAST_DIM else 1
        if node.target not in _NORMS or (given.get("bias") is not None and bias is None):
            return None
    return _Affine(node, weight, bias, axis) if isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def _parameter(model: nn.Module, node: object) -> nn.Parameter | None:
    """The parameter that a node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    found = getattr(model.get_submodule(path), name)
    return found if isinstance(found, nn.Parameter) else None


def _passes(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _PASSING_MODULES)
    return node.op == "call_method" and node.target in _PASSING_METHODS


def _is_transpose(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "transpose" and len(node.args) == 3


def _fed_sites(model: nn.Module, calls: Mapping[fx.Node, LayerCall], node: fx.Node, axis: int) -> Iterator[str]:
    """Paths of the layers fed by a tensor whose channels are dimension ``axis``."""
    rank = len(node.meta["shape"])
    for user in node.users:
        call = calls.get(user)
        if call is not None and call.input is node and axis == channel_dim(call.layer) % rank:
            yield call.path
        elif _passes(model, user):
            yield from _fed_sites(model, calls, user, axis)
        elif _is_transpose(user):
            first, second = (cast(int, dim) % rank for dim in user.args[1:])
            yield from _fed_sites(model, calls, user, {first: second, second: first}.get(axis, axis))
        elif not user.meta.get("scalar"):
            raise _OtherUserError


def _has_scale(model: nn.Module, path: str, scale: Tensor) -> bool:
    layer = model.get_submodule(path)
    if not isinstance(layer, QuantizedLayer) or layer.adapter is not None:
        return False
    return layer.smoothing is not None and torch.equal(layer.smoothing, scale)


def _is_called_once(calls: Mapping[fx.Node, LayerCall], path: str) -> bool:
    return sum(call.path == path for call in calls.values()) == 1
