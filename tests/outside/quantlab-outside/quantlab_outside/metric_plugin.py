"""A metric of images."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantlab import ImageMetric, SampleSet, Strict


class OutsideMetricConfig(Strict):
    """Options of the metric."""

    levels: int = Field(default=256, ge=2, description="grey levels that an image is rounded to first")


class OutsideMetric(ImageMetric):
    """Mean standard deviation of the pixels of an image, between 0 and 1."""

    name: ClassVar[str] = "outside-metric"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsideMetricConfig

    def __init__(self, config: OutsideMetricConfig) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``outside-metric``, the mean over images."""
        steps = self.config.levels - 1
        grey = ((samples.images.double() / 2 + 0.5) * steps).round() / steps
        return {"outside-metric": grey.flatten(1).std(1, correction=0).mean().item()}
