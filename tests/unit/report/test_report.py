"""Rows, tables, grids and pages."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from quantlab.errors import ArtefactError
from quantlab.report.console import Console, Verbosity
from quantlab.report.grid import GAP, GridRow, save_grid
from quantlab.report.rows import FULL_PRECISION, Row, row_from_json, row_to_json
from quantlab.report.summary import summarize
from quantlab.report.tables import markdown


def row(method: str = "mse", fid: float | None = 3.0, seed: int = 1, **changes: object) -> Row:
    fields: dict = {
        "method": method,
        "model": "digits",
        "weight_bits": 2.1,
        "activation_bits": 4,
        "size_bytes": 1000,
        "float_bytes": 8000,
        "coverage": 0.9,
        "metrics": {"fid": fid, "psnr": None},
        "seconds": 12.0,
        "protocol": "p",
        "seed": seed,
        "data_free": True,
        "simulated": True,
        "allocation": "a",
    }
    return Row(**{**fields, **changes})


def test_a_row_survives_json() -> None:
    assert row_from_json(row_to_json(row())) == row()


@pytest.mark.parametrize("change", [{"schema_version": 99}, {"unknown": 1}])
def test_foreign_rows_are_refused(change: dict) -> None:
    with pytest.raises(ArtefactError):
        row_from_json({**row_to_json(row()), **change})


def test_the_table_shows_what_a_reader_wants() -> None:
    text = markdown([row(FULL_PRECISION, weight_bits=32), row()])
    assert "| 32/32 " in text and "| 2.1/4 " in text and "1,000 (8.0x)" in text and "3.00" in text


def test_summary_is_mean_and_interval_over_seeds() -> None:
    values = [({"seed": seed, "method": "mse"}, row(fid=fid, seed=seed)) for seed, fid in ((1, 2.0), (2, 4.0))]
    floats = [({"seed": seed, "method": "mse"}, row(FULL_PRECISION, fid=1.0)) for seed in (1, 2)]
    first, second = summarize([*values, *floats]).lines
    assert first.rows[0].method == FULL_PRECISION and len(first.rows) == 1
    assert second.metrics["fid"].mean == 3 and second.metrics["fid"].count == 2
    assert "3 ± 13" in summarize(values).markdown()


def test_the_grid_has_a_cell_for_every_image(tmp_path) -> None:
    images = np.zeros((5, 8, 8), np.uint8)
    images[0] = 255
    save_grid([GridRow("one", images), GridRow("two", images)], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape[0] == 2 * (8 * 6 + 4) + 4
    assert (pixels[30, 180] == 255).all() and (pixels[30, 240] == 0).all()
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_a_long_title_does_not_reach_into_the_images(tmp_path) -> None:
    black = np.zeros((1, 8, 8), np.uint8)
    save_grid([GridRow("a-method-with-a-very-long-name", black)], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    columns = np.flatnonzero((pixels[GAP : GAP + 48, :, 0] == 0).all(0))
    assert len(columns) == 48, "the image's own columns, untouched"
    assert (pixels[:, columns[0] - GAP : columns[0]] == 255).all(), "white before it"


def test_plain_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(Verbosity.NORMAL, live=False)
    with console.task("Work") as progress:
        progress(1, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Work: ")


def test_quiet_says_nothing_but_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(Verbosity.QUIET, live=False)
    with console.task("Work") as progress:
        progress(1, 2)
    console.info("hello")
    console.warn("look")
    assert capsys.readouterr().err == "warning: look\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_live_progress_shows_the_count_and_the_time_left(columns: int, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with Console(Verbosity.NORMAL, live=True).task("mpq-dm: assign bits and scales") as progress:
        progress(3, 10)
    shown = capsys.readouterr().err
    assert "10/10" in shown and "left 0:00:00" in shown, "a stage that ended is complete"
