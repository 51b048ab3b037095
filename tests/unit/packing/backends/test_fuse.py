"""Fused quantization gives the codes, and the outputs, of the layers one by one."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantlab
from quantlab.graph.bind import bound_graph
from quantlab.graph.run import runner
from quantlab.packing.backends.activation import ActivationKernel, activation_kernel, silu_to_codes, to_codes
from quantlab.packing.backends.dispatch import Backend, dispatch_text, lower, lower_graph
from quantlab.packing.backends.fuse import group_norm_as_it_lies
from quantlab.packing.backends.integers import InputGrid
from quantlab.packing.backends.layers import Encoder
from quantlab.packing.backends.onednn import missing_operators

BACKEND = Backend.REFERENCE if missing_operators() else Backend.ONEDNN
PLAIN = ActivationKernel({})
PARAMETERS = torch.tensor(0.037), torch.tensor(11.0), torch.tensor(15.0)


class Residual(nn.Module):
    """What the blocks of a denoiser do around their convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 8, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(2, 8) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(4, 8)
        self.act, self.dropout = nn.SiLU(), nn.Dropout(0.5)
        self.down, self.up = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.leave = nn.Linear(8, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(sample)
        steps = (timestep[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], device=sample.device)).sin()
        y = self.conv1(self.act(self.norm1(x)))
        y = y + self.time(F.silu(steps))[:, :, None, None]
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        x = (x + y) / 1.0
        x = self.down(F.pad(x, (0, 1, 0, 1)))
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        z = self.norm3(x.flatten(2)).transpose(1, 2)
        z = F.scaled_dot_product_attention(self.q(z), self.k(z), self.v(z))
        return self.leave(z)


def batch(count: int, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"sample": torch.randn(count, 2, 8, 8, generator=rng), "timestep": torch.arange(count) * 100 + 1}


@pytest.fixture(scope="module", params=[False, True], ids=["static", "per timestep"])
def quantized(request: pytest.FixtureRequest) -> quantlab.QuantizedModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Residual().eval()
    settings = {"activations": {"per_timestep": request.param}}
    return quantlab.quantize(network, [batch(6)], "min-max", samples=6, settings=settings)


@torch.no_grad()
def test_every_bit_is_as_without_fusion(quantized: quantlab.QuantizedModule) -> None:
    captured, _ = bound_graph(quantized.module)
    apart = lower(quantized.module, BACKEND, PLAIN)
    fused, graph = lower_graph(quantized.module, captured, BACKEND, PLAIN)
    assert all(entry.kernel != "simulated" for entry in fused.dispatch)
    # Contiguous activations: there the norm of three dimensions has but one layout.
    for inputs in (batch(6), batch(3, seed=1)):
        expected = runner(apart.network, captured)(inputs)
        assert torch.equal(runner(fused.network, graph)(inputs), expected)


def test_what_is_fused_is_told(quantized: quantlab.QuantizedModule) -> None:
    captured, _ = bound_graph(quantized.module)
    fused, graph = lower_graph(quantized.module, captured, BACKEND, PLAIN)
    told = {entry.site: entry.codes for entry in fused.dispatch}
    assert told["conv1"] == told["conv2"] == told["time"] == "silu and quantization in one pass"
    assert told["up"] == "quantized before interpolate"
    assert told["k"] == told["v"] == "quantized before transpose; the codes of q"
    assert "the codes of q" in dispatch_text(fused.dispatch)
    per_timestep = any(table is not None for table in (module_timesteps(quantized)))
    assert told["down"] == ("" if per_timestep else "quantized before pad")
    targets = [str(node.target) for node in graph.graph.nodes]
    # The codes of q, k and v are made once, and tables looked up once.
    assert sum("encoders" in target for target in targets) == len(fused.dispatch) - 2
    assert sum("lookups" in target for target in targets) == int(per_timestep)
    assert targets.count("add_") == 2 and "div" not in targets and "silu" not in " ".join(targets)


def module_timesteps(quantized: quantlab.QuantizedModule) -> list[Tensor | None]:
    return [quantized.module.get_submodule(name).input_quantizer.qparams().timesteps for name in ("down", "up")]


@torch.no_grad()
def test_a_module_that_is_executed_runs_the_fused_graph(quantized: quantlab.QuantizedModule) -> None:
    integer = quantlab.execute(quantized, BACKEND, compiled=False)
    captured, _ = bound_graph(quantized.module)
    expected = runner(lower(quantized.module, BACKEND, PLAIN).network, captured)(batch(4))
    assert torch.equal(integer.module(**batch(4)), expected)
    assert {entry.site: entry.codes for entry in integer.dispatch}["up"] == "quantized before interpolate"


def test_in_place_silu_stays(quantized: quantlab.QuantizedModule) -> None:
    captured, _ = bound_graph(quantized.module)
    quantized.module.act.inplace = True
    try:
        fused, _ = lower_graph(quantized.module, captured, BACKEND, PLAIN)
    finally:
        quantized.module.act.inplace = False
    assert {entry.site: entry.codes for entry in fused.dispatch}["conv1"] == ""


@pytest.mark.parametrize("plain", [to_codes, silu_to_codes])
def test_one_pass_gives_the_codes_of_several(plain) -> None:
    """With a compiler or without, ties, overflow and every layout included."""
    rng = torch.Generator().manual_seed(0)
    ties = torch.arange(-64, 64).repeat(512) / 4 * PARAMETERS[0]
    x = torch.cat([ties, torch.randn(1 << 16, generator=rng), torch.tensor([1e30, -1e30, torch.inf, -torch.inf])])
    x = x[: len(x) // 4 * 4].view(2, 2, -1)
    silu = plain is silu_to_codes
    expected = torch.round((F.silu(x) if silu else x) / PARAMETERS[0]).add(11).clamp(0, 15)
    known = ~expected.isnan()  # the SiLU of minus infinity is none
    for kernel in (PLAIN, activation_kernel()):
        for values in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            codes = kernel(values, *PARAMETERS, silu=silu)
            assert codes.dtype == torch.uint8 and codes.stride() == values.stride()
            assert torch.equal(codes[known].float(), expected[known])


def test_an_encoder_with_several_rows_and_smoothing() -> None:
    rng = torch.Generator().manual_seed(0)
    x, reciprocal = torch.randn(3, 5, 2, 2, generator=rng), torch.rand(5, generator=rng) + 0.5
    grid = InputGrid(torch.tensor([0.01, 0.02]), torch.tensor([100, 128], dtype=torch.int32), 255, torch.tensor([1, 5]))
    rows = grid.rows(torch.tensor([5, 1, 4]))
    codes = Encoder(grid, PLAIN, reciprocal, 1)(x, rows, silu=True)
    for sample, row in zip(range(3), (1, 0, 1), strict=True):
        values = F.silu(x[sample]) * reciprocal.view(-1, 1, 1)
        expected = torch.round(values / grid.scale[row]).add(grid.zero_point[row]).clamp(0, 255)
        assert torch.equal(codes[sample].float(), expected)


def test_the_norm_as_it_lies() -> None:
    rng = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(2, 6).requires_grad_(False)
    x = torch.randn(3, 10, 6, generator=rng).transpose(1, 2)
    found = group_norm_as_it_lies(norm, x)
    assert found.stride() == x.stride()
    assert torch.allclose(found, norm.double()(x.double()).float(), atol=2e-6)
