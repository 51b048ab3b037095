"""Who runs the cells: this process, or several on this machine; a cluster would be a third launcher."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from quantlab.bench.cells import CellJob
from quantlab.bench.relay import Level, Message, RelayConsole, read_message
from quantlab.bench.worker import TIED, run_cell
from quantlab.plugins import Registry

GRACE_SECONDS = 30.0
"""How long workers may take to leave everything in order after they were asked to end."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: its result file is there, or ``failure`` says why not."""

    job: CellJob
    failure: str | None


class Watcher(Protocol):
    """Is told what the running cells do."""

    def started(self, job: CellJob) -> None:
        """A cell begins."""
        ...

    def heard(self, job: CellJob, message: Message) -> None:
        """A cell says something, or how far its stage is."""
        ...


class Launcher(Protocol):
    """Runs cells in any order, several at a time or not.

    A job is plain data and its worker a command (``quantlab.bench.worker``), so cells may run anywhere that sees the
    same files. Cells that need the same stage share it through the store, which lets one compute and the others wait.
    """

    def run(self, jobs: Sequence[CellJob], watcher: Watcher) -> Generator[Outcome]:
        """An outcome for every job, as soon as it is known; closing the generator ends what still runs."""
        ...


@dataclass(frozen=True)
class InProcess:
    """One cell after the other in this process."""

    registry: Registry

    def run(self, jobs: Sequence[CellJob], watcher: Watcher) -> Generator[Outcome]:
        """An outcome for every job, in their order."""
        for job in jobs:
            watcher.started(job)
            console = RelayConsole(lambda message, job=job: watcher.heard(job, message))
            yield Outcome(job, run_cell(job, self.registry, console))


def launcher_for(jobs: int, registry: Registry) -> Launcher:
    """What runs this many cells at a time."""
    return InProcess(registry) if jobs == 1 else LocalLauncher(jobs)


@dataclass
class _Worker:
    """A running worker and what it said last."""

    job: CellJob
    process: subprocess.Popen[str]
    failure: str | None = None
    words: deque[str] = field(default_factory=lambda: deque(maxlen=3))

    def outcome(self) -> Outcome:
        """After its end."""
        code = self.process.wait()
        if code == 0:
            return Outcome(self.job, None)
        last = "\n  ".join(self.words) or "nothing"
        return Outcome(self.job, self.failure or f"its process ended with code {code}\n  it said last: {last}")


@dataclass(frozen=True)
class LocalLauncher:
    """Several processes on this machine, each with one cell and one thread.

    Attributes:
        jobs: how many at a time.
        command: of a worker; its job and ``--tied`` are put behind it.
    """

    jobs: int
    command: Sequence[str] = (sys.executable, "-m", "quantlab.bench.worker")

    def run(self, jobs: Sequence[CellJob], watcher: Watcher) -> Generator[Outcome]:
        """An outcome for every job as its process ends; none outlives the generator."""
        waiting, running = deque(jobs), dict[str, _Worker]()
        lines: SimpleQueue[tuple[str, str | None]] = SimpleQueue()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.popleft()
                    running[job.result] = _start(self.command, job, lines)
                    watcher.started(job)
                name, line = lines.get()
                if line is None:
                    yield running.pop(name).outcome()
                else:
                    _hear(running[name], line, watcher)
        finally:
            _end([worker.process for worker in running.values()])


def _start(command: Sequence[str], job: CellJob, lines: SimpleQueue[tuple[str, str | None]]) -> _Worker:
    """Start a worker in a session of its own, so that Ctrl-C reaches this process alone, which then ends it."""
    process = subprocess.Popen(
        [*command, job.to_json(), TIED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put((job.result, line.rstrip("\n")))
        lines.put((job.result, None))

    threading.Thread(target=read, daemon=True).start()
    return _Worker(job, process)


def _hear(worker: _Worker, line: str, watcher: Watcher) -> None:
    """A message of a worker; a line that is none, as of a library's warning, is handed on as a detail."""
    message = read_message(line)
    if message is None:
        worker.words.append(line)
        watcher.heard(worker.job, {"say": Level.DETAIL, "text": line})
    elif "failed" in message:
        worker.failure = str(message["failed"])
    else:
        watcher.heard(worker.job, message)


def _end(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Ask processes to end and wait for them; those that do not are killed."""
    left = list(processes)
    try:
        for process in left:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in left:
            process.kill()  # does nothing to one that has ended
            process.wait()
