from __future__ import annotations

import pytest
import torch

from quantlab.contracts.tuning import OUTPUT, StepContext
from quantlab.losses.lp import LpConfig, LpLoss
from quantlab.losses.mse import MseConfig, MseLoss
from quantlab.losses.reduction import Reduction

STEP = StepContext(None, 0, 1, torch.Generator())
TEACHER = {OUTPUT: torch.tensor([[1.0, -2.0], [0.5, 0.0]])}
STUDENT = {OUTPUT: torch.tensor([[3.0, -2.0], [0.0, -1.0]])}
# Differences 2, 0, -0.5, -1.


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (MseConfig(), 4 + 0.25 + 1),
        (MseConfig(reduction=Reduction.MEAN), 5.25 / 4),
        (MseConfig(weight=2.0), 10.5),
    ],
)
def test_mse(config, value):
    assert MseLoss(config)(STUDENT, TEACHER, STEP).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (LpConfig(p=1.0), 3.5),
        (LpConfig(p=3.0, reduction=Reduction.MEAN), (8 + 0.125 + 1) / 4),
        (LpConfig(), 2**2.4 + 0.5**2.4 + 1),
    ],
)
def test_lp(config, value):
    assert LpLoss(config)(STUDENT, TEACHER, STEP).item() == pytest.approx(value)


def test_lp_with_p_2_is_mse():
    assert LpLoss(LpConfig(p=2.0))(STUDENT, TEACHER, STEP) == MseLoss(MseConfig())(STUDENT, TEACHER, STEP)


@pytest.mark.parametrize("loss", [MseLoss(MseConfig()), LpLoss(LpConfig())])
def test_the_gradient_is_that_of_float64_differences(loss):
    rng = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    student = torch.randn(3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss({OUTPUT: x}, {OUTPUT: teacher}, STEP), (student,))


@pytest.mark.parametrize("loss", [MseLoss(MseConfig()), LpLoss(LpConfig())])
def test_equal_predictions_have_no_loss_and_a_finite_gradient(loss):
    student = torch.ones(2, 2, requires_grad=True)
    value = loss({OUTPUT: student}, {OUTPUT: torch.ones(2, 2)}, STEP)
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("loss", [MseLoss(MseConfig()), LpLoss(LpConfig())])
def test_a_sum_in_half_precision_does_not_overflow(loss):
    student, teacher = torch.full((64, 64), 20.0, dtype=torch.float16), torch.zeros(64, 64, dtype=torch.float16)
    value = loss({OUTPUT: student}, {OUTPUT: teacher}, STEP)
    assert value.dtype == torch.float32
    assert value.item() > 4096 * 399
