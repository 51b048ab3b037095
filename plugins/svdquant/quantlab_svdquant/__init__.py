"""SVDQuant: a low-rank branch in float beside low-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab import Method, hookimpl, method_from_yaml

if TYPE_CHECKING:
    from quantlab import Tuner


@hookimpl
def quantlab_methods() -> list[Method]:
    """SVDQuant and its variants."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]


@hookimpl
def quantlab_tuners() -> list[type[Tuner]]:
    """The split into branch and rest."""
    from quantlab_svdquant.tuner import SvdQuantTuner

    return [SvdQuantTuner]
