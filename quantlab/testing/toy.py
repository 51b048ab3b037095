"""A denoiser of a few hundred weights, with everything that the engine makes of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.allocation.assign import AssignMethod, assign, smoothed_records
from quantlab.allocation.plan import Plan, make_plan
from quantlab.allocation.scores import ScoreMeter
from quantlab.allocation.student import QuantizerChoice, QuantizerChoices, Student, build_student, tapped_run
from quantlab.allocation.uniform import UniformConfig, UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.allocation import AllocationProblem, BitPolicy, Resource
from quantlab.contracts.model import CalibrationBatch, CalibrationSet, Inputs, Progress, Run, Task, TrainingBatch
from quantlab.contracts.scores import ScoreRequest
from quantlab.contracts.sections import Activations, Budget, InputsFrom, Tune, Weights
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import Checkpoint, Loss, TappedRun, TuneJob
from quantlab.graph.blocks import Traced, cut_blocks
from quantlab.graph.capture import capture
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.sites import find_sites
from quantlab.quant.quantizers import AffineQuantizer
from quantlab.testing.contract import rng

KEPT = "conv_in"
"""The site outside the budget."""
TIMESTEPS = (901, 601, 301, 1)
TRAJECTORIES = 6


class Block(nn.Module):
    """A convolution shifted by the time embedding, and a linear layer over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(channels, channels, 3, padding=1)
        self.shift: nn.Linear = nn.Linear(4, channels)
        self.mix: nn.Linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        x = F.silu(self.conv(x) + self.shift(embedding)[:, :, None, None])
        return x + self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ToyDenoiser(nn.Module):
    """Two blocks and a middle one between a first and a last convolution; predictions have two channels."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.time: nn.Linear = nn.Linear(1, 4)
        self.conv_in: nn.Conv2d = nn.Conv2d(2, channels, 3, padding=1)
        self.mid_block: Block = Block(channels)
        self.blocks: nn.ModuleList = nn.ModuleList([Block(channels), Block(channels)])
        self.conv_out: nn.Conv2d = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """[B, 2, H, W] and timesteps [B] -> [B, 2, H, W]."""
        embedding = F.silu(self.time(timestep.float()[:, None] / 1000))
        x = self.mid_block(self.conv_in(sample), embedding)
        for block in self.blocks:
            x = block(x, embedding)
        return self.conv_out(x)


@dataclass
class ToyTask(Task):
    """Calibrates on noise at four timesteps, and trains on noise too."""

    network: nn.Module
    timestep_input: str | None = "timestep"
    static: Mapping[str, object] = field(default_factory=dict)

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Noise at spread timesteps."""
        return {"sample": torch.randn(batch, 2, 4, 4, generator=rng(0)), "timestep": torch.arange(batch) * 100 % 1000}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs as they are."""
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The output as it is."""
        return output

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Noise at every timestep."""
        steps = len(TIMESTEPS)
        sample = torch.randn(steps, len(samples), 2, 4, 4, generator=rng)
        timestep = torch.tensor(TIMESTEPS)[:, None].expand(steps, len(samples)).contiguous()
        with torch.no_grad():
            outputs = torch.stack([run({"sample": sample[i], "timestep": timestep[i]}) for i in range(steps)])
        return CalibrationSet({"sample": sample, "timestep": timestep}, outputs)

    def training_batch(self, size: int, rng: torch.Generator) -> TrainingBatch:
        """Noise, and what the float network says of it a little off."""
        sample = torch.randn(size, 2, 4, 4, generator=rng)
        timestep = torch.randint(1000, (size,), generator=rng)
        with torch.no_grad():
            target = 0.9 * self.network(sample, timestep)
        return TrainingBatch({"sample": sample, "timestep": timestep}, target)


@dataclass(frozen=True)
class Toy:
    """The toy, captured and calibrated."""

    task: ToyTask
    graph: CapturedGraph
    sites: tuple[Site, ...]
    calibration: CalibrationSet

    def plan(self, budget: Budget) -> Plan:
        """All sites under the budget but the first."""
        return make_plan(self.sites, {KEPT: 8}, budget)


@cache
def toy() -> Toy:
    """The toy; nobody may change its network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ToyDenoiser().eval().requires_grad_(False)
    task = ToyTask(network)
    graph = capture(network, task.example_inputs(3), {})
    calibration = task.calibrate(lambda inputs: network(**inputs), range(TRAJECTORIES), rng(1), silent)
    return Toy(task, graph, find_sites(network, graph), calibration)


def choices() -> QuantizerChoices:
    """Affine quantizers, those of inputs by timestep."""
    weights, inputs = Weights(), Activations(per_timestep=True)
    return QuantizerChoices(QuantizerChoice(AffineQuantizer, weights), QuantizerChoice(AffineQuantizer, inputs))


@dataclass(frozen=True)
class Measured:
    """What policies are asked about: the toy's records, and scores as they are declared."""

    plan: Plan
    data: TensorSiteData

    def problem(self, seed: int, names: Sequence[str] | None = None, limited: bool = False) -> AllocationProblem:
        """Bits for the named sites, all under the budget without it; ``limited`` adds one for bit operations."""
        sites = [site for site in self.plan.budgeted if names is None or site.name in names]
        budget = self.plan.budget
        operations = sum(site.macs for site in sites) * budget.weight_bits * budget.activation_bits
        limits = {Resource.BIT_OPERATIONS: float(operations)} if limited else {}
        return AllocationProblem(sites, self.data, budget, self.plan.nominal(), rng(seed), limits)


def measured(policy: BitPolicy, budget: Budget) -> Measured:
    """The toy as a policy sees it, with the scores that it declares."""
    scores = {request: _score(request) for request in policy.scores(budget)}
    return Measured(toy().plan(budget), TensorSiteData(_records()[1], scores))


@cache
def _records() -> tuple[Student, Mapping[str, SiteRecord]]:
    """The toy's tensors, which depend on no budget."""
    student = build_student(toy().task, toy().graph, toy().plan(Budget(weight_bits=3, activation_bits=6)))
    method = AssignMethod([], [], choices(), InputsFrom.TEACHER)
    return student, smoothed_records(student, method, _batch())


@cache
def _score(request: ScoreRequest) -> Mapping[str, Tensor]:
    """A score on the toy."""
    return ScoreMeter(*_records(), choices(), _batch()).measure(request, rng(2), silent)


def _batch() -> CalibrationBatch:
    return calibration_batch(toy().task, toy().calibration, 2)


def quantized_student(budget: Budget) -> Student:
    """The toy with bits and scales."""
    found = toy()
    student = build_student(found.task, found.graph, found.plan(budget))
    method = AssignMethod([], [UniformPolicy(UniformConfig())], choices(), InputsFrom.TEACHER)
    assign(student, method, calibration_batch(found.task, found.calibration, 2), rng(0), silent)
    return student


def job(student: Student, losses: Sequence[Loss], settings: Tune, checkpoint: Checkpoint) -> TuneJob:
    """A tuner's job on the toy."""
    found = toy()
    layers = student.trained_layers()
    teacher, quantized = Traced(found.task.network, found.graph), Traced(student.network, student.graph)

    def tap(paths: Sequence[str]) -> tuple[TappedRun, TappedRun]:
        teacher_run = tapped_run(found.task.network, found.graph, paths)
        return tapped_run(student.network, student.graph, paths), teacher_run

    run, float_run = tap(tuple(path for loss in losses for path in loss.taps(found.sites)))
    return TuneJob(
        task=found.task,
        network=student.network,
        layers=layers,
        sites=found.sites,
        student=run,
        teacher=float_run,
        tap=tap,
        cut=lambda partition: cut_blocks(teacher, quantized, layers, "timestep", partition),
        calibration=found.calibration,
        batch=calibration_batch(found.task, found.calibration, 2),
        losses=losses,
        settings=settings,
        seed=3,
        checkpoint=checkpoint,
        progress=silent,
    )


def silent(done: int, total: int) -> None:
    """Progress that nobody sees."""
