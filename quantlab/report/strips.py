"""Heat strips: a row for every site, a column for every method."""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.report import svg
from quantlab.report.details import MethodDetails, ScaleTable

ROW, STRIP, NOTE, GAP = 15, 132, 36, 14
"""Pixels: height of a row, width of a strip, of the number after it, and between two methods."""
HEAD = 24
"""Characters of a method's title in a line."""
MAX_CELLS = 12_000
"""Cells of one drawing; where there are more channels, a cell is the mean of several."""
NAME_WIDTH = 6.3
"""Pixels of a character in a site's name."""
LEVELS = 10
"""Shades on either side of the middle."""
RANGES = (2.0, 4.0, 8.0, 16.0)
"""The factor from a site's mean that has the strongest colour is the smallest of these that holds all scales."""


@dataclass(frozen=True)
class Strip:
    """One site of one method: a colour class for every cell, a number, and the words for it."""

    cells: Sequence[str]
    note: str
    tip: str


def bit_strips(methods: Sequence[MethodDetails]) -> Markup:
    """The bits of every output channel, in the order of the channels, and their mean in each site."""
    rows = sum(len(method.weight_bits) for method in methods)
    widest = max(1, MAX_CELLS // max(rows, 1))
    panels = [{site: _bit_strip(site, bits, widest) for site, bits in method.weight_bits.items()} for method in methods]
    return _panels("Bits of the weights", [method.title for method in methods], panels)


def scale_range(methods: Sequence[MethodDetails]) -> float:
    """By what factor at most a scale differs from its site's mean, as one of RANGES."""
    tables = [table for method in methods for table in method.scales.values()]
    widest = max((abs(math.log(scale / _centre(table))) for table in tables for scale in table.scales), default=0.0)
    return next((factor for factor in RANGES if math.log(factor) >= widest), RANGES[-1])


def scale_strips(methods: Sequence[MethodDetails], widest: float) -> Markup:
    """Each input's scale at every timestep against the geometric mean of its own scales, up to a factor ``widest``."""
    shown = [method for method in methods if method.scales]
    panels = [{site: _scale_strip(site, table, widest) for site, table in method.scales.items()} for method in shown]
    return _panels("Activation scales over timesteps", [method.title for method in shown], panels)


def used_bits(methods: Sequence[MethodDetails]) -> list[int]:
    """The bit widths that occur, for the legend."""
    return sorted({bits for method in methods for site in method.weight_bits.values() for bits in site})


def _bit_strip(site: str, bits: Sequence[int], widest: int) -> Strip:
    counts = Counter(bits)
    mix = ", ".join(
        f"{count} at {'float' if width == FLOAT_BITS else f'{width} bits'}" for width, count in sorted(counts.items())
    )
    mean = sum(bits) / len(bits)
    step = math.ceil(len(bits) / widest)
    groups = [bits[start : start + step] for start in range(0, len(bits), step)]
    cells = [f"b{min(round(sum(group) / len(group)), 9)}" for group in groups]
    return Strip(cells, f"{mean:.2f}".rstrip("0").rstrip("."), f"{site}: {len(bits)} channels, {mix}; mean {mean:.3f}")


def _centre(table: ScaleTable) -> float:
    """The geometric mean of the scales, which are positive."""
    return math.exp(sum(map(math.log, table.scales)) / len(table.scales))


def _scale_strip(site: str, table: ScaleTable, widest: float) -> Strip:
    centre = _centre(table)
    ratios = [math.log(scale / centre) / math.log(widest) for scale in table.scales]
    cells = [f"d{round(max(-1.0, min(1.0, ratio)) * LEVELS) + LEVELS}" for ratio in ratios]
    low, high = min(table.scales), max(table.scales)
    steps = f"{len(table.scales)} timesteps from {table.timesteps[0]:g} to {table.timesteps[-1]:g}"
    return Strip(cells, f"{high / low:.1f}x", f"{site}: {steps}; scales {low:.3g} to {high:.3g}, mean {centre:.3g}")


def _panels(title: str, names: Sequence[str], panels: Sequence[Mapping[str, Strip]]) -> Markup:
    """Strips side by side with the names of the sites at their left."""
    sites = list(dict.fromkeys(site for panel in panels for site in panel))
    if not sites:
        return Markup("")
    left = NAME_WIDTH * max(map(len, sites)) + GAP
    heads = [textwrap.wrap(name, HEAD, break_on_hyphens=False)[:2] for name in names]
    lines = max(map(len, heads))
    top = 10 + 14 * lines
    content: list[Markup] = []
    for index, (name, panel) in enumerate(zip(names, panels, strict=True)):
        x = left + index * (STRIP + NOTE + GAP)
        for line, words in enumerate(heads[index]):
            place: svg.Attributes = {"x": x, "y": 14 * (lines - len(heads[index]) + line + 1), "class": "head"}
            content.append(svg.element("text", place, [svg.tip(name)], words))
        outlines: defaultdict[str, list[str]] = defaultdict(list)
        for row, site in enumerate(sites):
            if site in panel:
                strip, y = panel[site], top + row * ROW
                _outline(strip.cells, x, y, outlines)
                content.append(svg.label(x + STRIP + 5, y + 10, strip.note, "num"))
        paths = [svg.element("path", {"class": css, "d": "".join(found)}) for css, found in sorted(outlines.items())]
        content += paths
        content += [
            svg.element(
                "rect",
                {"x": x, "y": top + row * ROW, "width": STRIP + NOTE, "height": ROW - 2, "class": "hover"},
                [svg.tip(panel[site].tip)],
            )
            for row, site in enumerate(sites)
            if site in panel
        ]
    content += [svg.label(left - 8, top + row * ROW + 10, site, "site", "end") for row, site in enumerate(sites)]
    width = left + len(panels) * (STRIP + NOTE + GAP)
    return svg.drawing(width, top + len(sites) * ROW + 4, title, content)


def _outline(cells: Sequence[str], x: float, y: float, outlines: defaultdict[str, list[str]]) -> None:
    """Add the cells' rectangles to the path of their colour, neighbours of one colour as one."""
    width, start = STRIP / len(cells), 0
    for end in range(1, len(cells) + 1):
        if end == len(cells) or cells[end] != cells[start]:
            begin, length = x + start * width, (end - start) * width
            outlines[cells[start]].append(f"M{begin:.1f} {y}h{length:.1f}v{ROW - 3}h-{length:.1f}z")
            start = end
