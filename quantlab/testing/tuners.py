"""The contract of a tuner."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.allocation.student import Student, add_adapters
from quantlab.contracts.check import check_tuned
from quantlab.contracts.sections import Budget, Tune
from quantlab.contracts.tuning import AdapterSpec, Checkpoint, Tuner, TuneResult
from quantlab.losses.mse import MseConfig, MseLoss
from quantlab.testing.contract import Subject, same
from quantlab.testing.toy import job, quantized_student, toy

SETTINGS = Tune(iterations=6, batch=3, rank=1, adapter_learning_rate=1e-3)
BUDGET = Budget(weight_bits=3, activation_bits=6)
State = Mapping[str, Tensor]


class Killed(Exception):
    """Ends a tuner as a signal would."""


@dataclass
class Memory(Checkpoint):
    """Keeps what is saved; ``kill`` raises after so many saves."""

    kill: int = -1
    saves: int = 0
    saved: tuple[int, dict[str, Tensor]] | None = None

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """What was saved last."""
        return self.saved

    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies."""
        self.saved = iteration, {name: value.detach().clone() for name, value in tensors.items()}
        self.saves += 1
        if self.saves == self.kill:
            raise Killed


def trains_in_place(subject: Subject) -> None:
    """It returns its history and leaves finite layers; other layers and the float network are as before."""
    before = {name: value.clone() for name, value in toy().task.network.state_dict().items()}
    tuner, student = _prepared(subject)
    outside = {name: value.clone() for name, value in student.network.state_dict().items() if "conv_in" in name}
    result = _tune(subject, tuner, student, Memory())
    state = student.network.state_dict()
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    subject.require(not bad, "everything in the network stays finite", ", ".join(bad))
    kept = all(same(value, state[name]) for name, value in outside.items())
    subject.require(kept, "layers that are not in `job.layers` stay as they are", "another conv_in")
    after = toy().task.network.state_dict()
    changed = [name for name, value in before.items() if not same(value, after[name])]
    subject.require(not changed, "the float network stays as it is", ", ".join(changed))
    subject.require(bool(result.history), "its history has the losses by name", str(result.history))
    output = student.run(toy().task.example_inputs(2))
    subject.require(bool(torch.isfinite(output).all()), "the tuned network computes finite values", output)


def repeats_itself(subject: Subject) -> None:
    """The same job gives the same network, bit for bit."""
    states: list[State] = []
    for _ in range(2):
        tuner, student = _prepared(subject)
        _tune(subject, tuner, student, Memory())
        states.append(student.network.state_dict())
    different = [name for name, value in states[0].items() if not same(value, states[1][name])]
    subject.require(not different, "the same job gives the same network, bit for bit", ", ".join(different))


def goes_on_after_a_kill(subject: Subject) -> None:
    """Killed after its first checkpoint and started again, it comes to the same network."""
    tuner, student = _prepared(subject)
    whole = Memory()
    _tune(subject, tuner, student, whole)
    if not whole.saves:
        return
    expected = {name: value.clone() for name, value in student.network.state_dict().items()}
    killed = Memory(kill=1)
    tuner, student = _prepared(subject)
    with contextlib.suppress(Killed):
        tuner.tune(job(student, [MseLoss(MseConfig())], SETTINGS, killed))
    killed.kill = -1
    tuner, student = _prepared(subject)
    _tune(subject, tuner, student, killed)
    state = student.network.state_dict()
    different = [name for name, value in expected.items() if not same(value, state[name])]
    contract = "a run that was killed goes on from `job.checkpoint` to the same network"
    subject.require(not different, contract, ", ".join(different))


def does_nothing_without_iterations(subject: Subject) -> None:
    """Zero iterations are no error."""
    tuner, student = _prepared(subject)
    settings = SETTINGS.model_copy(update={"iterations": 0})
    checkpoint = Memory()
    contract = "zero iterations are no error"
    subject.call(lambda: check_tuned(tuner, tuner.tune(job(student, [], settings, checkpoint))), contract)


def _prepared(subject: Subject) -> tuple[Tuner, Student]:
    tuner: Tuner = subject.build()
    student = quantized_student(BUDGET)
    adapter = subject.call(lambda: tuner.adapter(SETTINGS), "`adapter(settings)` says which adapter it needs")
    subject.require(isinstance(adapter, AdapterSpec | None), "`adapter` returns an AdapterSpec, or None", adapter)
    if adapter is not None:
        add_adapters(student, adapter, 3)
    return tuner, student


def _tune(subject: Subject, tuner: Tuner, student: Student, checkpoint: Checkpoint) -> TuneResult:
    work = job(student, [MseLoss(MseConfig())], SETTINGS, checkpoint)
    return subject.pure(lambda: check_tuned(tuner, tuner.tune(work)), "`tune(job)` trains and returns its history")


CHECKS = (trains_in_place, repeats_itself, goes_on_after_a_kill, does_nothing_without_iterations)
