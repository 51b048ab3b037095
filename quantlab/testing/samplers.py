"""The contract of a calibration sampler."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab.contracts.check import check_pairs
from quantlab.contracts.sampler import CalibrationPairs, CalibrationSampler, SamplerProblem
from quantlab.testing.contract import Subject, examples, rng, same

SETTINGS = examples(20)
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 6)).flatmap(
    lambda size: st.tuples(st.just(size[0]), st.just(size[1]), st.integers(1, size[0] * size[1]))
)


def chooses_recorded_pairs(subject: Subject) -> None:
    """Recorded pairs within the budget, sorted and each once."""

    @SETTINGS
    @given(SIZES, st.integers(0, 2**16))
    def holds(size: tuple[int, int, int], seed: int) -> None:
        sampler, problem = subject.build(), problem_of(*size, seed)
        pairs = _choose(subject, sampler, problem)
        contract = "the pairs were recorded, are sorted, and are no more than the budget"
        subject.call(lambda: check_pairs(sampler, problem, pairs), contract)

    holds()


def repeats_itself(subject: Subject) -> None:
    """The same generator gives the same pairs, also beside another sampler of the class."""
    first, second = subject.build(), subject.build()
    expected = _choose(subject, first, problem_of(5, 4, 9, 1))
    _choose(subject, second, problem_of(3, 4, 7, 2))
    for sampler in (first, second, subject.build()):
        again = _choose(subject, sampler, problem_of(5, 4, 9, 1))
        holds = same(again.steps, expected.steps) and same(again.samples, expected.samples)
        contract = "the same problem and generator give the same pairs: it keeps nothing between calls"
        subject.require(holds, contract, again.steps)


def problem_of(steps: int, trajectories: int, budget: int, seed: int) -> SamplerProblem:
    """A problem whose features are noise."""
    timesteps = torch.linspace(951, 1, steps).round().long()

    def features(path: str, count: int) -> Tensor:
        return torch.randn(steps, count, 6, generator=rng(seed + len(path)))

    return SamplerProblem(timesteps, trajectories, budget, features, rng(seed))


def _choose(subject: Subject, sampler: CalibrationSampler, problem: SamplerProblem) -> CalibrationPairs:
    return subject.pure(lambda: sampler.choose(problem), "`choose(problem)` returns pairs")


CHECKS = (chooses_recorded_pairs, repeats_itself)
