"""The models that ship, as tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantlab.contracts.config import Strict
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import CalibrationSet, GenerativeTask, Inputs, Progress, Reference, Run, TrainingBatch
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import RecipeError, nearest
from quantlab.sampling import SampleStep, Schedule
from quantlab.store import digest_of, digest_of_file
from quantlab.zoo import digits
from quantlab.zoo.train import DenoiserSettings, noise_schedule

JUDGE = "digits-classifier"
"""The network whose features and classes images are judged by."""


class BuiltinConfig(Strict):
    """The zoo's models have no options."""


class BuiltinSource:
    """The small trained models that ship with quantlab."""

    name: ClassVar[str] = "builtin"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    models: ClassVar[Collection[str]] = tuple(digits.INITIALISATIONS)
    Config = BuiltinConfig

    def __init__(self, config: BuiltinConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> DigitsTask:
        """A task by the model's name, its network on ``device`` in ``dtype``.

        Raises:
            RecipeError: no model has this name.
            ModelError: its weights cannot be read.
        """
        if model.name not in digits.INITIALISATIONS:
            known = ", ".join(digits.INITIALISATIONS)
            raise RecipeError(
                "there is no such model",
                where="model.name",
                got=model.name,
                allowed=known,
                next_step=nearest(model.name, digits.INITIALISATIONS),
            )
        return DigitsTask(model.name, sampling, device, dtype, Path(model.weights) if model.weights else None)

    def identity(self, model: Model) -> str:
        """Hash of the weights of the network and of its judge."""
        network = Path(model.weights) if model.weights else digits.weights_path(model.name)
        files = (network, digits.weights_path(JUDGE))
        return digest_of([digest_of_file(file) if file.is_file() else "missing" for file in files])


class DigitsTask(GenerativeTask):
    """A class-conditional denoiser of 8x8 digits, with classifier-free guidance.

    Args:
        name: of the zoo's model.
        sampling: how images are drawn.
        device: where the networks go.
        dtype: what the denoiser computes in.
        weights: a file of other weights for it.

    Raises:
        ModelError: weights cannot be read, or are those of another model.
    """

    def __init__(
        self, name: str, sampling: Sampling, device: torch.device, dtype: torch.dtype, weights: Path | None = None
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.network = digits.load_unet(name, weights)
        # Not diffusers' own ``to``, which warns about an empty list of modules.
        nn.Module.to(self.network, device=device, dtype=dtype)
        self.classifier = digits.load_classifier().to(device)
        self.timestep_input = "timestep"
        self.static: Mapping[str, object] = {"return_dict": False}
        self.schedule = Schedule(noise_schedule(), sampling)

    @property
    def guidance(self) -> float:
        """1 is none."""
        return self.schedule.settings.guidance

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Noise at spread timesteps."""
        rng = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(batch, *digits.IMAGE_SHAPE, generator=rng).to(self.device, self.dtype),
            "timestep": torch.arange(batch, device=self.device) * 37 % digits.TRAIN_TIMESTEPS,
            "class_labels": self.labels(batch),
        }

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """With guidance, the samples without class and then with it, in one batch."""
        if self.guidance == 1.0:
            return dict(inputs)
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
        doubled["class_labels"][: len(inputs["class_labels"])] = digits.NULL_CLASS
        return doubled

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """u + g (c - u) (classifier-free guidance, arXiv 2207.12598)."""
        if self.guidance == 1.0:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def predict(self, run: Run, inputs: Inputs) -> Tensor:
        """The noise prediction, guidance included."""
        return self.combine(run(self.network_inputs(inputs)), inputs)

    def calibrate(self, run: Run, num_samples: int, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Trajectories from noise to image, classes in turn."""
        noise = torch.randn(num_samples, *digits.IMAGE_SHAPE, generator=rng).to(self.device, self.dtype)
        steps: list[SampleStep] = []

        def keep(step: SampleStep) -> None:
            steps.append(step)
            progress(step.index + 1, self.schedule.settings.steps)

        with torch.no_grad():
            conditions = {"class_labels": self.labels(num_samples)}
            self.schedule.sample(lambda inputs: self.predict(run, inputs), noise, conditions, rng, keep)
        inputs = {name: torch.stack([step.inputs[name] for step in steps]) for name in steps[0].inputs}
        return CalibrationSet(inputs, torch.stack([step.prediction for step in steps]))

    @cached_property
    def _scans(self) -> tuple[Tensor, Tensor]:
        return digits.load_images()

    def training_batch(self, size: int, rng: torch.Generator) -> TrainingBatch:
        """Scans with noise at random timesteps, a tenth of them without class, as the denoiser was trained."""
        images, labels = self._scans
        pick = torch.randint(len(images), (size,), generator=rng)
        timestep = torch.randint(digits.TRAIN_TIMESTEPS, (size,), generator=rng)
        noise = torch.randn(size, *digits.IMAGE_SHAPE, generator=rng)
        dropped = torch.rand(size, generator=rng) < DenoiserSettings().drop_label
        signal = noise_schedule()[timestep].view(-1, 1, 1, 1)
        inputs = {
            "sample": (signal.sqrt() * images[pick] + (1 - signal).sqrt() * noise).to(self.device, self.dtype),
            "timestep": timestep.to(self.device),
            "class_labels": labels[pick].masked_fill(dropped, digits.NULL_CLASS).to(self.device),
        }
        return TrainingBatch(inputs, noise.to(self.device, self.dtype))

    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Normal noise [count, 1, 8, 8]."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(count, *digits.IMAGE_SHAPE, generator=rng).to(self.device, self.dtype)

    def labels(self, count: int) -> Tensor:
        """Classes in turn: 0, 1, ..., 9, 0, ..."""
        return torch.arange(count, device=self.device) % digits.NUM_CLASSES

    def sample(
        self,
        run: Run,
        noise: Tensor,
        labels: Tensor,
        seeds: Sequence[int],
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """Images [B, 1, 8, 8], clamped to [-1, 1]."""
        # A generator for each image, so that an image does not depend on the batch it is drawn in.
        rng = [torch.Generator().manual_seed(seed) for seed in seeds] if self.schedule.settings.eta else None
        with torch.no_grad():
            conditions = {"class_labels": labels}
            images = self.schedule.sample(
                lambda inputs: self.predict(run, inputs), noise, conditions, rng, corrections=corrections
            )
        return images.float().clamp(-1, 1)

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden activations [B, 64] and logits [B, 10] of the digits classifier."""
        with torch.no_grad():
            features = self.classifier.features(images)
            return features, self.classifier.head(features)

    def reference(self) -> Reference:
        """All 1,797 scans."""
        images = digits.load_images()[0]
        digest = digest_of([digest_of_file(digits.weights_path(JUDGE)), digest_of(images.tolist())])
        return Reference(self.judge(images.to(self.device))[0], "digits: load_digits, 1797 images", digest)

    def reference_images(self) -> Tensor:
        """All 1,797 scans."""
        return digits.load_images()[0]

    def judge_spatial(self, images: Tensor) -> Tensor:
        """The classifier's last feature map [B, 64, 2, 2], flattened."""
        with torch.no_grad():
            return self.classifier.feature_map(images).flatten(1)
