"""Losses, adapters and tuners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor, nn

    from quantlab.contracts.block import BlockCutter
    from quantlab.contracts.model import CalibrationBatch, CalibrationSet, Inputs, Progress, Task
    from quantlab.contracts.sections import Tune
    from quantlab.contracts.site import Site

OUTPUT = "output"
"""The tap that is always there: the model's own prediction."""


class ConvAdapter(StrEnum):
    """The shape of a low-rank adapter's second factor at a convolution; the first has the layer's own kernel."""

    POINTWISE = "pointwise"
    """B is [out, rank, 1, 1]: one product for all kernel taps (EfficientDM)."""
    PER_TAP = "per_tap"
    """B is [out, rank, k, k]: a product for each kernel tap (the released MPQ-DM code)."""


class AdapterStart(StrEnum):
    """Where a low-rank adapter starts."""

    RANDOM = "random"
    """A is drawn and B is 0: the adapter changes nothing (LoRA)."""
    QUANTIZATION_ERROR = "quantization_error"
    """B A is the product of its rank nearest to W - Q(W); the base stays W."""
    QUANTIZED_BASE = "quantized_base"
    """The same B A, and Q(W) becomes the base: the sum stays near W, and what it quantizes to near Q(W) (LoftQ)."""


@dataclass(frozen=True)
class AdapterSpec:
    """A low-rank adapter: W0 + B A."""

    rank: int
    conv: ConvAdapter = ConvAdapter.POINTWISE
    start: AdapterStart = AdapterStart.RANDOM


@dataclass(frozen=True)
class StepContext:
    """Where a tuner is.

    Attributes:
        timestep: the batch's timesteps [B], or None without a denoiser.
        step_index: position in the sampler, 0 is the noisiest.
        num_steps: sampler steps.
        rng: the only source of randomness a loss may use.
        progress: share of the tuner's iterations that are done, in [0, 1).
    """

    timestep: Tensor | None
    step_index: int
    num_steps: int
    rng: torch.Generator
    progress: float = 0.0


class Loss(ABC):
    """A calibration loss between student and teacher.

    Reductions: a sum over everything, as in the released code, unless its Config says otherwise.

    Attributes:
        needs_timestep: it works along the steps of a denoiser, and means nothing for another network.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    needs_timestep: ClassVar[bool] = False
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    def taps(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """Module paths whose outputs the loss needs besides OUTPUT."""
        return ()

    def reset(self) -> None:  # noqa: B027  a loss without memory has nothing to forget
        """Forget earlier steps: a new trajectory begins."""

    def state(self) -> dict[str, Tensor]:
        """What outlives a trajectory, for a checkpoint; empty for a loss without such a memory."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  a loss without memory has nothing to take back
        """Begin a run: take back what ``state`` gave when it was interrupted; empty for a run from its start."""

    @abstractmethod
    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext
    ) -> Tensor | None:
        """A 0-dim loss, or None when there is nothing at this step.

        ``student`` and ``teacher`` map OUTPUT and the taps to [B, C, H, W] (or [B, ...]) tensors; the teacher's are
        detached, the student's attached.
        """


TappedRun = Callable[["Inputs"], tuple["Tensor", Mapping[str, "Tensor"]]]
"""A network's forward that also returns the taps by module path."""
Tapper = Callable[[Sequence[str]], tuple[TappedRun, TappedRun]]
"""The forwards of student and teacher with these module paths as taps."""


TapsAt = Callable[[int], Mapping[str, "Tensor"]]
"""The float network's taps at one of a tuner's iterations, as ``Tuner.visits`` told them beforehand."""


@dataclass(frozen=True)
class TeacherVisit:
    """What a tuner looks at in one iteration.

    Attributes:
        step: of the recorded trajectories.
        samples: of them, int64 [B].
    """

    step: int
    samples: Tensor


class Checkpoint(ABC):
    """Where a tuner keeps what it needs to go on after a kill."""

    @abstractmethod
    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """The number of iterations done and the tensors saved then, or None at the start."""

    @abstractmethod
    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace what was saved, atomically."""


@dataclass(frozen=True)
class TuneJob:
    """What a tuner gets.

    Attributes:
        task: the network's contract: how inputs are doubled and predictions combined under guidance.
        network: the quantized network.
        layers: its quantized layers that may be trained, by site, in the graph's order, adapters in place.
        sites: every site of the network, with its tags.
        student: the quantized network's forward with taps.
        teacher: the float network's forward with taps.
        tap: both forwards with other taps than those of the losses.
        cut: both networks in blocks that can be tuned by themselves.
        calibration: the recorded trajectories.
        batch: the network inputs of the calibration set that bits and scales were found on.
        losses: each weighted by its own Config; they are summed.
        settings: the recipe's ``tune`` section.
        seed: all randomness derives from it and the epoch.
        checkpoint: for resuming.
        progress: called after every iteration.
        taps_at: the taps of ``teacher`` at an iteration, computed beforehand for the tuner's visits; None: they are
            not, and ``teacher`` gives them.
    """

    task: Task
    network: nn.Module
    layers: Mapping[str, nn.Module]
    sites: Sequence[Site]
    student: TappedRun
    teacher: TappedRun
    tap: Tapper
    cut: BlockCutter
    calibration: CalibrationSet
    batch: CalibrationBatch
    losses: Sequence[Loss]
    settings: Tune
    seed: int
    checkpoint: Checkpoint
    progress: Progress
    taps_at: TapsAt | None = None


@dataclass(frozen=True)
class TuneResult:
    """What a tuner returns; the trained parameters are in the layers.

    Attributes:
        history: the loss of every iteration, by loss name and as "total"; NaN where a loss had nothing to say. A tuner
            that goes layer by layer has an entry for each layer.
        notes: what a person should know, such as layers that were left alone; a line each.
    """

    history: Mapping[str, Sequence[float]]
    notes: Sequence[str] = ()


class Tuner(ABC):
    """Trains the quantized network.

    Attributes:
        needs_timestep: it works along the steps of a denoiser, and means nothing for another network.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    needs_timestep: ClassVar[bool] = False
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    def adapter(self, settings: Tune) -> AdapterSpec | None:
        """The adapter the engine puts into every layer that may be trained; none unless a tuner asks for one."""
        return None

    def visits(self, settings: Tune, num_steps: int, num_samples: int, seed: int) -> Sequence[TeacherVisit]:
        """The recorded inputs on which it needs the teacher's taps, one visit for each iteration.

        They depend on no student. So the engine computes the taps once for all methods with these visits and gives
        them as ``TuneJob.taps_at``. Empty: not known beforehand, and the tuner asks ``TuneJob.teacher``.
        """
        return ()

    @abstractmethod
    def tune(self, job: TuneJob) -> TuneResult:
        """Train in place; raises NonFiniteError naming the first bad site."""
