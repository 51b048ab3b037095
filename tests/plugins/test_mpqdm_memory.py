"""MPQ-DMv2's relations to remembered pixels."""

from __future__ import annotations

import pytest
import torch
from quantlab_mpqdm.memory import MemoryRelationConfig, MemoryRelationLoss, PixelQueue, memory_divergence, unit_pixels
from torch import Tensor

from quantlab import Schedule, StepContext


def features(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at(step: int, seed: int = 0, progress: float = 0.0) -> StepContext:
    return StepContext(None, step, 4, torch.Generator().manual_seed(seed), progress)


def loss(**options: object) -> MemoryRelationLoss:
    return MemoryRelationLoss(MemoryRelationConfig(feature="f", **options))  # type: ignore[arg-type]


def numbered(*values: float) -> Tensor:
    return torch.tensor([[value] for value in values])


def test_a_queue_drops_its_oldest() -> None:
    queue = PixelQueue.empty(2, 3, numbered(0))
    queue.push(0, numbered(1, 2))
    queue.push(0, numbered(3, 4))
    assert sorted(queue.pixels[0].flatten().tolist()) == [2, 3, 4]
    queue.push(0, numbered(5, 6, 7, 8))
    assert sorted(queue.pixels[0].flatten().tolist()) == [6, 7, 8]
    assert queue.pixels[1].abs().sum() == 0 and queue.seen.tolist() == [8, 0]


def test_samples_are_different_pixels_of_all_timesteps_and_no_empty_slots() -> None:
    queue = PixelQueue.empty(3, 4, numbered(0))
    queue.push(0, numbered(1, 2))
    queue.push(2, numbered(3, 4, 5, 6, 7))
    everything = queue.sample(100, torch.Generator().manual_seed(0)).flatten().tolist()
    assert sorted(everything) == [1, 2, 4, 5, 6, 7]
    some = queue.sample(3, torch.Generator().manual_seed(0)).flatten().tolist()
    assert len(set(some)) == 3 and set(some) < set(everything)


def test_the_divergence_against_sums_in_float64() -> None:
    student, teacher, remembered = (unit_pixels(features(seed, torch.float64)) for seed in range(3))
    expected = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        p = torch.tensor([theirs.dot(other).item() / 0.2 for other in remembered], dtype=torch.float64).exp()
        q = torch.tensor([mine.dot(other).item() / 0.2 for other in remembered], dtype=torch.float64).exp()
        p, q = p / p.sum(), q / q.sum()
        expected += sum((a * (a / b).log()).item() for a, b in zip(p, q, strict=True))
    assert memory_divergence(student, teacher, remembered, 0.2).item() == pytest.approx(expected)


def test_the_gradient_is_that_of_float64_differences() -> None:
    teacher, remembered = unit_pixels(features(1, torch.float64)), unit_pixels(features(2, torch.float64))
    student = features(0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: memory_divergence(unit_pixels(x), teacher, remembered, 0.5), (student,), atol=1e-6
    )


def test_the_first_step_relates_to_its_own_pixels() -> None:
    found = loss(refreshed=100, samples=100, temperature=0.5)({"f": features(0)}, {"f": features(1)}, at(0))
    mine, theirs = unit_pixels(features(0)), unit_pixels(features(1))
    assert found.item() == pytest.approx(memory_divergence(mine, theirs, theirs, 0.5).item(), rel=1e-5)


def test_both_are_related_to_the_teachers_pixels_of_earlier_timesteps() -> None:
    memory = loss(refreshed=100, samples=100)
    memory({"f": features(0)}, {"f": features(1)}, at(0))
    memory.reset()
    found = memory({"f": features(2)}, {"f": features(3)}, at(1))
    remembered = torch.cat([unit_pixels(features(1)), unit_pixels(features(3))])
    expected = memory_divergence(unit_pixels(features(2)), unit_pixels(features(3)), remembered, 0.1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4), "a new trajectory keeps the memory"


def test_equal_features_have_no_divergence() -> None:
    assert loss()({"f": features(0)}, {"f": features(0)}, at(0)).item() == pytest.approx(0, abs=1e-4)


def test_weight_and_schedule_multiply() -> None:
    plain = loss()({"f": features(0)}, {"f": features(1)}, at(0)).item()
    scheduled = loss(weight=3.0, schedule=Schedule(initial=0.0))
    assert scheduled({"f": features(0)}, {"f": features(1)}, at(0, progress=0.5)).item() == pytest.approx(1.5 * plain)


def test_the_gradient_reaches_the_student_alone() -> None:
    student, teacher = features(0).requires_grad_(), features(1).requires_grad_()
    memory = loss()
    memory({"f": student}, {"f": teacher.detach()}, at(0)).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert not memory.state()["pixels"].requires_grad


def stepped(memory: MemoryRelationLoss, first: int, last: int) -> list[float]:
    steps = range(first, last)
    return [memory({"f": features(s)}, {"f": features(s + 50)}, at(s % 4, seed=s)).item() for s in steps]


def test_state_and_load_go_on_to_the_same() -> None:
    options = {"size": 20, "refreshed": 7, "samples": 30}
    whole = loss(**options)
    expected = stepped(whole, 0, 10)
    half, resumed = loss(**options), loss(**options)
    stepped(half, 0, 6)
    resumed.load({name: value.clone() for name, value in half.state().items()})
    assert stepped(resumed, 6, 10) == expected[6:]


def test_loading_nothing_forgets() -> None:
    memory = loss()
    assert memory.state() == {}
    fresh = stepped(memory, 0, 3)
    assert stepped(memory, 0, 3) != fresh
    memory.load({})
    assert stepped(memory, 0, 3) == fresh


def test_tokens_are_pixels() -> None:
    tokens = features(0).flatten(2).transpose(1, 2)
    assert torch.equal(unit_pixels(tokens), unit_pixels(features(0)))
