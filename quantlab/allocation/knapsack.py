"""Choosing one option of every item within limits: exactly, by an integer program, or by gain per cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from quantlab.errors import QuantlabError

Array = np.ndarray
RELATIVE_GAP = 1e-6
"""How far, relative to the loss above the unconstrained one, the integer program may stop from the optimum."""
_OBJECTIVE_UNIT = 1e3
_TIGHTENINGS = 8


@dataclass(frozen=True)
class Knapsack:
    """Items with options.

    Attributes:
        scores: what an option loses, float64 [items, options], finite.
        costs: what it costs of each resource, integers as float64 [resources, items, options].
        limits: what all items may cost together [resources].
    """

    scores: Array
    costs: Array
    limits: Array

    def spent(self, chosen: Array) -> Array:
        """What a choice [items] costs [resources]."""
        return self.costs[:, np.arange(len(chosen)), chosen].sum(1)

    def loss(self, chosen: Array) -> float:
        """The summed score of a choice [items]."""
        return float(self.scores[np.arange(len(chosen)), chosen].sum())

    def fits(self, chosen: Array) -> bool:
        """Whether a choice keeps all limits."""
        return bool((self.spent(chosen) <= self.limits).all())


def solve_milp(problem: Knapsack) -> Array | None:
    """The choice [items] with the least summed score, or None when none fits.

    A multiple-choice knapsack as an integer program (HiGHS): x[i, j] in {0, 1}, one option an item. Items that are
    alike in scores and costs are interchangeable; the earlier ones get the options of lower score.
    """
    items, options = problem.scores.shape
    greedy = solve_greedy(problem)
    if greedy is None:
        return None
    # Score units are arbitrary, and the solver's tolerances are absolute: what marginal analysis loses is the unit. An
    # option that alone loses more than all of that is in no optimum.
    above = problem.scores - problem.scores.min(1, keepdims=True)
    known = above[np.arange(items), greedy].sum()
    objective = np.minimum(above / known if known > 0 else above, 2.0) * _OBJECTIVE_UNIT
    possible = above <= known
    rows = np.repeat(np.arange(items), options)
    one_each = csr_array((np.ones(items * options), (rows, np.arange(items * options))))
    units = np.array([math.gcd(*map(int, np.unique(costs))) or 1 for costs in problem.costs])
    costs = problem.costs.reshape(len(units), -1) / units[:, None]
    limits = np.floor(problem.limits / units)
    for _ in range(_TIGHTENINGS):
        result = milp(
            objective.ravel(),
            integrality=np.ones(items * options),
            bounds=Bounds(0, possible.ravel().astype(np.float64)),  # pyright: ignore[reportArgumentType]
            constraints=LinearConstraint(
                vstack([one_each, csr_array(costs)]).tocsr(),
                np.concatenate([np.ones(items), np.full(len(units), -np.inf)]),  # pyright: ignore[reportArgumentType]
                np.concatenate([np.ones(items), limits]),  # pyright: ignore[reportArgumentType]
            ),
            options={"mip_rel_gap": RELATIVE_GAP},
        )
        if result.status == 2:
            return None
        if result.x is None:
            raise QuantlabError("the integer program was not solved", where="milp", got=result.message)
        chosen = result.x.reshape(items, options).argmax(1)
        if problem.fits(chosen):
            return _alike_in_order(problem, chosen)
        limits = limits - (problem.spent(chosen) > problem.limits)  # within the solver's tolerance, not ours
    raise QuantlabError("the integer program keeps exceeding a limit", where="milp", got=problem.spent(chosen))


def _alike_in_order(problem: Knapsack, chosen: Array) -> Array:
    """Among items that are alike, the earlier ones get the options of lower score."""
    alike: dict[bytes, list[int]] = {}
    for item in range(len(chosen)):
        key = problem.scores[item].tobytes() + problem.costs[:, item].tobytes()
        alike.setdefault(key, []).append(item)
    ordered = chosen.copy()
    for members in alike.values():
        ordered[members] = sorted(chosen[members], key=lambda option: (problem.scores[members[0], option], -option))
    return ordered


def lower_hull(positions: Array, values: Array) -> Array:
    """The largest convex function below ``values`` at ``positions``: both [items, options], positions rising."""
    hull = values.copy()
    options = values.shape[1]
    for left in range(options):
        for right in range(left + 2, options):
            share = (positions[:, left + 1 : right] - positions[:, [left]]) / (
                positions[:, [right]] - positions[:, [left]]
            )
            between = values[:, [left]] + share * (values[:, [right]] - values[:, [left]])
            hull[:, left + 1 : right] = np.minimum(hull[:, left + 1 : right], between)
    return hull


def solve_greedy(problem: Knapsack) -> Array | None:
    """A choice [items] by marginal analysis, or None when not even the first options fit.

    Start from every item's first option, and buy the step to the next one in the order of score saved per cost, as long
    as it fits. Scores are replaced by their lower convex hulls over the cost, so that the steps of an item save less
    and less and come in order. With one resource the result is optimal whenever the limit is used up at a vertex of a
    hull, and otherwise loses at most what the one step that did not fit would have saved. The cost of a step is the
    largest share of what the first options leave of any resource; equal ratios are taken in the order of the items.
    """
    items, options = problem.scores.shape
    chosen = np.zeros(items, dtype=np.int64)
    left = problem.limits - problem.spent(chosen)
    if (left < 0).any():
        return None
    if options == 1:
        return chosen
    steps = np.diff(problem.costs, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.nan_to_num(steps / left[:, None, None], nan=0.0, posinf=np.inf).max(0)
    shares = np.maximum(shares, np.finfo(np.float64).tiny)
    positions = np.concatenate([np.zeros((items, 1)), np.cumsum(np.minimum(shares, 1e300), 1)], 1)
    saved = -np.diff(lower_hull(positions, problem.scores), axis=1)
    # Rounding must not put a step of an item before the one it builds on.
    ratios = np.minimum.accumulate(saved / shares, axis=1)
    order = np.argsort(-ratios.ravel(), kind="stable")
    bought = steps.reshape(len(left), -1)[:, order]
    affordable = (np.cumsum(bought, 1) <= left[:, None]).all(0)
    whole = len(order) if affordable.all() else int(np.argmin(affordable))
    item, step = np.divmod(order, options - 1)
    np.add.at(chosen, item[:whole], 1)
    left = left - bought[:, :whole].sum(1)
    for index in range(whole, len(order)):
        if chosen[item[index]] == step[index] and (bought[:, index] <= left).all():
            chosen[item[index]] += 1
            left = left - bought[:, index]
    return chosen


def solve_exact_sum(scores: Array, total: int, preferred: int) -> Array:
    """The choice [items] with the least summed score whose option numbers sum to ``total``, by dynamic programming.

    Args:
        scores: [items, options]; option j costs j.
        total: what all must cost, at most items * (options - 1).
        preferred: the option that wins among equals.
    """
    items, options = scores.shape
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    order = sorted(range(options), key=lambda option: (option != preferred, option))
    taken = np.zeros((items, total + 1), dtype=np.int64)
    for item in range(items):
        candidates = np.full((options, total + 1), np.inf)
        for row, option in enumerate(order):
            if option <= total:
                candidates[row, option:] = best[: total + 1 - option] + scores[item, option]
        row = candidates.argmin(0)
        taken[item] = np.asarray(order)[row]
        best = candidates[row, np.arange(total + 1)]
    chosen, left = np.zeros(items, dtype=np.int64), total
    for item in reversed(range(items)):
        chosen[item] = taken[item, left]
        left -= chosen[item]
    return chosen
