"""The roles of layers, as tags: found by walking the graph, never by name or by counting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import ATTENTION, layer_call
from quantlab.graph.products import is_matmul
from quantlab.quant.operation import channel_dim

FIRST, LAST, TIME_EMBED, MODULATION, SKIP = "first", "last", "time_embed", "modulation", "skip"
QUERY, KEY, VALUE, OUT = "attention.query", "attention.key", "attention.value", "attention.out"
TAGS = (FIRST, LAST, TIME_EMBED, MODULATION, SKIP, QUERY, KEY, VALUE, OUT)
_CONCAT = (torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default)
_SOFTMAX = (F.softmax, torch.softmax, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


def find_roles(model: nn.Module, captured: CapturedGraph, timestep: str | None) -> dict[str, frozenset[str]]:
    """Tags by layer path.

    - ``first``, ``last``: the first and last layer on the way from the sample to the output.
    - ``time_embed``: layers that see nothing but the timestep.
    - ``modulation``: layers that see the timestep with other conditions, never the sample: those of adaptive norms.
    - ``skip``: layers fed by a concatenation of channels, through norms and activations.
    - ``attention.query``, ``.key``, ``.value``, ``.out``: the projections around an attention.
    """
    return _RoleFinder(model, captured, timestep).roles()


def find_splits(model: nn.Module, captured: CapturedGraph, timestep: str | None) -> dict[str, tuple[int, ...]]:
    """Channels of each tensor that a skip concatenation joins, by the path of every layer it feeds.

    A layer that is called with and without such a concatenation, or with different ones, is not among them.
    """
    return _RoleFinder(model, captured, timestep).splits()


def find_shares(model: nn.Module, captured: CapturedGraph, timestep: str | None) -> list[frozenset[str]]:
    """Sets of layers, by path, that must have one format.

    - the projections to query, key and value of one attention that read the same tensor: kernels compute them as one;
    - the layers whose outputs one concatenation joins, with nothing between but operations on one tensor that keep its
      shape: what reads the joined tensor has one scale for it.

    Sets that overlap are one set.
    """
    return _RoleFinder(model, captured, timestep).shares()


def sample_input(captured: CapturedGraph, timestep: str | None) -> fx.Node | None:
    """The placeholder of the sample: the first input that is not the timestep, floating if there is one."""
    inputs = [
        node
        for node in captured.graph.find_nodes(op="placeholder")
        if node.target in captured.input_names and node.target != timestep
    ]
    floating = [node for node in inputs if node.meta["dtype"].is_floating_point]
    return next(iter(floating or inputs), None)


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors a node computes from; sizes, devices and dtypes are no data."""
    return [source for source in node.all_input_nodes if not source.meta.get("scalar")]


def _dim_of(concat: fx.Node) -> int:
    dim = concat.args[1] if len(concat.args) > 1 else concat.kwargs.get("dim", concat.kwargs.get("axis", 0))
    assert isinstance(dim, int)
    return dim


def _parts(concat: fx.Node) -> tuple[int, ...]:
    """The size of each tensor along the dimension that is joined."""
    tensors = concat.args[0] if concat.args else concat.kwargs["tensors"]
    return tuple(tensor.meta["shape"][_dim_of(concat)] for tensor in tensors)  # type: ignore[union-attr]


class _RoleFinder:
    """One search of a graph; ``layers`` maps each node that calls layers to their paths."""

    def __init__(self, model: nn.Module, captured: CapturedGraph, timestep: str | None) -> None:
        self.model, self.timestep = model, timestep
        self.nodes = list(captured.graph.nodes)
        self.sample = sample_input(captured, timestep)
        self.layers: dict[fx.Node, str] = {}
        self.sources: dict[fx.Node, frozenset[str]] = {}
        for node in self.nodes:
            call = layer_call(model, node)
            if call is not None:
                self.layers[node] = call.path
            inherited = frozenset[str]().union(*(self.sources[source] for source in data_inputs(node)))
            self.sources[node] = inherited | {str(node.target)} if node.op == "placeholder" else inherited

    def roles(self) -> dict[str, frozenset[str]]:
        """All tags by path."""
        found: dict[str, set[str]] = {}
        for path, tag in [*self._ends(), *self._time_embedding(), *self._skips(), *self._attention()]:
            found.setdefault(path, set()).add(tag)
        return {path: frozenset(tags) for path, tags in found.items()}

    def shares(self) -> list[frozenset[str]]:
        """Layers that must have one format."""
        merged: list[set[str]] = []
        for found in [*self._projections(), *self._joined()]:
            apart = [other for other in merged if not other & found]
            merged = [*apart, found.union(*(other for other in merged if other & found))]
        return [frozenset(paths) for paths in merged if len(paths) > 1]

    def _projections(self) -> Iterator[set[str]]:
        nodes = {path: node for node, path in self.layers.items()}
        for query, key, value, _ in self._attention_cores():
            readers: dict[fx.Node, set[str]] = {}
            for start in (query, key, value):
                for path in self._nearest(start, data_inputs):
                    readers.setdefault(data_inputs(nodes[path])[0], set()).add(path)
            yield from readers.values()

    def _joined(self) -> Iterator[set[str]]:
        for node in self.nodes:
            if node.target in _CONCAT:
                sources = [self._unchanged(source) for source in data_inputs(node)]
                yield {self.layers[source] for source in sources if source in self.layers}

    def _unchanged(self, node: fx.Node) -> fx.Node:
        """Where a tensor comes from, back through operations on one tensor that keep its shape."""
        while node not in self.layers and (before := self._same_shape_input(node)) is not None:
            node = before
        return node

    def _from_sample(self, node: fx.Node) -> bool:
        return self.sample is not None and str(self.sample.target) in self.sources[node]

    def _ends(self) -> Iterator[tuple[str, str]]:
        reaching: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op == "output" or node in reaching:
                reaching.update(data_inputs(node))
        on_path = [path for node, path in self.layers.items() if node in reaching and self._from_sample(node)]
        if on_path:
            yield on_path[0], FIRST
            yield on_path[-1], LAST

    def _time_embedding(self) -> Iterator[tuple[str, str]]:
        for node, path in self.layers.items():
            if self.timestep is None or self.timestep not in self.sources[node]:
                continue
            if self.sources[node] == {self.timestep}:
                yield path, TIME_EMBED
            elif not self._from_sample(node):
                yield path, MODULATION

    def splits(self) -> dict[str, tuple[int, ...]]:
        """Parts of the skip concatenations, by the path of the layers they feed."""
        concats = dict(self._skip_concats())
        found: dict[str, set[tuple[int, ...]]] = {}
        for node, path in self.layers.items():
            found.setdefault(path, set()).add(_parts(concats[node]) if node in concats else ())
        return {path: parts for path, calls in found.items() if len(calls) == 1 for parts in calls if parts}

    def _skips(self) -> Iterator[tuple[str, str]]:
        yield from ((self.layers[node], SKIP) for node, _ in self._skip_concats())

    def _skip_concats(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Every call of a layer that a concatenation of channels feeds, with the concatenation."""
        for node in self.layers:
            source = data_inputs(node)[0]
            shape = source.meta.get("shape")
            # Norms and activations keep the shape and have one tensor input besides their parameters.
            while source.target not in _CONCAT and (before := self._same_shape_input(source)) is not None:
                source = before
            if source.target in _CONCAT and shape is not None and self._joins_channels(source, node):
                yield node, source

    def _same_shape_input(self, node: fx.Node) -> fx.Node | None:
        if node in self.layers:
            return None
        inputs = [source for source in data_inputs(node) if source.op != "get_attr"]
        same = len(inputs) == 1 and inputs[0].meta.get("shape") == node.meta.get("shape")
        return inputs[0] if same else None

    def _joins_channels(self, concat: fx.Node, layer: fx.Node) -> bool:
        rank, dim = len(concat.meta["shape"]), _dim_of(concat)
        call = layer_call(self.model, layer)
        channels = channel_dim(call.layer) % rank if call is not None else rank - 1
        return dim % rank == channels and all(map(self._from_sample, data_inputs(concat)))

    def _attention(self) -> Iterator[tuple[str, str]]:
        for query, key, value, result in self._attention_cores():
            for tag, node in ((QUERY, query), (KEY, key), (VALUE, value)):
                yield from ((path, tag) for path in self._nearest(node, data_inputs))
            yield from ((path, OUT) for path in self._nearest_users(result))

    def _attention_cores(self) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
        """Query, key, value and result of every attention, fused or written out with a softmax."""
        for node in self.nodes:
            if node.target in ATTENTION:
                given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
                yield given["query"], given["key"], given["value"], node  # type: ignore[misc]
            elif self._is_softmax(node):
                scores = self._walk(node, lambda step: [*data_inputs(step)][:1], self._is_matmul)
                result = self._walk(node, lambda step: list(step.users)[:1], self._is_matmul)
                if scores is not None and result is not None:
                    query, key = data_inputs(scores)[-2:]
                    yield query, key, data_inputs(result)[-1], result

    def _is_softmax(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.model.get_submodule(str(node.target)), nn.Softmax)
        return node.target in _SOFTMAX or (node.op == "call_method" and node.target == "softmax")

    @staticmethod
    def _is_matmul(node: fx.Node) -> bool:
        return is_matmul(node)

    def _walk(
        self, node: fx.Node, step: Callable[[fx.Node], list[fx.Node]], found: Callable[[fx.Node], bool]
    ) -> fx.Node | None:
        """The first node where ``found`` holds, following one edge at a time and never through a layer."""
        while following := step(node):
            node = following[0]
            if found(node):
                return node
            if node in self.layers:
                return None
        return None

    def _nearest(self, node: fx.Node, before: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[str]:
        """The layers met first on every way back from a node."""
        waiting, seen = [node], set[fx.Node]()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self.layers:
                yield self.layers[current]
            else:
                waiting.extend(before(current))

    def _nearest_users(self, node: fx.Node) -> Iterator[str]:
        """The layers that a result reaches before it is mixed with another tensor."""

        def unmixed(current: fx.Node) -> list[fx.Node]:
            return [user for user in current.users if len([s for s in data_inputs(user) if s.op != "get_attr"]) == 1]

        return self._nearest(node, unmixed)
