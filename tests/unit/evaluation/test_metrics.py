"""Metrics against closed forms and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from quantlab.evaluation.interval import interval
from quantlab.evaluation.metrics import METRICS, Accuracy, InceptionScoreMetric, PairedError
from quantlab.evaluation.metrics.fid import NoOptions, frechet_distance
from quantlab.evaluation.metrics.precision_recall import ManifoldPrecisionRecall
from quantlab.evaluation.quality import noise_floor
from quantlab.evaluation.samples import SampleSet


def gaussian(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def sample_set(**changes: Tensor) -> SampleSet:
    images = torch.zeros(4, 1, 2, 2)
    parts = {
        "images": images,
        "labels": torch.arange(4),
        "features": gaussian(4, 0),
        "logits": torch.eye(4) * 100,
        "teacher_images": images,
        "teacher_features": gaussian(4, 1),
        "reference_features": gaussian(4, 2),
    }
    return SampleSet(**{**parts, **changes})


def test_frechet_distance_against_float64() -> None:
    a, b = gaussian(200, 0), gaussian(300, 1, 0.5)
    one, other = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    mean = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    expected = mean + np.trace(one + other) - 2 * np.trace(sqrtm(one @ other).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frechet_distance_of_what_is_not_finite_is_nan(value: float) -> None:
    """The eigenvalues of such a covariance end the process in native code."""
    a = gaussian(20, 0)
    broken = a.clone()
    broken[3, 2] = value
    assert math.isnan(frechet_distance(a, broken)) and math.isnan(frechet_distance(broken, a))


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    a = gaussian(500, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a + 2, a) == pytest.approx(6 * 4, rel=1e-5)


def test_inception_score_in_closed_form() -> None:
    metric = InceptionScoreMetric(NoOptions())
    assert metric.compute(sample_set())["is"] == pytest.approx(4)  # sure and evenly spread over four classes
    assert metric.compute(sample_set(logits=torch.zeros(4, 4)))["is"] == pytest.approx(1)


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [1.5], [50.0], [51.0]])
    metric = ManifoldPrecisionRecall(neighbours=1)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    precision, recall = metric.compute()
    # Radii of the real points: 1, 1, 1, 8; both small generated points lie inside, both large ones do not.
    assert precision.item() == 0.5
    # Radii of the generated points: 1, 1, 1, 1; 0, 1 and 2 are covered, 10 is not.
    assert recall.item() == 0.75


def test_precision_and_recall_do_not_depend_on_batches() -> None:
    a, b = gaussian(40, 0), gaussian(50, 1)
    whole, parts = ManifoldPrecisionRecall(), ManifoldPrecisionRecall()
    whole.update(a, real=True)
    whole.update(b, real=False)
    for part in a.split(7):
        parts.update(part, real=True)
    for part in b.split(11):
        parts.update(part, real=False)
    assert whole.compute() == parts.compute()


def test_accuracy_counts() -> None:
    labels = torch.tensor([0, 1, 3, 3])
    assert Accuracy(NoOptions()).compute(sample_set(labels=labels))["accuracy"] == 0.75


def test_paired_error_in_closed_form() -> None:
    values = PairedError(NoOptions()).compute(sample_set(images=torch.full((4, 1, 2, 2), 0.2)))
    assert values["paired-mse"] == pytest.approx(0.04)
    assert values["psnr"] == pytest.approx(10 * math.log10(4 / 0.04), rel=1e-5)
    assert PairedError(NoOptions()).compute(sample_set())["psnr"] == math.inf


def test_names_are_distinct_and_documented() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.__doc__ for metric in METRICS)


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert math.isnan(interval([1.0]).low)


def test_noise_floor_shrinks_with_the_number() -> None:
    real = gaussian(400, 0)
    few, many = (noise_floor(real, count, 0, draws=5) for count in (50, 400))
    assert max(many) < min(few)
    assert len(few) == 5 and noise_floor(real, 50, 0, draws=5) == few
