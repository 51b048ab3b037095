"""MPQ-DM: outlier-driven mixed quantization and time-smoothed relation distillation."""

from pathlib import Path

from quantlab import BitPolicy, Loss, Method, hookimpl, method_from_yaml


@hookimpl
def quantlab_bit_policies() -> list[type[BitPolicy]]:
    """Outlier-driven mixed quantization."""
    from quantlab_mpqdm.omq import KurtosisPolicy

    return [KurtosisPolicy]


@hookimpl
def quantlab_losses() -> list[type[Loss]]:
    """Time-smoothed relation distillation."""
    from quantlab_mpqdm.relation import RelationLoss

    return [RelationLoss]


@hookimpl
def quantlab_methods() -> list[Method]:
    """MPQ-DM, its larger sibling, the released code's choices, and the steps of the ablation."""
    return [method_from_yaml(path) for path in sorted(Path(__file__).with_name("methods").glob("*.yaml"))]
