"""MPQ-DM: outlier-driven mixed quantization and time-smoothed relation distillation; MPQ-DMv2's residual quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab import BitPolicy, Loss, Method, hookimpl, method_from_yaml

if TYPE_CHECKING:
    from quantlab import Quantizer  # imports torch


@hookimpl
def quantlab_bit_policies() -> list[type[BitPolicy]]:
    """Outlier-driven mixed quantization."""
    from quantlab_mpqdm.omq import KurtosisPolicy

    return [KurtosisPolicy]


@hookimpl
def quantlab_quantizers() -> list[type[Quantizer]]:
    """Residual mixed quantization."""
    from quantlab_mpqdm.residual import ResidualQuantizer

    return [ResidualQuantizer]


@hookimpl
def quantlab_losses() -> list[type[Loss]]:
    """Relations between pixels, smoothed over time or to a memory of other timesteps."""
    from quantlab_mpqdm.memory import MemoryRelationLoss
    from quantlab_mpqdm.relation import RelationLoss

    return [RelationLoss, MemoryRelationLoss]


@hookimpl
def quantlab_methods() -> list[Method]:
    """MPQ-DM, MPQ-DM+, MPQ-DMv2, the released code's choices, and the steps of the ablations."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
