"""How a task's outcome is measured, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from quantlab.allocation.plan import Plan
from quantlab.contracts.model import Outcome, Task
from quantlab.contracts.sections import Evaluate, Sampling
from quantlab.errors import RecipeError
from quantlab.plugins import Kind, Registry
from quantlab.stages.context import RunContext
from quantlab.stages.prepare import Captured
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON, StageFolder, digest_of


@dataclass(frozen=True)
class Measured:
    """Metric values of one method, and 95 % intervals by metric where there are any; its images, if it draws any."""

    metrics: dict[str, float | None]
    images: Tensor | None
    stage: StageFolder
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal for two rows to be compared; a method's own seed is not part of it."""

    fields: Mapping[str, JSON]

    @property
    def digest(self) -> str:
        """The protocol id."""
        return digest_of(self.fields)


AnyTask = TypeVar("AnyTask", bound=Task)


class Evaluation(ABC, Generic[AnyTask]):
    """Measures the float network, once for all methods, and every method beside it.

    Attributes:
        outcome: what the metrics that fit look at.
    """

    outcome: ClassVar[Outcome]

    @staticmethod
    @abstractmethod
    def require(registry: Registry, task: AnyTask, settings: Evaluate) -> None:
        """Raise ModelError, before anything is computed, when something that measuring needs is not at hand."""

    @abstractmethod
    def __init__(
        self, context: RunContext, task: AnyTask, captured: Captured, sampling: Sampling, settings: Evaluate
    ) -> None:
        """Compute or find what the float network gives."""

    @abstractmethod
    def measure(self, quantized: Quantized | None, arm: str) -> Measured:
        """The metrics of a method, or of the float network itself."""

    @abstractmethod
    def other_noise(self) -> dict[str, float | None]:
        """The float network's metrics with other noise; empty where nothing is drawn."""

    @abstractmethod
    def protocol(self, plan: Plan) -> Protocol:
        """What a row of this run may be compared by."""


def require_outcome(registry: Registry, settings: Evaluate, outcome: Outcome) -> None:
    """Raise RecipeError for metrics of another outcome than the model's, naming those that fit."""
    wrong = [choice.name for choice in settings.metrics if outcome_of(registry, choice.name) is not outcome]
    if wrong:
        fitting = [name for name in registry.entries(Kind.METRIC) if outcome_of(registry, name) is outcome]
        raise RecipeError(
            f"the model gives {outcome}, and these metrics measure something else",
            where="evaluate.metrics",
            got=", ".join(wrong),
            allowed=", ".join(fitting),
            next_step=f"set evaluate.metrics to some of these: [{', '.join(fitting[:3])}]",
        )


def outcome_of(registry: Registry, metric: str) -> Outcome:
    """What a metric looks at."""
    return registry.find(Kind.METRIC, metric).value.outcome


def metric_options(registry: Registry, settings: Evaluate) -> dict[str, JSON]:
    """Options of metrics that are not the defaults, for stage keys and the protocol id."""
    options = {
        choice.name: registry.config(Kind.METRIC, choice).model_dump(mode="json", exclude_defaults=True)
        for choice in settings.metrics
    }
    changed: dict[str, JSON] = {name: values for name, values in options.items() if values}
    return {"metric_options": changed} if changed else {}


def metric_versions(context: RunContext, settings: Evaluate) -> dict[str, JSON]:
    """The versions of the metrics, for stage keys and the protocol id."""
    return context.versions(*((Kind.METRIC, choice) for choice in settings.metrics))


def metric_names(settings: Evaluate) -> Sequence[JSON]:
    """The metrics by name, for a stage's key."""
    return [choice.name for choice in settings.metrics]
