"""Numbers that know which graph node computes them.

A captured forward sees the sizes of its real tensors as ``SymbolicInt``. Arithmetic on it adds nodes, so that the graph
computes the sizes of whatever it is given; comparisons add guards. ``int``, ``float`` and ``bool`` give plain values,
which the graph then depends on: they add a guard too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Protocol

from torch import fx


class NumberRecorder(Protocol):
    """Who takes note of what happens to symbolic numbers."""

    def number(self, value: float, function: Callable[..., object], arguments: tuple[object, ...]) -> float:
        """Record a computation and return its value as a symbolic number."""
        ...

    def guard(self, left: SymbolicNumber, comparison: str, right: float, holds: bool) -> None:
        """Record that the forward depends on ``left comparison right``."""
        ...


class SymbolicInt(int):
    """An int with its node."""

    node: fx.Node
    recorder: NumberRecorder

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __deepcopy__(self, memo: object) -> int:
        return int.__int__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int.__int__(self),)


class SymbolicFloat(float):
    """A float with its node."""

    node: fx.Node
    recorder: NumberRecorder

    def __hash__(self) -> int:
        return float.__hash__(self)


SymbolicNumber = SymbolicInt | SymbolicFloat


def plain(value: float) -> int | float:
    """The number itself, without a guard."""
    if isinstance(value, SymbolicInt):
        return int.__int__(value)
    if isinstance(value, SymbolicFloat):
        return float.__float__(value)
    return value


def make_symbolic(value: float, node: fx.Node, recorder: NumberRecorder) -> SymbolicNumber:
    """A number computed by ``node``."""
    number = SymbolicInt(value) if isinstance(value, int) else SymbolicFloat(value)
    number.node, number.recorder = node, recorder
    return number


def _arithmetic(function: Callable[..., float], reflected: bool) -> Callable[..., object]:
    def method(self: SymbolicNumber, other: object) -> object:
        if not isinstance(other, int | float):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        return self.recorder.number(function(plain(left), plain(right)), function, (left, right))

    return method


def _unary(function: Callable[..., float]) -> Callable[..., object]:
    def method(self: SymbolicNumber, *arguments: int) -> object:
        return self.recorder.number(function(plain(self), *arguments), function, (self, *arguments))

    return method


def _comparison(function: Callable[..., bool]) -> Callable[..., object]:
    def method(self: SymbolicNumber, other: object) -> object:
        if not isinstance(other, int | float):
            return NotImplemented
        holds = function(plain(self), plain(other))
        self.recorder.guard(self, function.__name__, other, holds)
        return holds

    return method


def _conversion(kind: Callable[[float], float]) -> Callable[..., float]:
    def method(self: SymbolicNumber) -> float:
        self.recorder.guard(self, "eq", plain(self), True)
        return kind(plain(self))

    return method


def _truth(self: SymbolicNumber) -> bool:
    holds = plain(self) != 0
    self.recorder.guard(self, "ne", 0, holds)
    return holds


_ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "truediv": operator.truediv,
    "pow": operator.pow,
}
_UNARY = {
    "neg": operator.neg,
    "abs": operator.abs,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
}
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)

for _class in (SymbolicInt, SymbolicFloat):
    for _name, _function in _ARITHMETIC.items():
        setattr(_class, f"__{_name}__", _arithmetic(_function, reflected=False))
        setattr(_class, f"__r{_name}__", _arithmetic(_function, reflected=True))
    for _name, _function in _UNARY.items():
        setattr(_class, f"__{_name}__", _unary(_function))
    for _compare in _COMPARISONS:
        setattr(_class, f"__{_compare.__name__}__", _comparison(_compare))
    setattr(_class, "__int__", _conversion(int))  # noqa: B010  the classes are completed here, one loop for both
    setattr(_class, "__float__", _conversion(float))  # noqa: B010
    setattr(_class, "__bool__", _truth)  # noqa: B010
