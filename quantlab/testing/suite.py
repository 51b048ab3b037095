"""Every check of a kind, and the test that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantlab.plugins import Kind
from quantlab.testing import (
    common,
    corrections,
    losses,
    methods,
    metrics,
    models,
    passes,
    policies,
    quantizers,
    reporters,
    samplers,
    tuners,
)
from quantlab.testing.contract import Subject, subject_of

Check = Callable[[Subject], None]
"""Raises ContractError when a part of the contract does not hold."""

_CHECKS: Mapping[Kind, Sequence[Check]] = {
    Kind.POLICY: policies.CHECKS,
    Kind.QUANTIZER: quantizers.CHECKS,
    Kind.LOSS: losses.CHECKS,
    Kind.PASS: passes.CHECKS,
    Kind.TUNER: tuners.CHECKS,
    Kind.SAMPLER: samplers.CHECKS,
    Kind.CORRECTION: corrections.CHECKS,
    Kind.METRIC: metrics.CHECKS,
    Kind.REPORTER: reporters.CHECKS,
    Kind.MODEL: models.CHECKS,
}


def checks_of(kind: Kind) -> tuple[Check, ...]:
    """The parts of the contract of a kind, those that every class keeps first."""
    return methods.CHECKS if kind is Kind.METHOD else (*common.CHECKS, *_CHECKS[kind])


def check(plugin: Any, options: Mapping[str, object] | None = None, model: str = "") -> None:
    """Run every check of a plugin.

    Args:
        plugin: a class of any kind, or a method.
        options: of its Config; the defaults without them.
        model: the name of a model, for a source that does not list its models.

    Raises:
        ContractError: with the contract and what came.
    """
    subject = subject_of(plugin, options, model)
    for part in checks_of(subject.kind):
        part(subject)


def conformance(plugin: Any, options: Mapping[str, object] | None = None, model: str = "") -> Callable[[Check], None]:
    """A pytest function with a case for each part of the contract; arguments and errors as of ``check``."""
    import pytest

    subject = subject_of(plugin, options, model)

    @pytest.mark.parametrize("part", checks_of(subject.kind), ids=lambda part: part.__name__)
    def test_contract(part: Check) -> None:
        part(subject)

    return test_contract
