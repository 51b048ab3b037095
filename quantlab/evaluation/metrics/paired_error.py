"""Distance to the float model's image of the same noise."""

from __future__ import annotations

from typing import ClassVar

from torchmetrics import MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio

from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.samples import ImageMetric, SampleSet

DATA_RANGE = 2.0
"""Images lie in [-1, 1]."""


class PairedError(ImageMetric):
    """Error to the float image of the same noise; far less noisy than FID."""

    name: ClassVar[str] = "paired-error"
    paired: ClassVar[bool] = True
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``paired-mse``, and ``psnr`` in dB over all pixels (infinite for equal images)."""
        error, ratio = MeanSquaredError(), PeakSignalNoiseRatio(data_range=DATA_RANGE)
        error.update(samples.images.contiguous(), samples.teacher_images.contiguous())
        ratio.update(samples.images, samples.teacher_images)
        return {"paired-mse": error.compute().item(), "psnr": ratio.compute().item()}
