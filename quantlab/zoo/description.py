"""What a model of the zoo is: its data, its judge, its network and how they are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DModel

TRAIN_TIMESTEPS = 1000

Images = tuple[Tensor, Tensor]
"""Images, float [N, C, H, W] in [-1, 1], and their classes, int64 [N]."""
Draw = Callable[[int, torch.Generator], Images]
"""Random images, as many as asked for."""


@dataclass(frozen=True)
class Lessons:
    """What a classifier learns from.

    Attributes:
        batches: without end, to learn from.
        test: images that are in no batch.
    """

    batches: Iterator[Images]
    test: Images


@dataclass(frozen=True)
class Data:
    """Labelled images.

    Attributes:
        image_shape: channels, height, width.
        num_classes: labels are 0 to this; the label ``num_classes`` itself stands for "no class" in guidance.
        open: makes what draws random images for training.
        lessons: from a batch size, the standard deviation of added noise and a generator.
        real: the images that drawn ones are compared with.
        real_name: of that set, in reports.
        digest: hash of such images.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    open: Callable[[], Draw]
    lessons: Callable[[int, float, torch.Generator], Lessons]
    real: Callable[[], Tensor]
    real_name: str
    digest: Callable[[Tensor], str]


class Classifier(nn.Module, ABC):
    """A classifier whose last hidden layer gives the features for FID."""

    head: nn.Linear

    @abstractmethod
    def feature_map(self, images: Tensor) -> Tensor:
        """Activations after the ReLU of the last convolution: [N, C, H, W] -> [N, F', H', W']."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Activations after the ReLU of the last hidden layer: [N, C, H, W] -> [N, F]."""

    def forward(self, images: Tensor) -> Tensor:
        """Class logits: [N, C, H, W] -> [N, classes]."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of a classifier's training."""

    iterations: int
    batch: int = 128
    learning_rate: float = 2e-3
    noise: float = 0.1  # standard deviation of the noise added to an image
    seed: int = 0


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of a denoiser's training.

    Attributes:
        learning_rate: peak of the schedule.
        decay: iterations at the end over which the rate falls to 0 in a line, after a short rise and a constant rate,
            so that a longer training begins as a shorter one does; None is one cycle over all iterations.
        max_sigma: each output channel starts from weights multiplied by exp(sigma * N(0, 1)) and rescaled to the
            channel's original standard deviation, sigma drawn from U(0, max_sigma); 0 leaves torch's own start.
    """

    iterations: int
    batch: int = 128
    learning_rate: float = 2e-3
    decay: int | None = None
    max_sigma: float = 0.0
    weight_decay: float = 1e-3
    drop_label: float = 0.1  # share of the labels replaced by the null class
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class JudgeModel:
    """A classifier of the zoo."""

    name: str
    data: Data
    build: Callable[[], Classifier]
    settings: ClassifierSettings


@dataclass(frozen=True)
class DenoiserModel:
    """A class-conditional denoiser of the zoo, and the classifier that its images are judged by."""

    name: str
    judge: JudgeModel
    build: Callable[[], UNet2DModel]
    settings: DenoiserSettings

    @property
    def data(self) -> Data:
        """The images that both learn."""
        return self.judge.data
