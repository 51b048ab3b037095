"""Fit the corrections of the sampler to the model that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantlab.calibration.parts import in_parts
from quantlab.contracts.check import check_corrected, check_fitted, plugin_call
from quantlab.contracts.correction import Correction, CorrectionData, FittedCorrection
from quantlab.contracts.model import CalibrationSet, Progress, Run, Task
from quantlab.errors import RecipeError
from quantlab.plugins import Kind, Registry
from quantlab.recipe.schema import Recipe
from quantlab.stages.context import RunContext, as_json
from quantlab.stages.prepare import Calibrated, Captured
from quantlab.stages.quantize import Quantized, load_state
from quantlab.store import JSON

CORRECT_VERSION = 1
FILE = "correction.safetensors"
_TIMESTEPS = "timesteps"


def correct(
    context: RunContext, captured: Captured, calibrated: Calibrated, final: Quantized, recipe: Recipe, arm: str
) -> Quantized:
    """Fit the recipe's corrections, each to what the ones before it leave; without one the model is returned as it is.

    Raises:
        RecipeError: the model has no timestep, so that nothing is sampled.
    """
    if not recipe.corrections:
        return final
    task, registry = captured.task, context.registry
    if task.timestep_input is None:
        raise RecipeError(
            "a correction is one of the sampler, and the model has no timestep",
            where="corrections",
            got=recipe.corrections[0].name,
            next_step="set corrections to []",
        )
    key: dict[str, JSON] = {
        "version": CORRECT_VERSION,
        "from": final.stage.digest,
        "calibrate": calibrated.stage.digest,
        "corrections": [as_json(choice) for choice in recipe.corrections],
        "plugins": context.versions(*((Kind.CORRECTION, choice) for choice in recipe.corrections)),
    }

    def compute(folder: Path, progress: Progress) -> None:
        recorded, run = calibrated.data, in_parts(final.student.run, calibrated.batch)
        predictions = predictions_on(task, recorded, run, progress)
        timesteps = recorded.inputs[task.timestep_input or ""][:, 0]
        exact = torch.stack([recorded.output(index, slice(None)) for index in range(recorded.num_steps)])
        data = CorrectionData(timesteps, exact, predictions)
        fitted = fit_corrections(_corrections(recipe, registry), data)
        tensors = {
            f"{index}/{name}": value for index, each in enumerate(fitted) for name, value in each.tensors.items()
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file({**tensors, _TIMESTEPS: timesteps.cpu().contiguous()}, folder / FILE)

    stage = context.stage("correct", f"{arm}: fit corrections", key, compute, link=f"{arm}/correct")
    found = load_corrections(stage.file(FILE), recipe, registry)
    return replace(final, stage=stage, stages=(*final.stages, stage), corrections=found)


def predictions_on(task: Task, calibration: CalibrationSet, run: Run, progress: Progress) -> Tensor:
    """What a network predicts on every recorded input [S, N, ...], guidance included."""
    predictions = []
    with torch.no_grad():
        for index in range(calibration.num_steps):
            inputs = calibration.step(index, slice(None))
            predictions.append(task.combine(run(task.network_inputs(inputs)), inputs))
            progress(index + 1, calibration.num_steps)
    return torch.stack(predictions)


def fit_corrections(corrections: Sequence[Correction], data: CorrectionData) -> tuple[FittedCorrection, ...]:
    """Fit each correction to predictions that those before it have corrected."""
    fitted = []
    for correction in corrections:
        with plugin_call("correction", correction, "fit"):
            tensors = check_fitted(correction, correction.fit(data))
        found = FittedCorrection(correction, data.timesteps.cpu(), tensors)
        fitted.append(found)
        predictions = []
        for index, prediction in enumerate(data.quantized_predictions):
            with plugin_call("correction", correction, "correct"):
                corrected = correction.correct(found.tensors, index, prediction)
            predictions.append(check_corrected(correction, prediction, corrected))
        data = replace(data, quantized_predictions=torch.stack(predictions))
    return tuple(fitted)


def load_corrections(path: Path, recipe: Recipe, registry: Registry) -> tuple[FittedCorrection, ...]:
    """The corrections that were stored; raises ArtefactError for a truncated or foreign file."""
    state = load_state(path)
    timesteps = state.pop(_TIMESTEPS)

    def tensors(index: int) -> Mapping[str, Tensor]:
        prefix = f"{index}/"
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    found = enumerate(_corrections(recipe, registry))
    return tuple(FittedCorrection(correction, timesteps, tensors(index)) for index, correction in found)


def _corrections(recipe: Recipe, registry: Registry) -> list[Correction]:
    return [registry.create(Kind.CORRECTION, choice) for choice in recipe.corrections]
