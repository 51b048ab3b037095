"""What metrics look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel
from torch import Tensor


@dataclass(frozen=True)
class SampleSet:
    """Generated images with everything they are compared with.

    Attributes:
        images: [N, C, H, W] in [-1, 1].
        labels: the class each image was asked for [N].
        features: of the images [N, F].
        logits: of the images [N, K].
        teacher_images: the float model's images from the same noise [N, C, H, W].
        teacher_features: of the float model's images from other noise [N, F].
        reference_features: of real images [M, F].
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    teacher_images: Tensor
    teacher_features: Tensor
    reference_features: Tensor


class ImageMetric(ABC):
    """A number about a set of images."""

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    @abstractmethod
    def compute(self, samples: SampleSet) -> dict[str, float]:
        """One or more named values."""
