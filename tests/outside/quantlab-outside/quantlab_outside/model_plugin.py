"""A source of models: the network with its inputs, its calibration and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab import CalibrationSet, FittedCorrection, GenerativeTask, Model, Reference, Sampling, Strict

Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], Tensor]
SHAPE = (1, 8, 8)
TIMESTEPS = 1000
CLASSES = 4


class OutsideModelConfig(Strict):
    """Options of the source; in a recipe they stand beside ``model.name``."""

    channels: int = Field(default=8, ge=1, description="width of the network, in channels")


class OutsideModel:
    """A tiny denoiser with random weights, to be replaced by yours."""

    name: ClassVar[str] = "outside-model"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    models: ClassVar[Collection[str]] = ("tiny",)
    Config = OutsideModelConfig

    def __init__(self, config: OutsideModelConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> GenerativeTask:
        """The task of a model by its name."""
        return TinyTask(self.config.channels, sampling.steps, device, dtype)

    def identity(self, model: Model) -> str:
        """A hash of what the model is made from: for real weights, of their file."""
        return f"tiny, {self.config.channels} channels"


class TinyDenoiser(nn.Module):
    """Two convolutions shifted by the timestep."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(SHAPE[0], channels, 3, padding=1)
        self.time = nn.Linear(1, channels)
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, SHAPE[0], 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """[B, C, H, W] and timesteps [B] -> the noise [B, C, H, W]."""
        shift = self.time((timestep / TIMESTEPS).to(sample.dtype)[:, None])
        x = F.silu(self.first(sample) + shift[:, :, None, None])
        return self.last(F.silu(self.middle(x)))


class TinyTask(GenerativeTask):
    """Draws images with DDIM, and judges them with random features."""

    def __init__(self, channels: int, steps: int, device: torch.device, dtype: torch.dtype) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = TinyDenoiser(channels).to(device, dtype).eval().requires_grad_(False)
            self.head = torch.randn(SHAPE[1] * SHAPE[2], 6 + CLASSES, device=device)
        self.device, self.dtype = device, dtype
        self.timestep_input = "timestep"
        self.static: Mapping[str, object] = {}
        self.timesteps = torch.linspace(TIMESTEPS - 1, 1, steps).round().long().tolist()

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Noise at spread timesteps."""
        timestep = torch.arange(batch, device=self.device) * 37 % TIMESTEPS
        return {"sample": self.draw_noise(batch, 0), "timestep": timestep}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs as they are: no guidance."""
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The output as it is."""
        return output

    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Noise [count, C, H, W]; an image's noise depends on the seed and its index alone."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(count, *SHAPE, generator=rng).to(self.device, self.dtype)

    def labels(self, count: int) -> Tensor:
        """Classes in turn."""
        return torch.arange(count, device=self.device) % CLASSES

    def calibrate(
        self, run: Run, samples: range, rng: torch.Generator, progress: Callable[[int, int], None]
    ) -> CalibrationSet:
        """What the float network sees and says along its trajectories."""
        x = torch.randn(len(samples), *SHAPE, generator=rng).to(self.device, self.dtype)
        inputs, outputs = [], []
        for index, timestep in enumerate(self.timesteps):
            prediction = self._predict(run, x, timestep)
            inputs.append(x)
            outputs.append(prediction)
            x = self._step(index, x, prediction)
            progress(index + 1, len(self.timesteps))
        steps = torch.tensor(self.timesteps, device=self.device)[:, None].expand(-1, len(samples)).contiguous()
        return CalibrationSet({"sample": torch.stack(inputs), "timestep": steps}, torch.stack(outputs))

    def sample(
        self,
        run: Run,
        noise: Tensor,
        labels: Tensor,
        seeds: Sequence[int],
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """Images [B, C, H, W] in [-1, 1]."""
        x = noise
        for index, timestep in enumerate(self.timesteps):
            prediction = self._predict(run, x, timestep)
            for fitted in corrections:
                nearest = int((fitted.timesteps - timestep).abs().argmin())
                prediction = fitted.correction.correct(fitted.tensors, nearest, prediction)
            x = self._step(index, x, prediction)
        return x.float().tanh()

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 6] and class logits [B, CLASSES]."""
        found = images.float().flatten(1) @ self.head
        return found[:, :6], found[:, 6:]

    def reference(self) -> Reference:
        """Features of what stands for real images."""
        images = self.draw_noise(64, 1).float().tanh()
        return Reference(self.judge(images)[0], "noise", "noise of seed 1")

    def _predict(self, run: Run, x: Tensor, timestep: int) -> Tensor:
        with torch.no_grad():
            return run({"sample": x, "timestep": torch.full((len(x),), timestep, device=self.device)})

    def _step(self, index: int, x: Tensor, prediction: Tensor) -> Tensor:
        """DDIM without noise (arXiv 2010.02502, equation 12), on a cosine schedule."""
        here, there = (
            torch.cos(torch.tensor(timestep / TIMESTEPS * torch.pi / 2)) ** 2
            for timestep in (self.timesteps[index], [*self.timesteps, 0][index + 1])
        )
        clean = (x - (1 - here).sqrt() * prediction) / here.sqrt()
        return (there.sqrt() * clean + (1 - there).sqrt() * prediction).to(x.dtype)
