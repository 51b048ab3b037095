"""Which recorded inputs a calibration sampler chooses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.calibration.collect import first_pairs
from quantlab.contracts.check import check_pairs, plugin_call
from quantlab.contracts.model import CalibrationSet, Task
from quantlab.contracts.sampler import CalibrationPairs, CalibrationSampler, SamplerProblem
from quantlab.contracts.tuning import TappedRun
from quantlab.errors import RecipeError

Tap = Callable[[str], TappedRun]
"""The float network's forward that also returns the output of the module at a path."""


def choose_pairs(
    sampler: CalibrationSampler,
    task: Task,
    calibration: CalibrationSet,
    samples: int,
    tap: Tap,
    rng: torch.Generator,
) -> CalibrationPairs:
    """What a sampler chooses, as many pairs as ``samples`` trajectories at every step would be.

    Raises:
        RecipeError: the model has no timestep.
        PluginError: the sampler returned what it may not.
    """
    if task.timestep_input is None:
        raise RecipeError(
            "a calibration sampler chooses among timesteps, and the model has none",
            where="calibrate.sampler",
            got=sampler.name,
            next_step="set calibrate.sampler to null",
        )
    budget = len(first_pairs(calibration, samples).steps)
    problem = SamplerProblem(
        timesteps=calibration.inputs[task.timestep_input][:, 0].cpu(),
        num_samples=calibration.num_samples,
        budget=budget,
        features=lambda path, count: step_features(task, calibration, tap(path), path, count),
        rng=rng,
    )
    with plugin_call("sampler", sampler, "choose"):
        pairs = sampler.choose(problem)
    check_pairs(sampler, problem, pairs)
    return pairs


def draw_pairs(counts: Tensor, problem: SamplerProblem) -> CalibrationPairs:
    """A number of distinct trajectories at every step, drawn with the problem's generator.

    Args:
        counts: how many at each step, int64 [S], in all at most S * N; what exceeds the N recorded trajectories of a
            step goes to the nearest steps with room, the noisier one of two equally near ones first.
        problem: what is chosen from.
    """
    limit, given = problem.num_samples, counts.clamp(max=problem.num_samples)
    for step, excess in enumerate((counts - given).tolist()):
        for other in sorted(range(len(counts)), key=lambda other, step=step: abs(other - step)):
            moved = min(excess, limit - int(given[other]))
            given[other] += moved
            excess -= moved
    drawn = [torch.randperm(limit, generator=problem.rng)[:count].sort().values for count in given.tolist()]
    return CalibrationPairs(torch.arange(len(given)).repeat_interleave(given), torch.cat(drawn))


def step_features(task: Task, calibration: CalibrationSet, run: TappedRun, path: str, samples: int) -> Tensor:
    """The output [S, n, ...] of a module for the first n trajectories at every step."""
    with torch.no_grad():
        steps = (calibration.step(index, slice(samples)) for index in range(calibration.num_steps))
        return torch.stack([run(task.network_inputs(step))[1][path] for step in steps])
