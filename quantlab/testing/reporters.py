"""The contract of a reporter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from quantlab.contracts.reporter import Curve, MethodResult, Reporter, RunEnd, RunStart, RunStatus
from quantlab.errors import PluginError
from quantlab.testing.contract import Subject

METHODS = ("full precision", "mse")


def keeps_a_run(subject: Subject) -> None:
    """A run from its begin to its end, with two methods and a curve, twice beside one another."""
    if not _usable(subject):
        return
    with _elsewhere() as folder:
        runs = [(subject.build(), start_of(folder / name, name)) for name in ("a", "b")]
        for reporter, start in runs:
            subject.pure(lambda r=reporter, s=start: r.begin(s), "`begin(start)` opens a record, one for each run")
        for method in METHODS:
            for reporter, _ in runs:
                _tell(subject, reporter, method)
        for reporter, start in runs:
            page = start.folder / "report.html"
            page.write_text("<p>a page</p>")
            end = RunEnd(RunStatus.FINISHED, files=[page])
            subject.pure(lambda r=reporter, e=end: r.end(e), "`end(end)` closes the record")
            subject.require(page.is_file(), "it leaves the files of the run where they are", "report.html is gone")


def ends_a_run_that_failed(subject: Subject) -> None:
    """A run that failed or was stopped before anything was measured, or while a method was tuned."""
    if not _usable(subject):
        return
    for status in (RunStatus.FAILED, RunStatus.STOPPED):
        for tuned in (False, True):
            with _elsewhere() as folder:
                reporter: Reporter = subject.build()
                subject.pure(lambda r=reporter, f=folder: r.begin(start_of(f / "a", "a")), "`begin(start)` opens it")
                if tuned:
                    subject.pure(lambda r=reporter: r.curve(curve_of("mse")), "`curve(curve)` writes it down")
                end = RunEnd(status, "a reason")
                subject.pure(lambda r=reporter, e=end: r.end(e), "`end(end)` closes the record of such a run")


def goes_on_with_a_run_that_stopped(subject: Subject) -> None:
    """The same recipe again after it stopped, with everything told once more."""
    if not _usable(subject):
        return
    with _elsewhere() as folder:
        for name, status in (("a", RunStatus.STOPPED), ("b", RunStatus.FINISHED)):
            reporter = subject.build()
            subject.pure(lambda r=reporter, n=name: r.begin(start_of(folder / n, "a")), "`begin(start)` opens it again")
            _tell(subject, reporter, "mse")
            end = RunEnd(status)
            subject.pure(lambda r=reporter, e=end: r.end(e), "`end(end)` closes the record")


def start_of(folder: Path, recipe: str) -> RunStart:
    """A run of a small recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {"name": recipe, "budget.weight_bits": 4, "split_skip": False, "attention": None, "x.lr": 0.5}
    return RunStart(recipe, "mse", f"digest of {recipe}", folder, parameters, {"torch": "2.13.0", "seed": "0"})


def curve_of(method: str) -> Curve:
    """A loss that had nothing to say at its second step."""
    return Curve(method, "0-distill/total", [(0, 3.0), (2, 1.5)])


def result_of(method: str) -> MethodResult:
    """A measured row; full precision has no parameters."""
    parameters = {} if method == METHODS[0] else {"budget.weight_bits": 4, "method": method}
    tags = {"protocol": "0123456789abcdef", "allocation": "", "tuner/distill": "1"}
    return MethodResult(method, parameters, tags, {"fid": 1.5, "fid-low": 1.0, "size_bytes": 1000.0})


def _tell(subject: Subject, reporter: Reporter, method: str) -> None:
    if method != METHODS[0]:
        subject.pure(lambda: reporter.curve(curve_of(method)), "`curve(curve)` writes it down")
    subject.pure(lambda: reporter.result(result_of(method)), "`result(result)` writes it down")


def _usable(subject: Subject) -> bool:
    """Whether what the reporter needs is on this machine."""

    def ready() -> bool:
        try:
            subject.build().require()
        except PluginError:
            return False
        return True

    return subject.call(ready, "`require()` returns, or raises PluginError")


@contextmanager
def _elsewhere() -> Generator[Path]:
    """A working folder of its own, where a reporter may leave what it likes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


CHECKS = (keeps_a_run, ends_a_run_that_failed, goes_on_with_a_run_that_stopped)
