"""Drawn shapes: the same bits for a seed, values in range, classes that differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlab.zoo import drawing, shapes
from quantlab.zoo.models import load_judge

GOLDEN = [-194.409, -5703.753, 11172.242]


def draw(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return drawing.draw(count, torch.Generator().manual_seed(seed))


def render(labels: Tensor, seed: int = 0) -> Tensor:
    return drawing.render(labels, torch.Generator().manual_seed(seed))


def test_a_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    (images, labels), (again, same) = draw(50), draw(50)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, draw(50, seed=1)[0])


def test_images_are_those_that_the_models_were_trained_on() -> None:
    images = render(torch.arange(40) % 10, seed=7).double()
    # Every pixel has a weight of its own, so that a moved or exchanged one shows; far above float32's rounding.
    weights = torch.arange(images[0].numel(), dtype=torch.float64).mul(0.37).sin().view(images[0].shape)
    found = [(images * weights).sum().item(), images.sum().item(), images.square().sum().item()]
    assert found == pytest.approx(GOLDEN, abs=1e-2)


def test_images_are_in_range_and_use_it() -> None:
    images, labels = draw(300)
    assert images.shape == (300, 3, 16, 16) and images.dtype == torch.float32
    assert -1.0 <= images.min() < -0.95 and 0.95 < images.max() <= 1.0
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))


def test_no_two_images_of_a_class_are_alike() -> None:
    images = render(torch.full((60,), 3)).flatten(1)
    distances = torch.cdist(images, images) + 100 * torch.eye(60)
    assert distances.min() > 3


@pytest.mark.parametrize("label", range(10))
def test_a_class_differs_from_the_next_in_its_shape_alone(label: int) -> None:
    labels = torch.full((20,), label)
    images, others = render(labels), render((labels + 1) % 10)
    change = (images - others).abs().amax(1)
    assert (change.flatten(1).amax(1) > 0.3).all(), "every image has another shape"
    assert (change[:, [0, 0, -1, -1], [0, -1, 0, -1]] < 0.3).all(1).float().mean() > 0.7, "on the same background"


def test_the_judge_knows_new_images() -> None:
    images, labels = draw(1000, seed=123)
    with torch.no_grad():
        logits = load_judge(shapes.JUDGE)(
            images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        )
    assert (logits.argmax(1) == labels).float().mean() > 0.97


def test_a_disc_covers_its_area() -> None:
    size, radius = 400, 150.0
    at = torch.arange(size, dtype=torch.float32) + 0.5 - size / 2
    inside = drawing.OUTLINES[0](at[None] / radius, at[:, None] / radius) < 0
    assert inside.sum().item() == pytest.approx(torch.pi * (0.95 * radius) ** 2, rel=2e-3)


@pytest.mark.parametrize("outline", drawing.OUTLINES, ids=lambda outline: outline.__name__[1:])
def test_an_outline_is_a_distance_to_a_shape_of_radius_about_1(outline: drawing.Outline) -> None:
    at = torch.linspace(-1.5, 1.5, 301)
    x, y = at.expand(301, 301), at[:, None].expand(301, 301)
    distance = outline(x, y)
    step = (at[1] - at[0]).item()
    slopes = torch.cat([distance.diff(dim=0).flatten(), distance.diff(dim=1).flatten()]).abs()
    assert slopes.max() < step * 1.001, "a distance never changes faster than the place"
    assert not (distance[(x * x + y * y).sqrt() > 1.17] < 0).any()
    assert 0.05 < (distance < 0).float().mean() < 0.4
