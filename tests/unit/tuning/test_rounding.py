"""Learned rounding: its start, its regulariser, and what becomes of a weight that is rounded hard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantlab.contracts.quant import Observer, PerChannel, QuantSpec
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer
from quantlab.quant.split import SplitQuantizer
from quantlab.tuning.rounding import (
    DroppedQuantizer,
    SoftRounding,
    beta_at,
    logits_of,
    mix,
    rectified_sigmoid,
    rounding_regulariser,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_of(
    module: nn.Linear | nn.Conv2d,
    bits: Tensor,
    *,
    smoothing: bool = False,
    observer: Observer = Observer.MIN_MAX,
    round_zero_point: bool = True,
) -> QuantizedLinear | QuantizedConv2d:
    """A layer with a quantized weight of these bits [out]."""
    layer = to_quantized(module.requires_grad_(False))
    nn.init.normal_(layer.weight, generator=seeded())
    if smoothing:
        layer.smoothing = torch.rand(module.weight.shape[1] * getattr(module, "groups", 1), generator=seeded(1)) + 0.5
    spec = QuantSpec(PerChannel(0), observer, round_zero_point=round_zero_point)
    layer.weight_quantizer = AffineQuantizer.from_spec(spec, bits, AffineConfig())
    layer.weight_quantizer.observe(layer.float_weight())
    layer.weight_quantizer.freeze()
    if not round_zero_point:
        layer.weight_quantizer.zero_point += 0.3
    return layer


@given(st.floats(0, 1))
def test_the_logits_of_a_fraction_give_it_back(fraction: float) -> None:
    value = torch.tensor(fraction, dtype=torch.float64)
    assert rectified_sigmoid(logits_of(value)).item() == pytest.approx(fraction, abs=1e-12)


def test_it_starts_at_the_weight_itself() -> None:
    layer = layer_of(nn.Linear(16, 8), torch.tensor([2, 3, 4, 8] * 2, dtype=torch.int8))
    weight = layer.float_weight()
    soft = SoftRounding(layer.weight_quantizer, weight)
    # The whole range is covered, but for the rounding of the zero point by at most half a step.
    scale = layer.weight_quantizer.scale[:, None]
    parameters = layer.weight_quantizer.qparams()
    ratio = weight / scale + parameters.zero_point[:, None]
    inside = (ratio >= 0) & (ratio <= parameters.quant_max[:, None])
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(soft(weight)[inside], weight[inside], rtol=1e-5, atol=1e-6)
    assert ((soft(weight) - weight).abs() <= 0.5001 * scale).all()


def test_the_regulariser_is_the_closed_form() -> None:
    height = torch.tensor([0.0, 1.0, 0.5, 0.75], dtype=torch.float64)
    for beta in (20.0, 2.0):
        assert rounding_regulariser(height, beta).item() == pytest.approx(1 + 1 - 0.5**beta)
    assert rounding_regulariser(height[:2], 2.0) == 0


def test_the_exponent_falls_after_the_warm_up() -> None:
    betas = [beta_at(i, 10, 0.2, 20, 2) for i in range(10)]
    assert betas[:2] == [None, None]
    assert betas[2:] == pytest.approx([20 - 18 * i / 8 for i in range(8)])


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_the_written_weight_is_quantized_to_the_learned_codes(kind: str, rounded: bool, smoothing: bool) -> None:
    """Mixed bits in one layer, smoothing scales, free zero points: fake quantization keeps every learned code."""
    module = {
        "linear": nn.Linear(32, 8),
        "conv": nn.Conv2d(4, 8, 3),
        "grouped": nn.Conv2d(8, 8, 3, groups=2),
    }[kind]
    bits = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.int8)
    layer = layer_of(module, bits, smoothing=smoothing, observer=Observer.MSE, round_zero_point=rounded)
    weight = layer.float_weight().clone()
    soft = SoftRounding(layer.weight_quantizer, weight)
    soft.logits.data = torch.randn(weight.shape, generator=seeded(2))
    hard = soft.hard(weight)
    layer.set_float_weight(hard)
    shape = (-1, *(1,) * (weight.dim() - 1))
    parameters = layer.weight_quantizer.qparams()
    scale, zero_point = (value.double().view(shape) for value in (parameters.scale, parameters.zero_point))
    codes = torch.floor(weight / scale.float()).double() + (soft.logits >= 0) + zero_point
    codes = torch.minimum(codes.clamp(min=0), parameters.quant_max.double().view(shape))
    expected = scale * (codes - zero_point)
    torch.testing.assert_close(layer.quantized_weight().double(), expected, rtol=1e-5, atol=1e-6)
    # The same codes at either end of the sigmoid.
    soft.logits.data = torch.where(soft.logits >= 0, 50.0, -50.0)
    assert torch.equal(soft(weight), layer.quantized_weight())


def test_only_the_rounding_gets_a_gradient() -> None:
    layer = layer_of(nn.Linear(16, 4), torch.full((4,), 3, dtype=torch.int8))
    weight = layer.float_weight().requires_grad_(True)
    soft = SoftRounding(layer.weight_quantizer, weight)
    soft(weight).square().sum().backward()
    assert soft.logits.grad.abs().sum() > 0
    assert weight.grad is None and layer.weight_quantizer.scale.grad is None


def activation_quantizer(x: Tensor) -> AffineQuantizer:
    from quantlab.contracts.quant import PerTensor

    quantizer = AffineQuantizer.from_spec(QuantSpec(PerTensor(), Observer.MIN_MAX), 2, AffineConfig())
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


def test_dropping_none_or_all_are_the_limits() -> None:
    x = torch.randn(64, 8, generator=seeded())
    quantizer = activation_quantizer(x)
    quantized = quantizer(x)
    assert torch.equal(DroppedQuantizer(quantizer, 0.0, seeded())(x), quantized)
    assert torch.equal(DroppedQuantizer(quantizer, 1.0, seeded())(x), x)
    some = DroppedQuantizer(quantizer, 0.25, seeded())(x)
    kept = some == x
    assert torch.equal(some[~kept], quantized[~kept])
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_mixing_is_seeded() -> None:
    x, other = torch.zeros(100), torch.ones(100)
    assert torch.equal(mix(x, other, 0.5, seeded(3)), mix(x, other, 0.5, seeded(3)))
    assert not torch.equal(mix(x, other, 0.5, seeded(3)), mix(x, other, 0.5, seeded(4)))


def test_the_parts_of_a_split_weight_are_rounded_on_their_own_grids() -> None:
    """The written weight is quantized to the learned codes, and each part is what it would be by itself."""
    bits = torch.tensor([2, 3, 4, 8], dtype=torch.int8)
    layer = to_quantized(nn.Conv2d(8, 4, 3).requires_grad_(False))
    nn.init.normal_(layer.weight, generator=seeded())
    layer.weight[:, :5] *= 40
    parts = [AffineQuantizer.from_spec(QuantSpec(PerChannel(0)), bits, AffineConfig()) for _ in range(2)]
    layer.weight_quantizer = SplitQuantizer(parts, (5, 3), 1)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.freeze()
    weight = layer.float_weight().clone()
    soft = SoftRounding(layer.weight_quantizer, weight)
    soft.logits.data = torch.randn(weight.shape, generator=seeded(2))
    by_hand = []
    for part, piece, logits in zip(parts, weight.split((5, 3), 1), soft.logits.split((5, 3), 1), strict=True):
        alone = SoftRounding(part, piece)
        alone.logits.data = logits
        by_hand.append(part(alone.hard(piece)))
    layer.set_float_weight(soft.hard(weight))
    assert torch.equal(layer.quantized_weight(), torch.cat(by_hand, 1))
    soft.logits.data = torch.where(soft.logits >= 0, 50.0, -50.0)
    assert torch.equal(soft(weight), layer.quantized_weight())
