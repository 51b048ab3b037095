"""QuEST: selective fine-tuning of a quantized model."""

from pathlib import Path

from quantlab import Method, Tuner, hookimpl, method_from_yaml


@hookimpl
def quantlab_tuners() -> list[type[Tuner]]:
    """Selective fine-tuning."""
    from quantlab_quest.selective import SelectiveTuner

    return [SelectiveTuner]


@hookimpl
def quantlab_methods() -> list[Method]:
    """QuEST and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
