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
from quantlab.errors import ArtefactError
from quantlab.plugins import Kind, Registry
from quantlab.processes import ALONE, Processes
from quantlab.report.console import Console
from quantlab.store import JSON, RunFolder, StageFolder, Store

Compute = Callable[[Path, Progress], None]
"""Writes a stage's files into a folder and reports progress."""
Assist = Callable[[], None]
"""What the other processes do while the first one computes a stage."""


@dataclass(frozen=True)
class RunContext:
    """The surroundings of a run."""

    store: Store
    folder: RunFolder
    registry: Registry
    console: Console
    processes: Processes = ALONE

    def stage(
        self,
        name: str,
        title: str,
        key: Mapping[str, JSON],
        compute: Compute,
        *,
        link: str,
        resumable: bool = False,
        assist: Assist = lambda: None,
    ) -> StageFolder:
        """Compute a stage or find it, link it into the run folder as ``link`` and tell the listeners.

        Of several processes the first does so. The others call ``assist`` if it computes, and then read what is there.
        """
        if not self.processes.first:
            return self._followed(name, key, assist)
        start = time.perf_counter()
        status = StageStatus.FAILED
        stage: StageFolder | None = None
        try:
            with self.console.task(title) as progress:

                def begin(path: Path) -> None:
                    self.processes.tell(True)
                    compute(path, progress)

                stage = self.store.stage(name, key, begin, resumable=resumable)
                self.processes.tell(False)
            status = StageStatus.REUSED if stage.reused else StageStatus.COMPUTED
            self.folder.link(stage, link)
            return stage
        finally:
            event = StageEvent(
                link, status, time.perf_counter() - start, stage.path if stage else None, self.folder.path
            )
            self.registry.emit(event, self.console.warn)

    def _followed(self, name: str, key: Mapping[str, JSON], assist: Assist) -> StageFolder:
        """A stage that the first process computes or finds."""

        def absent(path: Path) -> None:
            raise ArtefactError(
                f'the stage "{name}" of the first process is not here',
                where=str(self.store.folder),
                next_step="give a --runs-dir that all processes see",
            )

        while self.processes.tell(False):
            assist()
        return self.store.stage(name, key, absent)

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
