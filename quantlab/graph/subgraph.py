"""Cut a part out of a captured graph, and record the tensors at its border.

A sub-graph runs with the whole model as its root and computes bit for bit what the whole graph computes: it has the
same nodes. Sizes, dtypes, parameters and what depends on no input are computed again inside it rather than passed in,
so that it takes any batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.roles import data_inputs


def convex_hull(graph: fx.Graph, nodes: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The nodes with everything on a path from one of them to another, and the parts of calls that return tuples."""
    after, before = set(nodes), set(nodes)
    for node in graph.nodes:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    for node in reversed(graph.nodes):
        if node in before:
            before.update(node.all_input_nodes)
    hull = after & before
    for node in graph.nodes:
        if any(source in hull and _is_tuple(source) for source in node.all_input_nodes):
            hull.add(node)
    return frozenset(hull)


@dataclass(frozen=True, eq=False)
class Subgraph:
    """Some nodes of a captured graph, closed under ``convex_hull``."""

    captured: CapturedGraph
    nodes: frozenset[fx.Node]

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors that enter, in the graph's order."""
        return tuple(node for node in self._needed if self._is_given(node))

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The tensors that leave: those whose values a node outside needs, in the graph's order."""
        inside = (node for node in self.captured.graph.nodes if node in self.nodes and "shape" in node.meta)
        return tuple(node for node in inside if any(user not in self.nodes and _computes(user) for user in node.users))

    def cut(self, outputs: Iterable[str]) -> CapturedGraph:
        """A graph of these nodes alone, whose output maps the names ``outputs`` of some of them to tensors.

        Inputs and outputs have the names of their nodes in the whole graph. What is changed in place inside is copied
        first.
        """
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        placeholders = [node for node in self._needed if self._is_given(node) or node.op == "placeholder"]
        for node in placeholders:
            copies[node] = graph.placeholder(node.name if self._is_given(node) else str(node.target))
            copies[node].meta = dict(node.meta)
        for node in self.inputs:
            if any(user in self.nodes for user in _changes(node)):
                copies[node] = graph.call_method("clone", (copies[node],))
        for node in self._needed:
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        by_name = {node.name: copied for node, copied in copies.items()}
        graph.output({name: _unchanged(graph, by_name[name]) for name in outputs})
        graph.lint()
        targets = {str(node.target) for node in placeholders}
        constants = {name: value for name, value in self.captured.constants.items() if name in targets}
        names = tuple(node.name for node in self.inputs)
        return CapturedGraph(graph, names, constants=constants, method=self.captured.method)

    @cached_property
    def _dependent(self) -> frozenset[fx.Node]:
        """The nodes whose values depend on an input of the whole graph."""
        found = set[fx.Node]()
        for node in self.captured.graph.nodes:
            is_input = node.op == "placeholder" and node.target in self.captured.input_names
            if is_input or not found.isdisjoint(data_inputs(node)):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _needed(self) -> tuple[fx.Node, ...]:
        """These nodes, what is computed again beside them, and the tensors that enter, in the graph's order."""
        needed, waiting = set[fx.Node](), list(self.nodes)
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting.extend(() if self._is_given(node) else node.all_input_nodes)
        return tuple(node for node in self.captured.graph.nodes if node in needed)

    def _is_given(self, node: fx.Node) -> bool:
        """Whether a node outside is passed in, rather than computed again."""
        return node not in self.nodes and not node.meta.get("scalar") and node in self._dependent


def recorder(captured: CapturedGraph, names: Iterable[str]) -> CapturedGraph:
    """The whole graph up to the last of the nodes ``names``; its output maps these names to tensors.

    A tensor that something later changes in place is returned as it was before.
    """
    wanted, graph, copies, found = set(names), fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    for node in captured.graph.nodes:
        if len(found) == len(wanted):
            break
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.name in wanted:
            found[node.name] = graph.call_method("clone", (copies[node],)) if _changes(node) else copies[node]
    graph.output(found)
    graph.lint()
    return replace(captured, graph=graph, output_type=None, taps=())


def _is_tuple(node: fx.Node) -> bool:
    """Whether a call returns several tensors, so that only its parts are described."""
    return node.op.startswith("call_") and "shape" not in node.meta and _computes(node)


def _computes(node: fx.Node) -> bool:
    """Whether a node uses the values of its inputs, not their sizes alone."""
    return not node.meta.get("scalar")


def _changes(node: fx.Node) -> list[fx.Node]:
    """The nodes that change a tensor in place."""
    return [user for user in node.users if user.meta.get("impure") and _computes(user)]


def _unchanged(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A tensor as its node returned it: a copy when something later changes it in place."""
    if not _changes(node):
        return node
    with graph.inserting_after(node):
        return graph.call_method("clone", (node,))
