"""The contract between models and the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from quantlab.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantlab.contracts.correction import FittedCorrection
    from quantlab.store import JSON

Inputs = Mapping[str, "Tensor"]
"""Keyword tensors of a network's forward; dimension 0 is the batch."""
Run = Callable[[Inputs], "Tensor"]
"""The network's forward on keyword tensors."""
Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


@dataclass(frozen=True)
class CalibrationSet:
    """What the float network saw and said, S steps of N samples.

    A classifier, or a module with batches of its own, has S = 1.

    The tensors may lie in a file that is mapped into memory: a step is read when it is asked for.

    Attributes:
        inputs: each keyword tensor [S, N, ...], as ``Task.predict`` takes them at a step.
        outputs: the float prediction [S, N, ...], guidance included.
        dtypes: what tensors become when they are read, by the name of the input; "" is the prediction.
        device: where they go when they are read; None: they stay where they are.
    """

    inputs: Inputs
    outputs: Tensor
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict[str, "torch.dtype"])
    device: torch.device | None = None

    @property
    def num_steps(self) -> int:
        """S."""
        return self.outputs.shape[0]

    @property
    def num_samples(self) -> int:
        """N."""
        return self.outputs.shape[1]

    def step(self, index: int, samples: Tensor | slice) -> dict[str, Tensor]:
        """The inputs of one step for some of the samples."""
        return {name: self._read(name, value[index, samples]) for name, value in self.inputs.items()}

    def output(self, index: int, samples: Tensor | slice) -> Tensor:
        """The float prediction of one step for some of the samples."""
        return self._read("", self.outputs[index, samples])

    def _read(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.device or value.device, self.dtypes.get(name, value.dtype))


@dataclass(frozen=True)
class CalibrationBatch:
    """What quantizers and policies are measured on, as one batch of the network.

    Attributes:
        inputs: keyword tensors [M, ...], doubled under guidance.
        timestep: [M], or None without a timestep input.
    """

    inputs: Inputs
    timestep: Tensor | None


@dataclass(frozen=True)
class TrainingBatch:
    """Real data as the network was trained on them.

    Attributes:
        inputs: keyword tensors [B, ...] of one call of the network.
        target: what its output [B, ...] should be, in the sense of squares: the noise, for a denoiser of noise.
    """

    inputs: Inputs
    target: Tensor


class Task(ABC):
    """A network with what the engine must know about it.

    Attributes:
        network: the module to quantize.
        timestep_input: the keyword that carries the timestep, or None.
        static: non-tensor keywords that every call of forward gets.
        conditions_digest: hash of what its outcome depends on beside the network and the recipe, such as prompts and
            what decodes samples; "" when there is nothing of the kind.
        protect: bits of weights and activations, by tag, of the sites that models of this family need more bits in,
            where the recipe says nothing about it.
    """

    network: nn.Module
    timestep_input: str | None
    static: Mapping[str, object]
    conditions_digest: str = ""
    protect: Mapping[str, int] = MappingProxyType({})
    available_samples: int | None = None
    """How many samples there are to record; None: as many as are asked for."""

    @abstractmethod
    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Keyword tensors for one forward of the network; no two of them the same object."""

    @abstractmethod
    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """What one call of the network gets for these samples; guidance doubles the batch ([uncond; cond])."""

    @abstractmethod
    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The prediction from the network's output on ``network_inputs(inputs)``."""

    @abstractmethod
    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Record what the float network sees and says: along its sampling trajectory for a denoiser.

        A large recording is made part by part, each part a call.

        Args:
            run: the float network.
            samples: which of all samples to record: labels, prompts or images are those of these indices.
            rng: noise is drawn from it, that of a part after that of the parts before.
            progress: of this part.
        """

    def calibration_source(self, num_samples: int) -> Mapping[str, JSON]:
        """Where the first ``num_samples`` samples come from, for the record: the hash of a file of prompts, say."""
        return {}

    def calibration_digest(self) -> str | None:
        """Hash of the data that ``calibrate`` draws from; None where they follow from weights, sampler and seed."""
        return None

    def training_batch(self, size: int, rng: torch.Generator) -> TrainingBatch:
        """Draw ``size`` real samples with ``rng``, for methods that train on data.

        Raises:
            ModelError: the model comes without training data.
        """
        raise ModelError(
            "this model has no training data",
            where=type(self).__name__,
            got="a method that trains on real data",
            next_step="choose a data-free method: quantlab list methods",
        )


class Outcome(StrEnum):
    """What a task gives and a metric looks at."""

    IMAGES = "images"
    CLASSES = "classes"


class Evidence(StrEnum):
    """What a generative task may have beside its denoiser, and what a metric of images may need."""

    FEATURES = "features of images"
    SPATIAL = "spatial features of images"
    LOGITS = "class logits of images"
    REFERENCE = "real images to compare with"


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
        features: of the real images [M, F]; None without a network that judges.
        name: of the set.
        digest: hash of the real images and of the weights of the network that judges.
    """

    features: Tensor | None
    name: str
    digest: str


class GenerativeTask(Task):
    """A denoiser that draws images; where ``offers`` says so, with a network that judges them and real images.

    Attributes:
        device: where the networks are.
        offers: features, spatial features and logits are what the judge gives; nothing for a task without one.
    """

    device: torch.device
    offers: Collection[Evidence] = frozenset()

    @abstractmethod
    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Initial noise [count, C, H, W]; an image's noise depends on the seed and its index alone."""

    @abstractmethod
    def labels(self, count: int) -> Tensor:
        """The condition of each image of an evaluation, int64 [count]: its class, or the index of its prompt."""

    @abstractmethod
    def sample(
        self,
        run: Run,
        noise: Tensor,
        labels: Tensor,
        seeds: Sequence[int],
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from initial noise.

        ``seeds`` [B] are of the noise that eta > 0 adds, ``corrections`` of the sampler for a quantized network.
        """

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F] and class logits [B, K] of images."""
        raise ModelError("the task has no network that judges images", where=type(self).__name__)

    def reference(self) -> Reference:
        """The features of the real images."""
        raise ModelError("the task has no images to compare with", where=type(self).__name__)

    def reference_images(self) -> Tensor:
        """The real images [M, C, H, W] in [-1, 1]; needed by spatial features and by another feature network."""
        raise ModelError("the task has no images to compare with", where=type(self).__name__)

    def judged_by(self) -> str | None:
        """Hash of the real images and of the weights of the network that judges; None for a task with neither."""
        return self.reference().digest if Evidence.REFERENCE in self.offers else None

    def judge_spatial(self, images: Tensor) -> Tensor:
        """A feature map of the judging network, flattened [B, S]: where things are, not only what they are."""
        raise ModelError(
            "the network that judges has no spatial features",
            where=type(self).__name__,
            next_step="leave sfid out of evaluate.metrics, or set evaluate.features to inception",
        )

    def prompts(self, count: int) -> Sequence[str] | None:
        """The text of each image of an evaluation; None for a task without prompts."""
        return None

    def encode(self) -> Mapping[str, Tensor]:
        """What prompts are encoded into, for a run to keep; empty for a task that encodes nothing."""
        return {}

    def use_encoded(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what ``encode`` gave in an earlier process, so that nothing is encoded again."""


@dataclass(frozen=True)
class LabelledBatch:
    """Inputs whose class is known.

    Attributes:
        inputs: keyword tensors [B, ...] of one call of the network.
        labels: int64 [B].
    """

    inputs: Inputs
    labels: Tensor


class ClassificationTask(Task):
    """A network that gives class logits, and labelled data that it was not trained on.

    Attributes:
        num_classes: K.
    """

    num_classes: int

    @abstractmethod
    def num_labelled(self) -> int:
        """How many labelled inputs there are; 0 for a model without data."""

    @abstractmethod
    def labelled(self, count: int, seed: int, batch: int) -> Iterator[LabelledBatch]:
        """``count`` different labelled inputs, drawn with the seed, in batches of at most ``batch``; always the same.

        Raises:
            ModelError: the data cannot be read.
        """

    @abstractmethod
    def data_digest(self) -> str:
        """Hash of the labelled data and of how they are prepared."""
