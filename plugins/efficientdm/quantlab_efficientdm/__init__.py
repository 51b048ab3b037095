"""EfficientDM: quantization-aware low-rank adapters and per-timestep activation scales."""

from pathlib import Path

from quantlab import Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """EfficientDM, and its tuning on bits of unequal channels."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
