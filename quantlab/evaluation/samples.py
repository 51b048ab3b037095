"""What metrics look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
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

    def pick(self, index: Tensor) -> SampleSet:
        """The set with other images in place of its own; what they are compared with stays."""
        return replace(self, **{name: getattr(self, name)[index] for name in OF_EACH_IMAGE})


OF_EACH_IMAGE = ("images", "labels", "features", "logits", "teacher_images")
"""What of a SampleSet belongs to an image."""


class ImageMetric(ABC):
    """A number about a set of images.

    Attributes:
        paired: it compares each image with the float image of the same noise, and means nothing for other noise.
        resamples: its value over images drawn with replacement tells how it varies; false for neighbourhoods, which
            the same image drawn twice would shrink to nothing.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    paired: ClassVar[bool] = False
    resamples: ClassVar[bool] = True
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    @abstractmethod
    def compute(self, samples: SampleSet) -> dict[str, float]:
        """One or more named values."""
