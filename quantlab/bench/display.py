"""Progress of a whole bench: a line for each running cell and one for all on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantlab.bench.cells import CellJob
from quantlab.bench.launch import Outcome
from quantlab.bench.relay import Level, Message
from quantlab.report.console import PLAIN_INTERVAL_SECONDS, WIDE, Console, Verbosity

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display(ABC):
    """Shows how far a bench is, and counts.

    Args:
        console: speaks.
        total: cells of the bench.
        there: cells that have a result already.
    """

    def __init__(self, console: Console, total: int, there: int) -> None:
        self.console, self.total, self.there = console, total, there
        self.ended, self.begin = 0, time.monotonic()

    @abstractmethod
    def started(self, job: CellJob) -> None:
        """A cell begins."""

    @abstractmethod
    def stage(self, job: CellJob, title: str, done: int, total: int) -> None:
        """How far a stage of a running cell is; ``total`` is 0 while nothing is known."""

    @abstractmethod
    def ends(self, outcome: Outcome) -> None:
        """A cell has ended."""

    def heard(self, job: CellJob, message: Message) -> None:
        """Show a message of a running cell."""
        match message:
            case {"stage": str(title), "done": int(done), "total": int(total)}:
                self.stage(job, title, done, total)
            case {"say": Level.WARNING, "text": text}:
                self.console.warn(f"{job.title}: {text}")
            case {"text": text}:
                self.console.detail(f"{job.title}: {text}")

    def finished(self, outcome: Outcome) -> None:
        """Count a cell, and tell why it failed if it did."""
        self.ended += 1
        self.ends(outcome)
        if outcome.failure is not None:
            self.console.warn(f"{outcome.job.title} failed: {outcome.failure}")

    @property
    def seconds_left(self) -> float:
        """From the time that the cells of this bench took so far."""
        return (time.monotonic() - self.begin) / self.ended * (self.total - self.there - self.ended)

    @property
    def count(self) -> int:
        """Cells that have ended or were there."""
        return self.there + self.ended


class PlainDisplay(Display):
    """Lines: when a cell begins and ends, and now and then how far a long stage is."""

    spoken = 0.0

    def started(self, job: CellJob) -> None:
        """Say so."""
        self.console.info(f"{job.title}: running")

    def stage(self, job: CellJob, title: str, done: int, total: int) -> None:
        """Say so when nothing was said for a while."""
        now = time.monotonic()
        if total and now - max(self.begin, self.spoken) >= PLAIN_INTERVAL_SECONDS:
            self.spoken = now
            self.console.info(f"{job.title}: {title}: {done}/{total}")

    def ends(self, outcome: Outcome) -> None:
        """Say so, with the time that the others may take."""
        state = "done" if outcome.failure is None else "failed"
        self.console.info(f"[{self.count}/{self.total}] {outcome.job.title}: {state}{self._left()}")

    def _left(self) -> str:
        return f"; about {clock(self.seconds_left)} left" if self.count < self.total else ""


class LiveDisplay(Display):
    """Bars on a terminal."""

    def __init__(self, console: Console, total: int, there: int, progress: Progress) -> None:
        super().__init__(console, total, there)
        self.progress = progress
        self.all = progress.add_task("all cells", total=total, completed=there, left="")
        self.bars: dict[str, tuple[TaskID, str]] = {}

    def started(self, job: CellJob) -> None:
        """Add a bar below that of all cells."""
        self.bars[job.result] = self.progress.add_task(job.title, total=None, left=""), ""

    def stage(self, job: CellJob, title: str, done: int, total: int) -> None:
        """Move the cell's bar; each stage begins it anew."""
        bar, before = self.bars[job.result]
        if title != before:
            self.progress.reset(bar, description=f"{job.title}: {title}")
            self.bars[job.result] = bar, title
        self.progress.update(bar, completed=done, total=total or 1)  # a total cannot become unknown again

    def ends(self, outcome: Outcome) -> None:
        """Take the cell's bar away and move that of all cells."""
        self.progress.remove_task(self.bars.pop(outcome.job.result)[0])
        left = f"about {clock(self.seconds_left)} left" if self.count < self.total else ""
        self.progress.update(self.all, completed=self.count, left=left)


class QuietDisplay(Display):
    """Tells failures and warnings alone."""

    def started(self, job: CellJob) -> None:
        """Nothing."""

    def stage(self, job: CellJob, title: str, done: int, total: int) -> None:
        """Nothing."""

    def ends(self, outcome: Outcome) -> None:
        """Nothing."""


@contextmanager
def display(console: Console, total: int, there: int) -> Iterator[Display]:
    """The display that fits: live on a terminal, lines elsewhere, nothing when quiet."""
    if there:
        console.info(f"{there} of {total} cells have their results already")
    if console.verbosity is Verbosity.QUIET:
        yield QuietDisplay(console, total, there)
    elif not console.live or there == total:
        yield PlainDisplay(console, total, there)
    else:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        rich = RichConsole(stderr=True)
        title = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        bar = [BarColumn(12)] if rich.width >= WIDE else []
        left = TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True))
        with Progress(title, *bar, MofNCompleteColumn(), left, console=rich, expand=True) as progress:
            yield LiveDisplay(console, total, there, progress)


def clock(seconds: float) -> str:
    """A duration in the largest unit that fits: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
