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
    fake_quantize,
    search_scale,
    zero_point_bytes,
)

PLANES = 2
"""Binary corrections of a salient channel."""
NUM_CANDIDATES = 80
"""Shrunken ranges of the joint search, as in the engine's: 1.00, 0.99, ..., 0.21 of the full range."""
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
            values = values + (_column(alpha, x.dim()) * _sign(x.detach() - values.detach())).to(x.dtype)
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


def base_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, *, round_zero_point: bool) -> Tensor:
    """scale * (q - zero_point) with q = clamp(round(x / scale + zero_point), 0, 2^bits - 1), the shape of x.

    A free zero point stands inside the rounding, so that a channel has 2^bits levels. ``fake_quantize`` adds it after,
    as the released MPQ-DM does; a fraction then gives the clamp's two borders beside the codes between them: one level
    more than the bits can tell. The gradients are those of ``fake_quantize``.

    Args:
        x: [out, ...].
        scale: [out].
        zero_point: [out].
        bits: [out].
        round_zero_point: round it, with a straight-through gradient.
    """
    dims = x.dim()
    step, levels = _column(scale, dims), _column(2.0 ** bits.to(scale.dtype) - 1, dims)
    if round_zero_point:
        return fake_quantize(x, step, _column(zero_point, dims), levels, round_zero_point=True)
    shift = _column(scale * zero_point, dims)
    return (fake_quantize(x + shift, step, torch.zeros_like(step), levels) - shift).to(x.dtype)


def fit_corrections(rows: Tensor, base: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the corrections and the corrected rows.

    The scale of a plane is alpha = mean |r| of what is left, which makes alpha sign(r) the nearest to r in squared
    error; the figure does not say, so a guess.

    Args:
        rows: [R, n].
        base: their base quantization [R, n].
        planes: how many corrections each row has [R].

    Returns:
        [PLANES, R], 0 where a row has no such plane, and [R, n].
    """
    scales, values = [], base
    for plane in range(PLANES):
        left = rows - values
        alpha = torch.where(planes > plane, left.abs().mean(1), torch.zeros_like(left[:, 0]))
        values = values + alpha[:, None] * _sign(left)
        scales.append(alpha)
    return torch.stack(scales), values


def joint_search(
    rows: Tensor, base_bits: Tensor, planes: Tensor, start: tuple[Tensor, Tensor], *, round_zero_point: bool
) -> tuple[Tensor, Tensor]:
    """Base scale and zero point [R] of the shrunken range with the least squared error after the corrections.

    Args:
        rows: [R, n].
        base_bits: of the base [R].
        planes: how many corrections each row has [R].
        start: scale and zero point to improve on; a constant row keeps them.
        round_zero_point: only integers are tried; a free one centres two levels on 0.
    """

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        base = base_quantize(rows, scale, zero_point, base_bits, round_zero_point=round_zero_point)
        return (rows - fit_corrections(rows, base, planes)[1]).square().mean(1)

    (best_scale, best_zero_point), levels = start, 2.0**base_bits - 1
    best = error(best_scale, best_zero_point)
    low, high = rows.amin(1), rows.amax(1)
    for index in range(NUM_CANDIDATES):
        factor = 1.0 - 0.01 * index
        scale = torch.where(high > low, (high - low) * factor / levels, best_scale)
        zero_point = torch.where(high > low, -low * factor / scale, best_zero_point)
        if round_zero_point:
            zero_point = zero_point.round()
        found = error(scale, zero_point)
        better = found < best
        best = torch.where(better, found, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


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


def _sign(values: Tensor) -> Tensor:
    """1 or -1: one bit has no 0."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def _column(values: Tensor, dims: int) -> Tensor:
    """[out] along the first of ``dims`` dimensions."""
    return values.view(-1, *(1,) * (dims - 1))
