"""The denoiser of a diffusers pipeline, as a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantlab.contracts.config import Strict
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.conditions import Conditions, class_conditions
from quantlab.models.denoiser import Denoiser, DenoiserTask
from quantlab.models.diffusers_families import Family, family_of
from quantlab.models.diffusers_folder import Folder, decode, open_folder, unpacked
from quantlab.models.diffusers_prompts import encode_prompts
from quantlab.sampling import FlowSchedule, Sampler, Schedule
from quantlab.store import digest_of, digest_of_file
from quantlab.zoo.checkpoint import fill, read_weights

PIXELS_PER_LATENT = 8
"""Of the usual first stages; for a single component, whose pipeline is not at hand."""


class DiffusersConfig(Strict):
    """Which part of the pipeline, and what its samples are conditioned on."""

    component: Literal["unet", "transformer"] | None = Field(
        default=None, description="the denoiser; none: the one that the pipeline has"
    )
    revision: str | None = Field(default=None, description="of a hub repository: a commit, branch or tag")
    variant: str | None = Field(default=None, description="of the weights' files, such as fp16")
    prompts: str | None = Field(
        default=None, description="file with a prompt on each line, from the working folder; for models of text"
    )
    first_class: int = Field(default=0, ge=0, description="of the classes that samples have in turn")
    last_class: int | None = Field(default=None, ge=0, description="of them; none: the last that the model knows")
    null_class: int | None = Field(
        default=None, ge=0, description="stands for no class, for guidance; none: DiT's own, and no guidance for a UNet"
    )
    sample_size: int | None = Field(
        default=None, ge=1, description="height and width of what is denoised, in latents; none: the model's own"
    )
    decode: bool = Field(default=True, description="decode latents with the pipeline's first stage when images are due")


class DiffusersSource:
    """The denoiser of a diffusers pipeline: a folder of save_pretrained, or a hub id."""

    name: ClassVar[str] = "diffusers"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = DiffusersConfig

    def __init__(self, config: DiffusersConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> DenoiserTask:
        """The task of the denoiser in the folder or repository ``model.name``.

        Raises:
            ModelError: the folder, one of its components or the prompts cannot be read, or the denoiser is not known.
            RecipeError: an option does not fit the denoiser.
        """
        config = self.config
        folder = open_folder(model.name, config.revision, config.variant)
        network = folder.load_denoiser(config.component, dtype)
        if model.weights:
            fill(network, read_weights(Path(model.weights)), Path(model.weights), "give weights of this denoiser")
        scale = folder.pixels_per_latent(1 if folder.index else PIXELS_PER_LATENT)
        family = family_of(network, config.sample_size, scale, config.null_class)
        prompts = read_prompts(config.prompts) if config.prompts else None
        _check(config, family, type(network).__name__)
        source = _Conditioning(folder, family, config, prompts, type(network).__name__, device)
        denoiser = Denoiser(
            network=network,
            call=family.call,
            noise_shape=family.noise_shape,
            example=family.example_inputs,
            conditions=source.conditions,
            sampler=lambda: sampler_of(folder, family, sampling),
            decode=_decoder(folder, family, config.decode, device),
            texts=prompts,
            digest=source.digest,
        )
        return DenoiserTask(denoiser, sampling, device, dtype)

    def identity(self, model: Model) -> str:
        """Hash of the denoiser's files, or of other weights, and of the prompts."""
        folder = open_folder(model.name, self.config.revision, self.config.variant)
        component = folder.denoiser(self.config.component)
        own = folder.digest(*filter(None, (component, "scheduler", folder.first_stage)))
        others = [digest_of_file(Path(file)) for file in (model.weights, self.config.prompts) if file]
        return digest_of([own, *others])


def read_prompts(file: str) -> tuple[str, ...]:
    """The lines of a file that are not empty.

    Raises:
        ModelError: it cannot be read, or holds no prompt.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError("the prompts cannot be read", where=f"model.prompts: {file}", got=error) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ModelError("the file holds no prompt", where=f"model.prompts: {file}", next_step="write one on each line")
    return prompts


def _check(config: DiffusersConfig, family: Family, network: str) -> None:
    """Raise RecipeError for options about conditions that this denoiser does not have."""
    if config.prompts and not family.takes_text:
        raise RecipeError("this denoiser is not conditioned on text", where="model.prompts", got=network)
    named = {"first_class": config.first_class, "last_class": config.last_class, "null_class": config.null_class}
    wanted = [name for name, value in named.items() if value]
    if wanted and not family.classes:
        raise RecipeError("this denoiser knows no classes", where=f"model.{wanted[0]}", got=network)
    last = family.classes - 1 if config.last_class is None else config.last_class
    if family.classes and not config.first_class <= last < family.classes:
        raise RecipeError(
            "there are no such classes",
            where="model.first_class, model.last_class",
            got=f"{config.first_class}, {last}",
            allowed=f"0 <= first <= last < {family.classes}",
        )


@dataclass(frozen=True)
class _Conditioning:
    """What the samples are conditioned on, made when it is first needed."""

    folder: Folder
    family: Family
    config: DiffusersConfig
    prompts: tuple[str, ...] | None
    network: str
    device: torch.device

    def conditions(self) -> Conditions:
        """A row for each prompt or class.

        Raises:
            ModelError: a model of text has no prompts.
        """
        family, config = self.family, self.config
        if family.takes_text:
            if self.prompts is None:
                raise ModelError(
                    "this model draws from text, and there are no prompts",
                    where="model.prompts",
                    next_step="give a file with a prompt on each line",
                )
            encoded = encode_prompts(self.folder, self.network, self.prompts, self.device)
            return replace(encoded, fixed=family.fixed)
        if not family.classes:
            return Conditions(fixed=family.fixed)
        last = family.classes - 1 if config.last_class is None else config.last_class
        return class_conditions("class_labels", range(config.first_class, last + 1), family.null_class)

    def digest(self) -> str:
        """Hash of prompts, classes and sizes, and of the components that encode and decode."""
        beside = [name for name in self.folder.index if name.startswith(("text_encoder", "tokenizer"))]
        used = [name for name in beside if self.prompts and self.folder.has(name)]
        used += [self.folder.first_stage] if self.folder.first_stage and self.config.decode else []
        settings = self.config.model_dump(mode="json", exclude={"revision", "variant", "component", "prompts"})
        scheduler = dict(self.folder.scheduler()) if (self.folder.path / "scheduler").is_dir() else {}
        files = self.folder.digest(*used) if self.folder.index else ""
        return digest_of([list(self.prompts or ()), settings, {k: repr(v) for k, v in scheduler.items()}, files])


def sampler_of(folder: Folder, family: Family, settings: Sampling) -> Sampler:
    """The recipe's sampler over the noise levels of the pipeline's own scheduler.

    Raises:
        RecipeError: the sampler is for another kind of prediction than the model's, or eta is not for it.
    """
    config = folder.scheduler()
    flows = str(config.get("_class_name", "")).startswith("FlowMatch")
    fitting = "flow-euler" if flows else "ddim"
    if settings.scheduler != fitting:
        raise RecipeError(
            "the model was trained for another kind of sampler",
            where="sampling.scheduler",
            got=settings.scheduler,
            allowed=fitting,
            next_step=f"its own scheduler is {config.get('_class_name')}: set sampling.scheduler to {fitting}",
        )
    if not flows:
        return Schedule.of(config, settings)
    if settings.eta:
        raise RecipeError(
            "Euler's method along a flow adds no noise", where="sampling.eta", got=settings.eta, allowed="0"
        )
    tokens = (family.size // 2) ** 2
    return FlowSchedule(config, settings, tokens)


def _decoder(folder: Folder, family: Family, wanted: bool, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From samples to images; the first stage is loaded in float32 when it is first needed."""

    @cache
    def first_stage() -> torch.nn.Module:
        assert folder.first_stage is not None
        return folder.load(folder.first_stage, torch.float32).requires_grad_(False).to(device)

    def images(samples: Tensor) -> Tensor:
        latents = unpacked(samples) if family.packed else samples
        if folder.first_stage is None:
            return latents.clamp(-1, 1) if folder.index else latents
        return decode(first_stage(), latents) if wanted else latents

    return images
