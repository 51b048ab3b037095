"""The picture of size against quality."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from quantlab.evaluation.interval import Interval
from quantlab.report.scatter import HEIGHT, WIDTH, Point, scatter

SVG = "{http://www.w3.org/2000/svg}"


def point(x: float, y: float, front: bool, name: str = "2/4", half: float = 1.0) -> Point:
    return Point(x, Interval(y, y - half, y + half, 3), name, front)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_points_are_inside_and_in_their_order(scale: float) -> None:
    """At a scale of 100 the axis is logarithmic."""
    points = [point(1e5, 40 * scale, True), point(2e5, 4, True), point(4e5, 9, False)]
    root = ElementTree.fromstring(scatter(points, "bytes", "fid", "a <b> & c"))
    dots = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in root.iter(f"{SVG}circle")]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in dots) and len(dots) == 3
    assert dots[0][0] < dots[1][0] < dots[2][0]
    assert dots[0][1] < dots[2][1] < dots[1][1], "a larger distance is drawn higher"
    (line,) = root.iter(f"{SVG}polyline")
    assert len(line.get("points", "").split()) == 2, "the front alone is joined"


def test_ticks_are_round() -> None:
    linear = scatter([point(658_588, 12, True), point(1_408_924, 4, True)], "bytes", "fid", "t")
    texts = [text.text for text in ElementTree.fromstring(linear).iter(f"{SVG}text")]
    assert texts[:5] == ["600,000", "800,000", "1,000,000", "1,200,000", "1,400,000"]
    wide = scatter([point(1e5, 300, True), point(2e5, 4, True)], "bytes", "fid", "t")
    texts = [text.text for text in ElementTree.fromstring(wide).iter(f"{SVG}text")]
    assert {"5", "10", "20", "50", "100", "200"} <= set(texts)


def test_names_are_escaped() -> None:
    root = ElementTree.fromstring(scatter([point(1, 1, True, "<script>")], "bytes", "fid", "<title>"))
    assert "<script>" in [text.text for text in root.iter(f"{SVG}text")]


def test_a_point_without_interval_has_no_bar_and_no_points_are_no_error() -> None:
    alone = Point(1.0, Interval(1.0, math.nan, math.nan, 1), "x", True)
    assert scatter([alone], "bytes", "fid", "t").count("<path") == 1
    assert "<svg" in scatter([], "bytes", "fid", "t")
