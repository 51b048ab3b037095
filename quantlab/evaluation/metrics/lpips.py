"""Learned perceptual distance to the float model's image of the same noise."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from quantlab.contracts.config import Strict
from quantlab.contracts.model import GenerativeTask
from quantlab.errors import ModelError
from quantlab.evaluation.samples import ImageMetric, SampleSet
from quantlab.evaluation.weights import checkpoints, require_weights

MIN_SIDE = 31
"""Below it the last maps of AlexNet have no pixel."""
BATCH = 64


class Backbone(StrEnum):
    """The network whose maps are compared."""

    ALEX = "alex"
    VGG = "vgg"
    SQUEEZE = "squeeze"

    @property
    def file(self) -> str:
        """Torchvision's file of its weights; the last eight digits begin the file's SHA-256."""
        return {
            Backbone.ALEX: "alexnet-owt-7be5be79.pth",
            Backbone.VGG: "vgg16-397923af.pth",
            Backbone.SQUEEZE: "squeezenet1_1-b8a52dc0.pth",
        }[self]


class LpipsConfig(Strict):
    """Options of LPIPS."""

    backbone: Backbone = Field(Backbone.ALEX, description="alex, as papers report it, vgg or squeeze")
    resize: int | None = Field(None, ge=MIN_SIDE, description="enlarge images to this side first, bilinearly; none: no")


class Lpips(ImageMetric):
    """Perceptual distance to the float image of the same noise, 0 for equal images."""

    name: ClassVar[str] = "lpips"
    paper: ClassVar[str | None] = "Zhang et al. 2018, arXiv 1801.03924"
    paired: ClassVar[bool] = True
    Config = LpipsConfig

    def __init__(self, config: LpipsConfig) -> None:
        self.config = config

    def require(self, task: GenerativeTask) -> None:
        """The backbone's weights, and images that it can look at."""
        self._weights()
        side = min(task.draw_noise(1, 0).shape[-2:])
        if self.config.resize is None and side < MIN_SIDE:
            raise ModelError(
                "the images are too small for the networks of LPIPS",
                where="evaluate.metrics",
                got=f"{side} pixels",
                allowed=f"at least {MIN_SIDE}",
                next_step="use ssim, or have them enlarged: lpips: {resize: 64}",
            )

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``lpips``, mean over images."""
        self._weights()  # before torchmetrics looks for them, which would fetch what is missing
        metric = LearnedPerceptualImagePatchSimilarity(self.config.backbone.value)
        for images, exact in zip(samples.images.split(BATCH), samples.teacher_images.split(BATCH), strict=True):
            metric.update(self._prepared(images), self._prepared(exact))
        return {"lpips": metric.compute().item()}

    def _weights(self) -> Path:
        file = self.config.backbone.file
        digits = file.removesuffix(".pth").rpartition("-")[2]
        return require_weights(
            checkpoints() / file, f"https://download.pytorch.org/models/{file}", "the metric lpips", digits
        )

    def _prepared(self, images: Tensor) -> Tensor:
        """Three channels in [-1, 1], enlarged if asked for."""
        images = images.float().expand(-1, 3, -1, -1)
        if self.config.resize is not None:
            size = (self.config.resize, self.config.resize)
            images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(-1, 1)
        return images
