"""Whole cells of a bench: interrupted, beside one another, or alone, they give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlab.bench import LocalLauncher, bench
from quantlab.errors import Stopped
from quantlab.plugins import load_registry
from quantlab.report.console import Console, Verbosity, make_console
from quantlab.report.rows import FULL_PRECISION
from quantlab.stages.evaluate import Protocol

FILE = """\
version: 1
recipe: digits/mpq-dm-w2a4
profile: smoke
set: {baselines: [], evaluate.bootstrap: 3, evaluate.metrics: [fid-to-teacher, accuracy, paired-error]}
matrices:
  - method: [min-max]
    seed: [1, 2]
results: RESULTS
"""


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / "small.yaml").write_text(FILE.replace("RESULTS", str(folder / "results")))
    return folder / "small.yaml"


def numbers(folder: Path) -> dict[str, list[dict]]:
    """Every result file without what it took."""
    found = {}
    for file in folder.glob("results/*-*.json"):
        rows = json.loads(file.read_text())["rows"]
        found[file.name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Each cell by itself, in this process; the first is stopped once, while it draws."""
    folder = tmp_path_factory.mktemp("bench") / "alone"
    path = write(folder)

    class Stopping(Console):
        def info(self, message: str) -> None:
            if "draw and measure" in message:
                raise Stopped(143)

    stopping = Stopping(Verbosity.NORMAL, live=False)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("quantlab.bench.display.PLAIN_INTERVAL_SECONDS", 0.0)
        patch.setattr("quantlab.bench.relay.SECONDS_BETWEEN", 0.0)  # or a fast machine draws before anything is told
        bench(path, load_registry(), folder / "runs", stopping, ("seed=1",))
    assert numbers(folder) == {} and not list(folder.glob("runs/.store/*.partial"))
    for seed in (1, 2):
        bench(path, load_registry(), folder / "runs", make_console(quiet=True), (f"seed={seed}",))
    return folder


def test_cells_beside_one_another_give_the_numbers_of_each_alone(alone, tmp_path) -> None:
    path = write(tmp_path / "beside")
    result = bench(path, load_registry(), path.parent / "runs", make_console(quiet=True), (), LocalLauncher(2))
    assert not result.failures and len(numbers(alone)) == 2
    assert numbers(path.parent) == numbers(alone)
    stages = [folder.name.partition("-")[0] for folder in path.parent.glob("runs/.store/*") if folder.is_dir()]
    assert (stages.count("capture"), stages.count("reference"), stages.count("finalize")) == (1, 1, 2)


def test_rows_say_what_they_may_be_compared_by_and_how_sure_they_are(alone) -> None:
    for rows in numbers(alone).values():
        full, quantized = rows
        assert full["protocol"] == quantized["protocol"] == Protocol(quantized["protocol_fields"]).digest
        assert quantized["protocol_fields"]["samples"] == 32
        low, high = quantized["intervals"]["paired-mse"]
        assert low < quantized["metrics"]["paired-mse"] < high
        assert full["method"] == FULL_PRECISION and set(full["other_noise"]) == {"fid-to-teacher", "accuracy"}
        # The distance of two sets does not know which of them is the teacher's.
        assert full["other_noise"]["fid-to-teacher"] == pytest.approx(full["metrics"]["fid-to-teacher"], rel=1e-3)
        assert quantized["other_noise"] == {}
