"""Images in a page: full precision, each method, and their difference from the same noise."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.report.details import read_images
from quantlab.report.rows import FULL_PRECISION

if TYPE_CHECKING:
    import numpy as np

AMPLIFICATION = 2
"""Factor of the differences, |method - float|, before they are drawn from black to white."""
FLOAT_ARM = "float"
MAX_PIXELS = 500_000
"""Of all rows together: about 1.5 MB of colour noise as PNG, the worst case."""


@dataclass(frozen=True)
class ImageRow:
    """A row of images side by side.

    Attributes:
        title: what they are.
        png: all of them as one PNG, base64.
        width: pixels of it.
        height: pixels of it.
        difference: amplified differences to full precision.
    """

    title: str
    png: str
    width: int
    height: int
    difference: bool = False


def image_rows(run_folder: Path, methods: Sequence[str], count: int) -> list[ImageRow]:
    """Rows of full precision, and of each method with its difference; empty when there are no images."""
    exact = read_images(run_folder, FLOAT_ARM, count)
    if exact is None or not count:
        return []
    found = [(method, images) for method in methods if (images := read_images(run_folder, method, count)) is not None]
    rows = 1 + 2 * len(found)
    count = max(1, min(count, MAX_PIXELS // (rows * exact.shape[-1] * exact.shape[-2])))
    side = int((MAX_PIXELS / (rows * count)) ** 0.5)
    lines = [_row(FULL_PRECISION, exact[:count], side)]
    for method, images in found:
        lines.append(_row(method, images[:count], side))
        difference = abs(images[:count] - exact[:count]) * AMPLIFICATION - 1  # two images differ by at most 2
        lines.append(_row(f"{method}: difference", difference, side, difference=True))
    return lines


def _row(title: str, images: np.ndarray, side: int, difference: bool = False) -> ImageRow:
    """Images [N, C, H, W] in [-1, 1] side by side with a pixel between them, each at most ``side`` pixels high."""
    import numpy as np
    from PIL import Image

    values = np.clip(np.rint((images.astype(np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    count, channels, height, width = values.shape
    pictures = [Image.fromarray(value[0] if channels == 1 else np.moveaxis(value[:3], 0, -1)) for value in values]
    if height > side:
        width, height = max(1, width * side // height), side
        pictures = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    canvas = Image.new("RGBA", (count * (width + 1) - 1, height), (0, 0, 0, 0))
    for index, picture in enumerate(pictures):
        canvas.paste(picture.convert(canvas.mode), (index * (width + 1), 0))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return ImageRow(title, base64.b64encode(buffer.getvalue()).decode(), *canvas.size, difference)
