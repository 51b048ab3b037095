"""Lines of a bench: differences to a baseline, noise, failed cells."""

from __future__ import annotations

import json

import pytest

from quantlab.evaluation.interval import paired_difference
from quantlab.report.records import summary_records
from quantlab.report.rows import FULL_PRECISION, row_from_json, row_to_json
from quantlab.report.summary import FailedCell, summarize
from quantlab.store import json_text

BETTER, WORSE = {1: 2.0, 2: 2.4, 3: 2.1}, {1: 5.0, 2: 5.6, 3: 5.2}


@pytest.fixture
def rows(make_row):
    """Two methods with three seeds, and full precision in every cell."""
    found = []
    for method, values in (("mse", WORSE), ("mpq-dm", BETTER)):
        for seed, fid in values.items():
            cell = {"seed": seed, "budget": {"weight_bits": 2}, "method": method}
            found += [(cell, make_row(FULL_PRECISION, 1.0, 0, allocation="", other_noise={"fid-to-teacher": 1.2}))]
            found += [(cell, make_row(method, fid, seed))]
    return found


def line_of(summary, method: str):
    return next(line for line in summary.lines if line.rows[0].method == method)


def test_differences_are_paired_over_seeds(rows) -> None:
    summary = summarize(rows, "mse")
    found = line_of(summary, "mpq-dm").differences["fid-to-teacher"]
    assert found == paired_difference(BETTER, WORSE) and found.excludes_zero and found.count == 3
    assert line_of(summary, "mse").differences == {} == line_of(summary, FULL_PRECISION).differences
    assert "fid-to-teacher minus mse" in summary.cells()[0]
    assert line_of(summarize(rows), "mpq-dm").differences == {}, "no baseline was named"


def test_seeds_for_the_gap_by_the_formula(rows) -> None:
    # Variances 0.0433 and 0.0933: pooled 0.06833; gap 5.26667 - 2.16667 = 3.1; 15.7 * 0.06833 / 9.61 = 0.11.
    assert line_of(summarize(rows, "mse"), "mpq-dm").seeds_needed == 2
    near = [(v, r) if r.method != "mpq-dm" else (v, row_moved(r, 3.0)) for v, r in rows]
    # gap 0.1: 15.7 * 0.06833 / 0.01 = 107.3
    assert line_of(summarize(near, "mse"), "mpq-dm").seeds_needed == 108


def row_moved(row, by: float):
    content = dict(row_to_json(row))
    content["metrics"] = {**row.metrics, "fid-to-teacher": row.metrics["fid-to-teacher"] + by}
    return row_from_json(content)


def test_a_method_with_settings_of_its_own_is_compared_with_the_baseline_that_shares_most(rows, make_row) -> None:
    tuned = [
        ({"seed": 1, "budget": {"weight_bits": 2}, "method": "edm", "tune.iterations": 9}, make_row("edm", 4.0, 1))
    ]
    other = [({"seed": 1, "budget": {"weight_bits": 4}, "method": "mse"}, make_row("mse", 0.5, 1, weight_bits=4.0))]
    summary = summarize([*rows, *tuned, *other], "mse")
    assert line_of(summary, "edm").differences["fid-to-teacher"].mean == pytest.approx(4.0 - 5.0)


def test_a_baseline_beside_several_methods_counts_once(make_row) -> None:
    rows = [({"seed": 1, "method": method}, make_row("mse")) for method in ("mpq-dm", "efficientdm")]
    (line,) = summarize(rows).lines
    assert len(line.rows) == 1


def test_full_precision_with_other_noise_stands_below_full_precision(rows) -> None:
    summary = summarize(rows)
    assert [line[1] for line in summary.cells()[1:3]] == [FULL_PRECISION, f"{FULL_PRECISION}, other noise"]
    assert len(summary.noise) == 1 and summary.noise[0].metrics["fid-to-teacher"].mean == 1.2


def test_one_seed_shows_its_bootstrap_interval_and_several_the_t_interval(make_row) -> None:
    changes = {"intervals": {"fid-to-teacher": (2.5, 3.75)}}
    one = [({"seed": 1}, make_row(fid=3.0, **changes))]
    two = [*one, ({"seed": 2}, make_row(fid=5.0, seed=2, **changes))]
    assert "3 [2.5, 3.75]" in summarize(one).markdown()
    assert "4 ± 13" in summarize(two).markdown()
    assert row_from_json(json.loads(json_text(row_to_json(one[0][1])))) == one[0][1]


def test_a_failed_cell_is_a_row(rows) -> None:
    failed = FailedCell("seed=4, method=lsq", {"seed": 4, "method": "lsq"}, "digits", "lsq", "it broke")
    summary = summarize(rows, "mse", [failed])
    last = summary.cells()[-1]
    assert last[:5] == ["digits", "lsq", "-", "seed=4", "failed"] and len(last) == len(summary.cells()[0])
    assert summary_records(summary)[-1]["failed"] == "it broke"


def test_records_have_every_metric_and_the_allocations(rows) -> None:
    record = next(found for found in summary_records(summarize(rows, "mse")) if found["method"] == "mpq-dm")
    assert record["seeds"] == [1, 2, 3] and record["allocations"] == ["a", "a", "a"] and record["protocol"] == "p"
    assert set(record["metrics"]) == {"fid-to-teacher", "accuracy"}
    assert record["metrics"]["fid-to-teacher"]["of"] == "seeds"
