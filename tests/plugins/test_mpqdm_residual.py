"""MPQ-DMv2's residual quantizer: affine codes and binary corrections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_mpqdm.corrections import base_quantize, fit_corrections
from quantlab_mpqdm.residual import ResidualConfig, ResidualQuantizer
from torch import Tensor
from toys import Toy, make_toy, silent

from quantlab import Observer, PerChannel, PerTensor, QuantSpec, RecipeError, fake_quantize, search_scale
from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.cost import student_cost
from quantlab.allocation.student import QuantizerChoice, QuantizerChoices, Student, restore
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.sections import Activations, Choice, InputsFrom, Weights
from quantlab.quant.accounting import FloatModel, packed_bytes
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

SPEC = QuantSpec(PerChannel(0), round_zero_point=False)


def weights(seed: int = 0, channels: int = 6) -> Tensor:
    return torch.randn(channels, 5, 3, 3, generator=torch.Generator().manual_seed(seed))


def frozen(weight: Tensor, bits: list[int], spec: QuantSpec = SPEC, **options: object) -> ResidualQuantizer:
    quantizer = ResidualQuantizer.from_spec(spec, torch.tensor(bits, dtype=torch.int8), ResidualConfig(**options))  # type: ignore[arg-type]
    quantizer.observe(weight)
    quantizer.freeze()
    return quantizer


def errors(weight: Tensor, values: Tensor) -> Tensor:
    return (weight - values).square().flatten(1).sum(1)


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_mean_magnitude_is_the_best_scale_of_a_sign(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    (alpha, _), values = fit_corrections(rows, torch.zeros_like(rows), torch.tensor([1, 1, 1]))
    left = (rows - values).square().sum(1)
    torch.testing.assert_close(left, rows.square().sum(1) - 20 * alpha.square())
    for factor in (0.9, 1.1):
        worse = (rows - factor * alpha[:, None] * rows.sign()).square().sum(1)
        assert (worse > left).all()


def test_rows_get_the_planes_they_are_due() -> None:
    rows = torch.tensor([[4.0, -2.0], [4.0, -2.0], [4.0, -2.0]])
    scales, values = fit_corrections(rows, torch.zeros_like(rows), torch.tensor([0, 1, 2]))
    assert scales.tolist() == [[0, 3, 3], [0, 0, 1]]
    assert values.tolist() == [[0, 0], [3, -3], [4, -2]]


def test_every_class_of_channels_is_what_the_figure_draws() -> None:
    """Without the joint search: Q_{n-1}, then one sign, then another, computed by hand."""
    weight, bits = weights(), [1, 1, 2, 2, 3, 3]
    quantizer = frozen(weight, bits, joint=False)
    rows = weight.flatten(1)
    scale, zero_point = search_scale(rows, torch.ones(6, dtype=torch.int8), Observer.MSE)
    expected = fake_quantize(rows, scale[:, None], zero_point[:, None], 1)
    for plane in (1, 2):
        left = rows - expected
        due = torch.tensor(bits)[:, None] > plane
        expected = torch.where(due, expected + left.abs().mean(1, keepdim=True) * left.sign(), expected)
    torch.testing.assert_close(quantizer(weight), expected.view_as(weight))
    assert quantizer.planes.tolist() == [0, 0, 1, 1, 2, 2]


@given(st.integers(0, 1000), st.booleans(), st.booleans())
@settings(max_examples=6, deadline=None)
def test_corrections_never_raise_the_error(seed: int, joint: bool, rounded: bool) -> None:
    weight, bits = weights(seed), [1, 2, 2, 2, 3, 3]
    spec = QuantSpec(PerChannel(0), round_zero_point=rounded)
    scale, zero_point = search_scale(weight.flatten(1), torch.ones(6, dtype=torch.int8), Observer.MSE)
    base = fake_quantize(weight.flatten(1), scale[:, None], zero_point[:, None], 1).view_as(weight)
    found = errors(weight, frozen(weight, bits, spec, joint=joint)(weight))
    assert (found <= errors(weight, base) * (1 + 1e-5)).all()
    greedy = errors(weight, frozen(weight, bits, spec, joint=False)(weight))
    assert (found <= greedy * (1 + 1e-5)).all(), "the joint search starts from the base's own"


def affine(weight: Tensor, bits: int) -> Tensor:
    quantizer = AffineQuantizer.from_spec(SPEC, torch.full((len(weight),), bits, dtype=torch.int8), AffineConfig())
    quantizer.observe(weight)
    quantizer.freeze()
    return quantizer(weight)


def test_two_bits_with_a_real_zero_point_beat_affine_ones() -> None:
    weight = weights(channels=64)
    plain = errors(weight, affine(weight, 2)).sum()
    assert errors(weight, frozen(weight, [2] * 64)(weight)).sum() < 0.9 * plain
    integer = frozen(weight, [2] * 64, QuantSpec(PerChannel(0)))
    assert errors(weight, integer(weight)).sum() > plain, "a base of one bit cannot be centred on 0"


def test_a_free_zero_point_after_the_rounding_has_a_level_too_many() -> None:
    """Why ``base_quantize`` does not take the engine's way: two bits with five levels."""
    x = torch.linspace(-5, 5, 1001)[None]
    after = fake_quantize(x, torch.tensor([[1.0]]), torch.tensor([[1.5]]), 3)
    inside = base_quantize(x, torch.tensor([1.0]), torch.tensor([1.5]), torch.tensor([2]), round_zero_point=False)
    assert (len(after.unique()), len(inside.unique())) == (5, 4)


@pytest.mark.parametrize("bits", [[8] * 6, [5, 6, 6, 6, 6, 7], [1] * 6])
def test_wide_and_one_bit_layers_are_plain_affine(bits: list[int]) -> None:
    weight = weights()
    plain = AffineQuantizer.from_spec(SPEC, torch.tensor(bits, dtype=torch.int8), AffineConfig())
    plain.observe(weight)
    plain.freeze()
    quantizer = frozen(weight, bits, QuantSpec(PerChannel(0)))
    assert torch.equal(quantizer(weight), plain(weight)) and quantizer.planes.sum() == 0
    torch.testing.assert_close(frozen(weight, bits)(weight), plain(weight))


def test_levels_of_a_channel_do_not_exceed_its_bits() -> None:
    values = frozen(weights(), [1, 2, 2, 2, 3, 3])(weights())
    # To six digits: a level is a sum of floats in one of two orders.
    levels = [len((channel * 1e6).round().unique()) for channel in values.flatten(1)]
    assert all(count <= most for count, most in zip(levels, [2, 4, 4, 4, 8, 8], strict=True)), levels


def test_a_base_of_one_bit_may_be_centred() -> None:
    x = torch.tensor([[-3.0, -0.2, 0.1, 0.9, 4.0]])
    values = base_quantize(x, torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1]), round_zero_point=False)
    assert values.tolist() == [[-1, -1, 1, 1, 1]]


def test_gradients_of_the_base_are_those_of_its_formula() -> None:
    """For the scale (q - z) - x / s inside the range and q - z outside; for the zero point 0 and -s."""
    x = torch.tensor([[-3.0, -0.2, 0.1, 0.9, 4.0]], requires_grad=True)
    scale, zero_point = torch.tensor([1.0], requires_grad=True), torch.tensor([0.7], requires_grad=True)
    base_quantize(x, scale, zero_point, torch.tensor([1]), round_zero_point=False).sum().backward()
    # x + z = -2.3, 0.5, 0.8, 1.6, 4.7: codes 0 (clipped), 0, 1, 1 (clipped), 1 (clipped).
    assert x.grad.tolist() == [[0, 1, 1, 0, 0]]
    expected = (0 - 0.7) + (0 - 0.7 + 0.2) + (1 - 0.7 - 0.1) + 2 * (1 - 0.7)
    assert scale.grad.item() == pytest.approx(expected, rel=1e-5)
    assert zero_point.grad.item() == pytest.approx(-3.0, rel=1e-5)


def test_offsets_of_two_bits_leave_the_rest_to_the_base() -> None:
    assert frozen(weights(), [1, 3, 3, 3, 3, 5]).base_bits.tolist() == [1, 1, 1, 1, 1, 3]


def test_constant_and_dead_channels_are_exact() -> None:
    weight = weights()
    weight[0], weight[1] = 0.0, -0.7
    quantizer = frozen(weight, [2] * 6)
    torch.testing.assert_close(quantizer(weight)[:2], weight[:2])


def test_gradients_are_the_bases_and_the_signs() -> None:
    weight = weights().requires_grad_()
    quantizer = frozen(weight.detach(), [1, 1, 2, 2, 3, 3]).requires_grad_(True)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (quantizer(weight) * upstream).sum().backward()
    base_weight = weight.detach().requires_grad_()
    shape = (-1, 1, 1, 1)
    scale = quantizer.scale.detach().clone().requires_grad_()
    shift = scale.view(shape) * quantizer.zero_point.detach().view(shape)
    base = fake_quantize(base_weight + shift, scale.view(shape), torch.zeros(shape[1:]), 1) - shift
    (base * upstream).sum().backward()
    torch.testing.assert_close(weight.grad, base_weight.grad)
    torch.testing.assert_close(quantizer.scale.grad, scale.grad)
    left = (weight - base).detach()
    signs = torch.where(left >= 0, 1.0, -1.0)
    expected = (signs * upstream).flatten(1).sum(1)
    assert torch.equal(quantizer.residual_scale.grad[0][:2], torch.zeros(2)), "a channel without corrections"
    torch.testing.assert_close(quantizer.residual_scale.grad[0][2:], expected[2:])


def test_a_finite_step_of_a_corrections_scale_gives_its_gradient() -> None:
    """In float64 the value is linear in the scale of the last plane, whose sign it does not change."""
    weight = weights().double()
    quantizer = frozen(weight, [2] * 6).double().requires_grad_(True)
    quantizer(weight).square().sum().backward()
    before, step = quantizer(weight).square().sum().item(), 1e-6
    quantizer.residual_scale.data[0, 3] += step
    after = quantizer(weight).square().sum().item()
    assert (after - before) / step == pytest.approx(quantizer.residual_scale.grad[0, 3].item(), rel=1e-4)


def test_constrain_keeps_scales_where_they_must_be() -> None:
    quantizer = frozen(weights(), [2] * 6)
    quantizer.scale.data.fill_(-1.0)
    quantizer.residual_scale.data.fill_(-1.0)
    quantizer.constrain()
    assert quantizer.scale.min() > 0 and quantizer.residual_scale.min() == 0


def test_state_dict_round_trip_is_bit_equal() -> None:
    saved = frozen(weights(), [1, 2, 2, 2, 3, 3])
    loaded = ResidualQuantizer(SPEC, saved.bits.clone(), ResidualConfig())
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(weights()), saved(weights()))
    assert loaded.extra_bytes() == saved.extra_bytes()


@pytest.mark.parametrize(("output_errors", "planes"), [([1.0, 2.0], 1), ([2.0, 1.0], 0), ([1.0, 1.0], 0)])
def test_a_layer_takes_what_has_the_smaller_output_error(output_errors: list[float], planes: int) -> None:
    quantizer = frozen(weights(), [2] * 6)
    asked = iter(output_errors)
    seen = []

    def output_error() -> float:
        seen.append(int(quantizer.planes[0]))
        return next(asked)

    quantizer.choose(output_error)
    assert seen == [1, 0], "corrections first, then plain"
    assert quantizer.planes.tolist() == [planes] * 6


def test_activations_are_refused() -> None:
    with pytest.raises(RecipeError, match="is for weights"):
        ResidualQuantizer.from_spec(QuantSpec(PerTensor()), 4, ResidualConfig())


def choices(**options: object) -> QuantizerChoices:
    settings_of = Weights(quantizer=Choice(name="residual", options=options), round_zero_point=False)
    return QuantizerChoices(
        QuantizerChoice(ResidualQuantizer, settings_of), QuantizerChoice(AffineQuantizer, Activations())
    )


def assigned(toy: Toy, inputs_from: InputsFrom, **options: object) -> tuple[Student, BitMap]:
    student = toy.student()
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices(**options), inputs_from)
    batch = calibration_batch(toy.task, toy.calibration, 8)
    return student, assign(student, method, batch, torch.Generator(), silent)


@pytest.mark.parametrize("inputs_from", InputsFrom)
def test_the_engine_lets_every_layer_choose_by_its_output(inputs_from: InputsFrom) -> None:
    """Each layer's choice is the one that an independent measurement of both finds."""
    toy = make_toy(weight_bits=2, activation_bits=8)
    chosen = assigned(toy, inputs_from)[0].layers()
    if inputs_from is InputsFrom.QUANTIZED_UPSTREAM:
        assert any(layer.weight_quantizer.planes.any() for layer in chosen.values())
        return
    always = assigned(toy, inputs_from, decide=False)[0].layers()
    plain = assigned(toy, inputs_from, up_to_bits=1)[0].layers()
    inputs = collected(toy)
    for name, layer in chosen.items():
        module = toy.task.network.get_submodule(name)
        error = {
            kind: (layers[name].forward(inputs[name]) - module(inputs[name])).double().square().mean().item()
            for kind, layers in (("residual", always), ("plain", plain))
        }
        assert bool(layer.weight_quantizer.planes.any()) == (error["residual"] < error["plain"]), name


def collected(toy: Toy) -> dict[str, Tensor]:
    """The float input of every site."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, arguments: inputs.update({name: arguments[0]})

    hooks = [toy.task.network.get_submodule(s.name).register_forward_pre_hook(keep(s.name)) for s in toy.sites]
    toy.task.network(**calibration_batch(toy.task, toy.calibration, 8).inputs)
    for hook in hooks:
        hook.remove()
    return inputs


def test_bytes_are_counted_to_the_last_scale() -> None:
    toy = make_toy(weight_bits=2, activation_bits=8)
    student, bit_map = assigned(toy, InputsFrom.TEACHER, decide=False)
    cost = student_cost(student, bit_map, FloatModel.of(toy.task.network))
    channels = sum(site.out_channels for site in toy.sites)
    # A base scale, a free zero point and the scale of one correction for each channel; a flag for each layer.
    assert cost.scale_bytes + cost.zero_point_bytes == channels * (4 + 4 + 4) + len(toy.sites)
    weights_of = {site.name: site.weight_count // site.out_channels for site in toy.sites}
    assert cost.weight_bytes == sum(packed_bytes(bit_map.weight_bits[name], n) for name, n in weights_of.items())


def test_a_stored_student_is_restored_to_the_bit() -> None:
    toy = make_toy(weight_bits=2, activation_bits=8)
    student, bit_map = assigned(toy, InputsFrom.TEACHER)
    again = restore(toy.student(), bit_map, choices(), student.network.state_dict())
    inputs = toy.task.example_inputs(4)
    assert torch.equal(again.run(inputs), student.run(inputs))
