"""The shapes model: data, architectures and the settings of their training.

The data are drawn (``quantlab.zoo.drawing``): 16x16 RGB images of ten classes, never the same one twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.zoo import drawing
from quantlab.zoo.description import (
    Classifier,
    ClassifierSettings,
    Data,
    DenoiserModel,
    DenoiserSettings,
    Draw,
    Images,
    JudgeModel,
    Lessons,
)

if TYPE_CHECKING:
    from diffusers import UNet2DModel

FEATURES = 64
"""Width of the classifier's last hidden layer, whose activations are the features for FID."""
NUM_REAL = 5000
"""Images in the reference set."""
REAL_SEED = 5000
NUM_TEST = 5000
"""Images that the classifier is tested on."""


def open_drawing() -> Draw:
    """What draws images for training."""
    return drawing.draw


def load_real() -> Tensor:
    """The reference set, classes in turn: float [5000, 3, 16, 16] in [-1, 1]."""
    return drawing.render(torch.arange(NUM_REAL) % drawing.NUM_CLASSES, torch.Generator().manual_seed(REAL_SEED))


def lessons(batch: int, noise: float, rng: torch.Generator) -> Lessons:
    """New images for every batch, with noise."""
    test = drawing.draw(NUM_TEST, rng)

    def batches() -> Iterator[Images]:
        while True:
            images, labels = drawing.draw(batch, rng)
            yield images + noise * torch.randn(images.shape, generator=rng), labels

    return Lessons(batches(), test)


def digest_of_images(images: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of the images' values."""
    return hashlib.sha256(images.numpy().astype("<f4").tobytes()).hexdigest()[:16]


def build_unet() -> UNet2DModel:
    """The class-conditional denoiser, about 2.8 M parameters, with torch's default initialisation."""
    ensure_torchvision_imports()
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=drawing.NUM_CLASSES + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


class ShapeClassifier(Classifier):
    """Small convolutional classifier of shapes; its last hidden layer gives the features for FID."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 96, 3, padding=1, stride=2)
        self.hidden = nn.Linear(96 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, drawing.NUM_CLASSES)

    def feature_map(self, images: Tensor) -> Tensor:
        """Activations after the ReLU of the last convolution: [B, 3, 16, 16] -> [B, 96, 4, 4]."""
        x = images
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(convolution(x))
        return x

    def features(self, images: Tensor) -> Tensor:
        """Activations after the ReLU of the hidden layer: [B, 3, 16, 16] -> [B, 64]."""
        return F.relu(self.hidden(self.feature_map(images).flatten(1)))


DATA = Data(
    image_shape=drawing.IMAGE_SHAPE,
    num_classes=drawing.NUM_CLASSES,
    open=open_drawing,
    lessons=lessons,
    real=load_real,
    real_name=f"shapes: {NUM_REAL} images of seed {REAL_SEED}",
    digest=digest_of_images,
)
JUDGE = JudgeModel("shapes-classifier", DATA, ShapeClassifier, ClassifierSettings(iterations=1200))
SETTINGS = DenoiserSettings(iterations=18000, batch=32, learning_rate=1e-3, decay=5000, ema_decay=0.999)
DENOISERS = (DenoiserModel("shapes", JUDGE, build_unet, SETTINGS),)
