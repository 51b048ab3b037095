"""Second moments of what weights multiply, against the output error that they must explain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from quantlab.allocation.energy import Moments, channel_errors
from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.quant import Observer
from quantlab.contracts.site import Site, SiteKind, Slot


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


LAYERS = {
    "linear": (nn.Linear(6, 4, bias=True), noise(5, 6)),
    "linear over three dimensions": (nn.Linear(6, 4), noise(5, 3, 6)),
    "padded": (nn.Conv2d(4, 6, 3, padding=1), noise(3, 4, 5, 5)),
    "strided, dilated": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), noise(3, 4, 9, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), noise(3, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), noise(2, 4, 5, 5)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), noise(2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_gram_gives_the_output_error_of_every_channel(name: str) -> None:
    """Whatever the layer: d^T E[x x^T] d is the mean squared change of the output, computed by the layer itself."""
    layer, x = LAYERS[name]
    record = SiteRecord.of_layer(layer.requires_grad_(False), (x[:1], x[1:]))
    record = replace(record, smoothing=torch.linspace(0.5, 2.0, len(record.input_absmax())))
    data = TensorSiteData({"layer": record})
    site = Site("layer", SiteKind.CONV, tuple(layer.weight.shape), 1, (Slot("input", (1,)),), groups=record.groups)
    errors = channel_errors(data, site, [2, 3], Observer.MSE, Moments.GRAM)
    for column, width in enumerate((2, 3)):
        bits = torch.full((len(layer.weight),), width, dtype=torch.int8)
        quantized = data.quantized_weight("layer", bits, Observer.MSE)
        changes = [
            record.compute(part, quantized) - record.compute(part, data.weight("layer"))
            for part in data.inputs("layer")
        ]
        channel = 1 if isinstance(layer, nn.Conv2d) else -1
        rows = torch.cat([change.movedim(channel, -1).reshape(-1, len(bits)) for change in changes])
        assert torch.allclose(errors[:, column], rows.double().square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("name", list(LAYERS))
def test_second_moment_is_the_diagonal_of_the_gram_matrix(name: str) -> None:
    layer, x = LAYERS[name]
    data = TensorSiteData({"layer": SiteRecord.of_layer(layer.requires_grad_(False), (x,))})
    diagonal = data.input_gram("layer").diagonal(dim1=1, dim2=2)
    assert torch.allclose(data.input_second_moment("layer"), diagonal, rtol=1e-5)
