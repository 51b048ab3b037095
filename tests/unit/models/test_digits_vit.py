"""The vision transformer that ships, and recipes that quantize it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlab.api import check_zoo
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.graph.compare import largest_difference
from quantlab.models.builtin import BuiltinConfig, BuiltinSource
from quantlab.models.classifier import ClassifierTask
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, run
from quantlab.stages.prepare import capture_sites
from quantlab.zoo.classifier import train_classifier
from quantlab.zoo.models import VISION, weights_path
from quantlab.zoo.vision import VIT


def task() -> ClassifierTask:
    loaded = BuiltinSource(BuiltinConfig()).load(
        Model(name="digits-vit"), Sampling(), torch.device("cpu"), torch.float32
    )
    assert isinstance(loaded, ClassifierTask)
    return loaded


def test_the_weights_that_ship_are_as_good_as_their_record_says() -> None:
    record = json.loads(weights_path("digits-vit").with_suffix(".json").read_text())
    found = task()
    (batch,) = found.labelled(found.num_labelled(), 0, 1000)
    share = (found.network(**batch.inputs).argmax(1) == batch.labels).float().mean().item()
    assert share == pytest.approx(record["test_accuracy"], abs=0.003), "kept in half precision"
    assert share > 0.95 and record["settings"] == vars(VIT.settings)
    assert sum(value.numel() for value in found.network.parameters()) < 1e6


def test_what_is_measured_was_not_trained_on() -> None:
    (images, labels), (held_out, _) = VIT.split()
    assert len(images) + len(held_out) == 1797 and len(held_out) == 898
    seen = {tuple(image.flatten().tolist()) for image in images}
    assert not any(tuple(image.flatten().tolist()) in seen for image in held_out)
    lessons = VIT.lessons(8, 0.0, torch.Generator().manual_seed(VIT.settings.seed))
    assert torch.equal(lessons.test[0], held_out), "the training holds out the same half"
    calibration = task().calibration
    assert calibration is not None and torch.equal(calibration.batch(range(len(images)))[1], labels)


def test_the_training_is_repeatable() -> None:
    settings = replace(VIT.settings, iterations=3, batch=16)
    first, second = (train_classifier(VIT.build, VIT.lessons, settings, lambda *call: None)[0] for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_its_graph_is_the_network() -> None:
    found = task()
    graph, sites = capture_sites(found)
    assert [largest_difference(found.network, graph, found.example_inputs(batch)) for batch in (1, 2, 3)] == [0.0] * 3
    assert {site.name for site in sites} >= {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.3.mlp.fc2", "head"}


def test_a_recipe_runs(tmp_path: Path) -> None:
    loaded = load_recipe("vision/gptq-w3a8", profile="smoke")
    result = run(loaded, RunOptions(tmp_path, "cpu", "float32", False, make_console(quiet=True)))
    assert [row.method for row in result.rows][1:] == [*loaded.recipe.baselines, loaded.recipe.method]
    assert all(set(row.metrics) == {"top-1", "agreement", "kl-to-float"} for row in result.rows)
    assert not any(row.data_free for row in result.rows[1:]), "images of the data calibrate them"


def test_more_images_than_there_are(tmp_path: Path) -> None:
    loaded = load_recipe("vision/gptq-w3a8", ["evaluate.samples=899"], profile="smoke")
    with pytest.raises(ModelError, match="fewer labelled inputs"):
        run(loaded, RunOptions(tmp_path, "cpu", "float32", False, make_console(quiet=True)))


def test_it_draws_no_images() -> None:
    assert set(VISION) == {"digits-vit"}
    with pytest.raises(RecipeError, match="only a denoiser"):
        check_zoo("digits-vit", 200, 2)
