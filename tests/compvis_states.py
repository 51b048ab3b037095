"""State dicts of latent-diffusion checkpoints, of reproducible random values."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import Tensor

from quantlab.models.compvis.config import LatentDiffusionParams
from quantlab.models.compvis.convert import betas_of, parts_of


def random_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A tensor for each key and shape, from a generator that the key seeds: of a size that lets signals pass.

    Matrices and kernels have variance 1 / inputs, factors of a norm lie around 1, the rest is small.
    """
    state = {}
    for key, shape in shapes.items():
        rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        value = torch.randn(tuple(shape), generator=rng, dtype=torch.float64)
        if len(shape) > 1:
            value = value / (value[0].numel() ** 0.5)
        else:
            value = 0.1 * value + (1.0 if key.endswith("weight") else 0.0)
        state[key] = value.float()
    return state


def tiny_config(name: str, **unet: Any) -> dict[str, Any]:
    """The content of a config file: a model of one kind with few channels."""
    conditions = {
        "none": "__is_unconditional__",
        "classes": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": 5, "embed_dim": 24},
        },
        "text": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }
    transformer = {} if name == "none" else {"use_spatial_transformer": True, "context_dim": 24}
    double = unet.pop("first_stage", "vq") == "kl"
    channels = 4 if double else 3
    inner = {
        "double_z": double,
        "z_channels": channels,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    first_stage: dict[str, Any] = {"embed_dim": channels, "ddconfig": inner}
    if not double:
        first_stage["n_embed"] = 16
    kind = "AutoencoderKL" if double else "VQModelInterface"
    settings = {
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 2,
        **transformer,
        **unet,
    }
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "channels": channels,
        "monitor": "val/loss",
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": settings},
        "first_stage_config": {"target": f"ldm.models.autoencoder.{kind}", "params": first_stage},
        "cond_stage_config": conditions[name],
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def tiny_checkpoint(folder: Path, name: str, *, first_stage: str = "vq") -> tuple[Path, Path]:
    """A checkpoint and its config in ``folder``, as the original saves them: ``model.ckpt`` and ``config.yaml``."""
    content = tiny_config(name, first_stage=first_stage)
    config = LatentDiffusionParams.model_validate(content["model"]["params"])
    YAML().dump(content, folder / "config.yaml")
    torch.save({"state_dict": checkpoint_state(config)}, folder / "model.ckpt")
    return folder / "model.ckpt", folder / "config.yaml"


def checkpoint_state(config: LatentDiffusionParams) -> dict[str, Tensor]:
    """A checkpoint's tensors, by the original's names."""
    shapes: dict[str, list[int]] = {}
    for part in filter(None, parts_of(config)):
        for name, value in part.module.state_dict().items():
            source = part.sources[name]
            shape = list(value.shape)
            shapes[source.key] = [shape[0] * source.of, *shape[1:]]
    return {**random_state(shapes), "betas": betas_of(config).float()}
