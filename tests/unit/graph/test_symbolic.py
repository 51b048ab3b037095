"""Numbers with nodes: the graph's arithmetic is Python's, at other values too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantlab.errors import CaptureError
from quantlab.graph.capture import capture
from quantlab.graph.guards import require
from quantlab.graph.run import runner
from quantlab.graph.symbolic import SymbolicFloat, SymbolicInt, plain


class Sizes(nn.Module):
    """Adds a number computed from its input's sizes."""

    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x):
        return x.new_zeros(()) + self.compute(x)


def evaluate(compute, captured_at, used_at):
    """The number in a graph captured with one shape and run with another."""
    net = Sizes(compute).eval()
    captured = capture(net, {"x": torch.zeros(captured_at)}, {})
    return runner(net, captured)({"x": torch.zeros(used_at)}).item(), captured


EXPRESSIONS = {
    "add": lambda x: x.shape[0] + 2 + x.shape[1],
    "sub": lambda x: 7 - x.shape[0],
    "mul": lambda x: 3 * x.shape[0] * x.shape[1],
    "floordiv": lambda x: x.shape[1] // 2 + 100 // x.shape[0],
    "truediv": lambda x: x.shape[1] / x.shape[0],
    "mod": lambda x: 17 % x.shape[1] + x.shape[0] % 3,
    "pow": lambda x: x.shape[0] ** 2 + 2 ** x.shape[0] + x.shape[1] ** 0.5,
    "neg": lambda x: -x.shape[0],
    "abs": lambda x: abs(2 - x.shape[0]),
    "ceil": lambda x: math.ceil(x.shape[1] / 2),
    "floor": lambda x: math.floor(x.shape[1] / 2),
    "round": lambda x: round(x.shape[1] * 0.7),
    "size": lambda x: x.size(1) * x.size()[0] + x.numel() + x.size(dim=-1),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@given(used_at=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_arithmetic_holds_at_other_sizes(name, used_at):
    got, captured = evaluate(EXPRESSIONS[name], (3, 5), used_at)
    assert captured.guards == ()
    assert got == pytest.approx(EXPRESSIONS[name](torch.zeros(used_at)), rel=1e-6)


CONVERSIONS = {
    "int": lambda x: int(x.shape[1] / 1),
    "float": lambda x: float(x.shape[1]),
    "sqrt": lambda x: math.sqrt(x.shape[1]),
    "len": lambda x: len(x.T),
    "truth": lambda x: 1 if x.shape[1] % 2 else 0,
    "compare": lambda x: 1 if x.shape[1] > 4 else 0,
    "equal": lambda x: 1 if x.shape[1] == x.shape[0] else 0,
    "max": lambda x: max(x.shape[0], x.shape[1]),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_plain_value_taken_from_a_size_is_guarded(name):
    got, captured = evaluate(CONVERSIONS[name], (3, 5), (3, 5))
    assert got == pytest.approx(CONVERSIONS[name](torch.zeros(3, 5)))
    assert len(captured.guards) == 1
    with pytest.raises(CaptureError, match="captured for inputs where"):
        runner(Sizes(CONVERSIONS[name]), captured)({"x": torch.zeros(2, 2)})


def test_one_condition_is_guarded_once():
    _, captured = evaluate(lambda x: sum(x.shape[0] > 2 for _ in range(5)), (3, 5), (4, 5))
    assert [(guard.condition, guard.holds) for guard in captured.guards] == [("x.shape[0] > 2", True)]


def test_require_says_what_is_wrong():
    require(4, "gt", 2, True, "x.shape[0] > 2", "mid_block")
    with pytest.raises(CaptureError) as caught:
        require(1, "gt", 2, True, "x.shape[0] > 2", "mid_block")
    assert caught.value.where == "mid_block" and caught.value.got == "1 > 2"


def test_symbolic_numbers_hash_and_copy_like_plain_ones():
    three, half = SymbolicInt(3), SymbolicFloat(0.5)
    assert hash(three) == hash(3) and hash(half) == hash(0.5)
    assert type(copy.deepcopy(three)) is int and type(plain(three)) is int and type(plain(half)) is float
