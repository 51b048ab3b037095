"""Any denoiser as a task: how its network is called, on which conditions, through which sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor, nn

from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import CalibrationSet, GenerativeTask, Inputs, Progress, Run
from quantlab.contracts.sections import Sampling
from quantlab.errors import RecipeError
from quantlab.models.conditions import Conditions
from quantlab.sampling import Sampler, SampleStep

LABEL = "label"
"""The recorded input that says which condition a sample has."""
TRAIN_TIMESTEPS = 1000


class Guidance(StrEnum):
    """How a denoiser is guided."""

    NONE = "none"
    DOUBLED = "doubled batch"
    """Classifier-free guidance (arXiv 2207.12598): once without and once with the condition."""
    EMBEDDED = "embedded"
    """A distilled network, which gets the guidance as an input."""


@dataclass(frozen=True)
class Call:
    """How a network is called.

    Attributes:
        sample: the keyword of the noisy sample.
        timestep: the keyword of the timestep.
        timestep_divisor: what the sampler's timestep is divided by.
        timestep_dtype: of the sampler's timestep.
        channels: of the prediction, where the network's output [B, C, ...] has more (a learned variance); 0: all.
        guidance: how it is guided.
        guidance_input: the keyword of an embedded guidance.
        static: non-tensor keywords.
    """

    sample: str = "sample"
    timestep: str = "timestep"
    timestep_divisor: int = 1
    timestep_dtype: torch.dtype = torch.int64
    channels: int = 0
    guidance: Guidance = Guidance.NONE
    guidance_input: str = "guidance"
    static: Mapping[str, object] = field(default_factory=lambda: {"return_dict": False})


PROTECTED_BITS = 8
PROTECTED = ("first", "last", "time_embed", "modulation")
"""Tags of the sites that denoisers need more bits in: their ends, and whatever carries the timestep to the others."""


@dataclass(frozen=True)
class Denoiser:
    """A network and what surrounds it, wherever its modules came from.

    Attributes:
        network: the module to quantize, in evaluation mode.
        call: how it is called.
        noise_shape: of one sample, without the batch.
        example: keyword tensors [B, ...] besides sample and timestep for a batch size, as inputs of ``call`` get them.
        conditions: makes what the samples are conditioned on; called once, when it is first needed.
        sampler: makes the sampler; called once, when it is first needed.
        decode: from samples to images [B, C, H, W] in [-1, 1].
        texts: the prompts, in the conditions' order; None without prompts.
        digest: hashes the conditions and what decodes.
        batch: samples that are drawn together while calibration is recorded; None: all.
        protect: bits by tag of the sites that need more of them, where the recipe says nothing about it.
    """

    network: nn.Module
    call: Call
    noise_shape: tuple[int, ...]
    example: Callable[[int], Inputs]
    conditions: Callable[[], Conditions]
    sampler: Callable[[], Sampler]
    decode: Callable[[Tensor], Tensor]
    texts: tuple[str, ...] | None = None
    digest: Callable[[], str] = str
    batch: int | None = 16
    protect: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(PROTECTED, PROTECTED_BITS))


class DenoiserTask(GenerativeTask):
    """A denoiser that draws images.

    Args:
        denoiser: the network and what surrounds it.
        sampling: how images are drawn.
        device: where the network goes.
        dtype: what it computes in.

    Raises:
        RecipeError: guidance is asked for and the network cannot be guided.
    """

    def __init__(self, denoiser: Denoiser, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> None:
        self.denoiser, self.settings, self.device, self.dtype = denoiser, sampling, device, dtype
        if sampling.guidance != 1.0 and denoiser.call.guidance is Guidance.NONE:
            raise RecipeError(
                "this denoiser cannot be guided: it has no input without a condition",
                where="sampling.guidance",
                got=sampling.guidance,
                allowed="1",
            )
        self.network = denoiser.network.eval().requires_grad_(False)
        nn.Module.to(self.network, device=device, dtype=dtype)  # a network in another folder's dtype must not stay so
        self.timestep_input = denoiser.call.timestep
        self.static: Mapping[str, object] = denoiser.call.static
        self.protect: Mapping[str, int] = denoiser.protect

    @cached_property
    def conditions(self) -> Conditions:
        """What samples are conditioned on."""
        return self.denoiser.conditions().to(self.device, self.dtype)

    @cached_property
    def sampler(self) -> Sampler:
        """Timesteps and steps of the recipe's sampler."""
        return self.denoiser.sampler()

    @cached_property
    def conditions_digest(self) -> str:  # type: ignore[override]
        """Hash of the conditions and of what decodes."""
        return self.denoiser.digest()

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Noise at spread timesteps with conditions of the right shapes; encodes no prompt."""
        rng = torch.Generator().manual_seed(0)
        sample = torch.randn(batch, *self.denoiser.noise_shape, generator=rng).to(self.device, self.dtype)
        timestep = torch.arange(batch, device=self.device) * 37 % TRAIN_TIMESTEPS
        timestep = timestep.to(self.denoiser.call.timestep_dtype)
        given = {name: self._placed(value) for name, value in self.denoiser.example(batch).items()}
        return self._call_inputs(sample, timestep, given)

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _call_inputs(self, sample: Tensor, timestep: Tensor, conditions: Inputs) -> dict[str, Tensor]:
        call = self.denoiser.call
        if call.timestep_divisor != 1:
            timestep = timestep.to(self.dtype) / call.timestep_divisor
        inputs = {call.sample: sample, call.timestep: timestep, **conditions}
        if call.guidance is Guidance.EMBEDDED:
            inputs[call.guidance_input] = torch.full((len(sample),), self.settings.guidance, device=sample.device)
        return inputs

    @property
    def _doubled(self) -> bool:
        return self.denoiser.call.guidance is Guidance.DOUBLED and self.settings.guidance != 1.0

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """The sample, its timestep and the tensors of its condition; with guidance [uncond; cond] in one batch."""
        given = self.conditions.inputs(inputs[LABEL])
        sample, timestep = inputs["sample"], inputs["timestep"]
        if self._doubled:
            without = self.conditions.without(len(sample))
            given = {name: torch.cat([without[name], value]) for name, value in given.items()}
            sample, timestep = torch.cat([sample, sample]), torch.cat([timestep, timestep])
        return self._call_inputs(sample, timestep, given)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The prediction without a learned variance; u + g (c - u) where guidance doubled the batch."""
        channels = self.denoiser.call.channels
        prediction = output[:, :channels] if channels else output
        if not self._doubled:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.settings.guidance * (conditional - unconditional)

    def predict(self, run: Run, inputs: Inputs) -> Tensor:
        """The prediction, guidance included."""
        return self.combine(run(self.network_inputs(inputs)), inputs)

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Trajectories from noise to image, conditions in turn; recorded are sample, timestep and the condition."""
        noise = torch.randn(len(samples), *self.denoiser.noise_shape, generator=rng).to(self.device, self.dtype)
        labels, steps = self.labels(samples.stop)[samples.start :], self.settings.steps
        recorded: list[list[SampleStep]] = []
        with torch.no_grad():
            together = self.denoiser.batch or len(samples)
            for start in range(0, len(samples), together):
                part = slice(start, start + together)
                seen: list[SampleStep] = []

                def keep(step: SampleStep, seen: list[SampleStep] = seen, first: int = start) -> None:
                    seen.append(step)
                    progress(first * steps + len(step.prediction) * (step.index + 1), len(samples) * steps)

                conditions = {LABEL: labels[part]}
                self.sampler.sample(lambda inputs: self.predict(run, inputs), noise[part], conditions, rng, keep)
                recorded.append(seen)
        joined = list(zip(*recorded, strict=True))
        inputs = {
            name: torch.stack([torch.cat([part.inputs[name] for part in step]) for step in joined])
            for name in recorded[0][0].inputs
        }
        return CalibrationSet(inputs, torch.stack([torch.cat([part.prediction for part in step]) for step in joined]))

    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Normal noise [count, ...]."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.denoiser.noise_shape, generator=rng).to(self.device, self.dtype)

    def labels(self, count: int) -> Tensor:
        """Conditions in turn: 0, 1, ..., the last, 0, ..."""
        return torch.arange(count, device=self.device) % self._num_conditions

    @property
    def _num_conditions(self) -> int:
        texts = self.denoiser.texts
        return len(texts) if texts is not None else self.conditions.count

    def sample(
        self,
        run: Run,
        noise: Tensor,
        labels: Tensor,
        seeds: Sequence[int],
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """Images [B, C, H, W] as ``decode`` gives them."""
        # A generator for each image, so that an image does not depend on the batch it is drawn in.
        rng = [torch.Generator().manual_seed(seed) for seed in seeds] if self.settings.eta else None
        with torch.no_grad():
            samples = self.sampler.sample(
                lambda inputs: self.predict(run, inputs), noise, {LABEL: labels}, rng, corrections=corrections
            )
            return self.denoiser.decode(samples).float().contiguous()

    def prompts(self, count: int) -> Sequence[str] | None:
        """The text of each image."""
        texts = self.denoiser.texts
        return None if texts is None else [texts[index % len(texts)] for index in range(count)]

    def encode(self) -> Mapping[str, Tensor]:
        """The conditions of a model of text, as its encoders give them."""
        return {} if self.denoiser.texts is None else self.denoiser.conditions().tensors()

    def use_encoded(self, tensors: Mapping[str, Tensor]) -> None:
        """Take encoded conditions from a file."""
        self.conditions = Conditions.of(tensors).to(self.device, self.dtype)
