"""What images are compared with, and by which network and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.contracts.check import check_metric, plugin_call
from quantlab.contracts.model import GenerativeTask, Progress
from quantlab.contracts.sections import Evaluate, Features
from quantlab.errors import NonFiniteError
from quantlab.evaluation.features import FeatureNetwork, feature_network
from quantlab.evaluation.samples import ImageMetric, SampleSet
from quantlab.plugins import Kind, Registry
from quantlab.stages.context import RunContext
from quantlab.store import JSON

COMPARISON_VERSION = 1


def metrics_of(registry: Registry, settings: Evaluate) -> list[ImageMetric]:
    """The metrics that a recipe asks for."""
    return [registry.create(Kind.METRIC, choice) for choice in settings.metrics]


def require(registry: Registry, task: GenerativeTask, settings: Evaluate) -> None:
    """Raise ModelError, before anything is computed, when something that measuring needs is not at hand."""
    network, metrics = feature_network(task, settings), metrics_of(registry, settings)
    for metric in metrics:
        metric.require(task)
    if any(metric.needs_spatial for metric in metrics):
        network.spatial(task.reference_images()[:2])


def measured_with(registry: Registry, network: FeatureNetwork, settings: Evaluate) -> dict[str, JSON]:
    """What numbers depend on besides names and versions: options that are not the defaults, and the feature network."""
    options = {
        choice.name: registry.config(Kind.METRIC, choice).model_dump(mode="json", exclude_defaults=True)
        for choice in settings.metrics
    }
    changed: dict[str, JSON] = {name: values for name, values in options.items() if values}
    return {**({"metric_options": changed} if changed else {}), **network.identity}


@dataclass(frozen=True)
class Comparison:
    """Features of what every method is compared with.

    Attributes:
        teacher: of the float model's images from other noise [N, F].
        real: of real images [M, F].
        real_spatial: spatial ones [M, S], when a metric needs them.
    """

    teacher: Tensor
    real: Tensor
    real_spatial: Tensor | None


def comparison(
    context: RunContext,
    task: GenerativeTask,
    network: FeatureNetwork,
    other: Tensor,
    reference: str,
    settings: Evaluate,
    link: str = "features",
) -> Callable[[], Comparison]:
    """A function that gives the features of float and real images; those of a slow network are a stage of their own.

    Args:
        other: the float model's images from other noise [N, C, H, W].
        reference: digest of the stage that drew them.
        link: where the run folder leads to their features.
    """
    spatial = any(metric.needs_spatial for metric in metrics_of(context.registry, settings))
    if settings.features is Features.JUDGE:
        return lambda: Comparison(
            network.features(other)[0],
            task.reference().features.cpu(),
            network.spatial(task.reference_images()) if spatial else None,
        )
    key: dict[str, JSON] = {
        "version": COMPARISON_VERSION,
        "reference": reference,
        "real": task.reference().digest,
        "spatial": spatial,
        "link": link,
        **network.identity,
    }

    def compute(folder: Path, progress: Progress) -> None:
        real = task.reference_images()
        tensors = {"teacher": network.features(other)[0], "real": network.features(real)[0]}
        if spatial:
            tensors["real_spatial"] = network.spatial(real)
        save_file(tensors, folder / "features.safetensors")

    stage = context.stage("features", "Features of float and real images", key, compute, link=link)
    return lambda: Comparison(**{"real_spatial": None, **load_file(stage.file("features.safetensors"))})


def values_of(metrics: Sequence[ImageMetric], samples: SampleSet, arm: str) -> dict[str, float | None]:
    """Every metric's values by name; None for infinity. Raises NonFiniteError for what is not a number."""
    values: dict[str, float | None] = {}
    for metric in metrics:
        with plugin_call("metric", metric, "compute"):
            found = check_metric(metric, metric.compute(samples))
        for name, value in found.items():
            if math.isnan(value):
                raise NonFiniteError("a metric is not a number", where=f"metric {name}", got=f"{arm}, {value}")
            # Equal images have an infinite PSNR, which JSON cannot hold.
            values[name] = value if math.isfinite(value) else None
    return values


def sample_set(
    task: GenerativeTask,
    network: FeatureNetwork,
    images: Tensor,
    teacher_images: Tensor,
    compared: Comparison,
    metrics: Sequence[ImageMetric],
) -> SampleSet:
    """Images with everything that the metrics compare them with."""
    features, feature_logits = network.features(images)
    return SampleSet(
        images=images,
        labels=task.labels(len(images)).cpu(),
        features=features,
        logits=task.judge(images.to(task.device))[1].cpu(),
        teacher_images=teacher_images,
        teacher_features=compared.teacher,
        reference_features=compared.real,
        spatial=network.spatial(images) if any(metric.needs_spatial for metric in metrics) else None,
        reference_spatial=compared.real_spatial,
        feature_logits=feature_logits,
        prompts=task.prompts(len(images)),
    )
