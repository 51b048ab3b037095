"""The denoising loop against closed forms."""

from __future__ import annotations

import pytest
import torch

from quantlab.contracts.config import Strict
from quantlab.contracts.correction import Correction, FittedCorrection
from quantlab.contracts.sections import Sampling
from quantlab.sampling import SampleStep, Schedule
from quantlab.zoo.denoiser import noise_schedule


def schedule(**settings: object) -> Schedule:
    return Schedule(noise_schedule(), Sampling(**settings))  # type: ignore[arg-type]


def test_timesteps_are_evenly_spaced_from_one() -> None:
    assert schedule(steps=20).timesteps.tolist() == list(range(951, 0, -50))
    assert schedule(steps=10).timesteps.tolist() == list(range(901, 0, -100))


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_any_number_of_steps_runs(steps: int) -> None:
    seen: list[SampleStep] = []
    plan = schedule(steps=steps)
    images = plan.sample(lambda i: i["sample"] * 0, torch.ones(2, 1, 3, 3), {}, observe=seen.append)
    assert len(seen) == steps == len(plan.timesteps)
    assert torch.isfinite(images).all()


def test_a_perfect_prediction_gives_the_image_back() -> None:
    """If the noise is known at every step, DDIM returns the one image behind all of it."""
    plan, image = schedule(steps=20), torch.linspace(-1, 1, 9).view(1, 1, 3, 3)
    alphas = noise_schedule().double()

    def predict(inputs: dict) -> torch.Tensor:
        alpha = alphas[inputs["timestep"][0]]
        return ((inputs["sample"] - alpha.sqrt() * image) / (1 - alpha).sqrt()).float()

    start = alphas[951]
    noise = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = (start.sqrt() * image + (1 - start).sqrt() * noise).float()
    result = plan.sample(predict, x, {})
    last = alphas[0]
    expected = last.sqrt() * image + (1 - last).sqrt() * noise
    torch.testing.assert_close(result, expected.float(), rtol=1e-3, atol=1e-3)


def test_one_step_against_the_formula() -> None:
    plan, alphas = schedule(steps=20), noise_schedule().double()
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, 2, 2, generator=rng), torch.randn(2, 1, 2, 2, generator=rng)
    now, before = alphas[951], alphas[901]
    clean = (x.double() - (1 - now).sqrt() * eps) / now.sqrt()
    expected = before.sqrt() * clean + (1 - before).sqrt() * eps
    torch.testing.assert_close(plan.step(0, eps, x).double(), expected, rtol=1e-5, atol=1e-5)


def test_added_noise_comes_from_the_generator_alone() -> None:
    plan = schedule(steps=5, eta=1.0)

    def draw(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return plan.sample(lambda i: i["sample"] * 0.1, torch.ones(1, 1, 2, 2), {}, rng)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_conditions_reach_every_step() -> None:
    labels, seen = torch.tensor([3, 4]), []
    schedule(steps=4).sample(
        lambda i: i["sample"], torch.zeros(2, 1, 2, 2), {"class_labels": labels}, observe=seen.append
    )
    assert all(torch.equal(step.inputs["class_labels"], labels) for step in seen)
    assert [step.inputs["timestep"].shape for step in seen] == [(2,)] * 4


class Halved(Correction):
    """Subtracts what was measured and leaves a share of the variance."""

    name = "halved"
    Config = Strict

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.seen = share, []

    def fit(self, data):
        raise NotImplementedError

    def correct(self, fitted, index, prediction):
        self.seen.append(index)
        return prediction - fitted["shift"][index]

    def variance(self, fitted, step, variance):
        return variance * self.share


def fitted(correction: Correction, steps: int = 20) -> FittedCorrection:
    return FittedCorrection(correction, schedule(steps=steps).timesteps, {"shift": torch.arange(float(steps))})


def test_a_variance_is_that_of_the_scheduler() -> None:
    plan = schedule(steps=20, eta=0.7)
    scheduler, timesteps = plan._scheduler, plan.timesteps.tolist()
    for index, timestep in enumerate(timesteps):
        expected = 0.7**2 * float(scheduler._get_variance(timestep, timestep - 50))
        # The scheduler's 1 - alpha is a float32 difference: 6e-8 of 1e-4 at the cleanest step.
        assert plan.variance(index) == pytest.approx(expected, rel=1e-3)
    assert schedule(steps=20).variance(3) == 0


def test_predictions_are_corrected_at_their_own_step() -> None:
    plan, correction = schedule(steps=20), Halved()
    shift = dict(zip(plan.timesteps.tolist(), range(20), strict=True))
    exact = plan.sample(lambda i: i["sample"] * 0.1, torch.ones(2, 1, 2, 2), {})
    wrong = plan.sample(
        lambda i: i["sample"] * 0.1 + shift[int(i["timestep"][0])],
        torch.ones(2, 1, 2, 2),
        {},
        corrections=[fitted(correction)],
    )
    torch.testing.assert_close(wrong, exact, rtol=1e-4, atol=1e-4)
    assert correction.seen == list(range(20))


def test_a_step_that_was_not_recorded_takes_the_nearest() -> None:
    correction = Halved()
    schedule(steps=10).sample(lambda i: i["sample"], torch.ones(1, 1, 2, 2), {}, corrections=[fitted(correction)])
    assert correction.seen == list(range(1, 20, 2))


def draws(share: float, eta: float) -> torch.Tensor:
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    eps = torch.full((2, 1, 4, 4), 0.3)
    return schedule(steps=20, eta=eta).step(5, eps, torch.ones(2, 1, 4, 4), rng, [fitted(Halved(share))])


def test_added_noise_has_the_variance_of_the_correction() -> None:
    """The same draws, smaller; the part without noise keeps the sampler's own variance."""
    still, quarter, full = draws(0.0, 1.0), draws(0.25, 1.0), draws(1.0, 1.0)
    torch.testing.assert_close(quarter - still, 0.5 * (full - still), rtol=1e-4, atol=1e-6)
    alpha, before = schedule(steps=20)._alphas(5)
    clean = (1 - (1 - alpha) ** 0.5 * 0.3) / alpha**0.5
    variance = schedule(steps=20, eta=1.0).variance(5)
    expected = before**0.5 * clean + (1 - before - variance) ** 0.5 * 0.3
    torch.testing.assert_close(still, torch.full_like(still, expected), rtol=1e-4, atol=1e-5)


def test_a_correction_that_keeps_the_variance_changes_no_bit() -> None:
    plain = schedule(steps=20, eta=1.0)
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(draws(1.0, 1.0), plain.step(5, torch.full((2, 1, 4, 4), 0.3), torch.ones(2, 1, 4, 4), rng))
    assert torch.equal(draws(0.25, 0.0), draws(1.0, 0.0)), "without added noise there is nothing to correct"
