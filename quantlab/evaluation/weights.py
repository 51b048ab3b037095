"""Weights of networks that only measure: looked for on this machine, never fetched by a run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quantlab.errors import ModelError
from quantlab.store import digest_of_file


def require_package(package: str, pip: str, purpose: str) -> None:
    """Raise ModelError, with the line that installs it, when a package is missing."""
    if find_spec(package) is None:
        raise ModelError(f"{purpose} needs the package {pip}", next_step=f"pip install {pip}, or quantlab[metrics]")


def checkpoints() -> Path:
    """Where torch hub keeps files of weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def require_weights(path: Path, url: str, purpose: str, sha256: str | None = None) -> Path:
    """The path, when its file is there and is the one meant.

    Args:
        path: where the file should be.
        url: where a person gets it.
        purpose: what it is for.
        sha256: first digits of its hash; any file without them.

    Raises:
        ModelError: the file is not there, or is another one.
    """
    if not path.is_file():
        raise ModelError(
            f"{purpose} needs weights that are not on this machine",
            where=str(path),
            next_step=f"fetch {url} and put it there; nothing is downloaded during a run",
        )
    if sha256 is not None and not (found := digest_of_file(path)).startswith(sha256):
        raise ModelError(
            f"these are not the weights that {purpose} is defined with",
            where=str(path),
            got=f"SHA-256 {found}",
            allowed=f"SHA-256 {sha256}...",
            next_step=f"fetch {url} again",
        )
    return path
