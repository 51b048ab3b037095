"""Measured numbers beside expected ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from quantlab import reproduce
from quantlab.cli import app
from quantlab.contracts.expected import Band
from quantlab.errors import RecipeError
from quantlab.plugins import load_registry
from quantlab.recipe.choices import essence
from quantlab.recipe.find import packaged_recipes
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.report.console import make_console
from quantlab.report.rows import FULL_PRECISION, Row
from quantlab.reproduce import Verdict, compare
from quantlab.run import RunOptions, RunResult, cell_digest

RECIPE = """\
version: 1
model: {source: builtin, name: digits}
method: mse
baselines: [min-max]
budget: {weight_bits: 4, activation_bits: 8}
evaluate: {samples: 500}
expected:
  protocol: {evaluate.samples: 500, budget.weight_bits: 4}
  bands:
    - {method: mse, metric: fid, value: 5, tolerance: 1, source: a table, certainty: published}
    - {method: min-max, metric: fid, low: 6, high: 8, source: a table, certainty: derived, note: odd}
    - {method: full precision, metric: fid, low: 1, high: 2, source: a table, certainty: published}
"""


def loaded(folder: Path, text: str = RECIPE, *overrides: str) -> LoadedRecipe:
    file = folder / "own.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def row(method: str, **metrics: float) -> Row:
    intervals = {name: (value - 0.5, value + 0.5) for name, value in metrics.items()}
    return Row(method, "digits", 4, 8, 1, 8, 1.0, metrics, 1.0, "p", 0, True, True, "a", intervals)


GOOD = (row(FULL_PRECISION, fid=1.0), row("min-max", fid=8.0), row("mse", fid=5.5))


def verdicts(recipe: LoadedRecipe, *rows: Row) -> list[Verdict]:
    return [comparison.verdict for comparison in compare(recipe, rows)]


def test_the_ends_of_a_band_belong_to_it(tmp_path):
    recipe = loaded(tmp_path)
    assert verdicts(recipe, *GOOD) == [Verdict.INSIDE] * 3
    off = (row(FULL_PRECISION, fid=0.99), row("min-max", fid=8.01), row("mse", fid=3.9))
    assert verdicts(recipe, *off) == [Verdict.OUTSIDE] * 3
    assert verdicts(recipe, row("mse", accuracy=1.0)) == [Verdict.NOT_MEASURED] * 3


def test_other_settings_are_named_and_forbid_a_verdict(tmp_path):
    fewer = compare(loaded(tmp_path, RECIPE, "evaluate.samples=20"), GOOD)
    assert [found.verdict for found in fewer] == [Verdict.NOT_COMPARABLE] * 3
    assert fewer[0].explained == "not comparable: evaluate.samples is 20 here and 500 there"
    assert fewer[1].explained.endswith("there (odd)")


def test_full_precision_has_no_budget(tmp_path):
    recipe = loaded(tmp_path, RECIPE, "budget.weight_bits=3")
    assert verdicts(recipe, *GOOD) == [Verdict.NOT_COMPARABLE, Verdict.NOT_COMPARABLE, Verdict.INSIDE]


def test_a_band_has_settings_and_reasons_of_its_own(tmp_path):
    text = RECIPE.replace("note: odd", "protocol: {sampling.steps: 50}, unlike: [another network]")
    found = compare(loaded(tmp_path, text), GOOD)[1]
    assert found.differences == ("sampling.steps is 20 here and 50 there", "another network")


def test_what_was_not_found_has_no_verdict(tmp_path):
    text = RECIPE.replace("low: 6, high: 8, source: a table, certainty: derived", "source: x, certainty: not-found")
    assert verdicts(loaded(tmp_path, text), *GOOD)[1] is Verdict.NO_NUMBER


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("evaluate.samples: 500, b", "evaluate.sampels: 500, b", 'did you mean "samples"'),
        ("method: mse, metric", "method: msee, metric", 'did you mean "mse"'),
        ("value: 5, tolerance: 1", "value: 5", "low and high, or value and tolerance"),
        ("low: 6, high: 8", "low: 8, high: 6", "low lies above high"),
        ("certainty: derived", "certainty: not-found", "was not found has neither"),
        ("certainty: derived", "certainty: sure", "certainty"),
    ],
)
def test_a_wrong_expectation_is_told_with_its_line(tmp_path, old, new, told):
    assert old in RECIPE
    with pytest.raises(RecipeError, match=r"own.yaml:\d+") as error:
        loaded(tmp_path, RECIPE.replace(old, new))
    assert told in str(error.value)


def test_expectations_are_in_no_hash(tmp_path):
    bare = loaded(tmp_path, RECIPE.partition("expected:")[0])
    full = loaded(tmp_path)
    assert full.recipe.expected.bands and not bare.recipe.expected.bands
    assert essence(full.recipe, full.registry) == essence(bare.recipe, bare.registry)
    assert cell_digest(full) == cell_digest(bare)
    assert full.recipe.settings() == bare.recipe.settings()


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """A run that gives the rows it is told to."""
    given = SimpleNamespace(rows=GOOD)

    def run(recipe: LoadedRecipe, options: RunOptions) -> RunResult:
        return RunResult(None, (), "the plan") if options.dry_run else RunResult(tmp_path, given.rows, "the rows")

    monkeypatch.setattr(reproduce, "run", run)
    return given


def call(folder: Path, *arguments: str):
    loaded(folder)
    return CliRunner().invoke(app, ["reproduce", str(folder / "own.yaml"), *arguments])


def test_the_exit_code_says_whether_everything_is_inside(faked, tmp_path):
    result = call(tmp_path)
    assert result.exit_code == 0 and "the rows" in result.stdout
    assert "mse | fid | 4 to 6 | a table | published | 5.5 [5, 6] | inside" in " ".join(result.stdout.split())
    faked.rows = GOOD[1:]
    assert call(tmp_path).exit_code == reproduce.UNDECIDED
    faked.rows = (row("mse", fid=50.0),)
    assert call(tmp_path).exit_code == reproduce.OUTSIDE
    assert call(tmp_path, "--set", "evaluate.samples=20").exit_code == reproduce.UNDECIDED


def test_a_dry_run_shows_the_bands_and_what_forbids_comparing(faked, tmp_path):
    result = call(tmp_path, "--dry-run", "--set", "evaluate.samples=20")
    assert result.exit_code == 0 and "the plan" in result.stdout
    assert "evaluate.samples is 20 here and 500 there" in result.stdout and "measured" not in result.stdout


def test_json_is_json_alone(faked, tmp_path):
    faked.rows = (replace(GOOD[2], intervals={}),)
    found = json.loads(call(tmp_path, "--json").stdout)
    first = found["expected"][0]
    assert (first["ends"], first["measured"], first["interval"], first["verdict"]) == ([4, 6], 5.5, None, "inside")
    assert found["exit_code"] == reproduce.UNDECIDED and found["folder"] == str(tmp_path)


def test_a_recipe_that_expects_nothing_is_told(tmp_path):
    bare = loaded(tmp_path, RECIPE.partition("expected:")[0])
    with pytest.raises(RecipeError, match="no numbers that it is expected"):
        reproduce.reproduce(bare, RunOptions(tmp_path, "cpu", "float32", False, make_console(quiet=True)))


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if name.startswith("paper/")])
def test_recipes_of_papers_say_what_is_expected_and_are_as_it_was_measured(name):
    """Numbers that say how they differ apart, the recipe's own settings are those of the numbers."""
    recipe = load_recipe(name, (), load_registry())
    bands = recipe.recipe.expected.bands
    assert {band.method for band in bands} >= {recipe.recipe.method, *recipe.recipe.baselines, FULL_PRECISION}
    for comparison in compare(recipe, ()):
        band: Band = comparison.band
        assert not comparison.differences or band.unlike or band.protocol
