"""Parts of a tensor with quantizers of their own."""

from __future__ import annotations

import pytest
import torch

from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QuantSpec
from quantlab.quant.functional import fake_quantize, per_channel, search_scale
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer
from quantlab.quant.split import SplitQuantizer

SIZES = (5, 3)


def split(spec: QuantSpec, bits: int | torch.Tensor, dim: int) -> SplitQuantizer:
    return SplitQuantizer([AffineQuantizer.from_spec(spec, bits, AffineConfig()) for _ in SIZES], SIZES, dim)


def unequal(*shape: int, dim: int) -> torch.Tensor:
    """The first part 50 times as wide as the second."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x.narrow(dim, 0, SIZES[0]).mul_(50)
    return x


@pytest.mark.parametrize("observer", list(Observer))
def test_an_input_is_its_parts_quantized_by_hand(observer: Observer) -> None:
    x = unequal(6, 8, 4, 4, dim=1)
    quantizer = split(QuantSpec(PerTensor(), observer), 4, 1)
    quantizer.observe(x)
    quantizer.freeze()
    by_hand = []
    for part in x.split(SIZES, 1):
        scale, zero_point = search_scale(part.reshape(1, -1), torch.tensor([4]), observer)
        by_hand.append(fake_quantize(part, scale[0], zero_point[0], 15))
    assert torch.equal(quantizer(x), torch.cat(by_hand, 1))


def test_a_weight_of_mixed_bits_is_its_columns_quantized_by_hand() -> None:
    weight, bits = unequal(4, 8, 3, 3, dim=1), torch.tensor([2, 3, 4, 2], dtype=torch.int8)
    quantizer = split(QuantSpec(PerChannel(0)), bits, 1)
    quantizer.observe(weight)
    quantizer.freeze()
    by_hand = []
    for part in weight.split(SIZES, 1):
        scale, zero_point = search_scale(part.flatten(1), bits, Observer.MSE)
        levels = per_channel(2.0**bits - 1, 4)
        by_hand.append(fake_quantize(part, per_channel(scale, 4), per_channel(zero_point, 4), levels))
    assert torch.equal(quantizer(weight), torch.cat(by_hand, 1))
    stored = quantizer.qparams()
    assert stored is not None and stored.scale.shape == (2, 4) and stored.split == SIZES


def test_parts_of_unequal_range_have_a_smaller_error_apart() -> None:
    x = unequal(6, 8, 4, 4, dim=1)
    spec = QuantSpec(PerTensor(), Observer.MSE)
    apart, together = split(spec, 4, 1), AffineQuantizer.from_spec(spec, 4, AffineConfig())
    for quantizer in (apart, together):
        quantizer.observe(x)
        quantizer.freeze()
    narrow = [(quantizer(x) - x)[:, SIZES[0] :].square().mean() for quantizer in (apart, together)]
    assert narrow[0] < 0.02 * narrow[1]


def test_scales_by_timestep_of_a_linear_input_load_again() -> None:
    x, timestep = unequal(12, 7, 8, dim=-1), torch.arange(12) % 3 * 100
    spec = QuantSpec(PerTensor(), per_timestep=True)
    quantizer = split(spec, 6, -1)
    quantizer.observe(x, timestep)
    quantizer.freeze()
    again = split(spec, 6, -1)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x, timestep), quantizer(x, timestep))
    stored = again.qparams()
    assert stored is not None and stored.scale.shape == (2, 3) and stored.timesteps.tolist() == [0, 100, 200]


def test_rounding_and_positive_scales_reach_every_part() -> None:
    x = unequal(6, 8, 4, 4, dim=1)
    quantizer = split(QuantSpec(PerTensor()), 4, 1)
    quantizer.observe(x)
    quantizer.freeze()
    with torch.no_grad():
        for part in quantizer.parts:
            part.zero_point.add_(0.3)
        before = quantizer(x)
        quantizer.round_parameters()
        assert torch.equal(quantizer(x), before)
        for part in quantizer.parts:
            assert part.zero_point == part.zero_point.round()
            part.scale.fill_(-1.0)
        quantizer.constrain()
    assert all(part.scale > 0 for part in quantizer.parts)


def test_formats_of_their_own_decide_and_are_counted_in_each_part() -> None:
    class Format(AffineQuantizer):
        errors: list[float]

        def choose(self, output_error) -> None:
            self.errors.append(output_error())

        def extra_bytes(self) -> int:
            return 7

    parts = [Format.from_spec(QuantSpec(PerTensor()), 4, AffineConfig()) for _ in SIZES]
    for part in parts:
        part.errors = []
    quantizer = SplitQuantizer(parts, SIZES, 1)
    quantizer.choose(lambda: 0.5)
    assert [part.errors for part in parts] == [[0.5], [0.5]] and quantizer.extra_bytes() == 14
