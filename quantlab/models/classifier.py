"""A classifier of images with labelled images, as a task."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quantlab.contracts.model import CalibrationSet, ClassificationTask, Inputs, LabelledBatch, Progress, Run
from quantlab.errors import ModelError
from quantlab.store import digest_of

AT_ONCE = 32
"""Images in one forward while calibration data are recorded."""


class LabelledImages(Protocol):
    """Images with their classes, by index."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 to this."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] as the network wants them, and their labels, int64 [B]."""
        ...

    def digest(self) -> str:
        """Hash of the images and of how they are prepared."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Images in memory: float [N, C, H, W], and labels, int64 [N]."""

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As they are."""
        return self.images[list(indices)], self.labels[list(indices)]

    def digest(self) -> str:
        """Hash of every value."""
        return digest_of([self.images.tolist(), self.labels.tolist()])


class ClassifierTask(ClassificationTask):
    """A network from images to class logits, with the images that it is measured and calibrated on.

    Args:
        network: in evaluation mode; its forward takes a batch of images first.
        num_classes: of its logits.
        image_shape: channels, height, width.
        measured: the network was not trained on them; None for a model without data.
        calibration: what calibration images are drawn from.
        device: where the network goes.
        dtype: what it computes in.
    """

    timestep_input: str | None = None
    static: Mapping[str, object] = {}

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        image_shape: Sequence[int],
        measured: LabelledImages | None,
        calibration: LabelledImages | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.network = network.to(device=device, dtype=dtype)
        self.num_classes, self.image_shape = num_classes, tuple(image_shape)
        self.measured, self.calibration = measured, calibration
        self.device, self.dtype = device, dtype
        self._input = next(iter(inspect.signature(network.forward).parameters))

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Normal noise of the network's own image size."""
        rng = torch.Generator().manual_seed(0)
        return {self._input: torch.randn(batch, *self.image_shape, generator=rng).to(self.device, self.dtype)}

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs as they are."""
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """The logits as they are."""
        return output

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Calibration images, drawn without replacement, and the float logits, as one step.

        Raises:
            ModelError: there are fewer images.
        """
        source = _required(self.calibration)
        if samples.stop > len(source):
            raise ModelError(
                "there are fewer images than calibration asks for",
                where="calibrate.trajectories",
                got=samples.stop,
                allowed=f"1 to {len(source)}",
            )
        # From the generator's seed, not its state, which moves on: all parts must draw from one order.
        own = torch.Generator().manual_seed(rng.initial_seed())
        pick = torch.randperm(len(source), generator=own)[samples.start : samples.stop].sort().values.tolist()
        images, logits = [], []
        with torch.no_grad():
            for start in range(0, len(samples), AT_ONCE):
                batch = self._batch(source, pick[start : start + AT_ONCE])
                images.append(batch.inputs[self._input])
                logits.append(run(batch.inputs))
                progress(min(start + AT_ONCE, len(samples)), len(samples))
        return CalibrationSet({self._input: torch.cat(images)[None]}, torch.cat(logits)[None])

    def calibration_digest(self) -> str:
        """Hash of the images that calibration draws from."""
        return _required(self.calibration).digest()

    def num_labelled(self) -> int:
        """Images that can be measured on; raises ModelError for more classes than the network has."""
        if self.measured is None:
            return 0
        for images in (self.measured, _required(self.calibration)):
            if images.num_classes > self.num_classes:
                raise ModelError(
                    "the images have more classes than the network",
                    where="model",
                    got=images.num_classes,
                    allowed=f"at most {self.num_classes}",
                    next_step="take a network with as many classes, and weights that fit",
                )
        return len(self.measured)

    def labelled(self, count: int, seed: int, batch: int) -> Iterator[LabelledBatch]:
        """Images that the network was not trained on, drawn with the seed."""
        source = _required(self.measured)
        pick = _drawn(len(source), count, torch.Generator().manual_seed(seed))
        for start in range(0, count, batch):
            yield self._batch(source, pick[start : start + batch])

    def data_digest(self) -> str:
        """Hash of the images that are measured on."""
        return _required(self.measured).digest()

    def _batch(self, source: LabelledImages, indices: Sequence[int]) -> LabelledBatch:
        images, labels = source.batch(indices)
        return LabelledBatch({self._input: images.to(self.device, self.dtype)}, labels)


def _drawn(available: int, count: int, rng: torch.Generator) -> list[int]:
    """Different indices, sorted."""
    return torch.randperm(available, generator=rng)[:count].sort().values.tolist()


def _required(images: LabelledImages | None) -> LabelledImages:
    if images is None:
        raise ModelError(
            "the model comes without images",
            where="model",
            got="no data",
            next_step="name a folder with val/ and train/, each with a folder for each class: model.data",
        )
    return images
