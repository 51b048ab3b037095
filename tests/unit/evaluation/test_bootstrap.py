"""The interval of one set of images."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from quantlab.evaluation.bootstrap import bootstrap
from quantlab.evaluation.metrics import Accuracy, Fid, PairedError, PrecisionRecall
from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.metrics.precision_recall import PrecisionRecallConfig
from quantlab.evaluation.samples import OF_EACH_IMAGE, SampleSet

N = 60
COMPARED_WITH = {"teacher_features", "reference_features", "reference_spatial"}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def samples() -> SampleSet:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    draw = rng(3)
    images = normal(N, 1, 4, 4).clamp(-1, 1)
    return SampleSet(
        images=images,
        labels=torch.arange(N) % 3,
        features=normal(N, 5),
        logits=normal(N, 3),
        teacher_images=(images + 0.1 * normal(N, 1, 4, 4)).clamp(-1, 1),
        teacher_features=normal(N, 5),
        reference_features=normal(2 * N, 5),
    )


def run(metrics, samples: SampleSet, resamples: int = 200, seed: int = 0):
    values = {name: value for metric in metrics for name, value in metric.compute(samples).items()}
    return values, bootstrap(metrics, samples, values, resamples, rng(seed), lambda done, total: None)


def test_accuracy_is_as_numpy_computes_it(samples) -> None:
    values, found = run([Accuracy(NoOptions())], samples)
    right = (samples.logits.argmax(1) == samples.labels).numpy()
    again, draw = [], rng()
    for _ in range(200):
        again.append(right[torch.randint(N, (N,), generator=draw).numpy()].mean())
    expected = np.percentile(again, [2.5, 97.5]) - np.mean(again) + right.mean()
    assert found["accuracy"] == pytest.approx(tuple(expected), abs=1e-6)
    assert found["accuracy"][0] < values["accuracy"] < found["accuracy"][1]


def test_its_width_is_that_of_a_binomial(samples) -> None:
    _, found = run([Accuracy(NoOptions())], samples, 800)
    share = (samples.logits.argmax(1) == samples.labels).double().mean().item()
    low, high = found["accuracy"]
    # 800 resamples know an end to about a tenth of the standard deviation, shares move in steps of 1/60.
    assert (high - low) / 3.92 == pytest.approx((share * (1 - share) / N) ** 0.5, rel=0.15)


def test_images_and_what_they_are_paired_with_move_together(samples) -> None:
    noise_free = replace(samples, teacher_images=samples.images + 0.1)
    _, found = run([PairedError(NoOptions())], noise_free)
    assert found["paired-mse"] == pytest.approx((0.01, 0.01), rel=1e-4)


def test_equal_images_have_no_interval_of_their_infinite_psnr(samples) -> None:
    metric = PairedError(NoOptions())
    equal = replace(samples, teacher_images=samples.images)
    found = bootstrap([metric], equal, {"paired-mse": 0.0, "psnr": None}, 20, rng(), lambda done, total: None)
    assert found == {"paired-mse": (0.0, 0.0)}


def test_a_frechet_distance_lies_inside_its_interval(samples) -> None:
    """Without centring it would not: resampled sets are farther from everything than the set itself."""
    values, found = run([Fid(NoOptions())], samples)
    assert found["fid"][0] < values["fid"] < found["fid"][1]


def test_neighbourhoods_are_not_resampled(samples) -> None:
    _, found = run([PrecisionRecall(PrecisionRecallConfig())], samples)
    assert found == {}


def test_a_seed_gives_one_interval(samples) -> None:
    metrics = [Accuracy(NoOptions())]
    assert run(metrics, samples)[1] == run(metrics, samples)[1] != run(metrics, samples, seed=1)[1]


def test_every_part_of_a_sample_set_belongs_to_an_image_or_not() -> None:
    assert {field.name for field in fields(SampleSet)} == {*OF_EACH_IMAGE, *COMPARED_WITH, "prompts"}
