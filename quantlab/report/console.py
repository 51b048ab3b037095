"""Progress and messages: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

Progress = Callable[[int, int], None]

PLAIN_INTERVAL_SECONDS = 10.0
"""How often a long stage says where it is when there is no terminal."""


WIDE = 72
"""Columns of a terminal that has room for a bar and the time passed beside the time left."""


class Verbosity(IntEnum):
    """How much is said."""

    SILENT = -1
    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class Console:
    """Speaks on standard error, so that standard output holds the result alone."""

    def __init__(self, verbosity: Verbosity, live: bool) -> None:
        self.verbosity: Verbosity = verbosity
        self.live: bool = live

    def info(self, message: str) -> None:
        """Say something unless quiet."""
        if self.verbosity >= Verbosity.NORMAL:
            print(message, file=sys.stderr, flush=True)

    def detail(self, message: str) -> None:
        """Say something only when verbose."""
        if self.verbosity >= Verbosity.VERBOSE:
            print(message, file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Say something unless silent."""
        if self.verbosity > Verbosity.SILENT:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    @contextmanager
    def task(self, title: str) -> Iterator[Progress]:
        """A long piece of work: yields a function to be called with what is done and what there is to do."""
        if self.verbosity <= Verbosity.QUIET:
            yield lambda done, total: None
        elif self.live:
            yield from self._live(title)
        else:
            yield from self._plain(title)

    def _live(self, title: str) -> Iterator[Progress]:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        def whole() -> Column:
            return Column(no_wrap=True)

        console = RichConsole(stderr=True)
        extra: list[ProgressColumn] = [BarColumn(12), TimeElapsedColumn(whole())] if console.width >= WIDE else []
        columns = (
            TextColumn("{task.description}", table_column=Column()),  # the only one that may be broken
            *extra,
            MofNCompleteColumn(table_column=whole()),
            TextColumn("left"),
            TimeRemainingColumn(table_column=whole()),
        )
        with RichProgress(*columns, console=console) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
            shown = progress.tasks[0]
            if shown.total is None or not shown.finished:
                progress.update(task, completed=shown.total or 1, total=shown.total or 1)

    def _plain(self, title: str) -> Iterator[Progress]:
        start = spoken = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal spoken
            now = time.monotonic()
            if now - spoken >= PLAIN_INTERVAL_SECONDS:
                spoken = now
                left = (now - start) / max(done, 1) * (total - done)
                self.info(f"{title}: {done}/{total}, about {left:.0f} s left")

        yield update
        self.info(f"{title}: {time.monotonic() - start:.1f} s")


def make_console(*, verbose: bool = False, quiet: bool = False, silent: bool = False) -> Console:
    """A console for this process: live on a terminal; ``silent`` is for processes that only help."""
    if silent:
        return Console(Verbosity.SILENT, live=False)
    verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL
    return Console(verbosity, live=sys.stderr.isatty())
