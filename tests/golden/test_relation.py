"""Group F: the relation loss and its gradient."""

from __future__ import annotations

import pytest
import torch
from golden import Case, assert_close, cases
from quantlab_mpqdm.relation import relation_divergence, similarities
from torch.nn import functional as F

WEIGHT = 100


def tolerance(case: Case, key: str, floor: float) -> float:
    check = case.entry.get("float64_check", {})
    return max(floor, 20 * check.get(key, 0.0))


def of_mode(mode: str) -> list[Case]:
    return [case for case in cases("F") if case.params["mode"] == mode]


@pytest.mark.parametrize("case", of_mode("pipeline"), ids=lambda case: case.id)
def test_smoothed_relation(case: Case) -> None:
    student, teacher = case["q_feats"].requires_grad_(), case["fp_feats"].mean(0)
    mean = student.mean(0)
    loss = WEIGHT * relation_divergence(mean, teacher)
    loss.backward()
    atol = tolerance(case, "grad_abs_diff_vs_float64", 1e-7)
    assert_close(loss, case["loss"], rtol=1e-5, atol=tolerance(case, "loss_abs_diff_vs_float64", 2e-4), what="loss")
    assert_close(student.grad[0], case["grad_q_feat1"], rtol=1e-4, atol=atol, what="first step")
    assert_close(student.grad[1], case["grad_q_feat2"], rtol=1e-4, atol=atol, what="second step")

    normalized = F.normalize(mean.detach(), dim=1)
    assert_close(normalized, case["q_norm"], rtol=2e-6, what="student's unit vectors")
    assert_close(F.normalize(teacher, dim=1), case["fp_norm"], rtol=2e-6, what="teacher's unit vectors")
    if "student_sim_map" in case:
        assert_close(similarities(mean), case["student_sim_map"], rtol=2e-6, what="similarities")
    leaf = case["q_norm"].requires_grad_()
    (WEIGHT * relation_divergence(leaf, case["fp_norm"], normalize=False)).backward()
    longest = max(1.0, mean.detach().norm(dim=1).max().item())
    assert_close(leaf.grad, case["grad_q_norm"], rtol=1e-4, atol=atol * longest, what="unit vectors' gradient")


@pytest.mark.parametrize("case", of_mode("raw"), ids=lambda case: case.id)
def test_raw_relation(case: Case) -> None:
    student = case["fea_student"].requires_grad_()
    loss = WEIGHT * relation_divergence(student, case["fea_teacher"], normalize=False)
    loss.backward()
    loss_atol = tolerance(case, "loss_abs_diff_vs_float64", 2e-4)
    assert_close(loss, case["loss"], rtol=1e-5, atol=loss_atol, what="loss")
    atol = tolerance(case, "grad_abs_diff_vs_float64", 1e-7)
    assert_close(student.grad, case["grad_student"], rtol=1e-4, atol=atol, what="gradient")


def test_float64_agrees_with_a_direct_sum() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 3, generator=rng, dtype=torch.float64)
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        a, b = (F.normalize(x.flatten(1), dim=0) for x in (mine, theirs))
        for pixel in range(9):
            p, q = (torch.softmax(v.T @ v[:, pixel], 0) for v in (b, a))
            total += (p * (p / q).log()).sum().item()
    assert relation_divergence(student, teacher).item() == pytest.approx(total, rel=1e-12)
