"""Reporters: whoever keeps the record of runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import BaseModel

Value = str | int | float | bool | None
"""Of a parameter."""


class RunStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class RunStart:
    """A run begins.

    Attributes:
        recipe: its name.
        method: the recipe's own.
        digest: hash of the resolved recipe; a run that goes on where an earlier one stopped has the same.
        folder: of the run.
        parameters: the resolved recipe by dotted key, "budget.weight_bits".
        tags: the packages' versions, the device and the seed.
    """

    recipe: str
    method: str
    digest: str
    folder: Path
    parameters: Mapping[str, Value]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Curve:
    """How a loss went while a method was tuned.

    Attributes:
        method: that was tuned.
        name: tuner and loss, "0-efficientdm/total".
        points: step and value, without steps at which the loss had nothing to say.
    """

    method: str
    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class MethodResult:
    """What was measured of one method, as a row of the result table has it.

    Attributes:
        method: its name, or "full precision".
        parameters: the recipe as this method resolves it, by dotted key; none of full precision.
        tags: protocol id, hash of the bit map, and the versions of the plugins it was made with.
        metrics: value by name, with the row's bits, bytes and seconds; both ends of an interval are named after it,
            "fid-low" and "fid-high".
    """

    method: str
    parameters: Mapping[str, Value]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunEnd:
    """A run has ended.

    Attributes:
        status: how.
        reason: why it did not finish.
        files: what it wrote for people: the page, the picture, the metrics; none when it did not finish.
    """

    status: RunStatus
    reason: str = ""
    files: Sequence[Path] = ()


class Reporter(ABC):
    """Writes down what a run was, how its losses went and what it measured, where people look runs up.

    It is built from its validated ``Config`` for one run, and its methods are called in the order they stand in here:
    ``curve`` and ``result`` for each method in turn, ``end`` always. Results never depend on it: what ``curve``,
    ``result`` or ``end`` raises is told as a warning.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    def require(self) -> None:  # noqa: B027 - some need nothing
        """Raise before anything is computed when a package is missing.

        Raises:
            PluginError: with the command that installs it.
        """

    @abstractmethod
    def begin(self, start: RunStart) -> None:
        """Open the record; what it raises ends the run before anything is computed."""

    @abstractmethod
    def curve(self, curve: Curve) -> None:
        """Write a curve of a method that was just tuned."""

    @abstractmethod
    def result(self, result: MethodResult) -> None:
        """Write what was measured of a method."""

    @abstractmethod
    def end(self, end: RunEnd) -> None:
        """Close the record."""
