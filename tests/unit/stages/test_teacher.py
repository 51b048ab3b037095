"""The float model's features along a training are a stage of their own, which changes no number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from toys import make_toy

from quantlab.contracts.sections import Tune
from quantlab.plugins import load_registry
from quantlab.recipe.schema import Recipe
from quantlab.report.console import make_console
from quantlab.stages import prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.stages.teacher import _inverse, _order
from quantlab.store import Store, create_run
from quantlab.tuning.distill import DistillTuner

LOSSES = ["mse", {"features": {"feature": "blocks.0", "weight": 0.5}}, {"relation": {"feature": "blocks.1"}}]


def trained(root: Path, weight_bits: int = 2, seed: int = 0, **tune: object) -> quantize.Quantized:
    """A small denoiser, trained with a store under ``root``."""
    task = make_toy(weight_bits=weight_bits).task
    settings = {"tuners": ["distill"], "iterations": 10, "batch": 4, "rank": 2, "losses": LOSSES, **tune}
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": {"source": "memory", "name": "toy"},
            "method": "toy",
            "budget": {"weight_bits": weight_bits, "activation_bits": 8},
            "calibrate": {"trajectories": 12, "samples": 4},
            "tune": settings,
            "seed": seed,
        }
    )
    context = RunContext(Store(root), create_run(root, "toy", "0" * 16), load_registry(), make_console(quiet=True))
    captured = prepare.capture(context, task)
    calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, 0)
    plan = prepare.plan(captured.sites, recipe, {})
    assigned = quantize.assign_bits(context, captured, calibrated, plan, recipe, "toy")
    return quantize.tune(context, captured, calibrated, assigned, recipe, "toy")


def history(found: quantize.Quantized) -> Mapping[str, list[float]]:
    return json.loads(found.stage.file("history.json").read_text())


def teachers(root: Path) -> int:
    return len([path for path in (root / ".store").glob("teacher-*") if path.is_dir()])


def test_the_losses_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    live = trained(tmp_path / "live", teacher_store_mib=0)
    kept = trained(tmp_path / "kept")
    assert teachers(tmp_path / "live") == 0 and teachers(tmp_path / "kept") == 1
    assert history(kept) == history(live)
    assert kept.stage.file("tuned.safetensors").read_bytes() == live.stage.file("tuned.safetensors").read_bytes()
    assert kept.stage.digest == live.stage.digest, "where the features come from is no part of the result"


def test_methods_and_bits_of_a_seed_share_them(tmp_path: Path) -> None:
    first = trained(tmp_path)
    second = trained(tmp_path, weight_bits=4)
    assert [stage.name for stage in second.stages] == ["assign", "teacher", "tune"]
    assert not first.stages[1].reused and second.stages[1].reused
    trained(tmp_path, adapter_learning_rate=1e-3)
    assert teachers(tmp_path) == 1
    trained(tmp_path, seed=1)
    assert teachers(tmp_path) == 2, "another seed draws other batches"


def test_nothing_is_computed_for_a_training_that_is_there(tmp_path: Path) -> None:
    trained(tmp_path, teacher_store_mib=0)
    assert trained(tmp_path).stage.reused and teachers(tmp_path) == 0


def test_a_limit_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size_mib = 10 * 4 * (12 + 12) * 6 * 6 * 4 / 2**20
    trained(tmp_path, teacher_store_mib=0.99 * size_mib)
    assert teachers(tmp_path) == 0
    trained(tmp_path, teacher_store_mib=1.01 * size_mib, adapter_learning_rate=1e-3)
    assert teachers(tmp_path) == 1
    (file,) = (tmp_path / ".store").glob("teacher-*/taps.safetensors")
    assert size_mib * 2**20 < file.stat().st_size < size_mib * 2**20 + 1000


def test_a_loss_on_the_output_alone_needs_no_features(tmp_path: Path) -> None:
    assert [stage.name for stage in trained(tmp_path, losses=["mse"]).stages] == ["assign", "tune"]


def test_a_feature_keeps_its_memory_layout() -> None:
    """Sums over another layout have other last bits."""
    value = torch.randn(2, 3, 4, 5)
    for given in (value, value.to(memory_format=torch.channels_last), value.transpose(1, 3)):
        order = _order(given)
        stored = given.permute(order)
        assert stored.is_contiguous()
        found = stored.permute(_inverse(order))
        assert torch.equal(found, given) and found.stride() == given.stride()


def test_the_tuner_visits_what_it_trains_on() -> None:
    visits = DistillTuner(DistillTuner.Config()).visits(Tune(iterations=7, batch=5), 3, 20, 11)
    assert [visit.step for visit in visits] == [0, 1, 2, 0, 1, 2, 0]
    assert all(len(visit.samples) == 5 for visit in visits)
    assert torch.equal(visits[0].samples, visits[2].samples) and not torch.equal(visits[0].samples, visits[3].samples)
