"""Scores on toys: each against a computation of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import affine, make_toy, silent

from quantlab.allocation.assign import AssignMethod, smoothed_records
from quantlab.allocation.scores import ScoreMeter
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.quant import Observer
from quantlab.contracts.scores import Operand, OutputFamily, Score, ScoreRequest
from quantlab.contracts.sections import Activations, InputsFrom
from quantlab.errors import RecipeError
from quantlab.quant.functional import fake_quantize, per_channel, search_scale

SITES = ["blocks.0.conv", "blocks.0.shift", "blocks.1.conv", "blocks.1.shift"]
KEEP = {"conv_in": 8, "conv_out": 8, "time": 8}


class Meter:
    """A toy and its meter; smoothing may be on."""

    def __init__(self, network: nn.Module | None = None, *, smooth: bool = False, keep=KEEP) -> None:
        self.toy = make_toy(network, keep=keep)
        smoothing = [SmoothPass(SmoothConfig())] if smooth else []
        choices = affine(activations=Activations())
        method = AssignMethod(smoothing, [], choices, InputsFrom.TEACHER)
        self.student = self.toy.student()
        self.batch = calibration_batch(self.toy.task, self.toy.calibration, 8)
        self.records = smoothed_records(self.student, method, self.batch)
        self.meter = ScoreMeter(self.student, self.records, choices, self.batch)

    def __call__(self, score: Score, *widths: int, **options) -> dict[str, torch.Tensor]:
        request = ScoreRequest(score, widths, **{"rows": 32, **options})
        return self.meter.measure(request, torch.Generator().manual_seed(0), silent)

    def quantized(self, site: str, width: int) -> torch.Tensor:
        weight = self.records[site].smoothed_weight()
        scale, zero = search_scale(weight.flatten(1), torch.full((len(weight),), width), Observer.MSE)
        dims = weight.dim()
        return fake_quantize(weight, per_channel(scale, dims), per_channel(zero, dims), 2**width - 1)


@pytest.fixture(scope="module")
def plain() -> Meter:
    return Meter()


def test_weight_error_is_that_of_the_quantizer(plain: Meter) -> None:
    found = plain(Score.WEIGHT_MSE, 2, 4)
    assert list(found) == SITES
    for site, values in found.items():
        weight = plain.records[site].weight
        expected = [(plain.quantized(site, width) - weight).square().mean().item() for width in (2, 4)]
        assert values.tolist() == pytest.approx(expected)


def test_network_scores_quantize_one_site_of_the_float_network(plain: Meter) -> None:
    network, inputs = plain.toy.task.network, plain.batch.inputs
    exact = network(**inputs)
    parameters = dict(network.named_parameters())
    decibels, divergences = plain(Score.NETWORK_SQNR, 2), plain(Score.OUTPUT_KL, 2)
    for site in SITES:
        changed = parameters | {f"{site}.weight": plain.quantized(site, 2)}
        noise = (torch.func.functional_call(network, changed, (), inputs) - exact).double()
        ratio = 10 * torch.log10(noise.square().sum() / exact.double().square().sum())
        assert decibels[site].item() == pytest.approx(ratio.item(), abs=1e-3)
        assert divergences[site].item() == pytest.approx((noise.square().sum() / 2 / len(exact)).item(), rel=1e-3)


def test_site_outputs(plain: Meter) -> None:
    record = plain.records["blocks.1.shift"]
    (x,) = record.inputs
    exact, noisy = record.compute(x, record.weight), record.compute(x, plain.quantized("blocks.1.shift", 3))
    error = (noisy - exact).square()
    assert plain(Score.OUTPUT_MSE, 3)["blocks.1.shift"].item() == pytest.approx(error.mean().item())
    ratio = 10 * torch.log10(error.sum() / exact.square().sum())
    assert plain(Score.OUTPUT_SQNR, 3)["blocks.1.shift"].item() == pytest.approx(ratio.item(), abs=1e-4)


def test_derivatives_see_what_changes_the_output(plain: Meter) -> None:
    """To second order the divergence of one site is d^T H d / 2 with H the information that both scores estimate."""
    divergence = plain(Score.OUTPUT_KL, 6)
    for found in (plain(Score.FISHER, 6), plain(Score.HESSIAN_TRACE, 6, probes=8)):
        factors = [found[site].item() / divergence[site].item() for site in SITES]
        assert all(0.1 < factor < 10 for factor in factors), factors


def test_the_hessian_trace_times_the_error(plain: Meter) -> None:
    """Independently: the trace of J^T J over two rows, J by autograd, one output after the other."""
    network = plain.toy.task.network
    inputs = {name: value[[0, -1]] for name, value in plain.batch.inputs.items()}
    weight = network.blocks[1].shift.weight.detach().clone().requires_grad_()
    output = torch.func.functional_call(network, {"blocks.1.shift.weight": weight}, (), inputs)
    gradients = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in output.flatten()]
    trace = sum(gradient.square().sum().item() for gradient in gradients) / len(output)
    error = (plain.quantized("blocks.1.shift", 2) - network.blocks[1].shift.weight).square().sum().item()
    found = plain(Score.HESSIAN_TRACE, 2, probes=64, rows=2)["blocks.1.shift"].item()
    assert found == pytest.approx(trace / weight.numel() * error, rel=0.1)


@pytest.mark.parametrize("score", list(Score))
def test_more_bits_cost_less(score: Score) -> None:
    for smooth in (False, True):
        for site, values in Meter(smooth=smooth)(score, 2, 4, 8).items():
            assert values.dtype == torch.float64 and (values.diff() < 0).all(), site


def test_inputs_are_scored_alone(plain: Meter) -> None:
    for score in (Score.WEIGHT_MSE, Score.OUTPUT_MSE, Score.OUTPUT_SQNR, Score.NETWORK_SQNR, Score.OUTPUT_KL):
        for values in plain(score, 2, 4, 8, operand=Operand.INPUT).values():
            assert (values.diff() < 0).all()
    with pytest.raises(RecipeError, match="derivatives with respect to weights"):
        plain(Score.FISHER, 2, operand=Operand.INPUT)


def test_measuring_leaves_the_student_as_it_was(plain: Meter) -> None:
    before = plain.student.run(plain.batch.inputs)
    for score in Score:
        plain(score, 2)
    plain(Score.OUTPUT_KL, 2, operand=Operand.INPUT)
    assert torch.equal(plain.student.run(plain.batch.inputs), before)


def test_the_same_seed_gives_the_same_scores(plain: Meter) -> None:
    for score in (Score.FISHER, Score.HESSIAN_TRACE):
        one, other = plain(score, 2), plain(score, 2)
        assert all(torch.equal(one[site], other[site]) for site in SITES)


class Attentive(nn.Module):
    """A fused attention, whose own kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(6, 6) for _ in range(5))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.embed(sample[:, 0] + timestep[:, None, None] / 1000))
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]))


def test_attention_has_a_hessian() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = Meter(Attentive(), keep={})(Score.HESSIAN_TRACE, 2, output=OutputFamily.CATEGORICAL)
    assert all(value > 0 for value in found.values()) and len(found) == 5
