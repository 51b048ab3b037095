"""Speed and memory of the 35.7 M CIFAR-10 UNet in integers, over float32 and bfloat16 channels-last, batch 8.

Random weights, 3/4/5 bits mixed in every layer, 8-bit activations; speed does not depend on the values. One thread,
arms interleaved, medians. Run: ``OMP_NUM_THREADS=1 python -m benchmarks --only integer-unet``.
"""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.integer_layers import interleaved_medians, quantize_layer
from quantlab.packing.backends.activation import activation_kernel
from quantlab.packing.backends.dispatch import Backend, dispatch_text, loaded_bytes, lower
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


@torch.no_grad()
def main(rounds: int = 7) -> dict[str, Any]:
    """Print speed ratios and memory, and return them."""
    torch.set_num_threads(1)
    network = cifar10_unet()
    rng = torch.Generator().manual_seed(1)
    x, timestep = torch.randn(BATCH, 3, 32, 32, generator=rng), torch.full((BATCH,), STEP)
    simulated = quantize_network(network, x, timestep)
    start = time.perf_counter()
    lowered = lower(simulated, Backend.ONEDNN, activation_kernel())
    lowering_seconds = time.perf_counter() - start
    print(dispatch_text(lowered.dispatch))
    near = x.contiguous(memory_format=torch.channels_last)
    float_near = copy.deepcopy(network).to(memory_format=torch.channels_last)
    half, half_x = copy.deepcopy(float_near).bfloat16(), near.bfloat16()
    seconds = interleaved_medians(
        {
            "float32": lambda: network(x, timestep),
            "float32 channels-last": lambda: float_near(near, timestep),
            "bfloat16 channels-last": lambda: half(half_x, timestep),
            "simulation": lambda: simulated(x, timestep),
            "integer": lambda: lowered.network(near, timestep),
        },
        rounds,
    )
    held = loaded_bytes(lowered.network) / sum(4 * parameter.numel() for parameter in network.parameters())
    found, expected = lowered.network(near, timestep).sample, simulated(x, timestep).sample
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    ratios = {name: seconds["float32"] / value for name, value in seconds.items()}
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:5.2f} times float32")
    print(f"integer                  {ratios['integer'] / ratios['bfloat16 channels-last']:5.2f} times bfloat16")
    print(f"held in memory {held:.1%} of float32; lowering {lowering_seconds:.0f} s; rounding flips {error:.1e}")
    return {"speed": ratios, "held": held, "rounding_flips": error}


if __name__ == "__main__":
    print(json.dumps(main()))
