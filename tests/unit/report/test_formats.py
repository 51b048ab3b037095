"""Tables as people and programs read them."""

from __future__ import annotations

import csv
import io
import json

import pytest

from quantlab.report.formats import Table, TableFormat, latex_escape

TABLE = Table(
    [["method", "100 % & more"], ["a_b", "1 ± 2"]],
    [{"method": 'a,"b"\nc', "metrics": {"fid": {"mean": 1.5, "low": float("nan")}}, "seeds": [1, 2]}, {"x": None}],
    ["failed: a\n  b"],
)


def test_markdown() -> None:
    assert TABLE.render(TableFormat.MARKDOWN).splitlines()[0] == "| method | 100 % & more |"
    assert TABLE.render(TableFormat.MARKDOWN).endswith("\n\nfailed: a\n  b")


def test_latex_is_escaped_and_its_notes_are_comments() -> None:
    assert TABLE.render(TableFormat.LATEX).splitlines() == [
        r"\begin{tabular}{ll}",
        r"method & 100 \% \& more \\",
        r"\hline",
        r"a\_b & 1 $\pm$ 2 \\",
        r"\end{tabular}",
        "% failed: a",
        "%   b",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("&%$#_{}", r"\&\%\$\#\_\{\}"),
        ("a\\b", r"a\textbackslash{}b"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("x\ny", "x y"),
        ("FID 2.5 [1, 3]", "FID 2.5 [1, 3]"),
    ],
)
def test_latex_escape(text: str, escaped: str) -> None:
    assert latex_escape(text) == escaped


def test_csv_is_read_back() -> None:
    first, second = csv.DictReader(io.StringIO(TABLE.render(TableFormat.CSV)))
    expected = {"method": 'a,"b"\nc', "metrics.fid.mean": "1.5", "metrics.fid.low": "", "seeds": "1 2", "x": ""}
    assert first == expected and set(second.values()) == {""}


def test_json_is_read_back_without_nan() -> None:
    first, _ = json.loads(TABLE.render(TableFormat.JSON))
    assert first["metrics"]["fid"] == {"mean": 1.5, "low": None} and first["seeds"] == [1, 2]


def test_suffixes() -> None:
    assert [wanted.suffix for wanted in TableFormat] == [".md", ".csv", ".json", ".tex"]
