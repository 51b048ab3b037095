"""Every built-in and bundled plugin keeps the contract of its hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from quantlab.plugins import Kind, load_registry
from quantlab.testing import Subject, checks_of, subject_of

OPTIONS: Mapping[str, Mapping[str, object]] = {"manual": {"rules": [{"match": "*", "weight_bits": 2}]}}
"""Of plugins whose options have no defaults."""
FROM_FILES = ("compvis", "diffusers", "python", "timm")
"""Sources of models that load what a person brings; ``tests/unit/models`` holds them to folders made for a test."""
CASES = [
    pytest.param(subject_of(entry.value, OPTIONS.get(entry.name)), check, id=f"{kind}-{entry.name}-{check.__name__}")
    for kind in Kind
    for entry in load_registry().entries(kind).values()
    if not (kind is Kind.MODEL and entry.name in FROM_FILES)
    for check in checks_of(kind)
]


@pytest.mark.parametrize(("subject", "check"), CASES)
def test_it_keeps_its_contract(subject: Subject, check: Callable[[Subject], None]) -> None:
    check(subject)
