"""Distillation of low-rank adapters and quantization parameters along the teacher's sampling trajectory.

EfficientDM (arXiv 2310.03270, section 3) and MPQ-DM (arXiv 2412.11549) train this way: one optimizer step for each
denoising step, on inputs that the float model's own trajectory gives, so that no training data are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from quantlab.contracts.check import check_loss, plugin_call
from quantlab.contracts.config import Strict
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import Tune
from quantlab.contracts.tuning import (
    OUTPUT,
    AdapterSpec,
    AdapterStart,
    ConvAdapter,
    Loss,
    StepContext,
    TeacherVisit,
    TuneJob,
    Tuner,
    TuneResult,
)
from quantlab.errors import QuantlabError
from quantlab.tuning.checkpoint import restore_training, save_training
from quantlab.tuning.finite import blame_non_finite, require_finite_gradients

SCALE_TO_LEARNING_RATE = 2500.0
"""EfficientDM's scale-aware rule: a layer's adapter learns with its mean weight scale divided by this."""


class DistillConfig(Strict):
    """Options of the ``distill`` tuner."""

    conv: ConvAdapter = Field(ConvAdapter.POINTWISE, description="shape of the adapter's second factor at convolutions")
    start: AdapterStart = Field(AdapterStart.RANDOM, description="where the adapters start")
    scale_offset: float = Field(
        0.0, ge=0, description="added to a layer's mean scale before it becomes a learning rate; 0.01 as released"
    )
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    gradient_checkpointing: bool = Field(
        False, description="recompute each layer in the backward pass: less memory, same result, more time"
    )


@dataclass(frozen=True)
class _Position:
    """Where iteration ``iteration`` lies: its epoch (one batch of trajectories) and its step in the sampler."""

    epoch: int
    step: int


class DistillTuner(Tuner):
    """Trains adapters, scales and zero points to follow the teacher along its sampling trajectory."""

    name = "distill"
    paper = "EfficientDM, ICLR 2024, arXiv 2310.03270"
    Config = DistillConfig

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def adapter(self, settings: Tune) -> AdapterSpec:
        """Low-rank factors of the recipe's rank in every layer."""
        return AdapterSpec(settings.rank, self.config.conv, self.config.start)

    def visits(self, settings: Tune, num_steps: int, num_samples: int, seed: int) -> Sequence[TeacherVisit]:
        """The batch of each epoch at the sampler's steps in turn."""
        batches = [
            _drawn(seed, epoch, num_samples, settings.batch)[0] for epoch in range(-(-settings.iterations // num_steps))
        ]
        positions = (divmod(iteration, num_steps) for iteration in range(settings.iterations))
        return [TeacherVisit(step, batches[epoch]) for epoch, step in positions]

    def tune(self, job: TuneJob) -> TuneResult:
        """Train in place for ``job.settings.iterations`` steps, saving at the end of every epoch."""
        if job.settings.iterations == 0:
            return TuneResult({"total": ()})
        parameters = _trainable(job.layers)
        groups = parameter_groups(job.layers, job.settings, self.config.scale_offset)
        optimizer = torch.optim.AdamW(groups, weight_decay=self.config.weight_decay, fused=True)
        total = job.settings.iterations
        # Linear decay to zero without warm-up, as in the released code.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1.0 - iteration / total)
        losses = _labelled(job.losses)
        names = ["total", *losses]
        history: dict[str, list[float]] = {name: [] for name in names}
        start = restore_training(job.checkpoint, parameters, optimizer, schedule, history, losses)
        quantizers = [
            module for layer in job.layers.values() for module in layer.modules() if isinstance(module, Quantizer)
        ]
        for layer in job.layers.values():
            layer.gradient_checkpointing = self.config.gradient_checkpointing  # type: ignore[assignment]
        for iteration in range(start, total):
            position = _Position(*divmod(iteration, job.calibration.num_steps))
            if position.step == 0:
                for loss in job.losses:
                    loss.reset()
            values = _losses_at(job, losses, position, iteration / total)
            optimizer.zero_grad(set_to_none=True)
            values["total"].backward()
            require_finite_gradients(parameters, _where(position))
            optimizer.step()
            for quantizer in quantizers:
                quantizer.constrain()
            schedule.step()
            for name in names:
                history[name].append(values[name].item() if name in values else math.nan)
            if (iteration + 1) % job.calibration.num_steps == 0 or iteration + 1 == total:
                save_training(job.checkpoint, iteration + 1, parameters, optimizer, history, losses)
            job.progress(iteration + 1, total)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        return TuneResult(history)


def _where(position: _Position) -> str:
    return f"tune, epoch {position.epoch}, denoising step {position.step}"


def _labelled(losses: Sequence[Loss]) -> dict[str, Loss]:
    """The losses by name, of one name with numbers from the second on: "features", "features-2"."""
    labelled: dict[str, Loss] = {}
    for loss in losses:
        count = 1 + sum(other.name == loss.name for other in labelled.values())
        labelled[loss.name if count == 1 else f"{loss.name}-{count}"] = loss
    return labelled


def _drawn(seed: int, epoch: int, samples: int, batch: int) -> tuple[Tensor, torch.Generator]:
    """The samples of an epoch, and the generator that drew them.

    Seeded by the epoch alone, so that a resumed run draws the batch the killed one had.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(samples, generator=rng)[:batch], rng


def _losses_at(job: TuneJob, losses: Mapping[str, Loss], position: _Position, progress: float) -> dict[str, Tensor]:
    """Every loss at one denoising step of one batch, and their sum as "total"."""
    steps = job.calibration.num_steps
    batch, rng = _drawn(job.seed, position.epoch, job.calibration.num_samples, job.settings.batch)
    inputs = job.calibration.step(position.step, batch)
    network_inputs = job.task.network_inputs(inputs)
    output, student_taps = job.student(network_inputs)
    student = {OUTPUT: job.task.combine(output, inputs), **student_taps}
    teacher: dict[str, Tensor] = {OUTPUT: job.calibration.output(position.step, batch)}
    if student_taps and job.taps_at is not None:
        teacher.update(job.taps_at(position.epoch * steps + position.step))
    elif student_taps:
        with torch.no_grad():
            teacher.update(job.teacher(network_inputs)[1])
    timestep = inputs[job.task.timestep_input] if job.task.timestep_input else None
    # A generator for each step of the epoch, so that a loss does not draw the same at all of them.
    seeds = torch.randint(2**62, (steps,), generator=rng)
    draws = torch.Generator().manual_seed(int(seeds[position.step]))
    context = StepContext(timestep, position.step, steps, draws, progress)
    values: dict[str, Tensor] = {}
    for label, loss in losses.items():
        with plugin_call("loss", loss, "__call__"):
            value = loss(student, teacher, context)
        checked = check_loss(loss, value)
        if checked is not None:
            values[label] = checked
    if not any(value.requires_grad for value in values.values()):
        raise QuantlabError(
            "no loss has a gradient, so nothing would be trained",
            where=_where(position),
            got=", ".join(sorted(values)) or "no loss at this step",
            next_step='add a loss with a gradient at every step, such as "mse"',
        )
    values["total"] = torch.stack([value for value in values.values() if value.requires_grad]).sum()
    if not torch.isfinite(values["total"]):
        raise blame_non_finite(job.network, lambda: job.student(network_inputs), _where(position))
    return values


def parameter_groups(layers: Mapping[str, nn.Module], settings: Tune, scale_offset: float) -> list[dict[str, object]]:
    """AdamW's groups: adapters by learning rate, weight scales and zero points, activation scales and zero points.

    Without a shared rate a layer's adapter learns with (mean weight scale + offset) / 2500 (EfficientDM, equation 8).
    Layers with equal rates share a group, so that the optimizer's fused loops stay long.
    """
    by_rate: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter, part in _parameters(layers):
        if part == "adapter":
            rate = settings.adapter_learning_rate
            if rate is None:
                rate = (mean_scale(layers[name]) + scale_offset) / SCALE_TO_LEARNING_RATE
        else:
            rate = settings.weight_learning_rate if part == "weight" else settings.activation_learning_rate
        by_rate.setdefault((part, rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for (_, rate), parameters in by_rate.items() if rate > 0]


def mean_scale(layer: nn.Module) -> float:
    """Mean scale of a layer's weight quantizer; raises QuantlabError for a format without one."""
    parameters = layer.weight_quantizer.qparams()  # type: ignore[union-attr]
    if parameters is None:
        raise QuantlabError(
            "a weight quantizer of its own format has no scale for an adapter's learning rate to follow",
            where="tune.adapter_learning_rate",
            next_step="set it to a number",
        )
    return float(parameters.scale.abs().mean())


def _parameters(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Site, parameter and part ("adapter", "weight", "activation") of everything that may be trained."""
    for name, layer in layers.items():
        parts = {"adapter": layer.adapter, "weight": layer.weight_quantizer, "activation": layer.input_quantizer}
        for part, module in parts.items():
            if isinstance(module, nn.Module):
                yield from ((name, parameter, part) for parameter in module.parameters())


def _trainable(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Turn on the gradient of what is trained; returns the parameters under stable names."""
    counted: dict[str, nn.Parameter] = {}
    for name, parameter, part in _parameters(layers):
        parameter.requires_grad_(True)
        counted[f"{name}/{part}/{len(counted)}"] = parameter
    return counted
