"""A quantizer: how a tensor becomes integers."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from quantlab import PerChannel, QParams, Quantizer, QuantSpec, RecipeError, Strict, fake_quantize


class OutsideQuantizerConfig(Strict):
    """Options of the quantizer."""

    shrink: float = Field(default=1.0, gt=0, le=1, description="share of the full range that is kept")


class OutsideQuantizer(Quantizer):
    """Symmetric codes: as many steps below 0 as above, up to the largest magnitude."""

    name: ClassVar[str] = "outside-quantizer"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = OutsideQuantizerConfig

    bits: Tensor

    def __init__(self, spec: QuantSpec, bits: int | Tensor, config: OutsideQuantizerConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.register_buffer("bits", torch.as_tensor(bits, dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(self.bits.shape), requires_grad=False)
        self._largest: list[Tensor] = []

    @classmethod
    def from_spec(
        cls,
        spec: QuantSpec,
        bits: int | Tensor,
        config: OutsideQuantizerConfig,
    ) -> OutsideQuantizer:
        """A quantizer without a range yet; raises RecipeError for scales by timestep."""
        if spec.per_timestep:
            raise RecipeError(
                'the quantizer "outside-quantizer" has no scales by timestep',
                where="activations.per_timestep",
                next_step="set it to false",
            )
        return cls(spec, bits, config)

    def observe(self, x: Tensor, timestep: Tensor | None = None) -> None:
        """Take the magnitudes of x [B, ...] into account."""
        size = x.detach().abs()
        if isinstance(self.spec.granularity, PerChannel):
            size = size.movedim(self.spec.granularity.axis, 0).flatten(1).amax(1)
        self._largest.append(size if size.dim() == self.scale.dim() else size.amax())

    def freeze(self) -> None:
        """The largest magnitude is the end of the range."""
        largest = torch.stack(self._largest).amax(0).to(self.scale.dtype)
        self._largest.clear()
        self.scale.data = (self.config.shrink * largest / self.zero_point()).clamp(min=1e-8)

    def zero_point(self) -> Tensor:
        """The code of 0, in the middle of the range."""
        return 2.0 ** (self.bits.to(self.scale.dtype) - 1)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x [B, ...], with a straight-through gradient."""
        scale, zero_point = self.scale, self.zero_point()
        if isinstance(self.spec.granularity, PerChannel):
            shape = [1] * x.dim()
            shape[self.spec.granularity.axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return fake_quantize(x, scale, zero_point, 2 * zero_point - 1)

    def constrain(self) -> None:
        """A scale stays positive."""
        self.scale.data.clamp_(min=1e-8)

    def qparams(self) -> QParams:
        """Scale, zero point and codes."""
        top, granularity = 2 * self.zero_point() - 1, self.spec.granularity
        axis = granularity.axis if isinstance(granularity, PerChannel) else None
        return QParams(self.scale.detach(), self.zero_point(), 0, top.to(torch.int64), axis)
