"""What a loss weighs, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantlab.contracts.schedule import Curve, LossConfig, Schedule

SHARES = st.floats(0, 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(initial=0.0), [0, 0.25, 0.5, 1]),
        (Schedule(final=0.0), [1, 0.75, 0.5, 0]),
        (Schedule(initial=0.0, curve=Curve.COSINE), [0, 0.14644660940672624, 0.5, 1]),
        (Schedule(initial=0.5, final=2.0, start=0.25, end=0.5), [0.5, 0.5, 2, 2]),
        (Schedule(initial=0.0, start=0.5, end=0.5), [0, 0, 1, 1]),
    ],
)
def test_factors_in_closed_form(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule.factor(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)


@given(SHARES, st.floats(1e-3, 1e3))
def test_without_options_the_weight_is_itself_to_the_bit(progress: float, weight: float) -> None:
    assert LossConfig(weight=weight).weight_at(progress) == weight


@given(SHARES, SHARES, SHARES, st.floats(0, 10), st.floats(0, 10), st.sampled_from(Curve))
def test_the_factor_stays_between_its_ends(
    progress: float, one: float, other: float, initial: float, final: float, curve: Curve
) -> None:
    schedule = Schedule(initial=initial, final=final, start=min(one, other), end=max(one, other), curve=curve)
    factor = schedule.factor(progress)
    assert min(initial, final) - 1e-9 <= factor <= max(initial, final) + 1e-9
    if progress < schedule.start:
        assert factor == initial
    if progress >= schedule.end:
        assert factor == final


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(ValidationError, match="start must not lie after end"):
        Schedule(start=0.6, end=0.5)
