"""Workers in processes of their own: here small scripts that end in every way a worker can."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from quantlab.bench.cells import CellJob
from quantlab.bench.launch import LocalLauncher
from quantlab.bench.worker import _stop, _watch_input
from quantlab.errors import Stopped

WORKER = """
import json, os, signal, sys, time
job = json.loads(sys.argv[1])
assert sys.argv[2] == "--tied" and os.environ["OMP_NUM_THREADS"] == "1"
def left(number, frame):
    open(job["result"] + ".left", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, left)
match job["title"]:
    case "well":
        print(json.dumps({"stage": "Draw", "done": 1, "total": 2}), flush=True)
        open(job["result"], "w").close()
    case "badly":
        print(json.dumps({"failed": "it broke"}))
        sys.exit(1)
    case "killed":
        print("a library's last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    case "together":
        open(job["result"] + ".begun", "w").close()
        while len([name for name in os.listdir(job["folder"]) if name.endswith(".begun")]) < 2:
            time.sleep(0.01)
        open(job["result"], "w").close()
    case "stubborn" | "long":
        if job["title"] == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(json.dumps({"stage": str(os.getpid()), "done": 0, "total": 0}), flush=True)
        time.sleep(600)
"""


class Heard:
    """Keeps what it is told."""

    def __init__(self, then=lambda: None) -> None:
        self.begun: list[str] = []
        self.messages: list[object] = []
        self.then = then

    def started(self, job: CellJob) -> None:
        self.begun.append(job.title)

    def heard(self, job: CellJob, message: object) -> None:
        self.messages.append(message)
        self.then()


@pytest.fixture
def launch(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def jobs_of(*titles: str) -> list[CellJob]:
        folder = str(tmp_path)
        return [
            CellJob(title, {}, "r", None, (), (), folder, folder, str(tmp_path / f"{index}.json"))
            for index, title in enumerate(titles)
        ]

    def start(count: int, heard: Heard, *titles: str):
        return LocalLauncher(count, (sys.executable, str(script))).run(jobs_of(*titles), heard)

    return start


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_survives_json() -> None:
    job = CellJob("t", {"seed": 1, "budget": {"weight_bits": 2}}, "r", None, ("a=1",), ("p",), "f", "d", "x.json")
    assert CellJob.from_json(job.to_json()) == job


def test_every_job_has_an_outcome_and_a_failure_says_why(launch) -> None:
    heard = Heard()
    outcomes = {outcome.job.title: outcome.failure for outcome in launch(2, heard, "badly", "well", "killed")}
    assert outcomes["well"] is None and outcomes["badly"] == "it broke"
    assert "code -9" in outcomes["killed"] and "a library's last words" in outcomes["killed"]
    assert sorted(heard.begun) == ["badly", "killed", "well"]
    assert {"stage": "Draw", "done": 1, "total": 2} in heard.messages


def test_as_many_run_at_a_time_as_were_asked_for(launch) -> None:
    """Each waits for the other, so one after the other they would never end."""
    assert [outcome.failure for outcome in launch(2, Heard(), "together", "together")] == [None, None]


def test_a_signal_ends_the_workers_and_lets_them_clean_up(launch, tmp_path) -> None:
    """Both are running when it comes; it comes as Ctrl-C and SIGTERM do, from a handler in the main thread."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(128 + number)

    def when_both_run() -> None:
        if len(heard.messages) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    heard, before = Heard(when_both_run), signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stopped), closing(launch(2, heard, "long", "long", "well")) as outcomes:
            list(outcomes)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "0.json.left").exists() and (tmp_path / "1.json.left").exists()
    assert heard.begun == ["long", "long"]
    assert not any(alive(int(message["stage"])) for message in heard.messages)


def test_a_worker_that_does_not_end_is_killed(launch, monkeypatch) -> None:
    monkeypatch.setattr("quantlab.bench.launch.GRACE_SECONDS", 0.2)

    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    heard = Heard(enough)
    with pytest.raises(Enough):
        list(launch(1, heard, "stubborn"))
    assert not alive(int(heard.messages[0]["stage"]))


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    """When a launcher is killed the system closes its end of the worker's standard input."""
    theirs, ours = os.pipe()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        watch = threading.Thread(target=_watch_input, args=(theirs,))
        watch.start()
        os.write(ours, b"still there")
        with pytest.raises(Stopped) as caught:
            os.close(ours)
            time.sleep(30)
        watch.join()
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(theirs)
    assert caught.value.args == (143,)
