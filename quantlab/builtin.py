"""The built-ins, registered through the same hooks as every plugin; each function imports what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.hookspecs import hookimpl

if TYPE_CHECKING:
    from quantlab.contracts.allocation import BitPolicy
    from quantlab.contracts.event import StageEvent
    from quantlab.contracts.quantizer import Quantizer
    from quantlab.contracts.tuning import Loss


@hookimpl
def quantlab_models() -> list[type]:
    """The models that ship, checkpoints and pipelines, timm's networks, an installed package's, modules in memory."""
    from quantlab.models.builtin import BuiltinSource
    from quantlab.models.compvis.source import CompVisSource
    from quantlab.models.diffusers_source import DiffusersSource
    from quantlab.models.module import MemorySource
    from quantlab.models.python import PythonSource
    from quantlab.models.timm import TimmSource

    return [BuiltinSource, CompVisSource, DiffusersSource, MemorySource, PythonSource, TimmSource]


@hookimpl
def quantlab_passes() -> list[type]:
    """Smoothing between activation and weight."""
    from quantlab.allocation.smoothing import SmoothPass

    return [SmoothPass]


@hookimpl
def quantlab_bit_policies() -> list[type[BitPolicy]]:
    """The same bits everywhere, bits by hand, by chance, by sensitivity and by the energy of channels."""
    from quantlab.allocation.energy import EnergyPolicy
    from quantlab.allocation.greedy import GreedyPolicy
    from quantlab.allocation.manual import ManualPolicy
    from quantlab.allocation.milp import MilpPolicy
    from quantlab.allocation.random_bits import RandomPolicy
    from quantlab.allocation.uniform import UniformPolicy

    return [UniformPolicy, ManualPolicy, RandomPolicy, GreedyPolicy, MilpPolicy, EnergyPolicy]


@hookimpl
def quantlab_quantizers() -> list[type[Quantizer]]:
    """Scale and zero point."""
    from quantlab.quant.quantizers import AffineQuantizer

    return [AffineQuantizer]


@hookimpl
def quantlab_tuners() -> list[type]:
    """Distillation along the sampling trajectory, and reconstruction block by block."""
    from quantlab.tuning.distill import DistillTuner
    from quantlab.tuning.reconstruct import ReconstructTuner

    return [DistillTuner, ReconstructTuner]


@hookimpl
def quantlab_losses() -> list[type[Loss]]:
    """Distances between predictions, and between features."""
    from quantlab.losses.cosine import CosineLoss
    from quantlab.losses.features import FeaturesLoss
    from quantlab.losses.fisher import FisherLoss
    from quantlab.losses.kl import KlLoss
    from quantlab.losses.lp import LpLoss
    from quantlab.losses.mse import MseLoss

    return [MseLoss, LpLoss, FisherLoss, KlLoss, CosineLoss, FeaturesLoss]


@hookimpl
def quantlab_metrics() -> list[type]:
    """The metrics of images."""
    from quantlab.evaluation.metrics import METRICS

    return list(METRICS)


@hookimpl
def quantlab_event(event: StageEvent) -> None:
    """Keep a record of the stages in the run folder's ``events.jsonl``."""
    from quantlab.store import append_event

    append_event(
        event.run_folder,
        {"stage": event.stage, "status": event.status, "seconds": round(event.seconds, 3), "folder": str(event.folder)},
    )
