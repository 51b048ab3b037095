"""Affine quantizers, static and by timestep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QuantSpec
from quantlab.errors import QuantlabError
from quantlab.quant.functional import search_scale
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer
from quantlab.quant.timestep import nearest_index

TWENTY_STEPS = torch.arange(1, 1000, 50)


def calibrated(spec: QuantSpec, bits: int = 4) -> AffineQuantizer:
    """Observed on samples whose size grows with the timestep."""
    quantizer = AffineQuantizer.from_spec(spec, bits, AffineConfig())
    rng = torch.Generator().manual_seed(0)
    for timestep in TWENTY_STEPS:
        x = torch.randn(6, 3, 4, 4, generator=rng) * float(timestep)
        quantizer.observe(x, timestep.expand(6))
    quantizer.freeze()
    return quantizer


PER_TIMESTEP = QuantSpec(PerTensor(), per_timestep=True)


def test_every_timestep_has_the_scale_of_its_samples() -> None:
    quantizer = calibrated(PER_TIMESTEP)
    assert torch.equal(quantizer.timesteps, TWENTY_STEPS)
    ratio = quantizer.scale[-1] / quantizer.scale[0]
    assert 951 / 2 < ratio < 951 * 2


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_other_numbers_of_steps_take_the_nearest_scale(steps: int, dtype: torch.dtype) -> None:
    quantizer = calibrated(PER_TIMESTEP)
    timesteps = torch.arange(1, 1000, 1000 // steps)
    x = torch.randn(len(timesteps), 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 500
    together = quantizer(x, timesteps.to(dtype))
    for index, timestep in enumerate(timesteps):
        nearest = (TWENTY_STEPS - timestep).abs().argmin()
        static = AffineQuantizer(QuantSpec(PerTensor()), 4, AffineConfig())
        static.scale.data, static.zero_point.data = quantizer.scale[nearest], quantizer.zero_point[nearest]
        assert torch.equal(together[index], static(x[index]))


def test_nearest_takes_the_smaller_of_equally_near() -> None:
    assert nearest_index(torch.tensor([0, 10, 20]), torch.tensor([5, 6, -3, 99])).tolist() == [0, 1, 0, 2]


def test_only_visited_timesteps_get_a_gradient() -> None:
    quantizer = calibrated(PER_TIMESTEP)
    quantizer.requires_grad_(True)
    quantizer(torch.randn(2, 5), torch.tensor([1, 951])).sum().backward()
    visited = quantizer.scale.grad.nonzero().flatten().tolist()
    assert visited == [0, 19]


def test_shared_start_is_one_range_for_all() -> None:
    quantizer = calibrated(QuantSpec(PerTensor(), per_timestep=True, share_start=True))
    static = calibrated(QuantSpec(PerTensor()))
    assert torch.equal(quantizer.scale, static.scale.expand(20))


def test_a_timestep_is_asked_for() -> None:
    quantizer = AffineQuantizer(PER_TIMESTEP, 4, AffineConfig())
    with pytest.raises(QuantlabError, match="need a timestep"):
        quantizer.observe(torch.randn(2, 3))


def test_observing_in_parts_is_observing_at_once() -> None:
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(3))
    parts, whole = (AffineQuantizer(QuantSpec(PerTensor()), 3, AffineConfig()) for _ in range(2))
    for part in x.split(2):
        parts.observe(part)
    whole.observe(x)
    parts.freeze()
    whole.freeze()
    assert torch.equal(parts.scale, whole.scale)


def test_state_dict_round_trip_is_bit_equal() -> None:
    saved = calibrated(PER_TIMESTEP)
    loaded = AffineQuantizer(PER_TIMESTEP, 4, AffineConfig())
    loaded.load_state_dict(saved.state_dict())
    x, timestep = torch.randn(3, 7), torch.tensor([1, 400, 951])
    assert torch.equal(loaded(x, timestep), saved(x, timestep))


def test_channels_of_mixed_width() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    bits = torch.tensor([1, 2, 3, 8], dtype=torch.int8)
    quantizer = AffineQuantizer.from_spec(QuantSpec(PerChannel(0), Observer.MIN_MAX), bits, AffineConfig())
    quantizer.observe(weight)
    quantizer.freeze()
    expected, _ = search_scale(weight.flatten(1), bits, Observer.MIN_MAX)
    assert torch.equal(quantizer.scale, expected)
    levels = [len(torch.unique(channel)) for channel in quantizer(weight)]
    assert all(count <= 2**width for count, width in zip(levels, bits.tolist(), strict=True))
    parameters = quantizer.qparams()
    assert isinstance(parameters.quant_max, Tensor) and parameters.quant_max.tolist() == [1, 3, 7, 255]
    assert parameters.axis == 0


def test_the_percentile_is_an_option() -> None:
    x = torch.arange(1.0, 101.0)
    tensor, channel = (
        AffineQuantizer.from_spec(QuantSpec(kind, Observer.PERCENTILE), bits, AffineConfig(percentile=90))
        for kind, bits in ((PerTensor(), 2), (PerChannel(0), torch.tensor([2, 1], dtype=torch.int8)))
    )
    tensor.observe(x)
    channel.observe(torch.stack([x, -x]))
    for quantizer in (tensor, channel):
        quantizer.freeze()
    assert (tensor.scale.item(), tensor.zero_point.item()) == (30.0, 0.0)
    assert (channel.scale.tolist(), channel.zero_point.tolist()) == ([30.0, 90.0], [0.0, 1.0])


def test_rounding_the_zero_points_changes_nothing_that_is_computed() -> None:
    quantizer = calibrated(QuantSpec(PerTensor()))
    quantizer.zero_point.data += 0.3
    x = torch.randn(5, 5) * 100
    before = quantizer(x)
    quantizer.round_parameters()
    assert torch.equal(quantizer(x), before)
    assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())
