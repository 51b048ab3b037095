"""Conditions on sizes: how they read, and the check that a graph makes whenever it runs."""

from __future__ import annotations

import operator

from torch import Tensor, fx

from quantlab.errors import CaptureError

_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.truediv: "/",
    operator.pow: "**",
}


def require(left: float, comparison: str, right: float, holds: bool, condition: str, where: str) -> None:
    """Stop unless ``left comparison right`` is what it was in the captured example.

    Args:
        left: a size, or a number computed from sizes.
        comparison: a function of ``operator`` by name, "eq".
        right: what it was compared with.
        holds: what the comparison gave in the example.
        condition: how it reads, "sample.shape[2] % 2 == 0".
        where: path of the module that branched on it.

    Raises:
        CaptureError: the comparison now gives something else, so that the graph is not the model's.
    """
    if bool(getattr(operator, comparison)(left, right)) == holds:  # bool: of a size that torch.export leaves free too
        return
    raise CaptureError(
        f"the graph was captured for inputs where {condition} is {holds}; it is {not holds} now",
        where=where or "the model's forward",
        got=f"{left} {_SIGNS[comparison]} {right}",
        next_step="capture the model again with inputs of this size",
    )


def contiguous_when(tensor: Tensor, left: float, comparison: str, right: float, holds: bool) -> Tensor:
    """The tensor, contiguous if ``left comparison right`` is ``holds``: a branch that changes only the layout."""
    return tensor.contiguous() if bool(getattr(operator, comparison)(left, right)) == holds else tensor


def condition_text(left: object, comparison: str, right: object) -> str:
    """The condition as a person would write it."""
    return f"{describe(left)} {_SIGNS[comparison]} {describe(right)}"


def describe(value: object) -> str:
    """A size, or a computation with sizes, over the names of the tensors it comes from."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "placeholder":
        return str(value.target)
    if not value.meta.get("scalar"):
        return value.name
    arguments = [describe(argument) for argument in value.args]
    if value.op == "call_method":
        return f"{arguments[0]}.{value.target}()"
    if value.op == "call_function" and value.target is getattr:
        return f"{arguments[0]}.{value.args[1]}"
    if value.op == "call_function" and value.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    if value.op == "call_function" and value.target in _INFIX:
        return f"({arguments[0]} {_INFIX[value.target]} {arguments[1]})"  # type: ignore[index]
    return value.name
