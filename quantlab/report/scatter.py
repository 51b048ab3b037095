"""Size against quality as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quantlab.evaluation.interval import Interval

WIDTH, HEIGHT, MARGIN = 640, 400, 70
"""Of the picture and of the room for its axes, in pixels."""
FRONT, BEHIND = "#0b6e4f", "#9aa0a6"


@dataclass(frozen=True)
class Point:
    """A point with its interval and its name; ``front`` points are drawn dark and joined by a line."""

    x: float
    y: Interval
    name: str
    front: bool


@dataclass(frozen=True)
class _Axis:
    """Values to pixels, linearly or, where they span more than a factor of 20, by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    @staticmethod
    def around(values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        logarithmic = low > 0 and high / low > 20
        room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (low / 1.3, high * 1.3) if logarithmic else (low - room, high + room)
        return _Axis(low, high, start, end, logarithmic)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values: by 1, 2 or 5 times a power of ten, or these themselves on a logarithmic axis."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            rounds = [first * 10.0**power for power in powers for first in (1, 2, 5)]
            return [value for value in rounds if self.low <= value <= self.high]
        span = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(span))
        step = max(first * power for first in (1, 2, 5) if first * power <= span)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [index * step for index in range(first, last + 1)]


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str) -> str:
    """An SVG document: a dot for each point, a bar for its interval, the front as a line."""
    if not points:
        return _document(title, [])
    ends = [end for point in points for end in (point.y.mean, point.y.low, point.y.high) if math.isfinite(end)]
    x = _Axis.around([point.x for point in points], MARGIN, WIDTH - MARGIN / 2)
    y = _Axis.around([*ends], HEIGHT - MARGIN, MARGIN / 2)
    front = sorted((point.x, point.y.mean) for point in points if point.front)
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in front)
    parts = [f'<polyline points="{path}" fill="none" stroke="{FRONT}" stroke-opacity="0.4"/>']
    parts += [_tick(x.at(value), HEIGHT - MARGIN + 18, "middle", f"{value:,.0f}") for value in x.ticks()]
    parts += [_tick(MARGIN - 8, y.at(value) + 4, "end", f"{value:.3g}") for value in y.ticks()]
    parts.append(_tick(WIDTH / 2, HEIGHT - 20, "middle", x_title))
    parts.append(_tick(12, 20, "start", y_title))
    for point in points:
        colour, across, down = FRONT if point.front else BEHIND, x.at(point.x), y.at(point.y.mean)
        if point.y.known:
            low, high = y.at(point.y.low), y.at(point.y.high)
            parts.append(f'<path d="M{across:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{colour}"/>')
        parts.append(_tick(across + 7, down - 6, "start", point.name))
    return _document(title, parts)


def _tick(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _document(title: str, parts: Sequence[str]) -> str:
    frame = f'<path d="M{MARGIN} {MARGIN / 2:.0f}V{HEIGHT - MARGIN}H{WIDTH - MARGIN // 2}" fill="none" stroke="#444"/>'
    body = "\n".join(
        [f"<title>{escape(title)}</title>", '<rect width="100%" height="100%" fill="#fff"/>', frame, *parts]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'
    )
