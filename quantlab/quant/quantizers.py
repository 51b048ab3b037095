"""The affine quantizer: x_hat = scale * (q - zero_point), per tensor, per channel or per timestep."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from quantlab.contracts.config import Strict
from quantlab.contracts.quant import PerChannel, QParams, QuantSpec
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sections import FreeZeroPoints, Pack, ScaleType
from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.quant.functional import MIN_SCALE, PERCENTILE, fake_quantize, per_channel, search_scale
from quantlab.quant.timestep import group_by_timestep, nearest_index


class AffineConfig(Strict):
    """Options of the affine quantizer; what it quantizes to stands in ``weights`` and ``activations``."""

    search_elements: int = Field(
        8192, ge=256, description="elements of a per-tensor range's MSE search; longer tensors are thinned evenly"
    )
    percentile: float = Field(
        PERCENTILE, gt=50, le=100, description="upper end of the range of the observer `percentile`, in %"
    )
    compiled: bool = Field(
        False,
        description="let torch compile the arithmetic: faster after some seconds at the start; the gradients of scales "
        "and zero points round otherwise",
    )


class AffineQuantizer(Quantizer):
    """Uniform asymmetric quantization with a scale and a zero point."""

    name: ClassVar[str] = "affine"
    paper: ClassVar[str | None] = "EfficientDM's TALSQ for per-timestep scales, arXiv 2310.03270, equation 9"
    Config = AffineConfig

    scale: nn.Parameter
    zero_point: nn.Parameter
    bits: Tensor
    timesteps: Tensor

    def __init__(self, spec: QuantSpec, bits: int | Tensor, config: AffineConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.register_buffer("bits", torch.as_tensor(bits, dtype=torch.int8))
        shape = self.bits.shape if isinstance(spec.granularity, PerChannel) else torch.Size()
        self.scale = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.zero_point = nn.Parameter(torch.zeros(shape), requires_grad=False)
        if spec.per_timestep:
            self.register_buffer("timesteps", torch.zeros(0))
        self._scale_bytes = self.scale.itemsize
        self._seen: list[tuple[Tensor, Tensor | None]] = []

    @classmethod
    def from_spec(cls, spec: QuantSpec, bits: int | Tensor, config: AffineConfig) -> AffineQuantizer:
        """A quantizer without a range yet."""
        return cls(spec, bits, config)

    @property
    def quant_max(self) -> Tensor:
        """Largest code, the shape of ``bits``."""
        return 2.0 ** self.bits.to(self.scale.dtype) - 1

    def observe(self, x: Tensor, timestep: Tensor | None = None) -> None:
        """Keep x [B, ...], and its timesteps [B] when scales depend on them, until ``freeze``."""
        if self.spec.per_timestep and timestep is None:
            raise QuantlabError(
                "per-timestep scales need a timestep",
                where="activations.per_timestep",
                next_step="set it to false for a model without a timestep input",
            )
        self._seen.append((x.detach(), timestep))

    def freeze(self) -> None:
        """Find scale and zero point from everything observed."""
        values = torch.cat([x for x, _ in self._seen])
        if isinstance(self.spec.granularity, PerChannel):
            rows = values.transpose(0, self.spec.granularity.axis).flatten(1)
            scale, zero_point = search_scale(
                rows, self.bits, self.spec.observer, percentile=self.config.percentile, compiled=self.config.compiled
            )
        elif self.spec.per_timestep:
            timestep = torch.cat([t for _, t in self._seen if t is not None])
            scale, zero_point = self._search_each_timestep(values, timestep)
        else:
            scale, zero_point = (found[0] for found in self._search_tensor(values))
        self.scale.data, self.zero_point.data = scale, zero_point
        self._seen.clear()

    def _search_tensor(self, values: Tensor) -> tuple[Tensor, Tensor]:
        row = values.reshape(1, -1)
        return search_scale(
            row,
            self.bits.view(1),
            self.spec.observer,
            self.config.search_elements,
            percentile=self.config.percentile,
            compiled=self.config.compiled,
        )

    def _search_each_timestep(self, values: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        self.timesteps, groups = group_by_timestep(values, timestep)
        if self.spec.share_start:
            scale, zero_point = self._search_tensor(values)
            return scale.repeat(len(groups)), zero_point.repeat(len(groups))
        found = [self._search_tensor(group) for group in groups]
        return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x [B, ...]; a per-timestep quantizer needs ``timestep`` [B]."""
        scale, zero_point, quant_max = self.scale, self.zero_point, self.quant_max
        if self.spec.per_timestep:
            assert timestep is not None, "the engine threads the timestep to every layer"
            if timestep.shape[:1] != x.shape[:1]:
                raise QuantlabError(
                    "the timestep must have one value for each sample",
                    got=f"{tuple(timestep.shape)} for an input of {tuple(x.shape)}",
                    next_step="set activations.per_timestep to false",
                )
            index = nearest_index(self.timesteps, timestep)
            scale = per_channel(scale.index_select(0, index), x.dim())
            zero_point = per_channel(zero_point.index_select(0, index), x.dim())
        elif isinstance(self.spec.granularity, PerChannel):
            axis = self.spec.granularity.axis
            scale, zero_point = per_channel(scale, x.dim(), axis), per_channel(zero_point, x.dim(), axis)
            quant_max = per_channel(quant_max, x.dim(), axis)
        return fake_quantize(
            x,
            scale,
            zero_point,
            quant_max,
            round_zero_point=self.spec.round_zero_point,
            compiled=self.config.compiled,
        )

    def round_parameters(self) -> None:
        """Put the zero points at their rounded values, when forward rounds them anyway."""
        if self.spec.round_zero_point:
            self.zero_point.data.round_()

    def store_as(self, settings: Pack) -> None:
        """Round scales to float16 and free zero points to integers, each if the settings say so.

        Raises:
            NonFiniteError: a scale does not fit into float16.
        """
        if settings.scales is ScaleType.FLOAT16:
            rounded = self.scale.data.half()
            if not bool((torch.isfinite(rounded) & (rounded > 0)).all()):
                raise NonFiniteError("a scale does not fit into float16", next_step="set pack.scales: float32")
            self.scale.data, self._scale_bytes = rounded.to(self.scale), rounded.itemsize
        if settings.free_zero_points is FreeZeroPoints.ROUND and not self.spec.round_zero_point:
            self.spec = replace(self.spec, round_zero_point=True)
            self.round_parameters()

    def constrain(self) -> None:
        """A scale stays positive: gradients may carry a small one past 0, where codes would change their sign."""
        self.scale.data.clamp_(min=MIN_SCALE)

    def qparams(self) -> QParams:
        """Scale, zero point and codes."""
        zero_point = self.zero_point.detach()
        return QParams(
            self.scale.detach(),
            zero_point.round() if self.spec.round_zero_point else zero_point,
            0,
            self.quant_max.to(torch.int64),
            self.spec.granularity.axis if isinstance(self.spec.granularity, PerChannel) else None,
            self.timesteps if self.spec.per_timestep else None,
            self.spec.round_zero_point,
            scale_bytes=self._scale_bytes,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        # A per-timestep table is as long as the calibration had timesteps.
        if self.spec.per_timestep and f"{prefix}scale" in state_dict:
            for name in ("scale", "zero_point", "timesteps"):
                mine = getattr(self, name)
                mine.data = torch.empty_like(state_dict[f"{prefix}{name}"], device=mine.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]
