"""The networks whose features distances between sets of images are measured on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantlab.contracts.model import Evidence, GenerativeTask
from quantlab.contracts.sections import Evaluate, Features
from quantlab.errors import ModelError
from quantlab.evaluation.weights import checkpoints, require_package, require_weights
from quantlab.store import JSON, digest_of_file

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's conversion of the TensorFlow weights that published FIDs are computed with."""
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
"""TensorFlow's mixed_6/conv, [B, 192, 17, 17]; sFID takes its first seven channels."""


class FeatureNetwork(ABC):
    """Looks at images [B, C, H, W] in [-1, 1].

    Attributes:
        identity: what results depend on beyond the task's own judge, for stage keys and the protocol id.
        offers: what it can say of images.
    """

    offers: Collection[Evidence] = frozenset({Evidence.FEATURES, Evidence.SPATIAL})
    identity: Mapping[str, JSON]

    @abstractmethod
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F] and logits [B, L], on the CPU."""

    @abstractmethod
    def spatial(self, images: Tensor) -> Tensor:
        """Flattened spatial features [B, S], on the CPU."""


class JudgeNetwork(FeatureNetwork):
    """The task's own classifier."""

    identity: Mapping[str, JSON] = {}

    def __init__(self, task: GenerativeTask) -> None:
        self.task = task
        self.offers = frozenset(task.offers)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As the task judges."""
        features, logits = self.task.judge(images.to(self.task.device))
        return features.cpu(), logits.cpu()

    def spatial(self, images: Tensor) -> Tensor:
        """As the task judges; raises ModelError when it cannot."""
        return self.task.judge_spatial(images.to(self.task.device)).cpu()


class InceptionNetwork(FeatureNetwork):
    """Inception-v3 with the weights of the original FID, through torch-fidelity.

    Args:
        weights: torch-fidelity's file.
        device: where it computes.
        batch: images at once.

    Raises:
        ModelError: torch-fidelity is not installed, or the file is not there or not of this network.
    """

    def __init__(self, weights: Path, device: torch.device, batch: int) -> None:
        purpose = "evaluate.features: inception"
        require_package("torch_fidelity", "torch-fidelity", purpose)
        require_weights(weights, INCEPTION_URL, purpose)
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )

        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
        except Exception as error:  # torch.load and load_state_dict raise many kinds for a foreign file
            reason = str(error).partition("\n")[0]
            raise ModelError("these are no weights of Inception", where=str(weights), got=reason) from error
        self.network.to(device)
        self.device, self.batch = device, batch
        self.identity = _inception_identity(weights)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [B, 2048] and logits without their bias [B, 1008]."""
        found = [self._look(part) for part in images.split(self.batch)]
        return torch.cat([features for features, _ in found]), torch.cat([logits for _, logits in found])

    def spatial(self, images: Tensor) -> Tensor:
        """Seven channels of a 17x17 map, [B, 2023]."""
        maps: list[Tensor] = []
        layer = self.network.get_submodule(SPATIAL_LAYER)
        handle = layer.register_forward_hook(
            lambda _module, _inputs, output: maps.append(output[:, :SPATIAL_CHANNELS].flatten(1).cpu())
        )
        try:
            for part in images.split(self.batch):
                self._look(part)
        finally:
            handle.remove()
        return torch.cat(maps)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One batch; the network takes 8-bit RGB images and enlarges them to 299 pixels itself."""
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        with torch.no_grad():
            features, logits = self.network(pixels.to(self.device))
        return features.cpu(), logits.cpu()


def inception_weights(settings: Evaluate) -> Path:
    """Where the recipe says that Inception's weights are, or where torch-fidelity itself keeps them."""
    return Path(settings.inception_weights) if settings.inception_weights else checkpoints() / INCEPTION_FILE


def feature_network(task: GenerativeTask, settings: Evaluate) -> FeatureNetwork:
    """The network that a recipe asks for; raises ModelError when it is not at hand."""
    if settings.features is Features.JUDGE:
        return JudgeNetwork(task)
    return InceptionNetwork(inception_weights(settings), task.device, settings.batch)


def feature_identity(settings: Evaluate) -> Mapping[str, JSON]:
    """What ``FeatureNetwork.identity`` will be, without loading the network."""
    return {} if settings.features is Features.JUDGE else _inception_identity(inception_weights(settings))


def _inception_identity(weights: Path) -> Mapping[str, JSON]:
    return {"features": "inception", "inception_weights": digest_of_file(weights) if weights.is_file() else "missing"}
