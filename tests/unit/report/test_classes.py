"""Rows of a classifier: ranked by top-1, more being better, in every kind of table."""

from __future__ import annotations

from quantlab.report.compare import Better, compare, direction
from quantlab.report.leaderboard import leaderboards
from quantlab.report.rows import FULL_PRECISION
from quantlab.report.summary import summarize
from quantlab.report.tables import markdown


def rows(make_row):
    def one(method: str, top: float, seed: int = 1):
        return make_row(
            method, seed=seed, metrics={"top-1": top, "kl-to-float": 1 - top}, intervals={"top-1": (0.5, 1)}
        )

    return [one(FULL_PRECISION, 0.9), one("worse", 0.6), one("better", 0.8)]


def test_the_best_is_the_one_that_is_right_most_often(make_row) -> None:
    (board,) = leaderboards([({}, row) for row in rows(make_row)])
    assert board.ranked_by == "top-1" and [place.row.method for place in board.ranked] == ["better", "worse"]


def test_images_are_still_ranked_by_fid_to_teacher(make_row) -> None:
    (board,) = leaderboards([({}, make_row("a", fid=3.0)), ({}, make_row("b", fid=2.0)), ({}, make_row("c", fid=None))])
    assert board.ranked_by == "fid-to-teacher" and [place.row.method for place in board.ranked] == ["b", "a", "c"]


def test_compare_and_summary_know_the_direction_and_the_columns(make_row) -> None:
    values = [({"seed": 1, "method": row.method}, row) for row in rows(make_row)]
    assert direction("top-1") is Better.HIGHER and direction("kl-to-float") is Better.LOWER
    for metric in ("top-1", "kl-to-float"):
        (ranking,) = compare(values, by=metric).rankings
        assert [line.rows[0].method for line in ranking.ranked] == ["better", "worse"]
    head = summarize(values, "worse").cells()[0]
    assert "top-1" in head and "top-1 minus worse" in head and "fid" not in head


def test_a_table_has_the_columns_that_were_measured(make_row) -> None:
    text = markdown(rows(make_row))
    assert "0.800 [0.500, 1.000]" in text and "KL to float" in text and "FID" not in text and "PSNR" not in text
