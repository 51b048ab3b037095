"""Which evaluation fits which task: the one place that tells tasks apart."""

from __future__ import annotations

from typing import Any

from quantlab.contracts.model import ClassificationTask, GenerativeTask, Task
from quantlab.errors import ModelError
from quantlab.stages.classify import ClassEvaluation
from quantlab.stages.evaluate import ImageEvaluation
from quantlab.stages.outcome import Evaluation

EVALUATIONS: tuple[tuple[type[Task], type[Evaluation[Any]]], ...] = (
    (GenerativeTask, ImageEvaluation),
    (ClassificationTask, ClassEvaluation),
)


def evaluation_of(task: Task) -> type[Evaluation[Any]]:
    """The evaluation of a task's outcome; raises ModelError for a task that has nothing to measure."""
    for kind, evaluation in EVALUATIONS:
        if isinstance(task, kind):
            return evaluation
    raise ModelError(
        "nothing can be measured about this model",
        where="model",
        got=type(task).__name__,
        allowed=", ".join(kind.__name__ for kind, _ in EVALUATIONS),
        next_step="give it labelled data or a sampler, or quantize the module in memory: quantlab.quantize",
    )
