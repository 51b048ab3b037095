"""Students with bits and scales, for tests of tuners."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from toys import Toy, affine, silent

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.student import QuantizerChoices, Student
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.passes import SmoothingPass
from quantlab.contracts.sections import InputsFrom


def assigned(toy: Toy, choices: QuantizerChoices | None = None, smoothing: Sequence[SmoothingPass] = ()) -> Student:
    """A student with bits and scales, before any tuner."""
    student = toy.student()
    method = AssignMethod(smoothing, [UniformPolicy(UniformPolicy.Config())], choices or affine(), InputsFrom.TEACHER)
    assign(student, method, calibration_batch(toy.task, toy.calibration, 8), torch.Generator(), silent)
    return student
