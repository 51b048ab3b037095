"""Selective fine-tuning: few weights, all activation scales, on the errors of a few layers and of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from quantlab import (
    TEMPORAL,
    Grouping,
    NonFiniteError,
    Partition,
    QuantlabError,
    Strict,
    TuneJob,
    Tuner,
    TuneResult,
    restore_layers,
    save_layers,
)


class SelectiveConfig(Strict):
    """Options of the ``selective`` tuner."""

    share: float = Field(1.0, ge=0, description="optimizer steps of each stage, as a share of tune.iterations")
    batch: int | None = Field(None, ge=1, description="rows of the calibration batch in a step; none: tune.batch")
    weight_learning_rate: float = Field(1e-5, gt=0, description="of the chosen layers' weights")
    activation_learning_rate: float = Field(1e-4, gt=0, description="of all activation scales and zero points")
    output_weight: float = Field(2.0, ge=0, description="of the error of the network's output")


@dataclass(frozen=True)
class Stage:
    """Layers whose weights are trained at the same time."""

    name: str
    sites: tuple[str, ...]


class SelectiveTuner(Tuner):
    """Trains the weights of the time embedding's layers, then of attention's, and every activation scale."""

    name = "selective"
    paper = "QuEST, arXiv 2402.03666"
    Config = SelectiveConfig

    def __init__(self, config: SelectiveConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Train in place, saving after each stage.

        Raises:
            QuantlabError: the network has neither layers of the time embedding nor of attention.
            NonFiniteError: names the stage where the loss is not finite.
        """
        iterations = job.settings.steps(self.config.share)
        if iterations == 0:
            return TuneResult({})
        stages = find_stages(job)
        history = restore_layers(job, [stage.name for stage in stages])
        for index, stage in enumerate(stages):
            if stage.name not in history:
                history[stage.name] = self._train(job, stages, index, iterations)
                save_layers(job, index + 1, history)
        return TuneResult(history)

    def _train(self, job: TuneJob, stages: Sequence[Stage], index: int, iterations: int) -> list[float]:
        """One stage; returns the loss of every iteration. Seeded by the stage, so that a resumed run draws the same."""
        config, rng = self.config, torch.Generator().manual_seed(job.seed * 1_000_003 + index)
        student, teacher = job.tap([site for stage in stages for site in stage.sites])
        weights = [job.layers[site].get_parameter("weight") for site in stages[index].sites]
        quantizers = [layer.input_quantizer for layer in job.layers.values() if layer.input_quantizer is not None]
        scales = [parameter for quantizer in quantizers for parameter in quantizer.parameters()]  # type: ignore[union-attr]
        optimizer = torch.optim.Adam(
            [
                {"params": weights, "lr": config.weight_learning_rate},
                {"params": scales, "lr": config.activation_learning_rate},
            ]
        )
        size = job.settings.batch if config.batch is None else config.batch
        rows = len(next(iter(job.batch.inputs.values())))
        losses: list[float] = []
        _require_grad([*weights, *scales], True)
        for iteration in range(iterations):
            chosen = torch.randperm(rows, generator=rng)[:size]
            inputs = {name: value[chosen.to(value.device)] for name, value in job.batch.inputs.items()}
            with torch.no_grad():
                target, targets = teacher(inputs)
            output, found = student(inputs)
            loss = local_loss(found, targets) + config.output_weight * squared_error(output, target)
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    "the loss is not finite",
                    where=f"selective, stage {stages[index].name}, iteration {iteration}",
                    next_step="lower the tuner's learning rates, or raise the bits",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for quantizer in quantizers:
                quantizer.constrain()  # type: ignore[operator]
            losses.append(loss.item())
            job.progress(index * iterations + iteration + 1, len(stages) * iterations)
        _require_grad([*weights, *scales], False)
        return losses


def find_stages(job: TuneJob) -> tuple[Stage, ...]:
    """The layers that see the timestep but not the sample, then the projections around attention."""
    blocks = job.cut(Partition(Grouping.LAYER, temporal_first=True))
    temporal = next((block.sites for block in blocks if block.name == TEMPORAL), ())
    tagged = {site.name for site in job.sites if any(tag.startswith("attention.") for tag in site.tags)}
    attention = tuple(site for site in job.layers if site in tagged)
    stages = tuple(stage for stage in (Stage(TEMPORAL, temporal), Stage("attention", attention)) if stage.sites)
    if not stages:
        raise QuantlabError(
            "no layer of a time embedding or of attention may be trained",
            where='tuner "selective"',
            next_step="leave the tuner out for this model, or keep fewer of its layers",
        )
    return stages


def squared_error(found: Tensor, target: Tensor) -> Tensor:
    """E ||O - O~||^2: the sum over a row's entries, averaged over the rows (equations 4 to 6)."""
    return (found - target).square().flatten(1).sum(1).mean()


def local_loss(found: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """L_TLA + L_CMA: the errors of the chosen layers' outputs."""
    return torch.stack([squared_error(found[site], target) for site, target in targets.items()]).sum()


def _require_grad(parameters: Sequence[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)
        parameter.grad = None
