"""Structural similarity to the float model's image of the same noise."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field, field_validator
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from quantlab.contracts.config import Strict
from quantlab.contracts.model import GenerativeTask
from quantlab.errors import ModelError
from quantlab.evaluation.samples import ImageMetric, SampleSet

WINDOW, SIGMA = 11, 1.5
"""The published window, in pixels, and the deviation of its Gaussian."""


class SsimConfig(Strict):
    """Options of SSIM."""

    window: int | None = Field(
        None, ge=3, le=WINDOW, description="side of the Gaussian window in pixels, odd; none: 11, less for small images"
    )

    @field_validator("window")
    @classmethod
    def _odd(cls, window: int | None) -> int | None:
        if window is not None and window % 2 == 0:
            raise ValueError("a window has a middle: give an odd number of pixels")
        return window


def window_for(side: int) -> int:
    """The published 11 pixels, or the largest odd window up to just above half of a smaller image's side."""
    return min(WINDOW, side // 2 | 1)


class Ssim(ImageMetric):
    """Structural similarity to the float image of the same noise, 1 for equal images."""

    name: ClassVar[str] = "ssim"
    paper: ClassVar[str | None] = "Wang et al. 2004, doi 10.1109/TIP.2003.819861"
    paired: ClassVar[bool] = True
    Config = SsimConfig

    def __init__(self, config: SsimConfig) -> None:
        self.config = config

    def require(self, task: GenerativeTask) -> None:
        """The window's half must fit into an image, which is mirrored at its border."""
        side = min(task.draw_noise(1, 0).shape[-2:])
        if self.config.window is not None and self.config.window // 2 >= side:
            raise ModelError(
                "the window of SSIM is larger than the images",
                where="evaluate.metrics",
                got=self.config.window,
                allowed=f"odd, below {2 * side}",
            )

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``ssim``, mean over pixels, channels and images; images are taken to [0, 1] first."""
        window = self.config.window or window_for(min(samples.images.shape[-2:]))
        # torchmetrics derives the window from the deviation: 2 * int(3.5 sigma + 0.5) + 1.
        metric = StructuralSimilarityIndexMeasure(sigma=SIGMA * window / WINDOW, data_range=1.0)
        metric.update(samples.images.double() / 2 + 0.5, samples.teacher_images.double() / 2 + 0.5)
        return {"ssim": cast(Tensor, metric.compute()).item()}
