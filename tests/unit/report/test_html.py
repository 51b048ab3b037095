"""Pages of runs and benches: escaped, self-contained, small, and with what was measured in them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantlab.report.details import read_details
from quantlab.report.html import BenchCell, BenchReport, RunReport, StageLine, save_bench_html, save_run_html
from quantlab.report.images import image_rows
from quantlab.report.rows import FULL_PRECISION, Row

EVIL = '<script>alert("1")</script>'
LIMIT_BYTES = 5_000_000


def row(method: str, fid: float = 3.0, **changes: object) -> Row:
    fields: dict = {
        "method": method,
        "model": "digits",
        "weight_bits": 2.1,
        "activation_bits": 4,
        "size_bytes": 1000,
        "float_bytes": 8000,
        "coverage": 0.9,
        "metrics": {"fid-to-teacher": fid, "fid": fid + 1, "psnr": None},
        "seconds": 12.0,
        "protocol": "p",
        "seed": 1,
        "data_free": True,
        "simulated": True,
        "allocation": "a",
    }
    return Row(**{**fields, **changes})


def write_method(folder: Path, method: str, sites: int = 3, channels: int = 8, side: int = 8, colours: int = 1) -> None:
    """What the stages of a run leave in its folder."""
    rng = np.random.default_rng(len(method))
    names = [f"blocks.{index}.conv{EVIL if index == 0 else ''}" for index in range(sites)]
    bits = {name: rng.integers(1, 4, channels).tolist() for name in names}
    written = {
        "finalize/allocation.json": {"weight_bits": {**bits, "kept": [32] * 4, "attention": []}, "activation_bits": {}},
        "inspect/site_errors.json": {
            name: {"weight": 0.2, "output": None if name == names[0] else 0.1} for name in bits
        },
        "inspect/activation_scales.json": {
            name: {"timesteps": [900, 500, 1], "scales": [0.1, 0.2, 0.4]} for name in names
        },
        "tune-0-distill/history.json": {"total": [3.0, 2.0, 1.0], "relation": [float("nan"), 1.0, float("nan")]},
    }
    for file, content in written.items():
        path = folder / method / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    images = rng.uniform(-1, 1, (16, colours, side, side)).astype(np.float32)
    (folder / method / "evaluate").mkdir(parents=True, exist_ok=True)
    save_file({"images": images}, folder / method / "evaluate" / "images.safetensors")


def run_report(folder: Path, rows: list[Row], **changes: object) -> RunReport:
    parts: dict = {
        "title": "a run",
        "rows": rows,
        "folder": folder,
        "grid": 16,
        "coverage": "all of it",
        "stages": [StageLine("capture", 1.0, "computed", "abc")],
        "recipe": "method: mse",
        "origins": {"method": "file.yaml:3"},
        "environment": "{}",
    }
    return RunReport(**{**parts, **changes})


def test_a_run_tells_what_it_was_calibrated_on(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    save_run_html(run_report(tmp_path, [row("mse")]), page)
    assert "Calibration set" not in page.read_text()
    save_run_html(run_report(tmp_path, [row("mse")], calibration=f'{{"digest": "0f1e {EVIL}"}}'), page)
    assert "Calibration set" in page.read_text() and "0f1e &lt;script&gt;" in page.read_text()


class Page(HTMLParser):
    """Tags in order, their attributes, and whether every tag is closed in its turn."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert "@import" not in text and not re.search(r"url\(\s*['\"]?https?:", text)
    assert len(text.encode()) < LIMIT_BYTES
    return page


def test_everything_from_a_recipe_or_a_plugin_is_escaped(tmp_path) -> None:
    evil_method = "<img src=x onerror=alert(1)>"
    write_method(tmp_path, "plain")
    write_method(tmp_path, FULL_PRECISION)
    report = run_report(
        tmp_path,
        [row(FULL_PRECISION, 1.0), row("plain"), row(evil_method, model=EVIL, protocol=EVIL, metrics={EVIL: 1.0})],
        title=EVIL,
        coverage=EVIL,
        stages=[StageLine(EVIL, 1.0, EVIL, EVIL)],
        recipe=f"</pre>{EVIL}",
        origins={EVIL: EVIL},
        environment=EVIL,
    )
    save_run_html(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    check_self_contained(text)
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    cell = BenchCell(EVIL, {EVIL: EVIL, "seed": 1}, [row(evil_method)], None)
    save_bench_html(BenchReport(EVIL, [cell], {EVIL: EVIL}, EVIL, EVIL), tmp_path / "bench.html")
    text = (tmp_path / "bench.html").read_text()
    check_self_contained(text)
    assert "<script" not in text and "<img src=x" not in text


def test_a_run_shows_bits_errors_scales_curves_and_samples(tmp_path) -> None:
    for arm in ("float", "mse", "mpq-dm"):
        write_method(tmp_path, arm)
    save_run_html(
        run_report(tmp_path, [row(FULL_PRECISION, 1.0), row("mpq-dm", 2.0), row("mse", 3.0)]), tmp_path / "report.html"
    )
    text = (tmp_path / "report.html").read_text()
    page = check_self_contained(text)
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert ids >= {"result", "samples", "bits", "errors", "scales", "tuning", "provenance"}
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert targets <= ids
    assert page.tags.count("img") == 1 + 2 * 2
    assert "blocks.1.conv" in text and "kept" not in text
    assert text.index('<td class="text">mpq-dm') < text.index('<td class="text">mse'), "best first"
    assert 'class="b2"' in text and "distill: total" in text and "@media (prefers-color-scheme: dark)" in text


def test_a_run_of_an_earlier_version_has_no_site_errors(tmp_path) -> None:
    save_run_html(run_report(tmp_path, [row(FULL_PRECISION), row("mse")]), tmp_path / "report.html")
    page = check_self_contained((tmp_path / "report.html").read_text())
    assert not {"bits", "errors", "scales"} & {value for _, name, value in page.attributes if name == "id"}


def test_protocols_are_never_in_one_table(tmp_path) -> None:
    cells = [
        BenchCell("a", {"method": "mse", "seed": seed}, [row(FULL_PRECISION, 1.0), row("mse", 2.0 + seed, seed=seed)])
        for seed in (1, 2)
    ]
    cells.append(BenchCell("b", {"method": "mse"}, [row("mse", 9.0, protocol="q", model="other")]))
    save_bench_html(BenchReport("bench", cells, {"c": "it broke"}, "version: 1"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    check_self_contained(text)
    tables = re.findall(r"<tbody>.*?</tbody>", text, re.DOTALL)
    assert len(tables) == 2
    assert tables[0].count("<tr") == 2 and "3.50 ± 6.35" in tables[0], "one row for two seeds, full precision once"
    assert "9.00" in tables[1] and "it broke" in text


@pytest.mark.parametrize(("sites", "channels", "side", "colours"), [(60, 1024, 32, 3), (300, 640, 96, 3)])
def test_pages_of_large_models_stay_small(tmp_path, sites: int, channels: int, side: int, colours: int) -> None:
    methods = ["a", "bb", "ccc", "dddd"]
    for arm in ("float", *methods):
        write_method(tmp_path, arm, sites, channels, side, colours)
    save_run_html(run_report(tmp_path, [row(method) for method in methods]), tmp_path / "report.html")
    check_self_contained((tmp_path / "report.html").read_text())


def test_a_bench_shows_the_best_of_each_protocol_site_by_site(tmp_path) -> None:
    cells = []
    for index in range(30):
        folder = tmp_path / str(index)
        for arm in ("float", f"m{index}"):
            write_method(folder, arm, 40, 200)
        cells.append(BenchCell(f"m{index}", {"method": f"m{index}"}, [row(f"m{index}", 50.0 - index)], folder))
    save_bench_html(BenchReport("bench", cells, {}, "version: 1"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    check_self_contained(text)
    assert "m29 W2.1A4 (digits)" in text and "m3 W2.1A4 (digits)" not in text and "18 more results" in text


def test_differences_are_amplified_and_black_where_there_is_none(tmp_path) -> None:
    import base64
    import io

    from PIL import Image

    exact = np.full((2, 1, 4, 4), -0.5, np.float32)
    other = exact.copy()
    other[1] += 0.25
    for arm, images in (("float", exact), ("mse", other)):
        (tmp_path / arm / "evaluate").mkdir(parents=True)
        save_file({"images": images}, tmp_path / arm / "evaluate" / "images.safetensors")
    rows = image_rows(tmp_path, ["mse", "not there"], 16)
    assert [each.title for each in rows] == [FULL_PRECISION, "mse", "mse: difference"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(rows[2].png))))
    assert picture.shape == (4, 9, 4) and (picture[:, 4, 3] == 0).all(), "a transparent gap"
    assert (picture[:, :4, 0] == 0).all() and (picture[:, 5:, 0] == round(0.25 * 2 * 127.5)).all()


def test_details_leave_out_what_stays_float(tmp_path) -> None:
    write_method(tmp_path, "mse")
    found = read_details(tmp_path, "mse")
    assert len(found.weight_bits) == 3 and "kept" not in found.weight_bits
    assert list(found.histories) == ["distill: total", "distill: relation"]


def test_the_report_needs_no_torch(tmp_path) -> None:
    write_method(tmp_path, "float")
    write_method(tmp_path, "mse")
    code = f"""
import sys
from pathlib import Path
from quantlab.report.details import read_details
from quantlab.report.html import BenchCell, BenchReport, save_bench_html
from quantlab.report.images import image_rows
read_details(Path({str(tmp_path)!r}), "mse")
assert image_rows(Path({str(tmp_path)!r}), ["mse"], 4)
save_bench_html(BenchReport("t", [], {{}}, ""), Path({str(tmp_path / "r.html")!r}))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
