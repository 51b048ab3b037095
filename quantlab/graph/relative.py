"""What a graph holds for other dtypes and batches: found by capturing again on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quantlab.graph.guards import contiguous_when, require

_LARGEST_BATCH = 4096
"""Comparisons with larger numbers are about bytes and indices, not about batches."""
Pairs = list[tuple[fx.Node, fx.Node]]


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """The model with fake parameters and buffers, of another floating dtype if one is given; takes no memory."""
    own = model_dtype(model)

    def fake(tensor: Tensor) -> Tensor:
        result = mode.from_tensor(tensor.detach())
        result = result.to(dtype) if dtype is not None and tensor.dtype == own else result
        return nn.Parameter(result, requires_grad=False) if isinstance(tensor, nn.Parameter) else result

    with mode:
        memo = {id(tensor): fake(tensor) for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating parameter, or None without one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def align(graph: fx.Graph, other: fx.Graph) -> Pairs | None:
    """The nodes of two graphs that do the same, pair by pair; None when the computations differ.

    Dtypes and devices may differ. Guards and ``contiguous`` are passed over: they change no value.
    """
    left, right = list(_steps(graph)), list(_steps(other))
    if len(left) != len(right):
        return None
    places = {node: index for nodes in (left, right) for index, node in enumerate(nodes)}
    pairs = list(zip(left, right, strict=True))
    return pairs if all(_key(a, places, True) == _key(b, places, True) for a, b in pairs) else None


def _steps(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if not node.meta.get("scalar") and not _is_contiguous(node))


def _is_contiguous(node: fx.Node) -> bool:
    return node.target is contiguous_when or (node.op == "call_method" and node.target == "contiguous")


def _key(value: Any, places: dict[fx.Node, int], as_step: bool = False) -> Any:
    """A value of a graph in terms that can be compared with another graph's."""
    if isinstance(value, fx.Node):
        if _is_contiguous(value):
            return _key(value.args[0], places)
        if value.target is getattr and value.args[1] in ("device", "dtype"):
            return value.args[1]  # fake tensors read their device without a torch function
        if not as_step and not value.meta.get("scalar"):
            return "node", places[value]
        target = value.target if isinstance(value.target, str) else _name(value.target)
        return value.op, target, _key(value.args, places), _key(value.kwargs, places)
    if isinstance(value, tuple | list):
        return tuple(_key(entry, places) for entry in value)
    if isinstance(value, dict):
        return tuple((key, _key(entry, places)) for key, entry in value.items())
    if isinstance(value, slice):
        return "slice", _key((value.start, value.stop, value.step), places)
    return next((kind.__name__ for kind in (torch.dtype, torch.device) if isinstance(value, kind)), repr(value))


def _name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def make_dtypes_relative(graph: fx.Graph, pairs: Pairs, reference: str) -> None:
    """Replace each literal dtype that differs between the pairs by the dtype of the parameter ``reference``."""
    dtype_node: fx.Node | None = None
    for node, twin in pairs:
        if _dtypes(node) == _dtypes(twin):
            continue
        if dtype_node is None:
            first = next(step for step in graph.nodes if step.op != "placeholder")
            with graph.inserting_before(first):
                parameter = graph.create_node("get_attr", reference)
                dtype_node = graph.call_function(getattr, (parameter, "dtype"))
                parameter.meta["scalar"] = dtype_node.meta["scalar"] = True
        node.args = _replace_dtypes(node.args, twin.args, dtype_node)
        node.kwargs = _replace_dtypes(dict(node.kwargs), dict(twin.kwargs), dtype_node)


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    found: list[torch.dtype] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.dtype):
            found.append(value)
        elif isinstance(value, tuple | list | dict):
            for entry in value.values() if isinstance(value, dict) else value:
                walk(entry)

    walk((node.args, node.kwargs))
    return found


def _replace_dtypes(value: Any, twin: Any, dtype_node: fx.Node) -> Any:
    if isinstance(value, torch.dtype):
        return value if value == twin else dtype_node
    if isinstance(value, tuple | list):
        return type(value)(_replace_dtypes(a, b, dtype_node) for a, b in zip(value, twin, strict=True))
    if isinstance(value, dict):
        return {key: _replace_dtypes(entry, twin[key], dtype_node) for key, entry in value.items()}
    return value


def opposite_batch(graph: fx.Graph, batch: int) -> int | None:
    """A larger batch that turns the size comparisons of the graph's guards around if they are about the batch."""
    limits = [
        int(node.args[2])  # type: ignore[arg-type]
        for node in graph.nodes
        if node.target is require
        and node.args[1] in ("lt", "le", "gt", "ge")
        and isinstance(node.args[2], int)
        and node.args[2] <= _LARGEST_BATCH
    ]
    return (max(limits) // batch + 2) * batch if limits and batch else None


def merge_layout_branches(graph: fx.Graph, other: fx.Graph, pairs: Pairs) -> frozenset[str]:
    """Replace the guards that came out differently in ``other``, an aligned graph, by their effect on the layout.

    Returns:
        The conditions of these guards.
    """
    twins = {twin: node for node, twin in pairs}
    checks = {node.args[4]: node for node in other.nodes if node.target is require}
    flipped: set[str] = set()
    for node in list(graph.nodes):
        check = checks.get(node.args[4]) if node.target is require else None
        if check is None or check.args[3] == node.args[3]:
            continue
        flipped.add(str(node.args[4]))
        following = check.next
        if _is_contiguous(following) and following.args[0] in twins:
            tensor = twins[following.args[0]]  # type: ignore[index]
            with graph.inserting_after(node):
                merged = graph.call_function(contiguous_when, (tensor, *node.args[:3], not node.args[3]))
            merged.meta = {**tensor.meta, "fqn": node.meta["fqn"]}
            for user in following.users:
                if user in twins:
                    twins[user].replace_input_with(tensor, merged)
        graph.erase_node(node)
    return frozenset(flipped)


def is_fake(value: Any) -> bool:
    """Whether a tensor has a shape but no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta)
