"""Layers as products of int8 matrices: what is shifted comes back exactly, and patches are those of a convolution."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quantlab.packing.backends.int8 import Int8Weight, input_offset
from quantlab.packing.backends.int_mm import IntMmProduct
from quantlab.packing.backends.integers import ConvGeometry, InputGrid, IntegerPart, NotExecutable
from quantlab.packing.backends.reference import accumulate
from quantlab.packing.backends.rows import RowsProduct, agrees_for_any_rows, patches

CPU = torch.device("cpu")


def part_of(weight: Tensor, quant_max: int = 255, zero_point: int = 0) -> IntegerPart:
    grid = InputGrid(torch.ones(1), torch.tensor([zero_point], dtype=torch.int32), quant_max)
    channels = len(weight)
    zero_point, bits = torch.zeros(channels, dtype=torch.int32), torch.full((channels,), 8, dtype=torch.int8)
    return IntegerPart(weight.to(torch.int16), torch.ones(len(weight)), zero_point, bits, grid)


@given(st.integers(-400, 400), st.sampled_from([1, 3, 7, 15, 31, 63, 127, 255]))
def test_shifted_codes_are_int8(zero_point: int, quant_max: int) -> None:
    offset = input_offset(zero_point, quant_max)
    assert -offset >= -128 and quant_max - offset <= 127
    ends = quant_max - 127, 128
    assert offset == zero_point if ends[0] <= zero_point <= ends[1] else offset in ends


@given(st.integers(0, 2**20), st.sampled_from([15, 255]), st.integers(-300, 300), st.integers(-300, 300))
@settings(deadline=None)
def test_accumulators_are_exact(seed: int, quant_max: int, zero_point: int, lowest: int) -> None:
    """With scale 1 and sums below 2^24 the float32 output is the accumulator, wherever the zero points are."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, (5, 19), generator=rng) + lowest
    part = part_of(weight, quant_max, zero_point)
    codes = torch.randint(0, quant_max + 1, (3, 19), generator=rng).to(torch.uint8)
    product = RowsProduct.of(part, None, None, CPU, IntMmProduct.of)
    expected = accumulate(codes.int() - zero_point, weight, None)
    assert part.accumulator_bound < 2**24
    assert torch.equal(product(codes, 1.0, zero_point), expected.float())


def test_only_what_leaves_int8_has_a_residual() -> None:
    inside = Int8Weight.of(part_of(torch.tensor([[-128, 127], [0, 3]])), None, None)
    assert inside.residual is None and inside.values.tolist() == [[-128, 127], [0, 3]]
    beyond = Int8Weight.of(part_of(torch.tensor([[0, 255], [-200, -3], [1, 2]])), None, None)
    assert beyond.residual is not None and beyond.residual.tolist() == [128, -72, 0]
    assert (beyond.values + beyond.residual[:, None]).tolist() == [[0, 255], [-200, -3], [1, 2]]
    assert beyond.total.tolist() == [255, -203, 3]


def test_int8_sums_that_could_leave_int32_are_refused() -> None:
    """Tensor cores may saturate, so a bound of the final sum is not enough."""
    weight = torch.zeros(1, 2**17 + 1, dtype=torch.int16)
    weight[0, 0] = 255
    part = part_of(weight)
    assert part.accumulator_bound < 2**17 + 1
    with pytest.raises(NotExecutable, match="more than int32 holds"):
        Int8Weight.of(part, None, None)


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)
)  # fmt: skip
@settings(deadline=None)
def test_patches_are_those_of_a_convolution(
    channels: int, height: int, width: int, stride: int, padding: int, dilation: int
) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (2, channels, 6, 7), generator=rng)
    geometry = ConvGeometry((stride, 1), (padding, 1), (dilation, 1), 1)
    found = patches(x, geometry, (height, width), 0)
    columns = F.unfold(x.double(), (height, width), (dilation, 1), (padding, 1), (stride, 1))
    expected = columns.view(2, channels, height * width, -1).permute(0, 3, 2, 1)
    assert torch.equal(found.double().flatten(1, 2), expected.flatten(2))


def test_what_int8_has_no_form_for_is_refused() -> None:
    weight = torch.ones(2, 1, 3, 3)
    padded = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    with pytest.raises(NotExecutable, match="padded border would need the code -40"):
        RowsProduct.of(part_of(weight, 255, -40), None, padded, CPU, IntMmProduct.of)
    RowsProduct.of(part_of(weight, 15, -40), None, padded, CPU, IntMmProduct.of)
    RowsProduct.of(part_of(weight, 255, -40), None, replace(padded, padding=(0, 0)), CPU, IntMmProduct.of)
    with pytest.raises(NotExecutable, match="grouped"):
        RowsProduct.of(part_of(weight), None, replace(padded, groups=2), CPU, IntMmProduct.of)


def test_a_kernel_of_its_own_for_many_rows_is_compared() -> None:
    weight = Int8Weight.of(part_of(torch.arange(-20, 20).view(4, 10)), None, None)
    right = IntMmProduct.of(weight)

    @dataclass(frozen=True)
    class Wrong:
        def __call__(self, rows: Tensor, scale: float, shift: int) -> Tensor:
            output = right(rows, scale, shift)
            return output if len(rows) < 128 else output * (1 + 1e-6)

        def held_bytes(self) -> int:
            return 0

    assert agrees_for_any_rows(right, 10, CPU)
    assert not agrees_for_any_rows(Wrong(), 10, CPU)
