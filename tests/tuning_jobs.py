"""Jobs for tuners on toys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from toys import Toy, affine, silent

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.student import QuantizerChoices, Student, tapped_run
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.passes import SmoothingPass
from quantlab.contracts.sections import InputsFrom, Tune
from quantlab.contracts.tuning import Checkpoint, TuneJob


@dataclass
class Memory(Checkpoint):
    """Keeps a copy of everything saved."""

    saved: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.saved[-1] if self.saved else None

    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        self.saved.append((iteration, {name: value.clone() for name, value in tensors.items()}))


def assigned(toy: Toy, choices: QuantizerChoices | None = None, smoothing: Sequence[SmoothingPass] = ()) -> Student:
    """A student with bits and scales, before any tuner."""
    student = toy.student()
    method = AssignMethod(smoothing, [UniformPolicy(UniformPolicy.Config())], choices or affine(), InputsFrom.TEACHER)
    assign(student, method, calibration_batch(toy.task, toy.calibration, 8), torch.Generator(), silent)
    return student


def job_of(toy: Toy, student: Student, settings: Tune | None = None) -> TuneJob:
    """A tuner's job without losses."""
    return TuneJob(
        task=toy.task,
        network=student.network,
        layers=student.trained_layers(),
        student=tapped_run(student.network, student.graph, ()),
        teacher=tapped_run(toy.task.network, toy.graph, ()),
        calibration=toy.calibration,
        losses=(),
        settings=settings or Tune(),
        seed=3,
        checkpoint=Memory(),
        progress=silent,
    )
