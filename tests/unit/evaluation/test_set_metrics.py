"""sFID, KID, precision and recall: closed forms, float64, and pieces that must not change a bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from quantlab.evaluation.metrics import precision_recall
from quantlab.evaluation.metrics.fid import frechet_distance
from quantlab.evaluation.metrics.kid import KernelDistance
from quantlab.evaluation.metrics.precision_recall import ManifoldPrecisionRecall
from quantlab.evaluation.metrics.sfid import SpatialFrechetDistance


def gaussian(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """A sample whose own mean and covariance are exactly these."""
    raw = gaussian(count, len(mean), seed)
    centred = raw - raw.mean(0)
    white = torch.linalg.qr(centred).Q * math.sqrt(count - 1)
    return white @ torch.linalg.cholesky(covariance, upper=True) + mean


def distance(metric, real: Tensor, generated: Tensor):
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute()


def sfid(real: Tensor, generated: Tensor) -> float:
    return distance(SpatialFrechetDistance(), real, generated).item()


def test_sfid_of_commuting_gaussians_in_closed_form() -> None:
    """|m|^2 + sum (s1 - s2)^2 over the shared axes, here rotated away from the coordinates."""
    rotation = torch.linalg.qr(gaussian(5, 5, 9)).Q
    one, other = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 2, 1, 0.5, 7]).double()
    shift = torch.tensor([0.5, 0, -1, 0, 2]).double()
    a = with_moments(torch.zeros(5).double(), rotation @ torch.diag(one**2) @ rotation.T, 60, 0)
    b = with_moments(shift, rotation @ torch.diag(other**2) @ rotation.T, 90, 1)
    assert sfid(a, b) == pytest.approx((shift**2).sum().item() + ((one - other) ** 2).sum().item(), rel=1e-12)


def test_sfid_against_a_direct_float64_square_root() -> None:
    a, b = gaussian(200, 12, 0) @ gaussian(12, 12, 5), gaussian(150, 12, 1) + 0.3
    one, other = np.cov(a.numpy().T), np.cov(b.numpy().T)
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = mean + np.trace(one + other) - 2 * np.trace(sqrtm(one @ other).real)
    assert sfid(a, b) == pytest.approx(expected, rel=1e-10)
    assert sfid(a, b) == pytest.approx(frechet_distance(a, b), rel=1e-8), "the same distance as FID's"


def test_sfid_with_more_features_than_images() -> None:
    """Two line segments in 50 dimensions at an angle: tr (C1 C2)^1/2 = s1 s2 |cos|."""
    first, second = torch.eye(50)[0].double(), (0.6 * torch.eye(50)[0] + 0.8 * torch.eye(50)[1]).double()
    steps = torch.tensor([-1.0, 1.0]).double()[:, None]
    a, b = steps * first, 3 * steps * second  # variances 2 and 18
    assert sfid(a, b) == pytest.approx(2 + 18 - 2 * math.sqrt(36) * 0.6, rel=1e-6)
    many = gaussian(20, 300, 3)
    assert sfid(many, many) == pytest.approx(0, abs=1e-9)
    assert sfid(many, many + 2) == pytest.approx(300 * 4, rel=1e-12)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_sfid_is_a_symmetric_distance_whatever_the_shapes(n: int, m: int, width: int) -> None:
    a, b = gaussian(n, width, n), gaussian(m, width, 100 + m)
    assert sfid(a, b) == pytest.approx(sfid(b, a), rel=1e-9)
    assert sfid(a, b) > -1e-9
    rotation = torch.linalg.qr(gaussian(width, width, 7)).Q
    assert sfid(a @ rotation, b @ rotation) == pytest.approx(sfid(a, b), rel=1e-8, abs=1e-9)


def test_sfid_of_what_is_not_finite_is_nan() -> None:
    broken = gaussian(5, 3, 0)
    broken[1, 1] = math.inf
    assert math.isnan(sfid(gaussian(5, 3, 1), broken))


def kernel(x: Tensor, y: Tensor) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def test_kid_against_a_double_loop() -> None:
    real, generated = gaussian(9, 4, 0), gaussian(7, 4, 1) + 0.5

    def within(points: Tensor) -> float:
        pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i != j]
        return sum(kernel(points[i], points[j]) for i, j in pairs) / len(pairs)

    across = sum(kernel(x, y) for x in real for y in generated) / (len(real) * len(generated))
    expected = within(real) + within(generated) - 2 * across
    assert distance(KernelDistance(), real, generated).item() == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased_and_deterministic() -> None:
    """Over many pairs of sets from one distribution its mean is 0, where a biased estimate stays above it."""
    values = [distance(KernelDistance(), gaussian(20, 3, i), gaussian(20, 3, 1000 + i)).item() for i in range(200)]
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert abs(mean) < 4 * error and min(values) < 0
    again = distance(KernelDistance(), gaussian(20, 3, 0), gaussian(20, 3, 1000)).item()
    assert again == values[0]


def test_precision_and_recall_with_three_neighbours_and_ties_by_hand() -> None:
    """Points on a grid: equal distances count once each, a duplicate is a neighbour, and the border is inside."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [4.0]])
    # Distance to the third other point: 3, 2, 2, 1 (to 2, 4 and 4), 2, 2.
    metric = ManifoldPrecisionRecall(3)
    assert metric._radii(real.double()).tolist() == [3, 2, 2, 1, 2, 2]
    generated = torch.tensor([[6.0], [6.5], [-3.0], [-3.5]])
    precision, _ = distance(metric, real, generated)
    assert precision.item() == 0.5, "6 and -3 lie on borders, the others outside"


def test_precision_and_recall_in_pieces_are_the_whole_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = gaussian(83, 6, 0).float(), gaussian(61, 6, 1).float() * 1.2
    whole = distance(ManifoldPrecisionRecall(3), real, generated)
    radii = ManifoldPrecisionRecall(3)._radii(real.double())
    monkeypatch.setattr(precision_recall, "CHUNK_ELEMENTS", 83 * 7)
    assert torch.equal(ManifoldPrecisionRecall(3)._radii(real.double()), radii)
    assert distance(ManifoldPrecisionRecall(3), real, generated) == whole
    direct = torch.cdist(generated.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert whole[0] == (direct <= radii[None, :]).any(1).double().mean()
