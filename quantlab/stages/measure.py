"""What images are compared with, and by which network and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.contracts.check import check_metric, plugin_call
from quantlab.contracts.model import Evidence, GenerativeTask, Outcome, Progress
from quantlab.contracts.sections import Evaluate, Features
from quantlab.errors import ModelError, NonFiniteError
from quantlab.evaluation.bootstrap import AnySamples, Metric
from quantlab.evaluation.features import FeatureNetwork, feature_network
from quantlab.evaluation.samples import ImageMetric, SampleSet
from quantlab.plugins import Kind, Registry
from quantlab.stages.context import RunContext
from quantlab.stages.outcome import metric_options
from quantlab.store import JSON

COMPARISON_VERSION = 1


def metrics_of(registry: Registry, settings: Evaluate) -> list[ImageMetric]:
    """The metrics that a recipe asks for."""
    return [registry.create(Kind.METRIC, choice) for choice in settings.metrics]


def require(registry: Registry, task: GenerativeTask, settings: Evaluate) -> None:
    """Raise ModelError, before anything is computed, when something that measuring needs is not at hand."""
    network, metrics = feature_network(task, settings), metrics_of(registry, settings)
    offered = {*task.offers, *network.offers}
    for metric in metrics:
        missing = [need for need in Evidence if need in metric.needs and need not in offered]
        if missing:
            fitting = [name for name, entry in registry.entries(Kind.METRIC).items() if _fits(entry.value, offered)]
            raise ModelError(
                f"the metric {metric.name} needs {' and '.join(missing)}, and this model comes without",
                where="evaluate.metrics",
                got=metric.name,
                allowed=", ".join(fitting),
                next_step=f"leave {metric.name} out of evaluate.metrics"
                + (", or set evaluate.features to inception" if settings.features is Features.JUDGE else ""),
            )
        metric.require(task)
    if Evidence.SPATIAL in needed(metrics):
        network.spatial(task.reference_images()[:2])


def _fits(metric: type[ImageMetric], offered: Collection[Evidence]) -> bool:
    return metric.outcome is Outcome.IMAGES and set(metric.needs) <= set(offered)


def needed(metrics: Sequence[ImageMetric]) -> frozenset[Evidence]:
    """Everything that one of the metrics needs."""
    return frozenset(need for metric in metrics for need in metric.needs)


def measured_with(registry: Registry, network: FeatureNetwork, settings: Evaluate) -> dict[str, JSON]:
    """What numbers depend on besides names and versions: options that are not the defaults, and the feature network."""
    return {**metric_options(registry, settings), **network.identity}


@dataclass(frozen=True)
class Comparison:
    """Features of what every method is compared with; None where no metric needs them.

    Attributes:
        teacher: of the float model's images from other noise [N, F].
        real: of real images [M, F].
        real_spatial: spatial ones [M, S].
    """

    teacher: Tensor | None = None
    real: Tensor | None = None
    real_spatial: Tensor | None = None


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
    needs = needed(metrics_of(context.registry, settings))
    spatial = Evidence.SPATIAL in needs
    if not needs & {Evidence.FEATURES, Evidence.SPATIAL}:
        return Comparison
    if settings.features is Features.JUDGE:

        def judged() -> Comparison:
            real = task.reference().features if Evidence.REFERENCE in needs else None
            return Comparison(
                network.features(other)[0],
                None if real is None else real.cpu(),
                network.spatial(task.reference_images()) if spatial else None,
            )

        return judged
    key: dict[str, JSON] = {
        "version": COMPARISON_VERSION,
        "reference": reference,
        "real": task.judged_by(),
        "spatial": spatial,
        "link": link,
        **network.identity,
    }

    def compute(folder: Path, progress: Progress) -> None:
        tensors = {"teacher": network.features(other)[0]}
        if Evidence.REFERENCE in task.offers:
            tensors["real"] = network.features(task.reference_images())[0]
        if spatial:
            tensors["real_spatial"] = network.spatial(task.reference_images())
        save_file(tensors, folder / "features.safetensors")

    stage = context.stage("features", "Features of float and real images", key, compute, link=link)
    return lambda: Comparison(**load_file(stage.file("features.safetensors")))


def values_of(metrics: Sequence[Metric[AnySamples]], samples: AnySamples, arm: str) -> dict[str, float | None]:
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
    needs = needed(metrics)
    features, feature_logits = network.features(images) if Evidence.FEATURES in needs else (None, None)
    return SampleSet(
        images=images,
        labels=task.labels(len(images)).cpu(),
        features=features,
        logits=task.judge(images.to(task.device))[1].cpu() if Evidence.LOGITS in needs else None,
        teacher_images=teacher_images,
        teacher_features=compared.teacher,
        reference_features=compared.real,
        spatial=network.spatial(images) if Evidence.SPATIAL in needs else None,
        reference_spatial=compared.real_spatial,
        feature_logits=feature_logits,
        prompts=task.prompts(len(images)),
    )
