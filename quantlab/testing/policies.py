"""The contract of a bit policy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab.allocation.plan import mean_weight_bits
from quantlab.contracts.allocation import AllocationProblem, BitMap, BitPolicy
from quantlab.contracts.check import check_bit_map
from quantlab.contracts.sections import Budget
from quantlab.errors import RecipeError
from quantlab.testing.contract import Subject, examples
from quantlab.testing.toy import Measured, measured

SETTINGS = examples(4)
BUDGETS = st.builds(Budget, weight_bits=st.integers(1, 8), activation_bits=st.integers(2, 8))


def returns_bits_for_every_channel(subject: Subject) -> None:
    """Int8 bits from 1 to 8 for every channel of the sites, whatever the budget."""

    @SETTINGS
    @given(BUDGETS)
    def holds(budget: Budget) -> None:
        for _, policy, problem in _problems(subject, budget):
            bit_map = _allocate(subject, policy, problem)
            if bit_map is not None:
                _as_the_engine_wants(subject, policy, problem, bit_map)

    holds()


def keeps_the_budget(subject: Subject) -> None:
    """The mean bits stay within the budget and the extra bits that it grants."""

    @SETTINGS
    @given(BUDGETS, st.sampled_from([0.0, 0.1, 0.25]))
    def holds(budget: Budget, extra: float) -> None:
        budget = budget.model_copy(update={"extra_bit_fraction": extra})
        for found, policy, problem in _problems(subject, budget):
            bit_map = _allocate(subject, policy, problem)
            if bit_map is None:
                continue
            sites = found.plan.budgeted
            most = sum(
                (budget.weight_bits + math.ceil(extra * site.out_channels) / site.out_channels) * site.weight_count
                for site in sites
            ) / sum(site.weight_count for site in sites)
            mean = mean_weight_bits(bit_map, sites)
            contract = f"the mean bits of the weights are at most {most:.3f} for a budget of {budget.weight_bits}"
            subject.require(mean <= most + 1e-6, contract, f"{mean:.3f}")

    holds()


def leaves_other_sites_alone(subject: Subject) -> None:
    """Sites that it is not asked about keep the bits that they have."""
    found = measured(subject.build(), Budget(weight_bits=3, activation_bits=6))
    half = [site.name for site in found.plan.budgeted][::2]
    problem, policy = found.problem(0, half), subject.build()
    before = {name: bits.clone() for name, bits in problem.given.weight_bits.items()}
    bit_map = _allocate(subject, policy, problem)
    unchanged = all(torch.equal(problem.given.weight_bits[name], bits) for name, bits in before.items())
    subject.require(unchanged, "it changes a copy of the bits that are given, never the given tensors", "other bits")
    if bit_map is not None:
        _as_the_engine_wants(subject, policy, problem, bit_map)


def repeats_itself(subject: Subject) -> None:
    """The same generator gives the same bits, also with another policy of the class at work in between."""
    found = measured(subject.build(), Budget(weight_bits=3, activation_bits=6))
    first, second = subject.build(), subject.build()
    one = _allocate(subject, first, found.problem(5))
    _allocate(subject, second, found.problem(6))
    for policy, which in ((first, "asked again"), (second, "another object of the class"), (subject.build(), "new")):
        again = _allocate(subject, policy, found.problem(5))
        contract = "the same problem and generator give the same bits: it keeps nothing between calls"
        subject.require(_equal(one, again), contract, f"other bits, {which}")


def sees_what_it_needs(subject: Subject) -> None:
    """A policy that weighs sites against one another keeps all limits; others work on one site at a time."""
    budget = Budget(weight_bits=3, activation_bits=6)
    policy = subject.build()
    found = measured(policy, budget)
    if not policy.between_sites():
        for site in found.plan.budgeted[:2]:
            problem = found.problem(0, [site.name])
            bit_map = _allocate(subject, policy, problem)
            if bit_map is not None:
                _as_the_engine_wants(subject, policy, problem, bit_map)
        return
    bit_map = _allocate(subject, policy, found.problem(0, limited=True))
    if bit_map is None:
        return
    cost = sum(
        site.macs
        * float(bit_map.weight_bits[site.name].double().mean())
        * bit_map.activation_bits[site.name, slot.name]
        for site in found.plan.budgeted
        for slot in site.slots[:1]
    )
    most = found.problem(0, limited=True).limits
    subject.require(cost <= sum(most.values()) + 1e-6, "it keeps `problem.limits`", f"{cost:,.0f} of {most}")


def tells_whether_it_mixes(subject: Subject) -> None:
    """`mixes` says whether channels of one site may differ; `lowest_bits` is not above what it gives."""
    budget = Budget(weight_bits=3, activation_bits=6)
    for found, policy, problem in _problems(subject, budget):
        bit_map = _allocate(subject, policy, problem)
        if bit_map is None:
            continue
        given = [bit_map.weight_bits[site.name] for site in found.plan.budgeted]
        mixed = any(bool((bits != bits[0]).any()) for bits in given)
        contract = "a policy that gives channels of one site different bits says so in `mixes`, as sizes depend on it"
        subject.require(not mixed or subject.plugin.mixes, contract, "mixes = False, and mixed channels")
        if not mixed:
            least, lowest = min(int(bits.min()) for bits in given), policy.lowest_bits(budget)
            contract = "`lowest_bits` are the lowest that it may give a whole site"
            subject.require(lowest[0] <= least, contract, f"lowest_bits {lowest}, and a site with {least}")


def _problems(subject: Subject, budget: Budget) -> Iterator[tuple[Measured, BitPolicy, AllocationProblem]]:
    policy = subject.build()
    found = measured(policy, budget)
    yield found, policy, found.problem(1)


def _allocate(subject: Subject, policy: BitPolicy, problem: AllocationProblem) -> BitMap | None:
    """The bits, or None for a budget that the policy refuses with a RecipeError."""

    def allocate() -> BitMap | None:
        try:
            found = policy.allocate(problem)
        except RecipeError:
            return None
        subject.require(isinstance(found, BitMap), "a policy must return a quantlab.BitMap", found)
        return found

    return subject.pure(allocate, "`allocate(problem)` returns bits, or refuses with a RecipeError")


def _as_the_engine_wants(subject: Subject, policy: BitPolicy, problem: AllocationProblem, bit_map: BitMap) -> None:
    subject.call(lambda: check_bit_map(policy, problem, bit_map), "what `allocate` returns fits the sites")


def _equal(a: BitMap | None, b: BitMap | None) -> bool:
    if a is None or b is None:
        return a is b
    alike = all(torch.equal(bits, b.weight_bits[name]) for name, bits in a.weight_bits.items())
    return alike and dict(a.activation_bits) == dict(b.activation_bits)


CHECKS = (
    returns_bits_for_every_channel,
    keeps_the_budget,
    leaves_other_sites_alone,
    repeats_itself,
    sees_what_it_needs,
    tells_whether_it_mixes,
)
