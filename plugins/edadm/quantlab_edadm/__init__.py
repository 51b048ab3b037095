"""EDA-DM: calibration weighted by density and variety, fine-grained block reconstruction."""

from pathlib import Path

from quantlab import CalibrationSampler, Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """EDA-DM and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_samplers() -> list[type[CalibrationSampler]]:
    """Calibration where features are dense and various."""
    from quantlab_edadm.sampler import DensityVariety

    return [DensityVariety]
