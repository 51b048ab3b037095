"""A latent-diffusion model from its config, with the weights of a checkpoint or with none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.models.compvis.config import ClassEmbedder, LatentDiffusionParams, TextEncoder
from quantlab.models.compvis.first_stage import build_first_stage
from quantlab.models.compvis.unet import build_unet
from quantlab.models.compvis.weights import COND_STAGE, Part, Source, fill
from quantlab.zoo.checkpoint import read_weights

_NEXT_STEP = "give the config that the checkpoint was trained with, as model.config"


@dataclass(frozen=True)
class LatentDiffusion:
    """The converted modules of a model.

    Attributes:
        config: of the original.
        unet: the denoiser of latents, a UNet2DModel or UNet2DConditionModel of diffusers.
        first_stage: a VQModel or AutoencoderKL of diffusers.
        class_embedder: a vector [context_dim] for each class, or None.
        scale_factor: latents of the first stage times this are denoised.
    """

    config: LatentDiffusionParams
    unet: nn.Module
    first_stage: nn.Module
    class_embedder: nn.Embedding | None
    scale_factor: float

    @property
    def has_weights(self) -> bool:
        """False for shapes alone."""
        return not any(parameter.is_meta for parameter in self.unet.parameters())

    @property
    def alphas_cumprod(self) -> Tensor:
        """Products of 1 - beta at every training timestep, float64 [T]."""
        return torch.cumprod(1 - betas_of(self.config), dim=0)


def betas_of(config: LatentDiffusionParams) -> Tensor:
    """The variances of the noise, float64 [T]: evenly spaced in their square roots."""
    start, end = config.linear_start**0.5, config.linear_end**0.5
    return torch.linspace(start, end, config.timesteps, dtype=torch.float64, device="cpu") ** 2


def build(config: LatentDiffusionParams) -> LatentDiffusion:
    """The modules without weights, on the meta device: enough to plan on."""
    unet, first_stage, embedder = parts_of(config)
    return _assembled(config, unet, first_stage, embedder, config.scale_factor)


def load(config: LatentDiffusionParams, file: Path) -> LatentDiffusion:
    """The modules with a checkpoint's weights, the moving average of the denoiser where there is one.

    Raises:
        ModelError: the file cannot be read, or its tensors are not those of the config; the message names them.
    """
    state = read_weights(file)
    unet, first_stage, embedder = parts_of(config)
    parts = [part for part in (unet, first_stage, embedder) if part is not None]
    text = isinstance(config.cond_stage_config, TextEncoder)
    fill(parts, state, str(file), ignored=(COND_STAGE,) if text else ())
    _check_schedule(config, state, str(file))
    return _assembled(config, unet, first_stage, embedder, _scale_factor(config, state, str(file)))


def parts_of(config: LatentDiffusionParams) -> tuple[Part, Part, Part | None]:
    """Denoiser, first stage and class embedder without weights, and where a checkpoint keeps them."""
    with torch.device("meta"):
        unet = build_unet(config.unet_config.params, config.image_size)
        first_stage = build_first_stage(config.first_stage_config)
        embedder = None
        if isinstance(config.cond_stage_config, ClassEmbedder):
            params = config.cond_stage_config.params
            vectors = nn.Embedding(params.n_classes, params.embed_dim)
            embedder = Part(vectors, {"weight": Source(f"{COND_STAGE}embedding.weight")})
    return unet, first_stage, embedder


def _assembled(
    config: LatentDiffusionParams, unet: Part, first_stage: Part, embedder: Part | None, scale_factor: float
) -> LatentDiffusion:
    vectors = embedder.module if embedder is not None else None
    assert vectors is None or isinstance(vectors, nn.Embedding)
    for module in (unet.module, first_stage.module):
        module.eval().requires_grad_(False)
    return LatentDiffusion(config, unet.module, first_stage.module, vectors, scale_factor)


def _scale_factor(config: LatentDiffusionParams, state: Mapping[str, Tensor], where: str) -> float:
    if not config.scale_by_std:
        return config.scale_factor
    if "scale_factor" not in state:
        raise ModelError(
            "the config says scale_by_std and the checkpoint has no scale_factor", where=where, next_step=_NEXT_STEP
        )
    return float(state["scale_factor"])


def _check_schedule(config: LatentDiffusionParams, state: Mapping[str, Tensor], where: str) -> None:
    """Raise ModelError when a checkpoint that holds its noise schedule was trained with another one."""
    betas, expected = state.get("betas"), betas_of(config).float()
    if betas is None or (len(betas) == len(expected) and torch.allclose(betas.float(), expected, rtol=1e-4, atol=0)):
        return
    raise ModelError(
        "the checkpoint was trained with another noise schedule than its config's",
        where=where,
        got=f"{len(betas)} betas from {float(betas[0]):.6g} to {float(betas[-1]):.6g}",
        allowed=f"{len(expected)} from {config.linear_start:.6g} to {config.linear_end:.6g}",
        next_step=_NEXT_STEP,
    )
