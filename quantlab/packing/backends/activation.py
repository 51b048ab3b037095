"""Activations to codes: min(max(round(x / s) + z, 0), quant_max) in one pass, bit for bit as the simulation rounds.

The quotient is a true division: x (1 / s) lands on the other side of a tie for a few values in a million. A SiLU before
it can be taken into the pass; the compiled one gives the numbers of torch's own, which a probe shows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ToCodes = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""x [n], scale [], zero point [] and largest code [] to uint8 [n]."""

COMPILED_FROM_ELEMENTS = 1 << 14
"""Below this the call of a compiled function costs more than the passes it saves."""
_COMPILED_TO_ELEMENTS = 1 << 31
"""The compiled functions count in 32 bits."""


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor) -> Tensor:
    """Codes, uint8 in the shape of x."""
    steps = torch.round(x / scale).add(zero_point)
    # Compared, and bounded below as integers: clamping floats, which looks for NaN, takes a third of the time.
    return torch.where(steps < quant_max, steps, quant_max).to(torch.int32).clamp(min=0).to(torch.uint8)


def silu_to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor) -> Tensor:
    """Codes of x * sigmoid(x)."""
    return to_codes(F.silu(x), scale, zero_point, quant_max)


@dataclass(frozen=True)
class ActivationKernel:
    """Turns activations of any layout into codes of the same layout.

    Attributes:
        compiled: the one-pass forms of ``to_codes`` and ``silu_to_codes`` that work here; the others take plain passes.
        why: what stood in the way of those, "" otherwise.
    """

    compiled: Mapping[ToCodes, ToCodes]
    why: str = ""

    def __call__(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor, *, silu: bool = False
    ) -> Tensor:
        """Codes of x, or of its SiLU: uint8."""
        # Elementwise work on the memory as it lies: one compiled function serves every shape and layout.
        order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
        dense = x.detach().permute(order).contiguous()
        run = silu_to_codes if silu else to_codes
        if COMPILED_FROM_ELEMENTS <= x.numel() < _COMPILED_TO_ELEMENTS:
            run = self.compiled.get(run, run)
        codes = run(dense.view(-1), scale, zero_point, quant_max).view(dense.shape)
        return codes.permute(sorted(range(x.dim()), key=order.__getitem__))


@functools.cache
def activation_kernel() -> ActivationKernel:
    """The kernel of this machine: compiled where that works and gives the codes of the plain one on a probe."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor(0.037)
    parameters = scale, torch.tensor(121.0), torch.tensor(255.0)
    # Quarters of a step: many values lie on ties, and an odd zero point tells rounding before it from rounding after.
    x = torch.randint(-1024, 2048, (1 << 14,), generator=rng) / 4 * scale
    compiled: dict[ToCodes, ToCodes] = {}
    for plain in (to_codes, silu_to_codes):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = _compile(plain, x, *parameters)
                # Also a size that it was not compiled for, and that no length of a vector divides.
                same = all(torch.equal(run(part, *parameters), plain(part, *parameters)) for part in (x, x[:-3]))
        except Exception as error:  # whatever a missing or foreign compiler raises
            why = f"torch.compile failed ({type(error).__name__}): activations take several passes"
            return ActivationKernel(compiled, why)
        if not same:
            return ActivationKernel(compiled, "a compiled activation quantizer gives other codes")
        compiled[plain] = run
    return ActivationKernel(compiled)


def _compile(plain: ToCodes, x: Tensor, *parameters: Tensor) -> ToCodes:
    """One function for every size of x."""
    compiled: Any = torch.compile(plain, dynamic=True, fullgraph=True)
    if not hasattr(compiled, "aot_compile"):
        return compiled
    # Compiled ahead, a call takes a tenth of the time: there are no guards to evaluate. What they would ask for holds
    # in every call: x is dense, float32 and one-dimensional, its size within the bounds.
    example = x.clone()
    torch._dynamo.mark_dynamic(example, 0)
    ahead = compiled.aot_compile(((example, *parameters), {}))
    ahead.disable_guard_check()
    return ahead
