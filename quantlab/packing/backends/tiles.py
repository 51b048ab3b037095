"""Packed weights for a kernel that unpacks in registers: output channels sorted by width, one width in each tile.

A channel's codes are eight columns of ``lanes`` codes each, so that lane l holds codes l, l + lanes, l + 2 lanes and so
on as one little-endian number of 8 b bits: the column layout of packed files (``quantlab/packing/bitpack.py``), for
each tile of channels. Byte k of all lanes of a tile lies together. So a kernel reads b bytes for eight codes, each byte
once, and a column of a tile is a small dense matrix that meets consecutive inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.packing.bitpack import pack_columns, unpack_columns

CHANNELS = 64
"""Output channels of a full tile: the rows of one int8 instruction of a warp group."""
COLUMNS = 8
ALIGNED_BYTES = 16
"""Widest load of a thread; every column and every tile begins at a multiple of it."""


@dataclass(frozen=True)
class Tiles:
    """A matrix of int8 in tiles of one width.

    Attributes:
        packed: uint8, tile after tile, each [width, channels of the tile, lanes].
        table: int32 [tiles, 4]: width, first channel in the sorted order, channels, and where the tile begins in
            ``packed``, in units of ``ALIGNED_BYTES``.
        order: the channel that stands at each place of the sorted order, int32 [out].
        lowest: what is added to a code to get the integer, int32 [out], in the sorted order.
        columns: k, the columns of the matrix.
        width_mask: bit w is set when a tile has width w.
    """

    packed: Tensor
    table: Tensor
    order: Tensor
    lowest: Tensor
    columns: int
    width_mask: int

    @classmethod
    def of(cls, values: Tensor) -> Tiles:
        """Pack an int8 matrix [out, k]; the width of a channel is that of its largest distance from its least integer.

        That is at most the width it was quantized with, and less where codes at the ends do not occur.
        """
        values = values.to(torch.int32)
        lowest = values.amin(1)
        codes = values - lowest[:, None]
        widths = code_widths(codes)
        order = torch.argsort(widths, stable=True)
        lanes = _lanes(values.shape[1])
        sorted_codes = F.pad(codes[order].to(torch.uint8), (0, COLUMNS * lanes - values.shape[1]))
        packed: list[Tensor] = []
        rows: list[tuple[int, int, int, int]] = []
        first = begin = 0
        for width, channels in _tiles(widths):
            tile = sorted_codes[first : first + channels].view(channels, COLUMNS, lanes)
            packed.append(pack_columns(tile.transpose(0, 1).reshape(-1), width))
            rows.append((width, first, channels, begin))
            first, begin = first + channels, begin + len(packed[-1]) // ALIGNED_BYTES
        table = torch.tensor(rows, dtype=torch.int32, device=values.device)
        mask = sum(1 << width for width in {width for width, *_ in rows})
        return cls(torch.cat(packed), table, order.to(torch.int32), lowest[order], values.shape[1], mask)

    @property
    def lanes(self) -> int:
        """Codes in one column of a channel."""
        return _lanes(self.columns)

    def unpacked(self) -> Tensor:
        """The int8 matrix again, [out, k]."""
        codes = []
        for width, _, channels, begin in self.table.tolist():
            count, byte = COLUMNS * channels * self.lanes, ALIGNED_BYTES * begin
            part = unpack_columns(self.packed[byte : byte + channels * self.lanes * width], width, count)
            codes.append(part.view(COLUMNS, channels, -1).transpose(0, 1).reshape(channels, -1)[:, : self.columns])
        values = torch.cat(codes).to(torch.int32) + self.lowest[:, None]
        return torch.empty_like(values).index_copy_(0, self.order.long(), values).to(torch.int8)

    def held_bytes(self) -> int:
        """Bytes of codes and tables."""
        return len(self.packed) + 4 * (self.table.numel() + len(self.order) + len(self.lowest))


def _lanes(columns: int) -> int:
    """Codes in one of eight columns, aligned."""
    per_lane = COLUMNS * ALIGNED_BYTES
    return -(-columns // per_lane) * ALIGNED_BYTES


def code_widths(codes: Tensor) -> Tensor:
    """Bits that each row of codes [out, k] takes, at least 1: int64 [out]."""
    largest = codes.amax(1).to(torch.int64)
    powers = 2 ** torch.arange(1, 8, device=codes.device)
    return 1 + (largest[:, None] >= powers).sum(1)


def _tiles(widths: Tensor) -> list[tuple[int, int]]:
    """Width and channels of each tile, in order."""
    found, counts = widths.unique(return_counts=True)
    return [
        (width, min(CHANNELS, count - start))
        for width, count in zip(found.tolist(), counts.tolist(), strict=True)
        for start in range(0, count, CHANNELS)
    ]
