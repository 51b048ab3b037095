"""How good a float model that ships is, beside what real images themselves give."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from quantlab.contracts.model import GenerativeTask, Progress, Run
from quantlab.evaluation.metrics.fid import frechet_distance

BATCH = 250


@dataclass(frozen=True)
class Quality:
    """Measured quality of a float model.

    Attributes:
        samples: images drawn.
        fid: Fréchet distance of as many images as there are real ones to the real ones.
        floor: the same of real images drawn with replacement, once for every draw.
        accuracy: share of all images that show the class asked for.
    """

    samples: int
    fid: float
    floor: tuple[float, ...]
    accuracy: float

    def __str__(self) -> str:
        floor = f"{min(self.floor):.2f} to {max(self.floor):.2f}, mean {mean(self.floor):.2f}"
        return (
            f"FID to the data {self.fid:.2f}; as many real images, drawn with replacement, {floor}; "
            f"class accuracy {self.accuracy:.1%} over {self.samples} samples"
        )


def quality(task: GenerativeTask, run: Run, samples: int, seed: int, progress: Progress) -> Quality:
    """Draw ``samples`` images and compare them with the data at equal numbers."""
    noise, labels = task.draw_noise(samples, seed), task.labels(samples)
    features, correct = [], 0
    for start in range(0, samples, BATCH):
        part = slice(start, start + BATCH)
        seeds = range(seed + start, seed + start + len(noise[part]))
        found, logits = task.judge(task.sample(run, noise[part], labels[part], seeds))
        features.append(found)
        correct += int((logits.argmax(1) == labels[part]).sum())
        progress(min(start + BATCH, samples), samples)
    real = task.reference().features
    assert real is not None, "a model that ships is judged"
    drawn = torch.cat(features)[: len(real)]
    return Quality(samples, frechet_distance(drawn, real), noise_floor(real, len(drawn), seed), correct / samples)


def noise_floor(real: Tensor, count: int, seed: int, draws: int = 20) -> tuple[float, ...]:
    """Fréchet distance of ``count`` real images, drawn with replacement, to all of them."""
    rng = torch.Generator().manual_seed(seed)
    picks = [torch.randint(len(real), (count,), generator=rng) for _ in range(draws)]
    return tuple(frechet_distance(real[pick], real) for pick in picks)
