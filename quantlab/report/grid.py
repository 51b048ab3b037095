"""Sample grids: what the numbers are about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.store import atomic_write

if TYPE_CHECKING:
    import numpy as np

SCALE = 6
"""Screen pixels for each pixel of an image."""
GAP = 4
LABEL_WIDTH = 170
"""At least; longer titles get the room they need."""


@dataclass(frozen=True)
class GridRow:
    """Images of one method, uint8 [N, H, W] or [N, H, W, 3], column by column from the same noise."""

    title: str
    images: np.ndarray


def save_grid(rows: Sequence[GridRow], path: Path) -> None:
    """Write the rows below one another as a PNG, each pixel enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    count, height, width = rows[0].images.shape[:3]
    cell_width, cell_height = width * SCALE + GAP, height * SCALE + GAP
    font = ImageFont.load_default(14)
    left = max(LABEL_WIDTH, *(math.ceil(font.getlength(row.title)) + 4 * GAP for row in rows))
    canvas = Image.new("RGB", (left + count * cell_width + GAP, len(rows) * cell_height + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for line, row in enumerate(rows):
        top = GAP + line * cell_height
        draw.text((GAP * 2, top + cell_height // 2 - 10), row.title, fill="black", font=font)
        for column, pixels in enumerate(row.images):
            image = (
                Image.fromarray(pixels).convert("RGB").resize((width * SCALE, height * SCALE), Image.Resampling.NEAREST)
            )
            canvas.paste(image, (left + column * cell_width, top))
    atomic_write(path, lambda partial: canvas.save(partial, format="PNG"))
