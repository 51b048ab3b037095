"""LSQ: quantization-aware training with learned step sizes on real data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab import Method, hookimpl, method_from_yaml

if TYPE_CHECKING:
    from quantlab import Tuner


@hookimpl
def quantlab_methods() -> list[Method]:
    """LSQ and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_tuners() -> list[type[Tuner]]:
    """Training of weights and scales."""
    from quantlab_lsq.tuner import LsqTuner

    return [LsqTuner]
