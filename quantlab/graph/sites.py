"""Find what can be quantized in a captured graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import ATTENTION, embedding_path, layer_call
from quantlab.graph.products import ProductCall, find_products
from quantlab.graph.roles import data_inputs, find_roles, find_shares, find_splits, sample_input
from quantlab.quant.operands import LEFT, RIGHT
from quantlab.quant.operation import Convolution, Multiplying, TransposedConvolution, Weighted, rows_shape

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """One call of a site: its quantizable inputs by slot name, and its multiply-accumulates at batch 1."""

    name: str
    inputs: tuple[tuple[str, Shape], ...]
    macs: int


def find_sites(model: nn.Module, captured: CapturedGraph, timestep_input: str | None = None) -> tuple[Site, ...]:
    """Every layer with a weight that the forward calls, and every product of activations, in the graph's order.

    A layer is named by its own path, an attention by that of the module that computes it, any other product by that
    path and a number. Shapes and
    multiply-accumulates are those at batch 1, from the shapes recorded in the captured example.

    Args:
        model: the model of the graph.
        captured: its graph.
        timestep_input: the input that carries the timestep, for the tag "time_embed"; found by name when not given.
    """
    batch = _batch(captured)
    products = {call.node: call for call in find_products(captured)}
    calls: dict[str, list[_Call]] = {}
    for node in captured.graph.nodes:
        found = [_product(products[node], batch)] if node in products else _calls(model, node, batch)
        for call in found:
            calls.setdefault(call.name, []).append(call)
    timestep = timestep_input or next((name for name in TIMESTEP_NAMES if name in captured.input_names), None)
    roles, splits = find_roles(model, captured, timestep), find_splits(model, captured, timestep)
    named = {call.site for call in products.values()}
    paths = [path for path in calls if path not in named and isinstance(model.get_submodule(path), Multiplying)]

    def site(path: str, found: Sequence[_Call]) -> Site:
        layer = None if path in named else model.get_submodule(path)
        if isinstance(layer, Weighted):
            return _weight_site(model, path, found, roles.get(path, frozenset()), splits.get(path, ()), paths)
        kind = SiteKind.MATMUL if path in named else SiteKind.ATTENTION
        return Site(path, kind, None, _macs(found), _slots(found), block=_block(model, path, paths))

    return with_shares([site(path, found) for path, found in calls.items()], model, captured, timestep)


def with_shares(
    sites: Sequence[Site], model: nn.Module, captured: CapturedGraph, timestep: str | None
) -> tuple[Site, ...]:
    """The sites with the word of those that must have one format: the name of the first of them in the graph."""
    word = {
        path: next(site.name for site in sites if site.name in paths)
        for paths in find_shares(model, captured, timestep)
        for path in paths
    }
    return tuple(replace(site, shares=word.get(site.name, "")) for site in sites)


def _batch(captured: CapturedGraph) -> int:
    """The batch size of the captured example."""
    sample = sample_input(captured, None)
    return sample.meta["shape"][0] if sample is not None and sample.meta["shape"] else 1


def _calls(model: nn.Module, node: fx.Node, batch: int) -> Iterator[_Call]:
    """The calls of sites that a node makes; several when it calls a whole module."""
    if (call := layer_call(model, node)) is not None:
        yield _layer(call.layer, call.path, call.input.meta["shape"], node.meta["shape"], batch)
    elif (path := embedding_path(model, node)) is not None and "inner_calls" not in node.meta:
        yield _lookup(path, data_inputs(node)[0].meta["shape"], batch)
    for path, input_shape, output_shape in node.meta.get("inner_calls", ()):
        layer = model.get_submodule(path)
        if isinstance(layer, Multiplying):
            yield _layer(layer, path, tuple(input_shape), tuple(output_shape), batch)
        elif isinstance(layer, nn.Embedding) and layer.max_norm is None:
            yield _lookup(path, tuple(input_shape), batch)
    if node.target in ATTENTION and node.meta["fqn"]:
        yield _attention(node, batch)


def _layer(layer: Multiplying, path: str, input_shape: Shape, output_shape: Shape, batch: int) -> _Call:
    # A transposed convolution multiplies each value of its input, the others add up each value of their output.
    counted = input_shape if isinstance(layer, TransposedConvolution) else output_shape
    macs = math.prod(_at_batch_1(counted, batch)) * math.prod(layer.weight.shape[1:])
    return _Call(path, (("input", _at_batch_1(input_shape, batch)),), macs)


def _lookup(path: str, input_shape: Shape, batch: int) -> _Call:
    return _Call(path, (("input", _at_batch_1(input_shape, batch)),), 0)


def _product(call: ProductCall, batch: int) -> _Call:
    """[..., n, k] x [..., k, m] -> [..., n, m]."""
    shapes = {LEFT: call.left.meta["shape"], RIGHT: call.right.meta["shape"]}
    macs = math.prod(_at_batch_1(call.node.meta["shape"], batch)) * shapes[LEFT][-1]
    return _Call(call.site, tuple((slot, _at_batch_1(shape, batch)) for slot, shape in shapes.items()), macs)


def _attention(node: fx.Node, batch: int) -> _Call:
    """Query times key, and probabilities times value: [B, H, L, D] x [B, H, S, D] -> [B, H, L, S] -> [B, H, L, E]."""
    given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    shapes = {role: _at_batch_1(given[role].meta["shape"], batch) for role in ("query", "key", "value")}  # type: ignore[union-attr]
    scores = math.prod(shapes["query"][:-1]) * shapes["key"][-2]
    return _Call(node.meta["fqn"], tuple(shapes.items()), scores * (shapes["query"][-1] + shapes["value"][-1]))


def _at_batch_1(shape: Shape, batch: int) -> Shape:
    """The shape at batch 1; a tensor without the batch in dimension 0 stays as it is."""
    return (shape[0] // batch, *shape[1:]) if shape and batch and shape[0] % batch == 0 else tuple(shape)


def _weight_site(
    model: nn.Module,
    path: str,
    calls: Sequence[_Call],
    tags: frozenset[str],
    split: tuple[int, ...],
    paths: Sequence[str],
) -> Site:
    layer = model.get_submodule(path)
    assert isinstance(layer, Weighted)
    groups = getattr(layer, "groups", 1)
    return Site(
        name=path,
        kind=_kind(layer),
        weight_shape=tuple(rows_shape(layer)),
        macs=_macs(calls),
        slots=_slots(calls),
        tags=tags,
        block=_block(model, path, paths),
        groups=groups,
        split=split if groups == 1 else (),  # a group of outputs reads one group of inputs, of either part
    )


def _kind(layer: Weighted) -> SiteKind:
    if isinstance(layer, TransposedConvolution):
        return SiteKind.CONV_TRANSPOSE
    if isinstance(layer, Convolution):
        return SiteKind.CONV
    return SiteKind.EMBEDDING if isinstance(layer, nn.Embedding) else SiteKind.LINEAR


def _macs(calls: Sequence[_Call]) -> int:
    return sum(call.macs for call in calls)


def _slots(calls: Sequence[_Call]) -> tuple[Slot, ...]:
    return tuple(Slot(name, shape, index) for index, call in enumerate(calls) for name, shape in call.inputs)


def _block(model: nn.Module, path: str, layers: Sequence[str]) -> str:
    """The block of a site: an element of a list that the model holds, or a child with several layers; else itself."""
    child, _, rest = path.partition(".")
    if isinstance(getattr(model, child, None), nn.ModuleList | nn.Sequential | nn.ModuleDict) and rest:
        return f"{child}.{rest.partition('.')[0]}"
    several = sum(layer.startswith(f"{child}.") for layer in layers) > 1
    return child if several else path
