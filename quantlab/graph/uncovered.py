"""What a graph multiplies outside its sites, and the memory that it needs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import layer_call
from quantlab.graph.roles import data_inputs, sample_input

_PRODUCTS = (torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul, F.linear)
_PRODUCT_METHODS = ("matmul", "bmm", "baddbmm", "__matmul__")
_OTHER_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Uncovered:
    """Multiply-accumulates that no site stands for.

    Attributes:
        where: path of the module.
        operation: what multiplies.
        macs: of one forward at batch 1.
    """

    where: str
    operation: str
    macs: int


def find_uncovered(model: nn.Module, captured: CapturedGraph) -> Iterator[Uncovered]:
    """Products of computed tensors, and convolutions of kinds that are no sites."""
    sample = sample_input(captured, None)
    batch = sample.meta["shape"][0] if sample is not None and sample.meta.get("shape") else 1
    for node in captured.graph.nodes:
        if node.op == "call_module":
            layer = model.get_submodule(str(node.target))
            if isinstance(layer, _OTHER_CONVOLUTIONS):
                per_value = math.prod(layer.weight.shape[1:])
                source = data_inputs(node)[0] if layer.transposed else node
                macs = math.prod(source.meta["shape"]) * per_value // batch
                yield Uncovered(str(node.target), type(layer).__name__, macs)
        elif _is_product(node) and layer_call(model, node) is None and node.meta.get("shape"):
            yield Uncovered(
                node.meta.get("fqn", ""), _name(node), math.prod(node.meta["shape"]) * _depth(node) // batch
            )


def peak_activation_bytes(captured: CapturedGraph) -> int:
    """The most bytes of tensors that are alive together in one forward of the captured example, at batch 1."""
    sample = sample_input(captured, None)
    batch = sample.meta["shape"][0] if sample is not None and sample.meta.get("shape") else 1
    nodes = list(captured.graph.nodes)
    last = {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}
    ends: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        ends.setdefault(index, []).append(node)
    alive = peak = 0
    for index, node in enumerate(nodes):
        alive += _bytes(node) if node in last else 0
        peak = max(peak, alive)
        alive -= sum(_bytes(done) for done in ends.get(index, ()))
    return peak // batch


def _bytes(node: fx.Node) -> int:
    """Of what a node computes; a parameter is no activation."""
    if node.op == "get_attr" or "dtype" not in node.meta:
        return 0
    return math.prod(node.meta["shape"]) * node.meta["dtype"].itemsize


def _is_product(node: fx.Node) -> bool:
    if node.target is torch.einsum and len(_operands(node)) < 2:
        return False  # of one tensor it is a permutation
    return node.target in _PRODUCTS or (node.op == "call_method" and node.target in _PRODUCT_METHODS)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that are multiplied, one given twice twice; of ``baddbmm`` what is added comes first."""
    values = (*node.args, *node.kwargs.values())
    given = [entry for value in values for entry in (value if isinstance(value, tuple | list) else [value])]
    tensors = [entry for entry in given if isinstance(entry, fx.Node) and entry.meta.get("shape")]
    return tensors[:2] if node.target is F.linear else tensors


def _depth(node: fx.Node) -> int:
    """Products that each value of the result adds up."""
    if node.target is torch.einsum:
        return _summed(node)
    return _operands(node)[-2].meta["shape"][-1]


def _summed(node: fx.Node) -> int:
    """The sizes of the letters that an einsum adds over."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    sizes = {
        letter: size
        for term, source in zip(terms.split(","), _operands(node), strict=False)
        for letter, size in zip(term, source.meta["shape"], strict=False)
    }
    return math.prod(size for letter, size in sizes.items() if letter not in result)
