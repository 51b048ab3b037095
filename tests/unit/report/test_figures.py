"""Drawings: positions, fronts, strips and what is in them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.report import figures, strips, svg
from quantlab.report.details import MethodDetails, ScaleTable, SiteErrors
from quantlab.report.figures import SizePoint, pareto_front


def details(**changes: object) -> MethodDetails:
    parts: dict = {"title": "m", "weight_bits": {}, "errors": {}, "scales": {}, "histories": {}}
    return MethodDetails(**{**parts, **changes})


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e4), st.booleans())
def test_an_axis_has_round_ticks_inside_it(low: float, factor: float, logarithmic: bool) -> None:
    axis = svg.Axis(low, low * factor, 10, 110, logarithmic)
    assert axis(low) == pytest.approx(10) and axis(low * factor) == pytest.approx(110)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 24 and all(9 <= axis(tick) <= 111 for tick in ticks)


def test_a_logarithmic_axis_makes_factors_lengths() -> None:
    axis = svg.Axis(1, 100, 0, 200, logarithmic=True)
    assert axis(10) == pytest.approx(100) and axis.ticks() == [1, 10, 100]


def test_text_and_attributes_are_escaped() -> None:
    found = svg.label(0, 0, "<b>", '"x')
    assert "<b>" not in found and "&lt;b&gt;" in found and 'class="&#34;x"' in found


def test_the_front_joins_what_nothing_else_beats() -> None:
    points = [
        SizePoint(name, 0, size, value)
        for name, size, value in (("a", 1, 9), ("b", 2, 9), ("c", 3, 4), ("d", 2, 5), ("e", 9, 4))
    ]
    assert [point.title for point in pareto_front(points)] == ["a", "d", "c"]


def test_neighbours_of_one_width_are_one_rectangle() -> None:
    drawn = strips.bit_strips([details(weight_bits={"conv": [2, 2, 3, 3, 3, 2]})])
    two, three = (re.search(rf'class="b{bits}" d="([^"]+)"', drawn).group(1) for bits in (2, 3))  # type: ignore[union-attr]
    assert two.count("M") == 2 and three.count("M") == 1
    assert "3 at 2 bits, 3 at 3 bits" in drawn and ">2.5<" in drawn


def test_strips_of_wide_layers_are_thinned_and_keep_their_mean() -> None:
    methods = [details(weight_bits={f"conv{index}": [1, 3] * 4000 for index in range(10)})]
    drawn = strips.bit_strips(methods)
    assert len(drawn) < 20_000 and 'class="b2"' in drawn and 'class="b1"' not in drawn
    assert strips.used_bits(methods) == [1, 3]


def test_scales_are_shown_against_their_own_mean() -> None:
    methods = [details(scales={"conv": ScaleTable([9, 5, 1], [0.1, 0.4, 1.6])})]
    assert strips.scale_range(methods) == 4 and strips.scale_range([details()]) == 2
    drawn = strips.scale_strips(methods, 4)
    assert [f'class="d{shade}"' in drawn for shade in (0, strips.LEVELS, 2 * strips.LEVELS)] == [True] * 3
    assert "16.0x" in drawn


def test_unknown_errors_have_no_mark() -> None:
    drawn = figures.site_errors([details(errors={"a": SiteErrors(0.1, None), "b": SiteErrors(0.2, 0.3)})])
    assert drawn.count('class="mark"') == 3 and "m, b: output error 30.00%" in drawn
    assert figures.site_errors([details()]) == ""


def test_iterations_without_a_value_are_left_out_of_a_curve() -> None:
    (drawn,) = figures.histories([details(histories={"loss": [4.0, float("nan"), 2.0]})])
    assert len(re.search(r'points="([^"]+)"', drawn).group(1).split()) == 2  # type: ignore[union-attr]
    assert figures.histories([details(histories={"loss": [float("nan")]})]) == []


def test_long_curves_are_thinned() -> None:
    (drawn,) = figures.histories([details(histories={"loss": [1.0 + index % 2 for index in range(10_000)]})])
    assert len(re.search(r'points="([^"]+)"', drawn).group(1).split()) <= figures.POINTS  # type: ignore[union-attr]


def test_names_that_would_lie_on_one_another_are_left_out_and_their_marks_are_not() -> None:
    points = [SizePoint(f"method {index}", index, 1000.0, 5.0) for index in range(5)]
    drawn = figures.size_quality(points, 1.0, "FID")
    assert drawn.count('class="name"') == 3 and drawn.count('class="mark"') == 5
    assert 'class="floor"' in drawn and "method 4: 1,000 bytes, FID 5" in drawn
    assert figures.size_quality([], None, "FID") == ""
