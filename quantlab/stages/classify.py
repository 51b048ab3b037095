"""The answers of a classifier about labelled inputs, and those of every method beside the float network's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.allocation.plan import Plan
from quantlab.allocation.student import tapped_run
from quantlab.contracts.model import ClassificationTask, Outcome, Progress, Run
from quantlab.contracts.sections import Evaluate, Sampling
from quantlab.errors import ModelError, NonFiniteError
from quantlab.evaluation.answers import Answers, ClassMetric
from quantlab.evaluation.bootstrap import bootstrap
from quantlab.plugins import Kind, Registry
from quantlab.stages.context import RunContext
from quantlab.stages.measure import values_of
from quantlab.stages.outcome import (
    Evaluation,
    Measured,
    Protocol,
    metric_names,
    metric_options,
    metric_versions,
)
from quantlab.stages.prepare import Captured, fingerprint, layer_set_digest
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON

CLASSIFY_VERSION = 1
BOOTSTRAP_SEED = 2_000_000_011
"""Added to the data's seed for the inputs that a bootstrap draws."""
FILE = "answers.safetensors"


class ClassEvaluation(Evaluation[ClassificationTask]):
    """Class logits, beside what the float network says of the same inputs."""

    outcome: ClassVar[Outcome] = Outcome.CLASSES

    @staticmethod
    def require(registry: Registry, task: ClassificationTask, settings: Evaluate) -> None:
        """What the metrics need of the task, and enough labelled inputs."""
        for metric in metrics_of(registry, settings):
            metric.require(task)
        available = task.num_labelled()
        if settings.samples > available:
            raise ModelError(
                "there are fewer labelled inputs than the evaluation asks for",
                where="evaluate.samples",
                got=settings.samples,
                allowed=f"2 to {available}" if available else "none: the model has no data",
                next_step=f"set evaluate.samples to {available}" if available else "name a folder of data: model.data",
            )

    def __init__(
        self, context: RunContext, task: ClassificationTask, captured: Captured, sampling: Sampling, settings: Evaluate
    ) -> None:
        self.context, self.task, self.settings = context, task, settings
        self.data = task.data_digest()
        key: dict[str, JSON] = {
            "version": CLASSIFY_VERSION,
            "capture": captured.stage.digest,
            "data": self.data,
            "samples": settings.samples,
            "batch": settings.batch,
            "seed": settings.noise_seed,
        }

        def compute(folder: Path, progress: Progress) -> None:
            tapped = tapped_run(task.network, captured.graph, ())
            logits, labels = answers(task, lambda inputs: tapped(inputs)[0], settings, progress)
            save_file({"logits": logits, "labels": labels}, folder / FILE)

        self.stage = context.stage("reference", "Float answers", key, compute, link="reference")
        self.exact = load_file(self.stage.file(FILE))

    def measure(self, quantized: Quantized | None, arm: str) -> Measured:
        """The metrics of the logits, each with an interval over the inputs."""
        settings, registry = self.settings, self.context.registry
        key: dict[str, JSON] = {
            "version": CLASSIFY_VERSION,
            "reference": self.stage.digest,
            "model": quantized.stage.digest if quantized else "float",
            "metrics": metric_names(settings),
            "plugins": metric_versions(self.context, settings),
            "bootstrap": settings.bootstrap,
            **metric_options(registry, settings),
        }

        def compute(folder: Path, progress: Progress) -> None:
            logits, labels = self.exact["logits"], self.exact["labels"]
            if quantized is not None:
                logits, labels = answers(self.task, quantized.student.run, settings, progress)
            found, metrics = Answers(logits, labels, self.exact["logits"]), metrics_of(registry, settings)
            values = values_of(metrics, found, arm)
            intervals = {name: each for metric in metrics for name, each in metric.intervals(found).items()}
            if settings.bootstrap:
                rng = torch.Generator().manual_seed(settings.noise_seed + BOOTSTRAP_SEED)
                intervals |= bootstrap(metrics, found, values, settings.bootstrap, rng, progress)
            (folder / "metrics.json").write_text(json.dumps(values, indent=1))
            (folder / "intervals.json").write_text(json.dumps(intervals, indent=1))
            save_file({"logits": logits, "labels": labels}, folder / FILE)

        stage = self.context.stage("evaluate", f"{arm}: classify and measure", key, compute, link=f"{arm}/evaluate")
        intervals = json.loads(stage.file("intervals.json").read_text())
        return Measured(
            json.loads(stage.file("metrics.json").read_text()),
            None,
            stage,
            {name: (low, high) for name, (low, high) in intervals.items()},
        )

    def other_noise(self) -> dict[str, float | None]:
        """Nothing is drawn."""
        return {}

    def protocol(self, plan: Plan) -> Protocol:
        """The data, which of them, and the metrics."""
        return Protocol(
            {
                "weights": fingerprint(self.task),
                "reference_set": self.data,
                "samples": self.settings.samples,
                "noise_seed": self.settings.noise_seed,
                "metrics": metric_versions(self.context, self.settings),
                "layers": layer_set_digest(plan),
                **metric_options(self.context.registry, self.settings),
            }
        )


def metrics_of(registry: Registry, settings: Evaluate) -> list[ClassMetric]:
    """The metrics that a recipe asks for."""
    return [registry.create(Kind.METRIC, choice) for choice in settings.metrics]


def answers(task: ClassificationTask, run: Run, settings: Evaluate, progress: Progress) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and labels [N] of ``settings.samples`` labelled inputs.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    logits, labels, done = [], [], 0
    with torch.no_grad():
        for batch in task.labelled(settings.samples, settings.noise_seed, settings.batch):
            output = task.combine(run(task.network_inputs(batch.inputs)), batch.inputs)
            logits.append(output.float().cpu())
            labels.append(batch.labels.cpu())
            done += len(batch.labels)
            progress(done, settings.samples)
    found = torch.cat(logits)
    broken = int((~torch.isfinite(found)).any(1).sum())
    if broken:
        raise NonFiniteError(
            "the model gives logits with NaN or infinity",
            where="evaluate",
            got=f"for {broken} of {len(found)} inputs",
            next_step="raise the bits of the sites it is most sensitive to (keep), or use --dtype float32",
        )
    return found, torch.cat(labels)
