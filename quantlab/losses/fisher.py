"""Squared error weighted with the diagonal of an empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.losses.reduction import Reduction, reduce
from quantlab.losses.taps import at_least_float


class TaskLoss(StrEnum):
    """The loss of the prediction whose gradient gives the weights."""

    SQUARED = "squared"
    """(student - teacher)^2: of a denoiser."""
    CROSS_ENTROPY = "cross_entropy"
    """Of the student's softmax over dimension 1 against the teacher's: of a classifier."""


class FisherConfig(LossConfig):
    """Options of the Fisher-weighted squared error."""

    task_loss: TaskLoss = Field(default=TaskLoss.SQUARED, description="its squared gradient gives the weights")
    feature: str | None = Field(
        default=None, description="path of the module whose output is compared; none: the prediction"
    )
    reduction: Reduction = Field(default=Reduction.SUM, description="over elements")


class FisherLoss(Loss):
    """Squared error in which an element counts by the squared gradient of the task loss there.

    The sum of w (z_student - z_teacher)^2 over the elements of z, a module's output or the prediction, with
    w = (dL / dz_student)^2, held fixed in the backward pass and scaled to mean 1 within each sample. L is the task loss
    between the predictions of the current batch. BRECQ (arXiv 2102.05426) takes the same weights, of block
    outputs, once before it tunes; here they follow the student along the trajectory.

    At the prediction itself no network lies between z and L, so the weights know no more than the error: the squared
    task loss gives w proportional to (student - teacher)^2, hence a fourth power of the error relative to the sample's
    mean square. (The Fisher matrix of a squared error in expectation is the identity, and the loss then ``mse``.) Name
    a ``feature`` for weights that say what the rest of the network makes of an element.
    """

    name = "fisher"
    paper = "BRECQ, ICLR 2021, arXiv 2102.05426"
    Config = FisherConfig

    def __init__(self, config: FisherConfig) -> None:
        self.config = config

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """The module of ``feature``."""
        return (self.config.feature,) if self.config.feature else ()

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        """weight * reduction of the weighted squared error; 0-dim, at least float32."""
        gradient = task_gradient(student[OUTPUT].detach(), teacher[OUTPUT], self.config.task_loss)
        path = self.config.feature
        if path is not None:
            (gradient,) = torch.autograd.grad(student[OUTPUT], student[path], gradient, retain_graph=True)
        squared = at_least_float(student[path or OUTPUT] - teacher[path or OUTPUT]).square()
        errors = fisher_weights(at_least_float(gradient)) * squared
        return self.config.weight_at(step.progress) * reduce(errors, self.config.reduction)


def task_gradient(student: Tensor, teacher: Tensor, task_loss: TaskLoss) -> Tensor:
    """Gradient of the task loss with respect to the student's prediction, in its shape."""
    match task_loss:
        case TaskLoss.SQUARED:
            return 2 * (student - teacher)
        case TaskLoss.CROSS_ENTROPY:
            return student.softmax(1) - teacher.softmax(1)


def fisher_weights(gradient: Tensor) -> Tensor:
    """Squares of the gradient [B, ...] over their mean within each sample; 1 where a sample's gradient is 0."""
    # Brought to size 1 first: squares of small gradients vanish in float32.
    rows = gradient.flatten(1)
    size = rows.abs().amax(1, keepdim=True)
    squared = (rows / torch.where(size > 0, size, torch.ones_like(size))).square()
    weights = torch.where(size > 0, squared / squared.mean(1, keepdim=True), torch.ones_like(squared))
    return weights.view_as(gradient)
