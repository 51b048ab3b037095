"""Time-smoothed relation distillation."""

from __future__ import annotations

import pytest
import torch
from quantlab_mpqdm.relation import RelationConfig, RelationLoss, relation_divergence
from torch import Tensor

from quantlab import RecipeError, Site, SiteKind, Slot, StepContext

CONTEXT = StepContext(None, 0, 4, torch.Generator())


def features(seed: int) -> Tensor:
    return torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(seed))


def stepped(loss: RelationLoss, count: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """The loss at ``count`` steps, and the student's features."""
    mine = [features(step).requires_grad_() for step in range(count)]
    values = [loss({"f": f}, {"f": features(100 + step)}, CONTEXT) for step, f in enumerate(mine)]
    return values, mine


def config(**options: object) -> RelationLoss:
    return RelationLoss(RelationConfig(feature="f", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("window", "overlap", "expected"),
    [
        (1, False, [1, 1, 1, 1]),
        (2, False, [0, 1, 0, 1]),
        (3, False, [0, 0, 1, 0]),
        (2, True, [0, 1, 1, 1]),
    ],
)
def test_when_there_is_a_loss(window: int, overlap: bool, expected: list[int]) -> None:
    values, _ = stepped(config(window=window, overlap=overlap), 4)
    assert [int(value is not None) for value in values] == expected


def test_the_window_is_averaged() -> None:
    values, mine = stepped(config(window=2, weight=3.0), 2)
    student, teacher = (mine[0] + mine[1]) / 2, (features(100) + features(101)) / 2
    assert values[1].item() == pytest.approx(3 * relation_divergence(student, teacher).item(), rel=1e-6)


def test_only_the_current_step_gets_a_gradient() -> None:
    values, mine = stepped(config(window=2), 2)
    values[1].backward()
    assert mine[0].grad is None and mine[1].grad.abs().sum() > 0


def test_the_released_loss_has_none() -> None:
    values, _ = stepped(config(window=2, gradient=False), 2)
    assert not values[1].requires_grad
    attached, _ = stepped(config(window=2), 2)
    assert values[1].item() == attached[1].item(), "the printed value is the same"


def test_reset_begins_a_new_window() -> None:
    loss = config(window=2)
    stepped(loss, 1)
    loss.reset()
    assert stepped(loss, 1)[0] == [None]


def test_equal_features_have_no_divergence() -> None:
    assert relation_divergence(features(0), features(0)).item() == pytest.approx(0, abs=1e-5)


def test_tokens_are_pixels() -> None:
    student, teacher = features(0), features(1)
    tokens = [f.flatten(2).transpose(1, 2) for f in (student, teacher)]
    assert relation_divergence(*tokens).item() == pytest.approx(relation_divergence(student, teacher).item())


def site(name: str, block: str) -> Site:
    return Site(name, SiteKind.LINEAR, (1, 1), 1, (Slot("input", (1,)),), block=block)


def test_the_default_feature_is_the_last_block() -> None:
    sites = [site("a", "a"), site("b.0.x", "b.0"), site("b.1.x", "b.1"), site("out", "out")]
    assert RelationLoss(RelationConfig()).taps(sites) == ("b.1",)


def test_without_blocks_a_feature_must_be_named() -> None:
    with pytest.raises(RecipeError, match="no blocks"):
        RelationLoss(RelationConfig()).taps([site("a", "a")])
