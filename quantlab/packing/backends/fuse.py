"""A graph of integer layers, rewritten so that less is done between their products.

- The SiLU before a layer goes into the pass that quantizes.
- Values that are only moved (nearest upsampling, zero padding, a transpose, dropout that is switched off) are quantized
  before they are moved: bytes are moved, and fewer of them.
- Layers that read one tensor on one grid share its codes.
- The rows of per-timestep tables are looked up once for all layers with the same timesteps.
- What is added to the output of a layer is added in place; a division by 1 is dropped.
- Group norms of [B, C, N] run in the memory layout of their input instead of transposing it.

All but the last leave every bit as it is. The last is float arithmetic between layers: in another layout torch adds up
the statistics of a norm in another order.

A layer whose input has parts of its own, or that has a low-rank branch besides, is left as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quantlab.graph.captured import CapturedGraph
from quantlab.packing.backends.integers import ONE_ROW
from quantlab.packing.backends.layers import Encoder, IntegerLayer, Multiplier

_ADDITIONS = {operator.add, torch.add, "add"}
_DIVISIONS = {operator.truediv, torch.div, "div"}
_SILUS = {F.silu}
_UPSAMPLINGS = {F.interpolate}
_PADDINGS = {F.pad}
_TRANSPOSES = {torch.transpose, "transpose"}


@dataclass(frozen=True)
class Fused:
    """A rewritten graph.

    Attributes:
        graph: of the network with integer layers.
        codes: by site, how the codes of its input come about; "" where it is as before.
    """

    graph: CapturedGraph
    codes: dict[str, str]


@dataclass(frozen=True)
class _Shared:
    """Codes that other layers may use."""

    source: fx.Node
    silu: bool
    encoder: Encoder
    rows: fx.Node | None
    node: fx.Node
    site: str


def fuse(network: nn.Module, captured: CapturedGraph) -> Fused:
    """The graph of a lowered network with quantization taken into what stands before it.

    Args:
        network: in evaluation mode, or its dropout stays between quantization and product.
        captured: its graph; the given one is not changed.
    """
    captured = replace(captured.copy(), module_outputs={})
    rewriting = _Rewriting(network, captured.graph)
    codes: dict[str, str] = {}
    for node in list(captured.graph.find_nodes(op="call_module", sort=True)):
        path = str(node.target)
        layer = network.get_submodule(path)
        if isinstance(layer, IntegerLayer) and len(layer.encoders) == 1 and layer.branch is None:
            codes[path] = rewriting.layer(node, path, layer)
    rewriting.drop_divisions_by_one()
    rewriting.norm_as_it_lies()
    rewriting.add_in_place()
    captured.graph.lint()
    return Fused(captured, codes)


def group_norm_as_it_lies(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The group norm of x [B, C, N], in the memory layout of x where its channels are innermost."""
    if x.stride(1) != 1 or x.shape[1] == 1:
        return norm(x)
    channels_last = x.transpose(1, 2).unsqueeze(1).permute(0, 3, 1, 2)
    return norm(channels_last).squeeze(2)


class _Rewriting:
    """The state of one rewriting: what has been made so far."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        self.network, self.graph = network, graph
        self.shared: list[_Shared] = []
        self.moved: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.lookups: list[tuple[fx.Node, Tensor, fx.Node]] = []

    def layer(self, node: fx.Node, path: str, layer: IntegerLayer) -> str:
        """Split the call of a layer into encoding, hoisted as far as it goes, and product; says what was done."""
        encoder = _encoder(layer)
        x, timestep = node.args[0], node.args[1] if len(node.args) > 1 else None
        assert isinstance(x, fx.Node)
        rows = self._rows(path, encoder, timestep)
        notes, moves, source = [], [], x
        while (before := self._movable(source, encoder)) is not None:
            moves.append(source)
            source = before
        silu = self._silu(source)
        if names := [_name(move) for move in reversed(moves) if move.op != "call_module"]:
            notes.append(f"quantized before {', '.join(names)}")
        if silu is not None:
            notes.append("silu and quantization in one pass")
        found = self._shared(silu or source, silu is not None, encoder, rows)
        if found is None:
            with self.graph.inserting_after(_later(silu or source, rows)):
                codes = self.graph.call_module(
                    f"{path}.encoders.0", (silu or source, ONE_ROW if rows is None else rows, silu is not None)
                )
            self._describe(codes, source)
            self.shared.append(_Shared(silu or source, silu is not None, encoder, rows, codes, path))
        else:
            codes = found.node
            notes.append(f"the codes of {found.site}")
        for move in reversed(moves):
            codes = self._move(codes, move, encoder)
        node.target, node.args = f"{path}.multipliers.0", (codes, ONE_ROW if rows is None else rows)
        self._drop(x)
        return "; ".join(notes)

    def drop_divisions_by_one(self) -> None:
        """x / 1 is x, in every bit."""
        for node in list(self.graph.nodes):
            if node.target in _DIVISIONS and len(node.args) == 2 and not node.kwargs and node.args[1] == 1:
                (x, _) = node.args
                if isinstance(x, fx.Node) and _is_float(x) and x.meta.get("dtype") == node.meta.get("dtype"):
                    node.replace_all_uses_with(x)
                    self.graph.erase_node(node)

    def norm_as_it_lies(self) -> None:
        """Group norms of three dimensions without a transposing copy."""
        for node in list(self.graph.find_nodes(op="call_module")):
            norm = self.network.get_submodule(str(node.target))
            if type(norm) is nn.GroupNorm and len(node.meta.get("shape", ())) == 3:
                with self.graph.inserting_before(node):
                    module = self.graph.create_node("get_attr", str(node.target))
                node.op, node.target, node.args = "call_function", group_norm_as_it_lies, (module, *node.args)

    def add_in_place(self) -> None:
        """Add to the output of a product where nothing else reads it."""
        for node in self.graph.nodes:
            if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
                continue
            for mine, other in (node.args, node.args[::-1]):
                if isinstance(other, fx.Node) and self._is_own_output(mine, node) and _is_float(other):
                    node.op, node.target, node.args = "call_method", "add_", (mine, other)
                    break

    def _is_own_output(self, value: Any, addition: fx.Node) -> bool:
        """Whether a value is a tensor that a product made, of the sum's shape, and read by the sum alone."""
        if not isinstance(value, fx.Node) or value.op != "call_module" or set(value.users) != {addition}:
            return False
        module = self.network.get_submodule(str(value.target))
        return isinstance(module, Multiplier) and value.meta.get("shape") == addition.meta.get("shape")

    def _rows(self, path: str, encoder: Encoder, timestep: Any) -> fx.Node | None:
        """The node that looks up rows of the site's table; None without timesteps."""
        steps = encoder.grid.timesteps
        if steps is None:
            return None
        for known, others, rows in self.lookups:
            if known is timestep and torch.equal(steps, others):
                return rows
        with self.graph.inserting_after(timestep):
            rows = self.graph.call_module(f"{path}.lookups.0", (timestep,))
        rows.meta["fqn"] = path
        self.lookups.append((timestep, steps, rows))
        return rows

    def _silu(self, node: fx.Node) -> fx.Node | None:
        """The input of a SiLU that a node is."""
        if node.op == "call_module":
            module = self.network.get_submodule(str(node.target))
            return _first_input(node) if isinstance(module, nn.SiLU) and not module.inplace else None
        in_place = node.kwargs.get("inplace", False) or len(node.args) > 1
        return _first_input(node) if node.target in _SILUS and not in_place else None

    def _movable(self, node: fx.Node, encoder: Encoder) -> fx.Node | None:
        """The input of a node that only moves values, where quantizing before it gives the same codes."""
        target, source = node.target, _first_input(node)
        if source is None:
            return None
        if node.op == "call_module":
            module = self.network.get_submodule(str(target))
            still = isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training)
            return source if still else None
        if target in _UPSAMPLINGS:
            return source if node.kwargs.get("mode", "nearest") == "nearest" and len(node.args) <= 3 else None
        if target in _PADDINGS:
            plain = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value", 0)
            # The code of the border is one number only where all samples have one grid.
            return source if plain and len(node.args) == 2 and encoder.grid.timesteps is None else None
        if target in _TRANSPOSES and encoder.reciprocal is None and len(node.args) == 3:
            rank = len(source.meta["shape"]) if "shape" in source.meta else 0
            dims = [dim for dim in node.args[1:] if isinstance(dim, int)]
            # The batch must stay the first dimension, and channels have no scales of their own.
            return source if rank and len(dims) == 2 and all(dim % rank for dim in dims) else None
        return None

    def _shared(self, source: fx.Node, silu: bool, encoder: Encoder, rows: fx.Node | None) -> _Shared | None:
        for known in self.shared:
            same = known.source is source and known.silu is silu and known.rows is rows
            if same and known.encoder.grid.same_as(encoder.grid) and _same_smoothing(known.encoder, encoder):
                return known
        return None

    def _move(self, codes: fx.Node, move: fx.Node, encoder: Encoder) -> fx.Node:
        """The node that moves codes as ``move`` moves values; sizes that are asked of ``move`` are asked of it."""
        if move.op == "call_module":
            return codes
        if (codes, move) not in self.moved:
            source = _first_input(move)
            with self.graph.inserting_after(_later(move, codes)):
                made = self.graph.node_copy(move, lambda node: codes if node is source else node)
            if move.target in _PADDINGS:
                made.kwargs = {**move.kwargs, "value": encoder.zero()}
            self._describe(made, move)
            self.moved[codes, move] = made
            for user in list(move.users):
                if user.target is getattr and user.args[1] == "shape":
                    user.replace_input_with(move, made)
        return self.moved[codes, move]

    def _describe(self, node: fx.Node, like: fx.Node) -> None:
        """Give a node of codes the shape of the node whose values they stand for."""
        node.meta = {key: value for key, value in like.meta.items() if key in ("fqn", "shape")}
        node.meta["dtype"] = torch.uint8

    def _drop(self, node: fx.Node) -> None:
        """Erase what nothing reads any more, of the kinds that this rewriting passes by."""
        while not node.users and node.op != "placeholder":
            source = _first_input(node)
            passed = node.op == "call_module" or node.target in _SILUS | _UPSAMPLINGS | _PADDINGS | _TRANSPOSES
            if source is None or not passed or node.meta.get("impure"):
                return
            self.graph.erase_node(node)
            node = source


def _encoder(layer: IntegerLayer) -> Encoder:
    (encoder,) = layer.encoders
    assert isinstance(encoder, Encoder)
    return encoder


def _same_smoothing(one: Encoder, other: Encoder) -> bool:
    if one.reciprocal is None or other.reciprocal is None:
        return one.reciprocal is other.reciprocal
    return one.channels == other.channels and torch.equal(one.reciprocal, other.reciprocal)


def _first_input(node: fx.Node) -> fx.Node | None:
    given = node.args[0] if node.args else node.kwargs.get("input")
    return given if isinstance(given, fx.Node) else None


def _later(one: fx.Node, other: fx.Node | None) -> fx.Node:
    """The one of two nodes that stands later in the graph."""
    return other if other is not None and one < other else one


def _is_float(node: fx.Node) -> bool:
    return "shape" in node.meta and "float" in str(node.meta.get("dtype", ""))


def _name(move: fx.Node) -> str:
    return move.target if isinstance(move.target, str) else move.target.__name__
