"""What listeners are told about a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class StageStatus(StrEnum):
    """How a stage ended."""

    COMPUTED = "computed"
    REUSED = "reused"
    FAILED = "failed"


@dataclass(frozen=True)
class StageEvent:
    """One stage of a run has ended.

    Attributes:
        stage: the stage's name, "calibrate".
        status: how it ended.
        seconds: wall-clock time it took.
        folder: where its artefact lies, or None when it failed.
        run_folder: the run it belongs to.
    """

    stage: str
    status: StageStatus
    seconds: float
    folder: Path | None
    run_folder: Path
