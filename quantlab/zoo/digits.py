"""The digits models: data, architectures and the settings of their training.

The data are the 1,797 scans of scikit-learn's ``load_digits``, 8x8 grey images of ten classes, native size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.store import digest_of
from quantlab.torchvision_shim import ensure_torchvision_imports
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

NUM_CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)
FEATURES = 64
"""Width of the classifier's last hidden layer, whose activations are the features for FID."""
TEST_SHARE = 0.2
"""Of the scans, what the classifier is tested on."""


def load_images() -> tuple[Tensor, Tensor]:
    """All scans as float images [1797, 1, 8, 8] in [-1, 1], and their classes, int64 [1797]."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 8.0 - 1.0  # 0 to 16 becomes -1 to 1
    return images.view(-1, *IMAGE_SHAPE), torch.tensor(classes, dtype=torch.int64)


def build_unet() -> UNet2DModel:
    """The class-conditional denoiser, about 1.1 M parameters, with torch's default initialisation."""
    ensure_torchvision_imports()
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


class DigitClassifier(Classifier):
    """Small convolutional classifier of digits; its last hidden layer gives the features for FID."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def feature_map(self, images: Tensor) -> Tensor:
        """Activations after the ReLU of the last convolution: [B, 1, 8, 8] -> [B, 64, 2, 2]."""
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x))
        return F.relu(self.conv3(x))

    def features(self, images: Tensor) -> Tensor:
        """Activations after the ReLU of the hidden layer: [B, 1, 8, 8] -> [B, 64]."""
        return F.relu(self.hidden(self.feature_map(images).flatten(1)))


def open_images() -> Draw:
    """What picks scans at random, for training."""
    images, labels = load_images()

    def draw(count: int, rng: torch.Generator) -> Images:
        pick = torch.randint(len(images), (count,), generator=rng)
        return images[pick], labels[pick]

    return draw


def split(rng: torch.Generator, test_share: float) -> tuple[Images, Images]:
    """The scans in random order, in two parts: those to learn from, and those held out."""
    images, labels = load_images()
    order = torch.randperm(len(images), generator=rng)
    num_test = round(len(images) * test_share)
    test, train = order[:num_test], order[num_test:]
    return (images[train], labels[train]), (images[test], labels[test])


def lessons(batch: int, noise: float, rng: torch.Generator, test_share: float = TEST_SHARE) -> Lessons:
    """All scans but a share, in random order, shifted and with noise, again and again; the share is the test."""
    (images, labels), test = split(rng, test_share)

    def batches() -> Iterator[Images]:
        while True:
            shuffled = torch.randperm(len(images), generator=rng)
            whole = len(images) // batch
            for pick in shuffled[: whole * batch].view(whole, batch):
                yield _augment(images[pick], noise, rng), labels[pick]

    return Lessons(batches(), test)


def _augment(images: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel and add noise: [B, 1, 8, 8] -> the same."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    shift = torch.randint(3, (len(images), 2), generator=rng)
    rows = shift[:, :1] + torch.arange(size)
    columns = shift[:, 1:] + torch.arange(size)
    shifted = padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return shifted.unsqueeze(1) + noise * torch.randn(images.shape, generator=rng)


def load_real() -> Tensor:
    """All scans: float [1797, 1, 8, 8] in [-1, 1]."""
    return load_images()[0]


def digest_of_images(images: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of the images' values."""
    return digest_of(images.tolist())


DATA = Data(
    image_shape=IMAGE_SHAPE,
    num_classes=NUM_CLASSES,
    open=open_images,
    lessons=lessons,
    real=load_real,
    real_name="digits: load_digits, 1797 images",
    digest=digest_of_images,
)
JUDGE = JudgeModel("digits-classifier", DATA, DigitClassifier, ClassifierSettings(iterations=440))
DENOISERS = (
    DenoiserModel("digits", JUDGE, build_unet, DenoiserSettings(iterations=1800)),
    DenoiserModel(
        "digits-heavy", JUDGE, build_unet, DenoiserSettings(iterations=1800, learning_rate=1.5e-3, max_sigma=1.2)
    ),
)
