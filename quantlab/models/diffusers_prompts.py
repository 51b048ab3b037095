"""Prompts as a pipeline's own text encoders encode them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.models.conditions import Conditions
from quantlab.models.diffusers_folder import DENOISERS, FIRST_STAGES, Folder
from quantlab.torchvision_shim import ensure_torchvision_imports

PROMPTS_AT_ONCE = 8
Encoded = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Keyword tensors of the denoiser for the prompts [n, ...] and for the empty prompt [n, ...]."""


def encode_prompts(folder: Folder, family: str, prompts: Sequence[str], device: torch.device) -> Conditions:
    """A row of keyword tensors for each prompt; the encoders are loaded for this and let go.

    Args:
        folder: of a pipeline.
        family: the denoiser's class.
        prompts: at least one.
        device: where the encoders run.

    Raises:
        ModelError: the encoders cannot be loaded.
    """
    pipeline = _text_pipeline(folder).to(device)
    encode = ENCODERS[family]
    with torch.no_grad():
        parts = [
            encode(pipeline, list(prompts[start : start + PROMPTS_AT_ONCE]), device)
            for start in range(0, len(prompts), PROMPTS_AT_ONCE)
        ]
    rows = {name: torch.cat([given[name] for given, _ in parts]).cpu() for name in parts[0][0]}
    return Conditions(rows, {name: value[:1].cpu() for name, value in parts[0][1].items()})


def _text_pipeline(folder: Folder) -> Any:
    """The pipeline with its text encoders alone."""
    ensure_torchvision_imports()
    import diffusers

    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "prompts are encoded with the package transformers, which is not installed",
            where="model",
            next_step='pip install "quantlab[text]"',
        ) from error
    dropped = (*DENOISERS, *FIRST_STAGES, "safety_checker", "feature_extractor", "image_encoder")
    without = {name: None for name in dropped if name in folder.index}
    try:
        cls = getattr(diffusers, folder.index["_class_name"])
        return cls.from_pretrained(folder.path, variant=folder.variant, local_files_only=True, **without)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            "the pipeline's text encoders cannot be loaded",
            where=str(folder.path),
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            next_step="give a pipeline's folder with its text encoders and tokenizers",
        ) from error


def _text_unet(pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
    """Stable Diffusion; SDXL has a second encoder with a pooled form, and two results more."""
    if not hasattr(pipeline, "text_encoder_2"):
        text, empty = pipeline.encode_prompt(prompts, device, 1, True)
        return {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(prompts, device=device)
    name, pooled_name = "encoder_hidden_states", "added_cond_kwargs__text_embeds"
    return {name: text, pooled_name: pooled}, {name: empty, pooled_name: empty_pooled}


def _pixart(pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
    text, mask, empty, empty_mask = pipeline.encode_prompt(prompts, device=device)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, (text, mask), strict=True)), dict(zip(names, (empty, empty_mask), strict=True))


def _sd3(pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(prompts, None, None, device=device)
    names = ("encoder_hidden_states", "pooled_projections")
    return dict(zip(names, (text, pooled), strict=True)), dict(zip(names, (empty, empty_pooled), strict=True))


def _flux(pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
    text, pooled, positions = pipeline.encode_prompt(prompts, device=device)
    ids = positions.expand(len(prompts), *positions.shape)
    return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": ids}, {}


ENCODERS: Mapping[str, Callable[[Any, list[str], torch.device], Encoded]] = {
    "UNet2DConditionModel": _text_unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
"""By the denoiser's class in diffusers."""
