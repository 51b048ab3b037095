"""Post-training quantization without any tuning."""

from pathlib import Path

from quantlab import Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """Ranges from extremes, and ranges of least error."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
