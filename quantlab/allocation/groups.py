"""Policies that decide by the site: the sites as items of a knapsack, and a choice as bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quantlab.allocation.budgets import site_spend
from quantlab.allocation.knapsack import Knapsack
from quantlab.contracts.allocation import AllocationProblem, BitMap, Resource
from quantlab.contracts.config import Strict
from quantlab.contracts.scores import Operand, OutputFamily, Score, ScoreRequest
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site
from quantlab.errors import RecipeError

Bits = Annotated[int, Field(ge=1, le=8)]


class WidthsConfig(Strict):
    """Which bits a site may get."""

    offsets: tuple[int, ...] = Field(
        default=(-1, 0, 1), description="candidate bits of weights, relative to budget.weight_bits; 0 is one of them"
    )
    widths: tuple[Bits, ...] | None = Field(
        default=None, min_length=1, description="candidate bits of weights themselves; they replace the offsets"
    )

    def candidates(self, budget: Budget) -> tuple[int, ...]:
        """Rising candidate bits of weights, within 1 to 8."""
        if self.widths:
            return tuple(sorted(set(self.widths)))
        near = {budget.weight_bits + offset for offset in (0, *self.offsets)}
        return tuple(sorted(width for width in near if 1 <= width <= 8))


class ScoreConfig(WidthsConfig):
    """What sites are weighed by."""

    score: Score = Field(default=Score.OUTPUT_MSE, description="what a width costs a site; summed over sites")
    output: OutputFamily = Field(
        default=OutputFamily.GAUSSIAN, description="what the network's output is, for divergences and derivatives"
    )
    rows: int = Field(default=64, ge=1, description="rows of the calibration batch on which the network runs")
    probes: int = Field(default=4, ge=1, description="random vectors of a Hessian's trace")

    def request(self, widths: Sequence[int], operand: Operand = Operand.WEIGHT) -> ScoreRequest:
        """The score at these widths."""
        return ScoreRequest(self.score, tuple(widths), operand, self.output, self.rows, self.probes)


@dataclass(frozen=True)
class Options:
    """The bits that every item may get, as pairs of weight and input.

    Attributes:
        weights: rising candidate bits of weights.
        inputs: rising candidate bits of inputs.
    """

    weights: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All of them, the lowest first."""
        return list(itertools.product(self.weights, self.inputs))


def groups_of(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites with a weight, those that must share a format together, by the name of the first in the alphabet."""
    groups: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda site: site.name):
        if site.weight_shape:
            groups.setdefault(site.shares or f"{site.name} alone", []).append(site)
    return list(groups.values())


def knapsack_of(
    problem: AllocationProblem,
    groups: Sequence[Sequence[Site]],
    options: Options,
    scores: Sequence[tuple[Operand, dict[str, Tensor]]],
) -> Knapsack:
    """Groups as items and pairs of bits as options.

    Args:
        problem: its budget and limits.
        groups: of sites with equal bits.
        options: the candidates.
        scores: by operand, site -> [widths of that operand]; they add up.
    """
    position = {Operand.WEIGHT: options.weights.index, Operand.INPUT: options.inputs.index}

    def score(site: Site, pair: tuple[int, int]) -> float:
        bits = dict(zip(Operand, pair, strict=True))
        return sum(float(values[site.name][position[operand](bits[operand])]) for operand, values in scores)

    weights = sum(site.weight_count for group in groups for site in group)
    limits = {Resource.WEIGHT_BITS: float(problem.budget.weight_bits * weights), **problem.limits}
    pairs = options.pairs
    spends = [[[site_spend(site, *pair) for site in group] for pair in pairs] for group in groups]
    return Knapsack(
        np.array([[float(sum(score(site, pair) for site in group)) for pair in pairs] for group in groups]),
        np.array([[[float(sum(s[r] for s in spend)) for spend in row] for row in spends] for r in limits]),
        np.array(list(limits.values())),
    )


def bit_map_of(
    problem: AllocationProblem, groups: Sequence[Sequence[Site]], pairs: Sequence[tuple[int, int]]
) -> BitMap:
    """The given bits with those of every group changed."""
    weights, inputs = dict(problem.given.weight_bits), dict(problem.given.activation_bits)
    for group, (weight_bits, input_bits) in zip(groups, pairs, strict=True):
        for site in group:
            weights[site.name] = torch.full((site.out_channels,), weight_bits, dtype=torch.int8)
            inputs |= {(site.name, slot.name): input_bits for slot in site.slots}
    return BitMap(weights, inputs)


def infeasible(policy: str, problem: Knapsack, resources: Sequence[str]) -> RecipeError:
    """The error for a knapsack in which not even the lowest bits fit."""
    least = problem.costs.min(2).sum(1)
    over = [
        f"budget.{name}: {need:,.0f} needed, {limit:,.0f} left"
        for name, need, limit in zip(resources, least, problem.limits, strict=True)
        if need > limit
    ]
    return RecipeError(
        "no allocation fits the budget", where=f'policy "{policy}"', got="; ".join(over), next_step="raise the budget"
    )
