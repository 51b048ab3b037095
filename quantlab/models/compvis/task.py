"""A converted latent-diffusion model as a denoiser: its conditions, its noise schedule, images from latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.contracts.model import Inputs
from quantlab.contracts.sections import Sampling
from quantlab.models.compvis.convert import LatentDiffusion
from quantlab.models.conditions import Conditions
from quantlab.models.denoiser import Call, Denoiser, Guidance
from quantlab.sampling import Schedule

CONTEXT = "encoder_hidden_states"
DECODED_TOGETHER = 4
"""Latents that the first stage decodes at once: it needs far more memory than the denoiser."""


@dataclass(frozen=True)
class Contexts:
    """What samples are conditioned on.

    Attributes:
        tokens: L of a context [L, D].
        width: D.
        guided: whether something stands for no condition.
        conditions: makes the table of them; called once, when it is first needed.
        prompts: the text of each condition, where it is text.
    """

    tokens: int
    width: int
    guided: bool
    conditions: Callable[[], Conditions]
    prompts: tuple[str, ...] | None = None

    def example(self, batch: int) -> Inputs:
        """Normal contexts [batch, L, D]."""
        return {CONTEXT: torch.randn(batch, self.tokens, self.width, generator=torch.Generator().manual_seed(3))}


def table_of(contexts: Tensor, unconditional: Tensor | None) -> Conditions:
    """Conditions from a context [L, D] for each, [K, L, D], and the one [L, D] that stands for none."""
    return Conditions({CONTEXT: contexts}, {} if unconditional is None else {CONTEXT: unconditional[None]})


def denoiser_of(
    model: LatentDiffusion,
    contexts: Contexts | None,
    sampling: Sampling,
    device: torch.device,
    digest: Callable[[], str],
) -> Denoiser:
    """The denoiser of latents with what surrounds it.

    Args:
        model: the converted modules.
        contexts: of a conditional model, otherwise None.
        sampling: how images are drawn.
        device: where the first stage goes.
        digest: hashes checkpoint, config and contexts.
    """
    nn.Module.to(model.first_stage, device=device)
    config = model.config
    return Denoiser(
        network=model.unet,
        call=Call(guidance=Guidance.DOUBLED if contexts is not None and contexts.guided else Guidance.NONE),
        noise_shape=(config.channels, config.image_size, config.image_size),
        example=contexts.example if contexts is not None else lambda batch: {},
        conditions=contexts.conditions if contexts is not None else Conditions,
        sampler=lambda: Schedule(model.alphas_cumprod, sampling),
        decode=lambda latents: decode(model, latents).clamp(-1, 1),
        texts=contexts.prompts if contexts is not None else None,
        digest=digest,
        batch=None,
        # The recipes name the layers that the published code keeps; a recipe without keep rules keeps none.
        protect={},
    )


def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Images of denoised latents; a first stage with a codebook takes its nearest entries."""
    first_stage = model.first_stage.decode
    assert callable(first_stage)
    scaled = latents.float() / model.scale_factor
    return torch.cat([first_stage(part, return_dict=False)[0] for part in scaled.split(DECODED_TOGETHER)])
