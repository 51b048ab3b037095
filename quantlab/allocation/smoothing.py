"""Smoothing: moving outliers from activations into weights, or back."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from quantlab.contracts.config import Strict
from quantlab.contracts.passes import SmoothingPass
from quantlab.quant.functional import smoothing_scale


class SmoothConfig(Strict):
    """Options of the ``smooth`` pass."""

    alpha: float = Field(0.5, ge=0, le=1, description="share of the input's range that the weight takes over")


class SmoothPass(SmoothingPass):
    """Per-input-channel scales max|X|^alpha / max|W|^(1 - alpha) between activation and weight."""

    name = "smooth"
    paper = "SmoothQuant, ICML 2023, arXiv 2211.10438, equation 4"
    Config = SmoothConfig

    def __init__(self, config: SmoothConfig) -> None:
        self.config = config

    def scales(self, weight_absmax: Tensor, input_absmax: Tensor) -> Tensor:
        """Scales [in]; a channel dead on either side keeps 1."""
        return smoothing_scale(weight_absmax, input_absmax, self.config.alpha)
