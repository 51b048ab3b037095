"""The plugin under test, and the words of a broken contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from quantlab.contracts.allocation import BitPolicy
from quantlab.contracts.check import shown
from quantlab.contracts.correction import Correction
from quantlab.contracts.method import Method
from quantlab.contracts.passes import SmoothingPass
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.reporter import Reporter
from quantlab.contracts.sampler import CalibrationSampler
from quantlab.contracts.tuning import Loss, Tuner
from quantlab.errors import QuantlabError
from quantlab.evaluation.answers import ClassMetric
from quantlab.evaluation.samples import ImageMetric
from quantlab.plugins import Kind

BASES: Mapping[Kind, type | tuple[type, ...]] = {
    Kind.POLICY: BitPolicy,
    Kind.QUANTIZER: Quantizer,
    Kind.LOSS: Loss,
    Kind.PASS: SmoothingPass,
    Kind.TUNER: Tuner,
    Kind.SAMPLER: CalibrationSampler,
    Kind.CORRECTION: Correction,
    Kind.METRIC: (ImageMetric, ClassMetric),
    Kind.REPORTER: Reporter,
}
"""What a plugin's class of each kind derives from; a source of models from nothing."""


class ContractError(AssertionError):
    """A plugin breaks the contract of its hook."""


@dataclass(frozen=True)
class Subject:
    """A plugin under test.

    Attributes:
        plugin: the class, or the method.
        kind: of the hook.
        options: of its Config.
        model: the name of a model, for a source of models that does not list them.
    """

    plugin: Any
    kind: Kind
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    model: str = ""

    def config(self) -> Any:
        """The checked options."""
        return self.plugin.Config.model_validate(dict(self.options))

    def build(self) -> Any:
        """A new object of the class."""
        return self.plugin(self.config())

    def require(self, holds: bool, contract: str, got: object) -> None:
        """Raise ContractError with the contract and what came, unless it holds."""
        if not holds:
            raise self.broken(contract, got if isinstance(got, str) else shown(got))

    def broken(self, contract: str, got: str) -> ContractError:
        """The error for a part of the contract that does not hold."""
        name = getattr(self.plugin, "name", self.plugin)
        return ContractError(f'{self.kind} "{name}" breaks its contract: {contract}\n  got: {got}')

    def call(self, function: Callable[[], Any], contract: str) -> Any:
        """What the function returns; whatever it raises breaks the contract, the engine's own checks among it."""
        try:
            return function()
        except ContractError:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, QuantlabError) else f"{type(error).__name__}: {error}"
            raise self.broken(contract, text) from error

    def pure(self, function: Callable[[], Any], contract: str) -> Any:
        """What the function returns, which may change no global generator and no default of torch."""
        before, dtype, grad = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
        result = self.call(function, contract)
        same = torch.equal(before, torch.get_rng_state())
        self.require(same, "it draws from the generator it is given, never from torch's own", "another global state")
        settings = (torch.get_default_dtype(), torch.is_grad_enabled())
        self.require(settings == (dtype, grad), "it leaves torch's settings alone", f"{settings}")
        return result


def subject_of(plugin: Any, options: Mapping[str, object] | None = None, model: str = "") -> Subject:
    """The plugin with the kind that its base class tells.

    Raises:
        ContractError: it derives from the base of no kind and loads no models.
    """
    if isinstance(plugin, Method):
        return Subject(plugin, Kind.METHOD)
    if isinstance(plugin, type):
        for kind, base in BASES.items():
            if issubclass(plugin, base):
                return Subject(plugin, kind, options or {})
        if callable(getattr(plugin, "load", None)) and callable(getattr(plugin, "identity", None)):
            return Subject(plugin, Kind.MODEL, options or {}, model)
    every = (base for bases in BASES.values() for base in (bases if isinstance(bases, tuple) else (bases,)))
    bases = ", ".join(base.__name__ for base in every)
    raise ContractError(f"{plugin!r} is no plugin: derive it from one of {bases}, or give it load and identity")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, in dtype and shape too."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def rng(seed: int) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def devices() -> list[str]:
    """What this machine has."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def examples(count: int) -> settings:
    """How many cases are drawn; the same ones every time."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=slow)
