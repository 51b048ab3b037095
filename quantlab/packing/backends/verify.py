"""A check of each integer layer against the float64 simulation, before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab.packing.backends.integers import IntegerSite, NotExecutable
from quantlab.packing.backends.layers import IntegerLayer
from quantlab.packing.backends.reference import simulate

TOLERANCE = 5e-7
"""Largest |integer - float64| over the largest |float64|: a few float32 roundings of the epilogue."""


def verify(layer: IntegerLayer, site: IntegerSite, columns: int, kernel: tuple[int, ...]) -> None:
    """Compare a layer without its branch with the simulation, on inputs that are forced onto every kind of code.

    The last two samples are all at the largest and all at the smallest code. Instructions that add two products in
    16 bits, as those of older CPUs do, saturate there first: the sum of two products is largest in magnitude when the
    two codes are, and the weights have one sign.

    Raises:
        NotExecutable: a number is wrong, or the operator refuses the shape.
    """
    x, timestep = _probe(site, columns, kernel)
    expected = simulate(site, x, timestep)
    x = x.to(layer.weight.device)
    if layer.reciprocal is not None:
        # Rounding here moves no value out of the middle of its code.
        x = x / layer.reciprocal.view(-1, *(1,) * (x.dim() - 2))
    try:
        found = layer.integer_part(x, timestep).cpu()
    except RuntimeError as error:
        raise NotExecutable(f"the operator refuses it: {str(error).splitlines()[0]}") from error
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not error <= TOLERANCE:
        raise NotExecutable(f"its kernel is off by {error:.1e} on a probe, more than {TOLERANCE:.0e}")


def _probe(site: IntegerSite, columns: int, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Inputs in the middle of codes [B, ...] and timesteps [B] that lead to different rows of the table."""
    geometry, rng = site.geometry, torch.Generator().manual_seed(0)
    if geometry is None:
        spatial: tuple[int, ...] = ()
    else:
        reach = zip(kernel, geometry.dilation, geometry.stride, strict=True)
        spatial = tuple(dilation * (size - 1) + 1 + stride for size, dilation, stride in reach)
    timesteps = site.parts[0].grid.timesteps
    chosen = None if timesteps is None else timesteps[torch.tensor([0, len(timesteps) - 1, 0, -1])]
    sizes = site.sizes if len(site.sizes) > 1 else (columns,)
    pieces = []
    for part, size in zip(site.parts, sizes, strict=True):
        codes = torch.randint(0, part.grid.quant_max + 1, (4, size, *spatial), generator=rng)
        codes[2], codes[3] = part.grid.quant_max, 0
        index = part.grid.index(chosen, 4)
        shape = (-1, *(1,) * (codes.dim() - 1))
        pieces.append((codes - part.grid.zero_point[index].view(shape)) * part.grid.scale[index].view(shape))
    return torch.cat(pieces, 1), chosen
