"""Whether a classifier is right."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quantlab.contracts.config import Strict
from quantlab.contracts.model import ClassificationTask
from quantlab.errors import ModelError
from quantlab.evaluation.answers import Answers, ClassMetric


class TopKConfig(Strict):
    """Options of top-k accuracy."""

    k: tuple[int, ...] = Field(default=(1, 5), min_length=1, description="how many classes may be named, each >= 1")


class TopK(ClassMetric):
    """Share of inputs whose class is among the k with the highest logits."""

    name: ClassVar[str] = "top-k"
    share: ClassVar[bool] = True
    Config = TopKConfig

    def __init__(self, config: TopKConfig) -> None:
        self.config = config

    def require(self, task: ClassificationTask) -> None:
        """More classes than may be named."""
        if not 1 <= min(self.config.k) <= max(self.config.k) < task.num_classes:
            raise ModelError(
                "top-k would be right about everything, or about nothing",
                where="evaluate.metrics",
                got=f"k = {', '.join(map(str, self.config.k))}",
                allowed=f"1 to {task.num_classes - 1}, since there are {task.num_classes} classes",
                next_step="write top-k: {k: [1]}",
            )

    def values(self, answers: Answers) -> dict[str, Tensor]:
        """``top-1``, ``top-5``, ...; another class with as high a logit counts against, so constant logits score 0."""
        own = answers.logits.gather(1, answers.labels[:, None])
        above = (answers.logits >= own).sum(1) - 1  # its own class is as high as itself
        return {f"top-{k}": (above < k).double() for k in self.config.k}
