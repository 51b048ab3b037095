"""Training of the zoo's models: as it was, repeatable, and the same when it is stopped and goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlab.errors import ArtefactError, RecipeError
from quantlab.zoo import denoiser, shapes
from quantlab.zoo import train as training_module
from quantlab.zoo.classifier import train_classifier
from quantlab.zoo.denoiser import Training
from quantlab.zoo.description import DenoiserModel
from quantlab.zoo.models import DENOISERS, JUDGES
from quantlab.zoo.train import train

(SHAPES,) = shapes.DENOISERS


@pytest.mark.parametrize(("name", "losses"), [("digits", [1.109760, 1.052865]), ("digits-heavy", [1.120167, 1.079541])])
def test_digits_begin_as_the_shipped_ones_did(name: str, losses: list[float]) -> None:
    training = Training(DENOISERS[name])
    assert [training.step() for _ in losses] == pytest.approx(losses, abs=1e-5)


def test_the_shapes_denoiser_is_of_the_size_that_may_ship() -> None:
    training = Training(replace(SHAPES, settings=replace(SHAPES.settings, batch=4)))
    count = sum(value.numel() for value in training.network.parameters())
    assert 2e6 < count < 4e6 and 2 * count < 7.5e6, "in fp16, with the judge below 8 MB"
    assert training.step() == pytest.approx(1.0, abs=0.3), "an untrained network says nothing about the noise"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> DenoiserModel:
    """A training of five iterations, its state kept after each two."""
    settings = replace(DENOISERS["digits"].settings, iterations=5, batch=4, decay=2)
    model = replace(DENOISERS["digits"], name="short", settings=settings)
    monkeypatch.setitem(DENOISERS, "short", model)  # type: ignore[arg-type]
    monkeypatch.setattr(training_module, "KEEP_EVERY", 2)
    monkeypatch.setattr(training_module, "LOG_EVERY", 1)
    return model


def stop_at(iteration: int):
    def log(done: int, total: int, loss: float) -> None:
        if done == iteration:
            raise KeyboardInterrupt

    return log


def test_a_stopped_training_goes_on_to_the_same_weights_and_losses(short: DenoiserModel, tmp_path: Path) -> None:
    whole = train("short", tmp_path / "whole")
    for at in (4, 5):
        with pytest.raises(KeyboardInterrupt):
            train("short", tmp_path / "parts", stop_at(at))
    seen: list[int] = []
    parts = train("short", tmp_path / "parts", lambda done, total, loss: seen.append(done))
    assert seen == [5]
    assert parts.read_bytes() == whole.read_bytes()
    records = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, parts)]
    assert records[0]["loss"] == records[1]["loss"] and len(records[0]["loss"]) == 5
    assert records[0]["settings"] == vars(short.settings)
    assert {path.name for path in parts.parent.iterdir()} == {"short.safetensors", "short.json"}


def test_the_state_of_other_settings_or_half_a_state_is_refused(
    short: DenoiserModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("short", tmp_path, stop_at(3))
    changed = replace(short, settings=replace(short.settings, learning_rate=1.0))
    monkeypatch.setitem(DENOISERS, "short", changed)  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match="other settings") as error:
        train("short", tmp_path)
    partial = tmp_path / "short.partial.pt"
    assert str(partial) in str(error.value)
    partial.write_bytes(partial.read_bytes()[:100])
    with pytest.raises(ArtefactError, match=r"cannot be read(.|\n)*delete the file"):
        train("short", tmp_path)


def test_a_longer_training_begins_as_a_shorter_one(short: DenoiserModel, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = replace(short, settings=replace(short.settings, iterations=9))
    monkeypatch.setattr(denoiser, "RISE", 1)
    first, second = Training(short), Training(longer)
    assert [first.step() for _ in range(3)] == [second.step() for _ in range(3)]
    rates = []
    while second.iteration < 9:
        rates.append(second.optimizer.param_groups[0]["lr"])
        second.step()
    assert rates[-1] == pytest.approx(rates[-2] / 2) and second.optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("name", list(JUDGES))
def test_a_judge_is_trained_to_the_same_weights_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "NUM_TEST", 100)
    judge = replace(JUDGES[name], settings=replace(JUDGES[name].settings, iterations=3, batch=16))
    (first, accuracy), (second, same) = (
        train_classifier(judge.build, judge.data.lessons, judge.settings, lambda *call: None) for _ in range(2)
    )
    assert accuracy == same
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert not first.training


def test_unknown_names_offer_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='did you mean "shapes-classifier"'):
        train("shape-classifier", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_training_leaves_the_number_of_threads(short: DenoiserModel, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        train("short", tmp_path, stop_at(1))
    assert torch.get_num_threads() == threads
