"""Learned rounding of a weight, and activations that are quantized at random.

Both stand in the place of a layer's quantizer for as long as its block is reconstructed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantlab.contracts.quantizer import Quantizer
from quantlab.quant.grid import WeightGrid

ZETA, GAMMA = 1.1, -0.1
"""The rectified sigmoid is stretched to these limits, so that it reaches 0 and 1 (AdaRound, arXiv 2004.10568)."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1): how far each weight is rounded up."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(fraction: Tensor) -> Tensor:
    """V with h(V) = fraction, for fractions in [0, 1]."""
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def rounding_regulariser(height: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2 h - 1|^beta: 0 where every h is 0 or 1, one for each h of a half."""
    return (1 - (2 * height - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, iterations: int, warm_up: float, start: float, end: float) -> float | None:
    """The regulariser's exponent, falling linearly after the warm-up; None during it, when nothing is regularised."""
    done = iteration / iterations
    if done < warm_up:
        return None
    return end + (start - end) * (1 - (done - warm_up) / (1 - warm_up))


class SoftRounding(nn.Module):
    """A weight between its two neighbours on the grid: s (clip(floor(W / s) + h(V) + z, 0, max) - z).

    It starts where it gives W itself, as far as W lies in the range.

    Args:
        quantizer: gives scale, zero point and codes, which stay as they are.
        weight: what is rounded [out, in, *k].
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        parameters = quantizer.qparams()
        assert parameters is not None, "the tuner refuses formats without a grid"
        grid = WeightGrid.of(parameters, weight.dim())
        self.scale, self.zero_point, self.quant_max = grid.scale, grid.zero_point, grid.quant_max
        ratio = weight.detach() / self.scale
        self.logits = nn.Parameter(logits_of(ratio - torch.floor(ratio)))

    def height(self) -> Tensor:
        """h(V), the shape of the weight."""
        return rectified_sigmoid(self.logits)

    def forward(self, weight: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The softly rounded weight; the gradient goes to V alone."""
        codes = torch.floor(weight.detach() / self.scale) + self.height() + self.zero_point
        codes = torch.minimum(codes.clamp(min=0), self.quant_max)
        return ((codes - self.zero_point) * self.scale).to(weight.dtype)

    def hard(self, weight: Tensor) -> Tensor:
        """The grid point s (floor(W / s) + [V >= 0]) of every weight, which any quantizer of this grid keeps."""
        return ((torch.floor(weight / self.scale) + (self.logits >= 0)) * self.scale).to(weight.dtype)


class DroppedQuantizer(nn.Module):
    """Quantizes each element with probability 1 - p and leaves it float otherwise (QDrop, arXiv 2203.05740).

    Args:
        quantizer: of the activation.
        probability: p of an element that stays float.
        rng: draws which.
    """

    def __init__(self, quantizer: Quantizer, probability: float, rng: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.probability, self.rng = quantizer, probability, rng

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantize and dequantize some elements of x [B, ...]."""
        return mix(self.quantizer(x, timestep), x, self.probability, self.rng)


def mix(x: Tensor, other: Tensor, probability: float, rng: torch.Generator) -> Tensor:
    """Each element of x, or of ``other`` with this probability; 0 and 1 draw nothing."""
    if probability in (0.0, 1.0):
        return other if probability else x
    return torch.where((torch.rand(x.shape, generator=rng) < probability).to(x.device), other, x)
