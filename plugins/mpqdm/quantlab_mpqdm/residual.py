"""Residual mixed quantization: a coarse affine quantizer and binary corrections with scales of their own.

Feng et al., MPQ-DMv2, arXiv 2507.04290, framework figure ("flexible Z-order residual mixed quantization"). A channel of
n - 1 bits, n bits or n + 1 bits has Q_{n-1} and no, one or two planes B(r) = alpha sign(r) of what is left. The scale
of a plane and how the base is found are not in the figure: guesses, marked so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from quantlab import (
    Observer,
    PerChannel,
    QParams,
    Quantizer,
    QuantSpec,
    RecipeError,
    Strict,
    search_scale,
    zero_point_bytes,
)
from quantlab_mpqdm.corrections import PLANES, base_quantize, column, fit_corrections, joint_search, sign

MIN_SCALE = 1e-8
"""Smallest scale in training."""


class ResidualConfig(Strict):
    """Options of the ``residual`` quantizer."""

    joint: bool = Field(
        default=True,
        description="with the mse observer: the base's range is the one whose error is least after the corrections, "
        "not before; guess",
    )
    decide: bool = Field(
        default=True,
        description="a layer keeps plain affine quantization at the same bits unless its output error is larger",
    )
    up_to_bits: int = Field(
        default=4, ge=1, le=8, description="layers whose narrowest channel has more bits are plain affine; guess"
    )


@dataclass(frozen=True)
class Fit:
    """Values of everything that is stored.

    Attributes:
        base_bits: int8 [out].
        scale: of the base [out].
        zero_point: of the base [out].
        residual_scale: alpha of every plane [PLANES, out], 0 where there is none.
    """

    base_bits: Tensor
    scale: Tensor
    zero_point: Tensor
    residual_scale: Tensor


class ResidualQuantizer(Quantizer):
    """Affine codes of the narrowest channels' width, and a binary correction for each further bit of the others."""

    name: ClassVar[str] = "residual"
    paper: ClassVar[str | None] = "MPQ-DMv2, arXiv 2507.04290, framework figure; scales and search are guesses"
    Config = ResidualConfig

    bits: Tensor
    base_bits: Tensor

    def __init__(self, spec: QuantSpec, bits: Tensor, config: ResidualConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.register_buffer("bits", bits)
        self.register_buffer("base_bits", bits.clone())
        self.scale = nn.Parameter(torch.ones(bits.shape), requires_grad=False)
        self.zero_point = nn.Parameter(torch.zeros(bits.shape), requires_grad=False)
        self.residual_scale = nn.Parameter(torch.zeros(PLANES, *bits.shape), requires_grad=False)
        self._seen: list[Tensor] = []
        self._plain: Fit | None = None

    @classmethod
    def from_spec(cls, spec: QuantSpec, bits: int | Tensor, config: ResidualConfig) -> ResidualQuantizer:
        """A quantizer without a range yet; raises RecipeError for anything but a weight with a scale a channel."""
        if spec.granularity != PerChannel(0) or not isinstance(bits, Tensor):
            raise RecipeError(
                'the quantizer "residual" is for weights',
                where="activations.quantizer",
                next_step="set activations.quantizer: affine",
            )
        return cls(spec, bits.to(torch.int8), config)

    @property
    def planes(self) -> Tensor:
        """Binary corrections of each channel [out]."""
        return self.bits - self.base_bits

    def observe(self, x: Tensor, timestep: Tensor | None = None) -> None:
        """Keep the weight [out, ...] until ``freeze``."""
        self._seen.append(x.detach())

    def freeze(self) -> None:
        """Find base and corrections; layers that have no corrections are plain affine."""
        rows = torch.cat(self._seen).flatten(1).float()
        self._seen.clear()
        plain = self._fit_plain(rows)
        base_bits = _base_bits(self.bits, self.config.up_to_bits)
        if torch.equal(base_bits, self.bits):
            self._put(plain)
            return
        self._put(self._fit_residual(rows, base_bits))
        self._plain = plain if self.config.decide else None

    def choose(self, output_error: Callable[[], float]) -> None:
        """Plain affine quantization at the same bits, unless corrections give the smaller output error."""
        if self._plain is None:
            return
        residual, plain, self._plain = self._fit(), self._plain, None
        error = output_error()
        self._put(plain)
        if error < output_error():
            self._put(residual)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantize and dequantize a weight [out, ...].

        Gradients: for x, scale and zero point those of the base (``base_quantize``), for a correction's scale the sign;
        signs are constants.
        """
        values = base_quantize(
            x, self.scale, self.zero_point, self.base_bits, round_zero_point=self.spec.round_zero_point
        )
        for plane, alpha in enumerate(self.residual_scale):
            alpha = torch.where(self.planes > plane, alpha, torch.zeros_like(alpha))
            values = values + (column(alpha, x.dim()) * sign(x.detach() - values.detach())).to(x.dtype)
        return values

    def round_parameters(self) -> None:
        """Put the zero points at their rounded values, when forward rounds them anyway."""
        if self.spec.round_zero_point:
            self.zero_point.data.round_()

    def constrain(self) -> None:
        """Scales stay positive, and those of corrections at least 0."""
        self.scale.data.clamp_(min=MIN_SCALE)
        self.residual_scale.data.clamp_(min=0)

    def qparams(self) -> QParams | None:
        """None: codes, scale and zero point do not tell the whole."""
        return None

    def extra_bytes(self) -> int:
        """Zero points as the accounting counts them, float32 scales of corrections, and whether there are any."""
        zero_point = self.zero_point.detach()
        each = zero_point_bytes(
            zero_point.round() if self.spec.round_zero_point else zero_point, self.spec.round_zero_point
        )
        return len(self.bits) * each + 4 * int(self.planes.sum()) + 1

    def _fit(self) -> Fit:
        return Fit(self.base_bits, self.scale.data, self.zero_point.data, self.residual_scale.data)

    def _put(self, fit: Fit) -> None:
        self.base_bits = fit.base_bits
        self.scale.data, self.zero_point.data = fit.scale, fit.zero_point
        self.residual_scale.data = fit.residual_scale

    def _fit_plain(self, rows: Tensor) -> Fit:
        scale, zero_point = search_scale(rows, self.bits, self.spec.observer)
        return Fit(self.bits.clone(), scale, zero_point, torch.zeros_like(self.residual_scale))

    def _fit_residual(self, rows: Tensor, base_bits: Tensor) -> Fit:
        scale, zero_point = search_scale(rows, base_bits, self.spec.observer)
        planes = self.bits - base_bits
        if self.config.joint and self.spec.observer is Observer.MSE:
            scale, zero_point = joint_search(
                rows, base_bits, planes, (scale, zero_point), round_zero_point=self.spec.round_zero_point
            )
        base = base_quantize(rows, scale, zero_point, base_bits, round_zero_point=self.spec.round_zero_point)
        return Fit(base_bits, scale, zero_point, fit_corrections(rows, base, planes)[0])


def _base_bits(bits: Tensor, up_to_bits: int) -> Tensor:
    """Bits of the base: the narrowest channel's, one less where all are normal; ``bits`` where nothing is corrected.

    A layer without mixed widths has n bits throughout, so its base has n - 1.
    """
    narrowest, widest = int(bits.min()), int(bits.max())
    if narrowest > up_to_bits or widest == 1:
        return bits.clone()
    base = narrowest if widest > narrowest else narrowest - 1
    # Offsets beyond one bit, of another policy, leave more than the planes can hold to the base.
    return torch.clamp(bits - PLANES, min=base)
