"""What a loss compares: the prediction, or the output of a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab.contracts.site import Site
from quantlab.errors import RecipeError


def last_block(sites: Sequence[Site], loss: str) -> str:
    """Path of the last block of the network: its output is what the final projection gets.

    Args:
        sites: of the network.
        loss: name of the loss that asks, for the message.

    Raises:
        RecipeError: the network has no blocks.
    """
    blocks = [site.block for site in sites if site.block and site.block != site.name]
    if not blocks:
        raise RecipeError(
            "the network has no blocks to take features from",
            where=f'loss "{loss}"',
            next_step=f"name a module: {{{loss}: {{feature: path.of.module}}}}",
        )
    return blocks[-1]


def at_least_float(values: Tensor) -> Tensor:
    """The values in float32 or more: a sum over a batch of images leaves the range of float16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pixel_vectors(values: Tensor) -> Tensor:
    """The vectors over channels as rows: [B, C] -> [B, C], tokens [B, T, C] -> [B T, C], [B, C, *] -> [B *, C]."""
    if values.dim() <= 3:
        return values.flatten(0, -2)
    return values.movedim(1, -1).flatten(0, -2)
