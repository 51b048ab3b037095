"""Codes of 1 to 8 bits without a bit between them, packed and unpacked by shifts of whole columns of bytes.

The column layout: n codes are eight columns of n // 8 each, and lane l holds the l-th code of every column as one
little-endian number of ``8 * width`` bits, column 0 lowest. Byte k of all lanes lies together, so that each step is a
shift of contiguous bytes. The n % 8 codes that are left follow as one such number in as few bytes as hold them, so that
n codes take ceil(n * width / 8) bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab.errors import ArtefactError, PackError

MAX_WIDTH = 8
WIDTH_BITS = 3
"""Of one stored width; it holds width - 1."""


def packed_size(count: int, width: int) -> int:
    """Bytes of ``count`` codes."""
    return -(-count * width // 8)


def pack_columns(codes: Tensor, width: int) -> Tensor:
    """Pack codes of one width.

    Args:
        codes: uint8 [n], each below 2^width.
        width: bits of a code, 1 to 8.

    Returns:
        uint8 [ceil(n * width / 8)].

    Raises:
        PackError: the width is not 1 to 8, or a code does not fit into it.
    """
    _require_width(width)
    if len(codes) and int(codes.max()) >> width:
        raise PackError("a code does not fit into its width", got=int(codes.max()), allowed=f"0 to {2**width - 1}")
    lanes, left = divmod(len(codes), 8)
    packed = codes.new_zeros(packed_size(len(codes), width))
    planes = packed[: lanes * width].view(width, lanes)
    for index, column in enumerate(codes[: 8 * lanes].view(8, lanes)):
        byte, shift = divmod(index * width, 8)
        planes[byte].bitwise_or_(column << shift)
        if shift + width > 8:
            planes[byte + 1].bitwise_or_(column >> (8 - shift))
    if left:
        number = sum(code << index * width for index, code in enumerate(codes[8 * lanes :].tolist()))
        tail = number.to_bytes(packed_size(left, width), "little")
        packed[lanes * width :] = torch.tensor(list(tail), dtype=torch.uint8)
    return packed


def unpack_columns(packed: Tensor, width: int, count: int) -> Tensor:
    """The inverse of ``pack_columns``: uint8 [count].

    Raises:
        PackError: the width is not 1 to 8.
        ArtefactError: there are more or fewer bytes than ``count`` codes take.
    """
    _require_width(width)
    if len(packed) != packed_size(count, width):
        raise ArtefactError(
            f"{count} codes of {width} bits have another size",
            got=f"{len(packed)} bytes",
            allowed=f"{packed_size(count, width)} bytes",
        )
    lanes, left = divmod(count, 8)
    codes = packed.new_empty(count)
    planes = packed[: lanes * width].view(width, lanes)
    for index, column in enumerate(codes[: 8 * lanes].view(8, lanes)):
        byte, shift = divmod(index * width, 8)
        torch.bitwise_right_shift(planes[byte], shift, out=column)
        if shift + width > 8:
            column.bitwise_or_(planes[byte + 1] << (8 - shift))
        if shift + width != 8:
            column.bitwise_and_(2**width - 1)
    if left:
        number = int.from_bytes(bytes(packed[lanes * width :].tolist()), "little")
        tail = [number >> index * width & 2**width - 1 for index in range(left)]
        codes[8 * lanes :] = torch.tensor(tail, dtype=torch.uint8)
    return codes


def pack_channels(codes: Tensor, bits: Tensor) -> Tensor:
    """Pack a weight's codes: the channels of one width together, narrow ones first, each group in their own order.

    Args:
        codes: uint8 [out, n].
        bits: integer [out], 1 to 8; they tell the order, so that no permutation is stored.

    Raises:
        PackError: a width is not 1 to 8, or a code does not fit into its channel's.
    """
    widths, counts = _groups(bits)
    ordered = codes if len(widths) == 1 else codes[torch.argsort(bits, stable=True)]
    parts = [pack_columns(part.reshape(-1), width) for part, width in zip(ordered.split(counts), widths, strict=True)]
    return torch.cat(parts)


def unpack_channels(packed: Tensor, bits: Tensor, per_channel: int) -> Tensor:
    """The inverse of ``pack_channels``: uint8 [out, per_channel]; raises as ``unpack_columns`` does."""
    widths, counts = _groups(bits)
    sizes = [packed_size(count * per_channel, width) for width, count in zip(widths, counts, strict=True)]
    if len(packed) != sum(sizes):
        raise ArtefactError("the codes of a weight have another size", got=len(packed), allowed=f"{sum(sizes)} bytes")
    groups = zip(packed.split(sizes), widths, counts, strict=True)
    parts = [unpack_columns(part, width, count * per_channel) for part, width, count in groups]
    if len(parts) == 1:
        return parts[0].view(-1, per_channel)
    codes = packed.new_empty(len(bits), per_channel)
    codes[torch.argsort(bits, stable=True)] = torch.cat(parts).view(-1, per_channel)
    return codes


def channels_size(bits: Tensor, per_channel: int) -> int:
    """Bytes of the codes of a weight whose channels have these bits."""
    return sum(packed_size(count * per_channel, width) for width, count in zip(*_groups(bits), strict=True))


def pack_widths(bits: Tensor) -> Tensor:
    """The widths of channels [out], 1 to 8, in 3 bits each."""
    return pack_columns((bits - 1).to(torch.uint8), WIDTH_BITS)


def unpack_widths(packed: Tensor, channels: int) -> Tensor:
    """The inverse of ``pack_widths``: int8 [channels]."""
    return unpack_columns(packed, WIDTH_BITS, channels).to(torch.int8) + 1


def _groups(bits: Tensor) -> tuple[list[int], list[int]]:
    """The widths that occur, rising, and how many channels have each."""
    widths, counts = torch.unique(bits.to(torch.int64), return_counts=True)
    return widths.tolist(), counts.tolist()


def _require_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise PackError("a code of this width cannot be packed", got=f"{width} bits", allowed=f"1 to {MAX_WIDTH}")
