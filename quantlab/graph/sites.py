"""Find what can be quantized in a captured graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import ATTENTION, layer_call
from quantlab.graph.roles import find_roles, find_shares, find_splits, sample_input

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """One call of a site: its quantizable inputs by slot name, and its multiply-accumulates at batch 1."""

    name: str
    inputs: tuple[tuple[str, Shape], ...]
    macs: int


def find_sites(model: nn.Module, captured: CapturedGraph, timestep_input: str | None = None) -> tuple[Site, ...]:
    """Every linear and convolution layer that the forward calls, and every fused attention, in the graph's order.

    A layer is named by its own path, an attention by that of the module that computes it. Shapes and
    multiply-accumulates are those at batch 1, from the shapes recorded in the captured example.

    Args:
        model: the model of the graph.
        captured: its graph.
        timestep_input: the input that carries the timestep, for the tag "time_embed"; found by name when not given.
    """
    batch = _batch(captured)
    calls: dict[str, list[_Call]] = {}
    for node in captured.graph.nodes:
        for call in _calls(model, node, batch):
            calls.setdefault(call.name, []).append(call)
    timestep = timestep_input or next((name for name in TIMESTEP_NAMES if name in captured.input_names), None)
    roles, splits = find_roles(model, captured, timestep), find_splits(model, captured, timestep)
    paths = [path for path in calls if _is_layer(model.get_submodule(path))]
    sites = tuple(
        _weight_site(model, path, found, roles.get(path, frozenset()), splits.get(path, ()), paths)
        if path in paths
        else Site(path, SiteKind.ATTENTION, None, _macs(found), _slots(found), block=_block(model, path, paths))
        for path, found in calls.items()
    )
    return with_shares(sites, model, captured, timestep)


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


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _calls(model: nn.Module, node: fx.Node, batch: int) -> Iterator[_Call]:
    """The calls of sites that a node makes; several when it calls a whole module."""
    if (call := layer_call(model, node)) is not None:
        yield _layer(call.layer, call.path, call.input.meta["shape"], node.meta["shape"], batch)
    for path, input_shape, output_shape in node.meta.get("inner_calls", ()):
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield _layer(layer, path, tuple(input_shape), tuple(output_shape), batch)
    if node.target in ATTENTION and node.meta["fqn"]:
        yield _attention(node, batch)


def _layer(layer: nn.Linear | nn.Conv2d, path: str, input_shape: Shape, output_shape: Shape, batch: int) -> _Call:
    macs = math.prod(_at_batch_1(output_shape, batch)) * math.prod(layer.weight.shape[1:])
    return _Call(path, (("input", _at_batch_1(input_shape, batch)),), macs)


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
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return Site(
        name=path,
        kind=SiteKind.CONV if isinstance(layer, nn.Conv2d) else SiteKind.LINEAR,
        weight_shape=tuple(layer.weight.shape),
        macs=_macs(calls),
        slots=_slots(calls),
        tags=tags,
        block=_block(model, path, paths),
        groups=groups,
        split=split if groups == 1 else (),  # a group of outputs reads one group of inputs, of either part
    )


def _macs(calls: Sequence[_Call]) -> int:
    return sum(call.macs for call in calls)


def _slots(calls: Sequence[_Call]) -> tuple[Slot, ...]:
    return tuple(Slot(name, shape, index) for index, call in enumerate(calls) for name, shape in call.inputs)


def _block(model: nn.Module, path: str, layers: Sequence[str]) -> str:
    """The block of a site: an element of a list that the model holds, or a child with several layers; else itself."""
    child, _, rest = path.partition(".")
    if isinstance(model.get_submodule(child), nn.ModuleList | nn.Sequential | nn.ModuleDict) and rest:
        return f"{child}.{rest.partition('.')[0]}"
    several = sum(layer.startswith(f"{child}.") for layer in layers) > 1
    return child if several else path
