"""Low-rank branches: what they compute, what they keep and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.quant import PerChannel, PerTensor, QuantSpec
from quantlab.errors import NonFiniteError
from quantlab.quant.accounting import FloatModel, SiteCost, account
from quantlab.quant.layers import to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().requires_grad_(False)


CASES = {
    "linear": (lambda: nn.Linear(6, 8), (5, 3, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (4, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 5, 5)),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (4, 6, 5, 5)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    make, shape = CASES[request.param]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return seeded(make), to_quantized(seeded(make)), x


def test_an_empty_branch_changes_nothing(case) -> None:
    plain, layer, x = case
    layer.add_branch(3)
    torch.testing.assert_close(layer(x), plain(x))


def test_branch_and_rest_are_the_layer(case) -> None:
    """What the branch takes over and the weight gives up cancels, smoothing included."""
    plain, layer, x = case
    layer.smoothing = torch.linspace(0.5, 2.0, 6)
    layer.add_branch(2)
    whole = layer.float_weight()
    layer.branch.fit(whole)
    layer.set_float_weight(whole - layer.branch.product())
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_branch_sees_the_input_before_quantization(case) -> None:
    _, layer, x = case
    layer.add_branch(2)
    layer.branch.fit(layer.weight)
    layer.input_quantizer = AffineQuantizer(QuantSpec(PerTensor()), 2, AffineConfig())
    layer.input_quantizer.observe(x)
    layer.input_quantizer.freeze()
    whole = layer.apply_weight(x, layer.branch.product(), None)
    torch.testing.assert_close(layer(x), layer.apply_weight(layer.input_quantizer(x), layer.weight, layer.bias) + whole)


def test_the_fit_is_the_best_of_its_rank_in_every_group() -> None:
    layer = to_quantized(seeded(lambda: nn.Conv2d(6, 8, 3, groups=2)))
    layer.add_branch(2)
    layer.branch.fit(layer.weight)
    left = (layer.weight - layer.branch.product()).flatten(1).view(2, 4, -1).square().sum((1, 2))
    singular = torch.linalg.svdvals(layer.weight.flatten(1).view(2, 4, -1).double())
    torch.testing.assert_close(left.double(), singular[:, 2:].square().sum(1), rtol=1e-3, atol=1e-6)
    assert layer.branch.A.shape == (4, 3, 3, 3) and layer.branch.B.shape == (8, 2, 1, 1)


def test_a_rank_beyond_the_weight_is_the_whole_weight(case) -> None:
    _, layer, _ = case
    layer.add_branch(100)
    layer.branch.fit(layer.weight)
    assert layer.branch.rank == min(8 // getattr(layer, "groups", 1), layer.weight[0].numel())
    torch.testing.assert_close(layer.branch.product(), layer.weight, rtol=2e-3, atol=2e-3)


def test_factors_are_float16_values(case) -> None:
    _, layer, _ = case
    layer.add_branch(2)
    layer.branch.fit(layer.weight)
    for factor in (layer.branch.A, layer.branch.B):
        assert torch.equal(factor, factor.half().float()) and factor.dtype == torch.float32
    with pytest.raises(NonFiniteError, match="float16"):
        layer.branch.fit(layer.weight * 1e12)


def test_freezing_and_merging_leave_the_branch_alone(case) -> None:
    _, layer, x = case
    layer.add_branch(2)
    layer.branch.fit(layer.weight)
    layer.weight_quantizer = AffineQuantizer(QuantSpec(PerChannel(0)), torch.full((8,), 3), AffineConfig())
    layer.weight_quantizer.observe(layer.float_weight())
    layer.weight_quantizer.freeze()
    before = layer(x)
    layer.merge_adapter()
    layer.freeze()
    assert torch.equal(layer(x), before)


def test_a_branch_costs_two_bytes_a_value_and_sixteen_bits_a_side() -> None:
    """A convolution 3 -> 4 with a 3x3 kernel on 5x5 positions, rank 2: A 2x27, B 4x2."""
    macs, values = 25 * 4 * 27, 2 * 27 + 4 * 2
    site = SiteCost("a", macs, 27, torch.full((4,), 4, dtype=torch.int8), 8)
    model = FloatModel(((4 * 108, frozenset({"a.weight"})),))
    plain = account([site], model)
    branched = account([SiteCost("a", macs, 27, site.weight_bits, 8, branch_values=values)], model)
    assert branched.branch_bytes == 2 * values and plain.branch_bytes == 0
    assert branched.total_bytes - plain.total_bytes == 2 * values
    assert branched.bit_operations - plain.bit_operations == 25 * values * 256
    assert branched.macs - plain.macs == 25 * values
    assert branched.quantized_macs == macs and branched.coverage < 1
    kept = SiteCost("a", macs, 27, torch.full((4,), FLOAT_BITS), FLOAT_BITS)
    assert account([kept], model).branch_bytes == 0
