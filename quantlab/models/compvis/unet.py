"""The denoiser: ``UNetModel`` becomes ``UNet2DModel``, or ``UNet2DConditionModel`` when it cross-attends a context.

The networks compute the same; they differ in how modules are nested and named, and in that self-attention without a
transformer keeps query, key and value in one convolution of kernel 1 in the original.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantlab.models.compvis.config import NUM_GROUPS, UNetConfig
from quantlab.models.compvis.weights import UNET, Part, Source
from quantlab.torchvision_shim import ensure_torchvision_imports

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_QKV = ("to_q", "to_k", "to_v")


def build_unet(config: UNetConfig, side: int) -> Part:
    """The converted denoiser for latents of this side, with no weights yet.

    Its parameters are made on the device of the surrounding ``with torch.device``.
    """
    ensure_torchvision_imports()
    network = _conditional(config, side) if config.use_spatial_transformer else _self_attending(config, side)
    return Part(network, {name: _source(config, name) for name in network.state_dict()}, averaged=True)


def _conditional(config: UNetConfig, side: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    down = [f"{'CrossAttn' if config.attends(level) else ''}DownBlock2D" for level in range(len(config.widths))]
    up = [f"{'CrossAttn' if config.attends(level) else ''}UpBlock2D" for level in range(len(config.widths))]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        cross_attention_dim=config.context_dim or 0,
        transformer_layers_per_block=config.transformer_depth,
        # The number of heads, called so by diffusers.
        attention_head_dim=tuple(map(config.heads, config.widths)),  # pyright: ignore[reportArgumentType]
        use_linear_projection=config.use_linear_in_transformer,
        resnet_time_scale_shift=_time_shift(config),
        norm_num_groups=NUM_GROUPS,
    )


def _self_attending(config: UNetConfig, side: int) -> nn.Module:
    from diffusers import UNet2DModel

    plain = "Resnet{}sampleBlock2D" if config.resblock_updown else "{}Block2D"
    down = ["AttnDownBlock2D" if config.attends(i) else plain.format("Down") for i in range(len(config.widths))]
    up = ["AttnUpBlock2D" if config.attends(i) else plain.format("Up") for i in range(len(config.widths))]
    sampling = "resnet" if config.resblock_updown else "conv"
    network = UNet2DModel(
        sample_size=side,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        downsample_type=sampling,
        upsample_type=sampling,
        attention_head_dim=config.widths[-1] // config.heads(config.widths[-1]),
        resnet_time_scale_shift=_time_shift(config),
        attn_norm_num_groups=NUM_GROUPS,
        norm_num_groups=NUM_GROUPS,
    )
    _set_heads(network, config.heads)
    return network


def _time_shift(config: UNetConfig) -> str:
    return "scale_shift" if config.use_scale_shift_norm else "default"


def _set_heads(network: nn.Module, heads: Callable[[int], int]) -> None:
    """As many heads at every level as the original has; UNet2DModel's config knows only one width of a head."""
    from diffusers.models.attention_processor import Attention

    for module in network.modules():
        if isinstance(module, Attention):
            module.heads = heads(module.inner_dim)
            module.scale = (module.inner_dim // module.heads) ** -0.5


def _source(config: UNetConfig, name: str) -> Source:
    """Where a tensor of the converted network lies."""
    path, _, tensor = name.rpartition(".")
    if path in _OUTSIDE:
        return Source(f"{UNET}{_OUTSIDE[path]}.{tensor}")
    block, kind, inner = _place(config, path)
    if kind != "attentions":
        return Source(f"{UNET}{block}.{_RESNET.get(inner, inner)}.{tensor}")
    if config.use_spatial_transformer:
        return Source(f"{UNET}{block}.{inner}.{tensor}")
    if inner in _QKV:
        return Source(f"{UNET}{block}.qkv.{tensor}", _rows(config, block, _QKV.index(inner)), len(_QKV))
    return Source(f"{UNET}{block}.{'norm' if inner == 'group_norm' else 'proj_out'}.{tensor}")


def _place(config: UNetConfig, path: str) -> tuple[str, str, str]:
    """The original's block, what it is, and the module inside of it.

    The original numbers all blocks of a path through: those with a resnet, and those that halve the size; what doubles
    it is the last member of a block with a resnet.
    """
    per_level = config.num_res_blocks + 1
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        kind, index, inner = match.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}", kind, inner
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    assert match is not None, f"{path} has no place in the original"
    way, level, kind, index, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0", kind, "op" if inner == "conv" else inner
    if kind == "upsamplers":
        member = 2 if config.attends(len(config.widths) - 1 - level) else 1
        return f"output_blocks.{level * per_level + config.num_res_blocks}.{member}", kind, inner
    member = 0 if kind == "resnets" else 1
    if way == "down":
        return f"input_blocks.{1 + level * per_level + index}.{member}", kind, inner
    return f"output_blocks.{level * per_level + index}.{member}", kind, inner


def _rows(config: UNetConfig, block: str, which: int) -> Tensor:
    """Rows of query (0), key (1) or value (2) in an attention's one convolution."""
    channels = _channels(config, block)
    heads = config.heads(channels)
    order = torch.arange(3 * channels, device="cpu")
    if config.use_new_attention_order:
        return order.reshape(3, channels)[which]
    return order.reshape(heads, 3, channels // heads)[:, which].flatten()


def _channels(config: UNetConfig, block: str) -> int:
    """Channels of a block of the original."""
    way, index = block.split(".")[:2]
    per_level, last = config.num_res_blocks + 1, len(config.widths) - 1
    if way == "middle_block":
        return config.widths[-1]
    level = (int(index) - 1) // per_level if way == "input_blocks" else last - int(index) // per_level
    return config.widths[level]
