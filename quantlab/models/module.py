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

    def identity(self, model: Model) -> str:
        """A recipe cannot name a module in memory, so no result file is about one."""
        raise NotImplementedError


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
        if not isinstance(network, nn.Module):
            raise ModelError("this is no torch.nn.Module", where="module", got=type(network).__name__)
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise ModelError(
                "batches are a list of batches", where="batches", got=type(batches).__name__, next_step="write [batch]"
            )
        named = [_named(network, batch) for batch in batches]
        if not any(value.numel() for batch in named for value in batch.values()):
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
        if not network.training:  # a call in training mode would change its statistics
            self._try_out()

    def _try_out(self) -> None:
        """Call the module once, so that what does not fit is told before anything is computed."""
        try:
            with torch.no_grad():
                output = self.network(**self.example_inputs(1))
        except Exception as error:
            raise ModelError(
                f"the module fails on the batches: {type(error).__name__}: {error}",
                where=type(self.network).__name__,
                got=", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in self._inputs.items()),
                next_step="call it on one batch yourself: names, shapes, dtype and device must fit",
            ) from error
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor):
            raise ModelError(
                "the module must return a tensor, or a tuple that begins with one",
                where=type(self.network).__name__,
                got=type(output).__name__,
            )

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """The first rows of the batches, repeated when there are too few."""
        rows = torch.arange(batch) % self.available_samples
        return {name: value[rows].clone() for name, value in self._inputs.items()}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs as they are: a plain module knows no guidance."""
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The output as it is."""
        return output

    @property
    def available_samples(self) -> int:
        """The rows of all batches."""
        return len(next(iter(self._inputs.values())))

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """The batches as one step, ``samples`` of their rows in an order that is drawn without replacement."""
        # From the generator's seed, not its state, which moves on: all parts must draw from one order.
        own = torch.Generator().manual_seed(rng.initial_seed())
        order = torch.randperm(self.available_samples, generator=own)
        pick = order[samples.start : samples.stop].sort().values
        inputs = {name: value[pick] for name, value in self._inputs.items()}
        with torch.no_grad():
            output = run(inputs)
        progress(1, 1)
        return CalibrationSet({name: value.unsqueeze(0) for name, value in inputs.items()}, output.unsqueeze(0))


def _named(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch as keyword tensors of the module's forward."""
    try:
        if isinstance(batch, Mapping):
            named = dict(batch)
        else:
            arguments = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            named = inspect.signature(network.forward).bind(*arguments).arguments
    except TypeError as error:
        raise ModelError(
            "a batch does not fit the module's forward", where=type(network).__name__, got=error
        ) from error
    foreign = {name: type(value).__name__ for name, value in named.items() if not isinstance(value, Tensor)}
    if foreign:
        raise ModelError("every input of the module must be a tensor", where="batches", got=foreign)
    return dict(named)
