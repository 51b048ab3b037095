"""Stages: computed once for the same inputs, checked when read."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import ArtefactError
from quantlab.store.files import JSON, atomic_write_json, digest_of, digest_of_file, is_disk_full, locked

STORE_FOLDER = ".store"
STAGE_FILE = "stage.json"
SCHEMA_VERSION = 1
_STAGE_NAME = re.compile(r"[\w-]+-[0-9a-f]{16}(\.partial)?")


@dataclass(frozen=True)
class StageFolder:
    """A complete stage.

    Attributes:
        name: the stage, "calibrate".
        digest: hash of everything it depends on; part of the key of the stages after it.
        path: the folder with its files; read only.
        reused: it was there already.
        seconds: what computing it took, now or then.
    """

    name: str
    digest: str
    path: Path
    reused: bool
    seconds: float

    def file(self, name: str) -> Path:
        """One of the stage's files; raises ArtefactError when it is missing."""
        path = self.path / name
        if not path.is_file():
            raise ArtefactError(
                f'the stage "{self.name}" has no file "{name}"', where=str(self.path), next_step=_clean(self.path)
            )
        return path


class Store:
    """All stages under one root folder.

    Args:
        root: the folder of all runs.
        waiting: is told when another process is writing a stage that is asked for; it is then waited for. Without it
            that is an error.
    """

    def __init__(self, root: Path, waiting: Callable[[str], None] | None = None) -> None:
        self.root, self.waiting = root, waiting
        self.folder = root / STORE_FOLDER

    def has(self, name: str, key: Mapping[str, JSON]) -> bool:
        """Whether the stage for this key was computed before; its files are not checked."""
        return self._path(name, key).exists()

    def stage(
        self, name: str, key: Mapping[str, JSON], compute: Callable[[Path], None], *, resumable: bool = False
    ) -> StageFolder:
        """The stage for this key, computed if it is not there.

        Args:
            name: the stage; a short word, it begins the folder's name.
            key: plain JSON of everything the result depends on: the code's version, the recipe's section, the digests
                of the stages it reads.
            compute: writes the stage's files into the folder it is given.
            resumable: after an interruption the folder is kept and handed to ``compute`` again, which goes on from
                what it finds there; its files must then be written atomically.

        Raises:
            ArtefactError: a file is truncated or foreign, the disk is full, or another process is writing the stage and
                the store does not wait.
        """
        path = self._path(name, key)
        digest = path.name.removeprefix(f"{name}-")
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock"), name, self.waiting):
                if not path.exists():  # another process may have written it before the lock was ours
                    seconds = _compute(path, name, key, compute, resumable)
                    return StageFolder(name, digest, path, reused=False, seconds=seconds)
        return StageFolder(name, digest, path, reused=True, seconds=check_stage(path))

    def _path(self, name: str, key: Mapping[str, JSON]) -> Path:
        return self.folder / f"{name}-{digest_of({'stage': name, 'key': key})}"

    def clean(self, linked: Sequence[Path], *, everything: bool = False) -> list[Path]:
        """Delete the stages that no run links to, and those that are damaged; returns what was deleted.

        Args:
            linked: resolved folders of the stages that runs link to.
            everything: all stages.
        """
        deleted = []
        for path in sorted(self.folder.glob("*")) if self.folder.is_dir() else []:
            if not _STAGE_NAME.fullmatch(path.name) or not path.is_dir():
                continue  # a lock, or something that is not ours
            if not everything and path.resolve() in linked and _is_sound(path):
                continue
            lock = path.with_name(f"{path.name.removesuffix('.partial')}.lock")
            with contextlib.suppress(ArtefactError), locked(lock, path.name):  # a stage being written is left alone
                shutil.rmtree(path)
                deleted.append(path)
        return deleted


def check_stage(path: Path) -> float:
    """Check every file of a stage against its checksum; returns the seconds that computing it took.

    Raises:
        ArtefactError: a file is missing, truncated or foreign, or the stage is from a newer quantlab.
    """
    try:
        record = json.loads((path / STAGE_FILE).read_text())
        version, files, seconds = record["schema_version"], record["files"], record["seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError("this is not a complete stage", where=str(path), next_step=_clean(path)) from error
    if version != SCHEMA_VERSION:
        raise ArtefactError(
            "the stage was written by another version of quantlab",
            where=str(path / STAGE_FILE),
            got=version,
            allowed=str(SCHEMA_VERSION),
            next_step=_clean(path),
        )
    for name, checksum in files.items():
        file = path / name
        if not file.is_file():
            raise ArtefactError("a file of the stage is missing", where=str(file), next_step=_clean(path))
        if digest_of_file(file) != checksum:
            raise ArtefactError("the file is not the one that was written", where=str(file), next_step=_clean(path))
    return seconds


def _compute(path: Path, name: str, key: Mapping[str, JSON], compute: Callable[[Path], None], resumable: bool) -> float:
    """Compute a stage in its partial folder and rename it; returns the seconds."""
    partial = path.with_name(f"{path.name}.partial")
    if not resumable:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left behind
    start = time.perf_counter()
    try:
        partial.mkdir(exist_ok=True)
        compute(partial)
        seconds = time.perf_counter() - start
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        checksums = {file.relative_to(partial).as_posix(): digest_of_file(file) for file in files}
        record = {"schema_version": SCHEMA_VERSION, "stage": name, "key": key, "seconds": seconds, "files": checksums}
        atomic_write_json(partial / STAGE_FILE, record)
        partial.rename(path)
    except BaseException as error:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise ArtefactError(
                f'the disk is full; the stage "{name}" was not kept',
                where=str(path.parent),
                next_step=f"free some space ({_clean_command(path)}), then give the same command again",
            ) from error
        raise
    return seconds


def _clean_command(stage: Path) -> str:
    return f"quantlab runs clean --runs-dir {stage.parent.parent}"


def _clean(stage: Path) -> str:
    return f"delete it with: {_clean_command(stage)}"


def _is_sound(path: Path) -> bool:
    try:
        check_stage(path)
    except ArtefactError:
        return False
    return True
