"""Scale search and fake quantization against independent computations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.contracts.quant import Observer
from quantlab.errors import NonFiniteError
from quantlab.quant.functional import fake_quantize, per_channel, percentile_range, search_scale, smoothing_scale

MIXED = torch.tensor([1, 2, 3, 2, 1])


def rows(seed: int, count: int = 5, length: int = 33, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scalar_mse_search(row: list[float], bits: int) -> tuple[float, float]:
    """One channel, one candidate at a time, in float64."""
    low, high, best = min(row), max(row), (float("inf"), 0.0, 0.0)
    for index in range(80):
        factor = 1 - 0.01 * index
        scale = (high - low) * factor / (2**bits - 1)
        zero_point = round(-low * factor / scale)
        error = 0.0
        for x in row:
            code = min(max(round(x / scale) + zero_point, 0), 2**bits - 1)
            error += abs(x - (code - zero_point) * scale) ** 2.4
        if error < best[0]:
            best = (error, scale, zero_point)
    return best[1], best[2]


def test_mse_search_of_all_channels_is_the_search_of_each() -> None:
    x = rows(0)
    scale, zero_point = search_scale(x, MIXED, Observer.MSE)
    for index, row in enumerate(x.double().tolist()):
        expected = scalar_mse_search(row, int(MIXED[index]))
        assert scale[index].item() == pytest.approx(expected[0], rel=1e-5)
        assert zero_point[index].item() == expected[1]


@pytest.mark.parametrize("observer", list(Observer))
@pytest.mark.parametrize("value", [0.0, 1.5, -2.25, 1e-30, -1e30])
def test_constant_rows_are_finite(observer: Observer, value: float) -> None:
    x = torch.full((1, 7), value)
    scale, zero_point = search_scale(x, torch.tensor([2]), observer)
    y = fake_quantize(x, per_channel(scale, 2), per_channel(zero_point, 2), 3)
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(y).all()
    if observer is Observer.MSE:
        assert torch.equal(y, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        search_scale(torch.tensor([[1.0, bad]]), torch.tensor([4]), Observer.MSE)


def test_long_rows_are_thinned_but_keep_their_range() -> None:
    x = rows(2, 1, 5000)
    x[0, 1] = 40.0
    scale, _ = search_scale(x, torch.tensor([8]), Observer.MIN_MAX, max_elements=100)
    assert scale.item() == pytest.approx((40.0 - x.min().item()) / 255)


def test_percentiles_are_of_the_nearest_rank() -> None:
    x = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(6))]
    both = torch.stack([x, -2 * x])
    low, high = percentile_range(both, 99.9)  # the 999th smallest and the 999th largest
    assert (low.tolist(), high.tolist()) == ([1.0, -1996.0], [998.0, -2.0])
    low, high = percentile_range(both, 60)
    assert (low.tolist(), high.tolist()) == ([400.0, -1198.0], [599.0, -800.0])


def test_the_percentile_range_holds_zero_and_spans_the_codes() -> None:
    x = torch.arange(1.0, 101.0).view(1, -1)
    scale, zero_point = search_scale(x, torch.tensor([2]), Observer.PERCENTILE, percentile=90)
    assert (scale.item(), zero_point.item()) == (30.0, 0.0)
    y = fake_quantize(x, scale, zero_point, 3)
    assert y.max() == 90.0 and torch.equal(torch.unique(y), torch.tensor([0.0, 30.0, 60.0, 90.0]))


@given(st.integers(0, 10_000), st.sampled_from([99.0, 99.9, 100.0]), st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_percentiles_of_short_rows_are_the_extremes(seed: int, percentile: float, length: int) -> None:
    x = rows(seed, 3, length)
    found = search_scale(x, torch.full((3,), 4), Observer.PERCENTILE, percentile=percentile)
    expected = search_scale(x, torch.full((3,), 4), Observer.MIN_MAX)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_mixed_widths_in_one_call_are_three_masked_passes() -> None:
    weight = rows(3, 5, 40).view(5, 10, 2, 2)
    scale, zero_point = search_scale(weight.flatten(1), MIXED, Observer.MSE)
    shaped = [per_channel(value, 4) for value in (scale, zero_point)]
    fused = fake_quantize(weight, shaped[0], shaped[1], per_channel(2**MIXED - 1, 4))
    total = torch.zeros_like(weight)
    for width in (1, 2, 3):
        part = fake_quantize(weight, shaped[0], shaped[1], 2**width - 1)
        total += part * per_channel(MIXED.eq(width), 4)
    assert torch.equal(fused, total)


def test_backward_keeps_one_copy_at_most() -> None:
    x = rows(4, 64, 64).requires_grad_()
    scale, zero_point = torch.ones(64, 1, requires_grad=True), torch.zeros(64, 1, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_quantize(x, scale, zero_point, torch.full((64, 1), 3))
    assert sum(saved) <= x.numel() * 4 + 3 * 64 * 4


def reference_gradients(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, g: Tensor) -> tuple[Tensor, ...]:
    """The formulas of learned step sizes, in float64."""
    code = torch.round(x / scale) + zero_point
    inside = (code >= 0) & (code <= levels)
    centred = code.clamp(0, levels) - zero_point
    for_scale = g * torch.where(inside, centred - x / scale, centred)
    for_zero = g * torch.where(inside, torch.zeros_like(x), -scale.expand_as(x))
    return g * inside, for_scale.sum(1, keepdim=True), for_zero.sum(1, keepdim=True)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gradients_against_float64(bits: int) -> None:
    x, g = rows(5, dtype=torch.float64), rows(6, dtype=torch.float64)
    scale, zero_point = rows(7, 5, 1, torch.float64).abs() + 0.05, rows(8, 5, 1, torch.float64) + 2
    leaves = [value.clone().requires_grad_() for value in (x, scale, zero_point)]
    fake_quantize(leaves[0], leaves[1], leaves[2], 2**bits - 1).backward(g)
    for leaf, expected in zip(leaves, reference_gradients(x, scale, zero_point, 2**bits - 1, g), strict=True):
        torch.testing.assert_close(leaf.grad, expected)


def test_border_codes_keep_their_gradient() -> None:
    x = torch.tensor([0.0, 3.0, 3.4, 4.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), 3).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 0]


def test_rounded_zero_point_passes_its_gradient_on() -> None:
    x, scale = torch.tensor([-9.0, 0.2, 9.0]), torch.tensor(1.0)
    free = torch.tensor(1.3, requires_grad=True)
    y = fake_quantize(x, scale, free, 3, round_zero_point=True)
    assert torch.equal(y, fake_quantize(x, scale, torch.tensor(1.0), 3))
    y.sum().backward()
    assert free.grad is not None and free.grad.item() == -2.0  # two of three values are clipped


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from(list(Observer)))
def test_quantizing_twice_changes_nothing(seed: int, bits: int, observer: Observer) -> None:
    x = rows(seed, 3, 17)
    scale, zero_point = (per_channel(v, 2) for v in search_scale(x, torch.full((3,), bits), observer))
    once = fake_quantize(x, scale, zero_point, 2**bits - 1)
    torch.testing.assert_close(fake_quantize(once, scale, zero_point, 2**bits - 1), once, rtol=1e-6, atol=0)
    assert len(torch.unique(once[0])) <= 2**bits


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_min_max_error_is_at_most_half_a_step(seed: int, bits: int) -> None:
    x = rows(seed, 3, 17)
    scale, zero_point = (per_channel(v, 2) for v in search_scale(x, torch.full((3,), bits), Observer.MIN_MAX))
    error = (fake_quantize(x, scale, zero_point, 2**bits - 1) - x).abs()
    # Rounding the zero point shifts the grid by up to half a step at the far end.
    assert (error <= scale * (1 + 1e-5)).all()
    assert (error.mean(1, keepdim=True) <= scale * 0.51).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = rows(9).to(dtype).requires_grad_()
    y = fake_quantize(x, torch.tensor(0.25), torch.tensor(8.0), 15)
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype


def test_compiled_gives_the_same() -> None:
    x, scale, zero_point = rows(10), torch.full((5, 1), 0.3), torch.full((5, 1), 2.0)
    levels = per_channel(2**MIXED - 1, 2)
    compiled = torch.compile(fake_quantize, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, scale, zero_point, levels), fake_quantize(x, scale, zero_point, levels))


def test_smoothing_scale_in_closed_form() -> None:
    weight, inputs = torch.tensor([1.0, 4.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 3.0, 0.0])
    assert smoothing_scale(weight, inputs, 0.5).tolist() == [2.0, 0.5, 1.0, 1.0]
    assert smoothing_scale(weight, inputs, 1.0).tolist() == [4.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_the_precision_of_the_scale(dtype: torch.dtype) -> None:
    x, g = rows(11).to(dtype), rows(12).to(dtype)
    found = []
    for shape in ((), (1, 1)):
        leaves = [x.clone().requires_grad_(), *(torch.full(shape, v).requires_grad_() for v in (0.0371, 7.0))]
        y = fake_quantize(*leaves, 15)
        y.backward(g)
        found.append((y, *(leaf.grad.flatten() for leaf in leaves)))
    exact = fake_quantize(x.float(), torch.tensor(0.0371), torch.tensor(7.0), 15).to(dtype)
    assert torch.equal(found[0][0], exact)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_codes_on_the_borders_keep_their_gradient() -> None:
    # Codes -1, 0 (rounded up from outside), 3 (rounded down from outside) and 4 at two bits.
    x = torch.tensor([[-1.0, -0.4, 3.4, 4.0]], requires_grad=True)
    scale, zero_point = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    fake_quantize(x, scale, zero_point, 3).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    # q - z outside; q - z - x / s inside.
    assert scale.grad.item() == pytest.approx(0 + 0.4 - 0.4 + 3)
    assert zero_point.grad.item() == -2.0


def literal_gradients(x: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The formulas with every product written out; their layout in memory decides the order of the sums."""
    ratio = x / scale
    codes = torch.round(ratio).add_(zero_point)
    inside = (codes >= 0) & (codes <= levels)
    centred = codes.clamp_(torch.zeros_like(levels), levels).sub_(zero_point)
    for_scale = (g * (centred - ratio * inside)).sum_to_size(scale.shape)
    return g * inside, for_scale, (g * ~inside * -scale).sum_to_size(zero_point.shape)


@pytest.mark.parametrize("last", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), ()])
def test_gradients_are_the_literal_ones_to_the_last_bit_in_any_layout(last: tuple[bool, bool], shape: tuple) -> None:
    rng = torch.Generator().manual_seed(13)
    x, g = (
        torch.randn(8, 16, 9, 9, generator=rng).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        for channels_last in last
    )
    scale, zero_point = torch.rand(shape, generator=rng) * 0.2 + 0.1, torch.rand(shape, generator=rng) * 8
    levels = torch.full(shape, 15.0)
    leaves = [value.clone().requires_grad_() for value in (x, scale, zero_point)]
    fake_quantize(leaves[0], leaves[1], leaves[2], levels).backward(g)
    for leaf, expected in zip(leaves, literal_gradients(x, scale, zero_point, levels, g), strict=True):
        assert torch.equal(leaf.grad, expected)
