"""Quantization-aware training on real data with learned step sizes.

Esser et al., *Learned Step Size Quantization*, ICLR 2020, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quantlab import (
    QuantizedLayer,
    Strict,
    TrainingBatch,
    TuneJob,
    Tuner,
    TuneResult,
    blame_non_finite,
    require_finite_gradients,
    restore_training,
    save_training,
    visit_layers,
)
from quantlab_lsq.scales import learned_scales, start_at_mean_magnitude

SAVE_EVERY = 50
"""Iterations between two checkpoints."""


class Start(StrEnum):
    """Where the scales of weights start."""

    MEAN_MAGNITUDE = "mean_magnitude"
    """2 mean |w| / sqrt(Qp) in each channel, codes around 0 (section 2.1 of the paper)."""
    OBSERVED = "observed"
    """The range that the weights' observer found."""


class LsqConfig(Strict):
    """Options of the ``lsq`` tuner."""

    start: Start = Field(Start.MEAN_MAGNITUDE, description="where the scales of weights start")
    learning_rate: float = Field(0.01, gt=0, description="of weights, biases and scales at the start; a cosine to 0")
    momentum: float = Field(0.9, ge=0, lt=1, description="of stochastic gradient descent")
    weight_decay: float = Field(1e-4, ge=0, description="of the weights")


class LsqTuner(Tuner):
    """Trains the weights and scales of all quantized layers on the model's own data and objective."""

    name: ClassVar[str] = "lsq"
    paper: ClassVar[str | None] = "LSQ, ICLR 2020, arXiv 1902.08153"
    version: ClassVar[int] = 1
    Config = LsqConfig

    def __init__(self, config: LsqConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Train in place for ``job.settings.iterations`` steps; the history has the mean squared error as "total".

        Raises:
            ModelError: the model has no training data.
            RecipeError: a quantizer has no scales.
            NonFiniteError: loss or gradient is not finite.
        """
        total = job.settings.iterations
        if total == 0:
            return TuneResult({"total": ()})
        layers = cast(Mapping[str, QuantizedLayer], job.layers)
        examples = _examples(job, layers)
        if self.config.start is Start.MEAN_MAGNITUDE:
            for name, layer in layers.items():
                start_at_mean_magnitude(name, layer)
        learned = learned_scales(layers, examples)
        weights = {
            f"{name}/{part}": value
            for name, layer in layers.items()
            for part, value in layer.named_parameters(recurse=False)
        }
        scales = {scale.name: scale.parameter for scale in learned}
        parameters = weights | scales
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        hooks = [scale.scale_gradients() for scale in learned]
        optimizer = torch.optim.SGD(
            [
                {"params": list(weights.values()), "weight_decay": self.config.weight_decay},
                {"params": list(scales.values())},
            ],
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / total)) / 2)
        history: dict[str, list[float]] = {"total": []}
        for iteration in range(restore_training(job.checkpoint, parameters, optimizer, schedule, history), total):
            loss = _loss(job, iteration)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            require_finite_gradients(parameters, f"tune, iteration {iteration}")
            optimizer.step()
            for scale in learned:
                scale.quantizer.constrain()
            schedule.step()
            history["total"].append(loss.item())
            if (iteration + 1) % SAVE_EVERY == 0 or iteration + 1 == total:
                save_training(job.checkpoint, iteration + 1, parameters, optimizer, history)
            job.progress(iteration + 1, total)
        for hook in hooks:
            hook.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        return TuneResult(history)


def _batch(job: TuneJob, iteration: int) -> TrainingBatch:
    """The batch of an iteration: seeded by it alone, so that a resumed run draws the one that a killed one had."""
    rng = torch.Generator().manual_seed(job.seed * 1_000_003 + iteration)
    return job.task.training_batch(job.settings.batch, rng)


def _loss(job: TuneJob, iteration: int) -> Tensor:
    """Mean squared error between the network's output and the target of real data."""
    batch = _batch(job, iteration)
    loss = F.mse_loss(job.student(batch.inputs)[0], batch.target)
    if not torch.isfinite(loss):
        raise blame_non_finite(job.network, lambda: job.student(batch.inputs), f"tune, iteration {iteration}")
    return loss


def _examples(job: TuneJob, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Each layer's input for one sample [1, ...]."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, timestep: Tensor | None) -> None:
        found[name] = x[:1].clone()

    batch = _batch(job, 0)
    visit_layers(layers, lambda: job.student(batch.inputs), keep)
    return found
