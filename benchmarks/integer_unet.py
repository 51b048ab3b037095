"""Speed and memory of the 35.7 M CIFAR-10 UNet in integers, over float32 and bfloat16 channels-last, batch 8.

Random weights, 3/4/5 bits mixed in every layer, 8-bit activations; speed does not depend on the values. One thread,
arms interleaved, medians. Run: ``OMP_NUM_THREADS=1 python -m benchmarks --only integer-unet``.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.integer_layers import interleaved_medians, quantize_layer
from quantlab.graph.capture import capture
from quantlab.graph.run import runner
from quantlab.packing.backends.activation import activation_kernel
from quantlab.packing.backends.dispatch import Backend, dispatch_text, loaded_bytes, lower_graph
from quantlab.torchvision_shim import ensure_torchvision_imports

BATCH = 8
STEP = 500


def cifar10_unet() -> nn.Module:
    """The architecture of google/ddpm-cifar10-32 with random weights."""
    ensure_torchvision_imports()
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


@torch.no_grad()
def quantize_network(network: nn.Module, x: Tensor, timestep: Tensor) -> nn.Module:
    """A copy whose linear and convolution layers are all quantized, input ranges from one forward."""
    made = copy.deepcopy(network)
    seen: dict[str, Tensor] = {}
    layers = {name: module for name, module in made.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0]))
        for name, module in layers.items()
    ]
    made(x, timestep)
    for hook in hooks:
        hook.remove()
    rng = torch.Generator().manual_seed(0)
    for name, module in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(parent), attribute, quantize_layer(module, seen[name], rng))
    return made


SHARES = {
    "convolution": ("onednn::qconv2d_pointwise",),
    "linear": ("onednn::qlinear_pointwise",),
    "attention": ("aten::_scaled_dot_product",),
    "quantization of activations, with SiLU": ("CompiledFxGraph", "aten::silu", "aten::round", "aten::clamp"),
    "group norm": ("aten::native_group_norm",),
    "layout and copies": ("aten::copy_", "aten::clone", "aten::cat", "aten::upsample", "aten::constant_pad"),
    "additions": ("aten::add",),
}
"""Operators by the beginning or a part of their names; everything else is the rest."""


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Share of the time that each kind of work takes in three runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            run()
    total: dict[str, float] = dict.fromkeys([*SHARES, "rest"], 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in SHARES.items() if any(name in event.key for name in names)), "rest")
        total[kind] += event.self_cpu_time_total
    return {kind: value / sum(total.values()) for kind, value in total.items()}


@torch.no_grad()
def main(rounds: int = 7) -> dict[str, Any]:
    """Print speed ratios, memory and where the time goes, and return them."""
    torch.set_num_threads(1)
    network = cifar10_unet()
    rng = torch.Generator().manual_seed(1)
    x, timestep = torch.randn(BATCH, 3, 32, 32, generator=rng), torch.full((BATCH,), STEP)
    graph = capture(network, {"sample": x[:3], "timestep": timestep[:3]}, {"return_dict": False})
    simulated = quantize_network(network, x, timestep)
    start = time.process_time()
    lowered, fused = lower_graph(simulated, graph, Backend.ONEDNN, activation_kernel())
    lowering_seconds = time.process_time() - start
    packed, _ = lower_graph(simulated, graph, Backend.ONEDNN, activation_kernel(), keep_packed=True)
    print(dispatch_text(lowered.dispatch))
    near = x.contiguous(memory_format=torch.channels_last)
    float_near = copy.deepcopy(network).to(memory_format=torch.channels_last)
    half, half_x = copy.deepcopy(float_near).bfloat16(), near.bfloat16()
    inputs = {"sample": near, "timestep": timestep}
    integer, unpacking = runner(lowered.network, fused), runner(packed.network, fused)
    seconds = interleaved_medians(
        {
            "float32": lambda: network(x, timestep),
            "float32 channels-last": lambda: float_near(near, timestep),
            "bfloat16 channels-last": lambda: half(half_x, timestep),
            "simulation": lambda: simulated(x, timestep),
            "integer, not fused": lambda: lowered.network(near, timestep),
            "integer": lambda: integer(inputs),
            "integer, kept packed": lambda: unpacking(inputs),
        },
        rounds,
    )
    float_bytes = sum(4 * parameter.numel() for parameter in network.parameters())
    held = {
        "integer": loaded_bytes(lowered.network) / float_bytes,
        "integer, kept packed": loaded_bytes(packed.network) / float_bytes,
    }
    found, expected = integer(inputs)[0], simulated(x, timestep).sample
    results: dict[str, Any] = {
        "speed": {name: seconds["float32"] / value for name, value in seconds.items()},
        "over_bfloat16": seconds["bfloat16 channels-last"] / seconds["integer"],
        "packed_slowdown": seconds["integer, kept packed"] / seconds["integer"],
        "packed_equal": torch.equal(unpacking(inputs)[0], found),
        "held": held,
        "shares": shares(lambda: integer(inputs)),
        "shares_not_fused": shares(lambda: lowered.network(near, timestep)),
        "rounding_flips": ((found - expected).abs().max() / expected.abs().max()).item(),
        "lowering_seconds": lowering_seconds,
    }
    print(unet_markdown(results))
    return results


def unet_markdown(results: dict[str, Any]) -> str:
    """The tables of one run: speed and memory, then where the time goes."""
    lines = ["| network | times float32 | held in memory, of float32 |", "|---|---|---|"]
    for name, ratio in results["speed"].items():
        share = results["held"].get(name)
        lines.append(f"| {name} | {ratio:.2f} | {'' if share is None else f'{share:.1%}'} |")
    lines += [
        "",
        f"Integer over bfloat16 channels-last: {results['over_bfloat16']:.2f}. Kept packed: "
        f"{results['packed_slowdown']:.2f} times the time, "
        f"{'the same bits' if results['packed_equal'] else 'OTHER bits'}. "
        f"Largest difference to the float32 simulation, which is rounding flips: {results['rounding_flips']:.1e}. "
        f"Lowering, with the check of every layer: {results['lowering_seconds']:.0f} s.",
        "",
        "| share of the time | not fused | fused |",
        "|---|---|---|",
    ]
    apart, fused = results["shares_not_fused"], results["shares"]
    lines += [f"| {kind} | {apart[kind]:.1%} | {fused[kind]:.1%} |" for kind in fused]
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(main()))
