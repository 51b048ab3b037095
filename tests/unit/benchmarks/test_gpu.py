"""The GPU benchmark: what it computes is right, and without a GPU it says that nothing is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks.gpu import BASELINE, NOT_MEASURED, Shape, main, measure  # noqa: E402
from benchmarks.roofline import Roofline  # noqa: E402
from quantlab.packing.backends.triton_product import missing_triton  # noqa: E402


def once(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    for run in arms.values():
        run()
    return dict.fromkeys(arms, 2.0)


@pytest.mark.parametrize("shape", [Shape(3, 40, 9), Shape(1, 3, 9, 4)], ids=str)
def test_arms_compute_the_layer(shape: Shape) -> None:
    found = measure(shape, 1, torch.device("cpu"), once, Roofline(1.0, 1.0))
    assert found["ratios"][BASELINE] == 1
    assert all(error <= 5e-7 for error in found["errors"].values())
    assert "cuda-int8" in found["errors"]
    if not missing_triton():
        assert "triton" in found["errors"] and found["ratios"]["triton, product"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_claimed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    result = main(1)
    assert set(result["shapes"].values()) == {NOT_MEASURED}
    assert capsys.readouterr().out.count(NOT_MEASURED) == len(result["shapes"])


def test_roofline_is_the_larger_of_both_bounds() -> None:
    roofline = Roofline(100.0, 10.0)
    assert roofline.seconds(200, 1) == 2 and roofline.seconds(200, 50) == 5
