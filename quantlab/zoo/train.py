"""How the models that ship were trained: ``quantlab zoo train NAME`` repeats it.

A denoiser learns to predict the noise (DDPM, Ho et al. 2020, linear beta from 1e-4 to 0.02) with one tenth of the
labels dropped, so that classifier-free guidance works. One thread, float32, seed 0: about five minutes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.errors import RecipeError, nearest
from quantlab.store import atomic_write, atomic_write_text
from quantlab.zoo import digits
from quantlab.zoo.digits import CLASSIFIER

Log = Callable[[int, int, float], None]
"""Called with the iteration, the number of iterations and the running mean of the loss."""


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of a denoiser's training."""

    iterations: int = 1800
    batch: int = 128
    weight_decay: float = 1e-3
    drop_label: float = 0.1  # share of the labels replaced by the null class
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of the classifier's training."""

    epochs: int = 40
    batch: int = 128
    learning_rate: float = 2e-3
    noise: float = 0.1  # standard deviation of the noise added to an image
    test_share: float = 0.2
    seed: int = 0


def _quiet(iteration: int, iterations: int, loss: float) -> None:
    """Says nothing."""


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


def noise_schedule() -> Tensor:
    """Cumulative products of 1 - beta for every training timestep, float32 [1000]."""
    beta = torch.linspace(1e-4, 0.02, digits.TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - beta, 0).float()


def train_denoiser(
    init: digits.Initialisation, settings: DenoiserSettings | None = None, log: Log = _quiet
) -> nn.Module:
    """Train a denoiser and return its moving average, in evaluation mode."""
    settings = settings or DenoiserSettings()
    rng = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model, average = digits.build_unet(), digits.build_unet()
    if init.max_sigma:
        make_heavy_tailed(model, init.max_sigma, rng)
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    images, labels = digits.load_images()
    alpha_bar = noise_schedule()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=init.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, init.learning_rate, total_steps=settings.iterations, pct_start=0.1
    )
    running = 0.0
    model.train()
    for iteration in range(settings.iterations):
        pick = torch.randint(len(images), (settings.batch,), generator=rng)
        timestep = torch.randint(digits.TRAIN_TIMESTEPS, (settings.batch,), generator=rng)
        noise = torch.randn(settings.batch, *digits.IMAGE_SHAPE, generator=rng)
        dropped = torch.rand(settings.batch, generator=rng) < settings.drop_label
        label = labels[pick].masked_fill(dropped, digits.NULL_CLASS)
        signal = alpha_bar[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * images[pick] + (1 - signal).sqrt() * noise
        loss = F.mse_loss(model(noisy, timestep, label, return_dict=False)[0], noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        schedule.step()
        # The average warms up, so that it forgets the random start quickly.
        decay = min(settings.ema_decay, (iteration + 1) / (iteration + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        running = loss.item() if iteration == 0 else 0.98 * running + 0.02 * loss.item()
        log(iteration + 1, settings.iterations, running)
    return average.eval()


def train_classifier(
    settings: ClassifierSettings | None = None, log: Log = _quiet
) -> tuple[digits.DigitClassifier, float]:
    """Train the classifier on four fifths of the scans; returns it with its accuracy on the rest."""
    settings = settings or ClassifierSettings()
    rng = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = digits.DigitClassifier()
    images, labels = digits.load_images()
    order = torch.randperm(len(images), generator=rng)
    num_test = round(len(images) * settings.test_share)
    test, train = order[:num_test], order[num_test:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    batches = len(train) // settings.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * batches
    )
    for epoch in range(settings.epochs):
        shuffled = train[torch.randperm(len(train), generator=rng)]
        for pick in shuffled[: batches * settings.batch].view(batches, settings.batch):
            batch = _augment(images[pick], settings.noise, rng)
            loss = F.cross_entropy(model(batch), labels[pick])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        log(epoch + 1, settings.epochs, loss.item())
    model.eval().requires_grad_(False)
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    return model, accuracy


def _augment(images: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel and add noise: [B, 1, 8, 8] -> the same."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    shift = torch.randint(3, (len(images), 2), generator=rng)
    rows = shift[:, :1] + torch.arange(size)
    columns = shift[:, 1:] + torch.arange(size)
    shifted = padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return shifted.unsqueeze(1) + noise * torch.randn(images.shape, generator=rng)


def save(model: nn.Module, name: str, folder: Path, record: dict[str, object]) -> Path:
    """Write a model as fp16 safetensors with its training record beside it; returns the weights' path."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    atomic_write(path, lambda partial: save_file(state, partial))
    atomic_write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return path


def train(name: str, folder: Path, log: Log = _quiet) -> Path:
    """Train the zoo model ``name`` on one thread and write it to ``folder``; returns the weights' path.

    Raises:
        RecipeError: no zoo model has this name.
    """
    known = (*digits.INITIALISATIONS, CLASSIFIER)
    if name not in known:
        raise RecipeError(f'there is no zoo model "{name}"', allowed=", ".join(known), next_step=nearest(name, known))
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    losses: list[tuple[int, float]] = []

    def keep(iteration: int, iterations: int, loss: float) -> None:
        if iteration % max(1, iterations // 20) == 0:
            losses.append((iteration, round(loss, 5)))
        log(iteration, iterations, loss)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread makes the sums, and so the weights, the same on every run
    start = time.perf_counter()
    try:
        record: dict[str, object] = {"name": name, "torch": torch.__version__}
        if name == CLASSIFIER:
            settings = ClassifierSettings()
            model, record["test_accuracy"] = train_classifier(settings, keep)
        else:
            settings = DenoiserSettings()
            model = train_denoiser(digits.INITIALISATIONS[name], settings, keep)
            record["initialisation"] = vars(digits.INITIALISATIONS[name])
        record |= {"settings": vars(settings), "loss": losses, "seconds": round(time.perf_counter() - start, 1)}
        return save(model, name, folder, record)
    finally:
        torch.set_num_threads(threads)
