"""Post-training quantization: ranges, and methods that change weights and biases directly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab import Method, hookimpl, method_from_yaml

if TYPE_CHECKING:
    from quantlab import Tuner


@hookimpl
def quantlab_methods() -> list[Method]:
    """Ranges, smoothing, rounding and correction."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_tuners() -> list[type[Tuner]]:
    """GPTQ's rounding and bias correction."""
    from quantlab_ptq.tuners import BiasCorrectionTuner, GptqTuner

    return [GptqTuner, BiasCorrectionTuner]
