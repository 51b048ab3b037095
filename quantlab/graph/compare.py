"""Compare a graph with the model it was captured from, and find where they part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantlab.graph.captured import ROOT, CapturedGraph
from quantlab.graph.inputs import flatten
from quantlab.graph.modules import first_tensor, is_leaf
from quantlab.graph.run import runner


def largest_difference(model: nn.Module, captured: CapturedGraph, example: Mapping[str, Any]) -> float:
    """The largest |graph - model| over all output values for these inputs; infinite when shapes differ."""
    with torch.no_grad():
        expected = model(**copied(example), **captured.static)
        actual = runner(model, captured)(copied(example))
    wanted, got = _tensors(expected), _tensors(actual)
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        return math.inf
    return max((_difference(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)


def copied(example: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as new tensors, which a forward may change in place."""
    return pytree.tree_map_only(Tensor, torch.clone, dict(example))


def _tensors(output: Any) -> list[Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    difference = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(difference.masked_fill(same, 0.0).nan_to_num(nan=math.inf).max())


def module_outputs(model: nn.Module, captured: CapturedGraph, example: Mapping[str, Any]) -> dict[str, Tensor]:
    """What every module of the model itself returned last, by path; the first tensor of several."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                seen[path] = tensor.clone()

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(keep(path)).remove)
        model(**copied(example), **captured.static)
    return seen


class _Comparison(fx.Interpreter):
    """Runs a graph node by node; ``blamed`` is the module where it first fails or differs from the model."""

    def __init__(self, model: nn.Module, captured: CapturedGraph, expected: Mapping[str, Tensor]) -> None:
        super().__init__(model, graph=captured.graph)
        self.captured, self.expected = captured, expected
        self.paths: dict[str, list[str]] = {}
        self.confirmed: set[str] = set()
        self.blamed: str | None = None
        for path, name in captured.module_outputs.items():
            self.paths.setdefault(name, []).append(path)

    def compare(self, example: Mapping[str, Any]) -> None:
        """Run for these inputs."""
        values = flatten(copied(example)) | dict(self.captured.constants) | {ROOT: self.module}
        placeholders = self.captured.graph.find_nodes(op="placeholder")
        try:
            with torch.no_grad():
                self.run(*(values[str(node.target)] for node in placeholders), enable_io_processing=False)
        except Exception:  # whatever a wrong graph raises, the failing node is what counts
            if self.blamed is None:
                raise

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and look at what it gives."""
        try:
            result = super().run_node(n)
        except Exception:
            self.blamed = self.blamed if self.blamed is not None else self._owner(n)
            raise
        for path in self.paths.get(n.name, ()):
            expected = self.expected.get(path)
            if expected is None or not isinstance(result, Tensor):
                continue
            if expected.shape == result.shape and _difference(expected, result) == 0.0:
                self.confirmed.add(path)
            elif self.blamed is None:
                self.blamed = self._owner(n)
        return result

    def _owner(self, node: fx.Node) -> str:
        """The module whose own operations came to this node."""
        path = str(node.meta.get("fqn", ""))
        return path.rpartition(".")[0] if path and is_leaf(self.captured_module(path)) else path

    def captured_module(self, path: str) -> nn.Module:
        """A module of the model."""
        assert isinstance(self.module, nn.Module)
        return self.module.get_submodule(path)


def blamed_module(model: nn.Module, captured: CapturedGraph, example: Mapping[str, Any]) -> str:
    """Path of the module where the graph first differs from the model; empty when it cannot be told."""
    comparison = _Comparison(model, captured, module_outputs(model, captured, example))
    comparison.compare(example)
    return comparison.blamed or ""


def confirmed_outputs(model: nn.Module, captured: CapturedGraph, example: Mapping[str, Any]) -> dict[str, str]:
    """Those ``module_outputs`` of a graph whose values are what the modules return."""
    comparison = _Comparison(model, captured, module_outputs(model, captured, example))
    comparison.compare(example)
    return {path: name for path, name in captured.module_outputs.items() if path in comparison.confirmed}
