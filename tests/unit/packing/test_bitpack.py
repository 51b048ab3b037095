"""Codes to bytes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import ArtefactError, PackError
from quantlab.packing.bitpack import (
    pack_channels,
    pack_columns,
    pack_widths,
    packed_size,
    unpack_channels,
    unpack_columns,
    unpack_widths,
)


def u8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_bytes_worked_out_by_hand() -> None:
    # One lane of eight 3-bit codes is the octal number 76543210.
    assert bytes(pack_columns(torch.arange(8, dtype=torch.uint8), 3).tolist()) == (0o76543210).to_bytes(3, "little")
    # 16 codes 0, 1, 2, 3, 0, ... of 2 bits are the lanes 0, 2, 0, 2, ... and 1, 3, 1, 3, ...; byte 0 of both is first.
    assert pack_columns(torch.arange(16, dtype=torch.uint8) % 4, 2).tolist() == [0x88, 0xDD, 0x88, 0xDD]
    # Fewer than eight: one number, 1 + 31 * 2^5 + 16 * 2^10 = 0x43E1.
    assert pack_columns(u8(1, 31, 16), 5).tolist() == [0xE1, 0x43]
    # Nine codes of 1 bit: a lane, then the ninth alone.
    assert pack_columns(u8(1, 0, 0, 0, 0, 0, 0, 1, 1), 1).tolist() == [0x81, 0x01]
    # Widths less one: 0 + 7 * 2^3 + 2 * 2^6 = 0xB8.
    assert pack_widths(u8(1, 8, 3)).tolist() == [0xB8, 0x00]


def test_channels_of_one_width_lie_together_narrow_ones_first() -> None:
    codes, bits = torch.tensor([[3, 1], [1, 0], [2, 0]], dtype=torch.uint8), torch.tensor([2, 1, 2])
    # Channel 1: 1 + 0 * 2. Channels 0 and 2: 3 + 1 * 4 + 2 * 16 + 0.
    assert pack_channels(codes, bits).tolist() == [0x01, 0x27]


@given(width=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_every_width_comes_back_in_as_few_bytes_as_hold_it(width: int, count: int, seed: int) -> None:
    codes = torch.randint(2**width, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_columns(codes, width)
    assert len(packed) == packed_size(count, width) == -(-width * count // 8)
    assert torch.equal(unpack_columns(packed, width, count), codes)


@given(bits=st.lists(st.integers(1, 8), min_size=1, max_size=12), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_mix_of_widths_comes_back_and_tells_its_order(bits: list[int], size: int, seed: int) -> None:
    rng, widths = torch.Generator().manual_seed(seed), torch.tensor(bits, dtype=torch.int8)
    codes = torch.stack([torch.randint(2**width, (size,), dtype=torch.uint8, generator=rng) for width in bits])
    assert torch.equal(unpack_channels(pack_channels(codes, widths), widths, size), codes)
    assert torch.equal(unpack_widths(pack_widths(widths), len(bits)), widths)


@pytest.mark.parametrize("width", [0, 9, 16])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(PackError, match="width cannot be packed"):
        pack_columns(u8(0), width)
    with pytest.raises(PackError, match="width cannot be packed"):
        unpack_columns(u8(0), width, 1)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PackError, match="does not fit into its width") as caught:
        pack_columns(u8(0, 8, 1), 3)
    assert caught.value.got == 8
    with pytest.raises(PackError, match="does not fit"):
        pack_channels(torch.tensor([[3], [3]], dtype=torch.uint8), torch.tensor([2, 1]))


def test_bytes_that_are_not_so_many_codes_are_refused() -> None:
    with pytest.raises(ArtefactError, match="another size"):
        unpack_columns(u8(0, 0), 3, 8)
    with pytest.raises(ArtefactError, match="another size"):
        unpack_channels(u8(0, 0, 0, 0), torch.tensor([1, 2]), 3)
