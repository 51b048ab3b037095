"""The classifier of digits that ships as a model to quantize: a small vision transformer of timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.zoo import digits
from quantlab.zoo.description import ClassifierSettings, Images, Lessons

TEST_SHARE = 0.5
"""Of the scans, what is held out: as many as can be spared, since the interval of top-1 follows from their number."""


@dataclass(frozen=True)
class VisionModel:
    """A classifier of the zoo.

    Attributes:
        image_shape: channels, height, width.
        num_classes: labels are 0 to this.
        build: makes the network with torch's default initialisation.
        lessons: from a batch size, the standard deviation of added noise and a generator.
        split: images that it learns from, without shifts and noise, and images that it does not.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    build: Callable[[], nn.Module]
    lessons: Callable[[int, float, torch.Generator], Lessons]
    split: Callable[[], tuple[Images, Images]]
    settings: ClassifierSettings


def build_vit() -> nn.Module:
    """timm's VisionTransformer on 16 patches of 2x2 pixels, about 0.2 M parameters."""
    ensure_torchvision_imports()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=digits.IMAGE_SHAPE[1],
        patch_size=2,
        in_chans=digits.IMAGE_SHAPE[0],
        num_classes=digits.NUM_CLASSES,
        embed_dim=64,
        depth=4,
        num_heads=4,
    )


def lessons(batch: int, noise: float, rng: torch.Generator) -> Lessons:
    """Half of the scans, shifted and with noise, again and again; the other half are the test."""
    return digits.lessons(batch, noise, rng, TEST_SHARE)


SETTINGS = ClassifierSettings(iterations=1500, batch=64)


def split() -> tuple[Images, Images]:
    """The half of the scans that the network was trained on, and the half that it has not seen."""
    return digits.split(torch.Generator().manual_seed(SETTINGS.seed), TEST_SHARE)


VIT = VisionModel("digits-vit", digits.IMAGE_SHAPE, digits.NUM_CLASSES, build_vit, lessons, split, SETTINGS)
