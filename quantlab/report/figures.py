"""The report's plots: size against quality, errors of sites, curves of tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantlab.report import svg
from quantlab.report.details import MethodDetails, SiteErrors
from quantlab.report.strips import NAME_WIDTH, ROW

PANEL = 260
"""Pixels across one panel of site errors."""
POINTS = 240
"""At most this many points of a curve are drawn, each the mean of its stretch."""


@dataclass(frozen=True)
class SizePoint:
    """One result in the plane of size and quality; ``series`` is its method's colour and shape."""

    title: str
    series: int
    size_bytes: float
    value: float


def pareto_front(points: Sequence[SizePoint]) -> list[SizePoint]:
    """The points that no other beats in size and value at once, from small to large."""
    front: list[SizePoint] = []
    for point in sorted(points, key=lambda point: (point.size_bytes, point.value)):
        if not front or point.value < front[-1].value:
            front.append(point)
    return front


def size_quality(points: Sequence[SizePoint], floor: float | None, metric: str, drawn: bool = True) -> Markup:
    """Size against a metric that should be small; the line joins what nothing else beats, ``floor`` is dashed.

    ``floor`` is full precision's own value: with other noise, where images are ``drawn``.
    """
    if not points:
        return Markup("")
    width, height, left, bottom = 680, 380, 62, 44
    x = svg.axis_over([point.size_bytes for point in points], left + 8, width - 24, logarithmic=True)
    values = [point.value for point in points] + ([floor] if floor is not None else [])
    spread = min(values) > 0 and max(values) / min(values) > 8
    y = svg.axis_over(values, height - bottom, 16, logarithmic=spread)
    content = [*_grid(x, y, left, width - 12, height - bottom, 10)]
    content.append(
        svg.label(
            (left + width) / 2,
            height - 6,
            "bytes of the denoiser" if drawn else "bytes of the network",
            "axis",
            "middle",
        )
    )
    content.append(svg.label(8, 12, metric, "axis"))
    if floor is not None:
        content.append(svg.line(left, y(floor), width - 12, y(floor), "floor"))
        content.append(
            svg.label(left + 4, y(floor) + 13, "full precision, other noise" if drawn else "full precision", "num")
        )
    front = pareto_front(points)
    steps = "".join(
        f"{'M' if index == 0 else 'L'}{x(point.size_bytes):.1f} {y(point.value):.1f}"
        for index, point in enumerate(front)
    )
    content.append(svg.element("path", {"d": steps, "class": "front"}))
    named = points if len(points) <= 8 else front[:8]
    content += _names([(x(point.size_bytes), y(point.value), point.title) for point in named], width - 12)
    for point in points:
        told = f"{point.title}: {point.size_bytes:,.0f} bytes, {metric} {point.value:.4g}"
        content.append(svg.marker(x(point.size_bytes), y(point.value), point.series, told, 5.5))
    return svg.drawing(width, height, f"Size against {metric}", content)


def site_errors(methods: Sequence[MethodDetails]) -> Markup:
    """Relative errors of weights and outputs, a row for every site and a mark for every method."""
    shown = [(index, method) for index, method in enumerate(methods) if method.errors]
    sites = list(dict.fromkeys(site for _, method in shown for site in method.errors))
    if not sites:
        return Markup("")
    left, top = NAME_WIDTH * max(map(len, sites)) + 14, 26
    bottom = top + len(sites) * ROW
    content: list[Markup] = []
    for row, site in enumerate(sites):
        y = top + row * ROW
        if row % 2:
            band = {"x": 0, "y": y, "width": left + 2 * PANEL + 20, "height": ROW, "class": "band"}
            content.append(svg.element("rect", band))
        content.append(svg.label(left - 8, y + 11, site, "site", "end"))
    for panel, name in enumerate(("weight", "output")):
        start = left + panel * (PANEL + 20)
        known = [_error(found, name) for _, method in shown for found in method.errors.values()]
        values = [value for value in known if value]
        if not values:
            continue
        axis = svg.axis_over(values, start + 4, start + PANEL - 4, logarithmic=True)
        content.append(svg.label(start, 14, f"{name} error", "head"))
        for tick in axis.ticks():
            content.append(svg.line(axis(tick), top - 4, axis(tick), bottom, "grid"))
            content.append(svg.label(axis(tick), bottom + 13, f"{100 * tick:g}%", "num", "middle"))
        for series, method in shown:
            for row, site in enumerate(sites):
                value = _error(method.errors.get(site), name)
                if value:
                    told = f"{method.title}, {site}: {name} error {value:.2%}"
                    content.append(svg.marker(axis(value), top + row * ROW + 7, series, told, 3.5))
    return svg.drawing(left + 2 * PANEL + 20, bottom + 20, "Relative errors of the sites", content)


def histories(methods: Sequence[MethodDetails]) -> list[Markup]:
    """What tuning recorded, a drawing for each name with a line for each method."""
    names = list(dict.fromkeys(name for method in methods for name in method.histories))
    found = [_history(name, methods) for name in names]
    return [figure for figure in found if figure]


def _history(name: str, methods: Sequence[MethodDetails]) -> Markup:
    curves = {
        index: points
        for index, method in enumerate(methods)
        if name in method.histories and (points := _thinned(method.histories[name]))
    }
    if not curves:
        return Markup("")
    width, height, left, bottom = 420, 230, 56, 32
    values = [value for points in curves.values() for _, value in points]
    spread = min(values) > 0 and max(values) / min(values) > 20
    longest = max(len(methods[index].histories[name]) for index in curves)
    x = svg.Axis(0, max(longest - 1, 1), left, width - 12)
    y = svg.axis_over(values, height - bottom, 26, logarithmic=spread)
    content = [*_grid(x, y, left, width - 12, height - bottom, 20), svg.label(8, 13, name, "head")]
    content.append(svg.label((left + width) / 2, height - 3, "iteration", "axis", "middle"))
    for index, points in curves.items():
        outline = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        style = {"points": outline, "class": "curve", "stroke": svg.series_colour(index)}
        content.append(svg.element("polyline", style, [svg.tip(methods[index].title)]))
    return svg.drawing(width, height, f"History of {name}", content)


def _thinned(values: Sequence[float]) -> list[tuple[float, float]]:
    """At most POINTS means of finite values with their middle iterations; NaN marks iterations without a value."""
    step = math.ceil(len(values) / POINTS)
    points = []
    for start in range(0, len(values), step):
        known = [value for value in values[start : start + step] if math.isfinite(value)]
        if known:
            points.append((start + (step - 1) / 2, sum(known) / len(known)))
    return points


def _error(errors: SiteErrors | None, name: str) -> float | None:
    if errors is None:
        return None
    return errors.weight if name == "weight" else errors.output


def _grid(x: svg.Axis, y: svg.Axis, left: float, right: float, bottom: float, top: float) -> list[Markup]:
    """Grid lines with their values."""
    content: list[Markup] = []
    for tick in y.ticks():
        content.append(svg.line(left, y(tick), right, y(tick), "grid"))
        content.append(svg.label(left - 6, y(tick) + 4, svg.number(tick), "num", "end"))
    for tick in x.ticks():
        content.append(svg.line(x(tick), top, x(tick), bottom, "grid"))
        content.append(svg.label(x(tick), bottom + 15, svg.number(tick), "num", "middle"))
    return content


def _names(places: Sequence[tuple[float, float, str]], right: float) -> list[Markup]:
    """Names beside points, at their left near the right edge; one that would lie on another is left out."""
    content: list[Markup] = []
    taken: list[tuple[float, float, float]] = []
    for x, y, name in sorted(places, key=lambda place: place[1]):
        length = 6.8 * len(name)
        start = x + 10 if x + 10 + length < right else x - 10 - length

        def is_free(height: float, start: float = start, end: float = start + length) -> bool:
            return not any(abs(height - y2) < 12 and start < x2 and x1 < end for x1, x2, y2 in taken)

        height = next(filter(is_free, (y + 4, y + 17, y - 9)), None)
        if height is not None:
            taken.append((start, start + length, height))
            content.append(svg.label(start, height, name, "name"))
    return content


def legend(titles: Mapping[int, str]) -> Markup:
    """The colour and shape of each series."""
    size: svg.Attributes = {"width": 16, "height": 16, "aria-hidden": "true"}
    items = [
        Markup('<span class="key">{}{}</span>').format(
            svg.element("svg", size, [svg.marker(8, 8, index, title)]), title
        )
        for index, title in titles.items()
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(items))
