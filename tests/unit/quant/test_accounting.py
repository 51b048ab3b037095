"""The accounting, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.quant.accounting import FloatModel, SiteCost, account, packed_bytes, zero_point_bytes


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def test_codes_are_packed_by_width() -> None:
    assert packed_bytes(bits(2, 2, 2, 2), 9) == 9
    # 2 channels of 5 weights at 3 bits: 30 bits in 4 bytes; one at 1 bit: 5 bits in 1 byte.
    assert packed_bytes(bits(3, 1, 3), 5) == 5


def float_model(**sizes: int) -> FloatModel:
    return FloatModel(tuple((size, frozenset({name.replace("_", ".")})) for name, size in sizes.items()))


def test_one_network_by_hand() -> None:
    uniform = SiteCost("a", macs=1000, weights_per_channel=16, weight_bits=bits(4, 4), activation_bits=8)
    mixed = SiteCost(
        "b",
        macs=600,
        weights_per_channel=8,
        weight_bits=bits(1, 2, 3),
        activation_bits=4,
        activation_entries=20,
        per_timestep=True,
        weight_zero_point_bytes=4,
        activation_zero_point_bytes=2,
        smoothing_channels=8,
        adapter_bytes=40,
    )
    kept = SiteCost("c", macs=400, weights_per_channel=4, weight_bits=bits(FLOAT_BITS), activation_bits=FLOAT_BITS)
    model = float_model(a_weight=4 * 32, b_weight=4 * 24, c_weight=4 * 4, norm_bias=4 * 40)
    total = account([uniform, mixed, kept], model)
    assert total.weight_bytes == 16 + (1 + 2 + 3)
    assert total.scale_bytes == 4 * 5
    assert total.zero_point_bytes == 2 * 1 + 3 * 4
    assert total.index_bytes == 2  # three channels at 3 bits
    assert total.activation_bytes == (4 + 1) + 20 * (4 + 2 + 2)
    assert total.smoothing_bytes == 32
    assert total.adapter_bytes == 40
    assert total.float_bytes == 4 * (4 + 40)
    assert total.total_bytes == 22 + 20 + 14 + 2 + 165 + 32 + 40 + 176
    assert total.float_model_bytes == 400
    assert total.bit_operations == 1000 * 4 * 8 + 600 * 2 * 4 + 400 * 32 * 32
    assert total.coverage == 1600 / 2000


def test_nothing_quantized_costs_what_float_costs() -> None:
    kept = SiteCost("a", 10, 4, bits(FLOAT_BITS, FLOAT_BITS), FLOAT_BITS)
    total = account([kept], float_model(a_weight=16))
    assert total.total_bytes == total.float_model_bytes == 16
    assert total.coverage == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)


def test_what_is_stored_counts_once_at_its_own_width() -> None:
    model = FloatModel.of(Tied())
    assert model.total_bytes == 4 * 64 + 2 * 3
    assert model.without({"a.weight"}) == 4 * 64 + 6, "the other layer still needs it"
    assert model.without({"a.weight", "b.weight"}) == 6


@pytest.mark.parametrize(
    ("values", "rounded", "expected"),
    [
        ([0, 3], True, 1),
        ([-128, 127], True, 1),
        ([0, 255], True, 1),
        ([-1, 128], True, 2),
        ([-40_000], True, 4),
        ([0.5], False, 4),
    ],
)
def test_a_zero_point_is_as_wide_as_its_value(values: list[float], rounded: bool, expected: int) -> None:
    assert zero_point_bytes(torch.tensor(values), rounded) == expected
