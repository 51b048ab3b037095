"""Bits of whole sites by an integer program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from quantlab.allocation.groups import Options, ScoreConfig, bit_map_of, groups_of, infeasible, knapsack_of
from quantlab.allocation.knapsack import solve_milp
from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy, Resource
from quantlab.contracts.scores import Operand, ScoreRequest
from quantlab.contracts.sections import Budget


class MilpConfig(ScoreConfig):
    """Options of the ``milp`` policy."""

    activation_widths: tuple[Annotated[int, Field(ge=2, le=8)], ...] | None = Field(
        default=None,
        min_length=1,
        description="candidate bits of inputs, allocated together with those of weights; none: the budget's",
    )


class MilpPolicy(BitPolicy):
    """Sites get the bits with the least summed score that keep every budget at once."""

    name = "milp"
    paper = "integer program of HAWQ-V3, ICML 2021, arXiv 2011.10680, equation 8"
    Config = MilpConfig

    def __init__(self, config: MilpConfig) -> None:
        self.config = config

    def between_sites(self) -> bool:
        """Sites compete for the budget."""
        return True

    def scores(self, budget: Budget) -> Sequence[ScoreRequest]:
        """Of weights, and of inputs where their bits are open too."""
        requests = [self.config.request(self.config.candidates(budget))]
        if self.config.activation_widths:
            requests.append(self.config.request(self._input_widths(budget), Operand.INPUT))
        return requests

    def lowest_bits(self, budget: Budget) -> tuple[int, int]:
        """The lowest candidates."""
        return min(self.config.candidates(budget)), min(self._input_widths(budget))

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """The best bits of every site, those that share a format alike; ties go to the site first by name.

        Raises:
            RecipeError: nothing fits.
        """
        budget = problem.budget
        groups = groups_of(problem.sites)
        options = Options(self.config.candidates(budget), self._input_widths(budget))
        scores = [(request.operand, dict(problem.data.score(request))) for request in self.scores(budget)]
        knapsack = knapsack_of(problem, groups, options, scores)
        chosen = solve_milp(knapsack)
        if chosen is None:
            raise infeasible(self.name, knapsack, [Resource.WEIGHT_BITS, *problem.limits])
        return bit_map_of(problem, groups, [options.pairs[option] for option in chosen])

    def _input_widths(self, budget: Budget) -> tuple[int, ...]:
        return tuple(sorted(set(self.config.activation_widths or (budget.activation_bits,))))
