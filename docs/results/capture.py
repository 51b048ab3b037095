"""Write the capture matrix of the denoisers of diffusers: small ones compared with their graphs, real ones by shape.

    python docs/results/capture.py

The small ones have random weights and few channels, the same as in the tests. The real ones have the published
configurations and live on the meta device: no memory, no numbers, and so no comparison. Seconds are of one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from diffusers_models import MODELS, seeded

from quantlab.contracts.sections import Sampling
from quantlab.contracts.site import Site, SiteKind
from quantlab.errors import CaptureError
from quantlab.graph.capture import capture
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.compare import largest_difference
from quantlab.graph.inputs import nested
from quantlab.graph.sites import find_sites
from quantlab.graph.uncovered import find_uncovered
from quantlab.graph.verify import capture_verified
from quantlab.models.conditions import Conditions
from quantlab.models.denoiser import Denoiser, DenoiserTask
from quantlab.models.diffusers_families import family_of
from quantlab.quant.operation import Multiplying
from quantlab.report.tables import markdown_of
from quantlab.sampling import Schedule

FILE = Path(__file__).with_suffix(".md")
BATCHES = (1, 2, 3)
SIZES = {"flux": 8}
"""Of models whose configuration does not say."""


def task_of(network: nn.Module, size: int | None, device: str = "cpu") -> DenoiserTask:
    """A task of a network without pipeline."""
    family = family_of(network, size, 8)

    def nothing() -> Schedule:
        raise NotImplementedError

    denoiser = Denoiser(
        network, family.call, family.noise_shape, family.example_inputs, Conditions, nothing, lambda x: x
    )
    return DenoiserTask(denoiser, Sampling(), torch.device(device), torch.float32)


def coverage(network: nn.Module, graph: CapturedGraph, sites: tuple[Site, ...]) -> tuple[str, str]:
    """Share of the multiply-accumulates at layers, and at layers and attentions."""
    layers = sum(site.macs for site in sites if site.weight_shape)
    attentions = sum(site.macs for site in sites if site.kind is SiteKind.ATTENTION)
    total = sum(site.macs for site in sites) + sum(found.macs for found in find_uncovered(network, graph))
    return f"{layers / total:.1%}", f"{(layers + attentions) / total:.1%}"


def multiplying(sites: tuple[Site, ...]) -> list[Site]:
    """The layers that multiply: an embedding looks up."""
    return [site for site in sites if site.weight_shape and site.macs]


def small_line(name: str) -> list[str]:
    """A model with numbers."""
    network = seeded(MODELS[name])
    task = task_of(network, SIZES.get(name))
    start = time.perf_counter()
    graph = capture_verified(network, lambda batch: nested(task.example_inputs(batch)), task.static)
    seconds = time.perf_counter() - start
    sites = find_sites(network, graph)
    worst = max(largest_difference(network, graph, nested(task.example_inputs(batch))) for batch in BATCHES)
    larger = task_of(network, 2 * family_of(network, SIZES.get(name), 8).size)
    inputs = nested(larger.example_inputs(2))
    try:
        doubled = f"{largest_difference(network, graph, inputs):g}"
    except CaptureError:
        again = capture(network, inputs, larger.static)
        doubled = f"{largest_difference(network, again, inputs):g}, captured again"
    layers = sum(isinstance(module, Multiplying) for module in network.modules())
    found = len(multiplying(sites))
    attentions = sum(site.kind is SiteKind.ATTENTION for site in sites)
    return [
        name, type(network).__name__, str(graph.method), f"{seconds:.1f}", f"{found} of {layers}", str(attentions),
        *coverage(network, graph, sites), str(len(graph.guards)), f"{worst:g}", doubled,
    ]  # fmt: skip


def real_line(name: str, build: Callable[[], nn.Module], size: int | None) -> list[str]:
    """A model of real size on the meta device."""
    with torch.device("meta"):
        network = build().eval()
    network.to("meta")
    task = task_of(network, size, "meta")
    inputs = nested(task.example_inputs(2))
    start = time.perf_counter()
    graph = capture(network, inputs, task.static)
    seconds = time.perf_counter() - start
    sites = find_sites(network, graph)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    macs = sum(site.macs for site in sites) / 1e9
    return [
        name, f"{parameters:,.0f} M", f"{macs:,.0f} G", f"{seconds:.1f}",
        str(len(multiplying(sites))), *coverage(network, graph, sites),
    ]  # fmt: skip


def real_models() -> Mapping[str, tuple[Callable[[], nn.Module], int | None]]:
    """The published configurations, with the size of what is denoised."""
    import diffusers

    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    sd_down = (cross.format("Down"),) * 3 + (plain.format("Down"),)
    sd_up = (plain.format("Up"),) + (cross.format("Up"),) * 3
    return {
        "Stable Diffusion 1.x": (
            lambda: diffusers.UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8, down_block_types=sd_down,
                up_block_types=sd_up,
            ),
            None,
        ),
        "SDXL": (
            lambda: diffusers.UNet2DConditionModel(
                sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                down_block_types=(plain.format("Down"), *(cross.format("Down"),) * 2),
                up_block_types=(*(cross.format("Up"),) * 2, plain.format("Up")), attention_head_dim=(5, 10, 20),
                transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            None,
        ),
        "DiT-XL/2 256": (
            lambda: diffusers.DiTTransformer2DModel(sample_size=32, out_channels=8, num_embeds_ada_norm=1000), None,
        ),
        "PixArt-sigma XL/2 1024": (
            lambda: diffusers.PixArtTransformer2DModel(
                sample_size=128, caption_channels=4096, use_additional_conditions=False
            ),
            None,
        ),
        "Flux dev": (lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), 128),
    }  # fmt: skip


def main() -> None:
    """Write the tables."""
    torch.set_num_threads(1)
    head = ["model", "class", "method", "seconds", "layers", "attentions", "covered", "with attention", "guards"]
    small = [[*head, "difference", "at twice the size"], *(small_line(name) for name in MODELS)]
    real = [["model", "parameters", "MACs", "seconds", "layers", "covered", "with attention"]]
    real += [real_line(name, *found) for name, found in real_models().items()]
    text = f"""# Capture of the denoisers of diffusers

Written by `python docs/results/capture.py`. Random weights; one thread.

Small models of every family. *Seconds* are of capture and comparison; *covered* is the share of the
multiply-accumulates at linear layers and convolutions, and with the recipe's key `attention` at fused attentions too.
*Difference* is the largest between graph and model at batch 1, 2 and 3, and at twice the height and width; where the
forward itself is another one at that size, the graph refuses it with the condition, and a second capture is compared.

{markdown_of(small)}

The published configurations on the meta device: sites and coverage at real size, nothing computed or compared.
Multiply-accumulates are of one forward at batch 1.

{markdown_of(real)}
"""
    FILE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
