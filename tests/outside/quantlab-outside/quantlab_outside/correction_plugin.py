"""A correction of the sampler for the errors of a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quantlab import Correction, CorrectionData, Strict


class OutsideCorrectionConfig(Strict):
    """Options of the correction."""

    strength: float = Field(default=1.0, ge=0, le=1, description="share of the mean error that is taken away")


class OutsideCorrection(Correction):
    """Takes the mean error of each channel at each step out of the prediction."""

    name: ClassVar[str] = "outside-correction"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsideCorrectionConfig

    def __init__(self, config: OutsideCorrectionConfig) -> None:
        self.config = config

    def fit(self, data: CorrectionData) -> Mapping[str, Tensor]:
        """``bias`` [S, C], float32."""
        error = data.quantized_predictions.double() - data.float_predictions.double()
        return {"bias": error.flatten(3).mean((1, 3)).float()}

    def correct(self, fitted: Mapping[str, Tensor], index: int, prediction: Tensor) -> Tensor:
        """The prediction [B, C, H, W] without the bias of the step."""
        bias = fitted["bias"][index].to(prediction.device)
        return (prediction - self.config.strength * bias.view(1, -1, 1, 1)).to(prediction.dtype)
