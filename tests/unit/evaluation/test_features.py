"""The judge's features, and Inception's with a stub in torch-fidelity's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from quantlab.contracts.sections import Evaluate, Features, Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.evaluation import weights
from quantlab.evaluation.features import (
    INCEPTION_FILE,
    JudgeNetwork,
    feature_identity,
    feature_network,
)
from quantlab.models.builtin import BuiltinConfig, BuiltinSource
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, cell_digest, run
from quantlab.stages.measure import measured_with
from quantlab.store import digest_of_file

STUB = '''
import torch
from torch import nn


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1x1 = nn.Conv2d(3, 192, 1)


class FeatureExtractorInceptionV3(nn.Module):
    """Two-dimensional features: the mean and the largest pixel."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = Mixed()
        self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float()
        self.Mixed_6d.branch1x1(x[:, :, :2, :2])
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1), x[:, :, 0, 0]
'''


RECIPE = "digits/mpq-dm-w2a4"
SETTINGS = ("baselines=[]", "method=min-max", "evaluate.metrics=[fid, sfid, is, accuracy]")


def go(root: Path, *overrides: str):
    loaded = load_recipe(RECIPE, [*SETTINGS, *overrides], profile="smoke")
    return run(loaded, RunOptions(root, "cpu", "float32", False, make_console(quiet=True)))


@pytest.fixture
def task():
    return BuiltinSource(BuiltinConfig()).load(Model(name="digits"), Sampling(), torch.device("cpu"), torch.float32)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch-fidelity with a small network, and a file of its weights."""
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "feature_extractor_inceptionv3.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    layer = torch.nn.Conv2d(3, 192, 1)
    state = {"Mixed_6d.branch1x1.weight": torch.ones_like(layer.weight), "Mixed_6d.branch1x1.bias": torch.arange(192.0)}
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def asked(path: Path | None) -> Evaluate:
    return Evaluate(features=Features.INCEPTION, inception_weights=str(path) if path else None)


def test_the_judge_is_the_task(task) -> None:
    network = feature_network(task, Evaluate())
    images = task.reference_images()[:5]
    features, logits = network.features(images)
    assert torch.equal(features, task.judge(images)[0]) and torch.equal(logits, task.judge(images)[1])
    assert isinstance(network, JudgeNetwork) and network.identity == {}
    spatial = network.spatial(images)
    assert spatial.shape == (5, 256) and spatial.min() >= 0
    assert torch.equal(torch.relu(task.classifier.hidden(spatial)), features), "the map that the features come from"


def test_inception_sees_bytes_of_three_channels(task, stub) -> None:
    network = feature_network(task, asked(stub))
    images = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 1, 8, 8)
    features, logits = network.features(images)
    assert features.tolist() == [[0, 0], [255, 255]] and logits.shape == (2, 3)
    spatial = network.spatial(images)
    assert spatial.shape == (2, 7 * 4), "seven channels of the map"
    assert spatial[0].tolist() == [float(channel) for channel in range(7) for _ in range(4)]


def test_the_networks_hash_is_part_of_what_results_depend_on(task, stub) -> None:
    network = feature_network(task, asked(stub))
    assert network.identity == feature_identity(asked(stub))
    assert network.identity["inception_weights"] == digest_of_file(stub)
    assert feature_identity(Evaluate()) == {}


def test_missing_weights_are_told_with_name_and_place(task, stub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(ModelError) as caught:
        feature_network(task, asked(None))
    assert str(tmp_path / "home" / "hub" / "checkpoints" / INCEPTION_FILE) in str(caught.value)
    assert "fetch https://" in str(caught.value)
    with pytest.raises(ModelError, match=r"elsewhere\.pth"):
        feature_network(task, asked(tmp_path / "elsewhere.pth"))


def test_foreign_weights_are_told(task, stub) -> None:
    torch.save({"other": torch.zeros(1)}, stub)
    with pytest.raises(ModelError, match="no weights of Inception"):
        feature_network(task, asked(stub))


def test_a_missing_package_is_told_with_its_pip_line(task, stub, monkeypatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install torch-fidelity"):
        feature_network(task, asked(stub))


def test_a_run_with_other_features_is_another_protocol(stub, tmp_path) -> None:
    judged = go(tmp_path)
    options = ("evaluate.features=inception", f"evaluate.inception_weights={stub}")
    seen = go(tmp_path, *options)
    first, other = judged.rows[-1], seen.rows[-1]
    assert first.protocol != other.protocol and first.metrics["fid"] != other.metrics["fid"]
    assert first.metrics["accuracy"] == other.metrics["accuracy"], "the task's classifier still tells the classes"
    assert seen.folder is not None and (seen.folder / "features").is_dir()
    again = go(tmp_path, *options)
    assert again.rows == seen.rows
    events = [json.loads(line) for line in (again.folder / "events.jsonl").read_text().splitlines()]
    assert {event["status"] for event in events} == {"reused"}


def test_what_is_missing_is_told_before_anything_runs(tmp_path) -> None:
    with pytest.raises(ModelError, match="needs prompts"):
        go(tmp_path / "runs", "evaluate.metrics=[clip-score]")
    assert not (tmp_path / "runs").exists()


def test_metric_options_are_part_of_what_results_depend_on(task) -> None:
    loaded = [
        load_recipe(RECIPE, [f"evaluate.metrics=[{metric}]"])
        for metric in ("ssim", "{ssim: {window: null}}", "{ssim: {window: 3}}")
    ]
    found = [measured_with(each.registry, JudgeNetwork(task), each.recipe.evaluate) for each in loaded]
    assert found == [{}, {}, {"metric_options": {"ssim": {"window": 3}}}]
    digests = [cell_digest(each) for each in loaded]
    assert digests[0] == digests[1] != digests[2]


def test_a_wrong_metric_option_has_its_line() -> None:
    with pytest.raises(RecipeError, match='unknown key "windows"'):
        load_recipe(RECIPE, ["evaluate.metrics=[{ssim: {windows: 3}}]"])
