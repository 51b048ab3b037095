"""timm's networks with folders of labelled images, as tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from quantlab.contracts.config import Strict
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.classifier import ClassifierTask
from quantlab.models.images import ImageFolder
from quantlab.store import digest_of, digest_of_file
from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.zoo.checkpoint import fill, read_weights

HUB = "hf-hub:"
"""Begins a name that timm looks up at the hub."""


class TimmConfig(Strict):
    """Which weights and which images."""

    pretrained: bool = Field(
        False, description="take the weights that belong to the name, from the hub or from timm's cache of it"
    )
    arguments: dict[str, object] = Field(default_factory=dict, description="of timm.create_model, such as img_size")
    data: str | None = Field(
        None, description="folder with a folder for each split, and in it one for each class; from the working folder"
    )
    split: str = Field("val", description="the split that is classified")
    calibration_split: str = Field("train", description="the split that calibration images are drawn from")


class TimmSource:
    """timm's networks, measured on a folder of labelled images."""

    name: ClassVar[str] = "timm"
    paper: ClassVar[str | None] = "Wightman 2019, doi 10.5281/zenodo.4414861"
    version: ClassVar[int] = 1
    Config = TimmConfig

    def __init__(self, config: TimmConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> ClassifierTask:
        """The network by timm's name, on ``device`` in ``dtype``; with neither weights nor ``pretrained``, random ones.

        Raises:
            RecipeError: timm has no such network, or refuses the arguments.
            ModelError: the weights cannot be read or are those of another network, or it has no classes.
        """
        network = create(model, self.config)
        from timm.data import resolve_data_config  # pyright: ignore[reportAttributeAccessIssue]

        num_classes = int(getattr(network, "num_classes", 0))
        if not num_classes:
            raise ModelError(
                "the network gives features and no classes",
                where="model",
                got="num_classes 0",
                next_step="leave num_classes out of model.arguments",
            )
        preparation: dict[str, Any] = resolve_data_config(dict(self.config.arguments), model=network)
        images = folders(self.config, preparation)
        return ClassifierTask(network, num_classes, preparation["input_size"], *images, device, dtype)

    def identity(self, model: Model) -> str:
        """Hash of the weights' file and of which images there are; a name at the hub stands for its weights."""
        file = Path(model.weights) if model.weights else None
        weights = digest_of_file(file) if file is not None and file.is_file() else str(self.config.pretrained)
        return digest_of([weights, *(folder.digest() if folder else None for folder in folders(self.config, {}))])


def create(model: Model, config: TimmConfig) -> nn.Module:
    """Build a network as a recipe describes it; random weights are always the same."""
    ensure_torchvision_imports()
    import timm

    if model.name.startswith(HUB) and not config.pretrained:
        raise RecipeError(
            "a network at the hub is fetched only when the recipe says so",
            where="model.name",
            got=model.name,
            next_step="set model.pretrained to true, or take a name of timm's own and a file: model.weights",
        )
    if model.weights and config.pretrained:
        raise RecipeError(
            "there are two sources of weights", where="model", got="weights and pretrained", next_step="leave one out"
        )
    arguments: dict[str, Any] = dict(config.arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = timm.create_model(model.name, pretrained=config.pretrained, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        close = timm.list_models(f"*{model.name.partition('_')[0]}*")[:6]
        raise RecipeError(
            "timm cannot make this network",
            where="model",
            got=f"{model.name}, {arguments or 'no arguments'}: {str(error).partition(chr(10))[0]}",
            next_step=f"timm.list_models() names them, such as {', '.join(close)}" if close else None,
        ) from error
    if model.weights:
        path = Path(model.weights)
        fill(network, read_weights(path), path, "give a state dict of this network, with the same arguments")
    return network.eval().requires_grad_(False)


def folders(config: TimmConfig, preparation: Mapping[str, Any]) -> tuple[ImageFolder | None, ImageFolder | None]:
    """What is measured on, and what calibration images are drawn from; None without data."""
    if config.data is None:
        return None, None
    root = Path(config.data)
    return ImageFolder(root / config.split, preparation), ImageFolder(root / config.calibration_split, preparation)
