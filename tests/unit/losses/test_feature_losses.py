"""Losses of angles, distributions and features, in closed form and against float64 differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantlab.contracts.schedule import Schedule
from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.errors import RecipeError
from quantlab.losses.cosine import CosineConfig, CosineLoss, Vectors
from quantlab.losses.features import FeaturesConfig, FeaturesLoss
from quantlab.losses.fisher import FisherConfig, FisherLoss, TaskLoss, fisher_weights, task_gradient
from quantlab.losses.kl import KlConfig, KlLoss
from quantlab.losses.lp import LpConfig, LpLoss
from quantlab.losses.mse import MseConfig, MseLoss
from quantlab.losses.reduction import Reduction
from quantlab.losses.taps import pixel_vectors

STEP = StepContext(None, 0, 1, torch.Generator())


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(loss: Loss, student: Tensor, teacher: Tensor, path: str = OUTPUT) -> Tensor:
    result = loss({path: student}, {path: teacher}, STEP)
    assert result is not None
    return result


EVERY = [
    pytest.param(CosineLoss(CosineConfig()), OUTPUT, id="cosine of samples"),
    pytest.param(CosineLoss(CosineConfig(vectors=Vectors.PIXEL, feature="f")), "f", id="cosine of pixels"),
    pytest.param(KlLoss(KlConfig(temperature=2.0)), OUTPUT, id="kl"),
    pytest.param(KlLoss(KlConfig(feature="f", reduction=Reduction.MEAN)), "f", id="kl of a feature"),
    pytest.param(FeaturesLoss(FeaturesConfig(feature="f")), "f", id="features"),
]


@pytest.mark.parametrize(("loss", "path"), EVERY)
def test_the_gradient_is_that_of_float64_differences(loss: Loss, path: str) -> None:
    student, teacher = normal(0, 2, 3, 2, 2).requires_grad_(), normal(1, 2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda x: value(loss, x, teacher, path), (student,))


@pytest.mark.parametrize(("loss", "path"), EVERY)
def test_equal_tensors_have_no_loss(loss: Loss, path: str) -> None:
    assert value(loss, normal(0, 2, 3, 2, 2), normal(0, 2, 3, 2, 2), path).item() == pytest.approx(0, abs=1e-12)


def test_cosine_in_closed_form() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    teacher = torch.tensor([[5.0, 5.0], [0.0, -1.0], [1.0, 0.0]])
    expected = (1 - math.sqrt(0.5)) + 2 + 1
    assert value(CosineLoss(CosineConfig()), student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert value(CosineLoss(CosineConfig(reduction=Reduction.MEAN)), student, teacher).item() == pytest.approx(
        expected / 3, rel=1e-6
    )


def test_cosine_of_pixels_sees_each_pixel() -> None:
    student, teacher = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)
    loss = value(CosineLoss(CosineConfig(vectors=Vectors.PIXEL)), student, teacher)
    norms = student.norm(dim=1) * teacher.norm(dim=1)
    assert loss.item() == pytest.approx((1 - (student * teacher).sum(1) / norms).sum().item())


def test_vectors_of_one_element_are_refused() -> None:
    with pytest.raises(RecipeError, match="no angle to learn from"):
        value(CosineLoss(CosineConfig(vectors=Vectors.PIXEL)), normal(0, 2, 1, 4, 4), normal(1, 2, 1, 4, 4))


def test_kl_in_closed_form() -> None:
    teacher, student = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).log()
    expected = sum(p * math.log(3 * p) for p in (0.7, 0.2, 0.1))
    assert value(KlLoss(KlConfig()), student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_kl_at_a_high_temperature_is_half_the_variance_of_the_difference_of_logits() -> None:
    student, teacher = normal(0, 5, 7), normal(1, 5, 7)
    expected = (student - teacher).var(1, correction=0).sum().item() / 2
    assert value(KlLoss(KlConfig(temperature=1e3)), student, teacher).item() == pytest.approx(expected, rel=1e-2)


def test_kl_of_one_channel_is_refused() -> None:
    with pytest.raises(RecipeError, match="softmax over one channel"):
        value(KlLoss(KlConfig()), normal(0, 2, 1, 4, 4), normal(1, 2, 1, 4, 4))


def test_features_is_mse_of_the_tap() -> None:
    student, teacher = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)
    loss = FeaturesLoss(FeaturesConfig(feature="f", weight=0.5))
    assert value(loss, student, teacher, "f") == 0.5 * value(MseLoss(MseConfig()), student, teacher)


def test_pixels_are_rows() -> None:
    image = normal(0, 2, 3, 4, 5)
    assert torch.equal(pixel_vectors(image)[5 * 3 + 2], image[0, :, 3, 2])
    tokens = image.flatten(2).transpose(1, 2)
    assert torch.equal(pixel_vectors(tokens), pixel_vectors(image))
    assert torch.equal(pixel_vectors(image[:, :, 0, 0]), image[:, :, 0, 0])


def site(name: str, block: str) -> Site:
    return Site(name, SiteKind.LINEAR, (1, 1), 1, (Slot("input", (1,)),), block=block)


def test_features_are_of_the_last_block() -> None:
    assert FeaturesLoss(FeaturesConfig()).taps([site("a", "a"), site("b.0.x", "b.0"), site("out", "out")]) == ("b.0",)
    with pytest.raises(RecipeError, match=r"\{features: \{feature: path\.of\.module\}\}"):
        FeaturesLoss(FeaturesConfig()).taps([site("a", "a")])


def test_fisher_of_the_prediction_is_a_fourth_power_over_the_mean_square() -> None:
    student, teacher = normal(0, 3, 8), normal(1, 3, 8)
    squared = (student - teacher).square()
    expected = (squared.square().sum(1) / squared.mean(1)).sum().item()
    assert value(FisherLoss(FisherConfig()), student, teacher).item() == pytest.approx(expected)


def test_fisher_holds_its_weights_fixed_in_the_backward_pass() -> None:
    student, teacher = normal(0, 3, 8).requires_grad_(), normal(1, 3, 8)
    value(FisherLoss(FisherConfig()), student, teacher).backward()
    difference = (student - teacher).detach()
    torch.testing.assert_close(student.grad, 2 * fisher_weights(difference) * difference)


@pytest.mark.parametrize("task_loss", TaskLoss)
def test_fisher_weights_of_a_feature_are_squared_gradients_of_the_task_loss(task_loss: TaskLoss) -> None:
    """An independent way to the gradient: the task loss itself, differentiated."""
    head = normal(2, 4, 5)
    feature, target = normal(0, 3, 4).requires_grad_(), normal(1, 3, 4)
    student, teacher = {OUTPUT: (feature @ head).tanh(), "f": feature}, {OUTPUT: (target @ head).tanh(), "f": target}
    loss = FisherLoss(FisherConfig(feature="f", task_loss=task_loss))
    found = loss(student, teacher, STEP)
    found.backward(retain_graph=True)
    if task_loss is TaskLoss.SQUARED:
        task = (student[OUTPUT] - teacher[OUTPUT]).square().sum()
    else:
        task = torch.nn.functional.cross_entropy(student[OUTPUT], teacher[OUTPUT].softmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(task, feature)
    weights = gradient.square() / gradient.square().mean(1, keepdim=True)
    difference = (feature - target).detach()
    assert found.item() == pytest.approx((weights * difference.square()).sum().item())
    torch.testing.assert_close(feature.grad, 2 * weights * difference)


def test_fisher_weights_have_mean_1_and_survive_small_gradients() -> None:
    gradient = torch.tensor([[1e-30, 2e-30], [0.0, 0.0]])
    torch.testing.assert_close(fisher_weights(gradient), torch.tensor([[0.4, 1.6], [1.0, 1.0]]))


def test_the_task_gradient_is_that_of_the_task_loss() -> None:
    student, teacher = normal(0, 2, 4), normal(1, 2, 4)
    assert torch.equal(task_gradient(student, teacher, TaskLoss.SQUARED), 2 * (student - teacher))
    difference = task_gradient(student, teacher, TaskLoss.CROSS_ENTROPY)
    assert difference.sum(1).abs().max() < 1e-12, "the softmax sums to 1 on both sides"


LATER = Schedule(initial=0.0, final=2.0)


@pytest.mark.parametrize(
    ("constant", "scheduled"),
    [
        (MseLoss(MseConfig()), MseLoss(MseConfig(schedule=LATER))),
        (LpLoss(LpConfig()), LpLoss(LpConfig(schedule=LATER))),
        (FisherLoss(FisherConfig()), FisherLoss(FisherConfig(schedule=LATER))),
        (KlLoss(KlConfig()), KlLoss(KlConfig(schedule=LATER))),
        (CosineLoss(CosineConfig()), CosineLoss(CosineConfig(schedule=LATER))),
        (FeaturesLoss(FeaturesConfig(feature="f")), FeaturesLoss(FeaturesConfig(feature="f", schedule=LATER))),
    ],
)
def test_every_loss_follows_its_schedule(constant: Loss, scheduled: Loss) -> None:
    student, teacher = ({OUTPUT: normal(seed, 2, 3), "f": normal(seed, 2, 3)} for seed in (0, 1))
    whole = constant(student, teacher, STEP)
    assert whole is not None
    for progress, factor in ((0.0, 0.0), (0.25, 0.5), (1.0, 2.0)):
        found = scheduled(student, teacher, StepContext(None, 0, 1, torch.Generator(), progress))
        assert found is not None
        assert found.item() == pytest.approx(factor * whole.item())
