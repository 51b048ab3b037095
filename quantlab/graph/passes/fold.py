"""Fold smoothing into the norm before a layer, so that it costs nothing at run time."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import layer_call
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear

_PASSING_MODULES = (nn.Identity, nn.Dropout)
_PASSING_METHODS = ("to", "contiguous", "clone")
_AFFINE_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


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
    layer = model.get_submodule(site)
    norm = _norm_before(model, captured.graph, site)
    if norm is None or not isinstance(layer, QuantizedLinear | QuantizedConv2d) or layer.smoothing is None:
        return ()
    if getattr(layer, "groups", 1) != 1:
        return ()
    sites = _users(model, norm)
    if sites is None or not all(_has_smoothing(model, path, layer.smoothing) for path in sites):
        return ()
    scale = layer.smoothing
    normalised = model.get_submodule(str(norm.target))
    with torch.no_grad():
        normalised.weight.div_(scale)  # type: ignore[union-attr,operator]
        if normalised.bias is not None:
            normalised.bias.div_(scale)  # type: ignore[union-attr,operator]
        for path in sites:
            folded = model.get_submodule(path)
            assert isinstance(folded, QuantizedLinear | QuantizedConv2d)
            folded.weight.mul_(scale.view(1, -1, *(1,) * (folded.weight.dim() - 2)))
            folded.smoothing = None
    return sites


def _norm_before(model: nn.Module, graph: fx.Graph, site: str) -> fx.Node | None:
    """The affine norm whose output, at most cast or dropped out, is the site's input."""
    calls = [call for node in graph.nodes if (call := layer_call(model, node)) is not None and call.path == site]
    if len(calls) != 1:
        return None
    node = calls[0].input
    while _passes(model, node):
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "call_module":
        return None
    norm = model.get_submodule(str(node.target))
    return node if isinstance(norm, _AFFINE_NORMS) and norm.weight is not None else None


def _passes(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _PASSING_MODULES)
    return node.op == "call_method" and node.target in _PASSING_METHODS


def _users(model: nn.Module, node: fx.Node) -> tuple[str, ...] | None:
    """Paths of the layers that use a norm's output, or None when anything else does."""
    paths: list[str] = []
    for user in node.users:
        call = layer_call(model, user)
        if user.meta.get("scalar"):
            continue
        if call is not None and call.input is node:
            paths.append(call.path)
        elif _passes(model, user):
            inner = _users(model, user)
            if inner is None:
                return None
            paths.extend(inner)
        else:
            return None
    return tuple(dict.fromkeys(paths))


def _has_smoothing(model: nn.Module, path: str, scale: Tensor) -> bool:
    layer = model.get_submodule(path)
    is_quantized = isinstance(layer, QuantizedLinear | QuantizedConv2d)
    return is_quantized and layer.smoothing is not None and torch.equal(layer.smoothing, scale)
