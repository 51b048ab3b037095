"""Whole networks in integers: what is called, what is held, and how far they are from their simulation."""

import copy
import math

import pytest
import torch
from torch import nn
from toys import ToyDenoiser

import quantlab
from quantlab.contracts.sections import Model, Sampling
from quantlab.models.builtin import BuiltinConfig, BuiltinSource
from quantlab.packing.backends.onednn import missing_operators
from quantlab.report.console import make_console

BACKENDS = ["reference", "cuda-int8"] if missing_operators() else ["reference", "cuda-int8", "onednn"]
QUIET = make_console(quiet=True)


def batches(network_inputs: int, timesteps: int) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    sample = torch.randn(timesteps, 1, network_inputs, network_inputs, generator=rng)
    return [{"sample": sample, "timestep": torch.arange(timesteps) * 100 + 1}]


@pytest.fixture(scope="module")
def toy() -> quantlab.QuantizedModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ToyDenoiser().eval()
    settings = {"activations": {"per_timestep": True}}
    return quantlab.quantize(network, batches(6, 8), "mse", weight_bits=3, samples=8, settings=settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_in_integers_is_called_as_before(toy: quantlab.QuantizedModule, backend: str) -> None:
    (inputs,) = batches(6, 8)
    integer = quantlab.execute(toy, backend, compiled=False, console=QUIET)
    assert all(entry.kernel != "simulated" for entry in integer.dispatch)
    assert len(integer.dispatch) == 7
    with torch.no_grad():
        expected, found = toy.module(**inputs), integer.module(**inputs)
    # A value may fall on the other side of a tie in a later layer; few do.
    assert (found - expected).abs().median() <= 1e-5 * expected.abs().max()
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_the_quantized_module_is_left_alone(toy: quantlab.QuantizedModule) -> None:
    before = copy.deepcopy(toy.module.state_dict())
    quantlab.execute(toy, BACKENDS[-1], compiled=False, console=QUIET)
    after = toy.module.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_reasons_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    quantized = quantlab.quantize(network, [rows], "mse", samples=16, settings={"weights": {"round_zero_point": False}})
    quantized.module.get_submodule("2").weight_quantizer.zero_point.add_(0.5)
    quantlab.execute(quantized, BACKENDS[-1], compiled=False)
    told = capfd.readouterr()
    assert "the zero points of its weight are free floats" in told.err + told.out


class Prediction(nn.Module):
    """A denoiser that returns its tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample, timestep, class_labels):
        return self.network(sample, timestep, class_labels, return_dict=False)[0]


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_the_digits_model_agrees_with_its_simulation(backend: str) -> None:
    """PSNR of one prediction to the simulated one, at 4-bit weights and 8-bit activations."""
    source = BuiltinSource(BuiltinConfig())
    task = source.load(Model(name="digits"), Sampling(steps=20), torch.device("cpu"), torch.float32)
    inputs = task.example_inputs(8)
    quantized = quantlab.quantize(Prediction(task.network).eval(), [inputs], "min-max", samples=8)
    integer = quantlab.execute(quantized, backend, compiled=False, console=QUIET)
    with torch.no_grad():
        expected, found = (each(**inputs) for each in (quantized.module, integer.module))
    psnr = 10 * math.log10((expected.max() - expected.min()).item() ** 2 / (found - expected).square().mean().item())
    # Flips of single codes; a wrong scale or zero point anywhere gives less than 30 dB.
    assert psnr > 40
