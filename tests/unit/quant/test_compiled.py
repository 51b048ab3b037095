"""Compiled quantizers beside the eager ones: the same values, and never a silent fallback."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from quantlab.contracts.quant import PerChannel, QuantSpec
from quantlab.errors import QuantlabError
from quantlab.quant.compiled import compiled_for
from quantlab.quant.functional import fake_quantize, per_channel
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def leaves(shape: tuple[int, ...], channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor with codes on, inside and outside the borders, and learned scales and zero points."""
    rng = torch.Generator().manual_seed(len(shape) + channels)
    scale = torch.rand(channels, generator=rng) * 0.1 + 0.2
    dims = len(shape)
    scale, zero_point = (
        per_channel(v, dims) if channels > 1 else v[0] for v in (scale, torch.arange(channels) % 5 - 0.0)
    )
    x = torch.randn(shape, generator=rng)
    x.view(-1)[::7] = (scale * (3 - zero_point)).expand(shape).reshape(-1)[::7]
    return x.requires_grad_(), scale.requires_grad_(), zero_point.requires_grad_()


# More shapes than the compiler allows recompilations (8): one that fell back would differ from none of them.
SHAPES = [
    ((6, 10), 6),
    ((6, 6), 6),
    ((12, 7), 12),
    ((8, 3, 3, 3), 8),
    ((16, 4, 1, 1), 16),
    ((4, 9, 8), 1),
    ((2, 3, 8, 8), 2),
    ((3, 64), 1),
    ((7, 30), 7),
    ((9, 2, 5), 9),
]


def test_compiled_values_are_the_same_bits() -> None:
    for shape, channels in SHAPES:
        found, gradients = [], []
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        levels = (
            torch.tensor(7) if channels == 1 else per_channel(2 ** (torch.arange(channels) % 4 + 1) - 1, len(shape))
        )
        for compiled in (False, True):
            x, scale, zero_point = leaves(shape, channels)
            y = fake_quantize(x, scale, zero_point, levels, compiled=compiled)
            found.append(y.detach())
            gradients.append(torch.autograd.grad(y, (x, scale, zero_point), upstream))
        assert torch.equal(found[0], found[1]), shape
        assert torch.equal(gradients[0][0], gradients[1][0]), shape
        for eager, compiled in zip(gradients[0][1:], gradients[1][1:], strict=True):
            assert compiled.shape == eager.shape
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_frozen_scales_need_no_gradients_of_their_own() -> None:
    x, scale, zero_point = (value.detach() for value in leaves((6, 10), 6))
    results = []
    for compiled in (False, True):
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scale, zero_point, 7, compiled=compiled).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(results[0], results[1])
    assert 0 < results[0].sum() < x.numel()


def test_reaching_the_recompile_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.quant.compiled.VARIANTS", 1)
    function = compiled_for(of_rank, torch.float32, 0)
    function(torch.ones(2))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        function(torch.ones(2, 2))


def test_a_view_or_a_gradient_is_no_reason_to_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's weights and inputs are views of all shapes; with a variant for each the limit was reached."""
    monkeypatch.setattr("quantlab.quant.compiled.VARIANTS", 1)
    function = compiled_for(of_rank, torch.float32, -1)
    rows = (torch.ones(4, 6), torch.ones(3, 2, 5).flatten(1), torch.ones(7, 2, 2, 3).requires_grad_().flatten(1))
    for x in rows:
        assert torch.equal(function(x), 2 * x)


def of_rank(x: Tensor) -> Tensor:
    return x * x.dim()


def test_every_pair_has_a_compiled_function_of_its_own() -> None:
    assert compiled_for(of_rank, torch.float32, 2) is compiled_for(of_rank, torch.float32, 2)
    assert compiled_for(of_rank, torch.float32, 2) is not compiled_for(of_rank, torch.float64, 2)


def test_scales_along_another_dimension_are_refused() -> None:
    with pytest.raises(QuantlabError, match="one scale, or one for each entry of the first dimension"):
        fake_quantize(torch.ones(3, 4), torch.ones(1, 4), torch.zeros(1, 4), 7, compiled=True)


def test_the_option_changes_neither_the_scales_nor_the_values() -> None:
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    outputs = []
    for compiled in (False, True):
        bits = torch.arange(9, dtype=torch.int8) % 3 + 2
        quantizer = AffineQuantizer.from_spec(QuantSpec(PerChannel()), bits, AffineConfig(compiled=compiled))
        quantizer.observe(weight)
        quantizer.freeze()
        outputs.append(quantizer(weight))
    assert torch.equal(outputs[0], outputs[1])
