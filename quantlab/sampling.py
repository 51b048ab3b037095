"""The one denoising loop: teacher, distillation and evaluation all sample through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from quantlab.contracts.correction import CorrectionStep, FittedCorrection
from quantlab.contracts.model import CalibrationSet
from quantlab.contracts.sections import Sampling
from quantlab.errors import ModelError
from quantlab.torchvision_shim import ensure_torchvision_imports

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

Predict = Callable[[Mapping[str, Tensor]], Tensor]
"""The prediction [B, C, H, W], guidance included, for inputs ``sample``, ``timestep`` and conditions."""

Noise = torch.Generator | list[torch.Generator] | None
"""What the noise of eta > 0 is drawn from."""


@dataclass(frozen=True)
class SampleStep:
    """One step of the loop, as an observer sees it.

    Attributes:
        index: position in the sampler, 0 is the noisiest.
        inputs: ``sample`` [B, C, H, W], ``timestep`` [B] and the conditions.
        prediction: the predicted noise (or velocity), corrected where there are corrections.
    """

    index: int
    inputs: Mapping[str, Tensor]
    prediction: Tensor


Observe = Callable[[SampleStep], None]


class Sampler(ABC):
    """The loop, over what differs between samplers: their timesteps and one step.

    Attributes:
        settings: the recipe's ``sampling`` section.
    """

    settings: Sampling

    @property
    @abstractmethod
    def timesteps(self) -> Tensor:
        """[steps], from the noisiest to the cleanest."""

    @abstractmethod
    def step(
        self,
        index: int,
        prediction: Tensor,
        x: Tensor,
        rng: Noise = None,
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """x at the next step from the prediction at step ``index``; a pure function but for ``rng``.

        ``corrections`` change the noise that is added alone: the prediction is taken as it is.
        """

    @abstractmethod
    def correct(self, index: int, prediction: Tensor, corrections: Sequence[FittedCorrection]) -> Tensor:
        """The prediction of step ``index`` after the corrections, in their order."""

    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        rng: Noise = None,
        observe: Observe | None = None,
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """Denoise ``noise`` [B, C, H, W].

        Args:
            predict: the prediction of the network.
            noise: x_T.
            conditions: keyword tensors [B, ...] that every step gets.
            rng: of the noise that eta > 0 adds at every step; a list has one for each sample.
            observe: called after every prediction.
            corrections: of a quantized model's predictions and of the noise that is added, in their order.

        Returns:
            x_0 [B, C, H, W].
        """
        x = noise
        for index, timestep in enumerate(self.timesteps.tolist()):
            step_inputs = {"sample": x, "timestep": torch.full((len(x),), timestep, device=x.device), **conditions}
            prediction = self.correct(index, predict(step_inputs), corrections)
            if observe is not None:
                observe(SampleStep(index, step_inputs, prediction))
            x = self.step(index, prediction, x, rng, corrections)
        return x


def recorded(steps: Sequence[SampleStep]) -> CalibrationSet:
    """What an observer saw of a whole loop.

    A condition is the very same tensor at every step; it is expanded over them, not copied for each.
    """
    inputs: dict[str, Tensor] = {}
    for name, first in steps[0].inputs.items():
        values = [step.inputs[name] for step in steps]
        constant = all(value is first for value in values)
        inputs[name] = first.expand(len(values), *first.shape) if constant else torch.stack(values)
    return CalibrationSet(inputs, torch.stack([step.prediction for step in steps]))


@dataclass(frozen=True)
class Schedule(Sampler):
    """Timesteps and noise levels of DDIM (arXiv 2010.02502).

    Attributes:
        alphas_cumprod: products of 1 - beta for every training timestep [T].
        settings: the recipe's ``sampling`` section.
        config: of the model's own scheduler in diffusers, which then says how timesteps are spaced, what is predicted
            and where the last step leads; without it, timesteps are spaced from 1 and noise is predicted.
    """

    alphas_cumprod: Tensor
    settings: Sampling
    config: Mapping[str, object] | None = None

    @classmethod
    def of(cls, config: Mapping[str, object], settings: Sampling) -> Schedule:
        """DDIM over the noise levels of a scheduler's configuration."""
        return cls(_ddim(config).alphas_cumprod, settings, config)

    @property
    def timesteps(self) -> Tensor:
        """int64 [steps], from the noisiest to the cleanest; without a config 20 steps are 951, ..., 51, 1."""
        return self._scheduler.timesteps

    @cached_property
    def _scheduler(self) -> DDIMScheduler:
        if self.config is not None:
            scheduler = _ddim(self.config)
            scheduler.set_timesteps(self.settings.steps)
            return scheduler
        ensure_torchvision_imports()
        from diffusers import DDIMScheduler

        alphas = self.alphas_cumprod.double()
        betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
        scheduler = DDIMScheduler(
            num_train_timesteps=len(alphas),
            trained_betas=betas.tolist(),
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1 if self.settings.steps < len(alphas) else 0,
            timestep_spacing="leading",
        )
        scheduler.set_timesteps(self.settings.steps)
        return scheduler

    def step(
        self,
        index: int,
        prediction: Tensor,
        x: Tensor,
        rng: Noise = None,
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """x at the next step (equation 12) from the noise predicted at step ``index``."""
        scheduler = self._scheduler
        timestep, eta = int(scheduler.timesteps[index]), self.settings.eta
        variance, calibrated = self.variance(index), self._calibrated(index, corrections)
        if calibrated == variance:
            return scheduler.step(prediction, timestep, x, eta=eta, generator=rng, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        from diffusers.utils.torch_utils import randn_tensor

        # The scheduler multiplies the noise it is given by its own standard deviation.
        noise = randn_tensor(prediction.shape, generator=rng, device=prediction.device, dtype=prediction.dtype)  # pyright: ignore[reportArgumentType]
        noise = noise * (calibrated / variance) ** 0.5
        return scheduler.step(prediction, timestep, x, eta=eta, variance_noise=noise, return_dict=False)[0]  # pyright: ignore[reportArgumentType]

    def correct(self, index: int, prediction: Tensor, corrections: Sequence[FittedCorrection]) -> Tensor:
        """The prediction after the corrections that were fitted at the nearest timestep."""
        for fitted in corrections:
            nearest = self._correction_step(index, fitted).index
            prediction = fitted.correction.correct(fitted.tensors, nearest, prediction)
        return prediction

    def variance(self, index: int) -> float:
        """Of the noise that step ``index`` adds (arXiv 2010.02502, equation 16, squared)."""
        alpha, before = self._alphas(index)
        return self.settings.eta**2 * (1 - before) / (1 - alpha) * (1 - alpha / before)

    def _calibrated(self, index: int, corrections: Sequence[FittedCorrection]) -> float:
        """The variance as the corrections have it; 0 stays 0."""
        variance = self.variance(index)
        for fitted in corrections if variance else ():
            step = self._correction_step(index, fitted)
            variance = fitted.correction.variance(fitted.tensors, step, variance)
        return variance

    def _correction_step(self, index: int, fitted: FittedCorrection) -> CorrectionStep:
        distances = (fitted.timesteps - self.timesteps[index]).abs()
        return CorrectionStep(int(distances.argmin()), *self._alphas(index))

    def _alphas(self, index: int) -> tuple[float, float]:
        """Products of 1 - beta at the timestep of a step and at the one it leads to."""
        timestep = int(self.timesteps[index])
        before = timestep - len(self.alphas_cumprod) // self.settings.steps
        alpha = float(self.alphas_cumprod[timestep])
        if before < 0 and self.config is not None:
            return alpha, float(self._scheduler.final_alpha_cumprod)
        return alpha, float(self.alphas_cumprod[max(0, before)])


def _ddim(config: Mapping[str, object]) -> DDIMScheduler:
    """DDIM from the configuration of any scheduler of diffusers with betas."""
    ensure_torchvision_imports()
    from diffusers import DDIMScheduler

    # Only schedulers that may clip say whether they do; DDIM's own default would clip latents.
    return cast(DDIMScheduler, DDIMScheduler.from_config({"clip_sample": False, **config}))


@dataclass(frozen=True)
class FlowSchedule(Sampler):
    """Euler's method along a flow from noise to data (rectified flow, arXiv 2209.03003); the network gives velocities.

    Attributes:
        config: of the model's ``FlowMatchEulerDiscreteScheduler``.
        settings: the recipe's ``sampling`` section.
        tokens: of the sample, by which some models shift their noise levels.
    """

    config: Mapping[str, object]
    settings: Sampling
    tokens: int

    @property
    def timesteps(self) -> Tensor:
        """float32 [steps]: 1000 times the noise level."""
        return cast(Tensor, self._scheduler.timesteps)

    @cached_property
    def _scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        ensure_torchvision_imports()
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config({**self.config}))
        steps, own = self.settings.steps, cast(Any, scheduler.config)
        if own.use_dynamic_shifting:
            # The shift grows linearly with the number of tokens, through the two points of the configuration.
            slope = (own.max_shift - own.base_shift) / (own.max_image_seq_len - own.base_image_seq_len)
            shift = own.base_shift + slope * (self.tokens - own.base_image_seq_len)
            scheduler.set_timesteps(steps, sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=shift)
        else:
            scheduler.set_timesteps(steps)
        return scheduler

    def step(
        self,
        index: int,
        prediction: Tensor,
        x: Tensor,
        rng: Noise = None,
        corrections: Sequence[FittedCorrection] = (),
    ) -> Tensor:
        """x + (s' - s) v for the velocity v and the noise levels s and s' of this step and the next."""
        sigmas = cast(Tensor, self._scheduler.sigmas)
        return (x.float() + (sigmas[index + 1] - sigmas[index]) * prediction).to(prediction.dtype)

    def correct(self, index: int, prediction: Tensor, corrections: Sequence[FittedCorrection]) -> Tensor:
        """The prediction as it is.

        Raises:
            ModelError: there are corrections, which are about predicted noise.
        """
        if corrections:
            raise ModelError(
                "corrections of the sampler are about predicted noise, and this model predicts velocities",
                where="corrections",
                got=", ".join(fitted.correction.name for fitted in corrections),
                next_step="leave corrections out: corrections: []",
            )
        return prediction
