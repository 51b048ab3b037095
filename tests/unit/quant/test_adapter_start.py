"""Where low-rank adapters start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from quantlab.contracts.quant import PerChannel, QuantSpec
from quantlab.contracts.tuning import AdapterSpec, AdapterStart, ConvAdapter
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineQuantizer


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def quantized(layer: nn.Module, bits: int = 2, smoothing: bool = True) -> QuantizedLinear | QuantizedConv2d:
    """A layer with a weight quantizer, and smoothing scales if asked."""
    made = to_quantized(layer)
    made.requires_grad_(False)
    if smoothing:
        channels = made.in_features if isinstance(made, nn.Linear) else made.in_channels
        made.smoothing = torch.linspace(0.5, 2.0, channels)
    spec, widths = QuantSpec(PerChannel(0)), torch.full((made.weight.shape[0],), bits, dtype=torch.int8)
    made.weight_quantizer = AffineQuantizer.from_spec(spec, widths, AffineQuantizer.Config())
    made.weight_quantizer.observe(made.float_weight())
    made.weight_quantizer.freeze()
    return made


def nearest_of_rank(rows: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, from the eigenvectors of rows rows^T."""
    _, vectors = torch.linalg.eigh(rows.double() @ rows.double().T)
    top = vectors[:, -rank:]
    return (top @ top.T @ rows.double()).float()


STARTED = [
    (lambda: nn.Linear(6, 5), ConvAdapter.POINTWISE),
    (lambda: nn.Conv2d(4, 5, 3), ConvAdapter.POINTWISE),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), ConvAdapter.POINTWISE),
]


@pytest.mark.parametrize(("make", "conv"), STARTED)
def test_an_adapter_starts_at_the_nearest_product_to_the_quantization_error(make, conv) -> None:
    layer = quantized(make())
    error = layer.weight - layer.quantized_weight() / layer._weight_smoothing()
    before = layer.weight.clone()
    layer.add_adapter(AdapterSpec(2, conv, AdapterStart.QUANTIZATION_ERROR), torch.Generator().manual_seed(0))
    expected = nearest_of_rank(error.flatten(1), 2).view_as(error)
    torch.testing.assert_close(layer.adapter.delta(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(layer.weight, before), "the base stays"


def test_a_start_per_tap_is_nearest_at_each_tap() -> None:
    layer = quantized(nn.Conv2d(4, 5, 3))
    error = layer.weight - layer.quantized_weight() / layer._weight_smoothing()
    spec = AdapterSpec(2, ConvAdapter.PER_TAP, AdapterStart.QUANTIZATION_ERROR)
    layer.add_adapter(spec, torch.Generator().manual_seed(0))
    for i, j in ((0, 0), (1, 2)):
        expected = nearest_of_rank(error[:, :, i, j], 2)
        torch.testing.assert_close(layer.adapter.delta()[:, :, i, j], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [False, True])
def test_over_a_quantized_base_the_start_changes_nothing_that_is_quantized_away(smoothing: bool) -> None:
    """At full rank base and adapter add up to W; without the adapter the layer computes with Q(W)."""
    layer = quantized(nn.Linear(6, 5), smoothing=smoothing)
    before, computed = layer.float_weight().clone(), layer.quantized_weight()
    layer.add_adapter(AdapterSpec(5, start=AdapterStart.QUANTIZED_BASE), torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.float_weight(), before)
    torch.testing.assert_close(layer.quantized_weight(), computed)
    layer.adapter = None
    torch.testing.assert_close(layer.float_weight(), computed)


def test_the_error_added_to_a_float_base_pushes_weights_away() -> None:
    """Q(W + E) moves what lies more than a quarter of a step from its level: the figure's start raises the error."""
    layer = quantized(nn.Linear(64, 8), bits=4)
    weight = layer.float_weight()
    before = (layer.quantized_weight() - weight).square().mean()
    layer.add_adapter(AdapterSpec(8, start=AdapterStart.QUANTIZATION_ERROR), torch.Generator().manual_seed(0))
    assert (layer.quantized_weight() - weight).square().mean() > 2 * before


def test_rank_beyond_the_matrix_keeps_the_rest_at_its_start() -> None:
    layer = quantized(nn.Linear(6, 3))
    error = layer.weight - layer.quantized_weight() / layer._weight_smoothing()
    layer.add_adapter(AdapterSpec(5, start=AdapterStart.QUANTIZATION_ERROR), torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.adapter.delta(), error)
    assert torch.equal(layer.adapter.B[:, 3:], torch.zeros(3, 2)) and layer.adapter.A[3:].abs().min() > 0
