"""One cell in a process of its own: ``python -m quantlab.bench.worker JOB`` writes one result file.

JOB is a ``CellJob`` as JSON. Standard output has a JSON message a line. The exit code is 0 when the result file is
there. A worker stops at SIGTERM, as ``quantlab run`` does: nothing half-written stays.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from quantlab.bench.cells import CellJob
from quantlab.bench.relay import Message, RelayConsole
from quantlab.errors import QuantlabError, Stopped, unforeseen
from quantlab.plugins import Registry, load_registry
from quantlab.recipe.load import load_recipe
from quantlab.recipe.reporters import reporter_choices
from quantlab.report.console import Console
from quantlab.report.rows import row_to_json
from quantlab.run import RunOptions, run
from quantlab.store import JSON, atomic_write_json

TIED = "--tied"
"""The worker ends when its standard input does: so that none outlives a launcher that was killed."""


def run_cell(job: CellJob, registry: Registry, console: Console) -> str | None:
    """Run a cell on one thread and write its result file; returns why it failed, or None."""
    torch.set_num_threads(1)  # the number of cells beside one another must change no number
    try:
        loaded = load_recipe(job.recipe, job.overrides, registry, job.profile)
        reporters = reporter_choices(job.reporters, registry)
        result = run(loaded, RunOptions(Path(job.runs_dir), "cpu", "float32", False, console, reporters))
        record: dict[str, JSON] = {
            "values": dict(job.values),  # type: ignore[dict-item]
            "rows": [row_to_json(row) for row in result.rows],
            "run": result.folder.relative_to(job.runs_dir).as_posix() if result.folder else None,
        }
        atomic_write_json(Path(job.result), record)
    except Exception as error:
        return str(error if isinstance(error, QuantlabError) else unforeseen(error))
    return None


def main(arguments: Sequence[str]) -> int:
    """Run the cell that the first argument describes; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    if TIED in arguments:
        threading.Thread(target=_watch_input, daemon=True).start()
    job = CellJob.from_json(arguments[0])
    try:
        os.chdir(job.folder)
        failure = run_cell(job, load_registry(job.plugins), RelayConsole(_send))
    except QuantlabError as error:
        failure = str(error)
    except Stopped:
        return 128 + signal.SIGTERM
    if failure is not None:
        _send({"failed": failure})
    return 0 if failure is None else 1


def _send(message: Message) -> None:
    print(json.dumps(message), flush=True)


def _watch_input(descriptor: int = 0) -> None:
    """Ask the process to stop at the end of its input; unbuffered, since Python ends while this still reads."""
    while os.read(descriptor, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
