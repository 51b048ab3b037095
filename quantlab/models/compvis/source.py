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
from quantlab.models.compvis.text import TOKENIZER, TOKENIZER_FILES, TOKENS, encode_prompts, require_tokenizer
from quantlab.models.conditions import Conditions
from quantlab.models.denoiser import DenoiserTask
from quantlab.store import JSON, digest_of, digest_of_file
from quantlab.zoo.checkpoint import read_weights


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
    prompts: str | None = Field(default=None, description="text file of the prompts, one a line")
    tokenizer: str | None = Field(
        default=None,
        description="folder with vocab.json and merges.txt of CLIP's tokenizer, for prompts without contexts: the "
        "checkpoint's own text encoder encodes them",
    )


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
        contexts = self._contexts(converted, model, device)
        place = device if converted.has_weights else torch.device("meta")
        _check_sampling(sampling, contexts)
        denoiser = denoiser_of(converted, contexts, sampling, place, lambda: self.identity(model))
        return DenoiserTask(denoiser, sampling, place, dtype)

    def identity(self, model: Model) -> str:
        """Hash of checkpoint, config and contexts, and of the version, by which recordings name their inputs."""
        tokenizer = (
            [str(Path(self.config.tokenizer, name)) for name in TOKENIZER_FILES] if self.config.tokenizer else []
        )
        own = (model.weights, str(self._config_file(model)), self.config.contexts, self.config.prompts)
        files = (*own, *tokenizer)
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

    def _contexts(self, converted: LatentDiffusion, model: Model, device: torch.device) -> Contexts | None:
        stage = converted.config.cond_stage_config
        if stage == UNCONDITIONAL:
            return None
        if isinstance(stage, ClassEmbedder):
            assert converted.class_embedder is not None
            return _class_contexts(converted.class_embedder.weight, self.config.unconditional_class)
        return _text_contexts(converted, self.config, model.weights, device)


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


def _text_contexts(
    model: LatentDiffusion, options: CompVisConfig, weights: str | None, device: torch.device
) -> Contexts:
    """The contexts of prompts, from a file or by the text encoder; shapes alone for a model without weights."""
    width = model.config.unet_config.params.context_dim or 0
    if weights is None:
        empty = torch.empty(1, TOKENS, width, device="meta")
        return Contexts(TOKENS, width, True, lambda: table_of(empty, empty[0]))
    if options.contexts is None:
        return _encoded_contexts(options, Path(weights), width, device)
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


def _encoded_contexts(options: CompVisConfig, checkpoint: Path, width: int, device: torch.device) -> Contexts:
    """The contexts of prompts as the checkpoint's own text encoder gives them, once they are needed."""
    if options.prompts is None or options.tokenizer is None:
        raise RecipeError(
            "a model of text needs prompts, and a tokenizer for its text encoder",
            where="model.prompts, model.tokenizer",
            got=f"prompts {options.prompts}, tokenizer {options.tokenizer}",
            next_step=f"model.prompts: a file with one a line; model.tokenizer: a folder with "
            f"{' and '.join(TOKENIZER_FILES)} of {TOKENIZER}; or encoded ones as model.contexts",
        )
    tokenizer, prompts = Path(options.tokenizer), _prompts(Path(options.prompts))
    require_tokenizer(tokenizer)

    def conditions() -> Conditions:
        contexts = encode_prompts(checkpoint, tokenizer, prompts, device)
        if contexts.shape[-1] != width:
            raise ModelError(
                "the checkpoint's text encoder gives contexts of another width than its denoiser takes",
                where=str(checkpoint),
                got=contexts.shape[-1],
                allowed=str(width),
            )
        return table_of(contexts[:-1], contexts[-1])

    return Contexts(TOKENS, width, True, conditions, prompts)


def _prompts(file: Path, count: int | None = None) -> tuple[str, ...]:
    """The prompts in a file, one a line; raises RecipeError for none, or when they are not as many as the contexts."""
    try:
        lines = tuple(file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the prompts cannot be read", where="model.prompts", got=error) from error
    if not lines:
        raise RecipeError(
            "the file holds no prompt", where=f"model.prompts: {file}", next_step="write one on each line"
        )
    if count is not None and len(lines) != count:
        raise RecipeError(
            "there must be as many prompts as contexts",
            where=f"model.prompts: {file}",
            got=len(lines),
            allowed=str(count),
        )
    return lines


def _digest(file: Path) -> str:
    return digest_of_file(file) if file.is_file() else "missing"
