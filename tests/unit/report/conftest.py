"""Rows for tests of tables."""

from __future__ import annotations

import pytest

from quantlab.report.rows import Row


@pytest.fixture
def make_row():
    def make(method: str = "mse", fid: float | None = 3.0, seed: int = 1, **changes: object) -> Row:
        fields: dict = {
            "method": method,
            "model": "digits",
            "weight_bits": 2.0,
            "activation_bits": 4.0,
            "size_bytes": 1000,
            "float_bytes": 8000,
            "coverage": 0.9,
            "metrics": {"fid-to-teacher": fid, "accuracy": 0.9},
            "seconds": 12.0,
            "protocol": "p",
            "seed": seed,
            "data_free": True,
            "simulated": True,
            "allocation": "a",
        }
        return Row(**{**fields, **changes})

    return make
