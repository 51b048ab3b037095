"""The float network's features along a training: they depend on no student, so all methods of a seed share them.

A training draws its batches from the recorded trajectories by its seed alone. What the losses compare with at every
iteration is therefore computed once, on those very batches: a network gives a sample other last bits in another batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantlab.allocation.student import tapped_run
from quantlab.calibration.tensor_file import TensorFile, TensorSpec
from quantlab.contracts.model import Progress
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import Loss, TeacherVisit, Tuner
from quantlab.plugins import Kind
from quantlab.recipe.schema import Recipe
from quantlab.stages.context import RunContext
from quantlab.stages.prepare import Calibrated, Captured
from quantlab.store import JSON, StageFolder, digest_of

TEACHER_VERSION = 1
_MIB = 2**20
_FILE = "taps.safetensors"


@dataclass(frozen=True)
class RememberedTaps:
    """The float network's taps at every iteration of a training.

    Attributes:
        stage: that holds them.
        device: where they go when they are read.
    """

    stage: StageFolder
    device: torch.device

    def at(self, iteration: int) -> Mapping[str, Tensor]:
        """The taps at one iteration, in the memory layout that the network gave them."""
        tensors, orders = self._mapped
        return {
            path: value[iteration].permute(_inverse(orders[path])).to(self.device) for path, value in tensors.items()
        }

    @cached_property
    def _mapped(self) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[int]]]:
        file = self.stage.file(_FILE)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file), {path: json.loads(order) for path, order in metadata.items()}


def taps_of(losses: Sequence[Loss], sites: Sequence[Site]) -> tuple[str, ...]:
    """The module paths that the losses need, each once."""
    return tuple(dict.fromkeys(path for loss in losses for path in loss.taps(sites)))


def remembered_taps(
    context: RunContext,
    captured: Captured,
    calibrated: Calibrated,
    recipe: Recipe,
    tuner: Tuner,
    link: str,
    *,
    tuned: bool,
) -> RememberedTaps | None:
    """The taps that a tuner's losses need at its visits, computed or found; None where it asks the network itself.

    Args:
        context: of the run.
        captured: the float network.
        calibrated: the recorded inputs.
        recipe: with the ``tune`` section and the seed.
        tuner: says what it visits.
        link: of the stage in the run folder.
        tuned: the tuner's result is there already, so nothing is computed for it.
    """
    data, settings, task = calibrated.data, recipe.tune, captured.task
    taps = taps_of([context.registry.create(Kind.LOSS, choice) for choice in settings.losses], captured.sites)
    visits = tuner.visits(settings, data.num_steps, data.num_samples, recipe.seed) if taps else ()
    if not visits or settings.teacher_store_mib == 0:
        return None
    key: dict[str, JSON] = {
        "version": TEACHER_VERSION,
        "calibrate": calibrated.stage.digest,
        "taps": list(taps),
        "visits": digest_of([[visit.step, visit.samples.tolist()] for visit in visits]),
    }
    there = context.store.has("teacher", key)
    if tuned and not there:
        return None
    run = tapped_run(task.network, captured.graph, taps)

    def taps_at(visit: TeacherVisit) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return run(task.network_inputs(data.step(visit.step, visit.samples)))[1]

    if not there and not _fits(context, taps_at(visits[0]), len(visits), settings.teacher_store_mib):
        return None

    def compute(folder: Path, progress: Progress) -> None:
        first = taps_at(visits[0])
        orders = {path: _order(value) for path, value in first.items()}
        shapes = {path: value.permute(orders[path]).shape for path, value in first.items()}
        specs = {path: TensorSpec((len(visits), *shapes[path]), value.dtype) for path, value in first.items()}
        with TensorFile(folder / _FILE, specs, {path: json.dumps(order) for path, order in orders.items()}) as file:
            for index, visit in enumerate(visits):
                for path, value in taps_at(visit).items():
                    file.write(path, value.permute(orders[path]), (index,))
                progress(index + 1, len(visits))

    stage = context.stage("teacher", "Record the float model's features", key, compute, link=link)
    return RememberedTaps(stage, next(task.network.parameters()).device)


def _fits(context: RunContext, taps: Mapping[str, Tensor], visits: int, limit_mib: float) -> bool:
    """Whether the taps of all visits may be kept; says how large they are."""
    size_mib = visits * sum(math.prod(value.shape) * value.dtype.itemsize for value in taps.values()) / _MIB
    if size_mib <= limit_mib:
        context.console.info(f"the float model's features take {size_mib:.1f} MiB and are shared by all methods")
        return True
    context.console.info(
        f"the float model's features would take {size_mib:.1f} MiB, above tune.teacher_store_mib: {limit_mib:g}; "
        "every iteration computes them"
    )
    return False


def _order(value: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(value.dim()), key=lambda dim: -value.stride(dim))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda position: order[position])
