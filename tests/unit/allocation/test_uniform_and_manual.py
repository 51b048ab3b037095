from __future__ import annotations

from typing import cast

import pytest
import torch

from quantlab.allocation.manual import ManualConfig, ManualPolicy, ManualRule
from quantlab.allocation.uniform import UniformConfig, UniformPolicy
from quantlab.contracts.allocation import AllocationProblem, BitMap, SiteData
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.errors import RecipeError

FIRST = Site("down.conv", SiteKind.CONV, (3, 2, 3, 3), 1, (Slot("input", (1, 2, 8, 8)),))
SECOND = Site("up.linear", SiteKind.LINEAR, (4, 5), 1, (Slot("input", (1, 5)),))
SCORES = Site("up.scores", SiteKind.MATMUL, None, 1, (Slot("query", (1, 5)), Slot("key", (1, 5))))
GIVEN = BitMap({"kept": torch.full((2,), 8, dtype=torch.int8)}, {("kept", "input"): 8})


def problem(budget: Budget, given: BitMap = GIVEN) -> AllocationProblem:
    return AllocationProblem((FIRST, SECOND, SCORES), cast(SiteData, None), budget, given, torch.Generator())


def uniform(weight_bits: int = 2) -> BitMap:
    return UniformPolicy(UniformConfig()).allocate(problem(Budget(weight_bits=weight_bits, activation_bits=4)))


def test_uniform_gives_the_budget_to_every_channel_and_slot_and_keeps_the_rest():
    bit_map = uniform()
    assert {name: bits.tolist() for name, bits in bit_map.weight_bits.items()} == {
        "kept": [8, 8],
        "down.conv": [2, 2, 2],
        "up.linear": [2, 2, 2, 2],
    }
    assert all(bits.dtype == torch.int8 for bits in bit_map.weight_bits.values())
    assert bit_map.activation_bits == {
        ("kept", "input"): 8,
        ("down.conv", "input"): 4,
        ("up.linear", "input"): 4,
        ("up.scores", "query"): 4,
        ("up.scores", "key"): 4,
    }
    assert list(GIVEN.weight_bits) == ["kept"], "what is given is not changed"


def manual(budget: Budget, *rules: ManualRule) -> BitMap:
    return ManualPolicy(ManualConfig(rules=rules)).allocate(problem(budget, uniform()))


def test_manual_changes_what_its_rules_say():
    bit_map = manual(
        Budget(weight_bits=3, activation_bits=4),
        ManualRule(match="up.*", weight_bits=5, activation_bits=6),
        ManualRule(match="up.scores", activation_bits=8),
    )
    assert bit_map.weight_bits["up.linear"].tolist() == [5] * 4
    assert bit_map.weight_bits["down.conv"].tolist() == [2] * 3
    assert bit_map.weight_bits["kept"].tolist() == [8, 8]
    assert bit_map.activation_bits[("up.linear", "input")] == 6
    assert bit_map.activation_bits[("up.scores", "key")] == 8
    assert bit_map.activation_bits[("down.conv", "input")] == 4


def test_manual_within_the_mean_bits_of_the_budget():
    """54 weights at 2 and 20 at 5 bits are 208 / 74 = 2.81 bits on average."""
    rule = ManualRule(match="up.linear", weight_bits=5)
    with pytest.raises(RecipeError, match=r"2\.811 mean weight bits"):
        manual(Budget(weight_bits=2, activation_bits=4), rule)
    assert manual(Budget(weight_bits=2, activation_bits=4, extra_bit_fraction=0.82), rule)


def test_manual_tells_a_pattern_without_a_site():
    with pytest.raises(RecipeError, match=r'manual\.rules\.0\.match "up\.linaer" matches no site'):
        manual(Budget(weight_bits=2, activation_bits=4), ManualRule(match="up.linaer", weight_bits=2))
    assert manual(Budget(weight_bits=2, activation_bits=4), ManualRule(match="x", weight_bits=8, optional=True))
