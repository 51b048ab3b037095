"""The scores that a method's policies declare, each computed once and shared through the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantlab.allocation.assign import AssignMethod, Scores, smoothed_records
from quantlab.allocation.plan import Plan
from quantlab.allocation.scores import ScoreMeter
from quantlab.allocation.student import build_student
from quantlab.calibration.spill import streaming_in
from quantlab.contracts.allocation import BitPolicy
from quantlab.contracts.model import CalibrationBatch, Progress
from quantlab.contracts.scores import Operand, ScoreRequest
from quantlab.plugins import Kind
from quantlab.recipe.schema import Recipe
from quantlab.stages.context import RunContext, as_json
from quantlab.stages.prepare import Calibrated, Captured, layer_set_digest
from quantlab.store import JSON, StageFolder

SCORES_VERSION = 1
"""Raised with the versions of the policies that declare scores, since hashes of results hold those."""


@dataclass(frozen=True)
class MeasuredScores:
    """Scores with the stages that hold them."""

    values: Scores
    stages: tuple[StageFolder, ...]


def declared(policies: Sequence[BitPolicy], recipe: Recipe) -> tuple[ScoreRequest, ...]:
    """What the policies will ask for, each once."""
    return tuple(dict.fromkeys(request for policy in policies for request in policy.scores(recipe.budget)))


def measure_scores(
    context: RunContext,
    captured: Captured,
    calibrated: Calibrated,
    batch: CalibrationBatch,
    plan: Plan,
    method: AssignMethod,
    recipe: Recipe,
    arm: str,
) -> MeasuredScores:
    """The declared scores. A stage's key has nothing of the budget or the policy, so that methods share it."""
    stages = {
        request: _stage(context, captured, calibrated, batch, plan, method, recipe, request, f"{arm}/scores-{index}")
        for index, request in enumerate(declared(method.policies, recipe))
    }
    values = {request: load_file(stage.file("scores.safetensors")) for request, stage in stages.items()}
    return MeasuredScores(values, tuple(stages.values()))


def _stage(
    context: RunContext,
    captured: Captured,
    calibrated: Calibrated,
    batch: CalibrationBatch,
    plan: Plan,
    method: AssignMethod,
    recipe: Recipe,
    request: ScoreRequest,
    link: str,
) -> StageFolder:
    plugins = [(Kind.PASS, choice) for choice in recipe.passes] + [(Kind.QUANTIZER, recipe.weights.quantizer)]
    key: dict[str, JSON] = {
        "version": SCORES_VERSION,
        "calibrate": calibrated.stage.digest,
        "layers": layer_set_digest(plan),
        "request": {name: _plain(value) for name, value in dataclasses.asdict(request).items()},
        "samples": recipe.calibrate.samples,
        "passes": [as_json(choice) for choice in recipe.passes],
        "weights": as_json(recipe.weights),
        "seed": recipe.seed,
    }
    if recipe.calibrate.sampler is not None:
        key["sampler"] = as_json(recipe.calibrate.sampler)
        plugins.append((Kind.SAMPLER, recipe.calibrate.sampler))
    if request.operand is Operand.INPUT:
        key["activations"] = as_json(recipe.activations)
        plugins.append((Kind.QUANTIZER, recipe.activations.quantizer))
    key["plugins"] = context.versions(*plugins)

    def compute(folder: Path, progress: Progress) -> None:
        student = build_student(captured.task, captured.graph, plan, share=calibrated.batch is not None)
        rng = torch.Generator().manual_seed(recipe.seed)
        with streaming_in(folder, calibrated.batch) as streaming:
            records = smoothed_records(student, method, batch, streaming)
            meter = ScoreMeter(student, records, method.choices, batch, calibrated.batch)
            found = meter.measure(request, rng, progress)
        save_file(found, folder / "scores.safetensors")

    title = f"{link.partition('/')[0]}: {request.score} of {request.operand}s"
    return context.stage("scores", title, key, compute, link=link)


def _plain(value: object) -> JSON:
    return list(value) if isinstance(value, tuple) else value  # type: ignore[return-value]
