"""The zoo's models by name, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from quantlab.zoo import digits, shapes, vision
from quantlab.zoo.checkpoint import fill, read_weights
from quantlab.zoo.description import Classifier, DenoiserModel, JudgeModel

if TYPE_CHECKING:
    from diffusers import UNet2DModel

DENOISERS: Mapping[str, DenoiserModel] = {model.name: model for model in (*digits.DENOISERS, *shapes.DENOISERS)}
JUDGES: Mapping[str, JudgeModel] = {judge.name: judge for judge in (digits.JUDGE, shapes.JUDGE)}

VISION: Mapping[str, vision.VisionModel] = {model.name: model for model in (vision.VIT,)}
"""Classifiers to quantize, with weights that ship."""


def weights_path(name: str) -> Path:
    """Where the weights of a zoo model lie: fp16 safetensors beside this file."""
    return Path(__file__).with_name("weights") / f"{name}.safetensors"


def load_denoiser(model: DenoiserModel, path: Path | None = None) -> UNet2DModel:
    """The trained network, in float32 and evaluation mode; ``path`` has other weights of it.

    Raises:
        ModelError: the weights are missing, damaged or another model's.
    """
    return _load(model.build(), model.name, path)  # type: ignore[return-value]


def load_judge(judge: JudgeModel) -> Classifier:
    """The trained classifier, in float32 and evaluation mode; raises ModelError as ``load_denoiser`` does."""
    return _load(judge.build(), judge.name)  # type: ignore[return-value]


def load_vision(model: vision.VisionModel, path: Path | None = None) -> nn.Module:
    """The trained network, in float32 and evaluation mode; as ``load_denoiser``."""
    return _load(model.build(), model.name, path)


def _load(module: nn.Module, name: str, path: Path | None = None) -> nn.Module:
    shipped = weights_path(name)
    again = f"install quantlab again, or train it: quantlab zoo train {name} --output {shipped.parent}"
    own = f"give weights that quantlab zoo train {name} wrote"
    return fill(module, read_weights(path or shipped), path or shipped, own if path else again)
