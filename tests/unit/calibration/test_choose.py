"""Which recorded inputs make up the calibration batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import make_toy

from quantlab.allocation.student import tapped_run
from quantlab.calibration.choose import choose_pairs, draw_pairs
from quantlab.calibration.collect import calibration_batch, first_pairs
from quantlab.contracts.config import Strict
from quantlab.contracts.sampler import CalibrationPairs, CalibrationSampler, SamplerProblem
from quantlab.errors import PluginError, QuantlabError, RecipeError


class Fixed(CalibrationSampler):
    """Returns what the test says."""

    name = "fixed"
    Config = Strict

    def __init__(self, make) -> None:
        self.make = make

    def choose(self, problem: SamplerProblem) -> CalibrationPairs:
        return self.make(problem)


def chosen(make, toy=None, samples: int = 2) -> CalibrationPairs:
    toy = toy or make_toy()

    def tap(path: str):
        return tapped_run(toy.task.network, toy.graph, (path,))

    rng = torch.Generator().manual_seed(3)
    return choose_pairs(Fixed(make), toy.task, toy.calibration, samples, tap, rng)


def problem(num_samples: int = 4, steps: int = 5) -> SamplerProblem:
    rng = torch.Generator().manual_seed(0)
    return SamplerProblem(torch.arange(steps).flip(0) * 10, num_samples, steps * num_samples, None, rng)  # type: ignore[arg-type]


def pairs(steps: list[int], samples: list[int]) -> CalibrationPairs:
    return CalibrationPairs(torch.tensor(steps), torch.tensor(samples))


def test_without_a_sampler_the_first_trajectories_at_every_step() -> None:
    toy = make_toy()
    batch = calibration_batch(toy.task, toy.calibration, 3)
    expected = torch.cat([toy.calibration.inputs["sample"][step, :3] for step in range(4)])
    assert torch.equal(batch.inputs["sample"], expected)
    assert batch.timestep.tolist() == [901] * 3 + [601] * 3 + [301] * 3 + [1] * 3
    with pytest.raises(QuantlabError, match="more calibration samples"):
        first_pairs(toy.calibration, 9)


def test_the_batch_holds_the_chosen_pairs_and_no_others() -> None:
    toy = make_toy()
    batch = calibration_batch(toy.task, toy.calibration, 3, pairs([0, 2, 2], [5, 1, 7]))
    recorded = toy.calibration.inputs["sample"]
    assert torch.equal(batch.inputs["sample"], torch.stack([recorded[0, 5], recorded[2, 1], recorded[2, 7]]))
    assert batch.timestep.tolist() == [901, 301, 301]


def test_guidance_doubles_each_step_by_itself() -> None:
    toy = make_toy()
    task = replace(toy.task)
    task.network_inputs = lambda inputs: {name: torch.cat([value, value]) for name, value in inputs.items()}
    batch = calibration_batch(task, toy.calibration, 3, pairs([0, 2, 2], [5, 1, 7]))
    assert batch.timestep.tolist() == [901, 901, 301, 301, 301, 301]


def test_a_sampler_sees_timesteps_budget_and_features() -> None:
    toy, seen = make_toy(), []

    def make(problem: SamplerProblem) -> CalibrationPairs:
        seen.append(problem)
        return pairs([1], [0])

    chosen(make, toy, samples=2)
    (asked,) = seen
    assert asked.timesteps.tolist() == [901, 601, 301, 1]
    assert (asked.num_samples, asked.budget) == (8, 8)
    features = asked.features("blocks.1", 3)
    assert features.shape == (4, 3, 12, 6, 6)
    inputs = toy.calibration.step(2, slice(3))
    hidden = toy.task.network.conv_in(inputs["sample"])
    embedding = torch.nn.functional.silu(toy.task.network.time(inputs["timestep"].float()[:, None] / 1000))
    for block in toy.task.network.blocks:
        hidden = block(hidden, embedding)
    torch.testing.assert_close(features[2], hidden)


@pytest.mark.parametrize(
    ("steps", "samples", "message"),
    [
        ([], [], "within the budget"),
        ([0] * 9, list(range(9)), "within the budget"),
        ([0], [0, 1], "as many steps as trajectories"),
        ([0, 0], [1, 0], "sorted"),
        ([1, 0], [0, 0], "sorted"),
        ([0, 0], [1, 1], "each once"),
        ([0], [8], "recorded"),
        ([4], [0], "recorded"),
    ],
)
def test_what_a_sampler_returns_is_checked(steps: list[int], samples: list[int], message: str) -> None:
    made = CalibrationPairs(torch.tensor(steps, dtype=torch.int64), torch.tensor(samples, dtype=torch.int64))
    with pytest.raises(PluginError, match=message):
        chosen(lambda _: made)


def test_a_model_without_timesteps_has_nothing_to_choose() -> None:
    toy = make_toy()
    toy.task.timestep_input = None
    with pytest.raises(RecipeError, match="the model has none"):
        chosen(lambda _: pairs([0], [0]), toy)


def test_drawn_trajectories_are_distinct_sorted_and_repeatable() -> None:
    drawn = draw_pairs(torch.tensor([3, 0, 1, 4, 2]), problem())
    assert drawn.steps.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 4, 4]
    for step in range(5):
        at_step = drawn.samples[drawn.steps == step].tolist()
        assert at_step == sorted(set(at_step)) and set(at_step) <= set(range(4))
    again = draw_pairs(torch.tensor([3, 0, 1, 4, 2]), problem())
    assert torch.equal(drawn.samples, again.samples)


def test_what_a_step_cannot_give_goes_to_its_neighbours() -> None:
    drawn = draw_pairs(torch.tensor([0, 0, 9, 0, 4]), problem())
    assert torch.bincount(drawn.steps, minlength=5).tolist() == [0, 4, 4, 1, 4]
