"""The denoising loop against closed forms."""

from __future__ import annotations

import pytest
import torch

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
