"""What sites see, kept in temporary files and mapped into memory when it is asked for.

A network's sites together see far more than the network holds. One site's tensors fit.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from quantlab.calibration.tensor_file import bytes_of
from quantlab.errors import QuantlabError


@dataclass(frozen=True)
class Streaming:
    """How much of the calibration set is in memory at once.

    Attributes:
        rows: of the network in one forward.
        folder: for temporary files; it outlives whatever reads them.
    """

    rows: int
    folder: Path


@contextmanager
def streaming_in(folder: Path, rows: int | None) -> Iterator[Streaming | None]:
    """Temporary files inside ``folder`` while the context lasts; None without ``rows``: all stays in memory."""
    if rows is None:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="spill-") as temporary:
        yield Streaming(rows, Path(temporary))


Key = TypeVar("Key", bound=Hashable)


class Spill(Mapping[Key, Tensor]):
    """Tensors by name that grow along dimension 0, each in a file of its own; read, they are mapped, not loaded.

    Args:
        folder: of the files.
        device: where a tensor goes when it is read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._shapes: dict[Key, tuple[int, ...]] = {}
        self._dtypes: dict[Key, torch.dtype] = {}

    def append(self, name: Key, value: Tensor) -> None:
        """Add entries [n, ...] to the end of a tensor, which the first of them makes.

        Raises:
            QuantlabError: they differ from those before in more than their number.
        """
        before = self._shapes.get(name, (0, *value.shape[1:]))
        if before[1:] != value.shape[1:] or self._dtypes.get(name, value.dtype) != value.dtype:
            raise QuantlabError(
                "the parts of a batch differ in more than their rows",
                where=str(name),
                got=f"{list(before[1:])}, then {list(value.shape[1:])}",
                next_step="leave calibrate.batch out",
            )
        self._shapes[name], self._dtypes[name] = (before[0] + value.shape[0], *before[1:]), value.dtype
        with self._file(name).open("ab") as file:
            file.write(bytes_of(value))

    def __getitem__(self, name: Key) -> Tensor:
        shape, dtype = self._shapes[name], self._dtypes[name]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        mapped = torch.from_file(str(self._file(name)), shared=False, size=count, dtype=dtype)
        return mapped.view(shape).to(self.device)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _file(self, name: Key) -> Path:
        return self._folder / f"{list(self._shapes).index(name)}"
