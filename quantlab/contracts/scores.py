"""How much a site suffers from a bit width: the scores that policies between layers weigh."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Score(StrEnum):
    """What is measured with one site quantized and everything else float; smaller is better, and sites add up."""

    WEIGHT_MSE = "weight_mse"
    """Mean squared error of the quantized weight, or of the quantized input."""
    OUTPUT_MSE = "output_mse"
    """Mean squared error of the site's output."""
    OUTPUT_SQNR = "output_sqnr"
    """Noise to signal of the site's output in dB: the SQNR with its sign turned."""
    NETWORK_SQNR = "network_sqnr"
    """Noise to signal of the network's output in dB."""
    FISHER = "fisher"
    """Half the sum over weights of diagonal Fisher information times squared error."""
    HESSIAN_TRACE = "hessian_trace"
    """Mean of the Hessian's diagonal over the site's weights, times the summed squared error."""
    OUTPUT_KL = "output_kl"
    """Mean Kullback-Leibler divergence of the network's output distribution from the float one."""

    @property
    def in_decibels(self) -> bool:
        """Whether it is a logarithm of a ratio."""
        return self in (Score.OUTPUT_SQNR, Score.NETWORK_SQNR)

    @property
    def of_weights_only(self) -> bool:
        """Whether it is defined by derivatives with respect to weights, so that inputs have none."""
        return self in (Score.FISHER, Score.HESSIAN_TRACE)


class Operand(StrEnum):
    """Which tensor of a site is quantized for a score."""

    WEIGHT = "weight"
    INPUT = "input"


class OutputFamily(StrEnum):
    """The distribution whose parameters a network's output is."""

    GAUSSIAN = "gaussian"
    """The mean of a Gaussian of variance 1: a denoiser, a regression."""
    CATEGORICAL = "categorical"
    """Logits over the last dimension: a classifier."""


@dataclass(frozen=True)
class ScoreRequest:
    """A score that a policy asks for.

    Attributes:
        score: what is measured.
        widths: bits to measure it at.
        operand: the tensor that is quantized.
        output: what the network's output means, for divergences and their derivatives.
        rows: rows of the calibration batch, spread evenly, on which the network runs for it.
        probes: Rademacher vectors of the Hessian's trace, for each site.
    """

    score: Score
    widths: tuple[int, ...]
    operand: Operand = Operand.WEIGHT
    output: OutputFamily = OutputFamily.GAUSSIAN
    rows: int = 64
    probes: int = 4
