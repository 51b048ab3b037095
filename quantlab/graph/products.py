"""Products of two computed tensors outside fused attention."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from quantlab.graph.captured import CapturedGraph

_MATMUL = (
    torch.matmul,
    torch.bmm,
    torch.mm,
    operator.matmul,
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.mm.default,
)
_MATMUL_METHODS = ("matmul", "bmm", "mm", "__matmul__")
_ADDING, _ADDING_METHODS = (torch.baddbmm, torch.ops.aten.baddbmm.default), ("baddbmm",)


@dataclass(frozen=True)
class ProductCall:
    """One matrix product of two activations.

    Attributes:
        site: the path that a module computing it gets: that of the module whose forward multiplies, and a number.
        node: what multiplies.
        left: [..., n, k].
        right: [..., k, m].
    """

    site: str
    node: fx.Node
    left: fx.Node
    right: fx.Node


def is_matmul(node: fx.Node) -> bool:
    """Whether a node is a matrix product, perhaps one that adds a third tensor to it."""
    if node.op == "call_method":
        return node.target in (*_MATMUL_METHODS, *_ADDING_METHODS)
    return node.target in (*_MATMUL, *_ADDING)


def find_products(captured: CapturedGraph) -> Iterator[ProductCall]:
    """Every product of two floating tensors that the forward computes, numbered within its module.

    Products that add a third tensor, those with a parameter, and ``einsum`` are none of them.
    """
    counts: dict[str, int] = {}
    for node in captured.graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        place = str(node.meta.get("fqn", ""))
        number = counts[place] = counts.get(place, -1) + 1
        yield ProductCall(f"{place}.product_{number}" if place else f"product_{number}", node, *operands)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if node.target not in (_MATMUL_METHODS if node.op == "call_method" else _MATMUL):
        return None
    given = [*node.args, *node.kwargs.values()]
    match given:
        case [fx.Node() as left, fx.Node() as right] if _is_computed(left) and _is_computed(right):
            return left, right
    return None


def _is_computed(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return node.op != "get_attr" and bool(node.meta.get("shape")) and dtype is not None and dtype.is_floating_point
