"""Print how the kurtosis of the output channels of every model that ships is distributed, before and after smoothing.

    python docs/results/kurtosis.py

The layers are those under the budget of the model's base recipe. Smoothing is that of MPQ-DM (alpha 0.5), from the
largest inputs that the float model sees while it draws images in 20 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from quantlab_mpqdm.kurtosis import kurtosis
from torch import Tensor, nn

from quantlab.contracts.sections import Model, Sampling
from quantlab.models.builtin import BuiltinConfig, BuiltinSource, BuiltinTask
from quantlab.quant.functional import smoothing_scale
from quantlab.recipe.load import load_recipe
from quantlab.stages.prepare import capture_sites, plan
from quantlab.zoo.models import DENOISERS

IMAGES = 64
SEED = 0
QUANTILES = (0.05, 0.5, 0.9, 0.99)
HEAVY = 10.0


def budgeted_sites(task: BuiltinTask) -> list[str]:
    """Names of the sites under the budget of the model's recipe."""
    folder = Path(__file__).parents[2] / "recipes"
    own = folder / task.name.split("-")[0] / "mpq-dm-w2a4.yaml"
    recipe = load_recipe(own, [f"model.name={task.name}"]).recipe
    sites = capture_sites(task)[1]
    return [entry.site.name for entry in plan(sites, recipe, {}).sites if entry.budgeted]


def input_absmax(task: BuiltinTask, sites: list[str]) -> Mapping[str, Tensor]:
    """Largest absolute input of every input channel of every site: site -> [in]."""
    found: dict[str, Tensor] = {}

    def watch(site: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        axis = 1 if isinstance(module, nn.Conv2d) else -1

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].detach().abs().movedim(axis, 0).flatten(1).amax(1)
            found[site] = torch.maximum(found.get(site, largest), largest)

        return module.register_forward_pre_hook(keep)

    handles = [watch(site, task.network.get_submodule(site)) for site in sites]
    rng = torch.Generator().manual_seed(SEED)
    samples = range(IMAGES)
    task.calibrate(lambda inputs: task.network(**inputs, **task.static)[0], samples, rng, lambda done, total: None)
    for handle in handles:
        handle.remove()
    return found


def row(title: str, values: Tensor) -> str:
    """One line of the table."""
    cells = [*values.quantile(torch.tensor(QUANTILES)).tolist(), values.max().item()]
    share = (values > HEAVY).float().mean().item()
    return f"| {title} | {len(values)} | " + " | ".join(f"{cell:.1f}" for cell in cells) + f" | {share:.1%} |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| model | channels | 5 % | 50 % | 90 % | 99 % | max | above 10 |")
    print("|---|---|---|---|---|---|---|---|")
    for name in DENOISERS:
        source = BuiltinSource(BuiltinConfig())
        task = source.load(Model(name=name), Sampling(steps=20), torch.device("cpu"), torch.float32)
        assert isinstance(task, BuiltinTask)
        sites = budgeted_sites(task)
        inputs = input_absmax(task, sites)
        raw: list[Tensor] = []
        smoothed: list[Tensor] = []
        for site in sites:
            weight = task.network.get_parameter(f"{site}.weight").detach()
            per_input = weight.movedim(1, 0).flatten(1).abs().amax(1)
            scale = smoothing_scale(per_input, inputs[site], 0.5)
            raw.append(kurtosis(weight.flatten(1)))
            smoothed.append(kurtosis((weight * scale.view(1, -1, *[1] * (weight.ndim - 2))).flatten(1)))
        print(row(name, torch.cat(raw)))
        print(row(f"{name}, smoothed", torch.cat(smoothed)))


if __name__ == "__main__":
    main()
