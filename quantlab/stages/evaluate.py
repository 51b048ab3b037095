"""The float network's images, and those of every method beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.allocation.plan import Plan
from quantlab.allocation.student import tapped_run
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import GenerativeTask, Outcome, Progress, Run
from quantlab.contracts.sections import Evaluate, Sampling
from quantlab.errors import NonFiniteError
from quantlab.evaluation.bootstrap import bootstrap
from quantlab.evaluation.features import feature_network
from quantlab.plugins import Registry
from quantlab.processes import ALONE, Processes
from quantlab.stages.context import RunContext, as_json
from quantlab.stages.measure import comparison, measured_with, metrics_of, require, sample_set, values_of
from quantlab.stages.outcome import Evaluation, Measured, Protocol, metric_names, metric_versions
from quantlab.stages.prepare import Captured, fingerprint, layer_set_digest
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON, StageFolder

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


class ImageEvaluation(Evaluation[GenerativeTask]):
    """Images that a denoiser draws, beside what the float network draws from the same noise."""

    outcome: ClassVar[Outcome] = Outcome.IMAGES

    @staticmethod
    def require(registry: Registry, task: GenerativeTask, settings: Evaluate) -> None:
        """What the metrics need of the task, and the network that gives features."""
        require(registry, task, settings)

    def __init__(
        self, context: RunContext, task: GenerativeTask, captured: Captured, sampling: Sampling, settings: Evaluate
    ) -> None:
        self.context, self.task, self.sampling, self.settings = context, task, sampling, settings
        self.drawn = reference(context, task, captured, sampling, settings)

    def measure(self, quantized: Quantized | None, arm: str) -> Measured:
        """The metrics of the images that are drawn."""
        return evaluate(self.context, self.task, self.drawn, quantized, self.settings, arm)

    def other_noise(self) -> dict[str, float | None]:
        """The metrics of the float network's images from other noise."""
        return other_noise(self.context, self.task, self.drawn, self.settings)

    def protocol(self, plan: Plan) -> Protocol:
        """The real images, the noise, the sampler and the metrics."""
        return protocol(self.context, self.task, self.sampling, self.settings, plan)


def draw(
    task: GenerativeTask,
    run: Run,
    settings: Evaluate,
    seed: int,
    progress: Progress,
    corrections: Sequence[FittedCorrection] = (),
    processes: Processes = ALONE,
) -> Tensor:
    """``settings.samples`` images; an image's noise does not depend on the batch it is drawn in.

    The first of several ``processes`` draws its share of the batches, and gets the others' from their ``help_draw``.

    Raises:
        NonFiniteError: an image holds NaN or infinity.
    """
    own = _drawn_share(task, run, settings, seed, progress, corrections, processes)
    drawn = torch.cat(processes.collect(own, _num_batches(settings)))
    broken = int((~torch.isfinite(drawn.flatten(1))).any(1).sum())
    if broken:
        raise NonFiniteError(
            "the model draws images with NaN or infinity",
            where="evaluate",
            got=f"{broken} of {len(drawn)} images",
            next_step="raise the bits of the sites it is most sensitive to (keep), or use --dtype float32",
        )
    return drawn


def help_draw(
    task: GenerativeTask,
    run: Run,
    settings: Evaluate,
    seed: int,
    corrections: Sequence[FittedCorrection],
    processes: Processes,
) -> None:
    """In every process but the first: its share of what ``draw`` gives there."""
    processes.hand_in(_drawn_share(task, run, settings, seed, lambda done, total: None, corrections, processes))


def _drawn_share(
    task: GenerativeTask,
    run: Run,
    settings: Evaluate,
    seed: int,
    progress: Progress,
    corrections: Sequence[FittedCorrection],
    processes: Processes,
) -> dict[int, Tensor]:
    """The batches of this process by their index: the same batches of the same noise for any number of processes."""
    noise, labels = task.draw_noise(settings.samples, seed), task.labels(settings.samples)
    images: dict[int, Tensor] = {}
    for index in processes.share(_num_batches(settings)):
        start = index * settings.batch
        part = slice(start, start + settings.batch)
        seeds = range(seed + STEP_NOISE + start, seed + STEP_NOISE + start + len(noise[part]))
        images[index] = task.sample(run, noise[part], labels[part], seeds, corrections).cpu()
        progress(min(start + settings.batch * processes.count, settings.samples), settings.samples)
    return images


def _num_batches(settings: Evaluate) -> int:
    return math.ceil(settings.samples / settings.batch)


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

    processes, count = context.processes, settings.samples
    seed, other_seed = settings.noise_seeds

    def float_run() -> Run:
        tapped = tapped_run(task.network, captured.graph, ())
        return lambda inputs: tapped(inputs)[0]

    def compute(folder: Path, progress: Progress) -> None:
        run = float_run()
        images = draw(task, run, settings, seed, lambda done, _: progress(done, 2 * count), processes=processes)
        other = draw(
            task, run, settings, other_seed, lambda done, _: progress(count + done, 2 * count), processes=processes
        )
        save_file({"images": images, "other": other}, folder / "images.safetensors")

    def assist() -> None:
        run = float_run()
        for noise_seed in (seed, other_seed):
            help_draw(task, run, settings, noise_seed, (), processes)

    stage = context.stage("reference", "Draw float reference images", key, compute, link="reference", assist=assist)
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
        "judged_by": task.judged_by(),
        "model": quantized.stage.digest if quantized else "float",
        "metrics": metric_names(settings),
        "plugins": metric_versions(context, settings),
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
            images = draw(task, run, settings, settings.noise_seed, progress, corrections, context.processes)
        metrics = metrics_of(context.registry, settings)
        samples = sample_set(task, network, images, reference_images.images, compared(), metrics)
        values = values_of(metrics, samples, arm)
        (folder / "metrics.json").write_text(json.dumps(values, indent=1))
        if settings.bootstrap:
            rng = torch.Generator().manual_seed(settings.noise_seed + BOOTSTRAP_NOISE)
            found = bootstrap(metrics, samples, values, settings.bootstrap, rng, progress)
            (folder / "intervals.json").write_text(json.dumps(found, indent=1))
        save_file({"images": images}, folder / "images.safetensors")

    def assist() -> None:
        if quantized is not None:
            run, corrections = quantized.student.run, quantized.corrections
            help_draw(task, run, settings, settings.noise_seed, corrections, context.processes)

    title, link = f"{arm}: draw and measure", f"{arm}/evaluate"
    stage = context.stage("evaluate", title, key, compute, link=link, assist=assist)
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
        "judged_by": task.judged_by(),
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
            "reference_set": task.judged_by(),
            "sampling": as_json(sampling),
            "samples": settings.samples,
            "noise_seed": settings.noise_seed,
            "metrics": metric_versions(context, settings),
            "layers": layer_set_digest(plan),
            **measured_with(context.registry, network, settings),
        }
    )
