"""Corrections of the sampler for the errors of a quantized model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor


@dataclass(frozen=True)
class CorrectionData:
    """What both models predict on the recorded trajectories, guidance included.

    Attributes:
        timesteps: of the S recorded steps, from the noisiest to the cleanest [S].
        float_predictions: of the float model [S, N, C, H, W].
        quantized_predictions: of the quantized model on the same inputs.
    """

    timesteps: Tensor
    float_predictions: Tensor
    quantized_predictions: Tensor


@dataclass(frozen=True)
class CorrectionStep:
    """A step of the sampler.

    Attributes:
        index: the recorded step whose timestep is nearest to this one's.
        alpha: the product of 1 - beta up to this timestep.
        alpha_previous: that at the timestep which the step leads to.
    """

    index: int
    alpha: float
    alpha_previous: float


class Correction(ABC):
    """Corrects predictions, and the noise that the sampler adds, by what was measured before.

    A correction is built from its validated ``Config`` and keeps nothing: what ``fit`` returns is stored with the model
    and handed to the other two.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    @abstractmethod
    def fit(self, data: CorrectionData) -> Mapping[str, Tensor]:
        """What is stored, by name."""

    @abstractmethod
    def correct(self, fitted: Mapping[str, Tensor], index: int, prediction: Tensor) -> Tensor:
        """The corrected prediction [B, C, H, W], guidance included, in its dtype; ``index`` is of the recorded step."""

    def variance(self, fitted: Mapping[str, Tensor], step: CorrectionStep, variance: float) -> float:
        """The variance of the noise to add where the sampler adds ``variance``; never asked where it adds none."""
        return variance


@dataclass(frozen=True)
class FittedCorrection:
    """A correction with what it has measured.

    Attributes:
        correction: its arithmetic.
        timesteps: of the recorded steps [S], that a step of the sampler is looked up among.
        tensors: what ``fit`` returned.
    """

    correction: Correction
    timesteps: Tensor
    tensors: Mapping[str, Tensor]
