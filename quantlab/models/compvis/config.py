"""The config that lies beside a checkpoint: what is read of it, and which classes it may name.

The names of classes in ``target`` are compared with the known ones and never imported. What only matters in training is
skipped; an option that changes what the network computes and that no conversion knows is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from quantlab.contracts.config import Strict
from quantlab.errors import ModelError

UNCONDITIONAL = "__is_unconditional__"
ARCHITECTURES = Path(__file__).parent / "architectures"
NUM_GROUPS = 32
"""Of every group normalization in these networks."""


def _depth(value: object) -> object:
    return value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value


def _one_width(value: object) -> object:
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


class UNetConfig(Strict):
    """The arguments of ``UNetModel``, by its own names."""

    in_channels: int
    out_channels: int
    model_channels: int = Field(multiple_of=NUM_GROUPS)
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = Field(description="downsampling factors at which there is attention")
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_heads: int = -1
    num_head_channels: int = Field(default=-1, description="channels of a head; -1: num_heads holds")
    num_heads_upsample: Literal[-1] = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: Annotated[int, BeforeValidator(_depth)] = 1
    context_dim: Annotated[int | None, BeforeValidator(_one_width)] = None
    use_linear_in_transformer: bool = False
    conv_resample: Literal[True] = True
    dims: Literal[2] = 2
    num_classes: None = None
    n_embed: None = None
    # Without effect on a trained network's output in float32.
    image_size: object = None
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_fp16: bool = False
    legacy: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("one of num_heads and num_head_channels must be given")
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise ValueError("use_spatial_transformer and context_dim belong together")
        if self.use_spatial_transformer and self.resblock_updown:
            raise ValueError("resblock_updown beside use_spatial_transformer has no counterpart in diffusers")
        wrong = [channels for channels in self.widths if channels % self.heads(channels)]
        if wrong:
            raise ValueError(f"{wrong[0]} channels do not divide into {self.heads(wrong[0])} heads")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, the finest first."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    def heads(self, channels: int) -> int:
        """How many heads attention over so many channels has."""
        return self.num_heads if self.num_head_channels == -1 else max(1, channels // self.num_head_channels)

    def attends(self, level: int) -> bool:
        """Whether there is attention at a level; 0 is the finest."""
        return 2**level in self.attention_resolutions


class EncoderDecoderConfig(BaseModel):
    """The arguments that encoder and decoder of a first stage share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    double_z: bool = True
    z_channels: int
    resolution: int
    in_channels: int
    out_ch: int
    ch: int = Field(multiple_of=NUM_GROUPS)
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_res_blocks: int = Field(ge=1)
    attn_resolutions: tuple[int, ...] = ()
    attn_type: Literal["vanilla", "none"] = "vanilla"
    resamp_with_conv: Literal[True] = True
    give_pre_end: Literal[False] = False
    tanh_out: Literal[False] = False
    use_linear_attn: Literal[False] = False
    dropout: float = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.attn_type == "none" and self.attn_resolutions:
            raise ValueError("attn_type none beside attn_resolutions")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, the finest first."""
        return tuple(self.ch * factor for factor in self.ch_mult)

    @property
    def downsampling(self) -> int:
        """Side of an image over side of its latent."""
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        """Whether there is attention at a level; 0 is the finest."""
        return self.resolution // 2**level in self.attn_resolutions


class _Skipping(BaseModel):
    """What only matters in training is skipped."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class VQParams(_Skipping):
    """Of a first stage with a codebook."""

    embed_dim: int
    n_embed: int
    ddconfig: EncoderDecoderConfig
    remap: None = None
    sane_index_shape: bool = False

    @model_validator(mode="after")
    def _single(self) -> Self:
        if self.ddconfig.double_z:
            raise ValueError("double_z is of a first stage that draws its latents, not of one with a codebook")
        return self


class KLParams(_Skipping):
    """Of a first stage that draws latents from a normal distribution."""

    embed_dim: int
    ddconfig: EncoderDecoderConfig

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.ddconfig.double_z:
            raise ValueError("double_z must be true: mean and variance of the latents")
        if self.embed_dim != self.ddconfig.z_channels:
            raise ValueError("embed_dim must equal z_channels: diffusers has one width for both")
        return self


class VQ(_Skipping):
    """A first stage with a codebook."""

    target: Literal["ldm.models.autoencoder.VQModelInterface"]
    params: VQParams


class KL(_Skipping):
    """A first stage that draws latents from a normal distribution."""

    target: Literal["ldm.models.autoencoder.AutoencoderKL"]
    params: KLParams


FirstStage = Annotated[VQ | KL, Field(discriminator="target")]


class ClassEmbedderParams(Strict):
    """A vector for each class; the last of more classes than the data has stands for "no class"."""

    embed_dim: int
    n_classes: int = Field(default=1000, ge=1)
    key: str = "class"


class ClassEmbedder(_Skipping):
    """Classes as context of cross-attention."""

    target: Literal["ldm.modules.encoders.modules.ClassEmbedder"]
    params: ClassEmbedderParams


class TextEncoder(_Skipping):
    """Text as context of cross-attention, by CLIP's encoder."""

    target: Literal["ldm.modules.encoders.modules.FrozenCLIPEmbedder"]


CondStage = Annotated[ClassEmbedder | TextEncoder, Field(discriminator="target")]


class UNetPart(_Skipping):
    """The denoiser."""

    target: Literal["ldm.modules.diffusionmodules.openaimodel.UNetModel"]
    params: UNetConfig


class LatentDiffusionParams(_Skipping):
    """What of ``LatentDiffusion`` matters once it is trained."""

    linear_start: float = Field(default=1e-4, gt=0)
    linear_end: float = Field(default=2e-2, gt=0)
    timesteps: int = Field(default=1000, ge=1)
    beta_schedule: Literal["linear"] = "linear"
    given_betas: None = None
    parameterization: Literal["eps"] = "eps"
    conditioning_key: Literal["crossattn"] | None = None
    image_size: int = Field(ge=1, description="side of a latent")
    channels: int = Field(ge=1, description="of a latent")
    scale_factor: float = Field(default=1.0, gt=0, description="latents of the first stage times this are denoised")
    scale_by_std: bool = Field(default=False, description="the checkpoint holds the factor")
    unet_config: UNetPart
    first_stage_config: FirstStage
    cond_stage_config: CondStage | Literal["__is_unconditional__"]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        unet = self.unet_config.params
        conditional = self.cond_stage_config != UNCONDITIONAL
        if conditional != unet.use_spatial_transformer:
            raise ValueError("a condition and use_spatial_transformer belong together: conditions are cross-attended")
        if unet.in_channels != self.channels or unet.out_channels != self.channels:
            raise ValueError("the UNet must take and give as many channels as a latent has")
        if self.first_stage_config.params.embed_dim != self.channels:
            raise ValueError("embed_dim of the first stage must be the channels of a latent")
        return self


class _Model(_Skipping):
    target: Literal["ldm.models.diffusion.ddpm.LatentDiffusion"]
    params: LatentDiffusionParams


class _File(_Skipping):
    model: _Model


def read_config(path: Path) -> LatentDiffusionParams:
    """The config of a latent-diffusion model, from its YAML file.

    Raises:
        ModelError: no such file, no YAML, or a model that cannot be converted; the message names the option.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text())
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ModelError("the config cannot be read", where=str(path), got=error) from error
    try:
        return _File.model_validate(content).model.params
    except ValidationError as error:
        first = error.errors()[0]
        # A union puts its own name into the place.
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        raise ModelError(
            f"this model cannot be converted: {first['msg'].removeprefix('Value error, ')}",
            where=f"{path}: {place}" if place else str(path),
            got=first["input"] if isinstance(first["input"], str | int | float | bool) else None,
            next_step="models of this kind: " + ", ".join(architectures()),
        ) from error


def architectures() -> tuple[str, ...]:
    """The names of the configs that ship."""
    return tuple(sorted(file.stem for file in ARCHITECTURES.glob("*.yaml")))
