"""What metrics of a classifier look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel
from torch import Tensor

from quantlab.contracts.model import ClassificationTask, Outcome
from quantlab.evaluation.interval import interval, wilson


@dataclass(frozen=True)
class Answers:
    """What a network says about inputs whose class is known.

    Attributes:
        logits: [N, K].
        labels: int64 [N].
        float_logits: of the float network for the same inputs [N, K].
    """

    logits: Tensor
    labels: Tensor
    float_logits: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: Tensor) -> Answers:
        """The answers about some of the inputs, or about some of them several times."""
        return Answers(self.logits[index], self.labels[index], self.float_logits[index])


class ClassMetric(ABC):
    """The mean of a number for each input.

    Attributes:
        share: each number is 0 or 1, so that the mean is a share of the inputs.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    outcome: ClassVar[Outcome] = Outcome.CLASSES
    resamples: ClassVar[bool] = True
    share: ClassVar[bool] = False
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    def require(self, task: ClassificationTask) -> None:  # noqa: B027 - most metrics need nothing
        """Raise ModelError, before anything is computed, when what the metric needs is not at hand."""

    @abstractmethod
    def values(self, answers: Answers) -> dict[str, Tensor]:
        """One or more named numbers for each input, float64 [N]."""

    def compute(self, answers: Answers) -> dict[str, float]:
        """Their means."""
        return {name: values.mean().item() for name, values in self.values(answers).items()}

    def intervals(self, answers: Answers) -> dict[str, tuple[float, float]]:
        """95 % intervals over inputs: Wilson's of a share, Student's t of another mean."""
        found: dict[str, tuple[float, float]] = {}
        for name, values in self.values(answers).items():
            if self.share:
                found[name] = wilson(round(values.sum().item()), len(values))
            else:
                around = interval([float(value) for value in values])
                found[name] = (around.low, around.high)
        return found
