"""Layers that compute in integers; they stand at the paths of the quantized layers they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.packing.backends.activation import ActivationKernel
from quantlab.packing.backends.integers import ConvGeometry, InputGrid, IntegerSite
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
    """

    def __init__(
        self,
        site: IntegerSite,
        products: Sequence[Product],
        activation: ActivationKernel,
        smoothing: Tensor | None,
        branch: LowRankBranch | None,
    ) -> None:
        super().__init__()
        self.geometry, self.sizes = site.geometry, site.sizes
        self.grids = tuple(part.grid for part in site.parts)
        self.products, self.activation = tuple(products), activation
        # The simulation multiplies by reciprocals: so must the codes' input be.
        self.reciprocal = None if smoothing is None else 1 / smoothing.detach()
        self.branch = None if branch is None else _Branch(branch, site.geometry)
        shape = (len(site.parts[0].weight), sum(site.sizes), *site.parts[0].weight.shape[2:])
        self.weight = torch.full((), torch.nan).expand(shape)
        self.bias = site.bias

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """[B, ..., in] -> [B, ..., out], or [B, in, H, W] -> [B, out, H', W']; ``timestep`` [B] for tables."""
        output = self.integer_part(x, timestep)
        return output if self.branch is None else output + self.branch(self._smoothed(x))

    def integer_part(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The output without the branch; arguments and shapes as for ``forward``."""
        if len(self.grids) == 1:
            return _by_row(x, timestep, self.grids[0], self.products[0], self.activation, self.reciprocal)
        dim = -1 if self.geometry is None else 1
        reciprocals = [None] * len(self.grids) if self.reciprocal is None else self.reciprocal.split(self.sizes)
        parts = zip(x.split(self.sizes, dim), self.grids, self.products, reciprocals, strict=True)
        outputs = [
            _by_row(values, timestep, grid, product, self.activation, reciprocal)
            for values, grid, product, reciprocal in parts
        ]
        return torch.stack(outputs).sum(0) if len(outputs) > 2 else outputs[0].add_(outputs[1])

    def held_bytes(self) -> int:
        """Bytes of everything but the branch."""
        tables = sum(grid.scale.numel() * 12 for grid in self.grids)
        smoothing = 0 if self.reciprocal is None else 4 * self.reciprocal.numel()
        return tables + smoothing + sum(product.held_bytes() for product in self.products)

    def _smoothed(self, x: Tensor) -> Tensor:
        if self.reciprocal is None:
            return x
        return x * (self.reciprocal if self.geometry is None else self.reciprocal.view(-1, 1, 1))


def _by_row(
    x: Tensor,
    timestep: Tensor | None,
    grid: InputGrid,
    product: Product,
    activation: ActivationKernel,
    reciprocal: Tensor | None,
) -> Tensor:
    """The product with the row of the grid that each sample's timestep asks for; samples of one row go together."""

    def run(values: Tensor, row: int) -> Tensor:
        scale, zero_point = grid.scale[row], grid.zero_point[row]
        codes = activation(values, scale, zero_point.float(), torch.tensor(float(grid.quant_max)), reciprocal)
        return product(codes, scale.item(), int(zero_point))

    if grid.timesteps is None:
        return run(x, 0)
    index = grid.index(timestep, len(x))
    rows = index.unique().tolist()
    if len(rows) == 1:
        return run(x, rows[0])
    groups = [(index == row).nonzero()[:, 0] for row in rows]
    outputs = torch.cat([run(x[group], row) for group, row in zip(groups, rows, strict=True)])
    return torch.empty_like(outputs).index_copy_(0, torch.cat(groups), outputs)
