"""The first stage, between images and latents: with a codebook ``VQModel``, otherwise ``AutoencoderKL``."""

from __future__ import annotations

import re

from torch import nn

from quantlab.models.compvis.config import KL, NUM_GROUPS, VQ, EncoderDecoderConfig
from quantlab.models.compvis.weights import FIRST_STAGE, Part, Source
from quantlab.torchvision_shim import ensure_torchvision_imports

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def build_first_stage(config: VQ | KL) -> Part:
    """The converted first stage with no weights yet; its decoder takes latents as the original's does."""
    ensure_torchvision_imports()
    from diffusers import AutoencoderKL, VQModel

    inner, levels = config.params.ddconfig, range(len(config.params.ddconfig.widths))
    down = [f"{'Attn' if inner.attends(level) else ''}DownEncoderBlock2D" for level in levels]
    up = [f"{'Attn' if inner.attends(level) else ''}UpDecoderBlock2D" for level in levels]
    shared = {
        "in_channels": inner.in_channels,
        "out_channels": inner.out_ch,
        "block_out_channels": inner.widths,
        "layers_per_block": inner.num_res_blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(reversed(up)),
        "latent_channels": inner.z_channels,
        "norm_num_groups": NUM_GROUPS,
        "sample_size": inner.resolution,
        "mid_block_add_attention": inner.attn_type == "vanilla",
        "scaling_factor": 1.0,
    }
    if isinstance(config, VQ):
        params = config.params
        module: nn.Module = VQModel(**shared, num_vq_embeddings=params.n_embed, vq_embed_dim=params.embed_dim)
    else:
        module = AutoencoderKL(**shared)
    return Part(module, {name: Source(FIRST_STAGE + _original(inner, name)) for name in module.state_dict()})


def _original(config: EncoderDecoderConfig, name: str) -> str:
    """The original's name of a tensor."""
    path, _, tensor = name.rpartition(".")
    half, _, inner = path.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", inner):
        kind, index, rest = match[1], int(match[2]), match[3]
        block = f"mid.block_{index + 1}" if kind == "resnets" else "mid.attn_1"
    elif match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", inner):
        way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        level = level if way == "down" else len(config.widths) - 1 - level  # the original counts from the finest
        member = {"resnets": f"block.{index}", "attentions": f"attn.{index}"}.get(kind, f"{way}sample")
        block = f"{way}.{level}.{member}"
    else:
        return f"{half}.{inner.replace('conv_norm_out', 'norm_out')}.{tensor}"
    rest = _ATTENTION.get(rest, rest).replace("conv_shortcut", "nin_shortcut")
    return f"{half}.{block}.{rest}.{tensor}"
