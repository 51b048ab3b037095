"""Models that draw without a judge, and models that classify: what is measured, and what is said before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest
from toy_source import ToyClassifierTask, ToyGenerativeTask, run_toy
from toys import ToyDenoiser, ToyTask

from quantlab.errors import ModelError, RecipeError
from quantlab.stages.kinds import evaluation_of

PAIRED = "evaluate.metrics=[paired-error, ssim]"
CLASSES = "evaluate.metrics=[{top-k: {k: [1, 3]}}, agreement, kl-to-float]"


def test_a_denoiser_without_judge_is_compared_with_the_float_images(tmp_path: Path) -> None:
    result = run_toy(tmp_path, "denoiser", PAIRED)
    full, quantized = result.rows
    assert full.metrics["paired-mse"] == 0 and full.other_noise == {}
    drawn = [load_file(result.folder / arm / "evaluate" / "images.safetensors")["images"] for arm in ("float", "mse")]
    expected = (drawn[0].double() - drawn[1].double()).square().mean().item()
    assert quantized.metrics["paired-mse"] == pytest.approx(expected, rel=1e-5) and expected > 0
    assert quantized.protocol_fields["reference_set"] is None
    assert (result.folder / "samples.png").is_file()


@pytest.mark.parametrize(
    ("metric", "missing"),
    [
        ("fid", "features of images and real images"),
        ("fid-to-teacher", "features of images"),
        ("sfid", "spatial features of images and real images"),
        ("accuracy", "class logits of images"),
    ],
)
def test_what_a_denoiser_lacks_is_said_before_any_work(tmp_path: Path, metric: str, missing: str) -> None:
    with pytest.raises(ModelError, match=f"needs {missing}") as error:
        run_toy(tmp_path, "denoiser", f"evaluate.metrics=[paired-error, {metric}]")
    assert error.value.got == metric and "paired-error" in str(error.value.allowed)
    assert "fid" not in str(error.value.allowed).split(", ")
    assert not (tmp_path / "runs").exists()


def test_a_classifier_has_shares_with_intervals_beside_the_float_row(tmp_path: Path) -> None:
    result = run_toy(tmp_path, "classifier", CLASSES, "baselines=[min-max]")
    assert [row.method for row in result.rows] == ["full precision", "min-max", "mse"]
    full, _, quantized = result.rows
    assert full.metrics["agreement"] == 1 and full.metrics["kl-to-float"] == 0
    stored = load_file(result.folder / "mse" / "evaluate" / "answers.safetensors")
    exact = load_file(result.folder / "reference" / "answers.safetensors")
    logits, labels = stored["logits"].double(), stored["labels"]
    right = int((logits.argmax(1) == labels).sum())
    assert len(labels) == 40 and quantized.metrics["top-1"] == pytest.approx(right / 40)
    third = sum(int(label) in row.topk(3).indices.tolist() for row, label in zip(logits, labels, strict=True))
    assert quantized.metrics["top-3"] == pytest.approx(third / 40)
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(1), exact["logits"].double().log_softmax(1), reduction="batchmean", log_target=True
    )
    assert quantized.metrics["kl-to-float"] == pytest.approx(divergence.item(), rel=1e-9)
    around = binomtest(right, 40).proportion_ci(0.95, method="wilson")
    assert quantized.intervals["top-1"] == pytest.approx((around.low, around.high), rel=1e-9)
    assert "top-1" in result.table() and "FID" not in result.table()
    page = (result.folder / "report.html").read_text()
    assert "KL to float" in page and 'id="samples"' not in page and not (result.folder / "samples.png").exists()


def test_a_bootstrap_takes_the_place_of_wilson(tmp_path: Path) -> None:
    wilson = run_toy(tmp_path, "classifier", CLASSES)
    drawn = run_toy(tmp_path, "classifier", CLASSES, "evaluate.bootstrap=200")
    assert wilson.rows[1].metrics == drawn.rows[1].metrics
    low, high = drawn.rows[1].intervals["agreement"]
    assert wilson.rows[1].intervals["agreement"] != (low, high) and low < drawn.rows[1].metrics["agreement"] < high


def test_another_batch_gives_the_same_answers(tmp_path: Path) -> None:
    first = run_toy(tmp_path, "classifier", CLASSES)
    other = run_toy(tmp_path, "classifier", CLASSES, "evaluate.batch=40")
    assert first.rows[1].metrics == pytest.approx(other.rows[1].metrics, rel=1e-5)
    assert first.rows[1].protocol == other.rows[1].protocol


def test_metrics_of_the_other_outcome_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gives classes") as error:
        run_toy(tmp_path, "classifier", "evaluate.metrics=[top-k, fid]")
    assert error.value.got == "fid" and error.value.allowed == "agreement, kl-to-float, top-k"
    with pytest.raises(RecipeError, match="gives images"):
        run_toy(tmp_path, "denoiser", "evaluate.metrics=[top-k]")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method=mpq-dm"], "activations.per_timestep, tune.losses: relation"),
        (["activations.per_timestep=true"], "activations.per_timestep"),
        (["corrections=[noise-correction]"], "corrections: noise-correction"),
        (["calibrate.sampler=normal-timesteps"], "calibrate.sampler: normal-timesteps"),
        (["baselines=[mpq-dm]"], "activations.per_timestep, tune.losses: relation"),
    ],
)
def test_methods_that_need_a_denoiser_say_so(tmp_path: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match="needs a denoiser") as error:
        run_toy(tmp_path, "classifier", CLASSES, *overrides, dry_run=True)
    assert error.value.got == key


def test_too_few_labelled_inputs_and_too_many_named_classes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fewer labelled inputs") as error:
        run_toy(tmp_path, "classifier", CLASSES, "evaluate.samples=61")
    assert error.value.allowed == "2 to 60"
    with pytest.raises(ModelError, match="top-k"):
        run_toy(tmp_path, "classifier", "evaluate.metrics=[{top-k: {k: [1, 7]}}]")


def test_a_task_of_no_kind_is_refused() -> None:
    assert evaluation_of(ToyClassifierTask()).outcome == "classes"
    network = ToyDenoiser().eval()
    assert evaluation_of(ToyGenerativeTask(network)).outcome == "images"
    with pytest.raises(ModelError, match="nothing can be measured"):
        evaluation_of(ToyTask(network))


def test_events_name_the_same_stages_for_both(tmp_path: Path) -> None:
    for name, metrics in (("denoiser", PAIRED), ("classifier", CLASSES)):
        folder = run_toy(tmp_path, name, metrics).folder
        assert folder is not None
        stages = [json.loads(line)["stage"] for line in (folder / "events.jsonl").read_text().splitlines()]
        assert [stage for stage in stages if stage in ("capture", "calibrate", "reference")] == [
            "capture",
            "calibrate",
            "reference",
        ]
        assert "float/evaluate" in stages and "mse/evaluate" in stages
