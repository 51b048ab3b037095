"""Scores are a stage of their own, shared by methods."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from quantlab.contracts.scores import Operand
from quantlab.models.module import ModuleTask
from quantlab.plugins import load_registry
from quantlab.recipe.schema import Recipe
from quantlab.report.console import make_console
from quantlab.stages import prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.stages.scores import declared
from quantlab.store import Store, create_run


def assigned(root: Path, policy: dict, weight_bits: int = 3, **sections) -> quantize.Quantized:
    """A small module, assigned with a store under ``root``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 4))
    task = ModuleTask(network.eval(), [torch.randn(32, 6, generator=torch.Generator().manual_seed(1))])
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": {"source": "memory", "name": "small"},
            "method": "toy",
            "budget": {"weight_bits": weight_bits, "activation_bits": 8},
            "calibrate": {"trajectories": 32, "samples": 32},
            "allocate": [policy],
            **sections,
        }
    )
    run = create_run(root, "memory", "0" * 16)
    context = RunContext(Store(root), run, load_registry(), make_console(quiet=True))
    captured = prepare.capture(context, task)
    plan = prepare.plan(captured.sites, recipe, {})
    calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
    return quantize.assign_bits(context, captured, calibrated, plan, recipe, "toy")


def stages(root: Path, name: str) -> int:
    return len([path for path in (root / ".store").glob(f"{name}-*") if path.is_dir()])


def test_methods_share_scores_and_nothing_else_does(tmp_path: Path) -> None:
    options = {"score": "output_mse", "widths": [2, 3, 4]}
    first = assigned(tmp_path, {"milp": options})
    assert [stage.name for stage in first.stages] == ["scores", "assign"]
    second = assigned(tmp_path, {"greedy": options})
    assert second.stages[0].reused and second.stages[0].digest == first.stages[0].digest
    assert stages(tmp_path, "scores") == 1 and stages(tmp_path, "assign") == 2
    third = assigned(tmp_path, {"milp": options}, weight_bits=4)
    assert third.stages[0].reused, "a score knows nothing of the budget"
    assigned(tmp_path, {"milp": options}, passes=[{"smooth": {"alpha": 0.5}}])
    assigned(tmp_path, {"milp": options}, weights={"observer": "min_max"})
    assigned(tmp_path, {"milp": {**options, "score": "fisher"}})
    assert stages(tmp_path, "scores") == 4


def test_a_method_without_scores_has_no_stage_of_them(tmp_path: Path) -> None:
    assert [stage.name for stage in assigned(tmp_path, {"name": "uniform"}).stages] == ["assign"]
    assert stages(tmp_path, "scores") == 0


def test_the_same_recipe_again_is_not_computed(tmp_path: Path) -> None:
    policy = {"energy": {"scope": "network", "sensitivity": "fisher"}}
    once, again = assigned(tmp_path, policy), assigned(tmp_path, policy)
    assert all(stage.reused for stage in again.stages)
    assert all(torch.equal(again.bit_map.weight_bits[name], bits) for name, bits in once.bit_map.weight_bits.items())


def test_policies_that_ask_for_the_same_are_served_once() -> None:
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": {"name": "digits"},
            "method": "toy",
            "budget": {"weight_bits": 3, "activation_bits": 4},
            "allocate": [{"milp": {"activation_widths": [4, 8]}}, {"greedy": {}}],
        }
    )
    method = quantize.method_of(recipe, load_registry())
    assert [request.operand for request in declared(method.policies, recipe)] == [Operand.WEIGHT, Operand.INPUT]
