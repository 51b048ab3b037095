"""The source ``compvis`` of a recipe's model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from quantlab.contracts.config import Strict
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError, nearest
from quantlab.models.compvis.config import ARCHITECTURES, UNCONDITIONAL, ClassEmbedder, architectures, read_config
from quantlab.models.compvis.convert import LatentDiffusion, build, load
from quantlab.models.compvis.task import Contexts, denoiser_of, table_of
from quantlab.models.denoiser import DenoiserTask
from quantlab.store import JSON, digest_of, digest_of_file
from quantlab.zoo.checkpoint import read_weights

TOKENS = 77
"""Of a prompt, as CLIP's tokenizer pads it."""


class CompVisConfig(Strict):
    """Options of a latent-diffusion checkpoint."""

    config: str | None = Field(
        default=None, description="the YAML file it was trained with; none: the one that ships under the model's name"
    )
    unconditional_class: int | None = Field(
        default=None, ge=0, description="the class that stands for no class; 1000 for cin256-v2"
    )
    contexts: str | None = Field(
        default=None,
        description="safetensors with the text encoder's outputs: contexts [prompts, tokens, width] and unconditional "
        "[tokens, width]",
    )
    prompts: str | None = Field(default=None, description="text file of the prompts of the contexts, one a line")


class CompVisSource:
    """Latent-diffusion checkpoints of CompVis: model.ckpt with its config, Stable Diffusion v1 included."""

    name: ClassVar[str] = "compvis"
    paper: ClassVar[str | None] = "Rombach et al. 2022, arXiv 2112.10752"
    version: ClassVar[int] = 2
    needs_name: ClassVar[bool] = False
    Config = CompVisConfig

    def __init__(self, config: CompVisConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> DenoiserTask:
        """The model as a task; without ``model.weights`` one to plan on, its tensors on the meta device.

        Raises:
            RecipeError: no config has this name, or an option does not fit the model.
            ModelError: config or checkpoint cannot be read, or do not fit one another.
        """
        params = read_config(self._config_file(model))
        converted = load(params, Path(model.weights)) if model.weights else build(params)
        contexts, place = self._contexts(converted), device if converted.has_weights else torch.device("meta")
        _check_sampling(sampling, contexts)
        denoiser = denoiser_of(converted, contexts, sampling, place, lambda: self.identity(model))
        return DenoiserTask(denoiser, sampling, place, dtype)

    def identity(self, model: Model) -> str:
        """Hash of checkpoint, config and contexts, and of the version, by which recordings name their inputs."""
        files = (model.weights, str(self._config_file(model)), self.config.contexts, self.config.prompts)
        parts: list[JSON] = [_digest(Path(file)) if file else "none" for file in files]
        return digest_of([self.version, *parts, self.config.unconditional_class])

    def _config_file(self, model: Model) -> Path:
        if self.config.config is not None:
            return Path(self.config.config)
        if model.name not in architectures():
            raise RecipeError(
                "no config ships under this name",
                where="model.name",
                got=model.name,
                allowed=", ".join(architectures()),
                next_step=nearest(model.name, architectures()) or "give the checkpoint's own: model.config",
            )
        return ARCHITECTURES / f"{model.name}.yaml"

    def _contexts(self, model: LatentDiffusion) -> Contexts | None:
        stage = model.config.cond_stage_config
        if stage == UNCONDITIONAL:
            return None
        if isinstance(stage, ClassEmbedder):
            assert model.class_embedder is not None
            return _class_contexts(model.class_embedder.weight, self.config.unconditional_class)
        return _text_contexts(model, self.config)


def _class_contexts(vectors: torch.Tensor, unconditional: int | None) -> Contexts:
    """A context of one token for each class; the one that stands for none must be the last, and is not asked for."""
    classes = len(vectors)
    if unconditional not in (None, classes - 1):
        raise RecipeError(
            "the class that stands for none is the last one",
            where="model.unconditional_class",
            got=unconditional,
            allowed=str(classes - 1),
        )
    asked = vectors if unconditional is None else vectors[:-1]
    table = table_of(asked[:, None], None if unconditional is None else vectors[-1:])
    return Contexts(1, vectors.shape[1], unconditional is not None, lambda: table)


def _check_sampling(sampling: Sampling, contexts: Contexts | None) -> None:
    """Raise RecipeError for a sampler or a guidance that the model is not for."""
    if sampling.scheduler != "ddim":
        raise RecipeError(
            "the model predicts noise", where="sampling.scheduler", got=sampling.scheduler, allowed="ddim"
        )
    if sampling.guidance != 1.0 and (contexts is None or not contexts.guided):
        raise RecipeError(
            "this model cannot be guided: nothing stands for no condition",
            where="sampling.guidance",
            got=sampling.guidance,
            allowed="1",
            next_step="name the class that stands for none: model.unconditional_class",
        )


def _text_contexts(model: LatentDiffusion, options: CompVisConfig) -> Contexts:
    """The contexts of prompts, from a file; shapes alone for a model without weights."""
    width = model.config.unet_config.params.context_dim or 0
    if not model.has_weights:
        empty = torch.empty(1, TOKENS, width, device="meta")
        return Contexts(TOKENS, width, True, lambda: table_of(empty, empty[0]))
    if options.contexts is None:
        raise RecipeError(
            "a model of text needs the contexts of its prompts",
            where="model.contexts",
            next_step="encode the prompts with the model's text encoder and save them: contexts, unconditional",
        )
    tensors = read_weights(Path(options.contexts))
    contexts, without = tensors.get("contexts"), tensors.get("unconditional")
    if contexts is None or without is None or contexts.shape[1:] != without.shape or without.shape[-1] != width:
        raise ModelError(
            "these are no contexts of this model",
            where=options.contexts,
            got=", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items()),
            allowed=f"contexts [prompts, {TOKENS}, {width}], unconditional [{TOKENS}, {width}]",
        )
    table = table_of(contexts.float(), without.float())
    prompts = _prompts(Path(options.prompts), len(contexts)) if options.prompts else None
    return Contexts(len(without), width, True, lambda: table, prompts)


def _prompts(file: Path, count: int) -> tuple[str, ...]:
    """The prompts in a file, one a line; raises RecipeError when they are not as many as the contexts."""
    try:
        lines = tuple(file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the prompts cannot be read", where="model.prompts", got=error) from error
    if len(lines) != count:
        raise RecipeError(
            "there must be as many prompts as contexts",
            where=f"model.prompts: {file}",
            got=len(lines),
            allowed=str(count),
        )
    return lines


def _digest(file: Path) -> str:
    return digest_of_file(file) if file.is_file() else "missing"
