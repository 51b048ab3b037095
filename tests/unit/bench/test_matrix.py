"""The matrix of a bench: its file, its cells, and cells that fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantlab.bench import bench, cells, read_bench, worker
from quantlab.bench.cells import job_of
from quantlab.errors import ArtefactError, ModelError, RecipeError
from quantlab.plugins import load_registry
from quantlab.recipe import layers
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.report.rows import Row
from quantlab.run import cell_digest
from quantlab.store import atomic_write_text, read_json

FILE = """\
version: 1
recipe: digits/mpq-dm-w2a4
set: {baselines: []}
matrices:
  - seed: [1, 2]
    method: [min-max, mse]
results: RESULTS
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_bench(text: str = FILE) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(text.replace("RESULTS", str(tmp_path / "results")))
        return path

    return write_bench


def succeed(loaded, options) -> SimpleNamespace:
    recipe = loaded.recipe
    row = Row(recipe.method, "digits", 2, 4, 1, 8, 1.0, {"fid": 1.0}, 1.0, "p", recipe.seed, True, True, "a")
    return SimpleNamespace(folder=None, rows=(row,))


def go(path: Path, only: tuple[str, ...] = ()):
    return bench(path, load_registry(), path.parent / "runs", make_console(quiet=True), only)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs take no time; min-max of seed 2 breaks in one way, mse of seed 2 in another."""
    done: list[str] = []

    def run(loaded, options) -> SimpleNamespace:
        recipe = loaded.recipe
        done.append(f"{recipe.method} {recipe.seed}")
        if recipe.seed == 2:
            raise ModelError("it broke") if recipe.method == "mse" else ZeroDivisionError("a plugin's own defect")
        return succeed(loaded, options)

    monkeypatch.setattr(worker, "run", run)
    return done


def test_cells_are_all_combinations_and_equal_ones_count_once(write) -> None:
    twice = write(FILE.replace("results", "  - {seed: [1], method: [mse, mpq-dm]}\nresults", 1))
    titles = [cell.title for cell in cells(twice, load_registry())]
    assert titles[:2] == ["seed=1, method=min-max", "seed=1, method=mse"]
    assert titles[4:] == ["seed=1, method=mpq-dm"]


def test_a_job_has_all_that_another_process_needs(write, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry = replace(load_registry(), paths=(Path("odd"),))
    path = write(f"{FILE}profile: smoke\n")
    cell = cells(path, registry)[0]
    job = job_of(cell, read_bench(path), Path("results"), Path("runs"))
    assert (job.plugins, job.folder, job.profile) == ((str(tmp_path / "odd"),), str(tmp_path), "smoke")
    assert all(Path(file).is_absolute() for file in (job.recipe, job.runs_dir, job.result))
    again = load_recipe(job.recipe, job.overrides, registry, job.profile)
    assert again.recipe == cell.loaded.recipe and cell_digest(again) == cell.digest


def test_a_failing_cell_is_told_and_the_others_go_on(write, ran) -> None:
    result = go(write())
    assert len(ran) == 4 and len(result.rows) == 2
    assert result.failures["seed=2, method=mse"] == "it broke"
    assert "ZeroDivisionError: a plugin's own defect" in result.failures["seed=2, method=min-max"]
    assert "failed: seed=2, method=mse" in (result.folder / "summary.md").read_text()
    (file,) = result.folder.glob("2-mse-*.failed.txt")
    assert file.read_text() == "seed=2, method=mse\n\nit broke\n"


def test_a_failed_cell_is_run_again_and_its_file_goes_when_it_succeeds(write, ran, monkeypatch) -> None:
    go(write())
    monkeypatch.setattr(worker, "run", succeed)
    result = go(write())
    assert ran.count("min-max 1") == 1 and not result.failures and len(result.rows) == 4
    assert not list(result.folder.glob("*.failed.txt"))


def test_a_failure_stays_in_the_summary_while_other_cells_run(write, ran) -> None:
    go(write(), ("seed=2",))
    result = go(write(), ("seed=1",))
    assert not result.failures, "of the cells that were asked for"
    assert "failed: seed=2, method=mse" in (result.folder / "summary.md").read_text()


def test_the_summary_is_written_in_every_format(write, ran) -> None:
    folder = go(write(f"{FILE}baseline: min-max\n"), ("seed=1",)).folder
    assert {file.suffix for file in folder.glob("summary.*")} == {".md", ".csv", ".json", ".tex"}
    assert "fid minus min-max" in (folder / "summary.md").read_text()
    (line,) = [line for line in read_json(folder / "summary.json")["lines"] if line["method"] == "mse"]
    assert line["differences"]["fid"]["mean"] == 0


def test_a_recipe_is_read_once_for_all_cells(write, monkeypatch) -> None:
    read = []
    original = layers.read_yaml
    monkeypatch.setattr("quantlab.recipe.load.read_yaml", lambda path: read.append(path) or original(path))
    assert len(cells(write(FILE.replace("[1, 2]", str(list(range(10, 59))))), load_registry())) == 98
    assert len(read) == 2, "the recipe and its base"


def test_what_is_there_already_is_skipped(write, ran) -> None:
    first = go(write(), ("seed=1",))
    assert go(write(), ("seed=1",)).rows == first.rows
    assert ran == ["min-max 1", "mse 1"]


@pytest.mark.parametrize("text", ["{", "{}", '{"rows": 3}', '{"rows": [{"schema_version": 9}]}'])
def test_a_damaged_result_is_told(write, ran, text) -> None:
    file = next(iter(go(write(), ("seed=1",)).folder.glob("*.json")))
    atomic_write_text(file, text)
    with pytest.raises(ArtefactError) as caught:
        go(write(), ("seed=1",))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FILE.replace("version: 1", "version: 2"), [":1", '"version"']),
        (FILE.replace("recipe:", "recipy:"), [":2", 'unknown key "recipy"', 'did you mean "recipe"']),
        (FILE.replace("[1, 2]", "1"), [":5", '"matrices.0.seed" should be a list']),
        (FILE.replace("matrices", "matrixes"), ["no bench", "quantlab run small"]),
        (FILE.replace("mpq-dm-w2a4", "mpq-dm-w9a9"), ["small.yaml", 'no recipe "digits/mpq-dm-w9a9"']),
        (FILE.replace("seed:", "sede:"), ["small.yaml", 'unknown key "sede"', 'did you mean "seed"']),
        (FILE.replace("mse]", "msee]"), ["small.yaml", 'no method "msee"']),
        (f"{FILE}baseline: msee\n", ["small.yaml", 'the baseline "msee"', 'did you mean "mse"']),
        (f"{FILE}profile: smok\n", ["small.yaml", 'no profile "smok"', 'did you mean "smoke"']),
        (FILE.replace("[1, 2]", "[]"), ["small.yaml", "no cell", "at least one value"]),
    ],
)
def test_a_bad_bench_is_one_message_before_anything_is_written(write, ran, text, told) -> None:
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        go(path)
    assert all(part in str(caught.value) for part in told), str(caught.value)
    assert ran == [] and [file.name for file in path.parent.iterdir()] == ["small.yaml"]


def test_a_wrong_only_has_the_keys(write, ran) -> None:
    with pytest.raises(RecipeError, match="seed, method") as caught:
        go(write(), ("sede=1",))
    assert "--only" in str(caught.value)
