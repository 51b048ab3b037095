"""The Triton kernels: the product with packed tiles, and activations to codes. Importing them needs triton."""

# A kernel is not run as Python: triton reads its source, and types are those of the tensors it is launched with.
# ruff: noqa: ANN001, ANN202
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]  an optional package
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.runtime.interpreter import InterpretedFunction  # pyright: ignore[reportMissingImports]


def _tile_product(
    rows,
    packed,
    table,
    order,
    lowest,
    residual,
    row_sums,
    total,
    scale,
    bias,
    output,
    row_count,
    columns,
    lanes,
    channels,
    input_scale,
    shift,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    tile = table + tl.program_id(1) * 4
    width, first_channel, tile_channels = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    in_tile = tl.arange(0, CHANNELS)
    channel_there = in_tile < tile_channels
    lowest_code = tl.load(lowest + first_channel + in_tile, mask=channel_there, other=0)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_there = row < row_count
    codes = packed + tl.load(tile + 3).to(tl.int64) * ALIGNED_BYTES + in_tile[:, None] * lanes
    plane = tile_channels * lanes
    # [channels, rows]: as the first operand, weights go from registers into the tensor cores.
    sums = tl.full((CHANNELS, ROWS), 0, tl.int32)
    for WIDTH in tl.static_range(1, 9):
        # Widths that do not occur are not compiled: so two conditions, not one.
        if WIDTHS >> WIDTH & 1:  # noqa: SIM102
            if width == WIDTH:
                for first_lane in range(0, lanes, LANES):
                    lane = first_lane + tl.arange(0, LANES)
                    lane_there = lane < lanes
                    there = channel_there[:, None] & lane_there[None, :]
                    number = tl.load(codes + lane[None, :], mask=there, other=0)
                    number = number.to(tl.int32 if WIDTH <= 4 else tl.int64)
                    for byte in tl.static_range(1, WIDTH):
                        value = tl.load(codes + byte * plane + lane[None, :], mask=there, other=0)
                        number |= value.to(number.dtype) << 8 * byte
                    for column in tl.static_range(8):
                        code = (number >> column * WIDTH).to(tl.int32) & ((1 << WIDTH) - 1)
                        weight = (code + lowest_code[:, None]).to(tl.int8)
                        position = column * lanes + lane
                        input_there = (lane_there & (position < columns))[:, None] & row_there[None, :]
                        # Masked inputs are 0, so that what stands in masked weights does not matter.
                        values = tl.load(rows + row[None, :] * columns + position[:, None], mask=input_there, other=0)
                        sums = tl.dot(weight, values, sums, out_dtype=tl.int32)
    channel = tl.load(order + first_channel + in_tile, mask=channel_there, other=0)
    sums += (tl.load(total + channel, mask=channel_there, other=0) * shift)[:, None]
    if HAS_RESIDUAL:
        by_channel = tl.load(residual + channel, mask=channel_there, other=0)
        sums += by_channel[:, None] * tl.load(row_sums + row, mask=row_there, other=0)[None, :]
    value = sums.to(tl.float32) * (tl.load(scale + channel, mask=channel_there, other=0) * input_scale)[:, None]
    if HAS_BIAS:
        value += tl.load(bias + channel, mask=channel_there, other=0)[:, None]
    there = channel_there[:, None] & row_there[None, :]
    tl.store(output + row[None, :] * channels + channel[:, None], value, mask=there)


def _to_codes(
    x,
    codes,
    count,
    scale,
    zero_point,
    quant_max,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    value = tl.load(x + place, mask=there, other=0)
    # The plain quotient of Triton is not correctly rounded: some ties would fall to the other side.
    steps = tl.minimum(tl.maximum(tl.div_rn(value, scale), -4194304.0), 4194304.0)
    # Adding 1.5 * 2^23 leaves no bits for a fraction, and rounds it away half to even.
    code = (steps + 12582912.0) - 12582912.0 + zero_point
    tl.store(codes + place, tl.minimum(tl.maximum(code, 0.0), quant_max).to(tl.uint8), mask=there)


tile_product: Any = triton.jit(_tile_product, do_not_specialize=["row_count", "shift"])
"""Product of int8 rows with packed tiles, for tensors on a GPU."""
interpreted_tile_product: Any = InterpretedFunction(_tile_product)
"""The same in Triton's interpreter, for tensors on a CPU: slow, and there to be tested."""
to_codes: Any = triton.jit(_to_codes)
"""float32 values to codes, for tensors on a GPU."""
interpreted_to_codes: Any = InterpretedFunction(_to_codes)
"""The same in the interpreter."""
