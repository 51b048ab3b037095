"""What is shown of a running bench."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress

from quantlab.bench.cells import CellJob
from quantlab.bench.display import LiveDisplay, PlainDisplay, clock, display
from quantlab.bench.launch import Outcome
from quantlab.bench.relay import RelayConsole
from quantlab.report.console import Console, Verbosity, make_console


def job(title: str) -> CellJob:
    return CellJob(title, {}, "r", None, (), (), ".", ".", f"{title}.json")


def test_plain_lines_count_and_tell_failures(capsys) -> None:
    shown = PlainDisplay(Console(Verbosity.NORMAL, False), total=5, there=2)
    for title, failure in (("a", None), ("b", "it broke"), ("c", None)):
        shown.started(job(title))
        shown.finished(Outcome(job(title), failure))
    told = capsys.readouterr().err
    assert "[3/5] a: done; about 0 s left" in told and "[4/5] b: failed" in told and "[5/5] c: done\n" in told
    assert "warning: b failed: it broke" in told


def test_warnings_are_shown_with_their_cell_and_words_when_verbose(capsys) -> None:
    for verbosity, expected in ((Verbosity.NORMAL, False), (Verbosity.VERBOSE, True)):
        shown = PlainDisplay(Console(verbosity, False), 1, 0)
        relay = RelayConsole(lambda message, shown=shown: shown.heard(job("a"), message))
        relay.info("captured")
        relay.warn("odd")
        told = capsys.readouterr().err
        assert ("a: captured" in told) is expected and "warning: a: odd" in told


def test_stages_are_relayed() -> None:
    messages = []
    with RelayConsole(messages.append).task("Draw") as progress:
        progress(1, 2)
    assert messages == [{"stage": "Draw", "done": 0, "total": 0}], "the second came too soon to be worth a message"


@pytest.mark.parametrize("width", [40, 120])
def test_a_terminal_has_a_line_for_each_running_cell_and_one_for_all(width: int) -> None:
    screen = RichConsole(file=io.StringIO(), width=width, force_terminal=True)
    with Progress(console=screen, auto_refresh=False) as progress:
        shown = LiveDisplay(Console(Verbosity.NORMAL, True), 3, 1, progress)
        for title in ("a", "b"):
            shown.started(job(title))
        shown.heard(job("a"), {"stage": "Draw", "done": 3, "total": 10})
        shown.heard(job("a"), {"stage": "Measure", "done": 0, "total": 0})
        shown.finished(Outcome(job("b"), None))
        (everything, running) = progress.tasks
        assert (everything.completed, everything.total) == (2, 3) and "left" in everything.fields["left"]
        assert running.description == "a: Measure" and (running.completed, running.total) == (0, 1)


def test_quiet_says_nothing(capsys) -> None:
    with display(make_console(quiet=True), 2, 0) as shown:
        shown.started(job("a"))
        shown.heard(job("a"), {"stage": "Draw", "done": 1, "total": 2})
        shown.finished(Outcome(job("a"), None))
    assert capsys.readouterr().err == ""


def test_clock() -> None:
    assert [clock(seconds) for seconds in (12.4, 600, 9000)] == ["12 s", "10 min", "2.5 h"]
