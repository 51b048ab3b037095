"""Layers that compute in integers; they stand at the paths of the quantized layers they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.packing.backends.activation import ActivationKernel
from quantlab.packing.backends.integers import ConvGeometry, InputGrid, IntegerSite, Rows
from quantlab.quant.branch import LowRankBranch


class Product(Protocol):
    """The integer product of one part of a layer."""

    def __call__(self, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        """uint8 codes, input scale and input zero point to the float32 output."""
        ...

    def held_bytes(self) -> int:
        """Bytes of weights, scales and bias."""
        ...


class _Branch(nn.Module):
    """A low-rank product in float, beside the integers."""

    A: Tensor
    B: Tensor

    def __init__(self, branch: LowRankBranch, geometry: ConvGeometry | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("A", branch.A.detach().clone())
        self.register_buffer("B", branch.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.geometry is None:
            return F.linear(F.linear(x, self.A), self.B)
        places = self.geometry
        inner = F.conv2d(x, self.A, None, places.stride, places.padding, places.dilation, places.groups)
        return F.conv2d(inner, self.B, groups=places.groups)


class RowLookup(nn.Module):
    """Finds the rows of a per-timestep table."""

    def __init__(self, grid: InputGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, timestep: Tensor | None) -> Rows:
        """``timestep`` [B], None for a grid without timesteps."""
        return self.grid.rows(timestep)


class Encoder(nn.Module):
    """Turns the input of one part of a layer into codes.

    Args:
        grid: of the codes.
        kernel: computes them.
        reciprocal: of the smoothing scales [in], or None. The simulation multiplies by reciprocals: so must this.
        channels: the dimension that they belong to.
    """

    def __init__(self, grid: InputGrid, kernel: ActivationKernel, reciprocal: Tensor | None, channels: int) -> None:
        super().__init__()
        self.grid, self.kernel, self.channels, self.reciprocal = grid, kernel, channels, reciprocal
        self._rows = list(zip(grid.scale.unbind(), grid.zero_point.float().unbind(), strict=True))
        self._quant_max = torch.tensor(float(grid.quant_max))

    def forward(self, x: Tensor, rows: Rows, silu: bool = False) -> Tensor:
        """Codes of x, or of its SiLU: uint8 in the shape and the memory layout of x."""
        if self.reciprocal is not None:
            x, silu = smoothed(F.silu(x) if silu else x, self.reciprocal, self.channels), False
        if len(rows) == 1:
            return self._encode(x, rows[0][0], silu)
        codes = torch.empty_like(x, dtype=torch.uint8)
        for row, samples in rows:
            codes[samples] = self._encode(x[samples], row, silu)
        return codes

    def zero(self) -> int:
        """The code of 0 under a grid of one row."""
        return int(self._encode(torch.zeros(()), 0, False))

    def _encode(self, x: Tensor, row: int, silu: bool) -> Tensor:
        return self.kernel(x, *self._rows[row], self._quant_max, silu=silu)


class Multiplier(nn.Module):
    """The integer product of one part of a layer, with the input scale that each sample has.

    Args:
        grid: of the codes.
        product: multiplies them.
    """

    def __init__(self, grid: InputGrid, product: Product) -> None:
        super().__init__()
        self.product = product
        self._rows = list(zip(grid.scale.tolist(), grid.zero_point.tolist(), strict=True))

    def forward(self, codes: Tensor, rows: Rows) -> Tensor:
        """uint8 [B, ..., in] or [B, in, H, W] to float32 [B, ..., out] or [B, out, H', W']."""
        if len(rows) == 1:
            return self.product(codes, *self._rows[rows[0][0]])
        parts = [(samples, self.product(codes[samples], *self._rows[row])) for row, samples in rows]
        outputs = torch.cat([output for _, output in parts])
        order = torch.cat([samples for samples, _ in parts if samples is not None])
        return torch.empty_like(outputs).index_copy_(0, order.to(outputs.device), outputs)


def smoothed(x: Tensor, reciprocal: Tensor, channels: int) -> Tensor:
    """x times the reciprocal smoothing scales of its dimension ``channels``."""
    return x * (reciprocal if channels == -1 else reciprocal.view(-1, *(1,) * (x.dim() - 1 - channels)))


class IntegerLayer(nn.Module):
    """A linear layer or convolution whose products are integer products. It holds no float weight.

    Networks ask a layer's weight for its dtype or shape. ``weight`` answers with those of the float weight; its
    numbers are one NaN, so that nothing can compute with it unnoticed.

    Args:
        site: the integers; its weights are not kept.
        products: one for each part, the bias in the first.
        activation: quantizes the inputs.
        smoothing: of the inputs [in], or None.
        branch: a low-rank product in float, or None.
        device: of the inputs; tables of scales stay on the CPU, where they are looked up.
    """

    def __init__(
        self,
        site: IntegerSite,
        products: Sequence[Product],
        activation: ActivationKernel,
        smoothing: Tensor | None,
        branch: LowRankBranch | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.sizes, self.channels = site.sizes, -1 if site.geometry is None else 1
        self.reciprocal = None if smoothing is None else 1 / smoothing.detach()
        parts = len(site.parts)
        reciprocals = [self.reciprocal] if parts == 1 or self.reciprocal is None else self.reciprocal.split(self.sizes)
        grids = [part.grid for part in site.parts]
        self.lookups = nn.ModuleList([RowLookup(grid) for grid in grids])
        self.encoders = nn.ModuleList(
            [
                Encoder(grid, activation, reciprocals[position % len(reciprocals)], self.channels)
                for position, grid in enumerate(grids)
            ]
        )
        self.multipliers = nn.ModuleList(
            [Multiplier(grid, product) for grid, product in zip(grids, products, strict=True)]
        )
        self.branch = None if branch is None else _Branch(branch, site.geometry)
        shape = (len(site.parts[0].weight), sum(site.sizes), *site.parts[0].weight.shape[2:])
        self.weight = torch.full((), torch.nan, device=device).expand(shape)
        self.bias = None if site.bias is None else site.bias.to(device)

    @property
    def products(self) -> list[Product]:
        """The products of its parts."""
        return [multiplier.product for multiplier in cast(Iterable[Multiplier], self.multipliers)]

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """[B, ..., in] -> [B, ..., out], or [B, in, H, W] -> [B, out, H', W']; ``timestep`` [B] for tables."""
        output = self.integer_part(x, timestep)
        if self.branch is None:
            return output
        return output + self.branch(x if self.reciprocal is None else smoothed(x, self.reciprocal, self.channels))

    def integer_part(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The output without the branch; arguments and shapes as for ``forward``."""
        values = (x,) if len(self.encoders) == 1 else x.split(self.sizes, self.channels)
        total: Tensor | None = None
        for value, *modules in zip(values, self.lookups, self.encoders, self.multipliers, strict=True):
            lookup, encoder, multiplier = modules
            rows = lookup(timestep)
            output = multiplier(encoder(value, rows), rows)
            total = output if total is None else total.add_(output)
        assert total is not None
        return total

    def held_bytes(self) -> int:
        """Bytes of everything but the branch."""
        encoders = cast(Iterable[Encoder], self.encoders)
        tables = sum(encoder.grid.scale.numel() * 12 for encoder in encoders)
        smoothing = 0 if self.reciprocal is None else 4 * self.reciprocal.numel()
        return tables + smoothing + sum(product.held_bytes() for product in self.products)
