"""What a finished model looks like site by site: for the report alone, no number of a result depends on it."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from quantlab.allocation.student import Student, tapped_run
from quantlab.calibration.collect import CalibrationBatch, calibration_batch, watch_inputs
from quantlab.calibration.parts import batch_parts
from quantlab.contracts.model import Progress
from quantlab.graph.captured import CapturedGraph
from quantlab.report.details import ERRORS_FILE, SCALES_FILE
from quantlab.stages.context import RunContext
from quantlab.stages.prepare import Calibrated, Captured
from quantlab.stages.quantize import Quantized
from quantlab.store import JSON, StageFolder

INSPECT_VERSION = 1
SAMPLES = 8
"""Trajectories that errors are measured on, at every step: a second for a small model."""


def inspect_sites(
    context: RunContext, captured: Captured, calibrated: Calibrated, final: Quantized, arm: str
) -> StageFolder:
    """Write each site's errors and its table of activation scales."""
    count = min(SAMPLES, calibrated.data.num_samples)
    key: dict[str, JSON] = {
        "version": INSPECT_VERSION,
        "from": final.stage.digest,
        "calibrate": calibrated.stage.digest,
        "samples": count,
    }

    def compute(folder: Path, progress: Progress) -> None:
        batch = calibration_batch(captured.task, calibrated.data, count)
        errors = site_errors(captured.task.network, captured.graph, final.student, batch, calibrated.batch)
        (folder / ERRORS_FILE).write_text(json.dumps(errors, indent=1))
        (folder / SCALES_FILE).write_text(json.dumps(activation_scales(final.student), indent=1))

    return context.stage("inspect", f"{arm}: look at the sites", key, compute, link=f"{arm}/inspect")


def site_errors(
    teacher: nn.Module, graph: CapturedGraph, student: Student, batch: CalibrationBatch, rows: int | None = None
) -> dict[str, dict[str, float | None]]:
    """Relative errors |quantized - float| / |float| of each site's weight and output, None where the float one is 0.

    The output error is that of the site alone: both layers get the float network's input.

    Args:
        teacher: the float network.
        graph: of it.
        student: the quantized one.
        batch: what they see.
        rows: of it in one forward; None: all.
    """
    run = tapped_run(teacher, graph, ())
    squares: dict[str, tuple[float, float]] = {}

    for part in batch_parts(batch, rows):

        def see(name: str, x: Tensor, timestep: Tensor | None = part.timestep) -> None:
            exact = teacher.get_submodule(name).forward(x)  # not a call, which would come back here through the hook
            error, size = _squares(student.layer(name)(x, timestep), exact)
            before = squares.get(name, (0.0, 0.0))
            squares[name] = (before[0] + error, before[1] + size)

        watch_inputs(teacher, list(student.layers()), see, lambda: run(part.inputs))  # noqa: B023
    found: dict[str, dict[str, float | None]] = {}
    for name, layer in student.layers().items():
        exact = teacher.get_submodule(name).weight
        assert isinstance(exact, nn.Parameter)
        found[name] = {
            "weight": _relative(*_squares(layer.effective_weight(), exact)),
            "output": _relative(*squares[name]) if name in squares else None,
        }
    return found


def activation_scales(student: Student) -> dict[str, JSON]:
    """Timesteps and scales of every input, or part of a split input, that has a scale for each of them."""
    found: dict[str, JSON] = {}
    for name, layer in student.layers().items():
        parameters = layer.input_quantizer.qparams() if layer.input_quantizer is not None else None
        if parameters is not None and parameters.timesteps is not None:
            tables = parameters.scale.reshape(-1, len(parameters.timesteps)).tolist()
            for part, table in enumerate(tables):
                scales = [float(f"{scale:.6g}") for scale in table]
                label = f"{name}, part {part}" if parameters.split else name
                found[label] = {"timesteps": parameters.timesteps.tolist(), "scales": scales}
    return found


def _squares(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Squared norms of the error and of the exact tensor."""
    exact = exact.detach().double()
    return (value.detach().double() - exact).square().sum().item(), exact.square().sum().item()


def _relative(error: float, size: float) -> float | None:
    return (error / size) ** 0.5 if size else None
