"""The two toy denoisers of group G, and their task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.contracts.model import CalibrationSet, Inputs, Progress, Run, Task


def time_embedding(timestep: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequency = 1000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = timestep.float()[:, None] * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], 1)


class TokenProjection(nn.Module):
    """A linear layer over the pixels as tokens, as an element of a list of blocks."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tokens = self.proj(x.flatten(2).transpose(1, 2))
        return F.silu(tokens.transpose(1, 2).reshape(batch, -1, height, width))


class ConvBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x))


class Plain3(nn.Module):
    """Three layers, all of them under the budget."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.dim = c1
        self.conv_in = nn.Conv2d(3, c1, 3, padding=1)
        self.output_blocks = nn.ModuleList([TokenProjection(c1, c2)])
        self.conv_out = nn.Conv2d(c2, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        embedding = time_embedding(timestep, self.dim) + context
        h = F.silu(self.conv_in(x) + embedding[:, :, None, None])
        return self.conv_out(self.output_blocks[0](h))


class Full7(nn.Module):
    """Seven layers, the first three and the last at 8 bits."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(8, c1), nn.SiLU(), nn.Linear(c1, c1))
        self.input_blocks = nn.ModuleList([nn.Conv2d(3, c1, 3, padding=1)])
        self.middle = ConvBlock(c1, c2, 3)
        self.output_blocks = nn.ModuleList([TokenProjection(c2, c1), ConvBlock(c1, c1, 1)])
        self.conv_out = nn.Conv2d(c1, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        embedding = self.time_embed(time_embedding(timestep, 8)) + context
        h = F.silu(self.input_blocks[0](x) + embedding[:, :, None, None])
        h = self.middle(h)
        h = self.output_blocks[0](h)
        return self.conv_out(self.output_blocks[1](h))


class GuidedTask(Task):
    """A toy denoiser with classifier-free guidance over its context vector."""

    def __init__(self, network: nn.Module, guidance: float, unconditional: Tensor | None) -> None:
        self.network = network
        self.timestep_input = "timestep"
        self.static: Mapping[str, object] = {}
        self.guidance, self.unconditional = guidance, unconditional

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(0)
        width = next(
            p for name, p in self.network.named_parameters() if name.startswith(("conv_in", "input_blocks"))
        ).shape[0]
        return {
            "x": torch.randn(batch, 3, 4, 4, generator=rng),
            "timestep": torch.arange(batch) * 7,
            "context": torch.randn(batch, width, generator=rng),
        }

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        if self.guidance == 1.0:
            return dict(inputs)
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
        doubled["context"] = torch.cat([self.unconditional, inputs["context"]])
        return doubled

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        if self.guidance == 1.0:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        raise NotImplementedError
