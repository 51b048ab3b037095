"""Small denoisers and tasks for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.plan import Plan, make_plan
from quantlab.allocation.student import QuantizerChoice, QuantizerChoices, Student, build_student, tapped_run
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.model import CalibrationSet, Inputs, Progress, Run, Task
from quantlab.contracts.sections import AS_IT_IS, Activations, Budget, InputsFrom, Pack, Tune, Weights
from quantlab.contracts.site import Site
from quantlab.contracts.tuning import Checkpoint, Loss, TappedRun, TuneJob
from quantlab.graph.blocks import Traced, cut_blocks
from quantlab.graph.capture import capture
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.sites import find_sites
from quantlab.quant.quantizers import AffineQuantizer
from quantlab.stages.quantize import finalize_student


class Block(nn.Module):
    """Convolution, the timestep's shift, activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.shift = nn.Linear(4, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.silu(self.conv(x) + self.shift(embedding)[:, :, None, None])


class ToyDenoiser(nn.Module):
    """Two blocks between a first and a last convolution."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.conv_in = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList([Block(channels), Block(channels)])
        self.conv_out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedding = F.silu(self.time(timestep.float()[:, None] / 1000))
        x = self.conv_in(sample)
        for block in self.blocks:
            x = block(x, embedding)
        return self.conv_out(x)


class Skipping(ToyDenoiser):
    """The first convolution's output comes back before the last block, 40 times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 24)  # keeps the ratio of the parts
        self.join = nn.Conv2d(24, 12, 3, padding=1)
        self.mix = nn.Linear(24, 12)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedding = F.silu(self.time(timestep.float()[:, None] / 1000))
        first = self.conv_in(sample)
        second = self.blocks[0](first, embedding)
        joined = F.silu(self.norm(torch.cat([second, 40 * first], dim=1)))
        rows = torch.cat([second.permute(0, 2, 3, 1), 40 * first.permute(0, 2, 3, 1)], dim=-1)
        x = self.join(joined) + self.mix(F.silu(rows)).permute(0, 3, 1, 2)
        return self.conv_out(self.blocks[1](x, embedding) + self.join(joined))


class SelfAttention(nn.Module):
    """Two heads over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        rows = x.flatten(2).transpose(1, 2)
        query, key, value = (
            part.view(batch, height * width, 2, channels // 2).transpose(1, 2) for part in self.qkv(rows).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=0.7)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        return x + mixed.transpose(1, 2).view(batch, channels, height, width)


class Attending(ToyDenoiser):
    """An attention between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = SelfAttention()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        embedding = F.silu(self.time(timestep.float()[:, None] / 1000))
        x = self.attend(self.blocks[0](self.conv_in(sample), embedding))
        return self.conv_out(self.blocks[1](x, embedding))


class Kinds(ToyDenoiser):
    """A layer of every kind, a written-out attention, and a weight that is used with a bias computed beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 4)
        self.line = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.volume = nn.Conv3d(12, 12, (1, 3, 3), padding=(0, 1, 1))
        self.up = nn.ConvTranspose2d(12, 18, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0), groups=3)
        self.up_line = nn.ConvTranspose1d(18, 12, 1)
        self.up_volume = nn.ConvTranspose3d(12, 12, (1, 2, 2), stride=(1, 2, 2))
        self.down = nn.Conv2d(12, 12, 4, stride=4)
        self.mix, self.shift = nn.Linear(12, 12, bias=False), nn.Parameter(torch.randn(6))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.blocks[0](self.conv_in(sample), self.table(timestep))
        rows = self.line(x.flatten(2))
        rows = rows @ (rows.mT @ rows / 12).softmax(1)
        rows = F.linear(rows.mT, self.mix.weight, torch.cat([self.shift, -self.shift])).mT
        x = self.up(self.volume(x[:, :, None])[:, :, 0] + rows.unflatten(2, (6, 6)))
        x = self.up_line(x.flatten(2)).unflatten(2, (12, 12))
        x = self.down(self.up_volume(x[:, :, None])[:, :, 0])
        return self.conv_out(x)


@dataclass
class ToyTask(Task):
    """Calibrates on noise at four timesteps."""

    network: nn.Module
    timestep_input: str | None = "timestep"
    static: Mapping[str, object] = field(default_factory=dict)

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(0)
        return {"sample": torch.randn(batch, 1, 6, 6, generator=rng), "timestep": torch.arange(batch) * 100}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        return output

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        num_samples = len(samples)
        sample = torch.randn(4, num_samples, 1, 6, 6, generator=rng)
        timestep = torch.tensor([901, 601, 301, 1])[:, None].expand(4, num_samples).contiguous()
        with torch.no_grad():
            outputs = torch.stack([run({"sample": sample[i], "timestep": timestep[i]}) for i in range(4)])
        return CalibrationSet({"sample": sample, "timestep": timestep}, outputs)


@dataclass(frozen=True)
class Toy:
    """A toy on its way through the engine."""

    task: ToyTask
    graph: CapturedGraph
    sites: tuple[Site, ...]
    plan: Plan
    calibration: CalibrationSet

    def student(self) -> Student:
        return build_student(self.task, self.graph, self.plan)


def make_toy(
    network: nn.Module | None = None, *, weight_bits: int = 3, activation_bits: int = 8, keep: Mapping[str, int] = {}
) -> Toy:
    """A captured and calibrated toy."""
    if network is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = ToyDenoiser()
    task = ToyTask(network.eval().requires_grad_(False))
    graph = capture(network, task.example_inputs(3), {})
    sites = find_sites(network, graph)
    plan = make_plan(sites, keep, Budget(weight_bits=weight_bits, activation_bits=activation_bits))
    rng = torch.Generator().manual_seed(1)
    calibration = task.calibrate(lambda inputs: network(**inputs), range(8), rng, lambda done, total: None)
    return Toy(task, graph, sites, plan, calibration)


def skipping_toy(*, weight_bits: int = 4, activation_bits: int = 4) -> Toy:
    """A toy with a skip concatenation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_toy(Skipping(), weight_bits=weight_bits, activation_bits=activation_bits)


def split_toy(*, weight_bits: int = 4, activation_bits: int = 4) -> Toy:
    """The same with quantizers for each part of the concatenation; its first convolution has 8 bits."""
    toy = skipping_toy(weight_bits=weight_bits, activation_bits=activation_bits)
    return replace(toy, plan=make_plan(toy.sites, {"conv_in": 8}, toy.plan.budget, split_skip=True))


def affine(weights: Weights | None = None, activations: Activations | None = None) -> QuantizerChoices:
    """Affine quantizers with these settings."""
    return QuantizerChoices(
        QuantizerChoice(AffineQuantizer, weights or Weights()),
        QuantizerChoice(AffineQuantizer, activations or Activations(per_timestep=True)),
    )


def tune_job(toy: Toy, student: Student, losses: Sequence[Loss] = (), settings: Tune | None = None) -> TuneJob:
    """A job on a toy's student, seed 3."""
    teacher, quantized = Traced(toy.task.network, toy.graph), Traced(student.network, student.graph)
    layers = student.trained_layers()

    def tap(paths: Sequence[str]) -> tuple[TappedRun, TappedRun]:
        return tapped_run(student.network, student.graph, paths), tapped_run(toy.task.network, toy.graph, paths)

    run, float_run = tap(tuple(path for loss in losses for path in loss.taps(toy.sites)))
    return TuneJob(
        task=toy.task,
        network=student.network,
        layers=layers,
        sites=toy.sites,
        student=run,
        teacher=float_run,
        tap=tap,
        cut=lambda partition: cut_blocks(teacher, quantized, layers, "timestep", partition),
        calibration=toy.calibration,
        batch=calibration_batch(toy.task, toy.calibration, 8),
        losses=losses,
        settings=settings or Tune(iterations=60, batch=16),
        seed=3,
        checkpoint=Memory(),
        progress=silent,
    )


@dataclass
class Memory(Checkpoint):
    """Keeps a copy of everything saved."""

    saved: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.saved[-1] if self.saved else None

    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        self.saved.append((iteration, {name: value.clone() for name, value in tensors.items()}))


def silent(done: int, total: int) -> None:
    """Progress that nobody sees."""


def finish(
    toy: Toy,
    choices: QuantizerChoices,
    before: Callable[[Student], None] = lambda student: None,
    settings: Pack = AS_IT_IS,
) -> Student:
    """The toy's student with uniform bits, brought to its final values; ``before`` may change it before that."""
    student = toy.student()
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices, InputsFrom.TEACHER)
    assign(student, method, calibration_batch(toy.task, toy.calibration, 8), torch.Generator().manual_seed(0), silent)
    before(student)
    finalize_student(student, settings)
    return student
