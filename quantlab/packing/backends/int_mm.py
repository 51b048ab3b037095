"""Integer products through ``torch._int_mm``: int8 by int8 into int32, on a GPU through cuBLAS.

The operator is private to torch, so it is looked for, and each layer is compared with the reference before it is used.
On the CPU it exists too and is slow; there it lets the arithmetic be tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.packing.backends.int8 import Int8Weight

MULTIPLE = 8
"""The operator takes columns and output channels in multiples of it on a GPU."""
LEAST_ROWS = 17
"""It refuses fewer rows on a GPU."""


def missing_int_mm() -> str:
    """What torch lacks, "" when nothing."""
    return "" if hasattr(torch, "_int_mm") else "this torch has no _int_mm"


@dataclass(frozen=True)
class IntMmProduct:
    """A weight unpacked to int8 once.

    Attributes:
        weight: the matrix, filled up with zero columns and zero channels.
    """

    weight: Int8Weight

    @classmethod
    def of(cls, weight: Int8Weight) -> IntMmProduct:
        """The product of a matrix."""
        out, columns = weight.values.shape
        return cls(replace(weight, values=F.pad(weight.values, (0, -columns % MULTIPLE, 0, -out % MULTIPLE))))

    def __call__(self, rows: Tensor, scale: float, shift: int) -> Tensor:
        """Float32 [n, out] of int8 rows [n, k]."""
        weight = self.weight
        filled = F.pad(rows, (0, -rows.shape[1] % MULTIPLE, 0, max(LEAST_ROWS - len(rows), 0)))
        sums = torch._int_mm(filled, weight.values.t())[: len(rows), : len(weight.total)]
        output = (sums + weight.corrections(rows, shift)).float().mul_(weight.scale * scale)
        return output if weight.bias is None else output.add_(weight.bias)

    def held_bytes(self) -> int:
        """Bytes of weights, scales and bias, the filling counted."""
        return self.weight.held_bytes()
