"""Integer products through the Triton kernel: weights stay packed and are unpacked in registers.

On a GPU the kernel is compiled; for tensors on a CPU it runs in Triton's interpreter, which is a test of its arithmetic
and nothing to compute with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantlab.packing.backends.int8 import Int8Weight
from quantlab.packing.backends.tiles import ALIGNED_BYTES, CHANNELS, Tiles

ROW_BLOCKS = (16, 64, 128)
"""Input rows of one program; the least that int8 instructions take, and what registers hold."""
LANES = 32
"""Inputs of one product in the kernel; the least that int8 instructions take."""
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
"""Of the compiler; one warp group, and roundings as in the interpreter. Not tuned: no GPU was at hand."""


def missing_triton() -> str:
    """What the kernel lacks, "" when nothing."""
    return "" if find_spec("triton") else 'triton is not installed; pip install "quantlab[gpu]"'


@dataclass(frozen=True)
class TritonProduct:
    """A weight in tiles of one width.

    Attributes:
        tiles: the packed integers.
        weight: scales, sums and bias; its values are empty.
        output: float32, bfloat16 or float16.
    """

    tiles: Tiles
    weight: Int8Weight
    output: torch.dtype = torch.float32

    @classmethod
    def of(cls, weight: Int8Weight) -> TritonProduct:
        """The product of a matrix on the matrix's device."""
        return cls(Tiles.of(weight.values), weight.without_values())

    def __call__(self, rows: Tensor, scale: float, shift: int) -> Tensor:
        """[n, out] of int8 rows [n, k].

        Raises:
            RuntimeError: Triton cannot compile or launch its kernel.
        """
        tiles, weight = self.tiles, self.weight
        count, channels = len(rows), len(weight.total)
        output = torch.empty(count, channels, dtype=self.output, device=rows.device)
        residual, bias = weight.residual, weight.bias
        row_sums = None if residual is None else rows.sum(1, dtype=torch.int32)
        block = next((block for block in ROW_BLOCKS if block >= count), ROW_BLOCKS[-1])
        # A pointer that the kernel does not follow may be any; None would compile the kernel once more.
        with torch.cuda.device_of(rows), _runtime_errors():
            _kernel(rows.device.type)[(-(-count // block), len(tiles.table))](
                rows.contiguous(),
                tiles.packed,
                tiles.table,
                tiles.order,
                tiles.lowest,
                weight.total if residual is None else residual,
                weight.total if row_sums is None else row_sums,
                weight.total,
                weight.scale,
                weight.scale if bias is None else bias,
                output,
                count,
                rows.shape[1],
                tiles.lanes,
                channels,
                scale,
                shift,
                WIDTHS=tiles.width_mask,
                ROWS=block,
                CHANNELS=CHANNELS,
                LANES=LANES,
                ALIGNED_BYTES=ALIGNED_BYTES,
                HAS_RESIDUAL=residual is not None,
                HAS_BIAS=bias is not None,
                **OPTIONS,
            )
        return output

    def held_bytes(self) -> int:
        """Bytes of packed codes, scales and bias."""
        return self.tiles.held_bytes() + self.weight.held_bytes()


@contextmanager
def _runtime_errors() -> Iterator[None]:
    """Triton's errors as those of torch's operators."""
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    try:
        yield
    except TritonError as error:
        raise RuntimeError(f"Triton fails with {type(error).__name__}") from error


def _kernel(device: str) -> Any:
    from quantlab.packing.backends.triton_kernel import interpreted_tile_product, tile_product

    return interpreted_tile_product if device == "cpu" else tile_product
