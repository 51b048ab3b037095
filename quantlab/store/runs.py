"""Run folders: one for each time a recipe was run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from quantlab.errors import ArtefactError
from quantlab.store.files import JSON, append_event, atomic_write_json, atomic_write_text, read_json
from quantlab.store.stages import StageFolder, Store

RUN_FILE = "run.json"
RESULT_FILE = "metrics.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: ``<root>/<recipe>/<time>-<hash>/``."""

    path: Path

    def link(self, stage: StageFolder, name: str | None = None) -> Path:
        """Link a stage's folder into the run, relatively, so that the whole root may be moved; returns the link."""
        link = self.path / (name or stage.name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(stage.path.resolve(), link.parent.resolve()), target_is_directory=True)
        return link

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run, whole or not at all."""
        atomic_write_text(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, value: JSON) -> Path:
        """Write a JSON file of the run, whole or not at all."""
        atomic_write_json(self.path / name, value)
        return self.path / name

    def event(self, record: Mapping[str, JSON]) -> None:
        """Add a line to the run's ``events.jsonl``."""
        append_event(self.path, record)


class WatchedRun(RunFolder):
    """The folder of a run that another process writes: from here nothing is written."""

    def link(self, stage: StageFolder, name: str | None = None) -> Path:
        """Where the link is, or will be."""
        return self.path / (name or stage.name)

    def write_text(self, name: str, text: str) -> Path:
        """Where the file is, or will be."""
        return self.path / name

    def write_json(self, name: str, value: JSON) -> Path:
        """Where the file is, or will be."""
        return self.path / name

    def event(self, record: Mapping[str, JSON]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class RunRecord:
    """What ``quantlab runs`` tells of a run.

    Attributes:
        path: its folder.
        recipe: the recipe's name.
        created: local time, ISO 8601.
        complete: the run came to its end.
        stages: the folders of the stages it links to, without those that were deleted.
        size_bytes: of the run's own files and its stages; stages may be shared with other runs.
    """

    path: Path
    recipe: str
    created: str
    complete: bool
    stages: tuple[Path, ...]
    size_bytes: int


def create_run(root: Path, recipe: str, digest: str) -> RunFolder:
    """Make the folder of a new run; runs of the same second get a number at the end.

    Args:
        root: the folder of all runs.
        recipe: the recipe's name, may hold slashes.
        digest: hash of the resolved recipe.
    """
    now = datetime.now()
    for attempt in count():
        suffix = f"-{attempt}" if attempt else ""
        path = root / recipe / f"{now:%Y%m%d-%H%M%S}-{digest[:8]}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        record = {"schema_version": SCHEMA_VERSION, "recipe": recipe, "created": now.isoformat(timespec="seconds")}
        atomic_write_json(path / RUN_FILE, record)
        return RunFolder(path)
    raise AssertionError("unreachable: count() does not end")


def list_runs(root: Path) -> list[RunRecord]:
    """Every run under the root, oldest first; folders that another program made are passed over.

    Raises:
        ArtefactError: the root is a file.
    """
    if root.exists() and not root.is_dir():
        raise ArtefactError("this is a file, not a folder of runs", where=str(root))
    records = []
    for file in root.rglob(RUN_FILE):
        content, folder = _read_run(file), file.parent
        if content is None:
            continue
        stages = tuple(dict.fromkeys(path.resolve() for path in _links(folder) if path.exists()))
        size = sum(_size(path) for path in (folder, *stages))
        complete = (folder / RESULT_FILE).is_file()
        records.append(RunRecord(folder, str(content["recipe"]), str(content["created"]), complete, stages, size))
    return sorted(records, key=lambda record: (record.created, record.path))


def clean_runs(root: Path, *, everything: bool = False) -> list[Path]:
    """Delete stages that no run links to and stages that are damaged; returns what was deleted.

    Args:
        root: the folder of all runs.
        everything: all stages, and the runs too.
    """
    runs = list_runs(root)
    linked = [path.resolve() for path in _links(root)]
    deleted = Store(root).clean(linked, everything=everything)
    for run in runs if everything else []:
        shutil.rmtree(run.path)
        deleted.append(run.path)
    return deleted


def _read_run(file: Path) -> dict[str, object] | None:
    """What ``create_run`` wrote, or None when something else stands there."""
    try:
        content = read_json(file)
    except ArtefactError:
        return None
    return content if content.keys() >= {"schema_version", "recipe", "created"} else None


def _links(folder: Path) -> Iterator[Path]:
    """The symbolic links of a run, at any depth, not followed."""
    for parent, folders, _ in os.walk(folder):
        yield from (Path(parent, name) for name in folders if Path(parent, name).is_symlink())


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, links not followed."""
    return sum(Path(parent, name).lstat().st_size for parent, _, names in os.walk(folder) for name in names)
