"""A tuner: what is changed after bits and scales are found."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field

from quantlab import QuantizedConv2d, QuantizedLinear, Strict, TuneJob, Tuner, TuneResult


class OutsideTunerConfig(Strict):
    """Options of the tuner."""

    candidates: int = Field(default=11, ge=1, description="factors of the weights' scales that are tried")
    spread: float = Field(default=0.2, ge=0, lt=1, description="how far the factors lie from 1")


class OutsideTuner(Tuner):
    """Multiplies the scales of each layer's weight by the factor with the least squared error."""

    name: ClassVar[str] = "outside-tuner"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsideTunerConfig

    def __init__(self, config: OutsideTunerConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Go through the layers in the graph's order; the history has each layer's error as "total"."""
        errors: list[float] = []
        with torch.no_grad():
            for layer in job.layers.values():
                errors.append(self.improve(cast(QuantizedLinear | QuantizedConv2d, layer)))
                job.progress(len(errors), len(job.layers))
        return TuneResult({"total": errors})

    def improve(self, layer: QuantizedLinear | QuantizedConv2d) -> float:
        """Keep the best factor, where there is a scale, and return the mean squared error of the weight."""
        scales = dict(layer.weight_quantizer.named_parameters()) if layer.weight_quantizer is not None else {}
        weight, scale = layer.float_weight(), scales.get("scale")
        if scale is None:
            return float((weight - layer.quantized_weight()).square().mean())
        start, tried = scale.data.clone(), []
        for factor in torch.linspace(1 - self.config.spread, 1 + self.config.spread, self.config.candidates).tolist():
            scale.data = start * factor
            tried.append((float((weight - layer.quantized_weight()).square().mean()), factor))
        error, best = min(tried)
        scale.data = start * best
        return error
