"""A run whose recording, measuring and tuning go part by part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from quantlab.models.module import ModuleTask
from quantlab.plugins import load_registry
from quantlab.recipe.schema import Recipe
from quantlab.report.console import make_console
from quantlab.report.details import ERRORS_FILE
from quantlab.stages import inspect, prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.store import Store, create_run

SCORED = {"milp": {"score": "output_mse", "widths": [2, 3, 4]}}


class Chain:
    """A small module through recording, assignment, reconstruction and inspection."""

    def __init__(self, root: Path, **calibrate) -> None:
        self.root = root
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 4))
        self.task = ModuleTask(network.eval(), [torch.randn(32, 6, generator=torch.Generator().manual_seed(1))])
        recipe = Recipe.model_validate(
            {
                "version": 1,
                "model": {"source": "memory", "name": "small"},
                "method": "toy",
                "budget": {"weight_bits": 3, "activation_bits": 8},
                "calibrate": {"trajectories": 32, "samples": 32, **calibrate},
                "allocate": [SCORED],
                "tune": {"tuners": [{"reconstruct": {}}], "iterations": 5},
            }
        )
        context = RunContext(
            Store(root), create_run(root, "memory", "0" * 16), load_registry(), make_console(quiet=True)
        )
        captured = prepare.capture(context, self.task)
        plan = prepare.plan(captured.sites, recipe, {})
        self.calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
        self.assigned = quantize.assign_bits(context, captured, self.calibrated, plan, recipe, "toy")
        tuned = quantize.tune(context, captured, self.calibrated, self.assigned, recipe, "toy")
        self.final = quantize.finalize(context, tuned, "toy")
        stage = inspect.inspect_sites(context, captured, self.calibrated, self.final, "toy")
        self.errors = json.loads(stage.file(ERRORS_FILE).read_text())


def test_one_part_gives_the_numbers_of_memory(tmp_path: Path) -> None:
    memory, parts = Chain(tmp_path / "memory"), Chain(tmp_path / "parts", batch=32)
    assert memory.final.stage.digest != parts.final.stage.digest
    assert memory.errors == parts.errors
    state = parts.final.student.network.state_dict()
    for name, value in memory.final.student.network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_small_parts_leave_the_float_network_and_no_files(tmp_path: Path) -> None:
    chain = Chain(tmp_path, batch=5, dtype="float16")
    fresh = Chain(tmp_path / "fresh")
    weights = chain.task.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in fresh.task.network.state_dict().items())
    assert not torch.equal(chain.final.student.network.state_dict()["0.weight"], weights["0.weight"])
    assert not list(tmp_path.rglob("spill-*"))
    for site, errors in fresh.errors.items():
        assert chain.errors[site]["weight"] == pytest.approx(errors["weight"], rel=0.5)
    assert chain.calibrated.data.step(0, slice(None))["input"].dtype == torch.float32


def test_the_recording_is_told(tmp_path: Path) -> None:
    chain = Chain(tmp_path, batch=16)
    about = json.loads(chain.calibrated.stage.file(prepare.PROVENANCE_FILE).read_text())
    assert about["samples"] == 32 and len(about["digest"]) == 16 and about["tensors"]["outputs"]["shape"] == [1, 32, 4]
