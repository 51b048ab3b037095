"""Bits of whole sites, bought one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.allocation.groups import Options, ScoreConfig, bit_map_of, groups_of, infeasible, knapsack_of
from quantlab.allocation.knapsack import solve_greedy
from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy, Resource
from quantlab.contracts.scores import Operand, ScoreRequest
from quantlab.contracts.sections import Budget


class GreedyPolicy(BitPolicy):
    """Sites start at the lowest bits; the step that saves most score for its cost is bought first."""

    name = "greedy"
    Config = ScoreConfig

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config

    def between_sites(self) -> bool:
        """Sites compete for the budget."""
        return True

    def scores(self, budget: Budget) -> Sequence[ScoreRequest]:
        """One, of weights."""
        return [self.config.request(self.config.candidates(budget))]

    def lowest_bits(self, budget: Budget) -> tuple[int, int]:
        """The lowest candidate; inputs keep the budget's bits."""
        return min(self.config.candidates(budget)), budget.activation_bits

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Bits of every site, those that share a format alike; ties go to the site first by name.

        Raises:
            RecipeError: nothing fits.
        """
        groups = groups_of(problem.sites)
        options = Options(self.config.candidates(problem.budget), (problem.budget.activation_bits,))
        (request,) = self.scores(problem.budget)
        knapsack = knapsack_of(problem, groups, options, [(Operand.WEIGHT, dict(problem.data.score(request)))])
        chosen = solve_greedy(knapsack)
        if chosen is None:
            raise infeasible(self.name, knapsack, [Resource.WEIGHT_BITS, *problem.limits])
        return bit_map_of(problem, groups, [options.pairs[option] for option in chosen])
