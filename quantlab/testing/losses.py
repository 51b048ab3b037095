"""The contract of a calibration loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab.contracts.check import check_loss
from quantlab.contracts.schedule import LossConfig
from quantlab.contracts.tuning import OUTPUT, Loss, StepContext
from quantlab.testing.contract import Subject, examples, rng, same
from quantlab.testing.toy import TIMESTEPS, toy

SETTINGS = examples(4)


def returns_one_number(subject: Subject) -> None:
    """A finite 0-dim tensor or None at each step, and a number at one of them at least."""

    @SETTINGS
    @given(st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16]))
    def holds(seed: int, dtype: torch.dtype) -> None:
        values = [value for value in _trajectory(subject, _begun(subject), seed, dtype) if value is not None]
        contract = f"it has something to say within {2 * len(TIMESTEPS)} steps of two trajectories"
        subject.require(bool(values), contract, "None at each")
        for value in values:
            subject.require(bool(torch.isfinite(value)), "its value is finite", f"{value.item()}")

    holds()


def names_its_taps(subject: Subject) -> None:
    """Its taps are paths of modules that the network has."""
    loss = subject.build()
    taps = subject.call(lambda: loss.taps(toy().sites), "`taps(sites)` names modules")
    known = {name for name, _ in toy().task.network.named_modules()}
    holds = isinstance(taps, tuple) and all(tap in known for tap in taps)
    subject.require(holds, "`taps` is a tuple of module paths of the network", repr(taps))


def repeats_itself(subject: Subject) -> None:
    """The same steps give the same values, after a reset and beside another loss of the class."""
    first = _begun(subject)
    expected = _trajectory(subject, first, 7)
    other = _begun(subject)
    one, two = _begun(subject), other
    values: list[Tensor | None] = []
    for index in range(2 * len(TIMESTEPS)):
        values.append(_step(subject, one, 7, index))
        _step(subject, two, 8, index)
    contract = "two losses at once do not disturb each other: nothing is shared between objects"
    subject.require(_alike(values, expected), contract, _numbers(values))
    first.load({})
    contract = "after `load({})` and `reset()` it is as new"
    again = _trajectory(subject, first, 7)
    subject.require(_alike(again, expected), contract, f"{_numbers(again)} instead of {_numbers(expected)}")


def remembers_in_its_state(subject: Subject) -> None:
    """A new loss with the state of an old one goes on as the old one would, from a new trajectory on."""
    loss = _begun(subject)
    for index in range(len(TIMESTEPS)):
        _step(subject, loss, 3, index)
    state = subject.call(loss.state, "`state()` returns what outlives a trajectory")
    holds = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
    subject.require(holds, "`state()` returns tensors by name", state)
    kept = {name: value.detach().clone() for name, value in state.items()}
    fresh = _begun(subject)
    subject.call(lambda: fresh.load(kept), "`load` takes back what `state` gave")
    going, resumed = (
        [_step(subject, which, 4, index) for index in range(len(TIMESTEPS), 2 * len(TIMESTEPS))]
        for which in (loss, fresh)
    )
    contract = "with the state of an interrupted run it goes on as that would have"
    subject.require(_alike(going, resumed), contract, f"{_numbers(resumed)} instead of {_numbers(going)}")


def obeys_its_weight(subject: Subject) -> None:
    """Twice the weight is twice the loss, where its Config has a weight."""
    if not issubclass(subject.plugin.Config, LossConfig):
        return
    weight = subject.config().weight
    double = Subject(subject.plugin, subject.kind, {**subject.options, "weight": 2 * weight})
    once, twice = (_trajectory(which, _begun(which), 5) for which in (subject, double))
    contract = "a LossConfig's weight multiplies the loss: `config.weight_at(step.progress)`"
    pairs = [(a, b) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]
    holds = all(torch.isclose(2 * a, b, rtol=1e-4, atol=1e-7) for a, b in pairs)
    subject.require(holds, contract, f"{_numbers(once)} and {_numbers(twice)}")


def _begun(subject: Subject) -> Loss:
    loss: Loss = subject.build()
    loss.taps(toy().sites)
    loss.load({})
    return loss


def _trajectory(subject: Subject, loss: Loss, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [_step(subject, loss, seed, index, dtype) for index in range(2 * len(TIMESTEPS))]


def _step(subject: Subject, loss: Loss, seed: int, index: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The value at one step of two trajectories; its gradient reaches the student, and the inputs stay."""
    position = index % len(TIMESTEPS)
    if position == 0:
        loss.reset()
    student, teacher = _pair(loss, seed * 100 + index, dtype)
    timestep = torch.full((3,), TIMESTEPS[position])
    progress = index / (2 * len(TIMESTEPS))
    step = StepContext(timestep, position, len(TIMESTEPS), rng(seed * 100 + index), progress)
    contract = "the loss is a number, or None, at each step"
    value = subject.pure(lambda: check_loss(loss, loss(student, teacher, step)), contract)
    if value is not None and value.requires_grad:
        gradients = torch.autograd.grad(value, list(student.values()), allow_unused=True, retain_graph=True)
        contract = "its gradient towards the student is finite, and there is one"
        found = [gradient for gradient in gradients if gradient is not None]
        subject.require(bool(found) and all(bool(torch.isfinite(g).all()) for g in found), contract, gradients)
    return None if value is None else value.detach()


def _pair(loss: Loss, seed: int, dtype: torch.dtype) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What student and teacher give at a step; the student's prediction depends on its features."""
    taps: Sequence[str] = loss.taps(toy().sites)
    draw = rng(seed)
    teacher = {path: torch.randn(3, 6, 4, 4, generator=draw) for path in taps}
    teacher[OUTPUT] = torch.randn(3, 2, 4, 4, generator=draw)
    student: dict[str, Any] = {
        path: (teacher[path] + 0.3 * torch.randn(3, 6, 4, 4, generator=draw)).to(dtype).requires_grad_()
        for path in taps
    }
    noise = teacher[OUTPUT] + 0.3 * torch.randn(3, 2, 4, 4, generator=draw)
    lead = sum((features[:, :2].float() for features in student.values()), torch.zeros(()))
    student[OUTPUT] = (noise + 0.1 * lead).to(dtype).requires_grad_()
    return student, {path: value.to(dtype) for path, value in teacher.items()}


def _alike(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    return all((x is None) == (y is None) and (x is None or y is None or same(x, y)) for x, y in zip(a, b, strict=True))


def _numbers(values: Sequence[Tensor | None]) -> str:
    return str([None if value is None else round(value.item(), 6) for value in values])


CHECKS = (returns_one_number, names_its_taps, repeats_itself, remembers_in_its_state, obeys_its_weight)
