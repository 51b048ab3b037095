"""Small models of every family, captured once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from torch import nn

from quantlab.graph.captured import CapturedGraph
from quantlab.graph.sites import find_sites
from quantlab.graph.verify import capture_verified
from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.zoo.digits import build_unet

ensure_torchvision_imports()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


@dataclass
class Case:
    """A model with its inputs by batch and size; ``flexible`` when it takes other sizes."""

    model: nn.Module
    make: Callable[[int, int], dict]
    size: int
    static: dict = field(default_factory=dict)
    flexible: bool = True

    def inputs(self, batch: int, size: int | None = None) -> dict:
        return self.make(batch, size or self.size)

    @cached_property
    def captured(self) -> CapturedGraph:
        return capture_verified(self.model, self.inputs, self.static)

    @cached_property
    def sites(self) -> dict:
        return {site.name: site for site in find_sites(self.model, self.captured)}


def digits() -> Case:
    def make(batch, size):
        labels = {"class_labels": integers(10, batch)}
        return {"sample": noise(batch, 1, size, size), "timestep": integers(1000, batch)} | labels

    return Case(build_unet(), make, 8, {"return_dict": False})


def unet2d_tiny() -> Case:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    return Case(
        model, lambda b, s: {"sample": noise(b, 3, s, s), "timestep": integers(1000, b)}, 16, {"return_dict": False}
    )


def unet2d_class() -> Case:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=8, num_class_embeds=10, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip

    def make(batch, size):
        labels = {"class_labels": integers(10, batch)}
        return {"sample": noise(batch, 3, size, size), "timestep": integers(1000, batch)} | labels

    return Case(model, make, 16, {"return_dict": False})


def unet2dcond_tiny() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip

    def make(batch, size):
        context = {"encoder_hidden_states": noise(batch, 7, 32, seed=3)}
        return {"sample": noise(batch, 4, size, size), "timestep": integers(1000, batch)} | context

    return Case(model, make, 16, {"return_dict": False})


def sdxl_tiny() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip

    def make(batch, size):
        added = {"text_embeds": noise(batch, 32, seed=4), "time_ids": noise(batch, 6, seed=5)}
        context = {"encoder_hidden_states": noise(batch, 7, 32, seed=3), "added_cond_kwargs": added}
        return {"sample": noise(batch, 4, size, size), "timestep": integers(1000, batch)} | context

    return Case(model, make, 16, {"return_dict": False})


def timm_model(name: str, size: int, flexible: bool) -> Case:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=10)
    return Case(model, lambda batch, s: {"x": noise(batch, 3, s, s)}, size, flexible=flexible)


BUILDERS: dict[str, Callable[[], Case]] = {
    "digits": digits,
    "unet2d_tiny": unet2d_tiny,
    "unet2d_class": unet2d_class,
    "unet2dcond_tiny": unet2dcond_tiny,
    "sdxl_tiny": sdxl_tiny,
    "resnet18": lambda: timm_model("resnet18", 32, True),
    "vit_tiny": lambda: timm_model("vit_tiny_patch16_224", 224, False),
    "mobilenetv3": lambda: timm_model("mobilenetv3_small_100", 32, True),
}


@pytest.fixture(scope="session")
def cases() -> Callable[[str], Case]:
    """A model by name, built and captured at first use; tests must leave it as it is."""
    built: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in built:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                built[name] = BUILDERS[name]()
            built[name].model.eval().requires_grad_(False)
        return built[name]

    return get
