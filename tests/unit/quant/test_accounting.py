"""The accounting, by hand."""

from __future__ import annotations

import torch

from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.quant.accounting import SiteCost, account, packed_bytes


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def test_codes_are_packed_by_width() -> None:
    assert packed_bytes(bits(2, 2, 2, 2), 9) == 9
    # 2 channels of 5 weights at 3 bits: 30 bits in 4 bytes; one at 1 bit: 5 bits in 1 byte.
    assert packed_bytes(bits(3, 1, 3), 5) == 5


def test_one_network_by_hand() -> None:
    uniform = SiteCost(macs=1000, weights_per_channel=16, weight_bits=bits(4, 4), activation_bits=8)
    mixed = SiteCost(
        macs=600,
        weights_per_channel=8,
        weight_bits=bits(1, 2, 3),
        activation_bits=4,
        activation_entries=20,
        per_timestep=True,
        round_zero_point=False,
        smoothing_channels=8,
        adapter_values=10,
    )
    kept = SiteCost(macs=400, weights_per_channel=4, weight_bits=bits(FLOAT_BITS), activation_bits=FLOAT_BITS)
    total = account([uniform, mixed, kept], parameter_count=100)
    assert total.weight_bytes == 16 + (1 + 2 + 3)
    assert total.scale_bytes == 2 * 5
    assert total.zero_point_bytes == 2 * 1 + 3 * 2
    assert total.index_bytes == 2  # three channels at 3 bits
    assert total.activation_bytes == (2 + 1) + 20 * (2 + 2 + 2)
    assert total.smoothing_bytes == 16
    assert total.adapter_bytes == 40
    assert total.float_bytes == 4 * (100 - 32 - 24)
    assert total.total_bytes == 22 + 10 + 8 + 2 + 123 + 16 + 40 + 176
    assert total.float_model_bytes == 400
    assert total.bit_operations == 1000 * 4 * 8 + 600 * 2 * 4 + 400 * 32 * 32
    assert total.coverage == 1600 / 2000


def test_nothing_quantized_costs_what_float_costs() -> None:
    kept = SiteCost(10, 4, bits(FLOAT_BITS, FLOAT_BITS), FLOAT_BITS)
    total = account([kept], parameter_count=8, float_value_bytes=2)
    assert total.total_bytes == total.float_model_bytes == 16
    assert total.coverage == 0
