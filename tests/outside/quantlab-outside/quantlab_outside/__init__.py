"""A plugin of every kind, and a listener, from outside the repository's own packages."""

from __future__ import annotations

from quantlab import Method, StageEvent, hookimpl

quantlab_api = 1


@hookimpl
def quantlab_methods() -> list[Method]:
    """One method."""
    from quantlab_outside.method_plugin import METHOD

    return [METHOD]


@hookimpl
def quantlab_models() -> list[type]:
    """One model."""
    from quantlab_outside.model_plugin import OutsideModel

    return [OutsideModel]


@hookimpl
def quantlab_passes() -> list[type]:
    """One pass."""
    from quantlab_outside.pass_plugin import OutsidePass

    return [OutsidePass]


@hookimpl
def quantlab_bit_policies() -> list[type]:
    """One policy."""
    from quantlab_outside.policy_plugin import OutsidePolicy

    return [OutsidePolicy]


@hookimpl
def quantlab_samplers() -> list[type]:
    """One sampler."""
    from quantlab_outside.sampler_plugin import OutsideSampler

    return [OutsideSampler]


@hookimpl
def quantlab_quantizers() -> list[type]:
    """One quantizer."""
    from quantlab_outside.quantizer_plugin import OutsideQuantizer

    return [OutsideQuantizer]


@hookimpl
def quantlab_tuners() -> list[type]:
    """One tuner."""
    from quantlab_outside.tuner_plugin import OutsideTuner

    return [OutsideTuner]


@hookimpl
def quantlab_losses() -> list[type]:
    """One loss."""
    from quantlab_outside.loss_plugin import OutsideLoss

    return [OutsideLoss]


@hookimpl
def quantlab_corrections() -> list[type]:
    """One correction."""
    from quantlab_outside.correction_plugin import OutsideCorrection

    return [OutsideCorrection]


@hookimpl
def quantlab_metrics() -> list[type]:
    """One metric."""
    from quantlab_outside.metric_plugin import OutsideMetric

    return [OutsideMetric]


@hookimpl
def quantlab_reporters() -> list[type]:
    """One reporter."""
    from quantlab_outside.reporter_plugin import OutsideReporter

    return [OutsideReporter]


@hookimpl
def quantlab_event(event: StageEvent) -> None:
    """Write the stages of a run down."""
    with (event.run_folder / "heard.txt").open("a") as file:
        print(event.stage, file=file)
