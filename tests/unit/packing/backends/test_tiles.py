"""Packed tiles, and the kernel that reads them: in Triton's interpreter, and compiled for a GPU that is not there."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.packing.backends.activation import to_codes
from quantlab.packing.backends.int8 import Int8Weight
from quantlab.packing.backends.integers import InputGrid, IntegerPart
from quantlab.packing.backends.reference import accumulate
from quantlab.packing.backends.rows import RowsProduct, agrees_for_any_rows
from quantlab.packing.backends.tiles import ALIGNED_BYTES, CHANNELS, Tiles
from quantlab.packing.backends.triton_activation import triton_activation_kernel, triton_to_codes
from quantlab.packing.backends.triton_product import LANES, OPTIONS, TritonProduct, missing_triton

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(bool(missing_triton()), reason=missing_triton() or "triton is there")


def part_of(weight: Tensor, scale: Tensor, grid: InputGrid) -> IntegerPart:
    channels = len(weight)
    zero_point, bits = torch.zeros(channels, dtype=torch.int32), torch.full((channels,), 8, dtype=torch.int8)
    return IntegerPart(weight.to(torch.int16), scale, zero_point, bits, grid)


def of_widths(widths: Tensor, columns: int, rng: torch.Generator) -> Tensor:
    """int8 [out, columns], each row over the whole range of its width, beginning anywhere in int8."""
    levels = (2**widths)[:, None]
    codes = (torch.rand(len(widths), columns, generator=rng) * levels).long()
    codes[:, :2] = torch.cat([torch.zeros_like(levels), levels - 1], 1)
    lowest = -128 + (torch.rand(len(widths), 1, generator=rng) * (257 - levels)).long()
    return (codes + lowest).to(torch.int8)


@given(st.integers(1, 200), st.integers(2, 300), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_tiles_hold_the_matrix(out: int, columns: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 9, (out,), generator=rng)
    values = of_widths(widths, columns, rng)
    tiles = Tiles.of(values)
    assert torch.equal(tiles.unpacked(), values)
    assert torch.equal(tiles.order.sort().values.long(), torch.arange(out))
    covered = 0
    for width, first, channels, _ in tiles.table.tolist():
        assert first == covered and 1 <= channels <= CHANNELS
        assert (widths[tiles.order[first : first + channels].long()] == width).all()
        covered += channels
    assert covered == out


def test_size_of_tiles() -> None:
    rng = torch.Generator().manual_seed(0)
    widths = torch.tensor([3] * 70 + [4] * 50 + [5] * 8)
    tiles = Tiles.of(of_widths(widths, 256, rng))
    assert [row[0] for row in tiles.table.tolist()] == [3, 3, 4, 5]
    assert len(tiles.packed) == int((widths * 256).sum()) // 8
    assert tiles.width_mask == 0b111000


@needs_triton
@pytest.mark.parametrize(
    ("widths", "columns", "rows"),
    [([1, 2, 3, 4, 5, 6, 7, 8] * 3, 7, 5), ([3] * 65 + [4, 8], 301, 3), ([2, 5], 129, 130), ([7], 1024, 1)],
)
def test_accumulators_of_the_kernel_are_exact(widths: list[int], columns: int, rows: int) -> None:
    """With scale 1 and sums below 2^24 the output is the accumulator: columns, rows and channels that fill no block."""
    rng = torch.Generator().manual_seed(0)
    zero_point = 77
    weight = of_widths(torch.tensor(widths), columns, rng).to(torch.int16)
    # The last channel leaves int8.
    weight[-1] += 60
    part = part_of(weight, torch.ones(len(widths)), InputGrid(torch.ones(1), torch.tensor([zero_point]), 255))
    assert part.accumulator_bound < 2**26
    codes = torch.randint(0, 256, (rows, columns), generator=rng).to(torch.uint8)
    expected = accumulate(codes.int() - zero_point, weight, None)
    assert expected.abs().max() < 2**24
    product = RowsProduct.of(part, None, None, CPU, TritonProduct.of)
    assert torch.equal(product(codes, 1.0, zero_point), expected.float())


@needs_triton
def test_output_in_bfloat16() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = of_widths(torch.tensor([2, 2, 2]), 40, rng)
    part = part_of(weight, torch.rand(3, generator=rng), InputGrid(torch.ones(1), torch.tensor([0]), 127))
    product = TritonProduct.of(Int8Weight.of(part, torch.randn(3, generator=rng), None))
    rows = torch.randint(0, 128, (2, 40), generator=rng, dtype=torch.int8)
    full, half = product(rows, 0.1, 3), replace(product, output=torch.bfloat16)(rows, 0.1, 3)
    assert half.dtype == torch.bfloat16
    # The interpreter cuts digits off where a GPU rounds.
    torch.testing.assert_close(half.float(), full, rtol=2**-7, atol=0)


@needs_triton
def test_the_number_of_rows_does_not_matter() -> None:
    weight = torch.arange(-20, 20).view(4, 10)
    part = part_of(weight, torch.ones(4), InputGrid(torch.ones(1), torch.tensor([0]), 255))
    assert agrees_for_any_rows(TritonProduct.of(Int8Weight.of(part, None, None)), 10, CPU)


@needs_triton
def test_a_kernel_that_fails_is_an_error_of_the_operator() -> None:
    """So that a layer's verification finds it, as it does those of torch's operators."""
    part = part_of(torch.ones(2, 9), torch.ones(2), InputGrid(torch.ones(1), torch.tensor([0]), 255))
    product = TritonProduct.of(Int8Weight.of(part, None, None))
    broken = replace(product.tiles, packed=None)
    with pytest.raises(RuntimeError, match="Triton fails with InterpreterError"):
        replace(product, tiles=broken)(torch.ones(1, 9, dtype=torch.int8), 1.0, 0)


@needs_triton
def test_codes_of_activations() -> None:
    """Those of plain torch, on ties and far outside the codes."""
    assert triton_activation_kernel("cpu").why == ""
    scale, zero_point, quant_max = torch.tensor(0.037), torch.tensor(11.0), torch.tensor(15.0)
    near, far = torch.arange(-640, 641) / 4 * scale, torch.tensor([-1e30, -3e6, 1e7, 1e30])
    x = torch.cat([near, torch.randn(3000, generator=torch.Generator().manual_seed(0)), far])
    found = triton_to_codes(x, scale, zero_point, quant_max)
    assert found.dtype == torch.uint8
    assert torch.equal(found, to_codes(x, scale, zero_point, quant_max))


@needs_triton
def test_the_kernel_compiles_to_int8_tensor_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For compute capability 9.0: no GPU is needed to compile. Weights are the operand in registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from quantlab.packing.backends.triton_kernel import tile_product

    monkeypatch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path))
    names = list(tile_product.arg_names)
    constants = {
        "WIDTHS": 1 << 3,
        "ROWS": 16,
        "CHANNELS": CHANNELS,
        "LANES": LANES,
        "ALIGNED_BYTES": ALIGNED_BYTES,
        "HAS_RESIDUAL": False,
        "HAS_BIAS": True,
    }
    pointers = dict.fromkeys(("table", "order", "lowest", "residual", "row_sums", "total"), "*i32")
    pointers |= {"rows": "*i8", "packed": "*u8", "scale": "*fp32", "bias": "*fp32", "output": "*fp32"}
    types = dict.fromkeys(names, "i32") | pointers | dict.fromkeys(constants, "constexpr") | {"input_scale": "fp32"}
    aligned = [*pointers, "columns", "lanes", "channels"]
    source = ASTSource(
        tile_product,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    text = compiled.asm["ptx"]
    # Sums, then the weights, both lists of registers; then the inputs, in shared memory.
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n16k32\.s32\.s8\.s8 \{[^}]*\}, *(\{?)", text)
    assert len(products) == 8 and set(products) == {"{"}
    # Packed bytes come sixteen at a time; a load of single bytes would be the end of every gain.
    assert "ld.global.b8" not in text and "cp.async.cg.shared.global" in text
    assert compiled.metadata.shared < 100 * 1024
