"""Small pieces of inline SVG; every text and attribute is escaped, and colours are the page's own variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Attributes = Mapping[str, str | float]
SHORT = 4.0
"""A logarithmic axis over less than this factor has evenly spaced values, as a linear one does."""
SERIES = 8
"""Colours for series in the style sheet, --s0 to --s7."""


def element(name: str, attributes: Attributes, content: Iterable[Markup] = (), text: str = "") -> Markup:
    """One element with its attributes, text and children."""
    shown = Markup("").join(Markup(' {}="{}"').format(key, _short(value)) for key, value in attributes.items())
    return Markup("<{}{}>{}{}</{}>").format(Markup(name), shown, escape(text), Markup("").join(content), Markup(name))


def drawing(width: float, height: float, label: str, content: Iterable[Markup]) -> Markup:
    """A whole drawing of a fixed size; the page scrolls it where it is wider than the screen."""
    size: Attributes = {
        "viewBox": f"0 0 {width:.0f} {height:.0f}",
        "width": round(width),
        "height": round(height),
        "role": "img",
        "aria-label": label,
    }
    return element("svg", size, content)


def label(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> Markup:
    """A line of text; ``css`` is a class of the style sheet."""
    return element("text", {"x": x, "y": y, "class": css, "text-anchor": anchor}, text=text)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css})


def tip(text: str) -> Markup:
    """What shows when the pointer rests on the parent."""
    return element("title", {}, text=text)


def series_colour(index: int) -> str:
    """The page's colour of a series."""
    return f"var(--s{index % SERIES})"


def marker(x: float, y: float, series: int, text: str, radius: float = 4.5) -> Markup:
    """A point whose shape tells its series as well as its colour does."""
    r, d = radius, 1.4 * radius
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - 1.3 * r:.1f}l{1.25 * r:.1f} {2.2 * r:.1f}h{-2.5 * r:.1f}z",
        f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z",
    )
    attributes: Attributes = {"d": shapes[series % len(shapes)], "fill": series_colour(series), "class": "mark"}
    return element("path", attributes, [tip(text)])


@dataclass(frozen=True)
class Axis:
    """A mapping from values to positions along one direction.

    Attributes:
        low: the value at ``start``; above 0 on a logarithmic axis.
        high: the value at ``end``.
        start: position in the drawing.
        end: position; smaller than ``start`` on an upright axis.
        logarithmic: equal factors are equal lengths.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return self.start + (self._scaled(value) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values for the grid."""
        if not self.logarithmic or self.high / self.low < SHORT:
            raw = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
            first = math.ceil(self.low / step - 1e-9)
            return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            inside = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            if len(inside) >= 3:
                return inside
        return [self.low, self.high]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def axis_over(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """An axis that holds all values with a little room on both sides."""
    low, high = min(values), max(values)
    if logarithmic:
        room = max((high / low) ** 0.06, 1.05)
        return Axis(low / room, high * room, start, end, True)
    room = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    return Axis(low - room, high + room, start, end)


def number(value: float) -> str:
    """A value in a few characters: 1.2M, 35k, 0.04."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def _short(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
