"""Training of classifiers: those that judge images, and those that ship as models to quantize."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from quantlab.zoo.description import ClassifierSettings, Lessons

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def train_classifier(
    build: Callable[[], AnyNetwork],
    lessons_of: Callable[[int, float, torch.Generator], Lessons],
    settings: ClassifierSettings,
    log: Callable[[int, int, float], None],
) -> tuple[AnyNetwork, float]:
    """Train a classifier; returns it, in evaluation mode, with its accuracy on images that it did not learn from."""
    rng = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = build()
    lessons = lessons_of(settings.batch, settings.noise, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.iterations)
    for iteration, (images, labels) in enumerate(islice(lessons.batches, settings.iterations), 1):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        log(iteration, settings.iterations, loss.item())
    model.eval().requires_grad_(False)
    images, labels = lessons.test
    return model, (model(images).argmax(1) == labels).float().mean().item()
