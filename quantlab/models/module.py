"""A plain module with its user's own batches, as a Task."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantlab.contracts.config import Strict
from quantlab.contracts.model import CalibrationSet, Inputs, Progress, Run, Task
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError


class MemoryConfig(Strict):
    """A module in memory has no options."""


class MemorySource:
    """A module in memory, for ``quantlab.quantize``; a recipe file cannot name one."""

    name: ClassVar[str] = "memory"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    models: ClassVar[Collection[str]] = ()
    Config = MemoryConfig

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> Task:
        """There is nothing to load.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "a module in memory cannot be loaded from a recipe",
            where="model.source",
            got="memory",
            next_step="call quantlab.quantize(module, batches), or choose another source: quantlab list models",
        )


Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a user hands over: the arguments of one forward; dimension 0 of every tensor is the batch."""

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class ModuleTask(Task):
    """Any module in memory, calibrated and tuned on the batches given.

    Args:
        network: the module.
        batches: positional or keyword tensors of its forward; at least one batch.
        timestep_input: the keyword that carries the timestep; found by name when there is one called
            ``timestep``, ``timesteps`` or ``t``.

    Raises:
        ModelError: no batch, or batches that do not fit the module's forward or one another.
    """

    def __init__(self, network: nn.Module, batches: Iterable[Batch], timestep_input: str | None = None) -> None:
        self.network = network
        self.static: Mapping[str, object] = {}
        named = [_named(network, batch) for batch in batches]
        if not named:
            raise ModelError("no batch was given", where="batches", next_step="pass at least one batch of inputs")
        if any(batch.keys() != named[0].keys() for batch in named):
            raise ModelError("every batch must have the same inputs", where="batches")
        try:
            self._inputs = {name: torch.cat([batch[name] for batch in named]) for name in named[0]}
        except RuntimeError as error:
            raise ModelError("batches differ in more than their size", where="batches", got=error) from error
        sizes = {name: len(value) for name, value in self._inputs.items()}
        if len(set(sizes.values())) != 1:
            raise ModelError("dimension 0 of every input must be the batch", where="batches", got=sizes)
        guesses = [name for name in TIMESTEP_NAMES if name in self._inputs]
        self.timestep_input = timestep_input or (guesses[0] if guesses else None)

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """The first rows of the batches, repeated when there are too few."""
        rows = torch.arange(batch) % len(next(iter(self._inputs.values())))
        return {name: value[rows].clone() for name, value in self._inputs.items()}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs as they are: a plain module knows no guidance."""
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The output as it is."""
        return output

    def calibrate(self, run: Run, num_samples: int, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """The batches as one step, at most ``num_samples`` of their rows, drawn without replacement."""
        rows = len(next(iter(self._inputs.values())))
        pick = torch.randperm(rows, generator=rng)[:num_samples].sort().values
        inputs = {name: value[pick] for name, value in self._inputs.items()}
        with torch.no_grad():
            output = run(inputs)
        progress(1, 1)
        return CalibrationSet({name: value.unsqueeze(0) for name, value in inputs.items()}, output.unsqueeze(0))


def _named(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch as keyword tensors of the module's forward."""
    if isinstance(batch, Mapping):
        return dict(batch)
    arguments = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    try:
        bound = inspect.signature(network.forward).bind(*arguments)
    except TypeError as error:
        raise ModelError(
            "a batch does not fit the module's forward", where=type(network).__name__, got=error
        ) from error
    return dict(bound.arguments)
