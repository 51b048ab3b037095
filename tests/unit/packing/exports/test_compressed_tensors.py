"""Folders that the library compressed-tensors reads back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quantlab import export_compressed_tensors, quantize
from quantlab.api import QuantizedModule
from quantlab.errors import PackError
from quantlab.packing.exports.compressed_tensors import CONFIG, WEIGHTS
from quantlab.torchvision_shim import ensure_torchvision_imports

ensure_torchvision_imports()


class Mlp(nn.Module):
    """Three linear layers between a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 2, stride=2), nn.LayerNorm(8)
        self.first, self.second, self.last = nn.Linear(8, 37), nn.Linear(37, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.norm(self.conv(x).flatten(2).mT)
        return self.last(torch.relu(self.second(torch.relu(self.first(rows)))))


def made(**keep: int | str) -> tuple[nn.Module, QuantizedModule]:
    rng = torch.Generator().manual_seed(0)
    network = Mlp().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) / 2
    batches = [torch.randn(16, 1, 4, 4, generator=rng)]
    return network, quantize(network, batches, "min-max", weight_bits=4, keep={"conv": "float", **keep}, samples=16)


def read_back(network: nn.Module, folder: Path) -> nn.Module:
    """A float network of the same structure, filled as transformers does it: through the library alone."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    network = copy.deepcopy(network)
    config = QuantizationConfig.model_validate(json.loads((folder / CONFIG).read_text())["quantization_config"])
    apply_quantization_config(network, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(network)
    missing, unexpected = network.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    assert not unexpected and not missing
    compressor.decompress_model(network)
    return network


def test_weights_come_back_to_the_bit_and_inputs_up_to_ties(tmp_path: Path) -> None:
    network, quantized = made(second=3, last=8)
    layer = quantized.module.first
    layer.weight_quantizer.bits = torch.tensor([2, 3, 4, 5, 6] * 7 + [4, 4], dtype=torch.int8)
    layer.weight_quantizer.observe(layer.float_weight())
    layer.weight_quantizer.freeze()
    layer.thaw()
    result = export_compressed_tensors(quantized, tmp_path / "out")
    found = read_back(network, result.folder)
    for name in ("first", "second", "last"):
        assert torch.equal(found.get_submodule(name).weight, quantized.module.get_submodule(name).quantized_weight())
    assert [(site.bits, site.stored_bits) for site in result.sites] == [((2, 3, 4, 5, 6), 6), ((3,), 3), ((8,), 8)]
    assert [site.rides for site in result.sites] == [True, False, False]
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = quantized.module(x)
    error = (found(x) - expected).square().mean() / expected.square().mean()
    assert error < 1e-4  # a code of another side of a tie


def test_without_the_inputs(tmp_path: Path) -> None:
    network, quantized = made(conv=8)
    with pytest.raises(PackError, match=r"conv: .* no place for a quantized convolution"):
        export_compressed_tensors(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = export_compressed_tensors(quantized, tmp_path / "out", weights_only=True)
    assert result.floats == ("conv",) and "1 convolutions as floats" in str(result)
    found = read_back(network, result.folder)
    for name in ("conv", "first", "second", "last"):
        assert torch.equal(found.get_submodule(name).weight, quantized.module.get_submodule(name).quantized_weight())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "smoothing", torch.ones(37)), "smoothing scales of inputs"),
        (lambda layer: layer.add_branch(2), "a low-rank branch"),
        (lambda layer: layer.half(), "weights that are rounded to float16"),
        (lambda layer: layer.weight_quantizer.zero_point.data.fill_(300), "a zero point beyond 8 bits"),
        (lambda layer: layer.input_quantizer.zero_point.data.fill_(-3), "a zero point of -3 beyond the codes"),
    ],
)
def test_what_the_format_has_no_place_for(change, message: str, tmp_path: Path) -> None:
    _, quantized = made()
    change(quantized.module.second)
    quantized.module.second.thaw()
    with pytest.raises(PackError, match=f"second: .*{message}"):
        export_compressed_tensors(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    batches = [torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))]
    quantized = quantize(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), batches, "min-max", samples=8)
    with pytest.raises(PackError, match="no linear layer"):
        export_compressed_tensors(quantized, tmp_path / "out", weights_only=True)
