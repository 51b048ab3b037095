"""Transformations of a site that keep its float function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor


class SmoothingPass(ABC):
    """Chooses per-input-channel scales: the weight is multiplied by them, the input divided.

    The float function of the site is unchanged, which the engine checks.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    @abstractmethod
    def scales(self, weight_absmax: Tensor, input_absmax: Tensor) -> Tensor:
        """Positive finite scales [in] from the largest magnitudes [in] of weight and input per input channel."""
