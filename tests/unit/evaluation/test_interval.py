"""Intervals against closed forms and independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from quantlab.evaluation.interval import centred_percentiles, interval, paired_difference, seeds_for_gap

VALUES = [2.0, 3.5, 4.0, 1.5]


def test_the_interval_of_a_mean_is_students() -> None:
    found = interval(VALUES)
    low, high = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.mean == 2.75 and found.known


def test_two_values_have_the_closed_form() -> None:
    """t with one degree of freedom is Cauchy: its 97.5 % point is tan(0.475 pi), times half the distance."""
    assert interval([1.0, 2.0]).half_width == pytest.approx(math.tan(0.475 * math.pi) * 0.5)


def test_a_single_value_has_no_interval() -> None:
    found = interval([3.0])
    assert found.mean == 3 and not found.known and not found.excludes_zero


def test_a_paired_difference_is_over_the_shared_seeds_alone() -> None:
    values, baseline = {1: 5.0, 2: 7.0, 3: 6.0, 9: 100.0}, {1: 4.0, 2: 5.5, 3: 5.5, 8: -100.0}
    found = paired_difference(values, baseline)
    low, high = stats.ttest_rel([5, 7, 6], [4, 5.5, 5.5]).confidence_interval(0.95)
    assert found is not None and found.count == 3
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, low, high))
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_what_a_seed_does_to_both_cancels() -> None:
    seeds = {seed: float(value) for seed, value in enumerate(np.random.default_rng(0).normal(0, 10, 8))}
    found = paired_difference({seed: value + 0.5 for seed, value in seeds.items()}, seeds)
    assert found is not None and found.mean == pytest.approx(0.5) and found.half_width < 1e-9 and found.excludes_zero


@given(st.floats(-50, 50), st.floats(-3, 3))
def test_centred_percentiles_do_not_know_where_the_resamples_lie(value: float, shift: float) -> None:
    resampled = np.random.default_rng(1).gamma(2.0, 1.0, 200)
    low, high = centred_percentiles(value, list(resampled + shift))
    order = np.sort(resampled) - resampled.mean()
    place = 0.025 * 199
    expected = order[int(place)] + (place - int(place)) * (order[int(place) + 1] - order[int(place)])
    assert low == pytest.approx(value + expected, abs=1e-9) and low < value < high


def test_seeds_for_a_gap() -> None:
    assert seeds_for_gap(0.1, 0.1) == 16  # 15.7
    assert seeds_for_gap(0.05, -0.1) == 4  # 3.925
    assert seeds_for_gap(0.2, 0.1) == 63  # 62.8
    assert seeds_for_gap(0.001, 0.1) == 2 and seeds_for_gap(0.1, 0.0) is None


def test_its_constant_is_that_of_80_percent_power_at_5_percent() -> None:
    assert 2 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 == pytest.approx(15.7, abs=0.01)
