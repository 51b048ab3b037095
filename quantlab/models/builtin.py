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
from quantlab.contracts.model import (
    CalibrationSet,
    Evidence,
    GenerativeTask,
    Inputs,
    Progress,
    Reference,
    Run,
    Task,
    TrainingBatch,
)
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import RecipeError, nearest
from quantlab.models.classifier import ClassifierTask, TensorImages
from quantlab.sampling import SampleStep, Schedule, recorded
from quantlab.store import JSON, digest_of, digest_of_file
from quantlab.zoo.denoiser import Noised, add_noise, noise_schedule
from quantlab.zoo.description import TRAIN_TIMESTEPS, DenoiserModel, Draw
from quantlab.zoo.models import DENOISERS, VISION, load_denoiser, load_judge, load_vision, weights_path
from quantlab.zoo.vision import VisionModel


class BuiltinConfig(Strict):
    """The zoo's models have no options."""


class BuiltinSource:
    """The small trained models that ship with quantlab."""

    name: ClassVar[str] = "builtin"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    models: ClassVar[Collection[str]] = (*DENOISERS, *VISION)
    Config = BuiltinConfig

    def __init__(self, config: BuiltinConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> Task:
        """A task by the model's name, its network on ``device`` in ``dtype``.

        Raises:
            RecipeError: no model has this name.
            ModelError: its weights cannot be read.
        """
        if model.name not in self.models:
            raise RecipeError(
                "there is no such model",
                where="model.name",
                got=model.name,
                allowed=", ".join(self.models),
                next_step=nearest(model.name, self.models),
            )
        weights = Path(model.weights) if model.weights else None
        if model.name in VISION:
            return vision_task(VISION[model.name], device, dtype, weights)
        return BuiltinTask(DENOISERS[model.name], sampling, device, dtype, weights)

    def identity(self, model: Model) -> str:
        """Hash of the weights of the network, and of its judge if it has one."""
        network = Path(model.weights) if model.weights else weights_path(model.name)
        judges = [weights_path(DENOISERS[model.name].judge.name)] if model.name in DENOISERS else []
        files = (network, *judges)
        return digest_of([digest_of_file(file) if file.is_file() else "missing" for file in files])


def vision_task(
    model: VisionModel, device: torch.device, dtype: torch.dtype, weights: Path | None = None
) -> ClassifierTask:
    """A classifier of the zoo: calibrated on the images it was trained on, measured on those it has not seen."""
    parts = [TensorImages(images, labels, model.num_classes) for images, labels in model.split()]
    return ClassifierTask(
        load_vision(model, weights), model.num_classes, model.image_shape, parts[1], parts[0], device, dtype
    )


class BuiltinTask(GenerativeTask):
    """A class-conditional denoiser of the zoo, with classifier-free guidance.

    Args:
        model: of the zoo.
        sampling: how images are drawn.
        device: where the networks go.
        dtype: what the denoiser computes in.
        weights: a file of other weights for it.

    Raises:
        ModelError: weights cannot be read, or are those of another model.
    """

    offers: Collection[Evidence] = frozenset(Evidence)

    def __init__(
        self,
        model: DenoiserModel,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
        weights: Path | None = None,
    ) -> None:
        self.name, self.device, self.dtype = model.name, device, dtype
        self.data, self.judge_model, self.drop_label = model.data, model.judge, model.settings.drop_label
        self.network = load_denoiser(model, weights)
        # Not diffusers' own ``to``, which warns about an empty list of modules.
        nn.Module.to(self.network, device=device, dtype=dtype)
        self.classifier = load_judge(model.judge).to(device)
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
            "sample": torch.randn(batch, *self.data.image_shape, generator=rng).to(self.device, self.dtype),
            "timestep": torch.arange(batch, device=self.device) * 37 % TRAIN_TIMESTEPS,
            "class_labels": self.labels(batch),
        }

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """With guidance, the samples without class and then with it, in one batch."""
        if self.guidance == 1.0:
            return dict(inputs)
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
        doubled["class_labels"][: len(inputs["class_labels"])] = self.data.num_classes
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

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Trajectories from noise to image, classes in turn."""
        noise = torch.randn(len(samples), *self.data.image_shape, generator=rng).to(self.device, self.dtype)
        steps: list[SampleStep] = []

        def keep(step: SampleStep) -> None:
            steps.append(step)
            progress(step.index + 1, self.schedule.settings.steps)

        with torch.no_grad():
            conditions = {"class_labels": self.labels(samples.stop)[samples.start :]}
            self.schedule.sample(lambda inputs: self.predict(run, inputs), noise, conditions, rng, keep)
        return recorded(steps)

    def calibration_source(self, num_samples: int) -> Mapping[str, JSON]:
        """The classes, in turn."""
        return {"model": self.name, "classes_in_turn": min(num_samples, self.data.num_classes)}

    @cached_property
    def _draw(self) -> Draw:
        return self.data.open()

    def training_batch(self, size: int, rng: torch.Generator) -> TrainingBatch:
        """Images with noise at random timesteps, a share of them without class, as the denoiser was trained."""
        images, labels = self._draw(size, rng)
        batch: Noised = add_noise(images, labels, self.data.num_classes, self.drop_label, rng)
        inputs = {
            "sample": batch.sample.to(self.device, self.dtype),
            "timestep": batch.timestep.to(self.device),
            "class_labels": batch.label.to(self.device),
        }
        return TrainingBatch(inputs, batch.noise.to(self.device, self.dtype))

    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Normal noise [count, C, H, W]."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.data.image_shape, generator=rng).to(self.device, self.dtype)

    def labels(self, count: int) -> Tensor:
        """Classes in turn: 0, 1, ..., the last, 0, ..."""
        return torch.arange(count, device=self.device) % self.data.num_classes

    def sample(
        self,
        run: Run,
        noise: Tensor,
        labels: Tensor,
        seeds: Sequence[int],
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """Images [B, C, H, W], clamped to [-1, 1]."""
        # A generator for each image, so that an image does not depend on the batch it is drawn in.
        rng = [torch.Generator().manual_seed(seed) for seed in seeds] if self.schedule.settings.eta else None
        with torch.no_grad():
            conditions = {"class_labels": labels}
            images = self.schedule.sample(
                lambda inputs: self.predict(run, inputs), noise, conditions, rng, corrections=corrections
            )
        return images.float().clamp(-1, 1)

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden activations [B, F] and logits [B, classes] of the judge."""
        with torch.no_grad():
            features = self.classifier.features(images)
            return features, self.classifier.head(features)

    def reference(self) -> Reference:
        """The data's set of real images; its features are computed once."""
        return self._reference

    def reference_images(self) -> Tensor:
        """The data's set of real images."""
        return self._real

    def judge_spatial(self, images: Tensor) -> Tensor:
        """The classifier's last feature map [B, S], flattened."""
        with torch.no_grad():
            return self.classifier.feature_map(images).flatten(1)

    @cached_property
    def _real(self) -> Tensor:
        return self.data.real()

    @cached_property
    def _reference(self) -> Reference:
        digest = digest_of([digest_of_file(weights_path(self.judge_model.name)), self.data.digest(self._real)])
        return Reference(self.judge(self._real.to(self.device))[0], self.data.real_name, digest)
