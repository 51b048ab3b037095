"""Training of a denoiser: DDPM (Ho et al. 2020), linear beta from 1e-4 to 0.02, the network predicts the noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from quantlab.zoo.description import TRAIN_TIMESTEPS, DenoiserModel, DenoiserSettings

RISE = 200
"""Iterations over which a rate that is then constant rises."""


def noise_schedule() -> Tensor:
    """Cumulative products of 1 - beta for every training timestep, float32 [1000]."""
    beta = torch.linspace(1e-4, 0.02, TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - beta, 0).float()


@dataclass(frozen=True)
class Noised:
    """What a denoiser learns from.

    Attributes:
        sample: images with noise [B, C, H, W].
        timestep: int64 [B].
        label: classes, some replaced by "no class", int64 [B].
        noise: what the network is to predict [B, C, H, W].
    """

    sample: Tensor
    timestep: Tensor
    label: Tensor
    noise: Tensor


def add_noise(images: Tensor, labels: Tensor, num_classes: int, drop_label: float, rng: torch.Generator) -> Noised:
    """Images at random timesteps; a share ``drop_label`` of the labels becomes ``num_classes``, "no class"."""
    timestep = torch.randint(TRAIN_TIMESTEPS, (len(images),), generator=rng)
    noise = torch.randn(images.shape, generator=rng)
    dropped = torch.rand(len(images), generator=rng) < drop_label
    signal = noise_schedule()[timestep].view(-1, 1, 1, 1)
    sample = signal.sqrt() * images + (1 - signal).sqrt() * noise
    return Noised(sample, timestep, labels.masked_fill(dropped, num_classes), noise)


def make_heavy_tailed(model: nn.Module, max_sigma: float, rng: torch.Generator) -> None:
    """Give the output channels weights with heavy tails, keeping each channel's standard deviation, in place.

    Every convolution and linear layer except the first, the last and the time embedding is changed.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if name in ("conv_in", "conv_out") or name.startswith("time_embedding"):
            continue
        with torch.no_grad():
            weight = module.weight.flatten(1)
            sigma = torch.rand(weight.shape[0], 1, generator=rng) * max_sigma
            heavy = weight * torch.exp(sigma * torch.randn(weight.shape, generator=rng))
            heavy *= weight.std(1, keepdim=True) / heavy.std(1, keepdim=True)
            module.weight.copy_(heavy.view_as(module.weight))


def _rate_schedule(optimizer: torch.optim.Optimizer, settings: DenoiserSettings) -> LRScheduler:
    total, decay = settings.iterations, settings.decay
    if decay is None:
        return OneCycleLR(optimizer, settings.learning_rate, total_steps=total, pct_start=0.1)
    return LambdaLR(optimizer, lambda done: min((done + 1) / RISE, 1.0, max(total - done, 0) / decay))


class Training:
    """A denoiser's training, one iteration at a time; its state can be kept and gone on from, bit for bit.

    Attributes:
        iteration: iterations done.
        running: running mean of the loss.
        average: moving average of the weights, the model that is kept in the end.
    """

    def __init__(self, model: DenoiserModel) -> None:
        settings = self.settings = model.settings
        self.data = model.data
        self.rng = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.network, self.average = model.build(), model.build()
        if settings.max_sigma:
            make_heavy_tailed(self.network, settings.max_sigma, self.rng)
        self.average.load_state_dict(self.network.state_dict())
        self.average.requires_grad_(False).eval()
        self.network.train()
        self.draw = self.data.open()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
        )
        self.schedule = _rate_schedule(self.optimizer, settings)
        self.iteration, self.running = 0, 0.0

    def step(self) -> float:
        """One iteration; returns its loss."""
        loss = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.schedule.step()
        # The average warms up, so that it forgets the random start quickly.
        decay = min(self.settings.ema_decay, (self.iteration + 1) / (self.iteration + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        self.running = loss.item() if self.iteration == 0 else 0.98 * self.running + 0.02 * loss.item()
        self.iteration += 1
        return loss.item()

    def _loss(self) -> Tensor:
        """Mean squared error of the predicted noise, a share of the labels dropped for classifier-free guidance."""
        batch, rng = self.settings.batch, self.rng
        images, labels = self.draw(batch, rng)
        noised = add_noise(images, labels, self.data.num_classes, self.settings.drop_label, rng)
        predicted = self.network(noised.sample, noised.timestep, noised.label, return_dict=False)[0]
        return F.mse_loss(predicted, noised.noise)

    def state(self) -> dict[str, object]:
        """All that the next iteration depends on."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.get_state(),
            "iteration": self.iteration,
            "running": self.running,
        }

    def restore(self, state: dict) -> None:
        """Go on from a state of ``state``."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.rng.set_state(state["rng"])
        self.iteration, self.running = state["iteration"], state["running"]
