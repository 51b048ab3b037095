"""The search with bounds against the search that judges every candidate in full, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.quant.mse import MSE_POWER, NUM_CANDIDATES, mse_search
from quantlab.zoo.models import DENOISERS, load_denoiser

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
both = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])


def literal_search(rows: Tensor, low: Tensor, high: Tensor, quant_max: Tensor) -> tuple[Tensor, Tensor]:
    """Every candidate of every row in full; the first of equals wins."""
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero_point = torch.ones_like(low), torch.zeros_like(low)
    levels = quant_max[:, None]
    for index in range(NUM_CANDIDATES):
        factor = torch.tensor(1.0 - 0.01 * index)
        scale = (high * factor - low * factor) / quant_max
        zero_point = torch.round(-(low * factor) / scale)
        column, offset = scale[:, None], zero_point[:, None]
        codes = torch.round(rows / column).add_(offset).clamp_(torch.zeros_like(levels), levels)
        error = codes.sub_(offset).mul_(column).sub_(rows).abs_().pow_(MSE_POWER).mean(1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    constant = high == low
    value = torch.where(low == 0, torch.ones_like(low), low)
    best_scale = torch.where(constant, value.abs(), best_scale)
    return best_scale, torch.where(constant, (low < 0).float(), best_zero_point)


def assert_same_choice(rows: Tensor, bits: Tensor, *, compiled: bool = False) -> None:
    ranges = rows.amin(1), rows.amax(1), 2.0**bits - 1
    found, expected = mse_search(rows, *ranges, compiled=compiled), literal_search(rows, *ranges)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine.view(torch.int32), reference.view(torch.int32))


def heavy(x: Tensor) -> Tensor:
    return x * x.abs().pow(2)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    "heavy-tailed": heavy,
    "positive": lambda x: x.abs() + 3,
    "negative": lambda x: -x.exp(),
    "relu": lambda x: x.clamp(min=0),
    "on a grid": lambda x: torch.round(x),
    "two values": lambda x: (x > 0).float(),
    "one outlier": lambda x: torch.cat([x[:, 1:] * 1e-3, x[:, :1] * 1e3], 1),
    "tiny": lambda x: x * 1e-30,
    "smaller than any power": lambda x: x * 1e-42,
    "huge": lambda x: heavy(x) * 1e30,
    "constant": lambda x: x[:, :1].expand_as(x).contiguous(),
    "zero": torch.zeros_like,
    "close to constant": lambda x: 1 + x * 1e-7,
}


@both
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("count", "length"), [(24, 9), (24, 288), (1, 8192), (3, 33)])
def test_the_choice_is_that_of_judging_every_candidate(kind: str, count: int, length: int, compiled: bool) -> None:
    rng = torch.Generator().manual_seed(length)
    x = SHAPES[kind](torch.randn(count, length, generator=rng))
    assert_same_choice(x, torch.arange(count) % 8 + 1, compiled=compiled)


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(2, 200), st.floats(0.2, 6), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_the_choice_holds_for_any_tail(seed: int, bits: int, length: int, power: float, shift: float) -> None:
    x = torch.randn(16, length, generator=torch.Generator().manual_seed(seed))
    assert_same_choice(x.sign() * x.abs().pow(power) + shift, torch.full((16,), bits))


@both
@pytest.mark.parametrize("name", ["digits", "digits-heavy"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_choice_on_trained_weights(name: str, bits: int, compiled: bool) -> None:
    for weight in (p.detach().flatten(1) for p in load_denoiser(DENOISERS[name]).parameters() if p.dim() > 1):
        assert_same_choice(weight, torch.full((len(weight),), bits), compiled=compiled)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("quantlab.quant.mse.BLOCK_ELEMENTS", 64)
    assert_same_choice(x, torch.arange(40) % 4 + 1)


@needs_compiler
@pytest.mark.parametrize(("count", "length"), [(8, 96), (24, 500), (7, 4608)])
def test_the_compiled_search_chooses_the_same(monkeypatch: pytest.MonkeyPatch, count: int, length: int) -> None:
    """In any number of parts, of rows and of the candidates that are left."""
    monkeypatch.setattr("quantlab.quant.mse.COMPILED_LENGTH", 100)
    monkeypatch.setattr("quantlab.quant.mse.GATHERED_ELEMENTS", 700)
    x = torch.randn(count, length, generator=torch.Generator().manual_seed(2))
    assert_same_choice(heavy(x), torch.arange(count) % 8 + 1, compiled=True)
