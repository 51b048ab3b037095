"""MixDQ: bits of whole layers by the signal-to-noise ratio of the output and an integer program."""

from pathlib import Path

from quantlab import Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """MixDQ and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
