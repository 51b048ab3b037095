"""A batch in parts: what one forward of a large network may hold in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantlab.contracts.model import CalibrationBatch, Inputs, Run


def num_rows(inputs: Inputs) -> int:
    """The batch size of keyword tensors."""
    return len(next(iter(inputs.values())))


def row_parts(inputs: Inputs, rows: int | None) -> Iterator[Inputs]:
    """The inputs, at most ``rows`` rows at a time; None: as they are."""
    if rows is None:
        yield inputs
        return
    for start in range(0, num_rows(inputs), rows):
        yield {name: value[start : start + rows] for name, value in inputs.items()}


def batch_parts(batch: CalibrationBatch, rows: int | None) -> Iterator[CalibrationBatch]:
    """The batch, at most ``rows`` rows at a time; None: as it is."""
    done = 0
    for inputs in row_parts(batch.inputs, rows):
        end = done + num_rows(inputs)
        yield CalibrationBatch(inputs, None if batch.timestep is None else batch.timestep[done:end])
        done = end


def in_parts(run: Run, rows: int | None) -> Run:
    """A forward that gives ``run`` at most ``rows`` rows at once; None: ``run`` itself."""
    if rows is None:
        return run
    return lambda inputs: torch.cat([run(part) for part in row_parts(inputs, rows)])
