"""One training iteration of the whole MPQ-DM recipe beside the full-precision model's own training step."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Arm, Case, Missing
from quantlab.contracts.model import Inputs, Task
from quantlab.contracts.tuning import Checkpoint, TuneJob, Tuner
from quantlab.plugins import Kind, Registry, load_registry
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.report.console import make_console
from quantlab.run import load_task
from quantlab.stages import prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.stages.teacher import remembered_taps
from quantlab.store import Store, create_run

RECIPES = ("digits/mpq-dm-w2a4", "shapes/mpq-dm-w2a4")
ITERATIONS = 2
"""In one timing of an arm."""
QUICKLY_ASSIGNED = (
    "baselines=[]",
    "allocate=[uniform]",
    "weights.observer=min_max",
    "activations.observer=min_max",
    "calibrate.trajectories=32",
    "calibrate.samples=1",
    f"tune.iterations={ITERATIONS}",
)
"""Bits and ranges that are found at once: an iteration costs the same with any."""
COMPILED = ("weights.quantizer={affine: {compiled: true}}", "activations.quantizer={affine: {compiled: true}}")


class Unsaved(Checkpoint):
    """Keeps nothing."""

    def load(self) -> None:
        """The start."""

    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is saved."""


def cases(quick: bool) -> Iterator[Case]:
    """The networks that ship, at the recipes' batch of 32."""
    for recipe in RECIPES[:1] if quick else RECIPES:
        yield _case(recipe)


def _case(recipe: str) -> Case:
    registry = load_registry()
    job, stored, tuner, task = _prepared(load_recipe(recipe, QUICKLY_ASSIGNED, registry), registry)
    _, compiled, _, _ = _prepared(load_recipe(recipe, (*QUICKLY_ASSIGNED, *COMPILED), registry), registry)
    batch = job.settings.batch
    arms: dict[str, Arm] = {
        "float model's own step": _float_steps(task, job.calibration.step(0, slice(0, batch))),
        "features in every iteration": lambda: tuner.tune(job),
        "features stored": lambda: tuner.tune(stored),
        "features stored, compiled quantizers": lambda: tuner.tune(compiled),
    }
    goal = {"features stored": "at most 1.6", "features stored, compiled quantizers": "at most 1.6"}
    work = f"{recipe.partition('/')[0]}, {ITERATIONS} iterations of {batch} samples"
    for arm in arms.values():
        assert not isinstance(arm, Missing)
        arm()  # so that nothing compiles later
    title, baseline = "Training iteration of MPQ-DM", "float model's own step"
    return Case(title, work, baseline, arms, goal=goal, slow=tuple(arms), slower_than_baseline=True)


def _prepared(loaded: LoadedRecipe, registry: Registry) -> tuple[TuneJob, TuneJob, Tuner, Task]:
    """The recipe's training without and with stored features, its tuner and the float task."""
    recipe = loaded.recipe
    task = load_task(loaded, "cpu", "float32")
    # The stored features are mapped into memory; the folder may go when the process does.
    folder = Path(tempfile.mkdtemp())
    context = RunContext(Store(folder), create_run(folder, "b", "0" * 16), registry, make_console(quiet=True))
    captured = prepare.capture(context, task)
    plan = prepare.plan(captured.sites, recipe, loaded.origin, task.protect)
    calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
    assigned = quantize.assign_bits(context, captured, calibrated, plan, recipe, recipe.method)
    tuner: Tuner = registry.create(Kind.TUNER, recipe.tune.tuners[0])
    adapter = tuner.adapter(recipe.tune)
    assert adapter is not None
    quantize.add_adapters(assigned.student, adapter, recipe.seed)
    job = quantize.tune_job(
        captured, calibrated, assigned, registry, recipe.tune, recipe.seed, Unsaved(), lambda done, total: None
    )
    taps = remembered_taps(context, captured, calibrated, recipe, tuner, "taps", tuned=False)
    assert taps is not None
    return job, replace(job, taps_at=taps.at), tuner, task


def _float_steps(task: Task, inputs: Inputs) -> Callable[[], None]:
    """As many steps of the float network's training: forward, backward and AdamW on all parameters."""
    network: nn.Module = copy.deepcopy(task.network).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    target = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
    given = task.network_inputs(inputs)

    def steps() -> None:
        for _ in range(ITERATIONS):
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(network(**given, **task.static)[0], target).backward()
            optimizer.step()

    return steps
