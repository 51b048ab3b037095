"""PTQD: quantization noise corrected while sampling."""

from pathlib import Path

from quantlab import Correction, Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """PTQD and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_corrections() -> list[type[Correction]]:
    """Correlated noise, bias and variance of the quantized prediction."""
    from quantlab_ptqd.noise import NoiseCorrection

    return [NoiseCorrection]
