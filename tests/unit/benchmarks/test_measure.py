"""The benchmarks' bookkeeping, and that the document shows what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks.measure import Case, Missing, measured  # noqa: E402
from benchmarks.reference import masked_sum, mse_search_by_channel  # noqa: E402
from benchmarks.table import filled, markdown  # noqa: E402
from quantlab.contracts.quant import Observer  # noqa: E402
from quantlab.quant.functional import fake_quantize, search_scale  # noqa: E402


def test_a_missing_peer_is_a_row() -> None:
    case = Case("S", "work", "a", {"a": lambda: None, "peer": Missing("not installed (peer)")})
    results = {"machine": {**dict.fromkeys(("processor", "vectors", "threads", "python", "torch"), "x"), "peers": {}}}
    text = markdown({**results, "cases": [measured(case, 1)]})
    assert "| work | peer | | | | | not installed (peer) |" in text
    assert filled("<!-- begin: t -->old<!-- end: t -->", "t", {**results, "cases": []}).count("old") == 0


def test_the_loop_over_channels_is_the_same_search() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    expected = mse_search_by_channel(weight, 3)
    found = search_scale(weight, torch.full((6,), 3), Observer.MSE)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_the_masked_sum_is_the_fused_pass() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    bits = torch.tensor([3, 4, 5, 3, 4, 5]).view(-1, 1)
    scale, zero_point = torch.full((6, 1), 0.2), torch.full((6, 1), 4.0)
    fused = fake_quantize(weight, scale, zero_point, 2.0**bits - 1)
    torch.testing.assert_close(masked_sum(weight, scale, zero_point, bits), fused, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("file", sorted((ROOT / "docs/results/performance").glob("*.json")), ids=lambda file: file.stem)
def test_the_document_shows_the_committed_figures(file: Path) -> None:
    document = (ROOT / "docs/performance.md").read_text()
    assert filled(document, file.stem, json.loads(file.read_text())) == document
