"""A console whose words go to whoever watches the whole bench."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from quantlab.report.console import Console, Progress, Verbosity
from quantlab.store import JSON

Message = Mapping[str, JSON]
"""``{"say": level, "text": ...}``, ``{"stage": title, "done": ..., "total": ...}`` or ``{"failed": message}``."""
SECONDS_BETWEEN = 0.2
"""How often at most a stage tells how far it is."""


class Level(StrEnum):
    """How much a message matters."""

    DETAIL = "detail"
    INFO = "info"
    WARNING = "warning"


def read_message(line: str) -> Message | None:
    """The message that a line of a worker's output is, or None for any other text."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


class RelayConsole(Console):
    """Hands on everything that is said as a message; the watcher decides what is shown."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        super().__init__(Verbosity.VERBOSE, live=False)
        self.send = send

    def info(self, message: str) -> None:
        """Say something."""
        self.send({"say": Level.INFO, "text": message})

    def detail(self, message: str) -> None:
        """Say something that only a curious person wants."""
        self.send({"say": Level.DETAIL, "text": message})

    def warn(self, message: str) -> None:
        """Say something that must be seen."""
        self.send({"say": Level.WARNING, "text": message})

    @contextmanager
    def task(self, title: str) -> Iterator[Progress]:
        """A stage: tells that it began and, now and then, how far it is."""
        told = time.monotonic()
        self.send({"stage": title, "done": 0, "total": 0})

        def update(done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= SECONDS_BETWEEN:
                told = now
                self.send({"stage": title, "done": done, "total": total})

        yield update
