"""What a run folder holds about each method besides its row: bits, errors, scales, histories, images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.contracts.allocation import FLOAT_BITS

if TYPE_CHECKING:
    import numpy as np

ERRORS_FILE = "site_errors.json"
SCALES_FILE = "activation_scales.json"


@dataclass(frozen=True)
class ScaleTable:
    """Scales of one input by timestep, in the order of calibration."""

    timesteps: Sequence[float]
    scales: Sequence[float]


@dataclass(frozen=True)
class SiteErrors:
    """Relative errors of a site's weight and of its output on float inputs; None where they are not known."""

    weight: float | None
    output: float | None


@dataclass(frozen=True)
class MethodDetails:
    """One method of a run, site by site; what its run did not write is empty.

    Attributes:
        title: of the method, or of the bench's cell.
        weight_bits: bits of every output channel by site; the sites that stay float are left out.
        errors: by site.
        scales: by site, of the inputs that have a scale for each timestep.
        histories: what tuning recorded at each iteration, by name; NaN where it did not.
    """

    title: str
    weight_bits: Mapping[str, Sequence[int]]
    errors: Mapping[str, SiteErrors]
    scales: Mapping[str, ScaleTable]
    histories: Mapping[str, Sequence[float]]


def read_details(run_folder: Path, method: str, title: str | None = None) -> MethodDetails:
    """Everything a run folder has about a method; a run of an earlier version has less."""
    folder = run_folder / method
    bits = _json(folder / "finalize" / "allocation.json").get("weight_bits", {})
    errors = _json(folder / "inspect" / ERRORS_FILE)
    scales = _json(folder / "inspect" / SCALES_FILE)
    histories: dict[str, Sequence[float]] = {}
    for file in sorted(folder.glob("tune-*/history.json")):
        tuner = file.parent.name.split("-", 2)[2]
        histories |= {f"{tuner}: {name}": values for name, values in _json(file).items() if values}
    return MethodDetails(
        title or method,
        {name: channels for name, channels in bits.items() if channels and min(channels) < FLOAT_BITS},
        {name: SiteErrors(found["weight"], found["output"]) for name, found in errors.items()},
        {name: ScaleTable(found["timesteps"], found["scales"]) for name, found in scales.items()},
        histories,
    )


def read_images(run_folder: Path, arm: str, count: int) -> np.ndarray | None:
    """The first images that were measured, float [count, C, H, W] in [-1, 1], or None when the run has none."""
    from safetensors import safe_open

    file = run_folder / arm / "evaluate" / "images.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "numpy") as tensors:
        images = tensors.get_slice("images")
        return images[: min(count, images.get_shape()[0])]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
