"""A source of two small models that recipes of tests can name: a classifier, and a denoiser that nothing judges."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from toys import ToyDenoiser, ToyTask

from quantlab.contracts.config import Strict
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import (
    CalibrationSet,
    ClassificationTask,
    GenerativeTask,
    Inputs,
    LabelledBatch,
    Progress,
    Run,
    Task,
)
from quantlab.contracts.sections import Model, Sampling
from quantlab.hookspecs import hookimpl
from quantlab.plugins import Registry, load_registry
from quantlab.processes import ALONE, Processes
from quantlab.report.console import make_console
from quantlab.run import RunOptions, RunResult, run

LABELLED = 60
CLASSES = 7


class ToyClassifierTask(ClassificationTask):
    """Random weights, and labels that the network itself gives to most of the inputs."""

    num_classes = CLASSES
    timestep_input = None
    static: ClassVar[Mapping[str, object]] = {}

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)]
        self.network = nn.Sequential(*layers).eval().requires_grad_(False)
        self.images = torch.randn(LABELLED, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        self.labels = self.network(self.images).argmax(1)
        self.labels[:6] = (self.labels[:6] + 1) % CLASSES

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        return {"input": torch.randn(batch, 1, 6, 6, generator=torch.Generator().manual_seed(2))}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        return output

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        images = torch.randn(len(samples), 1, 6, 6, generator=rng)
        return CalibrationSet({"input": images[None]}, run({"input": images})[None])

    def num_labelled(self) -> int:
        return LABELLED

    def labelled(self, count: int, seed: int, batch: int) -> Iterator[LabelledBatch]:
        pick = torch.randperm(LABELLED, generator=torch.Generator().manual_seed(seed))[:count]
        for part in pick.split(batch):
            yield LabelledBatch({"input": self.images[part]}, self.labels[part])

    def data_digest(self) -> str:
        return "toy"


class ToyGenerativeTask(ToyTask, GenerativeTask):
    """Draws images in two steps; there are no real images and there is no judge."""

    device = torch.device("cpu")

    def draw_noise(self, count: int, seed: int) -> Tensor:
        return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))

    def labels(self, count: int) -> Tensor:
        return torch.arange(count)

    def sample(
        self,
        run: Run,
        noise: Tensor,
        labels: Tensor,
        seeds: Sequence[int],
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        x = noise
        with torch.no_grad():
            for timestep in (901, 1):
                x = x - 0.5 * run({"sample": x, "timestep": torch.full((len(x),), timestep)})
        return x.clamp(-1, 1)


class ToySource:
    """The two of them by name."""

    name: ClassVar[str] = "toy"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = Strict

    def __init__(self, config: Strict) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> Task:
        if model.name == "classifier":
            return ToyClassifierTask()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ToyGenerativeTask(ToyDenoiser().eval().requires_grad_(False))

    def identity(self, model: Model) -> str:
        return model.name


@hookimpl
def quantlab_models() -> list[type]:
    return [ToySource]


def toy_registry() -> Registry:
    """The installed plugins and the toy source."""
    registry = load_registry()
    registry.manager.register(sys.modules[__name__], name="toy")
    return registry


def run_toy(
    root: Path,
    name: str,
    *overrides: str,
    dry_run: bool = False,
    report_to: Sequence[str] = (),
    processes: Processes = ALONE,
) -> RunResult:
    """Run a small recipe on one of the two."""
    from quantlab.recipe.load import load_recipe
    from quantlab.recipe.reporters import reporter_choices

    recipe = root / "toy.yaml"
    recipe.write_text(
        f"version: 1\nname: toy\nmodel: {{source: toy, name: {name}}}\nmethod: mse\n"
        "budget: {weight_bits: 3, activation_bits: 8}\ncalibrate: {trajectories: 8, samples: 8}\n"
        "evaluate: {samples: 40, batch: 16, grid: 4}\n"
    )
    loaded = load_recipe(str(recipe), overrides, toy_registry())
    reporters = reporter_choices(report_to, loaded.registry)
    console = make_console(quiet=True, silent=not processes.first)
    return run(loaded, RunOptions(root / "runs", "cpu", "float32", dry_run, console, reporters, processes))
