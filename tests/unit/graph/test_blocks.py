"""Blocks: each computes bit for bit what the whole network computes, and together they are the network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from quantlab.contracts.block import TEMPORAL, Grouping, Partition
from quantlab.graph.blocks import Traced, cut_blocks
from quantlab.graph.capture import capture
from quantlab.graph.grouping import Grouper, list_elements
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.subgraph import Subgraph, convex_hull

LAYERS, BLOCKS = Partition(Grouping.LAYER, inner_outputs=True), Partition(Grouping.BLOCK, inner_outputs=True)
TEMPORAL_FIRST = Partition(Grouping.BLOCK, temporal_first=True, inner_outputs=True)


def traced_pair(case):
    """The float network and its quantizable copy, and the names of all layers."""
    names = [name for name, site in case.sites.items() if site.weight_shape and site.macs]
    model = copy.deepcopy(case.model)
    timestep = "timestep" if "timestep" in case.captured.input_names else None
    graph = insert_quantizers(model, case.captured, names, timestep)
    return Traced(case.model, case.captured), Traced(model, graph), names, timestep


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        ("digits", BLOCKS),
        ("digits", TEMPORAL_FIRST),
        ("digits", LAYERS),
        ("mobilenetv3", BLOCKS),  # works in place
        ("sdxl_tiny", TEMPORAL_FIRST),
    ],
)
def test_a_block_fed_its_recorded_inputs_gives_its_recorded_outputs(cases, name, partition):
    case = cases(name)
    teacher, student, names, timestep = traced_pair(case)
    blocks = cut_blocks(teacher, student, names, timestep, partition)
    assert sorted(site for block in blocks for site in block.sites) == sorted(names)
    for block in blocks[:: 1 if partition is BLOCKS else 9]:
        for run, record in ((block.student, block.record_student), (block.teacher, block.record_teacher)):
            border = record(case.inputs(3))
            with torch.no_grad():
                found = run(border.inputs)
            assert set(block.outputs) <= found.keys() == border.outputs.keys()
            assert all(torch.equal(value, border.outputs[key]) for key, value in found.items()), block.name


def test_a_block_takes_any_batch(cases):
    """Sizes are computed inside it: an attention's reshapes are not those of the batch it was recorded with."""
    case = cases("digits")
    teacher, student, names, timestep = traced_pair(case)
    for block in cut_blocks(teacher, student, names, timestep, BLOCKS):
        border = block.record_student(case.inputs(4))
        with torch.no_grad():
            found = block.student({key: value[1:3] for key, value in border.inputs.items()})
        for key, value in found.items():
            torch.testing.assert_close(value, border.outputs[key][1:3], rtol=1e-5, atol=1e-6)


class Through(fx.Interpreter):
    """Runs a graph, the nodes of every block by the block's own graph once its inputs are there."""

    def __init__(self, model, captured, parts):
        super().__init__(fx.GraphModule(model, captured.graph))
        self.runs = {}
        for part in parts:
            module = fx.GraphModule(model, part.cut([node.name for node in part.outputs]).graph)
            self.runs |= {node.name: (part, module) for node in part.outputs}
        self.inside = {node.name for part in parts for node in part.nodes}
        self.ran = 0

    def run_node(self, n):
        if n.name in self.runs:
            part, module = self.runs[n.name]
            self.ran += 1
            return module(*(self.env[self.node(node.name)] for node in part.inputs))[n.name]
        return None if n.name in self.inside else super().run_node(n)

    def node(self, name):
        return next(node for node in self.module.graph.nodes if node.name == name)


@pytest.mark.parametrize("first", [False, True])
def test_all_blocks_together_are_the_network(cases, first):
    case = cases("digits")
    grouper = Grouper(case.model, case.captured)
    nodes = {node.name: node for node in case.captured.graph.nodes}
    groups = grouper.groups(Partition(Grouping.BLOCK, temporal_first=first), "timestep")
    parts = [Subgraph(case.captured, frozenset(nodes[name] for name in group.nodes)) for group in groups]
    assert sum(len(part.nodes) for part in parts) == len(frozenset().union(*(part.nodes for part in parts)))
    through = Through(case.model, case.captured, parts)
    through.garbage_collect_values = False
    inputs = case.inputs(3)
    with torch.no_grad():
        found = through.run(*(inputs[name] for name in case.captured.input_names))
        expected = case.model(**inputs, return_dict=False)
    assert torch.equal(found[0], expected[0])
    assert through.ran == sum(len(part.outputs) for part in parts) > len(parts) / 2


def test_blocks_of_the_digits_unet(cases):
    case = cases("digits")
    teacher, student, names, timestep = traced_pair(case)
    blocks = {b.name: b for b in cut_blocks(teacher, student, names, timestep, BLOCKS)}
    assert blocks["down_blocks.0.resnets.0"].sites == tuple(
        f"down_blocks.0.resnets.0.{layer}" for layer in ("conv1", "time_emb_proj", "conv2")
    )
    assert len(blocks["up_blocks.1.attentions.0"].sites) == 4
    assert blocks["up_blocks.1.upsamplers.0.conv"].sites == ("up_blocks.1.upsamplers.0.conv",)
    assert list(blocks)[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    # A residual block ends after the sum with its shortcut: one tensor leaves it.
    assert all(len(block.outputs) == 1 for block in blocks.values())
    first, *others = cut_blocks(teacher, student, names, timestep, TEMPORAL_FIRST)
    assert first.name == TEMPORAL
    expected = {name for name in names if name.startswith("time_embedding") or name.endswith("time_emb_proj")}
    assert set(first.sites) == expected and len(first.outputs) == len(expected) - 2
    assert not expected & {site for block in others for site in block.sites}


def test_sites_that_are_not_trained_are_left_out(cases):
    case = cases("digits")
    teacher, student, _, timestep = traced_pair(case)
    (block,) = cut_blocks(teacher, student, ["mid_block.resnets.0.conv2"], timestep, Partition(Grouping.BLOCK))
    assert (block.name, block.sites) == ("mid_block.resnets.0", ("mid_block.resnets.0.conv2",))


class Crossing(nn.Module):
    """An element of a list whose first layer feeds its last one through a layer outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})])
        self.outside = nn.Linear(4, 4)

    def forward(self, x):
        block = self.blocks[0]
        hidden = block["a"](x)
        return block["b"](F.relu(self.outside(hidden)) + hidden)


def test_a_block_that_a_path_leaves_and_enters_again_is_enlarged():
    model = Crossing().eval()
    captured = capture(model, {"x": torch.randn(3, 4)}, {})
    (group,) = Grouper(model, captured).groups(Partition(Grouping.BLOCK), None)
    assert (group.name, group.sites) == ("blocks.0", ("blocks.0.a", "outside", "blocks.0.b"))
    nodes = frozenset(node for node in captured.graph.nodes if node.name in group.nodes)
    assert convex_hull(captured.graph, nodes) == nodes


def test_elements_of_lists() -> None:
    sites = ["conv", "stages.0.blocks.0.a", "stages.0.blocks.0.b", "stages.0.down", "features.0", "features.1"]
    assert list_elements(sites) == {
        "conv": ("conv",),
        "stages.0.blocks.0": ("stages.0.blocks.0.a", "stages.0.blocks.0.b"),
        "stages.0.down": ("stages.0.down",),
        "features.0": ("features.0",),
        "features.1": ("features.1",),
    }


def test_gradients_reach_the_layers_of_a_block(cases):
    case = cases("digits")
    teacher, student, names, timestep = traced_pair(case)
    blocks = cut_blocks(teacher, student, names, timestep, Partition(Grouping.BLOCK))
    block = next(block for block in blocks if block.name == "mid_block.attentions.0")
    student.network.requires_grad_(True)
    border = block.record_student(case.inputs(2))
    block.student(border.inputs)[block.outputs[0]].square().sum().backward()
    assert all(student.network.get_submodule(site).weight.grad is not None for site in block.sites)
    assert student.network.get_submodule("conv_in").weight.grad is None
