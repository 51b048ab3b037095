"""Block-wise reconstruction: learned rounding and learned activation scales, one block after another.

AdaRound (arXiv 2004.10568) learns whether each weight is rounded up or down, so that a layer's output stays; BRECQ
(arXiv 2102.05426) does it for residual blocks, QDrop (arXiv 2203.05740) with activations quantized at random. Each
block gets what the quantized network before it produces and follows the float network's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from quantlab.contracts.block import Block, Grouping, Partition
from quantlab.contracts.config import Strict
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.tuning import TuneJob, Tuner, TuneResult
from quantlab.errors import QuantlabError
from quantlab.quant.layers import QuantizedLayer
from quantlab.tuning.block_data import BlockData
from quantlab.tuning.checkpoint import restore_layers, save_layers
from quantlab.tuning.finite import blame_non_finite, require_finite_gradients
from quantlab.tuning.rounding import DroppedQuantizer, SoftRounding, beta_at, rounding_regulariser

NEXT_STEP = "lower the tuner's learning_rate or activation_learning_rate, or raise the bits of the block's sites"


class Activations(StrEnum):
    """When the scales and zero points of a block's activations are trained."""

    FIXED = "fixed"
    """Never: they stay as calibration found them."""
    JOINT = "joint"
    """Together with the rounding."""
    AFTER = "after"
    """Once the block's weights are rounded."""


class ReconstructConfig(Strict):
    """Options of the ``reconstruct`` tuner."""

    grouping: Grouping = Field(Grouping.BLOCK, description="what is reconstructed at once: a layer, or a block")
    temporal_first: bool = Field(
        False, description="the sites that see the timestep but not the sample are one block, the first"
    )
    share: float = Field(1.0, ge=0, description="optimizer steps for each block, as a share of tune.iterations")
    batch: int | None = Field(None, ge=1, description="rows of the calibration batch in a step; none: tune.batch")
    learning_rate: float = Field(1e-3, gt=0, description="of the rounding")
    regulariser: float = Field(0.01, ge=0, description="weight of sum(1 - |2 h - 1|^beta)")
    beta_start: float = Field(20.0, ge=1, description="exponent of the regulariser after the warm-up")
    beta_end: float = Field(2.0, ge=1, description="exponent of the regulariser at the end")
    warm_up: float = Field(0.2, ge=0, lt=1, description="share of the iterations without regulariser")
    power: float = Field(2.0, gt=0, description="of the error while the rounding is learned")
    inner_weight: float = Field(0.0, ge=0, description="weight of the error of each site's own output in the block")
    drop: float = Field(0.0, ge=0, le=1, description="probability of an activation to stay float in its quantizer")
    float_inputs: float = Field(
        0.0, ge=0, le=1, description="probability of a block's input to be the float network's instead of the quantized"
    )
    activations: Activations = Field(Activations.FIXED, description="when activation scales and zero points learn")
    activation_share: float = Field(
        1.0, ge=0, description="optimizer steps of `after` for each block, as a share of tune.iterations"
    )
    activation_learning_rate: float = Field(4e-4, gt=0, description="of Adam, with cosine decay to 0")
    activation_power: float = Field(2.4, gt=0, description="of the error in `after`")


class ReconstructTuner(Tuner):
    """Learns the rounding of weights, and activation scales, block by block."""

    name = "reconstruct"
    paper = "AdaRound, arXiv 2004.10568; BRECQ, arXiv 2102.05426; QDrop, arXiv 2203.05740"
    Config = ReconstructConfig

    def __init__(self, config: ReconstructConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Reconstruct every block in place, saving after each; the weights end on their quantizers' grids.

        Raises:
            QuantlabError: a weight's quantizer has no grid.
            NonFiniteError: names the block where a loss or gradient is not finite.
        """
        config = self.config
        iterations = job.settings.steps(config.share)
        afterwards = job.settings.steps(config.activation_share) if config.activations is Activations.AFTER else 0
        if iterations + afterwards == 0:
            return TuneResult({})
        layers = cast(Mapping[str, QuantizedLayer], job.layers)
        _require_grids(layers)
        blocks = job.cut(Partition(config.grouping, config.temporal_first, inner_outputs=config.inner_weight > 0))
        history = restore_layers(job, [block.name for block in blocks])
        total = len(blocks) * (iterations + afterwards)
        for index, block in enumerate(blocks):
            if block.name in history:
                continue
            step = _Progress(job, index * (iterations + afterwards), total)
            reconstruction = _Reconstruction(config, job, block, index, step)
            errors = reconstruction.learn_rounding(iterations) if iterations else []
            history[block.name] = errors + (reconstruction.learn_activations(afterwards) if afterwards else [])
            del reconstruction  # its tensors, before those of the next
            save_layers(job, index + 1, history)
        return TuneResult(history)


@dataclass
class _Progress:
    """Counts iterations over all blocks."""

    job: TuneJob
    done: int
    total: int

    def __call__(self) -> None:
        self.done += 1
        self.job.progress(self.done, self.total)


class _Reconstruction:
    """The reconstruction of one block; seeded by its index, so that a resumed run draws what the killed one did."""

    def __init__(self, config: ReconstructConfig, job: TuneJob, block: Block, index: int, step: _Progress) -> None:
        self.config, self.job, self.block, self.step = config, job, block, step
        self.layers = {site: cast(QuantizedLayer, job.layers[site]) for site in block.sites}
        self.rng = torch.Generator().manual_seed(job.seed * 1_000_003 + index)
        self.data = BlockData.record(block, job.batch, with_float_inputs=config.float_inputs > 0)
        self.batch = job.settings.batch if config.batch is None else config.batch

    def learn_rounding(self, iterations: int) -> list[float]:
        """Learn the rounding of the block's weights, then round them; returns the error of every iteration."""
        config = self.config
        joint = self._activation_parameters() if config.activations is Activations.JOINT else {}
        with _soft(self.layers, config.drop, self.rng) as roundings:
            logits = {f"{site}.rounding": soft.logits for site, soft in roundings.items()}

            def regulariser(iteration: int) -> Tensor | None:
                beta = beta_at(iteration, iterations, config.warm_up, config.beta_start, config.beta_end)
                if beta is None or config.regulariser == 0:
                    return None
                terms = [rounding_regulariser(soft.height(), beta) for soft in roundings.values()]
                return config.regulariser * torch.stack(terms).sum()

            errors = self._minimise(logits, joint, iterations, config.power, regulariser)
            with torch.no_grad():
                rounded = {site: soft.hard(self.layers[site].float_weight()) for site, soft in roundings.items()}
        for site, weight in rounded.items():
            self.layers[site].set_float_weight(weight)
        return errors

    def learn_activations(self, iterations: int) -> list[float]:
        """Learn scales and zero points of the block's activations; returns the error of every iteration."""
        parameters = self._activation_parameters()
        if not parameters:
            return []
        return self._minimise({}, parameters, iterations, self.config.activation_power, lambda iteration: None)

    def _activation_parameters(self) -> dict[str, nn.Parameter]:
        """Scales and zero points of the block's activations by name."""
        quantizers = {site: layer.input_quantizer for site, layer in self.layers.items()}
        return {
            f"{site}.input_quantizer.{name}": parameter
            for site, quantizer in quantizers.items()
            if quantizer is not None
            for name, parameter in quantizer.named_parameters()
        }

    def _minimise(
        self,
        logits: Mapping[str, nn.Parameter],
        activations: Mapping[str, nn.Parameter],
        iterations: int,
        power: float,
        regulariser: Callable[[int], Tensor | None],
    ) -> list[float]:
        parameters = {**logits, **activations}
        groups = [
            (logits, self.config.learning_rate, _constant),
            (activations, self.config.activation_learning_rate, _cosine),
        ]
        groups = [(given, rate, decay) for given, rate, decay in groups if given]
        optimizer = torch.optim.Adam([{"params": list(given.values()), "lr": rate} for given, rate, _ in groups])
        decays = [lambda done, decay=decay: decay(done / iterations) for _, _, decay in groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decays)
        errors: list[float] = []
        with _trained(tuple(parameters.values())):
            for iteration in range(iterations):
                inputs, targets = self.data.draw(self.batch, self.config.float_inputs, self.rng)
                error = self._error(self.block.student(inputs), targets, power)
                penalty = regulariser(iteration)
                loss = error if penalty is None else error + penalty
                where = f"reconstruct, block {self.block.name}, iteration {iteration}"
                if not torch.isfinite(loss):
                    raise blame_non_finite(self.job.network, lambda: self.block.student(inputs), where, NEXT_STEP)  # noqa: B023
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                require_finite_gradients(parameters, where, NEXT_STEP)
                optimizer.step()
                for layer in self.layers.values() if activations else ():
                    if isinstance(layer.input_quantizer, Quantizer):
                        layer.input_quantizer.constrain()
                schedule.step()
                errors.append(error.item())
                self.step()
        return errors

    def _error(self, found: Mapping[str, Tensor], targets: Mapping[str, Tensor], power: float) -> Tensor:
        """The error of the tensors that leave the block, and of the sites inside it with their weight."""
        errors = []
        for name, target in targets.items():
            weight = 1.0 if name in self.block.outputs else self.config.inner_weight
            if target.is_floating_point():
                errors.append(weight * block_error(found[name], target, power))
        return torch.stack(errors).sum()


def block_error(found: Tensor, target: Tensor, power: float) -> Tensor:
    """|found - target|^power, summed over dimension 1 and averaged over the others, as in BRECQ's code."""
    difference = (found.float() - target.float()).abs().pow(power)
    return difference.sum(1).mean() if difference.dim() > 1 else difference.mean()


def _constant(done: float) -> float:
    return 1.0


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _soft(layers: Mapping[str, QuantizedLayer], drop: float, rng: torch.Generator) -> Iterator[dict[str, SoftRounding]]:
    """Soft weights, and activations that are dropped at random, in the places of the quantizers; undone at the end."""
    before = {site: (layer.weight_quantizer, layer.input_quantizer) for site, layer in layers.items()}
    found: dict[str, SoftRounding] = {}
    try:
        for site, layer in layers.items():
            weight_quantizer, input_quantizer = before[site]
            if weight_quantizer is not None:
                found[site] = SoftRounding(weight_quantizer, layer.float_weight())
                layer.weight_quantizer = found[site]  # type: ignore[assignment]
            if input_quantizer is not None and drop > 0:
                layer.input_quantizer = DroppedQuantizer(input_quantizer, drop, rng)  # type: ignore[assignment]
        yield found
    finally:
        for site, layer in layers.items():
            layer.weight_quantizer, layer.input_quantizer = before[site]


@contextmanager
def _trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _require_grids(layers: Mapping[str, QuantizedLayer]) -> None:
    for site, layer in layers.items():
        if layer.weight_quantizer is not None and layer.weight_quantizer.qparams() is None:
            raise QuantlabError(
                "the weight's quantizer has no grid on which to learn a rounding",
                where=f"reconstruct, site {site}",
                got=layer.weight_quantizer.name,
                allowed="a quantizer with scale and zero point",
                next_step='choose weights.quantizer "affine", or leave this tuner out',
            )
