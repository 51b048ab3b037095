"""Energy-aware bits inside layers: channels trade bits as long as the estimated output error falls.

The derivation stands in docs/explanation/energy-allocation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quantlab.allocation.knapsack import Knapsack, solve_exact_sum, solve_greedy
from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy, Resource, SiteData
from quantlab.contracts.config import Strict
from quantlab.contracts.quant import Observer
from quantlab.contracts.scores import OutputFamily, Score, ScoreRequest
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site


class Moments(StrEnum):
    """What is known of the inputs."""

    DIAGONAL = "diagonal"
    """E[x^2] of each input: errors of different weights do not meet."""
    GRAM = "gram"
    """E[x x^T]: the exact error of a linear operation; n^2 numbers for n weights a channel."""


class Scope(StrEnum):
    """Among which channels bits are traded."""

    LAYER = "layer"
    """Within each layer, whose mean bits stay."""
    NETWORK = "network"
    """Among all layers, whose common mean bits stay; channels pay by their number of weights."""


class EnergyConfig(Strict):
    """Options of the ``energy`` policy."""

    observer: Observer = Field(default=Observer.MSE, description="scales of the weights in the estimate")
    spread: int = Field(default=1, ge=1, le=7, description="bits that a channel may move up or down, within 1 to 8")
    moments: Moments = Field(default=Moments.DIAGONAL, description="of the inputs")
    scope: Scope = Field(default=Scope.LAYER, description="among which channels bits are traded")
    sensitivity: Score | None = Field(
        default=None, description="what a layer's error is scaled to in scope network; none: errors count as they are"
    )
    output: OutputFamily = Field(default=OutputFamily.GAUSSIAN, description="of the sensitivity")
    rows: int = Field(default=64, ge=1, description="of the calibration batch, for the sensitivity")
    probes: int = Field(default=4, ge=1, description="of the sensitivity")


class EnergyPolicy(BitPolicy):
    """Channels trade bits at equal mean as long as the output error, weighted by the inputs' energy, falls."""

    name = "energy"
    mixes = True
    Config = EnergyConfig

    def __init__(self, config: EnergyConfig) -> None:
        self.config = config

    def between_sites(self) -> bool:
        """Only in the scope of the network."""
        return self.config.scope is Scope.NETWORK

    def scores(self, budget: Budget) -> Sequence[ScoreRequest]:
        """The sensitivity of layers at the budget's bits, where it is needed."""
        request = self._sensitivity(budget)
        return [request] if request else []

    def allocate(self, problem: AllocationProblem) -> BitMap:
        """Bits of every channel; equal estimates leave a site as it was given."""
        sites = [site for site in problem.sites if site.weight_shape]
        match self.config.scope:
            case Scope.LAYER:
                bits = {site.name: self._within(problem, site) for site in sites}
            case Scope.NETWORK:
                bits = self._among(problem, sites)
        return BitMap({**problem.given.weight_bits, **bits}, problem.given.activation_bits)

    def _within(self, problem: AllocationProblem, site: Site) -> Tensor:
        """The split of a layer's bits with the least estimated error, by dynamic programming."""
        given = problem.given.weight_bits[site.name]
        widths = self._widths([given])
        errors = self._errors(problem.data, site, widths)
        nominal = widths.index(int(given.double().mean().round()))
        total = int((given.long() - widths[0]).sum())
        return (torch.from_numpy(solve_exact_sum(errors, total, nominal)) + widths[0]).to(torch.int8)

    def _among(self, problem: AllocationProblem, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """Bits of all layers by marginal analysis; the given ones if that finds nothing better."""
        given = [problem.given.weight_bits[site.name] for site in sites]
        widths = self._widths(given)
        parts = [self._scaled_errors(problem, site, widths) for site in sites]
        costs = np.concatenate([_channel_costs(problem, site, widths) for site in sites], 1)
        start = torch.cat(given).long().numpy() - widths[0]
        problem_of_channels = Knapsack(np.concatenate(parts), costs, np.zeros(len(costs)))
        open_limits = [problem.limits[resource] for resource in _limited(problem)]
        limits = np.array([problem_of_channels.spent(start)[0], *open_limits])
        knapsack = Knapsack(problem_of_channels.scores, costs, limits)
        chosen = solve_greedy(knapsack)
        if chosen is None or (knapsack.fits(start) and knapsack.loss(start) <= knapsack.loss(chosen)):
            chosen = start
        split = np.split(chosen + widths[0], np.cumsum([site.out_channels for site in sites])[:-1])
        return {site.name: torch.from_numpy(bits).to(torch.int8) for site, bits in zip(sites, split, strict=True)}

    def _widths(self, given: Sequence[Tensor]) -> list[int]:
        low, high = min(int(bits.min()) for bits in given), max(int(bits.max()) for bits in given)
        return list(range(max(1, low - self.config.spread), min(8, high + self.config.spread) + 1))

    def _errors(self, data: SiteData, site: Site, widths: Sequence[int]) -> np.ndarray:
        return channel_errors(data, site, widths, self.config.observer, self.config.moments).numpy()

    def _scaled_errors(self, problem: AllocationProblem, site: Site, widths: Sequence[int]) -> np.ndarray:
        """Errors of a layer's channels, scaled so that at the budget's bits they sum to the layer's sensitivity."""
        errors = self._errors(problem.data, site, widths)
        request = self._sensitivity(problem.budget)
        if request is None:
            return errors
        score = float(problem.data.score(request)[site.name][0])
        sensitivity = 10 ** (score / 10) if request.score.in_decibels else score
        at_budget = self._errors(problem.data, site, [problem.budget.weight_bits]).sum()
        # A layer without error at the budget's bits is dead or exact, and so is its sensitivity.
        return errors * (sensitivity / at_budget) if at_budget > 0 else errors

    def _sensitivity(self, budget: Budget) -> ScoreRequest | None:
        config = self.config
        if config.sensitivity is None or config.scope is Scope.LAYER:
            return None
        widths = (budget.weight_bits,)
        return ScoreRequest(config.sensitivity, widths, output=config.output, rows=config.rows, probes=config.probes)


def channel_errors(data: SiteData, site: Site, widths: Sequence[int], observer: Observer, moments: Moments) -> Tensor:
    """Estimated squared error of every output channel at every width, float64 [out, len(widths)].

    e_o(b) = sum_i E[x_i^2] d_i^2 with d = w_o - Q_b(w_o), or d^T E[x x^T] d: the mean over samples and positions of
    what quantizing the channel's weights adds to its output, squared.
    """
    weight = data.weight(site.name)
    moment = data.input_second_moment(site.name) if moments is Moments.DIAGONAL else data.input_gram(site.name)
    columns = []
    for width in widths:
        bits = torch.full((len(weight),), width, dtype=torch.int8)
        change = (weight - data.quantized_weight(site.name, bits, observer)).double().flatten(1)
        change = change.reshape(site.groups, len(weight) // site.groups, -1)
        match moments:
            case Moments.DIAGONAL:
                error = torch.einsum("goi,gi->go", change.square(), moment)
            case Moments.GRAM:
                error = torch.einsum("goi,gij,goj->go", change, moment, change)
        columns.append(error.flatten())
    return torch.stack(columns, 1).cpu()


def _limited(problem: AllocationProblem) -> list[Resource]:
    """The limits that bits of weights count for."""
    return [resource for resource in (Resource.SIZE, Resource.BIT_OPERATIONS) if resource in problem.limits]


def _channel_costs(problem: AllocationProblem, site: Site, widths: Sequence[int]) -> np.ndarray:
    """What a channel's bits cost [resources, out, widths]: bits of weights, then bytes and operations if limited."""
    per_channel = site.weight_count // site.out_channels
    input_bits = problem.given.activation_bits[site.name, site.slots[0].name]
    units = {
        Resource.SIZE: per_channel / 8,
        Resource.BIT_OPERATIONS: site.macs / site.out_channels * input_bits,
    }
    rows = [float(per_channel), *(units[resource] for resource in _limited(problem))]
    costs = np.array(rows)[:, None, None] * np.array(widths, dtype=np.float64)
    return np.broadcast_to(costs, (len(rows), site.out_channels, len(widths)))
