"""PTQD's correction: the quantized prediction's error, its correlated part, its bias and its variance.

He et al., *PTQD: Accurate Post-Training Quantization for Diffusion Models*, NeurIPS 2023, arXiv 2305.10657. At each
recorded step the error is d = k e + b + r, with e the float prediction, k one number, b one for each channel and r the
uncorrelated residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantlab import Correction, CorrectionData, CorrectionStep, Strict


class BiasOf(StrEnum):
    """What the bias of a channel is the mean of."""

    RESIDUAL = "residual"
    """Of d - k e: then an error that is exactly linear is corrected exactly."""
    ERROR = "error"
    """Of d, as released: the same where the float prediction of a channel has mean 0."""


class NoiseCorrectionConfig(Strict):
    """Options of the ``noise-correction`` correction."""

    bias: BiasOf = Field(BiasOf.RESIDUAL, description="what a channel's bias is the mean of; error: as released")
    calibrate_variance: bool = Field(True, description="lower the noise that eta > 0 adds by what the residual adds")


class NoiseCorrection(Correction):
    """Takes correlated noise and bias out of the prediction, and the residual's variance out of the added noise."""

    name: ClassVar[str] = "noise-correction"
    paper: ClassVar[str | None] = "PTQD, NeurIPS 2023, arXiv 2305.10657"
    Config = NoiseCorrectionConfig

    def __init__(self, config: NoiseCorrectionConfig) -> None:
        self.config = config

    def fit(self, data: CorrectionData) -> Mapping[str, Tensor]:
        """``slope`` k [S], not below 0, ``bias`` b [S, C] and ``residual_std`` std(r) / (1 + k) [S], float32."""
        exact = data.float_predictions.double().flatten(3)  # [S, N, C, pixels]
        error = data.quantized_predictions.double().flatten(3) - exact
        centred = _centred(exact)
        power = centred.square().sum((1, 2, 3))
        slope = torch.where(power > 0, (centred * error).sum((1, 2, 3)) / power.clamp(min=1e-300), 0).clamp(min=0)
        residual = error - slope.view(-1, 1, 1, 1) * exact
        bias = (residual if self.config.bias is BiasOf.RESIDUAL else error).mean((1, 3))
        deviation = _centred(residual).square().mean((1, 2, 3)).sqrt() / (1 + slope)
        return {"slope": slope.float(), "bias": bias.float(), "residual_std": deviation.float()}

    def correct(self, fitted: Mapping[str, Tensor], index: int, prediction: Tensor) -> Tensor:
        """(prediction - b) / (1 + k)."""
        bias = fitted["bias"][index].to(prediction.device).view(1, -1, *(1,) * (prediction.dim() - 2))
        return ((prediction - bias) / (1 + fitted["slope"][index].item())).to(prediction.dtype)

    def variance(self, fitted: Mapping[str, Tensor], step: CorrectionStep, variance: float) -> float:
        """What is left of the variance when the residual's share of the step is taken out; not below 0."""
        if not self.config.calibrate_variance:
            return variance
        return calibrated_variance(step.alpha, step.alpha_previous, variance, fitted["residual_std"][step.index].item())


def calibrated_variance(alpha: float, alpha_previous: float, variance: float, residual_std: float) -> float:
    """sigma^2 - (sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a))^2 std^2, or 0 if that is negative.

    The factor is that of the predicted noise in the next x (DDIM), with a and a' the products of 1 - beta now and next.
    """
    factor = (1 - alpha_previous - variance) ** 0.5 - (alpha_previous * (1 - alpha) / alpha) ** 0.5
    return max(0.0, variance - factor**2 * residual_std**2)


def _centred(values: Tensor) -> Tensor:
    """[S, N, C, pixels] without the mean of each step's channel."""
    return values - values.mean((1, 3), keepdim=True)
