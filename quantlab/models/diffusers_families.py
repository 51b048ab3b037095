"""How the denoisers of diffusers are called: their inputs by family, from the configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.contracts.model import Inputs
from quantlab.errors import ModelError
from quantlab.models.denoiser import Call, Guidance

CLIP_TOKENS = 77
"""Of a prompt, as CLIP's tokenizer pads it."""
T5_TOKENS = 256
DEFAULT_LATENT_SIZE = 128
"""Of a network whose configuration does not say: 1024 pixels, 8 of them to a latent one."""


@dataclass(frozen=True)
class Family:
    """How one network is called.

    Attributes:
        call: names and scales of its inputs.
        noise_shape: of one sample.
        size: height and width of what is denoised.
        example: the tensors of a condition [B, ...] for a batch size.
        fixed: keyword tensors [1, ...] that every sample gets besides.
        classes: how many classes it knows; 0 without classes.
        null_class: the class that stands for none.
        takes_text: whether it is conditioned on prompts.
        packed: latents lie in patches of 2x2 in a sequence.
    """

    call: Call
    noise_shape: tuple[int, ...]
    size: int
    example: Callable[[int], Inputs]
    fixed: Inputs = field(default_factory=dict)
    classes: int = 0
    null_class: int | None = None
    takes_text: bool = False
    packed: bool = False

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Everything besides sample and timestep, for a batch size."""
        fixed = {name: value.expand(batch, *value.shape[1:]).clone() for name, value in self.fixed.items()}
        return {**self.example(batch), **fixed}


def family_of(network: nn.Module, size: int | None, pixels_per_latent: int, null_class: int | None = None) -> Family:
    """The family of a network.

    Args:
        network: a denoiser of diffusers.
        size: height and width of what is denoised; those of its configuration without it.
        pixels_per_latent: the factor of the first stage, for models that are told the size of the image.
        null_class: the class that stands for none, where the configuration does not say.

    Raises:
        ModelError: the network is of no family that is known here, or wants inputs that its family does not have.
    """
    name = type(network).__name__
    if name not in FAMILIES:
        raise ModelError(
            "this denoiser of diffusers is not known",
            where="model",
            got=name,
            allowed=", ".join(FAMILIES),
            next_step="wrap it in a module that returns a tensor: quantlab.quantize(module, batches of your own)",
        )
    config: Mapping[str, Any] = network.config  # type: ignore[assignment]
    return FAMILIES[name](network, config, _Size.of(config, size, pixels_per_latent), null_class)


@dataclass(frozen=True)
class _Size:
    """Height and width of what is denoised, and of the image."""

    latent: int
    pixels: int

    @classmethod
    def of(cls, config: Mapping[str, Any], size: int | None, pixels_per_latent: int) -> _Size:
        own = config.get("sample_size")
        own = own[0] if isinstance(own, list | tuple) else own
        latent = size or own or DEFAULT_LATENT_SIZE
        return cls(latent, latent * pixels_per_latent)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _prediction_channels(config: Mapping[str, Any]) -> int:
    """Channels of the prediction where the output has twice as many; 0 where it has no more than the sample."""
    given, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if out not in (given, 2 * given):
        raise ModelError(
            "the network's output is not the sample's shape: it wants more channels than the noisy sample",
            where="in_channels, out_channels",
            got=f"{given}, {out}",
            allowed="as many, or twice as many out",
        )
    return given if out == 2 * given else 0


def _refuse(config: Mapping[str, Any], **allowed: tuple[object, ...]) -> None:
    """Raise ModelError for options by which a network wants inputs that its family does not have."""
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ModelError(
                "the network wants inputs that are not known here",
                where=f"its configuration, {name}",
                got=config.get(name),
                allowed=", ".join(map(str, values)),
            )


def _unet(network: nn.Module, config: Mapping[str, Any], size: _Size, null_class: int | None) -> Family:
    """DDPM, DDIM and unconditional latent diffusion: a sample and a timestep, with or without a class."""
    _refuse(config, class_embed_type=(None,))
    classes = config.get("num_class_embeds") or 0
    guided = Guidance.DOUBLED if classes and null_class is not None else Guidance.NONE
    known = classes if null_class is None else classes - 1
    return Family(
        call=Call(channels=_prediction_channels(config), guidance=guided),
        noise_shape=(config["in_channels"], size.latent, size.latent),
        size=size.latent,
        example=lambda batch: {"class_labels": torch.arange(batch) % classes} if classes else {},
        classes=known if classes else 0,
        null_class=null_class,
    )


def _text_unet(network: nn.Module, config: Mapping[str, Any], size: _Size, null_class: int | None) -> Family:
    """Stable Diffusion 1.x and 2.x, and SDXL: cross-attention to the text, for SDXL with its pooled form and sizes."""
    _refuse(config, class_embed_type=(None,), num_class_embeds=(None,), encoder_hid_dim_type=(None,))
    _refuse(config, addition_embed_type=(None, "text_time"), time_cond_proj_dim=(None,))
    width = config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    fixed: dict[str, Tensor] = {}
    pooled = 0
    if config.get("addition_embed_type") == "text_time":
        sizes = [size.pixels, size.pixels, 0, 0, size.pixels, size.pixels]
        fixed["added_cond_kwargs__time_ids"] = torch.tensor([sizes], dtype=torch.float32)
        pooled = config["projection_class_embeddings_input_dim"] - len(sizes) * config["addition_time_embed_dim"]

    def example(batch: int) -> Inputs:
        text = {"encoder_hidden_states": _normal(3, batch, CLIP_TOKENS, width)}
        return text | ({"added_cond_kwargs__text_embeds": _normal(4, batch, pooled)} if pooled else {})

    return Family(
        call=Call(channels=_prediction_channels(config), guidance=Guidance.DOUBLED),
        noise_shape=(config["in_channels"], size.latent, size.latent),
        size=size.latent,
        example=example,
        fixed=fixed,
        takes_text=True,
    )


def _dit(network: nn.Module, config: Mapping[str, Any], size: _Size, null_class: int | None) -> Family:
    """DiT: adaptive norms from timestep and class, the class after the last standing for none."""
    classes = config["num_embeds_ada_norm"]
    return Family(
        call=Call("hidden_states", channels=_prediction_channels(config), guidance=Guidance.DOUBLED),
        noise_shape=(config["in_channels"], size.latent, size.latent),
        size=size.latent,
        example=lambda batch: {"class_labels": torch.arange(batch) % classes},
        classes=classes,
        null_class=classes if null_class is None else null_class,
    )


def _pixart(network: nn.Module, config: Mapping[str, Any], size: _Size, null_class: int | None) -> Family:
    """PixArt-alpha and -sigma: text with its mask, for some of alpha with the image's size."""
    fixed: dict[str, Tensor] = {}
    if network.use_additional_conditions:
        fixed["added_cond_kwargs__resolution"] = torch.tensor([[size.pixels, size.pixels]], dtype=torch.float32)
        fixed["added_cond_kwargs__aspect_ratio"] = torch.ones(1, 1)

    def example(batch: int) -> Inputs:
        tokens = torch.arange(T5_TOKENS) < torch.arange(batch)[:, None] % T5_TOKENS + T5_TOKENS // 2
        text = _normal(3, batch, T5_TOKENS, config["caption_channels"] or config["cross_attention_dim"])
        return {"encoder_hidden_states": text, "encoder_attention_mask": tokens.to(torch.int64)}

    return Family(
        call=Call("hidden_states", channels=_prediction_channels(config), guidance=Guidance.DOUBLED),
        noise_shape=(config["in_channels"], size.latent, size.latent),
        size=size.latent,
        example=example,
        fixed=fixed,
        takes_text=True,
    )


def _sd3(network: nn.Module, config: Mapping[str, Any], size: _Size, null_class: int | None) -> Family:
    """Stable Diffusion 3: joint attention with the text, its pooled form in the adaptive norms; predicts velocity."""

    def example(batch: int) -> Inputs:
        return {
            "encoder_hidden_states": _normal(3, batch, CLIP_TOKENS + T5_TOKENS, config["joint_attention_dim"]),
            "pooled_projections": _normal(4, batch, config["pooled_projection_dim"]),
        }

    return Family(
        call=Call("hidden_states", timestep_dtype=torch.float32, guidance=Guidance.DOUBLED),
        noise_shape=(config["in_channels"], size.latent, size.latent),
        size=size.latent,
        example=example,
        takes_text=True,
    )


def _flux(network: nn.Module, config: Mapping[str, Any], size: _Size, null_class: int | None) -> Family:
    """Flux: packed latents with their positions, the guidance an input of the distilled network."""
    rows = size.latent // 2
    positions = torch.zeros(1, rows, rows, 3)
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(rows)

    def example(batch: int) -> Inputs:
        return {
            "encoder_hidden_states": _normal(3, batch, T5_TOKENS, config["joint_attention_dim"]),
            "pooled_projections": _normal(4, batch, config["pooled_projection_dim"]),
            "txt_ids": torch.zeros(batch, T5_TOKENS, 3),
        }

    guidance = Guidance.EMBEDDED if config["guidance_embeds"] else Guidance.NONE
    return Family(
        call=Call("hidden_states", timestep_divisor=1000, timestep_dtype=torch.float32, guidance=guidance),
        noise_shape=(rows * rows, config["in_channels"]),
        size=size.latent,
        example=example,
        fixed={"img_ids": positions.flatten(1, 2)},
        takes_text=True,
        packed=True,
    )


FAMILIES: Mapping[str, Callable[[nn.Module, Mapping[str, Any], _Size, int | None], Family]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _text_unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
"""By the network's class in diffusers."""
