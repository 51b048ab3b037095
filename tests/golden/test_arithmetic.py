"""Groups A and D: scales, codes and gradients."""

from __future__ import annotations

import pytest
import torch
from golden import Case, assert_close, cases

from quantlab.contracts.quant import Observer
from quantlab.quant.functional import fake_quantize, per_channel, search_scale

OBSERVERS = {"max": Observer.MIN_MAX, "max_scale": Observer.SCALED_MIN_MAX, "mse": Observer.MSE}


def test_every_case_is_there() -> None:
    counts = {group: len(cases(group)) for group in "ABCDEFG"}
    assert counts == {"A": 64, "B": 12, "C": 14, "D": 13, "E": 16, "F": 12, "G": 8}
    assert sum(counts.values()) == 139


@pytest.mark.parametrize("case", cases("A"), ids=lambda case: case.id)
def test_scale_search(case: Case) -> None:
    x, bits = case["x"], case.params["n_bits"]
    weight = case.params["kind"] == "weight"
    rows = x.flatten(1) if weight else x.reshape(1, -1)
    kept = case["row_mask"].flatten() if "row_mask" in case else torch.ones(len(rows), dtype=torch.bool)
    scale, zero_point = search_scale(rows, torch.full((len(rows),), bits), OBSERVERS[case.params["scale_method"]])
    assert_close(scale[kept], case["delta"].flatten()[kept], rtol=1e-6, what="scale")
    assert_close(zero_point[kept], case["zero_point"].flatten()[kept], rtol=1e-6, what="zero point")

    shaped = [per_channel(value, rows.dim()) for value in (scale, zero_point)]
    y = fake_quantize(rows, shaped[0], shaped[1], 2**bits - 1)
    assert_close(y[kept], case["y"].reshape(rows.shape)[kept], rtol=2e-6, what="y")
    codes = torch.round(y / shaped[0] + shaped[1])
    assert torch.equal(codes[kept], case["codes"].reshape(rows.shape)[kept])


@pytest.mark.parametrize("case", cases("D"), ids=lambda case: case.id)
def test_gradients(case: Case) -> None:
    x, scale, zero_point = (case[name].requires_grad_() for name in ("x", "delta", "zero_point"))
    upstream, levels = case["upstream"], 2 ** case.params["n_bits"]
    y = fake_quantize(x, scale, zero_point, levels - 1)
    y.backward(upstream)
    total = upstream.abs().sum().item()
    assert_close(y, case["y"], rtol=2e-6, what="y")
    assert_close(x.grad, case["grad_x"], rtol=2e-6, what="x")
    assert_close(scale.grad, case["grad_delta"], rtol=1e-5, atol=1e-6 * levels * total, what="scale")
    largest = scale.detach().abs().max().item()
    assert_close(zero_point.grad, case["grad_zero_point"], rtol=1e-5, atol=1e-6 * levels * largest * total, what="zp")
