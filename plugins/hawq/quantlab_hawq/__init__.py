"""HAWQ-V3: bits of whole layers by Hessian trace and an integer program."""

from pathlib import Path

from quantlab import Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """HAWQ-V3 and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
