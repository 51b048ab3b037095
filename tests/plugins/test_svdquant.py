"""The split into branch and rest, in closed form and through a whole network."""

from __future__ import annotations

import pytest
import torch
from quantlab_ptq.tuners import GptqConfig, GptqTuner
from quantlab_svdquant.tuner import SvdQuantConfig, SvdQuantTuner, quantize_rest, split
from torch import nn
from toys import affine, make_toy, split_toy, tune_job
from tuning_jobs import assigned

from quantlab.allocation.cost import student_cost
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.allocation.student import restore
from quantlab.contracts.quant import PerChannel, PerTensor, QuantSpec
from quantlab.contracts.sections import Tune
from quantlab.quant.accounting import FloatModel
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer
from quantlab.tuning.finalize import finalize

CASES = {
    "linear": (lambda: nn.Linear(12, 16), (40, 12)),
    "conv": (lambda: nn.Conv2d(6, 16, 3, padding=1), (6, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 16, 3, groups=2), (6, 6, 7, 7)),
}


def layer_of(name: str, bits: int = 3, input_bits: int = 4) -> tuple[QuantizedLinear | QuantizedConv2d, torch.Tensor]:
    make, shape = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = to_quantized(make().requires_grad_(False))
        x = torch.randn(*shape)
    layer.smoothing = torch.linspace(0.5, 2.0, x.shape[1])
    layer.weight_quantizer = AffineQuantizer(QuantSpec(PerChannel(0)), torch.full((16,), bits), AffineConfig())
    layer.weight_quantizer.observe(layer.float_weight())
    layer.weight_quantizer.freeze()
    layer.input_quantizer = AffineQuantizer(QuantSpec(PerTensor()), input_bits, AffineConfig())
    layer.input_quantizer.observe(layer.smoothed_input(x))
    layer.input_quantizer.freeze()
    return layer, x


@pytest.mark.parametrize("name", CASES)
def test_the_split_is_what_it_says(name: str) -> None:
    layer, x = layer_of(name)
    whole = layer.float_weight().clone()
    target = layer.apply_weight(layer.smoothed_input(x), whole, layer.bias)
    without = (layer(x) - target).square().mean().item()
    errors = split(layer, x, None, rank=2, refits=100)
    torch.testing.assert_close(layer.float_weight() + layer.branch.product(), whole)
    assert (layer(x) - target).square().mean().item() == pytest.approx(min(errors), rel=1e-6)
    assert min(errors) < without
    assert errors[:-1] == sorted(errors[:-1], reverse=True), "it goes on only while the error falls"
    assert len(errors) == 101 or errors[-1] >= errors[-2]


def test_the_first_fit_is_the_singular_vectors_of_the_smoothed_weight() -> None:
    layer, x = layer_of("conv")
    whole = layer.float_weight().clone()
    split(layer, x, None, rank=3, refits=0)
    u, s, v = torch.linalg.svd(whole.flatten(1).double(), full_matrices=False)
    best = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(layer.branch.product().flatten(1).double(), best, rtol=2e-3, atol=2e-3)
    rest = whole - layer.branch.product()
    found = layer.weight_quantizer.scale.clone()
    quantize_rest(layer, whole)
    assert torch.equal(layer.weight_quantizer.scale, found)
    fresh = AffineQuantizer(QuantSpec(PerChannel(0)), torch.full((16,), 3), AffineConfig())
    fresh.observe(rest)
    fresh.freeze()
    torch.testing.assert_close(fresh.scale, found)


def test_a_low_rank_weight_goes_into_the_branch() -> None:
    layer, x = layer_of("linear")
    layer.weight.data = torch.randn(16, 2) @ torch.randn(2, 12)
    errors = split(layer, x, None, rank=2, refits=5)
    assert min(errors) < 1e-4


def tuned(toy, *, gptq: bool = False):
    student = assigned(toy, smoothing=[SmoothPass(SmoothConfig())])
    result = SvdQuantTuner(SvdQuantConfig(refits=4)).tune(tune_job(toy, student, settings=Tune(rank=2)))
    if gptq:
        GptqTuner(GptqConfig()).tune(tune_job(toy, student, settings=Tune(rank=2)))
    return student, result


def test_a_network_gets_better_and_comes_back_from_its_state() -> None:
    toy = make_toy(weight_bits=2, activation_bits=8, keep={"conv_in": 8})
    inputs = toy.calibration.step(1, slice(None))

    def error(student) -> float:
        return (student.run(inputs) - toy.calibration.outputs[1]).square().mean().item()

    student, result = tuned(toy)
    assert error(student) < error(assigned(toy, smoothing=[SmoothPass(SmoothConfig())]))
    assert all(total <= first for total, first in zip(result.history["total"], result.history["first"], strict=True))
    assert student.layer("conv_in").branch is None, "sites outside the budget are left alone"
    before = student.run(inputs)
    finalize(student.layers())
    assert torch.equal(student.run(inputs), before)
    again = restore(toy.student(), toy.plan.nominal(), affine(), student.network.state_dict())
    assert torch.equal(again.run(inputs), before)
    assert again.layer("blocks.0.conv").branch.rank == 2


def test_the_branch_is_paid_for() -> None:
    toy = make_toy(keep={"conv_in": 8, "conv_out": 8, "time": 8})
    model, bit_map = FloatModel.of(toy.task.network), toy.plan.nominal()
    plain = student_cost(assigned(toy), bit_map, model)
    branched = student_cost(tuned(toy)[0], bit_map, model)
    conv, shift = 2 * 12 * 9 + 12 * 2, 2 * 4 + 12 * 2
    assert branched.branch_bytes == 2 * 2 * (conv + shift)
    assert branched.bit_operations - plain.bit_operations == 2 * (36 * conv + shift) * 256
    assert branched.total_bytes == plain.total_bytes + branched.branch_bytes + branched.smoothing_bytes


def test_gptq_rounds_the_rest_and_keeps_the_branch() -> None:
    toy = make_toy(weight_bits=2)
    one, other = tuned(toy)[0], tuned(toy, gptq=True)[0]
    a, b = one.layer("blocks.0.conv"), other.layer("blocks.0.conv")
    assert torch.equal(a.branch.A, b.branch.A) and torch.equal(a.weight_quantizer.scale, b.weight_quantizer.scale)
    assert not torch.equal(a.weight, b.weight)
    torch.testing.assert_close(b.float_weight(), b.quantized_weight(), rtol=1e-5, atol=1e-6)


def test_the_same_again() -> None:
    toy = make_toy()
    one, other = (tuned(toy)[0].network.state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_split_sites_get_a_branch_and_new_scales_for_each_part() -> None:
    toy = split_toy(weight_bits=2)
    before = assigned(toy).layer("join").weight_quantizer
    student = assigned(toy)
    history = SvdQuantTuner(SvdQuantConfig(rank=2)).tune(tune_job(toy, student)).history
    assert sum(history["total"]) < sum(history["quantized"])
    layer = student.layer("join")
    assert layer.branch is not None
    for part, old in zip(layer.weight_quantizer.parts, before.parts, strict=True):
        assert not torch.equal(part.scale, old.scale)
