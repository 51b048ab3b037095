"""Which sites of a network form a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from quantlab.contracts.block import TEMPORAL, Grouping, Partition
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import layer_call
from quantlab.graph.roles import data_inputs, sample_input
from quantlab.graph.subgraph import convex_hull
from quantlab.quant.operation import Multiplying


@dataclass(frozen=True)
class Group:
    """Sites that form a block.

    Attributes:
        name: a module path, a site, or TEMPORAL.
        sites: in the graph's order.
        nodes: names of the operations that belong to it, closed under ``convex_hull``.
    """

    name: str
    sites: tuple[str, ...]
    nodes: frozenset[str]


class Grouper:
    """Groups the layers of one graph.

    Attributes:
        captured: the graph.
        calls: site -> the nodes that call it, in the graph's order.
    """

    def __init__(self, model: nn.Module, captured: CapturedGraph) -> None:
        self.captured = captured
        self.calls: dict[str, list[fx.Node]] = {}
        for node in captured.graph.nodes:
            for path in layers_called(model, node):
                self.calls.setdefault(path, []).append(node)

    def groups(self, partition: Partition, timestep_input: str | None) -> tuple[Group, ...]:
        """All layers of the graph in groups, in the graph's order; groups that share an operation become one."""
        temporal = self._temporal(timestep_input) if partition.temporal_first else ()
        match partition.grouping:
            case Grouping.LAYER:
                named = {site: (site,) for site in self.calls}
            case Grouping.BLOCK:
                named = list_elements(tuple(self.calls))
        named = {name: tuple(site for site in sites if site not in temporal) for name, sites in named.items()}
        return self._disjoint({TEMPORAL: temporal, **named})

    def _disjoint(self, named: Mapping[str, tuple[str, ...]]) -> tuple[Group, ...]:
        """Each group with its convex hull; groups whose hulls meet are merged, the first gives the name."""
        found: dict[str, frozenset[fx.Node]] = {}
        for name, sites in named.items():
            if not sites:
                continue
            claimed = frozenset[fx.Node]().union(*found.values())
            seeds = {node for site in sites for node in self.calls[site]}
            if name not in self.calls:
                seeds |= self._operations_of(name) - claimed
            nodes = convex_hull(self.captured.graph, seeds)
            while met := [other for other in found if not found[other].isdisjoint(nodes)]:
                name = met[0]
                nodes = convex_hull(self.captured.graph, nodes.union(*(found.pop(other) for other in met)))
            found[name] = nodes
        groups = [Group(name, self._sites_in(nodes), frozenset(n.name for n in nodes)) for name, nodes in found.items()]
        order = {site: index for index, site in enumerate(self.calls)}
        return tuple(sorted(groups, key=lambda group: (group.name != TEMPORAL, order[group.sites[0]])))

    def _sites_in(self, nodes: frozenset[fx.Node]) -> tuple[str, ...]:
        return tuple(site for site, calls in self.calls.items() if not nodes.isdisjoint(calls))

    def _operations_of(self, path: str) -> set[fx.Node]:
        """Everything that a module computes, sizes apart."""
        return {
            node
            for node in self.captured.graph.nodes
            if node.op.startswith("call_") and not node.meta.get("scalar") and _is_below(node, path)
        }

    def _temporal(self, timestep_input: str | None) -> tuple[str, ...]:
        """The layers that see the timestep, perhaps with conditions, and nothing of the sample."""
        sample = sample_input(self.captured, timestep_input)
        sources: dict[fx.Node, frozenset[object]] = {}
        for node in self.captured.graph.nodes:
            inherited = frozenset[object]().union(*(sources[source] for source in data_inputs(node)))
            sources[node] = inherited | {node.target} if node.op == "placeholder" else inherited

        def is_temporal(node: fx.Node) -> bool:
            return timestep_input in sources[node] and (sample is None or sample.target not in sources[node])

        return tuple(site for site, nodes in self.calls.items() if all(map(is_temporal, nodes)))


def list_elements(sites: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sites by the innermost element of a list that holds several of them, in the order of each group's first site.

    A site outside every such element is a group by itself, and so is one whose element holds another group: what is
    left of a stage beside its residual blocks are single layers.
    """
    paths = {site: _innermost_element(site, sites) for site in sites}
    used = {path for path in paths.values() if path is not None}
    outer = {path for path in used if any(other.startswith(f"{path}.") for other in used)}
    groups: dict[str, tuple[str, ...]] = {}
    for site, path in paths.items():
        name = site if path is None or path in outer else path
        groups[name] = (*groups.get(name, ()), site)
    return groups


def layers_called(model: nn.Module, node: fx.Node) -> list[str]:
    """The layers that a node calls: several when it calls a whole module as it is."""
    call = layer_call(model, node)
    if call is not None:
        return [call.path]
    inner = (path for path, *_ in node.meta.get("inner_calls", ()))
    return [path for path in inner if isinstance(model.get_submodule(path), Multiplying)]


def _innermost_element(site: str, sites: Sequence[str]) -> str | None:
    parts = site.split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        if parts[length - 1].isdigit() and sum(other.startswith(f"{path}.") for other in sites) > 1:
            return path
    return None


def _is_below(node: fx.Node, path: str) -> bool:
    place = str(node.meta.get("fqn", ""))
    return place == path or place.startswith(f"{path}.")
