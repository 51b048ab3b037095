"""The digits models: data, architectures and files.

The data are the 1,797 scans of scikit-learn's ``load_digits``, 8x8 grey images of ten classes, native size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.torchvision_shim import ensure_torchvision_imports

if TYPE_CHECKING:
    from diffusers import UNet2DModel

CLASSIFIER = "digits-classifier"
"""The zoo's name of the classifier."""
NUM_CLASSES = 10
NULL_CLASS = 10
"""The label that stands for "no class" in classifier-free guidance."""
IMAGE_SHAPE = (1, 8, 8)
FEATURES = 64
"""Width of the classifier's last hidden layer, whose activations are the features for FID."""
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Initialisation:
    """How the weights of a digits denoiser start.

    Attributes:
        name: the model's name in the zoo.
        max_sigma: each output channel draws sigma from U(0, max_sigma) and multiplies its weights by
            exp(sigma * N(0, 1)), rescaled to the channel's original standard deviation; 0 leaves torch's own start.
        learning_rate: peak rate of the one-cycle schedule.
    """

    name: str
    max_sigma: float
    learning_rate: float


INITIALISATIONS: Mapping[str, Initialisation] = {
    "digits": Initialisation("digits", max_sigma=0.0, learning_rate=2e-3),
    "digits-heavy": Initialisation("digits-heavy", max_sigma=1.2, learning_rate=1.5e-3),
}


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


class DigitClassifier(nn.Module):
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

    def forward(self, images: Tensor) -> Tensor:
        """Class logits: [B, 1, 8, 8] -> [B, 10]."""
        return self.head(self.features(images))


def weights_path(name: str) -> Path:
    """Where the weights of a zoo model lie: fp16 safetensors beside this file."""
    return Path(__file__).with_name("weights") / f"{name}.safetensors"


def _load(module: nn.Module, name: str, path: Path | None = None) -> nn.Module:
    """Fill a module with a zoo model's weights; raises ModelError when the file is missing, damaged or foreign."""
    from quantlab.zoo.checkpoint import fill, read_weights

    shipped = weights_path(name)
    again = f"install quantlab again, or train it: quantlab zoo train {name} --output {shipped.parent}"
    own = f"give weights that quantlab zoo train {name} wrote"
    return fill(module, read_weights(path or shipped), path or shipped, own if path else again)


def load_unet(name: str, path: Path | None = None) -> UNet2DModel:
    """A trained denoiser by its zoo name, in float32 and evaluation mode; ``path`` has other weights of it."""
    return _load(build_unet(), name, path)  # type: ignore[return-value]


def load_classifier() -> DigitClassifier:
    """The trained classifier, in float32 and evaluation mode."""
    return _load(DigitClassifier(), CLASSIFIER)  # type: ignore[return-value]
