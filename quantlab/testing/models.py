"""The contract of a source of models."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab.contracts.model import Task
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import RecipeError
from quantlab.graph.verify import capture_verified
from quantlab.testing.contract import Subject, rng, same


def loads_a_task(subject: Subject) -> None:
    """A task whose network accepts its own example inputs, of every batch size."""
    task = _load(subject)
    if task is None:
        return
    for batch in (1, 3):
        inputs = task.example_inputs(batch)
        sizes = {name: value.shape[0] for name, value in inputs.items()}
        contract = f"`example_inputs({batch})` has {batch} rows in each tensor"
        subject.require(set(sizes.values()) == {batch}, contract, str(sizes))
        output = subject.call(lambda inputs=inputs: _run(task, inputs), "the network accepts its example inputs")
        subject.require(isinstance(output, Tensor) and len(output) == batch, "its output has as many rows", output)
    holds = task.timestep_input is None or task.timestep_input in task.example_inputs(1)
    subject.require(holds, "`timestep_input` is one of the inputs, or None", repr(task.timestep_input))


def can_be_captured(subject: Subject) -> None:
    """Its network is captured as one graph that computes the same."""
    task = _load(subject)
    if task is not None:
        contract = "its network can be captured as one graph"
        subject.call(lambda: capture_verified(task.network, task.example_inputs, task.static), contract)


def records_calibration(subject: Subject) -> None:
    """Recording is repeatable under its generator and has the shapes that it tells."""
    task = _load(subject)
    if task is None:
        return

    def record(seed: int) -> Tensor:
        data = task.calibrate(lambda inputs: _run(task, inputs), range(2), rng(seed), lambda done, total: None)
        sizes = {name: tuple(value.shape[:2]) for name, value in data.inputs.items()}
        expected = (data.num_steps, data.num_samples)
        contract = f"the recorded inputs have [S, N] = {list(expected)} in front, as the outputs have"
        subject.require(set(sizes.values()) == {expected}, contract, str(sizes))
        subject.require(data.num_samples == 2, "it records as many samples as it is asked for", str(data.num_samples))
        return data.outputs

    contract = "`calibrate(run, samples, rng, progress)` records a CalibrationSet"
    first, again = (subject.pure(lambda: record(1), contract) for _ in range(2))
    subject.require(same(first, again), "the same generator records the same", "other outputs")


def knows_what_it_is_made_of(subject: Subject) -> None:
    """``identity`` is a text, the same for the same model."""
    source = subject.build()
    if _load(subject) is None:
        return
    found = [subject.call(lambda: source.identity(_model(subject)), "`identity(model)` hashes it") for _ in range(2)]
    holds = isinstance(found[0], str) and found[0] == found[1]
    subject.require(holds, "`identity(model)` is a text, the same for the same model", repr(found))


def _model(subject: Subject) -> Model:
    listed = tuple(getattr(subject.plugin, "models", ()))
    return Model(
        source=subject.plugin.name, name=subject.model or (listed[0] if listed else ""), options=dict(subject.options)
    )


def _load(subject: Subject) -> Task | None:
    """The task, or None for a source that a recipe cannot name, as it lists no model."""

    def load() -> Task | None:
        try:
            return subject.build().load(_model(subject), Sampling(steps=2), torch.device("cpu"), torch.float32)
        except RecipeError:
            if getattr(subject.plugin, "models", None) == ():
                return None
            raise

    task = subject.call(load, "`load(model, sampling, device, dtype)` returns a task")
    subject.require(isinstance(task, Task | None), "`load` returns a quantlab.Task", task)
    return task


def _run(task: Task, inputs: object) -> Tensor:
    with torch.no_grad():
        output = task.network(**inputs, **task.static)  # type: ignore[arg-type]
    return output[0] if isinstance(output, tuple | list) else output


CHECKS = (loads_a_task, can_be_captured, records_calibration, knows_what_it_is_made_of)
