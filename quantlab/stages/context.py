"""What every stage is given: where to keep artefacts, whom to tell, which plugins there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel

from quantlab.contracts.event import StageEvent, StageStatus
from quantlab.contracts.model import Progress
from quantlab.contracts.sections import Choice
from quantlab.plugins import Kind, Registry
from quantlab.report.console import Console
from quantlab.store import JSON, RunFolder, StageFolder, Store

Compute = Callable[[Path, Progress], None]
"""Writes a stage's files into a folder and reports progress."""


@dataclass(frozen=True)
class RunContext:
    """The surroundings of a run."""

    store: Store
    folder: RunFolder
    registry: Registry
    console: Console

    def stage(
        self, name: str, title: str, key: Mapping[str, JSON], compute: Compute, *, link: str, resumable: bool = False
    ) -> StageFolder:
        """Compute a stage or find it, link it into the run folder as ``link`` and tell the listeners."""
        start = time.perf_counter()
        status = StageStatus.FAILED
        stage: StageFolder | None = None
        try:
            with self.console.task(title) as progress:
                stage = self.store.stage(name, key, lambda path: compute(path, progress), resumable=resumable)
            status = StageStatus.REUSED if stage.reused else StageStatus.COMPUTED
            self.folder.link(stage, link)
            return stage
        finally:
            event = StageEvent(
                link, status, time.perf_counter() - start, stage.path if stage else None, self.folder.path
            )
            self.registry.emit(event, self.console.warn)

    def versions(self, *choices: tuple[Kind, Choice]) -> dict[str, JSON]:
        """The versions of the chosen plugin classes, for a stage's key."""
        return {
            f"{kind}/{choice.name}": self.registry.find(kind, choice.name).value.version for kind, choice in choices
        }


def as_json(section: BaseModel) -> JSON:
    """A recipe section as plain JSON, for a stage's key."""
    return section.model_dump(mode="json")


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
