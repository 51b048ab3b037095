"""Reference images and measured rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.allocation.plan import Plan
from quantlab.allocation.student import tapped_run
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import GenerativeTask, Progress, Run
from quantlab.contracts.sections import Evaluate, Sampling
from quantlab.errors import NonFiniteError
from quantlab.evaluation.bootstrap import bootstrap
from quantlab.evaluation.features import feature_network
from quantlab.plugins import Kind
from quantlab.stages.context import RunContext, as_json
from quantlab.stages.measure import comparison, measured_with, metrics_of, sample_set, values_of
from quantlab.stages.prepare import Captured, fingerprint, layer_set_digest
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON, StageFolder, digest_of

REFERENCE_VERSION = 1
EVALUATE_VERSION = 1
OTHER_NOISE_VERSION = 1
STEP_NOISE = 1_000_000_007
"""Added to the noise seed and an image's index for the noise that eta > 0 adds to that image."""
BOOTSTRAP_NOISE = 2_000_000_011
"""Added to the noise seed for the images that a bootstrap draws."""


@dataclass(frozen=True)
class ReferenceImages:
    """What the float model draws.

    Attributes:
        images: from the evaluation's noise [N, C, H, W].
        other: from other noise.
    """

    images: Tensor
    other: Tensor
    stage: StageFolder


@dataclass(frozen=True)
class Measured:
    """Metric values of one method, and its images; 95 % intervals by metric where a bootstrap was asked for."""

    metrics: dict[str, float | None]
    images: Tensor
    stage: StageFolder
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal for two rows to be compared; a method's own seed is not part of it."""

    fields: Mapping[str, JSON]

    @property
    def digest(self) -> str:
        """The protocol id."""
        return digest_of(self.fields)


def draw(
    task: GenerativeTask,
    run: Run,
    settings: Evaluate,
    seed: int,
    progress: Progress,
    corrections: Sequence[FittedCorrection] = (),
) -> Tensor:
    """``settings.samples`` images; an image's noise does not depend on the batch it is drawn in.

    Raises:
        NonFiniteError: an image holds NaN or infinity.
    """
    noise, labels = task.draw_noise(settings.samples, seed), task.labels(settings.samples)
    images = []
    for start in range(0, settings.samples, settings.batch):
        part = slice(start, start + settings.batch)
        seeds = range(seed + STEP_NOISE + start, seed + STEP_NOISE + start + len(noise[part]))
        images.append(task.sample(run, noise[part], labels[part], seeds, corrections))
        progress(min(start + settings.batch, settings.samples), settings.samples)
    drawn = torch.cat(images).cpu()
    broken = int((~torch.isfinite(drawn.flatten(1))).any(1).sum())
    if broken:
        raise NonFiniteError(
            "the model draws images with NaN or infinity",
            where="evaluate",
            got=f"{broken} of {len(drawn)} images",
            next_step="raise the bits of the sites it is most sensitive to (keep), or use --dtype float32",
        )
    return drawn


def reference(
    context: RunContext, task: GenerativeTask, captured: Captured, sampling: Sampling, settings: Evaluate
) -> ReferenceImages:
    """Draw with the float model, once for all methods."""
    key: dict[str, JSON] = {
        "version": REFERENCE_VERSION,
        "capture": captured.stage.digest,
        "sampling": as_json(sampling),
        "samples": settings.samples,
        "batch": settings.batch,
        "noise_seed": settings.noise_seed,
    }

    def compute(folder: Path, progress: Progress) -> None:
        tapped = tapped_run(task.network, captured.graph, ())
        count = settings.samples

        def run(inputs: object) -> Tensor:
            return tapped(inputs)[0]  # type: ignore[arg-type]

        images = draw(task, run, settings, settings.noise_seed, lambda done, _: progress(done, 2 * count))
        seed = settings.noise_seeds[1]
        other = draw(task, run, settings, seed, lambda done, _: progress(count + done, 2 * count))
        save_file({"images": images, "other": other}, folder / "images.safetensors")

    stage = context.stage("reference", "Draw float reference images", key, compute, link="reference")
    tensors = load_file(stage.file("images.safetensors"))
    return ReferenceImages(tensors["images"], tensors["other"], stage)


def evaluate(
    context: RunContext,
    task: GenerativeTask,
    reference_images: ReferenceImages,
    quantized: Quantized | None,
    settings: Evaluate,
    arm: str,
) -> Measured:
    """Draw with a quantized model, or take the float model's own images, and compute the metrics."""
    network = feature_network(task, settings)
    key: dict[str, JSON] = {
        "version": EVALUATE_VERSION,
        "reference": reference_images.stage.digest,
        "judged_by": task.reference().digest,
        "model": quantized.stage.digest if quantized else "float",
        "metrics": [choice.name for choice in settings.metrics],
        "plugins": context.versions(*((Kind.METRIC, choice) for choice in settings.metrics)),
        **measured_with(context.registry, network, settings),
    }
    if settings.bootstrap:
        key["bootstrap"] = settings.bootstrap

    compared = comparison(context, task, network, reference_images.other, reference_images.stage.digest, settings)

    def compute(folder: Path, progress: Progress) -> None:
        if quantized is None:
            images = reference_images.images
        else:
            run, corrections = quantized.student.run, quantized.corrections
            images = draw(task, run, settings, settings.noise_seed, progress, corrections)
        metrics = metrics_of(context.registry, settings)
        samples = sample_set(task, network, images, reference_images.images, compared(), metrics)
        values = values_of(metrics, samples, arm)
        (folder / "metrics.json").write_text(json.dumps(values, indent=1))
        if settings.bootstrap:
            rng = torch.Generator().manual_seed(settings.noise_seed + BOOTSTRAP_NOISE)
            found = bootstrap(metrics, samples, values, settings.bootstrap, rng, progress)
            (folder / "intervals.json").write_text(json.dumps(found, indent=1))
        save_file({"images": images}, folder / "images.safetensors")

    stage = context.stage("evaluate", f"{arm}: draw and measure", key, compute, link=f"{arm}/evaluate")
    metrics = json.loads(stage.file("metrics.json").read_text())
    intervals = json.loads(stage.file("intervals.json").read_text()) if settings.bootstrap else {}
    pairs = {name: (low, high) for name, (low, high) in intervals.items()}
    return Measured(metrics, load_file(stage.file("images.safetensors"))["images"], stage, pairs)


def other_noise(
    context: RunContext, task: GenerativeTask, reference_images: ReferenceImages, settings: Evaluate
) -> dict[str, float | None]:
    """The metrics of the float model's images from other noise: how far they lie from its own row is noise alone."""
    network = feature_network(task, settings)
    metrics = [metric for metric in metrics_of(context.registry, settings) if not metric.paired]
    key: dict[str, JSON] = {
        "version": OTHER_NOISE_VERSION,
        "reference": reference_images.stage.digest,
        "judged_by": task.reference().digest,
        "metrics": {metric.name: metric.version for metric in metrics},
        **measured_with(context.registry, network, settings),
    }
    # The two sets of float images change places.
    images, teacher = reference_images.other, reference_images.images
    compared = comparison(
        context, task, network, teacher, reference_images.stage.digest, settings, link="other-noise/features"
    )

    def compute(folder: Path, progress: Progress) -> None:
        samples = sample_set(task, network, images, images, compared(), metrics)
        values = values_of(metrics, samples, "float, other noise")
        (folder / "metrics.json").write_text(json.dumps(values, indent=1))

    stage = context.stage("noise", "float, other noise: measure", key, compute, link="other-noise/evaluate")
    return json.loads(stage.file("metrics.json").read_text())


def protocol(context: RunContext, task: GenerativeTask, sampling: Sampling, settings: Evaluate, plan: Plan) -> Protocol:
    """What a row of this run may be compared by."""
    network = feature_network(task, settings)
    return Protocol(
        {
            "weights": fingerprint(task),
            "reference_set": task.reference().digest,
            "sampling": as_json(sampling),
            "samples": settings.samples,
            "noise_seed": settings.noise_seed,
            "metrics": context.versions(*((Kind.METRIC, choice) for choice in settings.metrics)),
            "layers": layer_set_digest(plan),
            **measured_with(context.registry, network, settings),
        }
    )
