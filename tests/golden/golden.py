"""Reads the golden cases and compares with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Case:
    """One golden case."""

    id: str
    group: str
    params: dict[str, Any]
    entry: dict[str, Any]

    def __getitem__(self, field: str) -> Tensor:
        return torch.from_numpy(_arrays(self.group)[f"{self.id}/{field}"].copy())

    def __contains__(self, field: str) -> bool:
        return field in self.entry["fields"]


@cache
def _arrays(group: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{group}.npz") as file:
        return dict(file)


@cache
def _index() -> dict[str, Any]:
    return json.loads((DATA / "index.json").read_text())


def cases(group: str, prefix: str = "") -> list[Case]:
    """Every case of a group whose id starts with ``prefix``."""
    entries = [entry for entry in _index()["cases"] if entry["group"] == group and entry["id"].startswith(prefix)]
    return [Case(entry["id"], group, entry["params"], entry) for entry in entries]


def assert_close(actual: Tensor, expected: Tensor, *, rtol: float, atol: float = 0.0, what: str = "") -> None:
    """The largest error is within rtol of the largest reference value, or within atol."""
    actual = actual.detach().reshape(expected.shape)
    error = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    assert error <= rtol * largest or error <= atol, f"{what}: error {error:.3e}, largest reference {largest:.3e}"
