"""Denoisers of every family: captured as they are, and run by their own unmodified pipelines."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import signature

import pytest
import torch
from diffusers_models import MODELS, SCHEDULE, seeded, vae
from torch import Tensor, nn

from quantlab.contracts.sections import Sampling
from quantlab.errors import ModelError
from quantlab.graph.bind import bind
from quantlab.graph.captured import CaptureMethod
from quantlab.models.conditions import Conditions
from quantlab.models.denoiser import Denoiser, DenoiserTask
from quantlab.models.diffusers_families import family_of
from quantlab.sampling import Schedule
from quantlab.stages.prepare import capture_sites

SIZES = {"flux": 8}
PIPELINES: Mapping[str, tuple[str, str]] = {
    "ddpm": ("DDPMPipeline", "unet"),
    "stable-diffusion": ("StableDiffusionPipeline", "unet"),
    "sdxl": ("StableDiffusionXLPipeline", "unet"),
    "dit": ("DiTPipeline", "transformer"),
    "pixart-sigma": ("PixArtSigmaPipeline", "transformer"),
    "sd3": ("StableDiffusion3Pipeline", "transformer"),
    "flux": ("FluxPipeline", "transformer"),
}


def task_of(name: str) -> DenoiserTask:
    network = seeded(MODELS[name])
    family = family_of(network, SIZES.get(name), 2)
    schedule = Schedule.of(SCHEDULE, Sampling())
    denoiser = Denoiser(
        network, family.call, family.noise_shape, family.example_inputs, Conditions, lambda: schedule, lambda x: x
    )
    return DenoiserTask(denoiser, Sampling(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def captured():
    found = {}

    def get(name: str):
        if name not in found:
            task = task_of(name)
            found[name] = (task, *capture_sites(task))
        return found[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_a_site_of_an_exact_graph(captured, name):
    task, graph, sites = captured(name)
    assert graph.method is CaptureMethod.VALUE_TRACE  # so it was compared with the model: no difference
    layers = {path for path, m in task.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    assert {site.name for site in sites if site.weight_shape} == layers
    assert any(site.kind == "attention" for site in sites)


def images(name: str, model: nn.Module) -> Tensor:
    """What the pipeline of a family gives with a denoiser: latents, or pixels for a model of pixels."""
    import diffusers

    cls, component = PIPELINES[name]
    pipeline_class = getattr(diffusers, cls)
    flows = name in ("sd3", "flux")
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler() if flows else diffusers.EulerDiscreteScheduler.from_config(SCHEDULE)
    )
    scheduler = diffusers.DDIMScheduler() if name in ("ddpm", "dit") else scheduler
    wanted = list(signature(pipeline_class.__init__).parameters)[1:]
    keywords = {n: None for n in wanted if n.startswith(("text", "token", "safety", "feature", "image_enc", "vae"))}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        keywords |= {"vae": vae(model.config.in_channels)} if "vae" in wanted else {}
    keywords |= {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    pipeline = pipeline_class(**keywords, **{component: model}, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    common = {"num_inference_steps": 2, "generator": rng}
    if name == "ddpm":
        return torch.tensor(pipeline(batch_size=3, output_type="np", **common).images)
    if name == "dit":
        return torch.tensor(pipeline([1, 2, 3], guidance_scale=3.0, output_type="np", **common).images)
    example = family_of(model, SIZES.get(name), 2).example(4)
    given = {"prompt_embeds": example["encoder_hidden_states"][:2]}
    if name != "flux":
        given["negative_prompt_embeds"] = example["encoder_hidden_states"][2:]
    pooled = example.get("pooled_projections", example.get("added_cond_kwargs__text_embeds"))
    if pooled is not None:
        given["pooled_prompt_embeds"] = pooled[:2]
        given |= {"negative_pooled_prompt_embeds": pooled[2:]} if name != "flux" else {}
    if name.startswith("pixart"):
        mask = example["encoder_attention_mask"]
        given |= {"prompt_attention_mask": mask[:2], "negative_prompt_attention_mask": mask[2:]}
        given |= {"negative_prompt": None, "use_resolution_binning": False}
    size = 8 * (8 if name == "flux" else 2)
    return pipeline(
        height=size, width=size, guidance_scale=3.0, output_type="latent", **given, **common
    ).images  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_the_unmodified_pipeline_makes_the_same_images_with_the_graph(captured, name):
    task, graph, _ = captured(name)
    bound = bind(copy.deepcopy(task.network), graph, "timestep")
    assert "bind" in type(bound).forward.__code__.co_filename
    found, expected = images(name, bound), images(name, task.network)
    assert len(found) > 1 and torch.equal(found, expected)


def test_a_network_of_no_family_is_told():
    with pytest.raises(ModelError, match="not known") as caught:
        family_of(nn.Linear(2, 2), None, 8)
    assert "UNet2DModel" in (caught.value.allowed or "")


def test_a_network_that_wants_more_is_told():
    import diffusers

    network = seeded(
        lambda: diffusers.UNet2DConditionModel(
            in_channels=9, out_channels=4, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
        )
    )  # fmt: skip
    with pytest.raises(ModelError, match="more channels than the noisy sample"):
        family_of(network, None, 8)
