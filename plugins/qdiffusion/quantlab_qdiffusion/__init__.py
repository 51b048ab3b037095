"""Q-Diffusion: timestep-aware calibration, split skip connections, block reconstruction."""

from pathlib import Path

from quantlab import CalibrationSampler, Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_methods() -> list[Method]:
    """Q-Diffusion and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_samplers() -> list[type[CalibrationSampler]]:
    """Calibration at evenly spaced steps."""
    from quantlab_qdiffusion.sampler import UniformTimesteps

    return [UniformTimesteps]
