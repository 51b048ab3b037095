"""A converted latent-diffusion model as a task: its conditions, its noise schedule, images from latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import CalibrationSet, GenerativeTask, Inputs, Progress, Run
from quantlab.contracts.sections import Sampling
from quantlab.errors import RecipeError
from quantlab.models.compvis.convert import LatentDiffusion
from quantlab.sampling import SampleStep, Schedule, recorded

CONDITION = "condition"
"""The recorded input that says which row of the contexts a sample is conditioned on."""
CONTEXT = "encoder_hidden_states"
DECODED_TOGETHER = 4
"""Latents that the first stage decodes at once: it needs far more memory than the denoiser."""


@dataclass(frozen=True)
class Contexts:
    """What samples are conditioned on.

    Attributes:
        table: a context [L, D] for each condition, [K, L, D].
        count: the first so many are asked for in turn.
        unconditional: the row that stands for no condition, or None where there is none.
        prompts: the text of each condition, where it is text.
    """

    table: Tensor
    count: int
    unconditional: int | None
    prompts: tuple[str, ...] | None = None


class CompVisTask(GenerativeTask):
    """The denoiser of a latent-diffusion model; without weights it can be planned on and nothing else.

    Args:
        model: the converted modules.
        contexts: of a conditional model, otherwise None.
        sampling: how images are drawn.
        device: where the networks go.
        dtype: what the denoiser computes in.

    Raises:
        RecipeError: guidance is asked for and the model knows no sample without a condition.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        contexts: Contexts | None,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if sampling.guidance != 1.0 and (contexts is None or contexts.unconditional is None):
            raise RecipeError(
                "this model cannot be guided: nothing stands for no condition",
                where="sampling.guidance",
                got=sampling.guidance,
                allowed="1",
                next_step="name the class that stands for none: model.unconditional_class",
            )
        self.model, self.network, self.dtype = model, model.unet, dtype
        self.device = device if model.has_weights else torch.device("meta")
        # Not diffusers' own ``to``, which warns about modules it wants to keep in float32.
        nn.Module.to(self.network, device=self.device, dtype=dtype)
        nn.Module.to(model.first_stage, device=self.device)
        self.contexts = contexts
        self.timestep_input = "timestep"
        self.static: Mapping[str, object] = {"return_dict": False}
        self.schedule = Schedule(model.alphas_cumprod, sampling)

    @property
    def guidance(self) -> float:
        """1 is none."""
        return self.schedule.settings.guidance

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one latent, [C, H, W]."""
        config = self.model.config
        return config.channels, config.image_size, config.image_size

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Noise at spread timesteps."""
        rng = torch.Generator().manual_seed(0)
        inputs = {
            "sample": torch.randn(batch, *self.latent_shape, generator=rng).to(self.device, self.dtype),
            "timestep": torch.arange(batch, device=self.device) * 37 % self.model.config.timesteps,
        }
        return inputs | self._context(self.labels(batch))

    def _context(self, labels: Tensor) -> dict[str, Tensor]:
        if self.contexts is None:
            return {}
        return {CONTEXT: self.contexts.table[labels.to(self.contexts.table.device)].to(self.device, self.dtype)}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """Latent, timestep and context; with guidance, the samples without a condition and then with it."""
        sample, timestep, labels = inputs["sample"], inputs["timestep"], inputs[CONDITION]
        if self.guidance != 1.0 and self.contexts is not None:
            without = torch.full_like(labels, self.contexts.unconditional or 0)
            sample, timestep = torch.cat([sample, sample]), torch.cat([timestep, timestep])
            labels = torch.cat([without, labels])
        return {"sample": sample, "timestep": timestep} | self._context(labels)

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
        """Trajectories from noise to latent, conditions in turn; a condition is recorded as its number."""
        noise = torch.randn(len(samples), *self.latent_shape, generator=rng).to(self.device, self.dtype)
        steps: list[SampleStep] = []

        def keep(step: SampleStep) -> None:
            steps.append(step)
            progress(step.index + 1, self.schedule.settings.steps)

        with torch.no_grad():
            conditions = {CONDITION: self.labels(samples.stop)[samples.start :]}
            self.schedule.sample(lambda inputs: self.predict(run, inputs), noise, conditions, rng, keep)
        return recorded(steps)

    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Normal noise [count, C, H, W]."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.latent_shape, generator=rng).to(self.device, self.dtype)

    def labels(self, count: int) -> Tensor:
        """Conditions in turn: 0, 1, ..., the last, 0, ...; all 0 for an unconditional model."""
        return torch.arange(count, device=self.device) % (self.contexts.count if self.contexts else 1)

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
            conditions = {CONDITION: labels}
            latents = self.schedule.sample(
                lambda inputs: self.predict(run, inputs), noise, conditions, rng, corrections=corrections
            )
            return self.decode(latents).clamp(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of denoised latents; a first stage with a codebook takes its nearest entries."""
        decode = self.model.first_stage.decode
        assert callable(decode)
        scaled = latents.float() / self.model.scale_factor
        # Contiguous, because a convolution may give another memory layout, which safetensors does not save.
        return torch.cat([decode(part, return_dict=False)[0] for part in scaled.split(DECODED_TOGETHER)]).contiguous()

    def prompts(self, count: int) -> Sequence[str] | None:
        """The text of each image, where there are prompts."""
        texts = self.contexts.prompts if self.contexts else None
        return None if texts is None else [texts[index % len(texts)] for index in range(count)]
