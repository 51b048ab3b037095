"""Budgets of one method and their Pareto front."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.bench import Sweep, budgets_from, seeds_from, sweep, worker
from quantlab.bench.sweep import pareto_front
from quantlab.errors import RecipeError
from quantlab.plugins import load_registry
from quantlab.report.console import make_console
from quantlab.report.formats import TableFormat
from quantlab.report.rows import Row

FID = {2: 9.0, 3: 4.0, 4: 4.5, 8: 3.0}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs take no time; quality does not improve from 3 to 4 bits."""
    done: list[int] = []

    def run(loaded, options) -> SimpleNamespace:
        bits, seed = loaded.recipe.budget.weight_bits, loaded.recipe.seed
        assert loaded.recipe.method == "mse" and loaded.recipe.baselines == ()
        done.append(bits)
        metrics = {"fid-to-teacher": FID[bits] + seed / 10, "psnr": 30.0 + bits}
        row = Row("mse", "digits", bits, 4, 1000 * bits, 32000, 1.0, metrics, 1.0, "p", seed, True, True, "a")
        return SimpleNamespace(folder=None, rows=(row,))

    monkeypatch.setattr(worker, "run", run)
    return done


def go(tmp_path: Path, by: str = "fid-to-teacher", budgets: dict | None = None):
    varied = {"weight_bits": [2, 3, 4, 8]} if budgets is None else budgets
    wanted = Sweep("digits/mpq-dm-w2a4", varied, [1, 2], ["method=mse"], "smoke", by, tmp_path / "results")
    return sweep(wanted, load_registry(), tmp_path / "runs", make_console(quiet=True))


def test_a_budget_that_another_one_beats_is_off_the_front(tmp_path, ran) -> None:
    result = go(tmp_path)
    assert sorted(ran) == [2, 2, 3, 3, 4, 4, 8, 8] and list(result.on_front) == [True, True, False, True]
    picture = result.write()
    points = json.loads((picture.parent / "pareto.json").read_text())["points"]
    assert [(point["size_bytes"], point["on_front"]) for point in points] == [
        (2000, True),
        (3000, True),
        (4000, False),
        (8000, True),
    ]
    assert "<svg" in picture.read_text() and "4.15 ± " in result.table(TableFormat.MARKDOWN)


def test_where_more_is_better_the_front_turns(tmp_path, ran) -> None:
    assert all(go(tmp_path, "psnr").on_front)


def test_a_second_sweep_computes_nothing(tmp_path, ran) -> None:
    go(tmp_path, budgets={"weight_bits": [2, 3]})
    go(tmp_path, budgets={"weight_bits": [2, 3, 4]})
    assert ran == [2, 3, 2, 3, 4, 4]


def test_a_sweep_varies_something(tmp_path, ran) -> None:
    with pytest.raises(RecipeError, match="varies a budget"):
        go(tmp_path, budgets={})


@pytest.mark.parametrize(("by", "told"), [("is", "not ranked by is"), ("psnrr", 'did you mean "psnr"')])
def test_what_says_nothing_about_quality_is_told_before_anything_runs(tmp_path, ran, by: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        go(tmp_path, by)
    assert ran == []


def test_failed_budgets_are_told_and_leave_the_others(tmp_path, ran, monkeypatch) -> None:
    monkeypatch.setitem(FID, 2, None)  # None + seed / 10 is a TypeError inside the run
    result = go(tmp_path)
    assert len(result.lines) == 3 and len(result.bench.failures) == 2
    assert "failed: seed=1, budget.weight_bits=2" in result.table(TableFormat.MARKDOWN)
    for bits in FID:
        monkeypatch.setitem(FID, bits, None)
    assert go(tmp_path / "none").lines == [] and "<svg" in go(tmp_path / "none").write().read_text()


def test_budgets_and_seeds_are_read() -> None:
    texts = ["weight_bits=2,3,4", "activation_bits=", "extra_bit_fraction=0.1"]
    assert budgets_from(texts) == {"weight_bits": [2, 3, 4], "extra_bit_fraction": [0.1]}
    assert seeds_from("1,2") == [1, 2]
    with pytest.raises(RecipeError, match="whole numbers"):
        seeds_from("1,x")


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_the_front_dominates_all_others_and_none_of_its_own(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    kept = [point for point, on in zip(points, front, strict=True) if on]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    assert kept and not any(beats(one, other) for one in kept for other in kept)
    assert all(any(beats(one, point) for one in kept) for point, on in zip(points, front, strict=True) if not on)
