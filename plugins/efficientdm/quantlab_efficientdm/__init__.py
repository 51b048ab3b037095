"""EfficientDM: quantization-aware low-rank adapters and per-timestep activation scales."""

from pathlib import Path

from quantlab import Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """EfficientDM."""
    return [method_from_yaml(Path(__file__).with_name("methods") / "efficientdm.yaml")]
