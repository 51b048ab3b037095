"""PTQ4DM: calibration samples from the reverse process at normally distributed timesteps."""

from pathlib import Path

from quantlab import CalibrationSampler, Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """PTQ4DM and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_samplers() -> list[type[CalibrationSampler]]:
    """Calibration at timesteps from a normal distribution."""
    from quantlab_ptq4dm.sampler import NormalTimesteps

    return [NormalTimesteps]
