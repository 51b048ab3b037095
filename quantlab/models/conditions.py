"""What samples are conditioned on, as tables of a network's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlab.contracts.model import Inputs


@dataclass(frozen=True)
class Conditions:
    """A table with one row for each condition: a class, or a prompt.

    Attributes:
        rows: keyword tensors [P, ...] of the network, one row for each condition; empty for an unconditional one.
        unconditional: the same keywords without a condition [1, ...]; empty where there is no such thing.
        fixed: keyword tensors [1, ...] that every sample gets besides.
    """

    rows: Inputs = field(default_factory=dict)
    unconditional: Inputs = field(default_factory=dict)
    fixed: Inputs = field(default_factory=dict)

    @property
    def count(self) -> int:
        """P; 1 without conditions."""
        return next((len(value) for value in self.rows.values()), 1)

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Keyword tensors [B, ...] for the conditions ``labels``, int64 [B]."""
        return {name: value[labels] for name, value in self.rows.items()} | _spread(self.fixed, len(labels))

    def without(self, count: int) -> dict[str, Tensor]:
        """Keyword tensors [count, ...] of samples without a condition."""
        return _spread({**self.unconditional, **self.fixed}, count)

    def tensors(self) -> dict[str, Tensor]:
        """Everything under flat names, for a file."""
        parts = {"rows": self.rows, "unconditional": self.unconditional, "fixed": self.fixed}
        return {f"{part}/{name}": value.contiguous() for part, given in parts.items() for name, value in given.items()}

    @classmethod
    def of(cls, tensors: Inputs) -> Conditions:
        """The inverse of ``tensors``."""
        parts: dict[str, dict[str, Tensor]] = {"rows": {}, "unconditional": {}, "fixed": {}}
        for path, value in tensors.items():
            part, _, name = path.partition("/")
            parts[part][name] = value
        return cls(**parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditions:
        """The same on a device, floating tensors in ``dtype``."""

        def moved(values: Inputs) -> Mapping[str, Tensor]:
            return {
                name: value.to(device, dtype if value.is_floating_point() else value.dtype)
                for name, value in values.items()
            }

        return Conditions(moved(self.rows), moved(self.unconditional), moved(self.fixed))


def class_conditions(name: str, classes: range, null_class: int | None) -> Conditions:
    """Class labels under the keyword ``name``; ``null_class`` stands for no class, None where there is none."""
    unconditional = {} if null_class is None else {name: torch.tensor([null_class])}
    return Conditions({name: torch.tensor(list(classes))}, unconditional)


def _spread(values: Inputs, count: int) -> dict[str, Tensor]:
    return {name: value.expand(count, *value.shape[1:]) for name, value in values.items()}
