"""Files that are whole or not there, checksums, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, Union

from quantlab.errors import ArtefactError

JSON: TypeAlias = Union[Mapping[str, "JSON"], Sequence["JSON"], str, int, float, bool, None]  # noqa: UP007


def digest_of(value: JSON) -> str:
    """16 hexadecimal digits of the SHA-256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; raises ArtefactError when it is missing, truncated or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError("the file cannot be read as JSON", where=str(path), got=error) from error
    if not isinstance(content, dict):
        raise ArtefactError("the file holds no JSON object", where=str(path))
    return content


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path`` and put it in place at once; nothing is left when it fails.

    Raises:
        OSError: the file cannot be written; it names ``path``, which a full disk's own error does not.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    atomic_write(path, lambda partial: partial.write_text(text))


def atomic_write_json(path: Path, value: JSON) -> None:
    """Write a JSON file, whole or not at all."""
    atomic_write_text(path, json_text(value) + "\n")


def json_text(value: JSON) -> str:
    """Indented JSON; NaN and infinity become null, since JSON has no word for them."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def append_event(folder: Path, record: Mapping[str, JSON]) -> None:
    """Add one line to the folder's ``events.jsonl``, with the time in seconds since 1970."""
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")


@contextlib.contextmanager
def locked(path: Path, name: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock that the system takes back when its process ends, however it ends.

    Args:
        path: the lock's file.
        name: the stage it is about.
        waiting: is told when another process has the lock, which is then waited for; without it that is an error.

    Raises:
        ArtefactError: another process has it and nobody wants to wait, or this very process has it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if waiting is None or holder == str(os.getpid()):
                raise ArtefactError(
                    f'another process is writing the stage "{name}"',
                    where=str(path),
                    got=f"process {holder}",
                    next_step="wait for it, or end it; then give the same command again",
                ) from error
            waiting(f'waiting for process {holder}, which is writing the stage "{name}"')
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full; libraries that write files in native code say so in words only."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error))


def _finite(value: JSON) -> JSON:
    """NaN and infinities as None, all the way down."""
    match value:
        case float():
            return value if abs(value) < float("inf") else None
        case Mapping():
            return {name: _finite(child) for name, child in value.items()}
        case list() | tuple():
            return [_finite(child) for child in value]
        case _:
            return value
