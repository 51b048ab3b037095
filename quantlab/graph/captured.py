"""What a capture yields."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from torch import Tensor, fx

ROOT = "root_module"
"""The placeholder that receives the model itself, in graphs that call a whole module as it is."""


class CaptureMethod(StrEnum):
    """How a graph came about, in the order in which they are tried."""

    VALUE_TRACE = "value trace"
    LEAF_MODULES = "value trace, some modules as they are"
    EXPORT = "torch.export"
    WHOLE_MODULE = "the whole module as it is"


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that the captured forward branched on.

    Attributes:
        condition: the condition over the inputs' shapes, "sample.shape[2] % 2 == 0".
        holds: what it was in the example; the graph is valid only for inputs where it is the same.
        where: path of the module that asked.
        node: the graph node that checks it at run time.
    """

    condition: str
    holds: bool
    where: str
    node: str


@dataclass(frozen=True)
class OutputType:
    """The class that the forward wraps its tensors in, such as diffusers' ``UNet2DOutput``.

    Attributes:
        target: "module:qualname" of the class.
        fields: its keywords, in the order of the graph's output.
    """

    target: str
    fields: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """One forward as an fx graph whose module targets are paths in the model that was captured.

    The model stays the owner of every parameter; the graph runs with the model as its root. Nodes carry ``fqn`` (path
    of the innermost module), ``impure`` (kept although unused), ``shape`` and ``dtype`` of a tensor, ``call_index`` of
    a module call and ``inner_calls`` of a module that is called as it is.

    Attributes:
        graph: inputs are placeholders; nested dicts are flattened to ``name__key``.
        input_names: the placeholders that a caller fills.
        static: non-tensor keywords of the captured call.
        guards: conditions on sizes, checked whenever the graph runs.
        notes: what a reader of the graph must know: specialised values, reasons for a fallback.
        method: how the graph came about.
        module_outputs: module path -> name of the node that is its (last) output.
        constants: tensors that are neither inputs nor owned by the model, by placeholder.
        output_type: how to wrap the output, or None when the graph's output is the model's.
        taps: module paths whose outputs the graph returns besides.
    """

    graph: fx.Graph
    input_names: tuple[str, ...]
    static: Mapping[str, object] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    notes: tuple[str, ...] = ()
    method: CaptureMethod = CaptureMethod.VALUE_TRACE
    module_outputs: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    output_type: OutputType | None = None
    taps: tuple[str, ...] = ()

    def copy(self) -> CapturedGraph:
        """The same with a graph of its own, which a pass may change; node names are kept."""
        return replace(self, graph=copy.deepcopy(self.graph))

    def node(self, name: str) -> fx.Node:
        """The node of that name; KeyError when there is none."""
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)


def describe_output(output: Any) -> OutputType | None:
    """The class of a wrapped output with the fields that are there; None for plain tensors."""
    if not hasattr(output, "to_tuple"):
        return None
    fields = tuple(name for name in output if output[name] is not None)
    return OutputType(f"{type(output).__module__}:{type(output).__qualname__}", fields)
