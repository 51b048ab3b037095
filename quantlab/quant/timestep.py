"""Per-timestep tables: which stored timestep a sample belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_index(stored: Tensor, timestep: Tensor) -> Tensor:
    """Index of the stored timestep nearest to each sample's; of two equally near ones the smaller.

    Args:
        stored: sorted timesteps [T].
        timestep: integer or float timesteps [B].

    Returns:
        int64 [B].
    """
    stored, timestep = stored.to(timestep.device).double(), timestep.double()
    middles = (stored[1:] + stored[:-1]) / 2
    return torch.searchsorted(middles, timestep.contiguous())


def group_by_timestep(values: Tensor, timestep: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The distinct timesteps, sorted [T], and the samples of ``values`` [B, ...] at each."""
    stored, index = torch.unique(timestep, sorted=True, return_inverse=True)
    return stored, [values[index == position] for position in range(len(stored))]
