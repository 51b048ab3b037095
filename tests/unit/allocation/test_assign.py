"""Assignment: what sites see, what policies may do, degenerate layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantlab_mpqdm.omq import KurtosisConfig, KurtosisPolicy
from torch import nn
from toys import ToyDenoiser, affine, make_toy, silent

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.cost import planned_cost, student_cost
from quantlab.allocation.plan import make_plan, mean_weight_bits
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.allocation.student import add_adapters, install_quantizers, restore
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.allocation import FLOAT_BITS, AllocationProblem, BitMap, BitPolicy
from quantlab.contracts.config import Strict
from quantlab.contracts.quant import Observer
from quantlab.contracts.sections import Activations, Budget, InputsFrom, Pack, ScaleType, Weights
from quantlab.contracts.tuning import AdapterSpec
from quantlab.errors import NonFiniteError, PluginError, QuantlabError, RecipeError
from quantlab.quant.accounting import FloatModel
from quantlab.tuning.finalize import finalize

MPQDM = AssignMethod(
    [SmoothPass(SmoothConfig())],
    [UniformPolicy(UniformPolicy.Config()), KurtosisPolicy(KurtosisConfig())],
    affine(),
    InputsFrom.TEACHER,
)


def assigned(toy, method=MPQDM):
    student = toy.student()
    batch = calibration_batch(toy.task, toy.calibration, 8)
    return student, assign(student, method, batch, torch.Generator().manual_seed(0), silent)


@pytest.mark.parametrize("inputs_from", list(InputsFrom))
def test_eight_bits_are_close_to_float(inputs_from: InputsFrom) -> None:
    toy = make_toy(weight_bits=7, activation_bits=8, keep={"conv_in": 8, "conv_out": 8, "time": 8})
    method = AssignMethod(MPQDM.smoothing, MPQDM.policies, MPQDM.choices, inputs_from)
    student, bit_map = assigned(toy, method)
    inputs = toy.task.example_inputs(5)
    exact = toy.task.network(**inputs)
    assert (student.run(inputs) - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert mean_weight_bits(bit_map, toy.plan.budgeted) == 7


def test_first_site_sees_the_same_either_way_and_later_ones_do_not() -> None:
    toy = make_toy(weight_bits=2, activation_bits=4)
    plain = [UniformPolicy(UniformPolicy.Config())]
    scales = []
    for inputs_from in InputsFrom:
        student, _ = assigned(toy, AssignMethod([], plain, affine(), inputs_from))
        scales.append({name: layer.input_quantizer.scale for name, layer in student.layers().items()})
    assert torch.equal(scales[0]["conv_in"], scales[1]["conv_in"])
    assert not torch.equal(scales[0]["conv_out"], scales[1]["conv_out"])


def test_kept_sites_are_static_and_unsmoothed() -> None:
    student, bit_map = assigned(make_toy(keep={"conv_in": 8, "conv_out": FLOAT_BITS}))
    kept = student.layer("conv_in")
    assert kept.smoothing is None and not kept.input_quantizer.spec.per_timestep
    assert bit_map.weight_bits["conv_in"].tolist() == [8] * 12
    assert type(student.network.conv_out) is nn.Conv2d
    assert "conv_in" not in student.trained_layers()


def test_a_restored_student_computes_bitwise_the_same() -> None:
    toy = make_toy()
    student, bit_map = assigned(toy)
    again = restore(toy.student(), bit_map, affine(), student.network.state_dict())
    inputs = toy.task.example_inputs(4)
    assert torch.equal(again.run(inputs), student.run(inputs))


def test_everything_lies_where_the_network_does() -> None:
    """The meta device stands for any that is not the CPU."""
    toy = make_toy()
    state = {name: value.to("meta") for name, value in assigned(toy)[0].network.state_dict().items()}
    toy.task.network.to("meta")
    restored = restore(toy.student(), toy.plan.nominal(), affine(), state)
    values = [*restored.network.named_parameters(), *restored.network.named_buffers()]
    assert {value.device.type for _, value in values} == {"meta"}
    installed = toy.student()
    for entry in toy.plan.quantized:
        install_quantizers(installed.layer(entry.site.name), entry, toy.plan.nominal(), affine())
    add_adapters(installed, AdapterSpec(2), 0)
    assert {value.device.type for value in installed.network.state_dict().values()} == {"meta"}


def test_teacher_is_not_touched() -> None:
    toy = make_toy()
    before = {name: value.clone() for name, value in toy.task.network.state_dict().items()}
    assigned(toy)
    assert all(torch.equal(before[name], value) for name, value in toy.task.network.state_dict().items())


def test_size_says_what_the_bits_say() -> None:
    toy = make_toy(weight_bits=2)
    student, bit_map = assigned(toy)
    values = sum(p.numel() for p in toy.task.network.parameters())
    cost = student_cost(student, bit_map, FloatModel.of(toy.task.network))
    weights = sum(site.weight_count for site in toy.sites if site.weight_shape)
    assert cost.float_bytes == 4 * (values - weights)
    assert weights * 2 / 8 <= cost.weight_bytes <= weights * 2 / 8 + 3 * len(toy.sites)


def test_a_dry_run_tells_the_size_of_a_method_that_does_not_mix() -> None:
    toy = make_toy(weight_bits=3, activation_bits=4, keep={"conv_in": 8, "time": FLOAT_BITS})
    # Ranges that hold 0 have zero points among the codes, one byte each, as a dry run takes them to be.
    choices = affine(Weights(observer=Observer.MIN_MAX), Activations(observer=Observer.MIN_MAX, per_timestep=True))
    policies = [UniformPolicy(UniformPolicy.Config())]
    student, bit_map = assigned(toy, replace(MPQDM, policies=policies, choices=choices))
    float_model = FloatModel.of(toy.task.network)
    found = student_cost(student, bit_map, float_model)
    assert planned_cost(toy.plan, float_model, timesteps=4, smoothed=True) == found
    narrow = Pack(scales=ScaleType.FLOAT16)
    planned = planned_cost(toy.plan, float_model, timesteps=4, smoothed=True, scale_bytes=narrow.scales.itemsize)
    assert planned == student_cost(student, bit_map, float_model, stored=narrow) != found


class Pixelwise(ToyDenoiser):
    """One layer sees every pixel as a row of its own: its dimension 0 is 36 times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        embedding = torch.nn.functional.silu(self.time(timestep.float()[:, None] / 1000))
        x = self.blocks[0](self.conv_in(sample), embedding)
        batch, channels, height, width = x.shape
        rows = self.mix(x.permute(0, 2, 3, 1).reshape(-1, channels))
        return self.conv_out(rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2))


def test_rows_that_are_no_samples_get_a_static_scale() -> None:
    toy = make_toy(Pixelwise())
    student, _ = assigned(toy)
    assert student.layer("blocks.0.conv").input_quantizer.spec.per_timestep
    assert not student.layer("mix").input_quantizer.spec.per_timestep
    for batch in (1, 5):
        assert torch.isfinite(student.run(toy.task.example_inputs(batch))).all()


class Tied(ToyDenoiser):
    """Two blocks with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].conv.weight = self.blocks[0].conv.weight


def test_layers_that_share_a_weight_are_tuned_apart() -> None:
    toy = make_toy(Tied())
    student, bit_map = assigned(toy, replace(MPQDM, policies=[UniformPolicy(UniformPolicy.Config())]))
    add_adapters(student, AdapterSpec(2), 0)
    first, second = student.layer("blocks.0.conv"), student.layer("blocks.1.conv")
    start = first.weight.clone()
    with torch.no_grad():
        first.adapter.B.fill_(0.1)
    finalize(student.layers())
    assert not torch.equal(first.weight, start)
    assert torch.equal(second.weight, start)
    restored = restore(toy.student(), bit_map, affine(), student.network.state_dict())
    inputs = toy.task.example_inputs(4)
    assert torch.equal(restored.run(inputs), student.run(inputs))
    cost = student_cost(student, bit_map, FloatModel.of(toy.task.network))
    own = sum(value.numel() for value in toy.task.network.parameters())
    assert cost.float_model_bytes == 4 * own
    quantized = sum(site.weight_count for site in toy.sites) - first.weight.numel()
    assert cost.float_bytes == 4 * (own - quantized)


class Degenerate(ToyDenoiser):
    """Dead inputs, dead and constant output channels, equal kurtosis."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.conv_in.weight[3].zero_()
            self.conv_in.bias[3] = 0.0
            first, second = self.blocks[0].conv, self.blocks[1].conv
            first.weight[:, 3].zero_()
            first.weight[0].zero_()
            first.weight[1].fill_(0.25)
            second.weight.copy_(second.weight[:1].expand_as(second.weight))


@pytest.mark.parametrize("inputs_from", list(InputsFrom))
@pytest.mark.parametrize("bits", [2, 3])
def test_degenerate_channels_give_finite_results(inputs_from: InputsFrom, bits: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        toy = make_toy(Degenerate(), weight_bits=bits, activation_bits=4)
    student, bit_map = assigned(toy, AssignMethod(MPQDM.smoothing, MPQDM.policies, affine(), inputs_from))
    assert torch.isfinite(student.run(toy.task.example_inputs(3))).all()
    assert mean_weight_bits(bit_map, toy.plan.budgeted) == bits
    weight = student.layer("blocks.0.conv").quantized_weight()
    assert (weight[0] == 0).all(), "an all-zero channel stays zero"


class Constant(BitPolicy):
    """Returns what the test says."""

    name = "constant"
    Config = Strict

    def __init__(self, make) -> None:
        self.make = make

    def allocate(self, problem: AllocationProblem) -> BitMap:
        return self.make(problem.given)


def changed(given: BitMap, site: str, bits: torch.Tensor) -> BitMap:
    return BitMap({**given.weight_bits, site: bits}, given.activation_bits)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g: changed(g, "blocks.0.conv", torch.full((12,), 8)), QuantlabError, "constant: .*spent more"),
        (lambda g: changed(g, "blocks.0.conv", torch.full((3,), 2)), PluginError, "every output channel"),
        (lambda g: changed(g, "blocks.0.conv", torch.zeros(12)), PluginError, "1..8"),
        (lambda g: changed(g, "conv_in", torch.full((12,), 2)), PluginError, "not asked about"),
    ],
)
def test_a_policy_is_checked(make, error: type[Exception], message: str) -> None:
    method = AssignMethod([], [Constant(make)], affine(), InputsFrom.TEACHER)
    with pytest.raises(error, match=message):
        assigned(make_toy(weight_bits=2, keep={"conv_in": 8}), method)


def test_non_finite_activations_name_their_site() -> None:
    toy = make_toy()
    toy.task.network.blocks[1].conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="conv_out"):
        assigned(toy)


def test_everything_kept_is_an_error() -> None:
    toy = make_toy()
    with pytest.raises(RecipeError, match="no site is left"):
        make_plan(toy.sites, {site.name: 8 for site in toy.sites}, Budget(weight_bits=2, activation_bits=4))


def test_more_samples_than_recorded_is_an_error() -> None:
    toy = make_toy()
    with pytest.raises(QuantlabError, match="more calibration samples"):
        calibration_batch(toy.task, toy.calibration, 9)
