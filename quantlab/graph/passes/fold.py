"""Fold smoothing into the norm before a layer, so that it costs nothing at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import LayerCall, layer_call
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear

_AffineNorm = nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d
_PASSING_MODULES = (nn.Identity, nn.Dropout)
_PASSING_METHODS = ("to", "contiguous", "clone")


def fold_into_norm(model: nn.Module, captured: CapturedGraph, site: str) -> tuple[str, ...]:
    """Move the reciprocal scales of a site into the affine norm that feeds it, and the scales into its weight.

    That needs every user of the norm's output to be a quantized layer with the same scales, as query, key and value
    can be. The float function stays: the norm's weight and bias are divided by s, the layers' weights multiplied.

    Args:
        model: changed in place.
        captured: its graph, with quantizers inserted.
        site: a quantized layer with smoothing.

    Returns:
        The sites whose smoothing is now folded; empty when the norm or one of its users does not allow it.
    """
    calls = {node: call for node in captured.graph.nodes if (call := layer_call(model, node)) is not None}
    found = _norm_before(model, calls, site)
    scale = getattr(model.get_submodule(site), "smoothing", None)
    if found is None or scale is None:
        return ()
    node, norm = found
    axis = len(node.meta["shape"]) - 1 if isinstance(norm, nn.LayerNorm) else 1
    if norm.weight.shape != scale.shape or _uses_of(model, captured.graph, norm) != 1:
        return ()
    try:
        sites = tuple(dict.fromkeys(_fed_sites(model, calls, node, axis)))
    except _OtherUserError:
        return ()
    if not all(_has_scale(model, path, scale) and _is_called_once(calls, path) for path in sites):
        return ()
    with torch.no_grad():
        norm.weight.div_(scale)
        if norm.bias is not None:
            norm.bias.div_(scale)
        for path in sites:
            layer = cast(QuantizedLinear, model.get_submodule(path))
            layer.weight.mul_(scale.view(1, -1, *(1,) * (layer.weight.dim() - 2)))
            layer.smoothing = None
    return sites


class _OtherUserError(Exception):
    """Something else than a layer uses the norm's output."""


def _norm_before(model: nn.Module, calls: Mapping[fx.Node, LayerCall], site: str) -> tuple[fx.Node, _AffineNorm] | None:
    """The norm whose output, at most cast, transposed or dropped out, is the site's input; with its node."""
    node = next((call.input for call in calls.values() if call.path == site), None)
    while node is not None and (_passes(model, node) or _is_transpose(node)):
        node = cast(fx.Node, node.args[0])
    norm = _norm_of(model, node) if node is not None else None
    return (node, norm) if node is not None and norm is not None else None


def _norm_of(model: nn.Module, node: fx.Node) -> _AffineNorm | None:
    """The affine norm that a node computes, called as a module or by its weight."""
    weights = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    path = next((weight.removesuffix(".weight") for weight in weights if weight.endswith(".weight")), None)
    path = str(node.target) if node.op == "call_module" else path
    module = model.get_submodule(path) if path else None
    return module if isinstance(module, _AffineNorm) and module.weight is not None else None


def _uses_of(model: nn.Module, graph: fx.Graph, norm: _AffineNorm) -> int:
    return sum(_norm_of(model, node) is norm for node in graph.nodes)


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
        if call is not None and call.input is node and axis == (1 if isinstance(call.layer, nn.Conv2d) else rank - 1):
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
    if not isinstance(layer, QuantizedLinear | QuantizedConv2d) or getattr(layer, "groups", 1) != 1:
        return False
    return layer.smoothing is not None and torch.equal(layer.smoothing, scale)


def _is_called_once(calls: Mapping[fx.Node, LayerCall], path: str) -> bool:
    return sum(call.path == path for call in calls.values()) == 1
