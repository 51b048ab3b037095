"""Training of a classifier that judges images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch.nn import functional as F

from quantlab.zoo.description import Classifier, JudgeModel


def train_classifier(judge: JudgeModel, log: Callable[[int, int, float], None]) -> tuple[Classifier, float]:
    """Train a classifier; returns it, in evaluation mode, with its accuracy on images that it did not learn from."""
    settings = judge.settings
    rng = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = judge.build()
    lessons = judge.data.lessons(settings.batch, settings.noise, rng)
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
