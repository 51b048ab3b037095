"""The tuners that go through the network once, layer by layer, and change weights or biases directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor, nn

from quantlab import (
    QuantizedLayer,
    RecipeError,
    Strict,
    TuneJob,
    Tuner,
    TuneResult,
    visit_layers,
)
from quantlab_ptq.gptq import Grid, output_error, quantize_rows, second_moment


class GptqConfig(Strict):
    """Options of the ``gptq`` tuner."""

    damping: float = Field(0.01, gt=0, description="share of the mean of H's diagonal that is added to it")
    block: int = Field(128, ge=1, description="columns after which errors are handed on; changes the speed alone")
    act_order: bool = Field(False, description="columns in the order of the size of their inputs, the largest first")


class GptqTuner(Tuner):
    """Rounds the weights of a layer one input at a time and makes up for each error with the inputs that follow."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str | None] = "GPTQ, ICLR 2023, arXiv 2210.17323"
    version: ClassVar[int] = 1
    Config = GptqConfig

    def __init__(self, config: GptqConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Round every layer in the graph's order, on the inputs that the rounded layers before it give.

        The history has, layer by layer, the mean squared error of the output with quantized inputs: "total", and
        "nearest" for rounding to the nearest.

        Raises:
            RecipeError: a weight quantizer has no scales and zero points.
        """
        layers = cast(Mapping[str, QuantizedLayer], job.layers)
        history: dict[str, list[float]] = {"total": [], "nearest": []}

        def visit(name: str, x: Tensor, timestep: Tensor | None) -> None:
            nearest, total = self._round(name, layers[name], layers[name].quantized_input(x, timestep))
            history["nearest"].append(nearest)
            history["total"].append(total)
            job.progress(len(history["total"]), len(layers))

        visit_layers(layers, lambda: job.student(job.batch.inputs), visit)
        return TuneResult(history)

    def _round(self, name: str, layer: QuantizedLayer, x: Tensor) -> tuple[float, float]:
        """Round one layer whose quantized input is x; returns its error by nearest rounding and now."""
        quantizer = layer.weight_quantizer
        parameters = quantizer.qparams() if quantizer is not None else None
        if parameters is None:
            raise RecipeError(
                "gptq needs a weight quantizer with scales and zero points",
                where=f"tune.tuners, site {name}",
                got=type(quantizer).__name__,
                next_step="weights: {quantizer: affine}",
            )
        groups = layer.groups
        moment = second_moment(layer, x)

        def rows(weight: Tensor) -> Tensor:
            return weight.flatten(1).unflatten(0, (groups, -1))

        before = rows(layer.float_weight())
        nearest = output_error(before - rows(layer.quantized_weight()), moment)
        config = self.config
        found = quantize_rows(
            before,
            moment,
            Grid.of(parameters, layer.float_weight(), groups),
            damping=config.damping,
            block=config.block,
            act_order=config.act_order,
        )
        layer.set_float_weight(found.reshape(layer.weight_shape))
        return nearest, output_error(before - rows(layer.quantized_weight()), moment)


class BiasCorrectionConfig(Strict):
    """The ``bias-correction`` tuner has no options."""


class BiasCorrectionTuner(Tuner):
    """Adds to each bias the mean by which quantization has moved its output channel."""

    name: ClassVar[str] = "bias-correction"
    paper: ClassVar[str | None] = "Data-Free Quantization, ICCV 2019, arXiv 1906.04721, section 4.2"
    version: ClassVar[int] = 1
    Config = BiasCorrectionConfig

    def __init__(self, config: BiasCorrectionConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Correct every layer in the graph's order, on the inputs that the corrected layers before it give.

        The history has each layer's mean squared correction over its channels as "total". Layers without a bias are
        left alone, and a note names them.
        """
        without = [name for name, layer in job.layers.items() if layer.bias is None]
        layers = {name: cast(QuantizedLayer, layer) for name, layer in job.layers.items() if name not in without}
        floats = {name: job.task.network.get_submodule(name) for name in layers}
        inputs = job.batch.inputs
        expected: dict[str, Tensor] = {}
        corrections: list[float] = []

        def record(name: str, x: Tensor, timestep: Tensor | None) -> None:
            expected[name] = channel_means(floats[name], floats[name].forward(x))

        def correct(name: str, x: Tensor, timestep: Tensor | None) -> None:
            layer = layers[name]
            correction = expected[name] - channel_means(layer, layer.forward(x, timestep))
            layer.bias.add_(correction.to(layer.bias))  # type: ignore[union-attr]
            corrections.append(float(correction.square().mean()))
            job.progress(len(corrections), len(layers))

        visit_layers(floats, lambda: job.teacher(inputs), record)
        visit_layers(layers, lambda: job.student(inputs), correct)
        notes = [f"{len(without)} layers have no bias to correct: {', '.join(without)}"] if without else []
        return TuneResult({"total": corrections}, notes)


def channel_means(layer: nn.Module, y: Tensor) -> Tensor:
    """Means [out] of a layer's output over everything but its channels, in float64."""
    last = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
    return last.flatten(0, -2).double().mean(0)
