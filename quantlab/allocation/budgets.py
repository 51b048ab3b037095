"""Budgets that hold together: what bits cost, what is left for them, and whether a plan can fit at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantlab.allocation.cost import input_elements, planned_cost
from quantlab.allocation.plan import Plan
from quantlab.contracts.allocation import BitPolicy, Resource
from quantlab.contracts.sections import Budget, InputsFrom
from quantlab.contracts.site import Site
from quantlab.errors import QuantlabError, RecipeError
from quantlab.quant.accounting import (
    FREE_ZERO_POINT_BYTES,
    SCALE_BYTES,
    Accounting,
    FloatModel,
    index_bytes,
    packed_bytes,
)

UNITS: Mapping[Resource, float] = {
    Resource.SIZE: 1 << 20,
    Resource.BIT_OPERATIONS: 1e9,
    Resource.ACTIVATION_MEMORY: 1 << 20,
}
"""Bytes in a MiB, bit operations in the budget's unit."""
ROUNDED_ZERO_POINT_BYTES = 2
"""What a rounded zero point is taken to need while bits are allocated; a row far from 0 needs more than a byte."""


def limits_of(budget: Budget) -> dict[Resource, float]:
    """What the budget allows in bytes and bit operations, of the resources that it limits besides the mean bits."""
    given = {resource: getattr(budget, resource.value) for resource in UNITS}
    return {resource: value * UNITS[resource] for resource, value in given.items() if value is not None}


def spent(cost: Accounting) -> dict[Resource, float]:
    """What a network costs, in bytes and bit operations."""
    return {
        Resource.SIZE: cost.total_bytes,
        Resource.BIT_OPERATIONS: cost.bit_operations,
        Resource.ACTIVATION_MEMORY: cost.activation_memory_bytes,
    }


def site_spend(site: Site, weight_bits: int, activation_bits: int) -> dict[Resource, int]:
    """What the bits of one site cost when all its channels have the same; the rest of its cost does not depend on them.

    Args:
        site: with a weight.
        weight_bits: of every channel.
        activation_bits: of every input.
    """
    bits = torch.full((site.out_channels,), weight_bits)
    return {
        Resource.WEIGHT_BITS: site.weight_count * weight_bits,
        Resource.SIZE: packed_bytes(bits, site.weight_count // site.out_channels),
        Resource.BIT_OPERATIONS: site.macs * weight_bits * activation_bits,
        Resource.ACTIVATION_MEMORY: -(-input_elements(site) * activation_bits // 8),
    }


def open_limits(
    plan: Plan,
    float_model: FloatModel,
    *,
    timesteps: int,
    smoothed: bool,
    rounded: bool,
    mixed: bool,
    scale_bytes: int = SCALE_BYTES,
) -> dict[Resource, float]:
    """What the bits of the sites under the budget may cost together: the budget less what does not depend on them.

    Args:
        plan: the intent for every site.
        float_model: of the float network.
        timesteps: entries of the activation tables.
        smoothed: the sites get smoothing scales.
        rounded: zero points are integers.
        mixed: sites will store a width for every channel.
        scale_bytes: of one scale as it will be stored.
    """
    limits = limits_of(plan.budget)
    if not limits:
        return {}
    zero_point_bytes = ROUNDED_ZERO_POINT_BYTES if rounded else FREE_ZERO_POINT_BYTES
    total = spent(planned_cost(plan, float_model, timesteps, smoothed, zero_point_bytes, scale_bytes))
    for site in plan.budgeted:
        if not site.weight_shape:
            continue
        for resource, cost in site_spend(site, plan.budget.weight_bits, plan.budget.activation_bits).items():
            if resource in total:
                total[resource] -= cost
        if mixed:
            total[Resource.SIZE] += index_bytes(site.out_channels) + 7  # each of eight widths ends on a whole byte
    return {resource: limit - total[resource] for resource, limit in limits.items()}


def require_feasible(
    plan: Plan,
    policies: Sequence[BitPolicy],
    inputs_from: InputsFrom,
    float_model: FloatModel,
    *,
    timesteps: int,
    smoothed: bool,
    where: str,
    scale_bytes: int = SCALE_BYTES,
) -> None:
    """Raise RecipeError, before anything is measured, for policies that cannot work or a budget nobody can keep.

    Every cost grows with the bits, so all budgets can hold together exactly if each holds at the lowest bits.

    Args:
        plan: the intent for every site.
        policies: in order.
        inputs_from: what a site sees.
        float_model: of the float network.
        timesteps: entries of the activation tables.
        smoothed: the sites get smoothing scales.
        where: the method, for the message.
        scale_bytes: of one scale as it will be stored.
    """
    _require_sight(policies, inputs_from, where)
    budget = plan.budget
    lowest = [policy.lowest_bits(budget) for policy in policies] or [(budget.weight_bits, budget.activation_bits)]
    weight_bits, activation_bits = min(weight for weight, _ in lowest), min(inputs for _, inputs in lowest)
    if weight_bits > budget.weight_bits:
        raise RecipeError(
            "the lowest candidate width is above the budget",
            where=f"{where}: budget.weight_bits",
            got=budget.weight_bits,
            allowed=f"at least {weight_bits}",
            next_step="give the policy lower widths, or raise budget.weight_bits",
        )
    lowest_plan = _with_bits(plan, weight_bits, activation_bits)
    least = spent(planned_cost(lowest_plan, float_model, timesteps, smoothed, scale_bytes=scale_bytes))
    broken = {resource: limit for resource, limit in limits_of(budget).items() if least[resource] > limit}
    if not broken:
        return
    binding = max(broken, key=lambda resource: least[resource] / broken[resource])
    others = [f"budget.{resource.value}" for resource in broken if resource is not binding]
    raise RecipeError(
        "no allocation fits the budget" + (f"; {', '.join(others)} cannot be kept either" if others else ""),
        where=f"{where}: budget.{binding.value}",
        got=f"{broken[binding] / UNITS[binding]:g}",
        allowed=f"at least {_rounded_up(least[binding] / UNITS[binding])}, which is everything at "
        f"{weight_bits}-bit weights and {activation_bits}-bit inputs",
        next_step="raise it, keep fewer layers at high bits or float, or let a policy choose lower widths",
    )


def require_within(budget: Budget, cost: Accounting) -> None:
    """Raise QuantlabError when a network costs more than the budget allows."""
    found = spent(cost)
    for resource, limit in limits_of(budget).items():
        if found[resource] > limit:
            raise QuantlabError(
                "the policies spent more than the budget",
                where=f"assign: budget.{resource.value}",
                got=f"{found[resource] / UNITS[resource]:.6g}",
                allowed=f"at most {limit / UNITS[resource]:g}",
                next_step="raise it, or choose a policy that allocates within it: milp, greedy",
            )


def _require_sight(policies: Sequence[BitPolicy], inputs_from: InputsFrom, where: str) -> None:
    blind = next((policy for policy in policies if policy.between_sites()), None)
    if blind is not None and inputs_from is InputsFrom.QUANTIZED_UPSTREAM:
        raise RecipeError(
            f'the policy "{blind.name}" weighs sites against one another, and is shown one at a time',
            where=f"{where}: inputs_from",
            got=inputs_from.value,
            allowed=InputsFrom.TEACHER.value,
            next_step='set inputs_from to "teacher", or drop the policy from `allocate`',
        )


def _with_bits(plan: Plan, weight_bits: int, activation_bits: int) -> Plan:
    """The plan with other bits for the sites under the budget."""

    def at(bits: int, planned: int) -> int:
        return min(bits, planned)

    sites = [
        replace(
            entry,
            weight_bits=at(weight_bits, entry.weight_bits),
            activation_bits=at(activation_bits, entry.activation_bits),
        )
        if entry.budgeted
        else entry
        for entry in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


def _rounded_up(value: float) -> str:
    """Four significant figures that are not below the value."""
    text = f"{value:.4g}"
    return text if float(text) >= value else f"{value * 1.001:.4g}"
