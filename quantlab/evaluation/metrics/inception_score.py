"""The inception score with a task's own classifier."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from torch import Tensor
from torchmetrics import Metric

from quantlab.contracts.model import Evidence
from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.samples import ImageMetric, SampleSet


class InceptionScore(Metric):
    """exp of the mean KL divergence between each image's class distribution and their mean, without splits.

    torchmetrics' own metric shuffles with the global generator before it splits; over the whole set there is nothing
    to shuffle.
    """

    full_state_update = False
    logits: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor) -> None:
        """Add logits [B, K]."""
        self.logits.append(logits.double())

    def compute(self) -> Tensor:
        """The score, 1 to K."""
        from torchmetrics.utilities.data import dim_zero_cat

        log_probabilities = dim_zero_cat(self.logits).log_softmax(1)
        probabilities = log_probabilities.exp()
        mean = probabilities.mean(0, keepdim=True)
        return (probabilities * (log_probabilities - mean.log())).sum(1).mean().exp()


class InceptionScoreMetric(ImageMetric):
    """Inception score of the task's classifier; it rises while images get worse, so nothing is ranked by it."""

    name: ClassVar[str] = "is"
    paper: ClassVar[str | None] = "Salimans et al. 2016, arXiv 1606.03498"
    needs: ClassVar[Collection[Evidence]] = (Evidence.FEATURES,)
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``is``, of the logits of the network that gives the features."""
        logits = samples.logits if samples.feature_logits is None else samples.feature_logits
        assert logits is not None, "needs says so"
        metric = InceptionScore()
        metric.update(logits)
        return {"is": metric.compute().item()}
