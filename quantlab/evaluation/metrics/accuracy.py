"""Whether an image shows the class it was asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from torchmetrics.classification import MulticlassAccuracy

from quantlab.contracts.model import Evidence
from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.samples import ImageMetric, SampleSet


class Accuracy(ImageMetric):
    """Share of images whose class the task's classifier confirms; washed-out images score high, so never rank by it."""

    name: ClassVar[str] = "accuracy"
    needs: ClassVar[Collection[Evidence]] = (Evidence.LOGITS,)
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``accuracy``, 0 to 1."""
        assert samples.logits is not None, "needs says so"
        metric = MulticlassAccuracy(samples.logits.shape[1], average="micro")
        metric.update(samples.logits, samples.labels)
        return {"accuracy": metric.compute().item()}
