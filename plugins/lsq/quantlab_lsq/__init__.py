"""LSQ: quantization-aware training with learned step sizes on real data."""

from pathlib import Path

from quantlab import Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """LSQ and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
