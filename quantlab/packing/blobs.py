"""Many small tensors as a few large ones: a name for each kind of content, and everything of a kind in a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlab.errors import ArtefactError


class BlobWriter:
    """Collects tensors by kind, in the order in which they will be read."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, blob: str, value: Tensor) -> None:
        """Put a tensor, flattened, at the end of a blob; all of a blob have one dtype."""
        self._parts.setdefault(blob, []).append(value.detach().cpu().reshape(-1))

    def finish(self) -> dict[str, Tensor]:
        """Every blob that holds anything, [n] each."""
        joined = {name: _join(parts) for name, parts in self._parts.items()}
        return {name: value for name, value in joined.items() if value.numel()}


class BlobReader:
    """Takes back what a ``BlobWriter`` collected, in the same order."""

    def __init__(self, blobs: Mapping[str, Tensor]) -> None:
        self._blobs, self._taken = blobs, dict.fromkeys(blobs, 0)

    def take(self, blob: str, count: int, dtype: torch.dtype) -> Tensor:
        """The next ``count`` values of a blob.

        Raises:
            ArtefactError: there are not so many, or they are of another type.
        """
        if not count:
            return torch.empty(0, dtype=dtype)
        start = self._taken.get(blob, 0)
        found = self._blobs.get(blob, torch.empty(0, dtype=dtype))
        if found.dtype != dtype or start + count > found.numel():
            raise ArtefactError(
                f'the tensor "{blob}" does not fit the file\'s layout',
                got=f"{found.dtype} [{found.numel()}]",
                allowed=f"{dtype} of at least {start + count} values",
                next_step="pack the model again",
            )
        self._taken[blob] = start + count
        return found[start : start + count]

    def finish(self) -> None:
        """Raise ArtefactError when something was not taken."""
        left = {name: value.numel() - self._taken[name] for name, value in self._blobs.items()}
        if any(left.values()):
            name = next(name for name, count in left.items() if count)
            raise ArtefactError(
                f'the tensor "{name}" holds more than the file\'s layout says', got=f"{left[name]} values too many"
            )


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenation by bytes, which serves types that torch cannot concatenate."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(parts[0].dtype)
