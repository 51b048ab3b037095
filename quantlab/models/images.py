"""A folder of images by class, as ImageNet and torchvision lay them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.store import digest_of
from quantlab.torchvision_shim import ensure_torchvision_imports

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class ImageFolder:
    """Images below one folder for each class; classes are numbered in the order of their folders' names.

    Args:
        path: of the split; it is looked into when something is asked for.
        preparation: timm's data config of the network: size, crop, interpolation, mean and deviation.

    Raises:
        ModelError: from every member, when there is no such folder, or a class in it is empty.
    """

    def __init__(self, path: Path, preparation: Mapping[str, Any]) -> None:
        self.path, self.preparation = path, preparation

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders."""
        found = sorted(folder.name for folder in self.path.iterdir() if folder.is_dir()) if self.path.is_dir() else []
        if not found:
            raise ModelError(
                "there is no folder of images by class",
                where=str(self.path),
                got="no folder" if not self.path.is_dir() else "no folder in it",
                next_step="lay images out as SPLIT/CLASS/IMAGE, from the working folder",
            )
        return tuple(found)

    @cached_property
    def files(self) -> tuple[tuple[Path, int], ...]:
        """Every image with its class, sorted by class and then by path."""
        found: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            paths = sorted(path for path in (self.path / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not paths:
                raise ModelError(
                    "a class has no images", where=str(self.path / name), allowed=" ".join(sorted(SUFFIXES))
                )
            found += [(path, label) for path in paths]
        return tuple(found)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_classes(self) -> int:
        """How many folders there are."""
        return len(self.classes)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images as timm prepares them for this network, and their labels; raises ModelError for a damaged file."""
        chosen = [self.files[index] for index in indices]
        return torch.stack([self._open(path) for path, _ in chosen]), torch.tensor([label for _, label in chosen])

    def digest(self) -> str:
        """Hash of the preparation and every image's path and size in bytes, not its content; "missing" without any."""
        if not self.path.is_dir():
            return "missing"
        files = [[path.relative_to(self.path).as_posix(), path.stat().st_size] for path, _ in self.files]
        return digest_of([files, repr(dict(self.preparation))])

    def _open(self, path: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        mode = "L" if self.preparation["input_size"][0] == 1 else "RGB"
        try:
            with Image.open(path) as image:
                return self._transform(image.convert(mode))
        except (UnidentifiedImageError, OSError) as error:
            raise ModelError("this is no image, or half of one", where=str(path), got=error) from error

    @cached_property
    def _transform(self) -> Any:
        ensure_torchvision_imports()
        from timm.data import create_transform  # pyright: ignore[reportAttributeAccessIssue]

        return create_transform(**self.preparation, is_training=False)
