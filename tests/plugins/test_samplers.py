"""Calibration samplers of PTQ4DM, Q-Diffusion and EDA-DM against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from quantlab_edadm.sampler import (
    DensityVariety,
    DensityVarietyConfig,
    apportion,
    density,
    mean_of_pairs,
    normalised,
    squared_distances,
    variety,
)
from quantlab_ptq4dm.sampler import NormalTimesteps, NormalTimestepsConfig, nearest_steps
from quantlab_qdiffusion.sampler import UniformTimesteps, UniformTimestepsConfig, evenly_spaced

from quantlab.contracts.sampler import SamplerProblem

TIMESTEPS = torch.arange(951, 0, -50)


def problem(num_samples: int = 256, each: int = 16, features=None) -> SamplerProblem:
    rng = torch.Generator().manual_seed(0)
    return SamplerProblem(TIMESTEPS, num_samples, each * len(TIMESTEPS), features, rng)


def counts(pairs) -> list[int]:
    return torch.bincount(pairs.steps, minlength=len(TIMESTEPS)).tolist()


def test_a_drawn_timestep_goes_to_the_nearest_recorded_one() -> None:
    drawn = torch.tensor([951.0, 940.0, 926.1, 925.9, 1.0, 20.0, 26.0])
    assert nearest_steps(drawn, TIMESTEPS).tolist() == [0, 0, 0, 1, 19, 19, 18]


def test_numbers_of_inputs_follow_the_clamped_normal() -> None:
    """The share of a step is the normal's mass between the middles to its neighbours; the ends take the tails."""
    total = 200_000
    wide = SamplerProblem(TIMESTEPS, total, total, None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    found = torch.bincount(nearest_steps(NormalTimesteps(NormalTimestepsConfig()).draw(wide), TIMESTEPS)) / total
    middles = [*((TIMESTEPS[1:] + TIMESTEPS[:-1]) / 2).tolist()]

    def below(t: float) -> float:
        return 0.5 * (1 + math.erf((t - 0.4 * 951) / (0.4 * 951) / math.sqrt(2)))

    edges = [1.0, *map(below, middles), 0.0]
    expected = torch.tensor([high - low for high, low in itertools.pairwise(edges)])
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / total)
    assert found[-1] > found[0] > found[1], "the tails are clamped to the ends"


def test_normal_timesteps_spend_the_budget() -> None:
    chosen = NormalTimesteps(NormalTimestepsConfig()).choose(problem())
    assert len(chosen.steps) == 320
    again = NormalTimesteps(NormalTimestepsConfig()).choose(problem())
    assert torch.equal(chosen.steps, again.steps) and torch.equal(chosen.samples, again.samples)


@pytest.mark.parametrize("std", [1e-9, 0.4])
def test_few_trajectories_spill_to_neighbouring_steps(std: float) -> None:
    chosen = NormalTimesteps(NormalTimestepsConfig(mean=0.5, std=std)).choose(problem(num_samples=16, each=16))
    assert counts(chosen) == [16] * 20


def test_every_nth_step_with_the_whole_budget() -> None:
    assert evenly_spaced(200, 20).tolist() == list(range(0, 200, 10))
    assert evenly_spaced(4, 20).tolist() == [0, 1, 2, 3]
    chosen = UniformTimesteps(UniformTimestepsConfig(steps=5)).choose(problem())
    assert counts(chosen) == [64, 0, 0, 0] * 5
    assert chosen.samples[:64].tolist() == list(range(64))


def test_all_steps_are_the_choice_of_no_sampler() -> None:
    chosen = UniformTimesteps(UniformTimestepsConfig(steps=20)).choose(problem())
    assert counts(chosen) == [16] * 20
    assert chosen.samples.tolist() == list(range(16)) * 20


def test_density_and_variety_of_three_steps() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    distances = squared_distances(features)
    torch.testing.assert_close(distances, torch.tensor([[0.0, 0.5, 5], [0.5, 0, 6.5], [5, 6.5, 0]]).double())
    assert mean_of_pairs(distances) == pytest.approx((0.5 + 5 + 6.5) / 3)
    assert density(distances, 0.5).tolist() == [2, 2, 1]
    torch.testing.assert_close(variety(features), torch.tensor([1.0, 1, 2]).double())
    assert normalised(density(distances, 0.5)).tolist() == [1, 1, 0]
    assert normalised(torch.ones(3)).tolist() == [0, 0, 0]


def test_numbers_are_in_proportion_and_add_up() -> None:
    assert apportion(torch.tensor([1.0, 1, 2]), 8).tolist() == [2, 2, 4]
    assert apportion(torch.tensor([1.0, 1, 1]), 8).tolist() == [3, 3, 2]
    assert apportion(torch.zeros(4), 6).tolist() == [2, 2, 1, 1]


def features_of(scale: float):
    """Steps 0 to 14 alike, the others orthogonal to them and to one another."""
    values = torch.zeros(20, 8, 6)
    values[:15, :, 0] = 1
    values[range(15, 20), :, range(1, 6)] = 1
    return lambda path, count: scale * values[:, :count]


def test_dense_steps_or_various_steps_get_the_inputs() -> None:
    dense = DensityVariety(DensityVarietyConfig(variety=0)).choose(problem(features=features_of(1.0)))
    assert sum(counts(dense)[:15]) == 320 and max(counts(dense)) == 22
    various = DensityVariety(DensityVarietyConfig(variety=1000)).choose(problem(features=features_of(1.0)))
    assert sum(counts(various)[15:]) > 300


def test_the_relative_radius_does_not_depend_on_the_scale_of_features() -> None:
    chosen = [counts(DensityVariety(DensityVarietyConfig()).choose(problem(features=features_of(s)))) for s in (1, 9)]
    assert chosen[0] == chosen[1]
    absolute = DensityVarietyConfig(absolute_radius=0.3, variety=0)
    chosen = [counts(DensityVariety(absolute).choose(problem(features=features_of(s)))) for s in (1, 9, 0.1)]
    assert chosen[0] == chosen[1] != chosen[2], "with a small scale all steps are within the radius"
