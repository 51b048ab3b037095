"""Colour shapes: images drawn by a small program, as many as one asks for.

Each 16x16 RGB image shows one shape, its class, at a random place, size and tilt, on a background of the opposite
brightness. Shape and background are each plain, a gradient, striped or chequered, in two colours of their own.

Pixels are made by additions, multiplications, divisions and square roots alone, which every machine rounds alike, so
a seed gives the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

IMAGE_SHAPE = (3, 16, 16)
POINTS = 2
"""Points along each side of a pixel; an edge is softened over one of them besides."""
RADIUS = (5.0, 7.0)
"""Smallest and largest radius of a shape, pixels."""
TURN = math.pi / 6
"""Largest angle that a shape is turned by, either way."""
CONTRAST = 0.7
"""How far a texture's second colour goes from its first to another random one."""

Outline = Callable[[Tensor, Tensor], Tensor]
"""Signed distance to a shape of radius about 1, negative inside, from coordinates x to the right and y upwards."""


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 0.95


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.74).abs() - 0.25


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.76


def _frame(x: Tensor, y: Tensor) -> Tensor:
    return (torch.maximum(x.abs(), y.abs()) - 0.62).abs() - 0.2


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(-y, y * 0.5 + x.abs() * (math.sqrt(3) / 2)) - 0.52


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 0.98, torch.minimum(x, y) - 0.28)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: reflections fold the plane onto half a point, whose edge is one line."""
    angle, inner = math.pi / 5, 0.45
    for _ in range(2):
        x = x.abs()
        beyond = (x * math.cos(angle) - y * math.sin(angle)).clamp(min=0.0) * 2.0
        x, y = x - beyond * math.cos(angle), y + beyond * math.sin(angle)
    across, along = inner * math.sin(angle), inner * math.cos(angle) - 1.0
    return (across * (y - 1.0) - along * x.abs()) / math.hypot(across, along)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_length(x, y) - 1.0, 0.78 - _length(x - 0.5, y))


def _half(x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.42
    return torch.maximum(_length(x, y) - 1.02, -y)


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() - 1.0, y.abs() - 0.28)


OUTLINES: tuple[Outline, ...] = (
    _disc,
    _ring,
    _square,
    _frame,
    _triangle,
    _cross,
    _star,
    _crescent,
    _half,
    _bar,
)
"""Of each class in turn."""
NUM_CLASSES = len(OUTLINES)


def draw(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of random classes, float [count, 3, 16, 16] in [-1, 1], and their classes, int64 [count]."""
    labels = torch.randint(NUM_CLASSES, (count,), generator=rng)
    return render(labels, rng), labels


def render(labels: Tensor, rng: torch.Generator) -> Tensor:
    """An image of each class asked for: int64 [N] -> float [N, 3, 16, 16] in [-1, 1]."""
    count = len(labels)
    size = IMAGE_SHAPE[-1] * POINTS
    centres = (torch.arange(size, dtype=torch.float32) + 0.5) / POINTS
    x, y = centres.expand(count, size, size), centres.flip(0)[:, None].expand(count, size, size)
    radius = _between(torch.rand(count, generator=rng), *RADIUS)[:, None, None]
    place = torch.rand(2, count, 1, 1, generator=rng)
    middle = radius + place * (IMAGE_SHAPE[-1] - 2.0 * radius)  # so that only corners can leave the image
    across, up = _rotate((x - middle[0]) / radius, (y - middle[1]) / radius, TURN, rng)
    distance = torch.empty(count, size, size)
    for index, outline in enumerate(OUTLINES):
        chosen = labels == index
        distance[chosen] = outline(across[chosen], up[chosen])
    cover = (0.5 - distance * radius * POINTS).clamp(0.0, 1.0)[:, None]

    bright = torch.rand(count, generator=rng) < 0.5  # whether the shape is brighter than what is behind it
    front = _paint(x, y, bright, rng)
    behind = _paint(x, y, ~bright, rng)
    return _shrink(behind + cover * (front - behind)) * 2.0 - 1.0


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + share * (high - low)


def _rotate(x: Tensor, y: Tensor, largest: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coordinates [N, H, W] turned by a random angle for each of the N, up to ``largest`` either way."""
    angle = _between(torch.rand(len(x), 1, 1, generator=rng).double(), -largest, largest)
    cos, sin = angle.cos().float(), angle.sin().float()  # in float64, so that float32 does not show who computed them
    return x * cos + y * sin, y * cos - x * sin


def _shrink(points: Tensor) -> Tensor:
    """Mean over the points of each pixel: [N, C, 2 H, 2 W] -> [N, C, H, W]."""
    rows = points[:, :, ::POINTS] + points[:, :, 1::POINTS]
    return (rows[..., ::POINTS] + rows[..., 1::POINTS]) * (1.0 / POINTS**2)


def _paint(x: Tensor, y: Tensor, bright: Tensor, rng: torch.Generator) -> Tensor:
    """A texture in two random colours, both bright or both dark: coordinates [N, H, W] -> [N, 3, H, W] in [0, 1]."""
    count = len(bright)
    first, second = _colour(bright, rng), _colour(bright, rng)
    across, along = _rotate(x - 8.0, y - 8.0, math.pi, rng)
    kind = torch.randint(4, (count, 1, 1), generator=rng)
    period = _between(torch.rand(count, 1, 1, generator=rng), 4.0, 7.0)
    shift = torch.rand(2, count, 1, 1, generator=rng)
    stripes, others = _wave(across / period + shift[0]), _wave(along / period + shift[1])
    share = torch.zeros_like(stripes)
    share = torch.where(kind == 1, (0.5 + across * (1.0 / 16)).clamp(0.0, 1.0), share)
    share = torch.where(kind == 2, (0.5 + 1.5 * stripes).clamp(0.0, 1.0), share)
    share = torch.where(kind == 3, (0.5 + 3.0 * stripes * others).clamp(0.0, 1.0), share)
    return first + share[:, None] * CONTRAST * (second - first)


def _wave(phase: Tensor) -> Tensor:
    """Triangle wave of period 1 between -1 and 1."""
    return 4.0 * (phase - phase.floor() - 0.5).abs() - 1.0


def _colour(bright: Tensor, rng: torch.Generator) -> Tensor:
    """Random colours, bright or dark: [N] -> [N, 3, 1, 1] in [0, 1]."""
    hue, saturation, value = torch.rand(3, len(bright), generator=rng)
    wheel = hue * 6.0
    # Each channel rises and falls as a trapezium around the wheel, the three a third of it apart.
    channels = [(((wheel + offset) % 6.0 - 3.0).abs() - 1.0).clamp(0.0, 1.0) for offset in (0.0, 4.0, 2.0)]
    pure = torch.stack(channels, 1)
    saturation = torch.where(bright, _between(saturation, 0.25, 0.75), _between(saturation, 0.5, 1.0))[:, None]
    value = torch.where(bright, _between(value, 0.8, 1.0), _between(value, 0.08, 0.4))[:, None]
    return (value * (1.0 - saturation * (1.0 - pure)))[..., None, None]
