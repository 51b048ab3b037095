"""ONNX files that ONNX Runtime computes with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from toys import Attending, affine, finish, make_toy

from quantlab import export_onnx, quantize
from quantlab.api import QuantizedModule
from quantlab.contracts.sections import Activations
from quantlab.errors import PackError
from quantlab.graph.run import compile_graph
from quantlab.packing.backends.integers import InputGrid
from quantlab.packing.exports import packages
from quantlab.packing.exports.onnx import METADATA
from quantlab.packing.exports.onnx import export_onnx as write
from quantlab.packing.exports.onnx_types import OnnxInteger, onnx_grid
from quantlab.packing.exports.subject import Subject
from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.zoo.vision import build_vit

SAME_ROUNDINGS = 1e-6
"""Largest difference over the largest value of one layer on forced codes: float32 sums in another order."""
FEW_FLIPS_DB = 40
"""PSNR of a network: values on the edge of a code may fall to either side in another order of summation, and a flip
of a 7-bit code in a toy is large. A wrong row of a table, or a code off by one, gives less than 30."""


def run(path: Path, inputs: dict[str, torch.Tensor], optimized: bool = True) -> torch.Tensor:
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found - expected).double().square().mean().item()
    return math.inf if error == 0 else 20 * math.log10(expected.abs().max().item()) - 10 * math.log10(error)


class Two(nn.Module):
    """A convolution without a bias and a linear layer that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x).flatten(1), self.linear(x).flatten(1)], 1)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(3, 8), (8, 4)])
def test_every_layer_is_exact_on_forced_codes(weight_bits: int, activation_bits: int, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    network = Two().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    batches = [torch.randn(8, 4, 5, 5, generator=rng)]
    made = quantize(network, batches, "min-max", weight_bits=weight_bits, activation_bits=activation_bits, samples=8)
    for layer in (made.module.conv, made.module.linear):  # one scale, so that one input is on the codes of both
        layer.input_quantizer.scale.data.fill_(0.25)
        layer.input_quantizer.zero_point.data.fill_(3)
    result = export_onnx(made, {"x": batches[0][:3]}, tmp_path / "two.onnx")
    # Codes, and values beyond them on both sides.
    x = 0.25 * torch.randint(-20, 300, (5, 4, 5, 5), generator=rng).float()
    expected = made.module(x)
    for optimized in (False, True):
        found = run(result.path, {"x": x}, optimized)
        assert ((found - expected).abs().max() / expected.abs().max()).item() <= SAME_ROUNDINGS
    kinds = {initializer.data_type for initializer in onnx.load(result.path).graph.initializer}
    assert (onnx.TensorProto.UINT4 in kinds) == (weight_bits == 3)
    assert all(site.rides == (weight_bits == 3) for site in result.sites)


def test_tables_by_timestep_mixed_widths_branches_and_smoothing(tmp_path: Path) -> None:
    toy = make_toy(Attending(), activation_bits=7, keep={"conv_in": 8})

    def before(student) -> None:
        first, second = student.layer("blocks.0.conv"), student.layer("blocks.1.conv")
        first.weight_quantizer.bits = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 3, 2, 1, 8], dtype=torch.int8)
        second.smoothing = torch.linspace(0.5, 3, 12)
        second.add_branch(2)
        second.branch.fit(second.float_weight())
        for layer in (first, second):
            layer.weight_quantizer.observe(layer.float_weight())
            layer.weight_quantizer.freeze()

    student = finish(toy, affine(activations=Activations(per_timestep=True)), before)
    subject = Subject(student.network, compile_graph(student.graph), method="toy")
    result = write(subject, toy.task.example_inputs(3), tmp_path / "toy.onnx")
    inputs = toy.task.example_inputs(5)  # another batch, whose samples have different timesteps
    inputs["timestep"] = torch.tensor([0, 250, 451, 901, 600])
    found, expected = run(result.path, inputs), student.run(inputs)
    assert psnr(found, expected) > FEW_FLIPS_DB
    stored = {site.site: site for site in result.sites}
    assert stored["blocks.0.conv"].bits == (1, 2, 3, 4, 5, 6, 7, 8)
    assert stored["blocks.0.conv"].stored_as[0] >= OnnxInteger.UINT8 and stored["blocks.0.conv"].rides
    assert "no smaller" in str(result)


def test_a_vision_transformer(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    network = build_vit().eval()
    made = quantize(network, [torch.randn(16, 1, 8, 8, generator=rng)], "mse", weight_bits=4, samples=16)
    result = export_onnx(made, {"x": torch.randn(2, 1, 8, 8, generator=rng)}, tmp_path / "vit.onnx")
    x = torch.randn(7, 1, 8, 8, generator=rng)
    assert psnr(run(result.path, {"x": x}), made.module(x)) > FEW_FLIPS_DB
    description = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
    assert len(json.loads(description[METADATA])["sites"]) == len(result.sites) == 18


class Unet(nn.Module):
    """A UNet of diffusers that returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        ensure_torchvision_imports()
        from diffusers import UNet2DModel

        self.inner = UNet2DModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
        )  # fmt: skip

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.inner(sample, timestep, return_dict=False)[0]


def test_a_unet_of_diffusers(tmp_path: Path) -> None:
    network = Unet().eval()
    rng = torch.Generator().manual_seed(0)
    batch = {"sample": torch.randn(8, 3, 8, 8, generator=rng), "timestep": torch.arange(8) * 100}
    settings = {"activations": {"per_timestep": False}}
    made = quantize(network, [batch], "mse", weight_bits=4, samples=8, timestep_input="timestep", settings=settings)
    result = export_onnx(made, {name: value[:2] for name, value in batch.items()}, tmp_path / "unet.onnx")
    inputs = {"sample": torch.randn(3, 3, 8, 8, generator=rng), "timestep": torch.tensor([10, 500, 990])}
    assert psnr(run(result.path, inputs, optimized=False), made.module(**inputs)) > FEW_FLIPS_DB


def test_codes_and_zero_points_move_together() -> None:
    zero_point, quant_max = torch.tensor([0, 15, 7]), torch.tensor([15, 3, 7])
    assert onnx_grid(quant_max, zero_point, OnnxInteger.UINT4, "site").kind is OnnxInteger.UINT4
    assert onnx_grid(quant_max, zero_point, OnnxInteger.UINT8, "site").kind is OnnxInteger.UINT8
    below = onnx_grid(quant_max, torch.tensor([-1, 0, 0]), OnnxInteger.UINT4, "site")
    assert below.kind is OnnxInteger.UINT8  # codes 1 to 16 around 0
    assert below.shift.tolist() == [1, 0, 0] and below.zero_point.tolist() == [0, 0, 0]
    assert onnx_grid(quant_max, torch.tensor([300, 0, 0]), OnnxInteger.UINT4, "site").kind is OnnxInteger.UINT16
    with pytest.raises(PackError, match=r"first: a zero point is too far"):
        onnx_grid(quant_max, torch.tensor([70000, 0, 0]), OnnxInteger.UINT4, "first")


def small(**settings: object) -> QuantizedModule:
    rng = torch.Generator().manual_seed(0)
    return quantize(
        nn.Sequential(nn.Linear(4, 3)).eval(),
        [torch.randn(8, 4, generator=rng)],
        "min-max",
        samples=8,
        settings=settings,
    )


def test_refusals_come_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small()
    made.module[0].input_quantizer.zero_point.data.add_(0.3)
    made.module[0].input_quantizer.spec = made.module[0].input_quantizer.spec.__class__(
        made.module[0].input_quantizer.spec.granularity, round_zero_point=False
    )
    with pytest.raises(PackError, match="zero points of its input are free floats"):
        export_onnx(made, {"input": torch.zeros(2, 4)}, tmp_path / "x.onnx")
    made = small()
    made.module.to(torch.bfloat16)
    with pytest.raises(PackError, match="only a network in float32"):
        export_onnx(made, {"input": torch.zeros(2, 4)}, tmp_path / "x.onnx")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(PackError, match=r"quantlab\[export\]"):
        export_onnx(made, {"input": torch.zeros(2, 4)}, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_the_index_of_a_timestep_is_that_of_the_simulation() -> None:
    from quantlab.packing.exports.onnx_modules import OnnxTable
    from quantlab.quant.timestep import nearest_index

    stored = torch.tensor([1, 301, 601, 901])
    grid = InputGrid(torch.rand(4) + 0.1, torch.arange(4, dtype=torch.int32), 255, stored)
    timestep = torch.tensor([0, 1, 150, 151, 152, 451, 600, 901, 5000])
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32))
    index = nearest_index(stored, timestep)
    scale, zero_point = grid.scale[index, None], grid.zero_point[index, None].float()
    expected = (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale
    assert torch.equal(OnnxTable(grid, stored)(x, timestep), expected)
