"""What the page of a run says about the execution of its packed models."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.errors import ArtefactError
from quantlab.report.execution import Execution, Latency, SiteKernel, read_executions, write_execution
from quantlab.report.html import RunReport, save_run_html

EVIL = '<script>alert("1")</script>'

MEASURED = Execution(
    "mse",
    (SiteKernel(f"blocks.0{EVIL}", "onednn int8", ""), SiteKernel("attend", "simulated", f"no kernel {EVIL}")),
    Latency(0.08, 0.04, 2.0, 8, 1, 7),
    loaded_bytes=300,
    float_bytes=1000,
)


def test_a_record_comes_back_and_what_is_missing_is_said(tmp_path: Path) -> None:
    for method in ("mse", "packed"):
        (tmp_path / method / "pack").mkdir(parents=True)
    (tmp_path / "unpacked").mkdir()
    write_execution(tmp_path, MEASURED)
    found, never = read_executions(tmp_path, ["unpacked", "mse", "packed"])
    assert found == MEASURED and never == Execution("packed")
    assert set(never.lines.values()) == {"not measured"}
    assert found.lines == {
        "kernels": "1 sites onednn int8, 1 sites simulated",
        "latency": "2.00 times as fast as float: 40.0 ms against 80.0 ms, batch 8, 1 thread, median of 7 turns",
        "held in memory": "300 bytes, 30.0% of float",
        "peak memory": "not measured",
    }


def test_the_page_shows_it_escaped(tmp_path: Path, make_row) -> None:
    def page() -> str:
        report = RunReport("a run", [make_row("mse")], tmp_path, 0, "", [], "method: mse", {}, "{}")
        save_run_html(report, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    assert "Execution of the packed models" not in page()
    (tmp_path / "mse" / "pack").mkdir(parents=True)
    assert page().count('<td class="text wrap">not measured</td>') == 4
    assert "quantlab execute RUN --method METHOD" in page()
    write_execution(tmp_path, MEASURED)
    text = page()
    assert "2.00 times as fast as float" in text and "no kernel &lt;script&gt;" in text and "<script" not in text
    assert "quantlab execute RUN" not in text and text.count("not measured</td>") == 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "mse").mkdir()
    write_execution(tmp_path, MEASURED)
    file = tmp_path / "mse" / "execution.json"
    file.write_text(file.read_text().replace('"speedup"', '"speed"'))
    with pytest.raises(ArtefactError, match=r"execution.json: the record of an execution cannot be read"):
        read_executions(tmp_path, ["mse"])
