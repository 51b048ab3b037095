"""What a graph multiplies outside its sites, and the memory that it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.functional import is_transposed, is_weight_call, layer_call, weight_call
from quantlab.graph.products import find_products, is_matmul
from quantlab.graph.roles import data_inputs, sample_input
from quantlab.quant.operation import Multiplying

_EINSUM, _ADDING = (torch.einsum,), (torch.baddbmm, torch.addmm, torch.ops.aten.addmm.default)


@dataclass(frozen=True)
class Uncovered:
    """Multiply-accumulates that no site stands for.

    Attributes:
        where: path of a module, "" for the model itself.
        operation: what multiplies.
        macs: of one forward at batch 1.
        reason: why they stay float.
    """

    where: str
    operation: str
    macs: int
    reason: str


def find_uncovered(model: nn.Module, captured: CapturedGraph) -> Iterator[Uncovered]:
    """Products that are no sites: by weights that no layer stands for, and of other forms than a matmul."""
    sample = sample_input(captured, None)
    batch = sample.meta["shape"][0] if sample is not None and sample.meta.get("shape") else 1
    products = {call.node for call in find_products(captured)}
    for node in captured.graph.nodes:
        if node in products or layer_call(model, node) is not None:
            continue
        reason = _reason(model, node)
        if reason is not None:
            yield Uncovered(_place(node), _name(model, node), _macs(model, node) // batch, reason)


def by_reason(uncovered: Iterable[Uncovered]) -> dict[tuple[str, str], list[Uncovered]]:
    """Operations that stay float for one reason together: (operation, reason) -> all of them."""
    alike: dict[tuple[str, str], list[Uncovered]] = {}
    for entry in uncovered:
        alike.setdefault((entry.operation, entry.reason), []).append(entry)
    return alike


def _place(node: fx.Node) -> str:
    """The module that is called or whose parameter is used, else the one whose forward multiplies."""
    if node.op == "call_module":
        return str(node.target)
    used = [str(source.target) for source in _operands(node) if source.op == "get_attr"]
    return used[0].rpartition(".")[0] if used else str(node.meta.get("fqn", ""))


def _reason(model: nn.Module, node: fx.Node) -> str | None:
    """Why a node that multiplies is no site; None for one that does not."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        called = isinstance(layer, Multiplying) and "inner_calls" not in node.meta
        return "it is told the size of its output" if called else None
    if node.target in _EINSUM:
        # Of one tensor it is a permutation.
        return "an einsum is no matrix product" if len(_operands(node)) > 1 else None
    if node.target in _ADDING or (node.op == "call_method" and node.target in ("baddbmm", "addmm")):
        return "it adds a third tensor"
    if is_matmul(node):
        return "one of its operands is a parameter, or not of floats"
    if node.target is F.multi_head_attention_forward:
        return "nn.MultiheadAttention is one opaque call"
    found = weight_call(model, node)
    return found if isinstance(found, str) else None


def _macs(model: nn.Module, node: fx.Node) -> int:
    """At the captured batch."""
    size = math.prod(node.meta.get("shape", ()))
    if node.op == "call_module":  # a transposed convolution
        return math.prod(data_inputs(node)[0].meta["shape"]) * model.get_submodule(str(node.target)).weight[0].numel()  # type: ignore[union-attr]
    if node.target in _EINSUM:
        return size * _summed(node)
    operands = _operands(node)
    if node.target is F.multi_head_attention_forward:
        return _attention(*(operand.meta["shape"] for operand in operands[:2]))
    if is_weight_call(node):
        x, weight = operands[:2]
        counted = math.prod(x.meta["shape"]) if is_transposed(node) else size
        return counted * math.prod(weight.meta["shape"][1:])
    return size * operands[-2].meta["shape"][-1]


def _attention(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Four projections and two products of nn.MultiheadAttention, of [L, B, E] and [S, B, E]."""
    values, width = math.prod(query), query[-1]
    return 2 * width * (values + math.prod(key)) + 2 * values * key[0]


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


def _name(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among the arguments, one given twice twice; of ``baddbmm`` what is added comes first."""
    values = (*node.args, *node.kwargs.values())
    given = [entry for value in values for entry in (value if isinstance(value, tuple | list) else [value])]
    return [entry for entry in given if isinstance(entry, fx.Node) and entry.meta.get("shape")]


def _summed(node: fx.Node) -> int:
    """The sizes of the letters that an einsum adds over."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    sizes = {
        letter: size
        for term, source in zip(terms.split(","), _operands(node), strict=False)
        for letter, size in zip(term, source.meta["shape"], strict=False)
    }
    return math.prod(size for letter, size in sizes.items() if letter not in result)
