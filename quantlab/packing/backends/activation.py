"""Activations to codes: min(max(round(x / s) + z, 0), quant_max) in one pass, bit for bit as the simulation rounds.

The quotient is a true division: x (1 / s) lands on the other side of a tie for a few values in a million.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ToCodes = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""x [n] or [rows, channels], scale [], zero point [], largest code [] and reciprocal smoothing [channels] or None."""

COMPILED_FROM_ELEMENTS = 1 << 16
"""Below this the call of a compiled function costs more than the passes it saves."""


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor, reciprocal: Tensor | None) -> Tensor:
    """Codes, uint8 in the shape of x; ``reciprocal`` of the smoothing scales multiplies the last dimension before."""
    if reciprocal is not None:
        x = x * reciprocal
    return torch.round(x / scale).add(zero_point).clamp(torch.zeros_like(quant_max), quant_max).to(torch.uint8)


@dataclass(frozen=True)
class ActivationKernel:
    """Turns dense activations of any layout into codes of the same layout.

    Attributes:
        compiled: the one-pass function, or None where there is no compiler.
        why: what stood in its way, "" otherwise.
    """

    compiled: ToCodes | None
    why: str = ""

    def __call__(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor, reciprocal: Tensor | None = None
    ) -> Tensor:
        """Codes of x, uint8; the channels of ``reciprocal`` are dimension 1 of four, the last of others."""
        channels_last = x.dim() == 4 and (reciprocal is not None or not x.is_contiguous())
        # Elementwise work on the memory as it lies: one compiled function serves every shape and layout.
        dense = x.permute(0, 2, 3, 1).contiguous() if channels_last else x.contiguous()
        flat = dense.view(-1) if reciprocal is None else dense.view(-1, dense.shape[-1])
        run = to_codes if self.compiled is None or x.numel() < COMPILED_FROM_ELEMENTS else self.compiled
        codes = run(flat, scale, zero_point, quant_max, reciprocal).view(dense.shape)
        return codes.permute(0, 3, 1, 2) if channels_last else codes


@functools.cache
def activation_kernel() -> ActivationKernel:
    """The kernel of this machine: compiled where that works and gives the codes of the plain one on a probe."""
    compiled = torch.compile(to_codes, dynamic=True)
    rng = torch.Generator().manual_seed(0)
    scale, zero_point, quant_max = torch.tensor(0.037), torch.tensor(121.0), torch.tensor(255.0)
    # Quarters of a step: many values lie on ties, and an odd zero point tells rounding before it from rounding after.
    rows = torch.randint(-1024, 2048, (257, 64), generator=rng) / 4 * scale
    smoothing = torch.rand(64, generator=rng) + 0.5
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x, reciprocal in ((rows.view(-1), None), (rows, smoothing)):
                arguments = (x, scale, zero_point, quant_max, reciprocal)
                if not torch.equal(compiled(*arguments), to_codes(*arguments)):
                    return ActivationKernel(None, "the compiled activation quantizer gives other codes")
    except Exception as error:  # whatever a missing or foreign compiler raises
        return ActivationKernel(None, f"torch.compile failed ({type(error).__name__}): activations take five passes")
    return ActivationKernel(compiled)
