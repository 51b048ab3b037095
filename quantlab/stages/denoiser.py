"""Methods that need a denoiser, told before any work when the model is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantlab.contracts.model import Task
from quantlab.errors import RecipeError
from quantlab.plugins import Kind, Registry
from quantlab.recipe.choices import chosen
from quantlab.recipe.schema import Recipe

OF_THE_SAMPLER = (Kind.SAMPLER, Kind.CORRECTION)
"""Kinds of plugins that have no meaning without timesteps."""


def require_denoiser(task: Task, arms: Sequence[Recipe], registry: Registry) -> None:
    """Raise RecipeError for the first method that works along timesteps, when the network has none."""
    if task.timestep_input is not None:
        return
    for arm in arms:
        reasons = list(needs_of(arm, registry))
        if reasons:
            raise RecipeError(
                f'the method "{arm.method}" needs a denoiser, and the model has no timestep',
                where=f"method {arm.method}",
                got=", ".join(reasons),
                next_step="choose a method that works on any network, such as mse, gptq, adaround or brecq",
            )


def needs_of(recipe: Recipe, registry: Registry) -> Iterator[str]:
    """What in a recipe works along timesteps, as its keys name it."""
    if recipe.activations.per_timestep:
        yield "activations.per_timestep"
    for kind, path, choice in chosen(recipe):
        found = registry.find(kind, choice.name).value
        if kind in OF_THE_SAMPLER or getattr(found, "needs_timestep", False):
            yield f"{'.'.join(str(key) for key in path if isinstance(key, str))}: {choice.name}"
