"""The state of one value trace: which node computes which tensor."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantlab.errors import CaptureError
from quantlab.graph.captured import Guard
from quantlab.graph.guards import condition_text, require
from quantlab.graph.symbolic import SymbolicFloat, SymbolicInt, SymbolicNumber, make_symbolic, plain

_LITERALS = (bool, int, float, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)


class UnrecordableError(CaptureError):
    """An argument of a torch call cannot stand in a graph."""


class Tracer:
    """Builds a graph while the real forward runs on real (or fake) tensors.

    Tensors are known by identity: every tensor that a recorded call returns is kept alive, with its node, until the
    capture ends.

    Args:
        root: the model.
        leaves: paths of modules to call as they are.
        fake: the tensors hold no values, so that they cannot be kept as constants.
    """

    def __init__(self, root: nn.Module, leaves: frozenset[str], fake: bool) -> None:
        self.root, self.leaves, self.fake = root, leaves, fake
        self.graph = fx.Graph()
        self.recording = True
        self.depth = 0
        self.stack: list[str] = []
        self.guards: list[Guard] = []
        self.notes: dict[str, None] = {}
        self.constants: dict[str, Tensor] = {}
        self.module_outputs: dict[str, str] = {}
        self.call_counts: dict[str, int] = {}
        self.opaque: list[fx.Node] = []
        self._nodes: dict[int, fx.Node] = {}
        self._kept: list[object] = []
        self._attributes: dict[str, fx.Node] = {}
        self._numbers: dict[tuple[str, str], fx.Node] = {}
        self._computed: dict[int, weakref.ref[Tensor]] = {}
        self._autocast = torch._C._is_any_autocast_enabled()
        self.module_paths = {id(module): path for path, module in _last_to_first(root.named_modules())}
        owned = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        self._owned = {id(tensor): path for path, tensor in _last_to_first(owned)}

    @property
    def where(self) -> str:
        """Path of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def note(self, text: str, everywhere: bool = False) -> None:
        """Say something about the place that is running, or about the whole forward, once."""
        self.notes[text if everywhere else f"{self.where or 'forward'}: {text}"] = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    @contextmanager
    def inside_call(self) -> Iterator[None]:
        """A torch function is running: what it does inside belongs to its one node."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    # Nodes of values

    def add_input(self, name: str, tensor: Tensor) -> None:
        """A placeholder for an input."""
        self._remember(tensor, self._describe(self.graph.placeholder(name), tensor))

    def is_traced(self, value: object) -> bool:
        """Whether a node computes this very object."""
        return id(value) in self._nodes

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that computes this tensor, if any."""
        return self._nodes.get(id(tensor))

    def saw_computed(self, tensor: Tensor) -> None:
        """A tensor came out of an operation inside a recorded call; it may leave that call unnoticed."""
        self._computed[id(tensor)] = weakref.ref(tensor)

    def argument(self, value: Any) -> Any:
        """The value as an argument of a node."""
        if isinstance(value, SymbolicInt | SymbolicFloat):
            return value.node
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._owned_or_constant(value)
        if isinstance(value, torch.device):
            return self._nodes.get(id(value), value)
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.argument, value))
        if isinstance(value, tuple):
            return tuple(map(self.argument, value))
        if isinstance(value, list):
            return [self.argument(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self.argument(entry) for key, entry in value.items()}
        if value is None or value is Ellipsis or isinstance(value, _LITERALS):
            return value
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return value.item()
        raise UnrecordableError(
            f"an argument of type {type(value).__name__} cannot stand in a graph", where=self.where or "forward"
        )

    def _owned_or_constant(self, tensor: Tensor) -> fx.Node:
        path = self._owned.get(id(tensor))
        if path is None:
            return self.add_constant(tensor)
        if path not in self._attributes:
            self._attributes[path] = self._describe(self._tagged(self.graph.create_node("get_attr", path)), tensor)
        return self._attributes[path]

    def add_constant(self, tensor: Tensor) -> fx.Node:
        """A placeholder for a tensor that is neither computed nor owned by the model.

        Raises:
            CaptureError: the tensor was computed in a way that nothing recorded, or it holds no values.
        """
        computed = self._computed.get(id(tensor))
        if computed is not None and computed() is tensor:
            raise CaptureError("a tensor was computed by something that cannot be recorded", where=self.where)
        shape = list(torch.Tensor.size(tensor))
        if self.fake:
            raise CaptureError(
                f"a plain tensor attribute of shape {shape} would become a constant without values",
                where=self.where,
                next_step="register it as a buffer, or capture with real tensors",
            )
        name = f"constant_{len(self.constants)}"
        with self.graph.inserting_before(None):  # placeholders stand before everything else
            node = self._tagged(self.graph.placeholder(name))
        self.constants[name] = tensor.detach()
        self.note(f"a plain tensor of shape {shape} became a constant of the graph")
        self._remember(tensor, self._describe(node, tensor))
        return node

    # Recording

    def emit(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        """Add a node for a call with these values."""
        if torch._C._is_any_autocast_enabled() != self._autocast:
            raise CaptureError("autocast is switched inside the forward, which a graph does not keep", where=self.where)
        arguments = tuple(map(self.argument, args))
        keywords = {key: self.argument(value) for key, value in (kwargs or {}).items()}
        return self._tagged(self.graph.create_node(op, target, arguments, keywords))

    def register(self, output: Any, node: fx.Node) -> Any:
        """Tie what a call returned to its node; returns what the forward shall see instead.

        A call that returns a tensor known before (``x.to(x.dtype)``, dropout in evaluation) gets an alias: otherwise
        later uses of ``x`` would count as uses of that call.
        """
        if isinstance(output, Tensor):
            known = id(output) in self._nodes or id(output) in self._owned
            if known and not node.meta.get("impure"):
                with self.inside_call():
                    output = torch.ops.aten.alias.default(output)
            self._remember(output, self._describe(node, output))
            return output
        if isinstance(output, tuple | list):
            parts = [self._register_part(part, node, index) for index, part in enumerate(output)]
            same = all(new is old for new, old in zip(parts, output, strict=True))
            return output if same or hasattr(output, "_fields") else type(output)(parts)
        if isinstance(output, dict):
            for key in output:
                output[key] = self._register_part(output[key], node, key)
        return output

    def _register_part(self, part: Any, node: fx.Node, key: int | str) -> Any:
        if not has_tensor(part):
            return part
        return self.register(part, self._tagged(self.graph.call_function(operator.getitem, (node, key))))

    def register_device(self, device: torch.device, node: fx.Node) -> torch.device:
        """Tie a device object to the tensor it was read from, so that the graph follows the model's device."""
        self._remember(device, self._scalar(node))
        return device

    def size(self, tensor: Tensor, index: int) -> SymbolicInt:
        """One size of a traced tensor."""
        shape_node = self._number_node(self._nodes[id(tensor)], getattr, "shape")
        node = self._number_node(shape_node, operator.getitem, index)
        return cast(SymbolicInt, make_symbolic(torch.Tensor.size(tensor)[index], node, self))

    def _number_node(self, node: fx.Node, function: Callable[..., Any], key: str | int) -> fx.Node:
        """``function(node, key)``, made once."""
        known = self._numbers.get((node.name, str(key)))
        if known is None:
            known = self._scalar(self._tagged(self.graph.call_function(function, (node, key))))
            self._numbers[node.name, str(key)] = known
        return known

    def number(self, value: float, function: Callable[..., object], arguments: tuple[object, ...]) -> float:
        """Record arithmetic with sizes."""
        if not self.recording or isinstance(value, bool):
            return value
        return make_symbolic(value, self._scalar(self.emit("call_function", function, arguments)), self)

    def guard(self, left: SymbolicNumber, comparison: str, right: float, holds: bool) -> None:
        """Record that the forward depends on a comparison of sizes, with a node that checks it."""
        if not self.recording:
            return
        condition = condition_text(left.node, comparison, self.argument(right))
        if any(guard.condition == condition for guard in self.guards):
            return
        node = self.emit("call_function", require, (left, comparison, right, holds, condition, self.where))
        self._scalar(node).meta["impure"] = True
        self.guards.append(Guard(condition, holds, self.where, node.name))

    def _remember(self, value: object, node: fx.Node) -> None:
        self._nodes[id(value)] = node
        self._kept.append(value)

    def _tagged(self, node: fx.Node) -> fx.Node:
        node.meta["fqn"] = self.where
        return node

    @staticmethod
    def _scalar(node: fx.Node) -> fx.Node:
        node.meta["scalar"] = True
        return node

    @staticmethod
    def _describe(node: fx.Node, tensor: Tensor) -> fx.Node:
        node.meta["shape"], node.meta["dtype"] = tuple(torch.Tensor.size(tensor)), tensor.dtype
        return node


def has_tensor(value: object) -> bool:
    """Whether a tensor is in these nested values."""
    return pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), value)


def without_symbols(value: Any) -> Any:
    """The same nested arguments with plain numbers, as torch's functions take them."""
    if isinstance(value, SymbolicInt | SymbolicFloat):
        return plain(value)
    if isinstance(value, torch.Size):
        return torch.Size([int(plain(size)) for size in value])
    if isinstance(value, slice):
        return slice(*(without_symbols(part) for part in (value.start, value.stop, value.step)))
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(without_symbols, value))
    if isinstance(value, list):
        return [without_symbols(entry) for entry in value]
    if type(value) is dict:
        return {key: without_symbols(entry) for key, entry in value.items()}
    return value


def _last_to_first(named: Any) -> list[tuple[str, Any]]:
    """Reversed, so that of several paths to one object the first wins in a dict."""
    return list(named)[::-1]
