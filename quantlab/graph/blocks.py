"""Blocks of the float and the quantized network, cut alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantlab.contracts.block import Block, BlockRun, Border, Partition
from quantlab.contracts.model import Inputs
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.grouping import Group, Grouper
from quantlab.graph.run import runner
from quantlab.graph.subgraph import Subgraph, convex_hull, recorder


@dataclass(frozen=True)
class Traced:
    """A network with its graph."""

    network: nn.Module
    graph: CapturedGraph


def cut_blocks(
    teacher: Traced, student: Traced, trained: Collection[str], timestep_input: str | None, partition: Partition
) -> tuple[Block, ...]:
    """Cut both networks into the same blocks; those without a site in ``trained`` are left out.

    Args:
        teacher: the float network.
        student: the quantized network; its graph has the float graph's operations under the same names.
        trained: the sites that may be trained.
        timestep_input: the input that carries the timestep, or None.
        partition: which sites form a block.
    """
    float_calls, quantized_calls = (Grouper(side.network, side.graph) for side in (teacher, student))
    blocks = []
    for group in float_calls.groups(partition, timestep_input):
        sites = tuple(site for site in group.sites if site in trained)
        if not sites:
            continue
        part = _part(float_calls, group)
        outputs = tuple(node.name for node in part.outputs)
        inner = {node.name for site in group.sites for node in float_calls.calls[site]} - {*outputs}
        returned = (*outputs, *sorted(inner)) if partition.inner_outputs else outputs
        run, record = _forwards(teacher, part, returned)
        student_run, student_record = _forwards(student, _part(quantized_calls, group), returned)
        blocks.append(Block(group.name, sites, outputs, student_run, run, student_record, record))
    return tuple(blocks)


def _part(calls: Grouper, group: Group) -> Subgraph:
    """A group's operations in a graph, whatever a pass has put between them included."""
    nodes = {node for node in calls.captured.graph.nodes if node.name in group.nodes}
    nodes |= {node for site in group.sites for node in calls.calls[site]}
    return Subgraph(calls.captured, convex_hull(calls.captured.graph, nodes))


def _forwards(side: Traced, part: Subgraph, outputs: Sequence[str]) -> tuple[BlockRun, Callable[[Inputs], Border]]:
    """The block's own forward, and the recording of its border in a run of the whole network."""
    inputs = tuple(node.name for node in part.inputs)
    run = runner(side.network, part.cut(outputs))

    def record(given: Inputs) -> Border:
        with torch.no_grad():
            # Cut when it is needed: a network has many blocks, and each recorder is a copy of its graph.
            seen = runner(side.network, recorder(side.graph, (*inputs, *outputs)))(given)
        return Border({name: seen[name] for name in inputs}, {name: seen[name] for name in outputs})

    return run, record
