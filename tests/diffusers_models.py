"""Denoisers of diffusers with random weights and reduced widths."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.torchvision_shim import ensure_torchvision_imports

ensure_torchvision_imports()


def ddpm() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def ldm() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, layers_per_block=2, block_out_channels=(16, 32, 32), norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def stable_diffusion() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_embeds_ada_norm=1000,
    )  # fmt: skip


def pixart(sample_size: int = 8, additional: bool = False) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=sample_size, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=3,
        attention_head_dim=16, cross_attention_dim=48, caption_channels=32, use_additional_conditions=additional,
    )  # fmt: skip


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16,
    )  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "ddpm": ddpm,
    "ldm": ldm,
    "stable-diffusion": stable_diffusion,
    "sdxl": sdxl,
    "dit": dit,
    "pixart-alpha": lambda: pixart(additional=True),
    "pixart-sigma": pixart,
    "sd3": sd3,
    "flux": flux,
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def clip_tokenizer(folder: Path) -> Any:
    """A tokenizer of CLIP's kind over single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def clip_text(hidden: int, projection: int = 0) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=52, eos_token_id=53, projection_dim=projection or hidden,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(latent_channels: int = 4) -> nn.Module:
    """A first stage with 2 pixels to a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def save_stable_diffusion(folder: Path, scheduler: str = "DDIMScheduler") -> Path:
    """A Stable Diffusion pipeline, saved; returns its folder."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = diffusers.StableDiffusionPipeline(
            unet=stable_diffusion(), vae=vae(), text_encoder=clip_text(32), tokenizer=clip_tokenizer(folder / "words"),
            scheduler=getattr(diffusers, scheduler)(**SCHEDULE), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def save_dit(folder: Path) -> Path:
    """A DiT pipeline, saved; returns its folder."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"transformer": dit(), "vae": vae(), "scheduler": diffusers.DDIMScheduler()}
        diffusers.DiTPipeline(**parts).save_pretrained(folder)
    return folder


SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""The noise levels of Stable Diffusion."""
