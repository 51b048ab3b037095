"""The solvers against enumeration of every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.allocation.knapsack import Knapsack, lower_hull, solve_exact_sum, solve_greedy, solve_milp


def drawn(seed: int, items: int, options: int, resources: int = 1, *, convex: bool = False) -> Knapsack:
    """Scores that mostly fall and integer costs that rise with the option."""
    rng = np.random.default_rng(seed)
    scores = rng.exponential(size=(items, options))
    scores = np.sort(scores, 1)[:, ::-1].copy()
    if convex:
        scores = np.sort(scores, 1).cumsum(1)[:, ::-1].copy()
    costs = rng.integers(1, 9, size=(resources, items, 1)) * np.arange(1, options + 1)
    share = rng.uniform(0.1, 1.0, size=resources)
    low, high = costs[:, :, 0].sum(1), costs[:, :, -1].sum(1)
    return Knapsack(scores, costs.astype(np.float64), np.floor(low + share * (high - low)))


def every_choice(problem: Knapsack) -> list[np.ndarray]:
    items, options = problem.scores.shape
    return [np.array(c) for c in itertools.product(range(options), repeat=items)]


def best_loss(problem: Knapsack) -> float:
    return min(problem.loss(choice) for choice in every_choice(problem) if problem.fits(choice))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_milp_is_optimal_within_all_limits(seed: int, items: int, options: int, resources: int) -> None:
    problem = drawn(seed, items, options, resources)
    chosen = solve_milp(problem)
    assert chosen is not None and problem.fits(chosen)
    assert problem.loss(chosen) == pytest.approx(best_loss(problem), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_greedy_loses_at_most_one_step(seed: int, items: int, options: int, convex: bool) -> None:
    problem = drawn(seed, items, options, convex=convex)
    chosen = solve_greedy(problem)
    assert chosen is not None and problem.fits(chosen)
    steps = -np.diff(problem.scores, axis=1)
    bound = problem.scores.max() - problem.scores.min() if not convex else steps.max(initial=0.0)
    assert best_loss(problem) - 1e-9 <= problem.loss(chosen) <= best_loss(problem) + bound + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4))
def test_greedy_is_optimal_for_equal_costs_and_convex_scores(seed: int, items: int, options: int) -> None:
    problem = drawn(seed, items, options, convex=True)
    alike = np.broadcast_to(np.arange(options, dtype=np.float64), (1, items, options))
    problem = Knapsack(problem.scores, alike, np.array([seed % (items * (options - 1) + 1)], dtype=np.float64))
    chosen = solve_greedy(problem)
    assert chosen is not None
    assert problem.loss(chosen) == pytest.approx(best_loss(problem))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.data())
def test_exact_sum_is_optimal_for_any_scores(seed: int, items: int, options: int, data) -> None:
    scores = np.random.default_rng(seed).normal(size=(items, options))
    total = data.draw(st.integers(0, items * (options - 1)))
    chosen = solve_exact_sum(scores, total, 0)
    assert chosen.sum() == total
    choices = [c for c in itertools.product(range(options), repeat=items) if sum(c) == total]
    best = min(scores[np.arange(items), list(c)].sum() for c in choices)
    assert scores[np.arange(items), chosen].sum() == pytest.approx(best)


def test_nothing_fits() -> None:
    problem = Knapsack(np.zeros((2, 2)), np.ones((1, 2, 2)) * [[2, 3]], np.array([3.0]))
    assert solve_milp(problem) is None and solve_greedy(problem) is None


def test_items_that_are_alike_are_served_in_their_order() -> None:
    scores, costs = np.tile([[4.0, 1.0]], (4, 1)), np.tile([[[1.0, 2.0]]], (1, 4, 1))
    problem = Knapsack(scores, costs, np.array([6.0]))
    for chosen in (solve_milp(problem), solve_greedy(problem)):
        assert chosen is not None and chosen.tolist() == [1, 1, 0, 0]


def test_equals_prefer_the_given_option() -> None:
    assert solve_exact_sum(np.zeros((5, 3)), 5, 1).tolist() == [1] * 5


def test_hull_is_convex_and_touches() -> None:
    values = np.array([[5.0, 4.9, 1.0, 0.9]])
    hull = lower_hull(np.array([[0.0, 1.0, 2.0, 3.0]]), values)
    assert hull.tolist() == [[5.0, 3.0, 1.0, 0.9]]


def test_five_hundred_layers_of_six_widths() -> None:
    """The solver's choice is never worse than marginal analysis, whose loss has a lower bound close by."""
    problem = drawn(0, 500, 6, 2)
    chosen, greedy = solve_milp(problem), solve_greedy(problem)
    assert chosen is not None and greedy is not None and problem.fits(chosen)
    assert problem.loss(chosen) <= problem.loss(greedy)
