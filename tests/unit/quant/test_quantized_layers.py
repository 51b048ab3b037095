"""Quantized layers against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from quantlab.contracts.quant import PerChannel, PerTensor, QuantSpec
from quantlab.contracts.tuning import AdapterSpec, ConvAdapter
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

RNG_SEED = 0
LAYERS = {
    "linear 2D": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear 3D": (lambda: nn.Linear(6, 8, bias=False), (5, 3, 6)),
    "linear 4D": (lambda: nn.Linear(6, 8), (2, 4, 3, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5)),
    "strided dilated conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, dilation=2, bias=False), (2, 6, 9, 9)),
    "grouped conv": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise conv": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "reflecting conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
}


@pytest.fixture(params=LAYERS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, QuantizedConv2d | QuantizedLinear, Tensor]:
    """A layer, its quantized copy, and an input."""
    make, shape = LAYERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(RNG_SEED)
        plain = make()
    return plain, to_quantized(copy.deepcopy(plain)), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def with_quantizers(layer: QuantizedConv2d | QuantizedLinear, x: Tensor) -> None:
    bits = torch.arange(layer.weight.shape[0]).to(torch.int8) % 3 + 2
    layer.weight_quantizer = AffineQuantizer(QuantSpec(PerChannel(0)), bits, AffineConfig())
    layer.weight_quantizer.observe(layer.float_weight())
    layer.weight_quantizer.freeze()
    layer.input_quantizer = AffineQuantizer(QuantSpec(PerTensor()), 8, AffineConfig())
    layer.input_quantizer.observe(x)
    layer.input_quantizer.freeze()


def test_without_parts_it_is_the_layer(pair: tuple) -> None:
    plain, layer, x = pair
    assert torch.equal(layer(x), plain(x))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(layer, type(plain))


def test_it_takes_the_parameters_over() -> None:
    plain = nn.Linear(3, 4)
    weight = plain.weight
    layer = to_quantized(plain)
    assert layer.weight is weight and layer.in_features == 3


def test_smoothing_keeps_the_float_function(pair: tuple) -> None:
    plain, layer, x = pair
    layer.smoothing = torch.linspace(0.3, 3.0, 6)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", list(ConvAdapter))
def test_an_adapter_starts_at_nothing_and_merges_into_the_weight(pair: tuple, shape: ConvAdapter) -> None:
    plain, layer, x = pair
    layer.add_adapter(AdapterSpec(2, shape), torch.Generator().manual_seed(2))
    assert torch.equal(layer(x), plain(x))
    layer.adapter.B.data.normal_(generator=torch.Generator().manual_seed(3))
    changed = layer(x)
    assert not torch.allclose(changed, plain(x))
    layer.merge_adapter()
    torch.testing.assert_close(layer(x), changed)
    assert layer.state_dict().keys() == plain.state_dict().keys()


def test_per_tap_adapter_is_a_product_at_every_tap() -> None:
    layer = to_quantized(nn.Conv2d(3, 4, 3))
    layer.add_adapter(AdapterSpec(2, ConvAdapter.PER_TAP), torch.Generator().manual_seed(0))
    layer.adapter.B.data.normal_(generator=torch.Generator().manual_seed(1))
    for row in range(3):
        for column in range(3):
            product = layer.adapter.B[:, :, row, column] @ layer.adapter.A[:, :, row, column]
            torch.testing.assert_close(layer.adapter.delta()[:, :, row, column], product)


def test_frozen_is_bitwise_the_same(pair: tuple) -> None:
    _, layer, x = pair
    with_quantizers(layer, x)
    before = layer(x)
    layer.freeze()
    assert torch.equal(layer(x), before)
    assert not any("frozen" in name for name in layer.state_dict())
    layer.weight.data.zero_()
    layer.thaw()
    assert not torch.equal(layer(x), before)


def test_state_dict_and_deepcopy_are_bit_equal(pair: tuple) -> None:
    _, layer, x = pair
    with_quantizers(layer, x)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_checkpointing_gives_the_same_gradients(pair: tuple) -> None:
    _, layer, x = pair
    with_quantizers(layer, x)
    layer.add_adapter(AdapterSpec(2), torch.Generator().manual_seed(2))
    layer.requires_grad_(True)

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        layer(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]

    plain = gradients()
    layer.gradient_checkpointing = True
    for one, other in zip(plain, gradients(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_goes_through() -> None:
    x = torch.randn(2, 6, 5, 5).bfloat16()
    layer = to_quantized(nn.Conv2d(6, 8, 3).bfloat16())
    layer.smoothing = torch.linspace(0.5, 2.0, 6)
    with_quantizers(layer, x)
    assert layer(x).dtype == torch.bfloat16
