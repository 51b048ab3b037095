"""Only rows of one protocol are ranked beside one another."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from quantlab.errors import ArtefactError, RecipeError
from quantlab.report.compare import Better, compare
from quantlab.report.formats import TableFormat
from quantlab.report.rows import FULL_PRECISION, row_to_json
from quantlab.report.sources import read_rows
from quantlab.store import atomic_write_json

FIELDS = {"samples": 1000, "sampling": {"steps": 20, "eta": 0.0}}


@pytest.fixture
def rows(make_row):
    found = [({}, make_row(FULL_PRECISION, 1.0, 0, allocation=""))]
    for method, base in (("worst", 9.0), ("best", 2.0), ("middle", 4.0)):
        found += [({"seed": seed, "method": method}, make_row(method, base + seed / 10, seed)) for seed in (1, 2)]
    return found


def ranked(comparison, index: int = 0) -> list[str]:
    return [line.rows[0].method for line in comparison.rankings[index].ranked]


def test_the_lowest_distance_is_first_and_full_precision_has_no_rank(rows) -> None:
    comparison = compare(rows)
    assert comparison.comparable and ranked(comparison) == ["best", "middle", "worst"]
    cells = comparison.rankings[0].cells("fid-to-teacher")
    assert [line[:3] for line in cells[1:]] == [
        ["-", "digits", FULL_PRECISION],
        ["1", "digits", "best"],
        ["2", "digits", "middle"],
        ["3", "digits", "worst"],
    ]
    assert comparison.rankings[0].ranked[1].differences["fid-to-teacher"].mean == pytest.approx(2.0)


def test_a_metric_where_more_is_better_turns_the_order(make_row) -> None:
    rows = [({}, make_row(name, metrics={"psnr": value, "odd": value})) for name, value in (("a", 20.0), ("b", 30.0))]
    assert ranked(compare(rows, "psnr")) == ["b", "a"]
    assert ranked(compare(rows, "odd", Better.LOWER)) == ["a", "b"]


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ("accuracy", ["not ranked by accuracy", "washed out", "fid-to-teacher"]),
        ("is", ["not ranked by is", "rises while images get worse"]),
        ("fid-to-teachr", ["no result has", 'did you mean "fid-to-teacher"']),
        ("odd", ["which end", "--better"]),
    ],
)
def test_what_says_nothing_about_quality_is_refused(make_row, by: str, told: list[str]) -> None:
    rows = [({}, make_row(metrics={"fid-to-teacher": 1.0, "accuracy": 1.0, "is": 9.0, "odd": 1.0}))]
    with pytest.raises(RecipeError) as caught:
        compare(rows, by)
    assert all(part in str(caught.value) for part in told), str(caught.value)


def test_two_protocols_are_ranked_apart_and_what_differs_is_told(make_row) -> None:
    other = {"samples": 2000, "sampling": {"steps": 20, "eta": 0.0}}
    rows = [({}, make_row("a", 5.0, protocol="p", protocol_fields=FIELDS))]
    rows += [({}, make_row("b", 1.0, protocol="q", protocol_fields=other))]
    comparison = compare(rows)
    assert not comparison.comparable and (ranked(comparison), ranked(comparison, 1)) == (["a"], ["b"])
    assert comparison.differing == ["samples: 1000 (p), 2000 (q)"]
    assert [record["rank"] for ranking in comparison.rankings for record in ranking.records()] == [1, 1]


def test_results_without_their_protocol_say_so(make_row) -> None:
    rows = [({}, make_row(protocol="p")), ({}, make_row("b", protocol="q", protocol_fields=FIELDS))]
    (told,) = compare(rows).differing
    assert "the results of p are from before" in told


def test_every_format_has_the_same_ranks(rows) -> None:
    comparison = compare(rows)
    content = json.loads(comparison.render(TableFormat.JSON))
    assert [(line["rank"], line["method"]) for line in content["rankings"][0]["lines"]][:2] == [
        (1, "best"),
        (2, "middle"),
    ]
    found = list(csv.DictReader(io.StringIO(comparison.render(TableFormat.CSV))))
    assert [(line["rank"], line["method"]) for line in found][2:] == [("3", "worst"), ("", FULL_PRECISION)]
    assert "ranked by fid-to-teacher; protocol p" in comparison.render(TableFormat.MARKDOWN)
    assert r"\begin{tabular}" in comparison.render(TableFormat.LATEX)


def write_results(folder: Path, rows) -> Path:
    folder.mkdir()
    for index, (values, row) in enumerate(rows):
        atomic_write_json(folder / f"{index}-x.json", {"values": values, "rows": [row_to_json(row)]})
    atomic_write_json(folder / "summary.json", {"lines": []})
    (folder / "9-y.failed.txt").write_text("why")
    return folder


def write_run(folder: Path, recipe_text: str, row) -> Path:
    folder.mkdir()
    atomic_write_json(folder / "run.json", {"recipe": "digits/x"})
    (folder / "recipe.resolved.yaml").write_text(recipe_text)
    atomic_write_json(folder / "metrics.json", {"schema_version": 1, "rows": [row_to_json(row)]})
    return folder


def test_rows_are_read_from_a_folder_of_results(tmp_path, rows) -> None:
    assert read_rows([write_results(tmp_path / "a", rows)]) == rows


def test_runs_that_differ_in_the_seed_alone_are_one_line(tmp_path, make_row) -> None:
    one = write_run(tmp_path / "1", "version: 1\nseed: 1\n", make_row(seed=1, fid=1.0))
    two = write_run(tmp_path / "2", "version: 1\nseed: 2\n", make_row(seed=2, fid=2.0))
    (line,) = compare(read_rows([one, two / "metrics.json"])).rankings[0].ranked
    assert len(line.rows) == 2
    three = write_run(tmp_path / "3", "version: 1\nseed: 3\nrank: 4\n", make_row(seed=3, fid=2.0))
    assert len(compare(read_rows([one, two, three])).rankings[0].ranked) == 2


def test_the_same_method_of_two_benches_is_two_lines(tmp_path, rows) -> None:
    folders = [write_results(tmp_path / name, rows) for name in ("a", "b")]
    assert len(compare(read_rows(folders)).rankings[0].ranked) == 6


def test_two_results_of_one_cell_that_differ_are_told(tmp_path, make_row) -> None:
    folder = write_results(tmp_path / "a", [({"seed": 1}, make_row(fid=1.0)), ({"seed": 1}, make_row(fid=2.0))])
    with pytest.raises(ArtefactError, match="differ") as caught:
        read_rows([folder])
    assert "0-x.json" in str(caught.value) and "1-x.json" in str(caught.value)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_results_is_told(tmp_path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="no results here"):
        read_rows([tmp_path / name])
