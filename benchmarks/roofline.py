"""What a GPU can do at most, measured on it: a copy of memory and a large product of int8 matrices."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ROUNDS = 20
_COPIED_BYTES = 1 << 30
_MATRIX = 8192


@dataclass(frozen=True)
class Roofline:
    """Bounds of a device.

    Attributes:
        operations_per_second: int8 multiplications and additions.
        bytes_per_second: read and written.
    """

    operations_per_second: float
    bytes_per_second: float

    def seconds(self, operations: float, moved_bytes: float) -> float:
        """The least time for work that does so much and moves so much."""
        return max(operations / self.operations_per_second, moved_bytes / self.bytes_per_second)

    def __str__(self) -> str:
        return f"{self.operations_per_second / 1e12:.0f} int8 TOPS, {self.bytes_per_second / 1e12:.2f} TB/s"


def measured_roofline() -> Roofline:
    """The bounds of the current GPU."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Random numbers: a product of zeros draws less power and runs faster.
    shape = _MATRIX, _MATRIX
    left, right = (torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda") for _ in range(2))
    product = _median_seconds(lambda: torch._int_mm(left, right.t()))
    copy = _median_seconds(lambda: target.copy_(source))
    return Roofline(2 * _MATRIX**3 / product, 2 * _COPIED_BYTES / copy)


def _median_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)
