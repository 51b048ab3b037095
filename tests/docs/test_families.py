"""What the site adds to a family's page: its own rows of every bench beside full precision's, and nothing else's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantlab.plugins import load_registry

SUMMARY = """# bench/toy

| model | method         | setting | fid | accuracy |
|-------|----------------|---------|-----|----------|
| a     | full precision |         | 2   | 1        |
| b     | full precision |         | 3   | 1        |
| a     | gptq           |         | 4   | 1        |
| b     | hawq           |         | 5   | 1        |
"""


@pytest.fixture(scope="module")
def families() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "site" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


def page(families: ModuleType, family: str, results: Path) -> str:
    return families.appendix(load_registry(), family, results, lambda entry: f"### {entry.name} ({entry.kind})")


def test_a_family_has_its_rows_and_full_precision_of_their_models(families: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "summary.md").write_text(SUMMARY)
    text = page(families, "ptq", tmp_path)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| model | method | fid |",
        "| --- | --- | --- |",
        "| a | full precision | 2 |",
        "| a | gptq | 4 |",
    ]
    assert "### gptq (tuner)" in text and "hawq" not in text


def test_a_family_without_a_row_says_so(families: ModuleType, tmp_path: Path) -> None:
    assert "No committed bench has a row yet." in page(families, "lsq", tmp_path)


def test_a_package_without_methods_has_no_rows(families: ModuleType, tmp_path: Path) -> None:
    assert "Rows in the benches" not in page(families, "builtin", tmp_path)
