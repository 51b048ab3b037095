"""What the backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def saved_mib(forward: Callable[[], object]) -> float:
    """MiB of the tensors saved for backward in one forward; a storage that is saved twice counts once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storages.values()) / 2**20
