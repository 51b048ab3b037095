"""What metrics look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import BaseModel
from torch import Tensor

from quantlab.contracts.model import Evidence, GenerativeTask, Outcome


@dataclass(frozen=True)
class SampleSet:
    """Generated images with everything they are compared with; what no metric of the recipe needs is None.

    Attributes:
        images: [N, C, H, W] in [-1, 1].
        labels: the class, or the index of the prompt, that each image was asked for [N].
        features: of the images [N, F], by the network that ``evaluate.features`` names.
        logits: of the task's classifier for the images [N, K].
        teacher_images: the float model's images from the same noise [N, C, H, W].
        teacher_features: of the float model's images from other noise [N, F].
        reference_features: of real images [M, F].
        spatial: spatial features of the images [N, S].
        reference_spatial: of real images [M, S].
        feature_logits: of the network that gives the features [N, L]; the task's classifier without them.
        prompts: the text that each image was asked for, where a task has prompts.
    """

    images: Tensor
    labels: Tensor
    features: Tensor | None
    logits: Tensor | None
    teacher_images: Tensor
    teacher_features: Tensor | None
    reference_features: Tensor | None
    spatial: Tensor | None = None
    reference_spatial: Tensor | None = None
    feature_logits: Tensor | None = None
    prompts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, index: Tensor) -> SampleSet:
        """The set with other images in place of its own; what they are compared with stays."""
        tensors = {name: value[index] for name in OF_EACH_IMAGE if (value := getattr(self, name)) is not None}
        prompts = None if self.prompts is None else tuple(self.prompts[place] for place in index.tolist())
        return replace(self, prompts=prompts, **tensors)


OF_EACH_IMAGE = ("images", "labels", "features", "logits", "teacher_images", "spatial", "feature_logits")
"""The tensors of a SampleSet that belong to an image."""


class ImageMetric(ABC):
    """A number about a set of images.

    Attributes:
        paired: it compares each image with the float image of the same noise, and means nothing for other noise.
        resamples: its value over images drawn with replacement tells how it varies; false for neighbourhoods, which
            the same image drawn twice would shrink to nothing.
        needs: what the sample set must hold beside the images; of a task, or of the network of ``evaluate.features``.
    """

    outcome: ClassVar[Outcome] = Outcome.IMAGES

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    paired: ClassVar[bool] = False
    resamples: ClassVar[bool] = True
    needs: ClassVar[Collection[Evidence]] = ()
    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def __init__(self, config: BaseModel) -> None: ...

    def require(self, task: GenerativeTask) -> None:  # noqa: B027 - most metrics need nothing
        """Raise before anything is computed when what the metric needs is not at hand.

        Raises:
            ModelError: a package, a file of weights or a property of the task is missing.
        """

    @abstractmethod
    def compute(self, samples: SampleSet) -> dict[str, float]:
        """One or more named values."""
